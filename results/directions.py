"""Is the medium task's gradient a better direction than another task's? Writes results/directions.csv.

From the repository's root: `python -m results.directions`. Trains FOMAML with Table I's step sizes, 10 seeds. At some
epochs it takes the gradients of the loss at the same θ on a grid of tasks over Φ, each many times with fresh
trajectories. All cosines are with the shared direction, the mean of the tasks' expected gradients over the grid.
"Expected" is the cosine of a task's expected gradient; "K = 10" that of an estimate from 10 trajectories, which is what
a δ-step follows. The medium task is the δ-step's default; "all tasks" is the mean cosine over the grid, which is what
`--medium random` gets on average. To keep noise from biasing the expected values, they come from two halves of the
repeats: cos(a, b) = <a₁, b₂> / √(<a₁, a₂> <b₁, b₂>), which may exceed 1. A row for each run and epoch.
"""

from pathlib import Path

import torch

import envs
import maml
import run
from bench import measure
from harness import checkpoints, gyms
from results import protocol

REPEATS, SEEDS = 60, range(1, 11)
ENVS, EPOCHS = ("cartpole", "crossing", "point"), (1, 25, 50, 100)


def load_run(folder):
    state = checkpoints.load(folder / checkpoints.CHECKPOINT)
    return checkpoints.Run(folder, state["settings"], state)


def gradients(batch, grid):
    """Estimates of the gradient at θ from K trajectories each: (repeats, S, G, number of parameters)."""
    batch.keys[envs.OTHER] = envs.stream([r.settings["seed"] for r in batch.runs], envs.OTHER).keys
    task_loss = run.TaskLoss(batch, envs.OTHER, grid.expand(len(batch.runs), *grid.shape).numpy())
    theta = {key: p.detach().requires_grad_() for key, p in maml.expand(batch.theta, len(grid)).items()}
    estimates = []
    for _ in range(REPEATS):
        parts = torch.autograd.grad(task_loss(theta).sum(), list(theta.values()))
        estimates.append(torch.cat([part.flatten(2) for part in parts], 2))
    return torch.stack(estimates)


def dot(a, b):
    return (a * b).sum(-1)


def cosines(estimates):
    """(repeats, S, G, n) -> {column: (S,) cosines}; the medium task is the middle one of the grid."""
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
    rows = []
    for name in ENVS:
        env = gyms.make(name)
        out = Path("runs/directions")
        folders = [out / f"{name}-pg/fomaml/seed{seed}" for seed in SEEDS]
        for epoch in EPOCHS:
            words = ["--env", name, "--algo", "fomaml", "--epochs", epoch, "--out", out, "--quiet", "--resume"]
            run.main([*map(str, words), "--seed", *map(str, SEEDS)])
            with measure.opened(env, [load_run(folder) for folder in folders], "cpu") as batch:
                found = cosines(gradients(batch, envs.held_out_tasks(env)))
            for i, seed in enumerate(SEEDS):
                cells = {column: values[i].item() for column, values in found.items()}
                rows.append({"environment": name, "epoch": epoch, "seed": seed, **cells})
    protocol.write(Path(__file__).with_suffix(".csv"), protocol.text_of(rows))


if __name__ == "__main__":
    main()
