"""The controls and comparators of run.py: joint training, the oracle, pooled tasks, raw advantages, baselines."""

import csv
from dataclasses import replace

import pytest
import torch

import envs
import policies
import run
from harness import checkpoints, trained
from harness.start import first_state
from tests.noise import noise_of, rollout_of, tasks_of

SMALL = ["--tasks", "2", "--trajectories", "4", "--horizon", "12", "--hidden", "8", "--eval-every", "2", "--quiet"]


def go(out, *words, env="cartpole", algo="maml", epochs=2):
    """Run a small command in this process."""
    command = ["--env", env, "--algo", *algo.split(), "--epochs", epochs, "--out", out, "--workers", 1, *SMALL, *words]
    run.main([str(word) for word in command])


def refused(capsys, out, *words, **kwargs):
    """The one line on standard error of a command that is wrong."""
    with pytest.raises(SystemExit) as stop:
        go(out, *words, **kwargs)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1 and not any(out.iterdir())
    return captured.err


def rows(folder, table="log"):
    with open(folder / f"{table}.csv", newline="") as file:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]


def theta(folder):
    return checkpoints.load(folder / "checkpoint.pt")["theta"]


# --- advantages and baselines ---


@pytest.mark.parametrize("baseline", ["step", "linear"])
def test_one_trajectory_with_a_baseline_over_trajectories_is_refused(tmp_path, capsys, baseline):
    line = refused(capsys, tmp_path, "--trajectories", 1, "--baseline", baseline)
    assert f"--trajectories 1: --baseline {baseline}" in line and "--baseline task" in line
    assert "--trajectories 1" in refused(capsys, tmp_path, "--trajectories", 1, env="point")  # its default: step
    go(tmp_path / "fine", "--trajectories", 1)
    go(tmp_path / "fine", "--trajectories", 1, "--advantages", "raw", env="point")


def test_a_baseline_does_nothing_with_raw_advantages_and_is_refused(tmp_path, capsys):
    line = refused(capsys, tmp_path, "--advantages", "raw", "--baseline", "step")
    assert "--baseline does nothing without --advantages whitened" in line


# --- joint training ---


def test_joint_training_takes_one_rollout_an_epoch_and_the_summed_gradient_of_the_tasks(tmp_path):
    """point never ends early: M K H steps an epoch. One plain step of size β = 1 moves θ by −Σᵢ ∇L_Tᵢ(θ)."""
    words = ["--inner-steps", 0, "--beta", 1, "--seed", 3]
    go(tmp_path, *words, env="point", algo="maml directed-maml", epochs=1)
    joint, directed = (tmp_path / "point-pg" / name / "seed3" for name in ("maml", "directed-maml/delta0.005"))
    (row,) = rows(joint)
    assert int(row["env_steps"]) == 2 * 4 * 12 and row["return_pre"] == row["return_post"]
    assert int(rows(directed)[0]["env_steps"]) == (1 + 2) * 4 * 12
    settings = checkpoints.load(joint / "checkpoint.pt")["settings"]
    env = replace(envs.make("point"), horizon=12)
    head = policies.make_head(env.actions)
    start = first_state(settings, env)["theta"]
    phi, noise = tasks_of(env, [3], run.TASKS, 2), noise_of(env, [3], run.TASKS, 2, 4)
    seen = {name: p.expand(-1, 2, *p.shape[2:]) for name, p in start.items()}
    trajectories = rollout_of(env, head, seen, phi, noise)
    gradient = dict.fromkeys(start, 0.0)
    for i in range(2):
        task = {key: x[:, i : i + 1] for key, x in trajectories.items()}
        loss = policies.loss(start, task, head, "pg", 0.99, "lvc", "step")
        for (name, _), g in zip(start.items(), torch.autograd.grad(loss.sum(), list(start.values())), strict=True):
            gradient[name] = gradient[name] + g
    for name, p in theta(joint).items():
        torch.testing.assert_close(p, start[name].detach() - gradient[name], rtol=1e-5, atol=1e-5)


def test_alpha_zero_is_joint_training_on_fresh_trajectories(tmp_path):
    """θ' = θ, so the gradient is that of the second batch, which inner_steps = 0 would draw first."""
    go(tmp_path, "--alpha", 0, 0.001, env="point", epochs=1)
    zero, _ = (tmp_path / "point-pg" / "maml" / f"alpha{a}" / "seed1" for a in ("0", "0.001"))
    (row,) = rows(zero)
    assert int(row["env_steps"]) == 2 * 2 * 4 * 12 and row["return_pre"] != row["return_post"]
    go(tmp_path / "first-order", "--alpha", 0, env="point", algo="fomaml", epochs=1)
    first_order = theta(tmp_path / "first-order" / "point-pg" / "fomaml" / "seed1")
    for name, p in theta(zero).items():  # no second-order term is left
        torch.testing.assert_close(p, first_order[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("words", [["--inner-steps", 0], ["--alpha", 0]])
def test_joint_training_is_evaluated_with_the_familys_alpha_or_eval_alpha(tmp_path, words):
    for name, more in (("default", []), ("same", ["--eval-alpha", 0.03]), ("other", ["--eval-alpha", 0.5])):
        go(tmp_path / name, *words, *more, env="point")
    default, same, other = (tmp_path / name / "point-pg" / "maml" / "seed1" for name in ("default", "same", "other"))
    assert envs.ENVS["point"].defaults["alpha"] == 0.03
    assert rows(default, "eval") == rows(same, "eval") and rows(default) == rows(other)
    for mine, others in zip(rows(default, "eval"), rows(other, "eval"), strict=True):
        assert (mine["return"] == others["return"]) == (mine["step"] == "0")
    assert trained.load(default).alpha == 0.03 and trained.load(other).alpha == 0.5
    adapted = trained.load(default).adapt(phi=[0.3, 0.3])
    assert any(not torch.equal(p, theta(default)[name]) for name, p in adapted.theta.items())  # it adapts


def test_eval_alpha_is_alpha_where_there_is_one(tmp_path):
    go(tmp_path / "default", "--alpha", 0.02, 0.2, env="point")
    go(tmp_path / "named", "--alpha", 0.02, "--eval-alpha", 0.02, env="point")
    sweep = tmp_path / "default" / "point-pg" / "maml"
    named = tmp_path / "named" / "point-pg" / "maml" / "seed1"
    assert rows(sweep / "alpha0.02" / "seed1", "eval") == rows(named, "eval")
    assert trained.load(sweep / "alpha0.2" / "seed1").alpha == 0.2


@pytest.mark.parametrize(
    ("algo", "words", "says"),
    [
        ("reptile", ["--inner-steps", 0], "--inner-steps 0: reptile learns from inner steps; for joint training give"),
        ("directed-reptile", ["--inner-steps", 0], "--inner-steps 0: directed-reptile learns from inner steps"),
        ("meta-sgd", ["--inner-steps", 0], "--inner-steps 0: meta-sgd learns from inner steps"),
        ("reptile", ["--alpha", 0], "--alpha 0: reptile would never take an inner step; give --alpha above 0"),
        ("meta-sgd", ["--alpha", 0.1, 0], "give --alpha above 0, or --beta-alpha"),
        ("maml", ["--inner-steps", 0, "--alpha", 0.1], "--alpha does nothing without --inner-steps 1 or more"),
        ("meta-sgd", ["--eval-alpha", 0.1], "--eval-alpha does nothing without an algorithm whose α is not learned"),
        (
            "directed-maml",
            ["--medium", "pooled", "--trajectories", 5],
            "--trajectories 5 is not a multiple of --tasks 2",
        ),
        ("maml", ["--medium", "pooled"], "--medium does nothing without an algorithm that begins with directed-"),
    ],
)
def test_what_would_train_nothing_or_has_no_effect_is_refused(tmp_path, capsys, algo, words, says):
    assert says in refused(capsys, tmp_path, *words, algo=algo)


def test_like_takes_switches_and_zeros_from_a_run(tmp_path):
    go(tmp_path / "first", "--alpha", 0, "--oracle", "--delta", 0, algo="directed-maml")
    first = tmp_path / "first" / "cartpole-pg" / "directed-maml" / "delta0" / "seed1"
    run.main(["--like", str(first), "--out", str(tmp_path / "second"), "--epochs", "2", "--quiet", "--eval-every", "2"])
    second = tmp_path / "second" / "cartpole-pg" / "directed-maml" / "delta0" / "seed1"
    assert rows(first) == rows(second)


# --- the oracle ---


@pytest.mark.parametrize(
    ("env", "words", "base"),
    [("point", [], 2), ("Pendulum-v1", ["--param", "g", "m", "--range", 5, 15, 1, 2], 3)],
)
def test_an_oracle_trains_resumes_is_loaded_and_acts_on_phi(tmp_path, env, words, base):
    go(tmp_path, "--oracle", *words, env=env, epochs=1)
    go(tmp_path, "--oracle", *words, "--resume", env=env)
    folder = tmp_path / f"{env}-pg" / "maml" / "seed1"
    policy = trained.load(folder)
    assert policy.env.obs_dim == base + 2 and policy.theta["policy.0.weight"].shape[2] == base + 2
    policy = policy.adapt(phi=[0.1, 0.2] if env == "point" else [9.0, 1.5])
    low, high = torch.tensor(policy.env.low), torch.tensor(policy.env.high)
    actions = []
    for phi in (low, high):
        scaled = envs.scaled_phi(policy.env, phi.numpy())
        actions.append(policy.act([0.0] * base + scaled.tolist(), greedy=True))
    assert (actions[0] != actions[1]).any()


# --- pooled ---


def test_the_pooled_medium_task_costs_k_trajectories_and_is_the_mean_over_the_tasks_trajectories(tmp_path):
    """δ-step with β so small that it vanishes: θ moves by −δ∇ of the loss on K / M trajectories of each task."""
    words = ["--medium", "pooled", "--delta", 1, "--beta", 1e-12]
    go(tmp_path, *words, env="point", algo="directed-fomaml", epochs=1)
    folder = tmp_path / "point-pg" / "directed-fomaml" / "delta1" / "seed1"
    assert int(rows(folder)[0]["env_steps"]) == (1 + 2 + 2) * 4 * 12
    settings = checkpoints.load(folder / "checkpoint.pt")["settings"]
    env = replace(envs.make("point"), horizon=12)
    head = policies.make_head(env.actions)
    start = first_state(settings, env)["theta"]
    phi = tasks_of(env, [1], run.TASKS, 2)  # the epoch's own tasks
    noise = noise_of(env, [1], run.MEDIUM, 2, 2)
    parts = []
    for i in range(2):  # two trajectories of each task, one task after the other
        own = {key: x[:, i : i + 1] for key, x in noise.items()}
        parts.append(rollout_of(env, head, start, phi[:, i : i + 1], own))
    together = {key: torch.cat([part[key] for part in parts], 2) for key in parts[0]}  # (1, 1, K, ...)
    loss = policies.loss(start, together, head, "pg", 0.99, "lvc", "step")
    gradients = torch.autograd.grad(loss.sum(), list(start.values()))
    for (name, p), g in zip(start.items(), gradients, strict=True):
        torch.testing.assert_close(theta(folder)[name], p.detach() - g, rtol=1e-5, atol=1e-5)
    expected = together["rewards"].sum(3).mean().item()
    assert float(rows(folder)[0]["return_med"]) == pytest.approx(expected, rel=1e-5)


# --- what is logged ---


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_reptiles_return_post_is_that_after_its_last_inner_step_and_no_training(tmp_path, inner_steps):
    """FOMAML takes the same inner steps on the same noise, and its next batch is under the same θ'."""
    go(tmp_path, "--inner-steps", inner_steps, env="point", algo="fomaml reptile", epochs=1)
    (fomaml,), (reptile,) = (rows(tmp_path / "point-pg" / algo / "seed1") for algo in ("fomaml", "reptile"))
    assert reptile["return_pre"] == fomaml["return_pre"] != reptile["return_post"] == fomaml["return_post"]
    assert int(fomaml["env_steps"]) - int(reptile["env_steps"]) == 2 * 4 * 12  # its query batch


def test_the_norms_are_those_of_what_the_delta_and_beta_steps_moved(tmp_path):
    """δ = 0.5 with β ≈ 0 moves θ by the δ-step alone; the rest of the way, at β = 0.5, is the β-step's."""
    for name, beta in (("delta", 1e-30), ("both", 0.5)):
        go(tmp_path / name, "--delta", 0.5, "--beta", beta, "--rl", "ac", env="point", algo="directed-maml", epochs=1)
    folders = [tmp_path / name / "point-ac" / "directed-maml" / "delta0.5" / "seed1" for name in ("delta", "both")]
    env = replace(envs.make("point"), horizon=12)
    start = first_state(checkpoints.load(folders[0] / "checkpoint.pt")["settings"], env)["theta"]
    first, second, third = (
        torch.cat([p.detach().double().flatten() for p in parameters.values()])
        for parameters in (start, *map(theta, folders))
    )
    by_delta, by_beta = second - first, third - second
    only, both = (rows(folder)[0] for folder in folders)
    assert float(both["delta_norm"]) == pytest.approx(by_delta.norm().item(), rel=1e-4)
    assert float(both["beta_norm"]) == pytest.approx(by_beta.norm().item(), rel=1e-4)
    cosine = (by_delta @ by_beta / by_delta.norm() / by_beta.norm()).item()
    assert float(both["delta_beta_cosine"]) == pytest.approx(cosine, abs=1e-4)
    assert only["delta_norm"] == both["delta_norm"]


def test_undirected_runs_have_no_delta_columns_and_a_step_of_length_zero_no_cosine(tmp_path):
    go(tmp_path, "--delta", 0, algo="maml directed-maml")
    for row in rows(tmp_path / "cartpole-pg" / "maml" / "seed1"):
        assert row["delta_norm"] == row["delta_beta_cosine"] == "" and float(row["beta_norm"]) > 0
    for row in rows(tmp_path / "cartpole-pg" / "directed-maml" / "delta0" / "seed1"):
        assert row["delta_norm"] == "0" and row["delta_beta_cosine"] == "" and float(row["beta_norm"]) > 0
