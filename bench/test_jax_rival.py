"""The benchmark's JAX rival computes what this project computes; all in float64."""

from functools import partial

import numpy as np
import pytest
import torch

import envs
import maml
from directed import directed
from policies import Categorical, pg

jax = pytest.importorskip("jax")
jnp = jax.numpy
from bench import jax_rival  # noqa: E402

S, M = 2, jax_rival.M
EXACT = {"rtol": 0, "atol": 1e-10}
rollouts = jax.jit(jax_rival.rollouts, static_argnames="shared")
epoch = jax.jit(jax_rival.epoch, static_argnames=("algo", "design"))


@pytest.fixture(autouse=True)
def float64_and_quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def theta():
    return jax.vmap(jax_rival.init)(run_keys(0))


def run_keys(seed):
    return jax.random.split(jax.random.key(seed), S)


def to_torch(x):
    return torch.from_numpy(np.array(x))


def project_params(theta):
    """The project's leaves (S, 1, ...) of JAX's θ (S, ...)."""
    params = {}
    for i, (weight, bias) in enumerate(theta):
        params[f"policy.{i}.weight"] = to_torch(weight)[:, None].requires_grad_()
        params[f"policy.{i}.bias"] = to_torch(bias)[:, None, None].requires_grad_()
    return params


def jax_params(params):
    """JAX's (S, M, ...) of the project's parameters (S, M, ...)."""
    arrays = {name: jnp.asarray(p.detach().numpy()) for name, p in params.items()}
    layers = range(len(jax_rival.LAYERS) - 1)
    return [(arrays[f"policy.{i}.weight"], arrays[f"policy.{i}.bias"][:, :, 0]) for i in layers]


def project_loss(params, trajectories):
    """policies.pg as run.py calls it by default, on JAX's trajectories."""
    obs, actions, rewards = (to_torch(x).transpose(2, 3) for x in trajectories)  # (S, M, K, H, ...)
    batch = {"obs": obs, "actions": actions, "rewards": rewards, "mask": torch.ones_like(rewards, dtype=torch.bool)}
    return pg(params, batch, Categorical(2), jax_rival.GAMMA, "lvc")


def assert_equal(ours, theirs):
    """ours: the project's tensors (S, 1, ...) by name; theirs: JAX's list of layers (S, ...)."""
    theirs = project_params(theirs)
    for name, x in ours.items():
        assert x.dtype == torch.float64 and x.abs().max() > 1e-3
        torch.testing.assert_close(x.detach(), theirs[name].detach(), **EXACT)


def gravities(num_tasks=M):
    return jax.random.uniform(jax.random.key(1), (S, num_tasks), minval=5.0, maxval=15.0)


def test_a_rollout_follows_the_projects_cartpole(theta):
    phi = gravities()
    obs, actions, rewards = rollouts(theta, phi, run_keys(2), shared=True)  # (S, M, H, K, ...)
    _, step = envs.cartpole(
        to_torch(phi)[..., None, None, None], torch.zeros(S, M, 1, 1, 4, dtype=torch.float64), torch
    )
    expected = step(to_torch(obs[:, :, :-1]), to_torch(actions[:, :, :-1]))[0]
    torch.testing.assert_close(to_torch(obs[:, :, 1:]), expected, **EXACT)
    assert (rewards == 1).all() and set(np.unique(actions)) == {0, 1}


def test_actions_are_drawn_from_the_policy():
    """At zero weights the logits are the last bias: π(1) = σ(b₁ − b₀) in every state."""
    zero = [(jnp.zeros((i, o)), jnp.zeros(o)) for i, o in zip(jax_rival.LAYERS, jax_rival.LAYERS[1:], strict=False)]
    zero[-1] = (zero[-1][0], jnp.array([0.0, 1.0]))
    _, actions, _ = jax.vmap(lambda key: jax_rival.rollout(zero, 10.0, key))(jax.random.split(jax.random.key(3), 20))
    expected = 1 / (1 + np.exp(-1))
    assert abs(actions.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / actions.size)


@pytest.mark.parametrize("algo", ["maml", "fomaml"])
def test_meta_gradient_equals_the_projects_on_the_same_trajectories(theta, algo):
    phi = gravities()
    support = rollouts(theta, phi, run_keys(4), shared=True)
    query = rollouts(theta, phi, run_keys(5), shared=True)
    theirs = jax_rival.meta_gradient(theta, support, lambda adapted: query, second_order=algo == "maml")
    params, to_come = project_params(theta), iter([support, query])
    maml.LEARNERS[algo].function(params, lambda params: project_loss(params, next(to_come)), jax_rival.ALPHA, M)
    assert_equal({name: p.grad for name, p in params.items()}, theirs)


def test_second_order_differs_from_first_by_more_than_the_tolerance(theta):
    """So that the test above can tell them apart."""
    support = rollouts(theta, gravities(), run_keys(4), shared=True)
    both = [jax_rival.meta_gradient(theta, support, lambda _: support, second_order) for second_order in (True, False)]
    assert abs(both[0][0][0] - both[1][0][0]).max() > 1e-4


def test_the_delta_step_equals_the_projects_on_the_same_trajectories(theta):
    trajectories = rollouts(theta, gravities(1), run_keys(6), shared=True)
    params = project_params(theta)
    step = directed(lambda theta, task_loss: None, jax_rival.DELTA)
    step(params, lambda params: project_loss(params, trajectories), project_loss)
    assert_equal(params, jax_rival.medium_step(theta, trajectories))
    loss = jax.vmap(jax.vmap(jax_rival.task_loss, in_axes=(None, 0)))(theta, trajectories)
    torch.testing.assert_close(to_torch(loss), project_loss(project_params(theta), trajectories).detach(), **EXACT)


@pytest.mark.parametrize("algo", ["maml", "directed-fomaml"])
def test_an_epoch_is_algorithm_1_with_the_projects_learners(theta, algo):
    """The project's learners, which ask for trajectories under their own parameters, and its β-step."""
    keys = run_keys(7)
    expected = epoch(theta, keys, algo)
    of_medium, of_tasks, *of_rollouts = jax.vmap(partial(jax.random.split, num=4), out_axes=1)(keys)
    phi = jax.vmap(lambda key: jax.random.uniform(key, (M,), minval=5.0, maxval=15.0))(of_tasks)
    to_come = iter(of_rollouts)

    def loss_at(params, phi, keys):
        params = {name: p.expand(-1, phi.shape[1], *p.shape[2:]) for name, p in params.items()}
        return project_loss(params, rollouts(jax_params(params), phi, keys, shared=False))

    def task_loss(params):
        return loss_at(params, phi, next(to_come))

    def medium_loss(params):
        return loss_at(params, jnp.full((S, 1), 10.0), of_medium)

    params, learner = project_params(theta), maml.LEARNERS[algo.removeprefix("directed-")].function
    if algo.startswith("directed-"):
        directed(learner, jax_rival.DELTA)(params, medium_loss, task_loss, jax_rival.ALPHA, M)
    else:
        learner(params, task_loss, jax_rival.ALPHA, M)
    torch.optim.SGD(params.values(), jax_rival.BETA).step()
    assert_equal(params, expected)


def test_runs_do_not_touch_each_other(theta):
    keys = run_keys(8)
    together = epoch(theta, keys, "directed-fomaml")
    alone = epoch(jax.tree.map(lambda p: p[1:], theta), keys[1:], "directed-fomaml")
    for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours[1:], theirs, **EXACT)


def test_an_unknown_algorithm_is_named():
    with pytest.raises(ValueError, match="'reptile'.*expected one of maml"):
        jax_rival.measure("reptile", 1, 0.1)


@pytest.mark.parametrize("algo", ["maml", "directed-fomaml"])
def test_the_plain_design_computes_what_the_tuned_one_does(theta, algo):
    tuned, plain = (epoch(theta, run_keys(8), algo, design) for design in jax_rival.DESIGNS)
    for ours, theirs, before in zip(*map(jax.tree.leaves, (tuned, plain, theta)), strict=True):
        assert abs(ours - before).max() > 1e-7
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)
