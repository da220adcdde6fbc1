"""Networks, distributions, losses and estimators against torch.nn, torch.distributions, loops and exact enumeration."""

import itertools
import math

import numpy
import pytest
import torch

import maml
import policies
from policies import ESTIMATORS, LOSSES, Categorical, Gaussian, discounted_sums, surrogate, whiten
from tests.noise import uniform_of

S, M, K, H, D = 2, 3, 4, 6, 5


def seeded(count=S):
    """What draws the parameters of runs 0, 1, .."""
    return uniform_of(range(count))


def in_double(params):
    return {name: p.detach().double().requires_grad_() for name, p in params.items()}


def example(head, critic=True):
    """Parameters (S, M, ...) and a batch of ragged episodes; float64."""
    theta = in_double(policies.init(D, head, seeded(), hidden=(7, 6), critic=critic))
    params = {name: p.expand(-1, M, *p.shape[2:]) for name, p in theta.items()}
    g = torch.Generator().manual_seed(9)
    lengths = torch.randint(1, H + 1, (S, M, K), generator=g)
    mask = torch.arange(H) < lengths.unsqueeze(-1)
    if isinstance(head, Categorical):
        actions = torch.randint(head.size, (S, M, K, H), generator=g)
    else:
        actions = torch.randn(S, M, K, H, head.size, generator=g, dtype=torch.float64)
    batch = {
        "obs": torch.randn(S, M, K, H, D, generator=g, dtype=torch.float64) * mask.unsqueeze(-1),
        "actions": actions,
        "rewards": torch.randn(S, M, K, H, generator=g, dtype=torch.float64) * mask,
        "mask": mask,
        "last_obs": torch.randn(S, M, K, D, generator=g, dtype=torch.float64),
        "terminated": torch.rand(S, M, K, generator=g) < 0.5,
    }
    return theta, params, batch


HEADS = {"categorical": Categorical(3), "gaussian": Gaussian(2)}

# --- networks ---


@pytest.mark.parametrize("hidden", [(), (8,), (8, 6, 4)])
def test_mlp_is_the_tanh_network_that_torch_builds_from_the_same_weights(hidden):
    theta = in_double(policies.init_mlp("policy", [D, *hidden, 2], seeded()))
    params = {name: p.expand(-1, M, *p.shape[2:]) for name, p in theta.items()}
    x = torch.randn(S * M, 11, D, dtype=torch.float64)
    got = policies.mlp(params, "policy")(x)
    for b in range(S * M):
        layers = []
        for i, (n, m) in enumerate(zip([D, *hidden], [*hidden, 2], strict=True)):
            linear = torch.nn.Linear(n, m).double()
            linear.weight.data = params[f"policy.{i}.weight"][b // M, b % M].T
            linear.bias.data = params[f"policy.{i}.bias"][b // M, b % M, 0]
            layers += [linear, torch.nn.Tanh()]
        torch.testing.assert_close(got[b], torch.nn.Sequential(*layers[:-1])(x[b]), rtol=1e-12, atol=1e-12)


def test_initial_weights_are_within_linears_bounds_and_depend_on_the_runs_seed_alone():
    theta = policies.init_mlp("policy", [100, 50, 2], seeded(2))
    again = policies.init_mlp("policy", [100, 50, 2], seeded(3))
    for name, p in theta.items():
        bound = 1 / math.sqrt(100 if ".0." in name else 50)
        assert p.shape[:2] == (2, 1) and p.abs().max() <= bound
        assert torch.equal(p, again[name][:2]) and not torch.equal(p[0], p[1])
    assert theta["policy.0.weight"].std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)


# --- distributions ---


def test_categorical_is_torchs():
    outputs = torch.randn(4, 7, 3, dtype=torch.float64)
    actions = torch.randint(3, (4, 7))
    expected = torch.distributions.Categorical(logits=outputs).log_prob(actions)
    torch.testing.assert_close(Categorical(3).log_prob({}, outputs, actions), expected)


def test_gaussian_is_torchs():
    theta, params, batch = example(Gaussian(2))
    with torch.no_grad():
        theta["policy.raw_std"].copy_(torch.randn(S, 1, 1, 2))
    outputs, actions = torch.randn(2, S * M, 7, 2, dtype=torch.float64)
    raw = params["policy.raw_std"].reshape(S * M, 1, 2)
    u = 0.5 + raw
    std = 0.5 + (u + (u.square() + 0.01).sqrt()) / 2
    expected = torch.distributions.Normal(outputs, std).log_prob(actions).sum(-1)
    torch.testing.assert_close(Gaussian(2).log_prob(params, outputs, actions), expected)


def test_gumbel_noise_makes_actions_as_frequent_as_softmax_says():
    logits = torch.tensor([[[1.0, 0.0, -1.0]]])
    noise = -torch.empty(1, 100_000, 3).exponential_(generator=torch.Generator().manual_seed(0)).log()
    actions = Categorical(3).sample({}, logits, noise)
    counts = torch.bincount(actions.flatten(), minlength=3) / 100_000
    torch.testing.assert_close(counts, logits.softmax(-1)[0, 0], atol=0.006, rtol=0)  # 4 standard errors


def test_gaussian_samples_are_mean_plus_std_times_noise():
    theta, params, _ = example(Gaussian(2))
    mean, noise = torch.randn(2, S * M, 5, 2, dtype=torch.float64)
    std = 0.5 + (0.5 + math.sqrt(0.5**2 + 0.01)) / 2
    torch.testing.assert_close(Gaussian(2).sample(params, mean, noise), mean + std * noise)


# --- returns, advantages ---


def test_discounted_sums_equal_the_backward_recursion():
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    expected, total = torch.zeros_like(x), torch.zeros(2, 3, dtype=torch.float64)
    for t in reversed(range(9)):
        total = x[..., t] + 0.9 * total
        expected[..., t] = total
    torch.testing.assert_close(discounted_sums(x, 0.9), expected)
    torch.testing.assert_close(discounted_sums(x, 0.0), x)  # λ = 0


def test_whitening_is_per_task_over_valid_steps_alone():
    x, mask = torch.randn(S, M, K, H, dtype=torch.float64), torch.rand(S, M, K, H) < 0.7
    white = whiten(x, mask)
    assert white[~mask].abs().max() == 0
    for s, i in itertools.product(range(S), range(M)):
        valid = x[s, i][mask[s, i]]
        torch.testing.assert_close(white[s, i][mask[s, i]], (valid - valid.mean()) / valid.std(correction=0))


def test_baseline_step_takes_each_steps_mean_over_trajectories_first():
    x, mask = torch.randn(1, 1, K, H, dtype=torch.float64), torch.rand(1, 1, K, H) < 0.7
    trend = 100 * torch.arange(H, dtype=torch.float64)
    torch.testing.assert_close(whiten(x, mask, "step"), whiten(x + trend, mask, "step"))  # blind to a trend
    white = whiten(x, mask, "step")
    assert white[~mask].abs().max() == 0
    for t in range(H):
        valid = mask[0, 0, :, t]
        assert not valid.any() or white[0, 0, valid, t].mean().abs() < 1e-12
    assert white[mask].square().mean().item() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("baseline", ["task", "step"])
@pytest.mark.parametrize("num_trajectories", [2, 3, 7, 8, 10, 100])
def test_equal_returns_whiten_to_zero_and_not_to_their_rounding(dtype, baseline, num_trajectories):
    """Returns to go of equal rewards differ from step to step, but from trajectory to trajectory in nothing."""
    to_go = discounted_sums(torch.full((1, 1, num_trajectories, 20), -7.7, dtype=dtype), 0.99)
    x = to_go if baseline == "step" else to_go[..., :1].repeat(1, 1, 1, 20)
    mask = torch.ones(x.shape, dtype=torch.bool)
    assert (whiten(x, mask, baseline) == 0).all()
    x[0, 0, 0, 3] *= 1 + 1e-3  # a thousandth is no rounding
    white = whiten(x, mask, baseline)
    torch.testing.assert_close(white.square().mean(), torch.tensor(1.0, dtype=dtype), rtol=1e-3, atol=0)
    x[0, 0, 0, 3] = math.nan  # nor is what is not a number, which ends the run
    assert whiten(x, mask, baseline).isnan().any()


@pytest.mark.parametrize("terminated", [True, False])
def test_ac_bootstraps_truncated_episodes_and_not_terminated_ones(terminated):
    """GAE by the usual backward recursion on every single episode."""
    head = Categorical(3)
    theta, params, batch = example(head)
    batch["terminated"] = torch.full((S, M, K), terminated)
    gamma, gae_lambda = 0.9, 0.8
    critic = policies.mlp(params, "critic")
    values = critic(batch["obs"].flatten(0, 1).flatten(1, 2)).view(S, M, K, H).detach()
    last = critic(batch["last_obs"].flatten(0, 1)).view(S, M, K).detach()
    advantages = torch.zeros_like(values)
    for s, i, k in itertools.product(range(S), range(M), range(K)):
        length = int(batch["mask"][s, i, k].sum())
        next_value, advantage = (0.0 if terminated else last[s, i, k]), 0.0
        for t in reversed(range(length)):
            error = batch["rewards"][s, i, k, t] + gamma * next_value - values[s, i, k, t]
            advantage = error + gamma * gae_lambda * advantage
            next_value = values[s, i, k, t]
            advantages[s, i, k, t] = advantage
    mask = batch["mask"]
    logs = policies.log_probs(params, batch, head)
    value_loss = 0.5 * (advantages**2).sum((2, 3)) / mask.sum((2, 3))  # (V − (V + A))²
    expected = surrogate(logs, whiten(advantages, mask), mask, "lvc") + value_loss
    torch.testing.assert_close(policies.loss(params, batch, head, "ac", gamma, "lvc", gae_lambda=gae_lambda), expected)


def test_pg_is_the_formula_written_as_loops():
    head = Categorical(3)
    theta, params, batch = example(head)
    logs, mask = policies.log_probs(params, batch, head), batch["mask"]
    got = policies.loss(params, batch, head, "pg", 0.9, "naive")
    for s, i in itertools.product(range(S), range(M)):
        to_go = {}
        for k in range(K):
            length = int(mask[s, i, k].sum())
            for t in range(length):
                to_go[k, t] = sum(0.9 ** (u - t) * batch["rewards"][s, i, k, u] for u in range(t, length))
        values = torch.stack(list(to_go.values()))
        white = {key: (x - values.mean()) / values.std(correction=0) for key, x in to_go.items()}
        expected = -sum(logs[s, i, k, t] * x for (k, t), x in white.items()) / K
        torch.testing.assert_close(got[s, i], expected)


# --- padding, and the independence of runs and tasks ---


@pytest.mark.parametrize("rl", LOSSES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", HEADS)
def test_padding_contributes_exactly_zero_to_loss_and_gradients(name, estimator, rl):
    head = HEADS[name]
    theta, params, batch = example(head, critic=rl == "ac")
    results = []
    for garbage in (0.0, 1e3):
        padded = dict(batch)
        behind = ~batch["mask"]
        padded["obs"] = batch["obs"] + garbage * behind.unsqueeze(-1)
        padded["rewards"] = batch["rewards"] + garbage * behind
        if name == "gaussian":
            padded["actions"] = batch["actions"] + garbage * behind.unsqueeze(-1)
        loss = policies.loss(params, padded, head, rl, 0.9, estimator, gae_lambda=0.8)
        results.append([loss, *torch.autograd.grad(loss.sum(), list(theta.values()))])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty) and clean.isfinite().all()


@pytest.mark.parametrize("rl", LOSSES)
def test_a_longer_padding_changes_nothing(rl):
    theta, params, batch = example(HEADS["categorical"])
    longer = dict(batch)
    for key in ("obs", "actions", "rewards", "mask"):
        longer[key] = torch.cat([batch[key], torch.zeros_like(batch[key])], 3)
    losses = [policies.loss(params, b, HEADS["categorical"], rl, 0.9, "dice", gae_lambda=0.8) for b in (batch, longer)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rl", LOSSES)
def test_runs_and_tasks_do_not_touch_each_other(rl):
    head = HEADS["gaussian"]
    theta, params, batch = example(head)
    loss = policies.loss(params, batch, head, rl, 0.9, "lvc", gae_lambda=0.8)
    for s, i in itertools.product(range(S), range(M)):
        one = {key: x[s : s + 1, i : i + 1] for key, x in batch.items()}
        alone = policies.loss(
            {key: p[s : s + 1, i : i + 1] for key, p in params.items()}, one, head, rl, 0.9, "lvc", gae_lambda=0.8
        )
        torch.testing.assert_close(loss[s, i], alone[0, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rl", LOSSES)
def test_estimators_share_loss_gradient_exactly(rl):
    theta, params, batch = example(HEADS["categorical"], critic=rl == "ac")
    grads = [
        torch.autograd.grad(
            policies.loss(params, batch, HEADS["categorical"], rl, 0.9, e, gae_lambda=0.8).sum(), list(theta.values())
        )
        for e in ESTIMATORS
    ]
    for others in grads[1:]:
        for mine, theirs in zip(grads[0], others, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


# --- the estimators' Hessians, on an MDP small enough to enumerate ---

STATES, ACTIONS, STEPS = 3, 2, 3


@pytest.fixture(scope="module")
def mdp():
    """A tabular MDP with a softmax policy θ (6,): all trajectories with their probability, and what follows from it."""
    g = torch.Generator().manual_seed(3)
    start = torch.rand(STATES, generator=g, dtype=torch.float64).softmax(0)
    move = (2 * torch.randn(STATES, ACTIONS, STATES, generator=g, dtype=torch.float64)).softmax(-1)
    reward = torch.randn(STATES, ACTIONS, generator=g, dtype=torch.float64)
    theta = torch.randn(STATES * ACTIONS, generator=g, dtype=torch.float64).requires_grad_()
    paths = torch.tensor(list(itertools.product(range(STATES), range(ACTIONS), repeat=STEPS)))
    states, actions = paths[:, 0::2], paths[:, 1::2]  # (N, T)
    fixed = start[states[:, 0]] * move[states[:, :-1], actions[:, :-1], states[:, 1:]].prod(1)

    def log_policy(theta):
        return theta.view(STATES, ACTIONS).log_softmax(-1)[states, actions]  # (N, T)

    def value(theta):  # J = Σ_τ p(τ; θ) R(τ), exactly
        return (fixed * log_policy(theta).sum(1).exp() * reward[states, actions].sum(1)).sum()

    probability = (fixed * log_policy(theta).sum(1).exp()).detach()
    assert probability.sum().item() == pytest.approx(1)
    to_go = discounted_sums(reward[states, actions], 1.0)

    def expected_surrogate(estimator):
        """−E_τ[shipped surrogate], a function of θ that is differentiable twice."""

        def f(theta):
            logs = log_policy(theta)[None, :, None]  # every trajectory as a task of its own: (1, N, 1, T)
            losses = surrogate(logs, to_go[None, :, None], torch.ones_like(logs), estimator)
            return -(probability * losses[0]).sum()

        return f

    return theta, value, expected_surrogate, (probability, states, actions, to_go)


def hessian(f, theta):
    return torch.autograd.functional.hessian(f, theta)


def by_hand(mdp, with_outer_product):
    """Σ_τ p Σ_t A_t (∇² log π [+ ∇ log π ∇ log πᵀ]) with softmax's derivatives e_a − π and ππᵀ − diag π."""
    theta, _, _, (probability, states, actions, to_go) = mdp
    pi = theta.detach().view(STATES, ACTIONS).softmax(-1)
    total = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for n, t in itertools.product(range(len(probability)), range(STEPS)):
        s, a = int(states[n, t]), int(actions[n, t])
        score = -pi[s].clone()
        score[a] += 1
        block = pi[s].outer(pi[s]) - pi[s].diag()
        if with_outer_product:
            block = block + score.outer(score)
        here = slice(s * ACTIONS, (s + 1) * ACTIONS)
        total[here, here] += probability[n] * to_go[n, t] * block
    return total


def cosine(a, b):
    return ((a * b).sum() / (a.norm() * b.norm())).item()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_expected_gradient_of_every_estimator_is_the_true_gradient(mdp, estimator):
    theta, value, expected_surrogate, _ = mdp
    (true,) = torch.autograd.grad(value(theta), theta)
    (got,) = torch.autograd.grad(expected_surrogate(estimator)(theta), theta)
    torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-12)


def test_dices_expected_hessian_is_the_true_hessian(mdp):
    theta, value, expected_surrogate, _ = mdp
    torch.testing.assert_close(hessian(expected_surrogate("dice"), theta), hessian(value, theta), rtol=1e-9, atol=1e-10)


def test_naive_and_lvc_hessians_are_wrong_by_just_the_terms_they_drop(mdp):
    theta, value, expected_surrogate, _ = mdp
    true = hessian(value, theta)
    naive, lvc = (hessian(expected_surrogate(name), theta) for name in ("naive", "lvc"))
    torch.testing.assert_close(naive, by_hand(mdp, with_outer_product=False), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(lvc, by_hand(mdp, with_outer_product=True), rtol=1e-9, atol=1e-10)
    assert cosine(hessian(expected_surrogate("dice"), theta), true) == pytest.approx(1)
    assert cosine(naive, true) == pytest.approx(-0.365, abs=0.001)  # it points the wrong way
    assert cosine(lvc, true) == pytest.approx(0.853, abs=0.001)


# --- σ of the Gaussian ---


def test_gaussians_std_begins_near_one_with_slope_near_one_and_rises_smoothly_above_its_floor():
    raw = torch.linspace(-50, 10, 60001, dtype=torch.float64)[:, None, None, None].requires_grad_()
    std = Gaussian(1, min_std=0.25).std({"policy.raw_std": raw}).flatten()
    (slope,) = torch.autograd.grad(std.sum(), raw)
    assert (std > 0.25).all() and (slope > 0).all() and (std.diff() > 0).all()
    torch.testing.assert_close(slope.flatten()[1:-1], (std[2:] - std[:-2]) / 0.002, atol=1e-4, rtol=0)
    start = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    one = Gaussian(1, min_std=0.25).std({"policy.raw_std": start})
    # u = 0.75 at x = 0, where √(u² + 0.01) is u + 0.01 / (2u), nearly
    assert one.item() == pytest.approx(1 + 0.01 / 3, abs=1e-4)
    assert torch.autograd.grad(one.sum(), start)[0].item() == pytest.approx(1 - 0.0025 / 0.75**2, abs=1e-4)
    near = Gaussian(1, min_std=0.25).std({"policy.raw_std": start - 0.85})  # u = −0.1: close to the floor already
    assert near.item() == pytest.approx(0.25 + (math.sqrt(0.02) - 0.1) / 2)


@pytest.mark.parametrize("raw", [-9.0, -1.0, 0.0, 2.0])
def test_gradients_and_hessians_of_the_gaussian_are_those_of_finite_differences(raw):
    outputs, actions = torch.randn(2, 1, 7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def log_prob(x):
        return Gaussian(2).log_prob({"policy.raw_std": x}, outputs, actions)

    x = torch.full((1, 1, 1, 2), raw, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_prob, x) and torch.autograd.gradgradcheck(log_prob, x)


def test_gaussians_std_has_a_gradient_at_its_floor_in_float32():
    raw = torch.full((1, 1, 1, 1), -20.0, requires_grad=True)
    std = Gaussian(1).std({"policy.raw_std": raw})
    assert std.item() < 0.501  # 0.5 + 0.01 / (4 · 19.5)
    assert torch.autograd.grad(std.sum(), raw)[0].item() == pytest.approx(0.01 / (4 * 19.5**2), rel=0.02)


def test_numpy_and_torch_take_the_same_std_but_for_the_last_bit_and_to_the_last_bit_in_any_batch():
    raw = torch.randn(30, 5, 1, 2, generator=torch.Generator().manual_seed(0))
    by_torch = Gaussian(2).std({"policy.raw_std": raw})
    by_numpy = Gaussian(2).std({"policy.raw_std": raw.numpy()}, numpy)
    assert by_numpy.dtype == numpy.float32
    torch.testing.assert_close(by_torch, torch.from_numpy(by_numpy), rtol=2**-22, atol=0)
    for std, part in ((by_torch, raw[3:4]), (by_numpy, raw[3:4].numpy())):
        alone = Gaussian(2).std({"policy.raw_std": part}, torch if torch.is_tensor(part) else numpy)
        assert (alone == std[15:20]).all()


# --- raw advantages: Eq. 1b and 2a to the letter, on the same MDP ---

GAMMA = 0.8


@pytest.fixture(scope="module")
def tabular(mdp):
    """The MDP's trajectories as tasks of one episode each, and its θ as a network without hidden layers on one-hot
    states: params -> their probabilities (N,), the shipped loss on them, and J (Eq. 1b), each by enumeration."""
    theta, _, _, (probability, states, actions, _) = mdp
    pi = theta.detach().view(STATES, ACTIONS).log_softmax(-1)[states, actions].sum(1).exp()
    fixed = probability / pi  # what does not depend on θ
    g = torch.Generator().manual_seed(3)  # the reward, drawn as in `mdp`
    torch.rand(STATES, generator=g, dtype=torch.float64)
    torch.randn(STATES, ACTIONS, STATES, generator=g, dtype=torch.float64)
    rewards = torch.randn(STATES, ACTIONS, generator=g, dtype=torch.float64)[states, actions]  # (N, T)
    one_hot = torch.eye(STATES, dtype=torch.float64)[states]
    shape = (1, len(states), 1, STEPS)
    trajectories = {
        "obs": one_hot.view(*shape, STATES), "actions": actions.view(shape), "rewards": rewards.view(shape),
        "mask": torch.ones(shape, dtype=torch.bool),
    }  # fmt: skip

    def probabilities(weight):  # (STATES, ACTIONS)
        return fixed * weight.log_softmax(-1)[states, actions].sum(1).exp()

    def value(weight):  # J = E Σₜ γᵗ rₜ
        return (probabilities(weight) * (rewards * GAMMA ** torch.arange(STEPS, dtype=torch.float64)).sum(1)).sum()

    def task_loss(estimator):
        def loss(params):  # of one task: (1, 1)
            all_paths = {name: p.expand(1, len(states), *p.shape[2:]) for name, p in params.items()}
            losses = policies.loss(
                all_paths, trajectories, Categorical(ACTIONS), "pg", GAMMA, estimator, advantages="raw"
            )
            weight = (params["policy.0.weight"] + params["policy.0.bias"])[0, 0].detach()
            return (probabilities(weight) * losses).sum(1, keepdim=True)

        return loss

    start = {
        "policy.0.weight": theta.detach().view(1, 1, STATES, ACTIONS).clone().requires_grad_(),
        "policy.0.bias": torch.zeros(1, 1, 1, ACTIONS, dtype=torch.float64, requires_grad=True),
    }
    return start, value, task_loss, trajectories, probabilities


def exact_step(value, weight, alpha):
    """θ' = θ + α∇J(θ), in the graph; the bias, which all states share, moves by the sum over states."""
    gradient = torch.autograd.grad(value(weight), weight, create_graph=True)[0]
    return weight + alpha * (gradient + gradient.sum(0))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_gradient_of_raw_advantages_is_the_exact_gradient_of_equation_1b(tabular, estimator):
    start, value, task_loss, *_ = tabular
    weight = start["policy.0.weight"]
    (true,) = torch.autograd.grad(value(weight[0, 0]), weight)
    got = torch.autograd.grad(task_loss(estimator)(start).sum(), [weight, start["policy.0.bias"]])
    torch.testing.assert_close(got[0], -true, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got[1], -true.sum(2, keepdim=True), rtol=1e-10, atol=1e-12)


def test_the_meta_gradient_of_raw_advantages_is_exact_with_dice_and_with_no_other_estimator(tabular):
    """d/dθ J(θ + α∇J(θ)), both expectations by enumeration, against maml on the shipped loss."""
    start, value, task_loss, *_ = tabular
    weight, alpha = start["policy.0.weight"], 2.0
    (true,) = torch.autograd.grad(value(exact_step(value, weight[0, 0], alpha)), weight)
    for estimator in ESTIMATORS:
        maml.maml(start, task_loss(estimator), alpha, 1)
        if estimator == "dice":
            torch.testing.assert_close(weight.grad, -true, rtol=1e-9, atol=1e-12)
        else:
            assert (weight.grad + true).norm() > 0.01 * true.norm()


def test_raw_advantages_of_the_actor_critic_are_discounted_gae():
    """With V = 0 and λ = 1, GAE is the reward to go, so the actor's gradient is that of pg."""
    head = Categorical(3)
    theta, params, batch = example(head)
    with torch.no_grad():
        for name in theta:
            if name.startswith("critic"):
                theta[name].zero_()
    actor = [p for name, p in theta.items() if name.startswith("policy")]
    grads = [
        torch.autograd.grad(
            policies.loss(params, batch, head, rl, 0.9, "lvc", gae_lambda=1.0, advantages="raw").sum(), actor
        )
        for rl in LOSSES
    ]
    for by_pg, by_ac in zip(*grads, strict=True):
        torch.testing.assert_close(by_pg, by_ac, rtol=1e-10, atol=1e-12)


# --- baselines ---


def test_the_linear_baseline_is_a_ridge_regression_on_the_other_trajectories_of_the_task():
    _, _, batch = example(Categorical(3))
    obs, mask = 8 * batch["obs"], batch["mask"]
    x = torch.randn(S, M, K, H, generator=torch.Generator().manual_seed(0)).double()
    got = policies.linear_baseline(x, mask.double(), obs)
    clipped = 0
    for s, i, k in itertools.product(range(S), range(M), range(K)):

        def rows(j, s=s, i=i):
            o = obs[s, i, j][mask[s, i, j]].clamp(-10, 10)
            t = torch.arange(len(o), dtype=torch.float64)[:, None] / H
            return torch.cat([o, o**2, t, t**2, t**3, torch.ones_like(t)], 1)

        others = [j for j in range(K) if j != k]
        a, y = torch.cat([rows(j) for j in others]), torch.cat([x[s, i, j][mask[s, i, j]] for j in others])
        # The ridge as rows of its own: min |A w − y|² + 1e-5 Σⱼ (root mean square of column j · wⱼ)²
        a = torch.cat([a, math.sqrt(1e-5) * a.square().mean(0).sqrt().diag()])
        weights = torch.linalg.lstsq(a, torch.cat([y, torch.zeros(a.shape[1])]), driver="gelsd").solution
        expected = rows(k) @ weights
        clipped += int(((expected < y.min()) | (expected > y.max())).sum())
        torch.testing.assert_close(got[s, i, k][mask[s, i, k]], expected.clamp(y.min(), y.max()), rtol=1e-6, atol=1e-6)
    assert 0 < clipped < mask.sum()  # both cases are there


def test_the_linear_baseline_leaves_the_expected_gradient_as_it_is(tabular):
    """All pairs of trajectories as tasks of K = 2: E Σₜ (x − b) ∇log π = ∇J, by enumeration."""
    start, value, _, trajectories, probabilities = tabular
    weight = start["policy.0.weight"]
    n = trajectories["mask"].shape[1]
    first, second = (x.flatten() for x in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    pairs = {key: torch.cat([x[:, first], x[:, second]], 2) for key, x in trajectories.items()}  # (1, N², 2, ...)
    to_go = discounted_sums(pairs["rewards"], GAMMA)
    baseline = policies.linear_baseline(to_go, pairs["mask"].double(), pairs["obs"])
    assert baseline.std() > 0.1
    discount = GAMMA ** torch.arange(STEPS, dtype=torch.float64)
    params = {name: p.expand(1, n * n, *p.shape[2:]) for name, p in start.items()}
    logs = policies.log_probs(params, pairs, Categorical(ACTIONS))
    losses = surrogate(logs, discount * (to_go - baseline), pairs["mask"], "lvc")
    chance = probabilities(weight[0, 0]).detach()
    (got,) = torch.autograd.grad((chance[first] * chance[second] * losses).sum(), weight)
    (true,) = torch.autograd.grad(value(weight[0, 0]), weight)
    torch.testing.assert_close(got, -true, rtol=1e-8, atol=1e-10)


def test_the_linear_baseline_takes_away_all_of_what_is_linear_in_its_features():
    _, _, batch = example(Categorical(3))
    mask = torch.ones_like(batch["mask"])
    time = torch.arange(H, dtype=torch.float64) / H
    x = (3 - 2 * time + time**3).expand(S, M, K, H)
    residual = x - policies.linear_baseline(x, mask.double(), torch.zeros_like(batch["obs"]))
    assert residual.abs().max() < 1e-4  # what the ridge leaves


@pytest.mark.parametrize("baseline", ["task", "step"])
def test_means_that_include_the_trajectory_shrink_the_expected_gradient(tabular, baseline):
    """By 1 − 1/K for "step". For "task", the mean over time of returns to go Σ_u (u + 1)/T r_u takes ∇ of its expected
    value over K. Both without γ, by enumeration of all pairs, K = 2."""
    start, _, _, trajectories, probabilities = tabular
    weight = start["policy.0.weight"]
    n = trajectories["mask"].shape[1]
    first, second = (x.flatten() for x in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    pairs = {key: torch.cat([x[:, first], x[:, second]], 2) for key, x in trajectories.items()}
    to_go = discounted_sums(pairs["rewards"], 1.0)
    white = whiten(to_go, pairs["mask"], baseline)
    centred = to_go - to_go.mean(2, keepdim=True)  # undo the division by σ: whitened values are proportional to these
    centred = centred if baseline == "step" else to_go - to_go.mean((2, 3), keepdim=True)
    std = centred.square().mean((2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(white * (std + 1e-8), centred - centred.mean((2, 3), keepdim=True))
    params = {name: p.expand(1, n * n, *p.shape[2:]) for name, p in start.items()}
    logs = policies.log_probs(params, pairs, Categorical(ACTIONS))
    losses = surrogate(logs, white * (std + 1e-8), pairs["mask"], "lvc")
    chance = probabilities(weight[0, 0])
    (got,) = torch.autograd.grad((chance[first] * chance[second]).detach() @ losses[0], weight)
    rewards = trajectories["rewards"][0, :, 0]
    share = torch.ones(STEPS) / 2 if baseline == "step" else (torch.arange(STEPS) + 1) / STEPS / 2
    (expected,) = torch.autograd.grad(chance @ (rewards * (1 - share)).sum(1), weight)
    torch.testing.assert_close(got, -expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("baseline", ["step", "linear"])
def test_baselines_over_trajectories_refuse_a_single_one(baseline):
    x, mask = torch.randn(1, 2, 1, H), torch.ones(1, 2, 1, H, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"baseline '{baseline}' compares trajectories"):
        whiten(x, mask, baseline, torch.zeros(1, 2, 1, H, D))


def test_a_run_that_is_not_finite_leaves_the_linear_baseline_of_the_others_alone():
    _, _, batch = example(Categorical(3))
    x, mask = torch.randn(S, M, K, H, generator=torch.Generator().manual_seed(0)).double(), batch["mask"].double()
    alone = policies.linear_baseline(x[1:], mask[1:], batch["obs"][1:])
    x[0, 0, 0, 0] = math.nan
    assert torch.equal(policies.linear_baseline(x, mask, batch["obs"])[1:], alone)
