"""A learner is a row, and what iMAML, MAML++ and Sharp-MAML need of run.py: settings, evaluation, loaded runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import envs
import maml
import run
from harness import checkpoints, trained
from harness.plan import make_env, plan
from harness.settings import ALL_SETTINGS, SETTINGS, Setting, owner_of, parse
from harness.start import first_state
from tests.commands import refused, rows, train

STILL = ["--beta", 1e-30]  # θ stays where it began


def state(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def planned(algo, *words):
    args = parse(["--env", "cartpole", "--algo", algo, *map(str, words)])
    return [settings for _, settings in plan(args, algo, make_env(args))]


# --- a learner is a function and a row ---


def sign_maml(theta, task_loss, alpha, num_tasks, inner_steps=1, shrink=None):
    """The signs of MAML's meta-gradient, times a setting of its own."""
    maml.maml(theta, task_loss, alpha, num_tasks, inner_steps)
    for p in theta.values():
        p.grad = p.grad.sign() * maml.of_each_run(shrink, p)


@pytest.fixture
def added(monkeypatch):
    """Sign-MAML, added as its row and the row of its flag, as somebody would who edits the two tables."""
    row = maml.Learner(sign_maml, settings=("shrink",), defaults={"beta": 0.25}, joint_training=False)
    monkeypatch.setitem(maml.LEARNERS, "sign-maml", row)
    flag = Setting("shrink", "factor of the signs", "0.5", float, 0.5, needs=owner_of("shrink"))
    monkeypatch.setitem(SETTINGS, "step sizes", [*SETTINGS["step sizes"], flag])
    monkeypatch.setitem(ALL_SETTINGS, "shrink", flag)


def test_an_added_learner_is_listed_and_its_row_decides_what_is_refused(tmp_path, capsys, monkeypatch, added):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        run.main(["--help"])
    text = capsys.readouterr().out
    assert "sign-maml" in text and "directed-sign-maml" in text and "sign-maml 0.25" in text  # its default β
    assert "--inner-steps 0: sign-maml" in refused(capsys, tmp_path, "--inner-steps", 0, algo="sign-maml")
    line = refused(capsys, tmp_path, "--shrink", 2, algo="maml")
    assert "--shrink does nothing without the algorithm sign-maml or directed-sign-maml" in line


@pytest.mark.parametrize("algo", ["sign-maml", "directed-sign-maml"])
def test_an_added_learner_trains_resumes_evaluates_is_loaded_and_reported(tmp_path, added, algo):
    words = ["--shrink", 0.5, "--delta", 0] if algo.startswith("directed") else ["--shrink", 0.5]
    train(tmp_path / "straight", *words, env="point", algo=algo, epochs=2)
    train(tmp_path / "stopped", *words, env="point", algo=algo, epochs=1)
    (first,) = (path.parent for path in (tmp_path / "stopped").rglob("checkpoint.pt"))
    start = first_state(state(first)["settings"], envs.make("point", horizon=12))["theta"]
    for name, p in state(first)["theta"].items():  # its default β, times the signs' factor
        torch.testing.assert_close((p - start[name]).abs(), torch.full_like(p, 0.25 * 0.5), rtol=1e-5, atol=1e-6)
    train(tmp_path / "stopped", *words, "--resume", env="point", algo=algo, epochs=2)
    (straight,) = (path.parent for path in (tmp_path / "straight").rglob("checkpoint.pt"))
    assert rows(straight / "log.csv") == rows(first / "log.csv")
    assert {row["step"] for row in rows(first / "eval.csv")} == {"0", "1"}
    adapted = trained.load(first).adapt(phi=[0.3, 0.3])
    assert not torch.equal(adapted.theta["policy.0.weight"], state(first)["theta"]["policy.0.weight"])
    assert f"| {algo}" in (tmp_path / "stopped/point-pg/report.md").read_text()


# --- settings ---


def test_lambda_is_one_over_the_alpha_of_each_run_unless_it_is_given():
    assert [x["lambda_"] for x in planned("directed-imaml", "--alpha", 0.001, 0.1)] == [1000, 10]
    assert [x["lambda_"] for x in planned("imaml", "--alpha", 0.001, 0.1, "--lambda", 3)] == [3, 3]
    assert planned("maml")[0]["lambda_"] is planned("maml")[0]["rho"] is planned("maml")[0]["cg_steps"] is None
    assert planned("directed-maml++")[0]["beta_alpha"] == pytest.approx(0.001 * 0.001)  # α times β, as Meta-SGD's


@pytest.mark.parametrize(
    ("algo", "words", "says"),
    [
        ("maml", ["--lambda", 1], "--lambda does nothing without the algorithm imaml or directed-imaml"),
        ("maml++", ["--cg-steps", 1], "--cg-steps does nothing without the algorithm imaml"),
        ("imaml", ["--first-order-epochs", 1], "--first-order-epochs does nothing without the algorithm maml++"),
        ("maml", ["--rho", 1], "--rho does nothing without an algorithm with sharp- in its name"),
        ("maml++", ["--eval-alpha", 1], "--eval-alpha does nothing without an algorithm whose α is not learned"),
        ("imaml", ["--lambda", 0], "--lambda: '0': expected a finite number > 0"),
        ("imaml", ["--lambda", 2000], "--lambda 2000: with --alpha 0.001 the inner steps diverge, since α λ >= 2"),
        ("imaml", ["--lambda", 10, "--alpha", 0.1, 0.2], "give a --lambda below 10, or a smaller --alpha"),
        ("imaml", ["--alpha", 0], "--alpha 0: imaml would never take an inner step; give --alpha above 0"),
        ("maml++", ["--alpha", 0], "give --alpha above 0, or --beta-alpha"),
        ("imaml", ["--inner-steps", 0], "--inner-steps 0: imaml learns from inner steps"),
        ("maml++", ["--inner-steps", 0], "--inner-steps 0: maml++ learns from inner steps"),
    ],
)
def test_flags_that_have_no_effect_are_refused(tmp_path, capsys, algo, words, says):
    assert says in refused(capsys, tmp_path, *words, algo=algo)


def test_a_run_that_began_with_another_lambda_names_the_flag(tmp_path, capsys):
    train(tmp_path, algo="imaml", epochs=1)
    assert "give --lambda as before" in refused(capsys, tmp_path, "--resume", "--lambda", 2, algo="imaml")


def test_maml_plus_plus_learns_an_alpha_for_each_inner_step(tmp_path):
    train(tmp_path, "--inner-steps", 3, "--beta-alpha", 1e-4, algo="maml++", epochs=1)
    alpha = state(tmp_path / "cartpole-pg/maml++/seed1")["alpha"]["policy.1.weight"]
    assert alpha.shape == (1, 1, 3, 8, 2)  # (S, 1, steps, ...)
    moves = (alpha - 0.001)[0, 0]
    assert (moves.flatten(1) != 0).any(1).all() and not torch.equal(moves[0], moves[1])


# --- what is logged ---


def test_sharp_maml_logs_the_returns_at_theta_and_samples_twice(tmp_path):
    """Where its second meta-gradient is taken, at θ + ρ g/‖g‖ with ρ = 10, the policy is another one."""
    train(tmp_path, *STILL, algo="fomaml", epochs=1)
    train(tmp_path, *STILL, "--rho", 10, algo="sharp-fomaml", epochs=1)
    (plain,), (sharp,) = (rows(tmp_path / f"cartpole-pg/{algo}/seed1/log.csv") for algo in ("fomaml", "sharp-fomaml"))
    assert [plain[x] for x in ("return_pre", "return_post")] == [sharp[x] for x in ("return_pre", "return_post")]
    assert int(sharp["env_steps"]) > 1.5 * int(plain["env_steps"])


def test_imaml_samples_for_its_hessian_and_its_query_after_the_inner_steps(tmp_path):
    train(tmp_path, *STILL, "--inner-steps", 2, env="point", algo="imaml", epochs=1)
    (row,) = rows(tmp_path / "point-pg/imaml/seed1/log.csv")
    assert int(row["env_steps"]) == (2 + 1 + 1) * 2 * 3 * 12  # M K H


# --- adapting as in training ---


def test_imaml_is_evaluated_on_its_proximal_objective(tmp_path):
    """It pulls θ' back to θ: the first step, at θ, does not know it; with λ → 0 there is none."""
    for name, algo, words in (("none", "imaml", ["--lambda", 1e-9]), ("strong", "imaml", []), ("maml", "maml", [])):
        words = [*words, "--eval-steps", 2, *STILL, "--alpha", 0.1]
        train(tmp_path / name, *words, env="point", algo=algo, epochs=1)
    returns = {}
    for path in tmp_path.rglob("eval.csv"):
        table = rows(path)
        returns[path.relative_to(tmp_path).parts[0]] = [
            [float(row["return"]) for row in table if row["step"] == str(step)] for step in range(3)
        ]
    for step in range(3):
        assert returns["none"][step] == pytest.approx(returns["maml"][step], rel=1e-4)
    assert returns["strong"][0] == returns["maml"][0]
    assert returns["strong"][1] == pytest.approx(returns["maml"][1], rel=1e-6)
    assert returns["strong"][2] != pytest.approx(returns["maml"][2], rel=1e-4)


def test_another_alpha_of_imamls_evaluation_pulls_back_by_the_same_share(tmp_path):
    """α λ = 0.3 in both: θ' ← θ' − α ∇L − 0.3 (θ' − θ)."""
    tables = []
    for name, words in (("other", ["--alpha", 0.1, "--lambda", 3, "--eval-alpha", 0.2]), ("same", ["--alpha", 0.2])):
        words = [*words, *(["--lambda", 1.5] if name == "same" else []), "--eval-steps", 3, *STILL]
        train(tmp_path / name, *words, env="point", algo="imaml", epochs=1)
        tables.append(rows(tmp_path / name / "point-pg/imaml/seed1/eval.csv"))
    for ours, theirs in zip(*tables, strict=True):
        assert float(ours["return"]) == pytest.approx(float(theirs["return"]), rel=1e-4)


@pytest.fixture(scope="module")
def episodes():
    """Three lists of two CartPole episodes."""
    rng = np.random.default_rng(0)
    return [[(rng.normal(size=(6, 4)), rng.integers(0, 2, 5), rng.normal(size=5)) for _ in range(2)] for _ in range(3)]


def test_a_loaded_imaml_run_takes_the_steps_of_its_proximal_objective(tmp_path, episodes):
    """θ₁ = θ − α'g(θ), and θ₂ = θ₁ − α'g(θ₁) − αλ(θ₁ − θ), g on the episodes of each step, α' of the evaluation."""
    train(tmp_path, "--alpha", 0.1, "--lambda", 3, "--eval-alpha", 0.2, algo="imaml", epochs=1)
    policy = trained.load(tmp_path / "cartpole-pg/imaml/seed1")
    assert policy.inner_steps == planned("imaml")[0]["inner_steps"]
    theta = first = policy.theta
    for part in episodes[:2]:
        leaves = {name: p.clone().requires_grad_() for name, p in first.items()}
        loss = policy.loss(leaves, policy.trajectories(part))
        gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
        pulled = zip(first.items(), gradients, theta.values(), strict=True)
        first = {name: p - 0.2 * g - 0.3 * (p - start) for (name, p), g, start in pulled}
    adapted = policy.adapt(episodes=episodes[:2]).theta
    for name, p in first.items():
        torch.testing.assert_close(adapted[name], p.detach(), rtol=1e-5, atol=1e-7)
    policy.adapt(phi=[9.0])


def test_a_loaded_maml_plus_plus_run_takes_its_last_alpha_for_all_further_steps(tmp_path, episodes):
    train(tmp_path, "--alpha", 0.1, "--beta-alpha", 1e-2, algo="maml++", epochs=1)
    policy = trained.load(tmp_path / "cartpole-pg/maml++/seed1")
    assert policy.inner_steps == 2 and len(policy.alpha["policy.0.bias"][0, 0]) == 2
    three = {name: torch.cat([p, p[:, :, -1:]], 2) for name, p in policy.alpha.items()}
    expected = checkpoints.take(replace(policy, alpha=three).adapt(episodes=episodes).theta, 0)
    got = policy.adapt(episodes=episodes).theta
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert not torch.equal(policy.alpha["policy.1.weight"][:, :, 0], policy.alpha["policy.1.weight"][:, :, 1])
