"""Properties of the batched code that hold whatever the shapes, masks, φ and seeds: each test draws twenty of them."""

import random
from functools import partial

import pytest
import torch

import envs
import maml
import policies
from tests.noise import noise_of, tasks_of, uniform_of

CASES = range(20)


def case(seed):
    """(rng, θ, batch, loss, learner): random shapes, ragged episodes of random lengths, a random loss; float64."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    S, M, K, H, D = [rng.randint(1, high) for high in (3, 4, 4, 9, 5)]
    head = policies.Categorical(rng.randint(2, 4)) if rng.random() < 0.5 else policies.Gaussian(rng.randint(1, 3))
    hidden = [rng.randint(1, 8) for _ in range(rng.randint(0, 3))]
    rl, learner = rng.choice(list(policies.LOSSES)), rng.choice(list(maml.LEARNERS))
    options = {"estimator": rng.choice(policies.ESTIMATORS), "baseline": rng.choice(policies.BASELINES), "gamma": 0.9}
    K += K == 1 and options["baseline"] != "task"  # the other baselines compare trajectories
    theta = policies.init(D, head, uniform_of(range(seed, seed + S)), hidden, critic=rl == "ac")
    theta = {name: p.detach().double().requires_grad_() for name, p in theta.items()}
    mask = torch.arange(H) < torch.randint(1, H + 1, (S, M, K, 1), generator=g)
    if isinstance(head, policies.Categorical):
        actions = torch.randint(head.size, (S, M, K, H), generator=g)
    else:
        actions = torch.randn(S, M, K, H, head.size, generator=g, dtype=torch.float64)
    batch = {
        "obs": torch.randn(S, M, K, H, D, generator=g, dtype=torch.float64),
        "actions": actions,
        "rewards": torch.randn(S, M, K, H, generator=g, dtype=torch.float64),
        "mask": mask,
        "last_obs": torch.randn(S, M, K, D, generator=g, dtype=torch.float64),
        "terminated": torch.rand(S, M, K, generator=g) < 0.5,
    }
    return rng, theta, batch, partial(policies.loss, head=head, rl=rl, **options), learner


def meta_gradient(theta, batch, loss, learner, alpha=0.1):
    """The meta-gradient of every parameter with the batch as every step's data, and each task's adapted loss."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in theta.items()}
    num_tasks = batch["mask"].shape[1]
    row = maml.LEARNERS[learner]
    step = maml.learned_alpha(leaves, alpha) if row.learns_alpha else alpha
    losses = []

    def task_loss(params):
        losses.append(loss(params, batch))
        return losses[-1]

    row.function(leaves, task_loss, step, num_tasks, inner_steps=2)
    return {name: p.grad for name, p in leaves.items()}, losses[-1].detach()


def select(batch, runs=slice(None), tasks=slice(None)):
    return {key: x[runs][:, tasks] for key, x in batch.items()}


@pytest.mark.parametrize("seed", CASES)
def test_padding_never_leaks_into_a_gradient(seed):
    """Whatever stands behind the end of an episode, and however much of it: the meta-gradient is the same."""
    rng, theta, batch, loss, learner = case(seed)
    expected, _ = meta_gradient(theta, batch, loss, learner)
    more = rng.randint(0, 3)

    def other(x):
        padding = ~torch.cat([batch["mask"], batch["mask"].new_zeros(*batch["mask"].shape[:3], more)], 3)
        x = torch.cat([x, x[:, :, :, :1].expand(-1, -1, -1, more, *x.shape[4:])], 3)
        if x.dtype == torch.bool:
            return x & ~padding
        garbage = torch.zeros_like(x) if x.dtype == torch.long else 1000 * torch.randn_like(x)
        return torch.where(padding.view(*padding.shape, *[1] * (x.dim() - 4)), garbage, x)

    changed = batch | {key: other(batch[key]) for key in ("obs", "actions", "rewards", "mask")}
    got, _ = meta_gradient(theta, changed, loss, learner)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("seed", CASES)
def test_runs_never_influence_each_other(seed):
    """A run's meta-gradient is that of the run alone, and stays when another run's data are not numbers."""
    rng, theta, batch, loss, learner = case(seed)
    together, _ = meta_gradient(theta, batch, loss, learner)
    num_runs = len(batch["mask"])
    run = rng.randrange(num_runs)
    alone, _ = meta_gradient(
        {name: p[run : run + 1] for name, p in theta.items()}, select(batch, slice(run, run + 1)), loss, learner
    )
    others = [other for other in range(num_runs) if other != run]
    broken = batch | {"rewards": batch["rewards"].index_fill(0, torch.tensor(others, dtype=torch.long), float("nan"))}
    beside, _ = meta_gradient(theta, broken, loss, learner)
    assert all(any(gradient[other].isnan().any() for gradient in beside.values()) for other in others)
    for name in together:
        torch.testing.assert_close(together[name][run : run + 1], alone[name], rtol=1e-9, atol=1e-10, msg=name)
        torch.testing.assert_close(beside[name][run], together[name][run], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("seed", CASES)
def test_permuting_tasks_permutes_losses_and_keeps_the_meta_gradient(seed):
    rng, theta, batch, loss, learner = case(seed)
    order = list(range(batch["mask"].shape[1]))
    rng.shuffle(order)
    straight, losses = meta_gradient(theta, batch, loss, learner)
    permuted, permuted_losses = meta_gradient(theta, select(batch, tasks=order), loss, learner)
    torch.testing.assert_close(permuted_losses, losses[:, order], rtol=1e-9, atol=1e-10)
    for name in straight:
        torch.testing.assert_close(permuted[name], straight[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("seed", CASES)
def test_a_rollout_of_any_part_is_that_part_of_the_rollout(seed):
    """Random environment, φ, seeds and policy: tasks permuted, and one run alone, give the same trajectories."""
    rng = random.Random(seed)
    env = envs.make(rng.choice(["cartpole", "point", "velocity", "crossing"]), horizon=rng.randint(1, 30))
    seeds = rng.sample(range(100), rng.randint(1, 3))
    M, K = rng.randint(1, 4), rng.randint(1, 4)
    discrete = isinstance(env.actions, int)
    head = policies.Categorical(env.actions) if discrete else policies.Gaussian(env.action_dim)
    theta = policies.init(env.obs_dim, head, uniform_of(seeds), [4])
    theta = {name: p.double() for name, p in theta.items()}
    noise = noise_of(env, seeds, 1, M, K)
    noise = {key: x.double() for key, x in noise.items()}
    phi = tasks_of(env, seeds, 2, M).double()
    order = rng.sample(range(M), M)
    run = rng.randrange(len(seeds))

    def sample(runs, tasks):
        params = {name: p[runs].expand(-1, M, *p.shape[2:]) for name, p in theta.items()}
        part = {key: x[runs][:, tasks] for key, x in noise.items()}
        arrays = [{key: x.detach().numpy() for key, x in d.items()} for d in (params, part)]
        return envs.rollout(env, policies.actor(arrays[0], head), phi[runs][:, tasks].numpy(), arrays[1])

    whole, part = sample(slice(None), order), sample(slice(run, run + 1), list(range(M)))
    for key, x in part.items():
        together = whole[key][run : run + 1][:, torch.tensor(order).argsort()]
        assert (x == together).all(), key  # to the last bit
