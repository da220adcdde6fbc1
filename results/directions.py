"""Is the medium task's gradient a better direction than another task's? -> results/directions.md

From the repository's root: `python -m results.directions`. Trains FOMAML with Table I, 10 seeds, and at some epochs
takes the gradients of the loss, at the same θ, on a grid of tasks over Φ, each many times with fresh trajectories. A
cosine is one to the direction that all tasks share, the mean over the grid of their expected gradients; first of a
task's expected gradient, then of an estimate from K = 10 trajectories, which is what a δ-step follows. The medium task
is the δ-step's default, all tasks (their mean cosine) what `--medium random` takes. Expected values come from two
halves of the repeats, so that noise does not bias them: cos(a, b) = <a₁, b₂> / √(<a₁, a₂> <b₁, b₂>). Medians
over seeds, 95% intervals by order statistics.
"""

from pathlib import Path

import torch

import envs
import maml
import report
import run

REPEATS, SEEDS = 60, range(1, 11)
ENVS, EPOCHS = ("cartpole", "crossing", "point"), (1, 25, 50, 100)


def gradients(batch, problem, grid):
    """Estimates of the gradient at θ, from K trajectories each: (repeats, S, G, number of parameters)."""
    rng = envs.generators(batch.seeds, 99, batch.epoch)
    task_loss = run.TaskLoss(problem, batch.settings[0], grid.expand(len(batch.seeds), *grid.shape), rng)
    theta = {key: p.detach().requires_grad_() for key, p in maml.expand(batch.theta, len(grid)).items()}
    estimates = []
    for _ in range(REPEATS):
        parts = torch.autograd.grad(task_loss(theta).sum(), list(theta.values()))
        estimates.append(torch.cat([part.flatten(2) for part in parts], 2))
    return torch.stack(estimates)


def dot(a, b):
    return (a * b).sum(-1)


def cosines(estimates):
    """(repeats, S, G, n) -> {column: one number for each run}; the medium task is the middle one of the grid."""
    middle = estimates.shape[2] // 2
    halves = estimates.unflatten(0, (2, -1))  # (2, repeats / 2, S, G, n)
    tasks = halves.mean(1)  # (2, S, G, n)
    shared = tasks.mean(2, keepdim=True)  # (2, S, 1, n)
    norm = dot(shared[0], shared[1]).sqrt()  # (S, 1)
    expected = dot(tasks[0], shared[1]) / (dot(tasks[0], tasks[1]).sqrt() * norm)  # (S, G)
    single = (dot(halves, shared.flip(0)[:, None]) / (halves.norm(dim=-1) * norm)).mean((0, 1))  # (S, G)
    return {
        "medium task, expected": expected[:, middle],
        "all tasks, expected": expected.mean(1),
        "medium task, K = 10": single[:, middle],
        "all tasks, K = 10": single.mean(1),
    }


def main():
    run.keep_memory()
    lines = []
    for env in ENVS:
        problem_env = envs.make(env)
        out = Path("runs/directions")
        folders = [out / f"{env}-pg/fomaml/seed{seed}" for seed in SEEDS]
        for epoch in EPOCHS:
            words = ["--env", env, "--algo", "fomaml", "--epochs", epoch, "--out", out, "--quiet", "--resume"]
            run.main([*map(str, words), "--seed", *map(str, SEEDS)])
            batch = run.stack([run.load(folder / run.CHECKPOINT) for folder in folders], folders, "cpu")
            with run.open_problem(problem_env, 0, "cpu") as problem:
                found = cosines(gradients(batch, problem, envs.held_out_tasks(problem_env)))
            cells = {column: report.with_interval(values.tolist(), "{:.2f}".format) for column, values in found.items()}
            lines.append({"environment": env, "epoch": f"{batch.epoch}", **cells})
    report.write_atomically(Path(__file__).with_suffix(".md"), f"# Directions\n\n{report.markdown(lines)}\n\n{__doc__}")


if __name__ == "__main__":
    main()
