"""ProMP, several β-steps on the same trajectories: ratios, clipping and KL against loops; and in run.py."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, kl_divergence

import envs
import policies
import run
from harness import checkpoints
from harness.start import first_state
from tests.commands import refused, rows, train
from tests.noise import noise_of, rollout_of, tasks_of
from tests.test_policies import HEADS, K, M, S, example

OPTIONS = {"gamma": 0.9, "baseline": "task", "gae_lambda": 0.8, "advantages": "whitened"}
CLIP = 0.1


def torchs(head, params, obs, s, i):
    """π(·|s) of one run's task as torch writes it; obs (..., D)."""
    x = obs
    layers = sorted(name for name in params if name.startswith("policy") and name.endswith("weight"))
    for name in layers:
        x = x @ params[name][s, i] + params[name.replace("weight", "bias")][s, i]
        x = x if name == layers[-1] else x.tanh()
    if isinstance(head, policies.Categorical):
        return Categorical(logits=x)
    own = {"policy.raw_std": params["policy.raw_std"][s : s + 1, i : i + 1]}
    return Independent(Normal(x, head.std(own)[0, 0]), 1)


def moved(theta, size=0.3):
    """Other parameters near by, leaves, and expanded."""
    g = torch.Generator().manual_seed(3)
    theta = {
        name: (p + size * torch.randn(p.shape, generator=g, dtype=p.dtype)).detach().requires_grad_()
        for name, p in theta.items()
    }
    return theta, {name: p.expand(-1, M, *p.shape[2:]) for name, p in theta.items()}


def looped_ratio_loss(head, params, old, trajectories, advantages, clip):
    """−(1/K) Σₖₜ min(rA, clip(r)A) and (1/K) Σₖₜ KL(π_old ‖ π), one step of one trajectory at a time: (S, M) each."""
    losses, divergences = torch.zeros(S, M, dtype=torch.float64), torch.zeros(S, M, dtype=torch.float64)
    for s, i, k in itertools.product(range(S), range(M), range(K)):
        for t in range(int(trajectories["mask"][s, i, k].sum())):
            obs, action = trajectories["obs"][s, i, k, t], trajectories["actions"][s, i, k, t]
            now, then = torchs(head, params, obs, s, i), torchs(head, old, obs, s, i)
            ratio = (now.log_prob(action) - then.log_prob(action)).exp()
            gain = ratio * advantages[s, i, k, t]
            if clip is not None:
                gain = min(gain, min(max(ratio, 1 - clip), 1 + clip) * advantages[s, i, k, t])
            losses[s, i] = losses[s, i] - gain / K
            divergences[s, i] = divergences[s, i] + kl_divergence(then, now) / K
    return losses, divergences


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("name", HEADS)
def test_losses_and_gradients_of_drawn_trajectories_are_those_of_loops(name, clip):
    head = HEADS[name]
    theta, old, batch = example(head, critic=False)
    drawn = policies.as_drawn(old, batch, head, "pg", **OPTIONS)
    leaves, params = moved(theta)
    loss = policies.loss(params, drawn, head, "pg", estimator="lvc", clip=clip, **OPTIONS)
    to_go = policies.discounted_sums(batch["rewards"], 0.9)
    old = {key: p.detach() for key, p in old.items()}
    expected, divergence = looped_ratio_loss(head, params, old, batch, policies.whiten(to_go, batch["mask"]), clip)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(policies.kl(params, drawn, head), divergence)
    objective = lambda x, d: list(torch.autograd.grad((x + 0.7 * d).sum(), list(leaves.values())))  # noqa: E731
    got = objective(loss, policies.kl(params, drawn, head))
    torch.testing.assert_close(got, objective(expected, divergence))
    # and a finite difference along a random direction
    g = torch.Generator().manual_seed(4)
    direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in leaves.values()]

    def at(step):
        there = {
            key: (p.detach() + step * d).expand(-1, M, *p.shape[2:])
            for (key, p), d in zip(leaves.items(), direction, strict=True)
        }
        total = policies.loss(there, drawn, head, "pg", estimator="lvc", clip=clip, **OPTIONS) + 0.7 * policies.kl(
            there, drawn, head
        )
        return total.sum().item()

    slope = sum((a * b).sum() for a, b in zip(got, direction, strict=True)).item()
    assert (at(1e-6) - at(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-5)


def test_clipping_by_hand():
    """A = 1: a ratio over 1 + ε gains nothing more; A = −1: one under 1 − ε neither; the others count as they are."""
    ratios = torch.tensor([2.0, 0.5, 2.0, 0.5, 1.05], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64).reshape(1, 1, 1, 5)
    logs = ratios.log().reshape(1, 1, 1, 5).requires_grad_()
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    loss = policies.surrogate(logs, advantages, mask, "lvc", torch.zeros_like(logs), CLIP)
    assert loss.item() == pytest.approx(-(1.1 + 0.5 - 2 - 0.9 + 1.05))
    (gradient,) = torch.autograd.grad(loss.sum(), logs)  # of r A: r A
    torch.testing.assert_close(gradient.flatten(), -torch.tensor([0, 0.5, -2, 0, 1.05], dtype=torch.float64))


@pytest.mark.parametrize("rl", ["pg", "ac"])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_under_the_policy_that_drew_them_drawn_trajectories_have_the_fresh_loss_and_no_divergence(rl, clip):
    theta, params, batch = example(HEADS["categorical"])
    head, loss = HEADS["categorical"], partial(policies.loss, rl=rl)
    drawn = policies.as_drawn(params, batch, head, rl, **OPTIONS)
    fresh = loss(params, batch, head, estimator="lvc", **OPTIONS)
    again = loss(params, drawn, head, estimator="lvc", clip=clip, **OPTIONS)
    torch.testing.assert_close(again, fresh, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x.sum(), list(theta.values()), materialize_grads=True) for x in (again, fresh))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert policies.kl(params, drawn, head).abs().max() < 1e-14


def test_the_actor_critics_advantages_and_targets_are_those_of_the_critic_that_was():
    """ac under other parameters: −Σ r A_old, plus ½ the mean of (V_new − target_old)²."""
    head = HEADS["gaussian"]
    theta, old, batch = example(head)
    drawn = policies.as_drawn(old, batch, head, "ac", **OPTIONS)
    _, params = moved(theta)
    mask, obs = batch["mask"], batch["obs"].flatten(0, 1).flatten(1, 2)
    before, after = (policies.mlp(p, "critic")(obs).view(mask.shape).detach() for p in (old, params))
    last = policies.mlp(old, "critic")(batch["last_obs"].flatten(0, 1)).view(mask.shape[:3]).detach()
    advantages = torch.zeros_like(before)
    for s, i, k in itertools.product(range(S), range(M), range(K)):
        advantage, following = 0.0, torch.where(batch["terminated"][s, i, k], 0.0, last[s, i, k])
        for t in reversed(range(int(mask[s, i, k].sum()))):
            advantage = batch["rewards"][s, i, k, t] + 0.9 * following - before[s, i, k, t] + 0.9 * 0.8 * advantage
            advantages[s, i, k, t], following = advantage, before[s, i, k, t]
    errors = ((after - advantages - before).square() * mask).sum((2, 3)) / mask.sum((2, 3))
    old = {key: p.detach() for key, p in old.items()}
    expected, _ = looped_ratio_loss(head, params, old, batch, policies.whiten(advantages, mask), None)
    got = policies.loss(params, drawn, head, "ac", estimator="lvc", **OPTIONS)
    torch.testing.assert_close(got, expected + errors / 2)


@pytest.mark.parametrize("estimator", ["naive", "dice"])
def test_estimators_without_a_ratio_refuse_drawn_trajectories(estimator):
    _, params, batch = example(HEADS["categorical"])
    drawn = policies.as_drawn(params, batch, HEADS["categorical"], "pg", **OPTIONS)
    with pytest.raises(ValueError, match=f"estimator '{estimator}' has no likelihood ratio"):
        policies.loss(params, drawn, HEADS["categorical"], "pg", estimator=estimator, **OPTIONS)


# --- in run.py ---


WORDS = ["--outer-steps", 3, "--clip", CLIP, "--kl-penalty", 2, "--beta", 0.03]


def folder(out, algo="maml", env="point", own=""):
    return out / f"{env}-pg" / algo / own / "seed1"


@pytest.mark.parametrize("algo", ["maml", "fomaml", "joint"])
def test_an_epoch_is_promp_written_as_loops_over_outer_steps_and_tasks(tmp_path, algo):
    """θ' from the inner ratio loss on D, then ∇_θ of the clipped loss on D' under θ' + η KL(π_old ‖ π_θ) on D."""
    joint, algo = algo == "joint", "maml" if algo == "joint" else algo
    words = ["--inner-steps", 0] if joint else ["--alpha", 0.1]
    train(tmp_path, *WORDS, *words, env="point", algo=algo, epochs=1)
    settings = checkpoints.load(folder(tmp_path, algo) / "checkpoint.pt")["settings"]
    env = replace(envs.make("point"), horizon=12)
    head = policies.make_head(env.actions)
    theta = first_state(settings, env)["theta"]
    phi = tasks_of(env, [1], run.TASKS, 2)
    noises = [noise_of(env, [1], run.TASKS, 2, 3, call) for call in (1, 2)]
    options = {"gamma": 0.99, "baseline": "step"}

    def draw(params, i, noise):
        own = {key: x[:, i : i + 1] for key, x in noise.items()}
        trajectories = rollout_of(env, head, params, phi[:, i : i + 1], own)
        return policies.as_drawn(params, trajectories, head, "pg", **options)

    data = [[], []]
    for outer_step in range(3):
        total = dict.fromkeys(theta, 0.0)
        for i in range(2):
            adapted, clip = theta, CLIP if outer_step else None
            if outer_step == 0:
                data[i].append(draw(theta, i, noises[0]))
            if not joint:
                loss = policies.loss(theta, data[i][0], head, "pg", estimator="lvc", **options).sum()
                gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=algo == "maml")
                adapted = {name: p - 0.1 * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
                if outer_step == 0:
                    data[i].append(draw(adapted, i, noises[1]))
            loss = policies.loss(adapted, data[i][-1], head, "pg", estimator="lvc", clip=clip, **options).sum()
            loss = loss + 2 * policies.kl(theta, data[i][0], head).sum()
            gradients = torch.autograd.grad(loss, list(theta.values()))
            total = {name: total[name] + g for name, g in zip(theta, gradients, strict=True)}
        theta = {name: (p - 0.03 * total[name]).detach().requires_grad_() for name, p in theta.items()}
    got = checkpoints.load(folder(tmp_path, algo) / "checkpoint.pt")["theta"]
    for name, p in theta.items():
        torch.testing.assert_close(got[name], p.detach(), rtol=1e-4, atol=1e-5)
    (row,) = rows(folder(tmp_path, algo) / "log.csv")
    divergence = sum(policies.kl(theta, parts[0], head).item() for parts in data) / 2
    assert float(row["kl"]) == pytest.approx(divergence, rel=1e-3) and divergence > 0.01


def test_one_outer_step_is_the_plain_epoch_and_more_begin_with_it(tmp_path):
    """Replayed trajectories are not sampled again and the δ-step is taken once: same first rows but for the β-step."""
    logs = []
    for name, words in (("plain", []), ("one", ["--outer-steps", 1]), ("three", ["--outer-steps", 3])):
        train(tmp_path / name, *words, env="point", algo="directed-maml", epochs=2)
        logs.append(rows(folder(tmp_path / name, "directed-maml", own="delta0.005") / "log.csv"))
    plain, one, three = logs
    assert plain == one and plain[0]["kl"] == ""
    differ = {key for key in plain[0] if plain[0][key] != three[0][key]}
    assert differ == {"beta_norm", "delta_beta_cosine", "kl"}
    assert float(three[0]["beta_norm"]) == pytest.approx(3 * float(plain[0]["beta_norm"]), rel=0.1)
    assert plain[1]["return_post"] != three[1]["return_post"] and plain[1]["env_steps"] == three[1]["env_steps"]


@pytest.mark.parametrize(
    ("algo", "words"),
    [
        ("directed-maml", ["--rl", "ac", "--optimizer", "adam", *WORDS]),
        ("reptile", ["--outer-steps", 2]),
        ("directed-imaml", WORDS),
        ("sharp-fomaml", WORDS),
        ("maml++", [*WORDS, "--baseline", "linear"]),
        ("maml", [*WORDS, "--inner-steps", 0, "--advantages", "raw"]),
    ],
)
def test_every_column_is_the_same_alone_and_in_a_sweep_and_after_resuming(tmp_path, algo, words):
    train(tmp_path / "alone", "--seed", 2, *words, algo=algo, epochs=3)
    train(tmp_path / "sweep", "--seed", 1, 2, *words, algo=algo, epochs=1)
    train(tmp_path / "sweep", "--seed", 1, 2, *words, "--resume", algo=algo, epochs=3)
    logs = [rows(next((tmp_path / x).rglob("seed2/log.csv"))) for x in ("alone", "sweep")]
    assert logs[0] == logs[1] and all(float(row["kl"]) > 0 for row in logs[0])


@pytest.mark.parametrize("algo", ["fomaml", "sharp-fomaml", "maml++", "imaml"])
def test_the_penalty_keeps_the_policy_near_the_old_one_whatever_wraps_the_learner(tmp_path, algo):
    divergences = {}
    for eta in (0, 0.3, 3):
        words = ["--outer-steps", 10, "--kl-penalty", eta, "--beta", 0.003]
        train(tmp_path / str(eta), *words, env="point", algo=algo, epochs=1)
        (row,) = rows(folder(tmp_path / str(eta), algo) / "log.csv")
        divergences[eta] = float(row["kl"])
    assert 0 < divergences[3] < 0.2 * divergences[0.3] < 0.2 * divergences[0]


@pytest.mark.parametrize(
    ("algo", "words", "says"),
    [
        ("maml", ["--clip", 0.2], "--clip does nothing without --outer-steps 2 or more"),
        ("maml", ["--kl-penalty", 0.2, "--outer-steps", 1], "--kl-penalty does nothing without --outer-steps 2"),
        (
            "reptile",
            ["--outer-steps", 2, "--clip", 0.2],
            "--clip does nothing without --outer-steps 2 or more, and a le",
        ),
        (
            "maml",
            ["--outer-steps", 2, "--estimator", "dice"],
            "--outer-steps 2: --estimator dice has no likelihood rat",
        ),
    ],
)
def test_flags_that_have_no_effect_or_no_ratio_are_refused(tmp_path, capsys, algo, words, says):
    assert says in refused(capsys, tmp_path, *words, algo=algo)
