"""Dynamics against gymnasium and by hand; rollouts as pure functions; random numbers, tasks and bounds."""

import math
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch

import envs
import maml
import policies
from envs import ENVS, draw_noise, held_out_tasks, medium_task, stream
from harness.gyms import FAMILIES, Gymnasium, make
from tests.noise import noise_of, tasks_of, uniform_of

CARTPOLE = ENVS["cartpole"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
BATCHED = list(ENVS)


def rollout(env, act, phi, noise):
    """envs.rollout in numpy, as on a CPU, with tensors in and out, and an `act` on tensors."""

    def act_in_numpy(obs, noise):
        return act(torch.from_numpy(obs), torch.from_numpy(noise)).numpy()

    noise = {key: x.numpy() for key, x in noise.items()}
    return {key: torch.from_numpy(x) for key, x in envs.rollout(env, act_in_numpy, phi.numpy(), noise).items()}


# --- cartpole is gymnasium's ---


def gymnasium_transitions(gravity, count=1000):
    """`count` random steps of gymnasium's own CartPole at this gravity: states, actions, next states, terminated."""
    env = gymnasium.make("CartPole-v1").unwrapped
    env.gravity = gravity
    rng = np.random.default_rng(int(gravity * 100))
    env.reset(seed=0)
    rows = []
    for _ in range(count):
        env.state = rng.uniform(-1, 1, 4) * [2.5, 3.0, 0.25, 3.5]  # reaches past both limits
        state, action = env.state.copy(), int(rng.integers(2))
        env.steps_beyond_terminated = None
        _, reward, terminated, _, _ = env.step(action)
        assert reward == 1.0  # at the step that ends the episode too
        rows.append((state, action, env.state.copy(), terminated))
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("gravity", np.linspace(5, 15, 21))
def test_cartpole_steps_to_gymnasiums_next_state_and_termination(gravity):
    state, action, next_state, terminated = gymnasium_transitions(gravity)
    assert 0 < terminated.mean() < 1
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
        _, step = envs.cartpole(np.full((1, 1, 1), gravity, dtype), np.zeros((1, len(state), 4), dtype), np)
        got, reward, ended, over = step(state.astype(dtype)[None], action[None])
        assert got.dtype == dtype
        np.testing.assert_allclose(got[0], next_state, rtol=tolerance, atol=tolerance)
        assert (reward == 1).all() and (over == ended).all()
        clear = (np.abs(np.abs(next_state[:, [0, 2]]) - [2.4, 12 * 2 * math.pi / 360]) > tolerance).all(1)
        assert clear.mean() > 0.99 and (ended[0] == terminated)[clear].all()


@pytest.mark.parametrize("name", BATCHED)
def test_numpy_and_torch_give_the_same_rollout(name):
    env, head, params, phi, noise = trained_on(name, "cpu")
    params, noise = ({key: x.double() for key, x in d.items()} for d in (params, noise))
    ours = rollout(env, policies.actor(params, head, torch), phi.double(), noise)
    theirs = envs.rollout(env, policies.actor(params, head, torch), phi.double(), noise, torch)
    params = {key: p.numpy() for key, p in params.items()}
    acting = envs.rollout(
        env, policies.actor(params, head), phi.double().numpy(), {k: x.numpy() for k, x in noise.items()}
    )
    for key, x in theirs.items():
        torch.testing.assert_close(ours[key], x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.from_numpy(acting[key]), x, rtol=1e-9, atol=1e-11)  # chaotic: rounding grows


def test_a_cartpole_rollout_is_gymnasiums_episode_reward_for_reward():
    """The same initial state and actions through gymnasium's step, over whole episodes, 200-step cap included."""
    noise = noise_of(CARTPOLE, [1], 0, 2, 8)
    noise = {key: x.double() for key, x in noise.items()}
    phi = torch.tensor([[[5.0], [15.0]]], dtype=torch.float64)

    def act(obs, noise):  # a controller that holds the pole up, but for the trajectories with noise
        steady = (obs[..., 2] + 0.3 * obs[..., 3] + 0.03 * obs[..., 0] + 0.1 * obs[..., 1] > 0).long()
        return torch.where(torch.arange(8) % 2 == 0, steady, noise.argmax(-1))

    batch = rollout(CARTPOLE, act, phi, noise)
    lengths = batch["mask"].sum(-1)
    assert lengths.max() == 200 and lengths.min() < 100
    env = gymnasium.make("CartPole-v1").unwrapped
    for i in range(2):
        env.gravity = phi[0, i, 0].item()
        for k in range(8):
            env.reset(seed=0)
            env.state = (noise["reset"][0, i, k] * 0.1 - 0.05).numpy()
            for t in range(200):
                np.testing.assert_allclose(batch["obs"][0, i, k, t].numpy(), env.state, rtol=0, atol=1e-6)
                _, reward, terminated, _, _ = env.step(int(batch["actions"][0, i, k, t]))
                assert reward == batch["rewards"][0, i, k, t]
                if terminated:
                    break
            assert t + 1 == lengths[0, i, k] and terminated == batch["terminated"][0, i, k]


def test_initial_states_are_distributed_as_gymnasiums():
    env = gymnasium.make("CartPole-v1").unwrapped
    theirs = np.stack([env.reset(seed=seed)[0] for seed in range(2000)])
    noise = noise_of(CARTPOLE, [0], 0, 1, 2000)["reset"][0]
    ours = envs.cartpole(np.ones((1, 1, 1)), noise.numpy(), np)[0][0]
    assert ours.min() >= -0.05 and ours.max() <= 0.05
    grid = np.linspace(-0.05, 0.05, 21)
    for d in range(4):  # Kolmogorov and Smirnov's distance, at 0.1% significance
        cdfs = [(x[:, d, None] <= grid).mean(0) for x in (ours, theirs)]
        assert np.abs(cdfs[0] - cdfs[1]).max() < 1.95 * math.sqrt(2 / 2000)


def test_horizon_is_capped_at_200():
    assert CARTPOLE.horizon == 200


# --- point and velocity by hand ---


def test_point_moves_by_the_clipped_action_and_pays_the_squared_distance():
    env = make("point", horizon=3)
    noise = noise_of(env, [0], 0, 1, 1)
    goal = torch.tensor([[[0.3, -0.2]]])
    batch = rollout(env, lambda obs, noise: torch.tensor([[[0.5, -7.0]]]), goal, noise)  # (0.05, −0.1) after clipping
    expected = torch.tensor([[0.0, 0.0], [0.05, -0.1], [0.1, -0.2]])
    torch.testing.assert_close(batch["obs"][0, 0, 0], expected)
    distances = ((expected + torch.tensor([0.05, -0.1]) - goal[0]) ** 2).sum(-1)
    torch.testing.assert_close(batch["rewards"][0, 0, 0], -distances)
    torch.testing.assert_close(batch["last_obs"][0, 0, 0], torch.tensor([0.15, -0.3]))
    assert not batch["terminated"].any() and batch["mask"].all()


def test_velocity_changes_by_the_action_and_pays_the_squared_error():
    env = make("velocity", horizon=2)
    noise = noise_of(env, [0], 0, 1, 1)
    batch = rollout(env, lambda obs, noise: torch.ones(1, 1, 1), torch.tensor([[[2.0]]]), noise)
    torch.testing.assert_close(batch["obs"][0, 0, 0, :, 0], torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(batch["rewards"][0, 0, 0], torch.tensor([-(1.5**2), -1.0]))


# --- the crossing ---


def constant_speeds(speeds, u, count=200):
    """Rollouts of each constant speed (m/s) of vehicle 1 as a task of its own, on the same `count` initial states."""
    noise = noise_of(ENVS["crossing"], [0], 0, 1, count)
    noise = {key: x.expand(-1, len(speeds), *x.shape[2:]) for key, x in noise.items()}
    action = (torch.tensor(speeds) / 7.5 - 1)[:, None, None].expand(-1, count, 1)
    return rollout(ENVS["crossing"], lambda obs, noise: action, torch.full((1, len(speeds), 1), u), noise)


def test_the_best_plan_is_to_go_first_before_a_slow_vehicle_and_to_yield_to_a_fast_one():
    speeds = [0.25 * i for i in range(61)]
    best = {}
    for u in (5.0, 9.0, 11.0, 15.0):
        batch = constant_speeds(speeds, u)
        returns = batch["rewards"].sum(-1).mean(-1)[0]
        index = int(returns.argmax())
        x, y = batch["obs"][0, index].movedim(-1, 0) * torch.tensor([1.0, -1.0])[:, None, None]  # (K, H) each
        first = (y <= 0).sum(-1) < (x <= 0).sum(-1)  # vehicle 1 spends fewer steps before the crossing
        best[u] = (speeds[index], first.float().mean().item())
    assert best[5.0][0] > 10 > best[15.0][0] and best[9.0][0] > 12 and best[11.0][0] < 7
    assert best[5.0][1] == best[9.0][1] == 1 and best[11.0][1] == best[15.0][1] == 0


def test_one_crossing_by_hand_and_a_collision_ends_and_costs():
    noise = noise_of(ENVS["crossing"], [0], 0, 1, 1)
    noise["reset"][:] = torch.tensor([0.5, 0.5])  # both 40 m before the crossing
    batch = rollout(ENVS["crossing"], lambda obs, noise: torch.full((1, 1, 1), 1 / 3), torch.tensor([[[10.0]]]), noise)
    mask, rewards = batch["mask"][0, 0, 0], batch["rewards"][0, 0, 0]
    torch.testing.assert_close(batch["obs"][0, 0, 0, 1] * 50, torch.tensor([-39.0, 39.0]))  # 1 m each in 0.1 s
    rewards = rewards[mask]
    distances = [math.sqrt(2) * (40 - t - 1) for t in range(len(rewards))]
    expected = [1 - 2 * max(0, 1 - d / 15) - 10 * (d < 3) for d in distances]  # at the best speed, 10 m/s
    torch.testing.assert_close(rewards, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert batch["terminated"].all() and len(rewards) < 60 and distances[-1] < 3 <= distances[-2]


def test_one_gradient_step_on_a_crossing_learns_for_that_crossing_more_than_for_another():
    env, head = ENVS["crossing"], policies.Gaussian(1)
    theta = policies.init(env.obs_dim, head, uniform_of([0]))
    with torch.no_grad():  # a policy between the two plans: 9.75 m/s everywhere
        theta["policy.2.weight"].zero_()
        theta["policy.2.bias"].fill_(9.75 / 7.5 - 1)
        theta["policy.raw_std"].fill_(-0.5)  # u = 0: σ = 0.55
    phi = torch.tensor([[[7.0], [13.0]]])
    returns = []

    def task_loss(params):
        detached = {key: p.detach() for key, p in params.items()}
        batch = rollout(env, policies.actor(detached, head, torch), phi, noise_of(env, [0], 1, 2, 500))
        returns.append(batch["rewards"].sum(-1).mean(-1)[0])
        return policies.loss(params, batch, head, "pg", 0.99, "dice", "step")

    adapted = maml.adapt(maml.expand(theta, 2), task_loss, 0.01, second_order=False)
    task_loss(adapted)
    task_loss({name: p.flip(1) for name, p in adapted.items()})  # each task under what the other one learned
    before, own, others = returns
    assert (own > before + 0.5).all() and (own > others + 0.5).all(), returns


# --- rollouts ---


def tilted(direction):
    """A policy that pushes one way: episodes are short, and of different lengths at different gravities."""
    return lambda obs, noise: torch.full(obs.shape[:2], direction, dtype=torch.long)


def test_after_the_end_observations_rewards_and_mask_are_zero_up_to_the_horizon():
    noise = noise_of(CARTPOLE, [0, 1], 0, 3, 4)
    batch = rollout(CARTPOLE, tilted(1), tasks_of(CARTPOLE, [0, 1], 1, 3), noise)
    mask = batch["mask"]
    assert mask.shape[-1] == 200 and mask.sum(-1).max() < 20
    assert mask.sum(-1).min() < mask.sum(-1).max()
    assert (mask.int().diff(dim=-1) <= 0).all()  # an episode that has ended stays so
    assert batch["rewards"][~mask].abs().max() == 0 and batch["obs"][~mask].abs().max() == 0
    assert batch["terminated"].all()


@pytest.mark.parametrize("name", BATCHED)
def test_a_rollout_is_a_pure_function_of_policy_phi_and_noise(name):
    env = ENVS[name]
    noise = noise_of(env, [0, 1], 0, 3, 4)
    phi = tasks_of(env, [0, 1], 1, 3)

    def act(obs, noise):
        return noise.argmax(-1) if isinstance(env.actions, int) else 0.3 * noise

    torch.manual_seed(0)
    first = rollout(env, act, phi, noise)
    torch.manual_seed(1)
    second = rollout(env, act, phi, noise)
    assert all(torch.equal(first[key], second[key]) for key in first)
    one = {key: x[1:, 2:] for key, x in noise.items()}  # the last task of the second run, alone
    alone = rollout(env, act, phi[1:, 2:], one)
    assert all(torch.equal(x, first[key][1:, 2:]) for key, x in alone.items())


def test_permuting_tasks_permutes_results():
    noise = noise_of(CARTPOLE, [0], 0, 4, 3)
    phi = tasks_of(CARTPOLE, [0], 1, 4)
    order = torch.tensor([2, 0, 3, 1])

    def act(obs, noise):
        return noise.argmax(-1)

    straight = rollout(CARTPOLE, act, phi, noise)
    permuted = rollout(CARTPOLE, act, phi[:, order], {key: x[:, order] for key, x in noise.items()})
    assert all(torch.equal(straight[key][:, order], permuted[key]) for key in straight)


def trained_on(name, device, S=2, M=3, K=4):
    """A fresh policy's make_act, its parameters (S, M, ...), and φ and noise for one rollout, on a device."""
    env = ENVS[name]
    head = policies.Categorical(2) if isinstance(env.actions, int) else policies.Gaussian(env.action_dim)
    params = maml.expand(policies.init(env.obs_dim, head, uniform_of(range(S))), M)
    phi, noise = tasks_of(env, range(S), 0, M).to(device), noise_of(env, range(S), 0, M, K)
    params, noise = ({key: x.detach().to(device) for key, x in d.items()} for d in (params, noise))
    return env, head, params, phi, noise


# --- random numbers ---


def test_philox_gives_its_authors_known_answers():
    """The vectors of Random123's kat_vectors, for philox4x32-10: counter, key, numbers."""
    for words in (
        "00000000 00000000 00000000 00000000  00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        "ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd",
        "243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1",
    ):
        words = [int(word, 16) for word in words.split()]
        for array in (lambda x: np.array([x]), lambda x: torch.tensor([x])):
            got = envs.philox([array(x) for x in words[:4]], [array(x) for x in words[4:6]])
            assert [x.item() for x in got] == words[6:]


@pytest.mark.parametrize("device", DEVICES)
def test_random_words_are_the_same_in_numpy_and_torch_in_any_batch_and_for_any_tasks(device):
    ours = stream([3, 2**40, 5], 1, epoch=7)
    words = envs.random_words(ours, 2, range(4), (3, 5))
    assert words.shape == (3, 4, 3, 5) and words.min() >= 0 and words.max() < 2**32
    assert len(np.unique(words)) == words.size
    theirs = envs.Stream(*(torch.from_numpy(x).to(device) for x in ours))
    on_device = envs.random_words(theirs, 2, range(4), (3, 5))
    assert on_device.device.type == device and (on_device.cpu().numpy() == words).all()
    uniform = envs.uniform(ours, 2, range(4), (3, 5)), envs.uniform(theirs, 2, range(4), (3, 5))
    assert (uniform[1].cpu().numpy() == uniform[0]).all() and uniform[0].dtype == np.float32
    alone = envs.random_words(stream([2**40], 1, epoch=7), 2, range(1, 4, 2), (3, 5))
    assert (alone == words[1:2, 1::2]).all()
    assert (envs.random_words(ours, 2, range(4), (2, 5)) == words[:, :, :2]).all()  # fewer are the first of more


def test_uniform_numbers_are_uniform_and_neighbouring_runs_epochs_calls_purposes_and_tasks_uncorrelated():
    """Fixed keys, so it cannot flake: with 2^16 numbers each, every statistic is within 4.5 of its standard errors."""
    count = 2**16

    def numbers(seed=1, purpose=0, epoch=1, call=1, task=0):
        return envs.uniform(stream([seed], purpose, epoch), call, range(task, task + 1), (count,))[0, 0].astype(float)

    others = [{}, {"seed": 2}, {"seed": 0}, {"purpose": 1}, {"epoch": 2}, {"epoch": 0}, {"call": 2}, {"call": 0}]
    drawn = np.stack([numbers(**other) for other in [*others, {"task": 1}, {"task": 2}]])
    assert drawn.min() > 0 and drawn.max() < 1
    standard = (drawn - 0.5) * math.sqrt(12)
    assert abs(standard.mean(1)).max() * math.sqrt(count) < 4.5
    assert abs((standard**2).mean(1) - 1).max() * math.sqrt(count) < 4.5 * math.sqrt(0.8)  # Var u² of unit variance
    correlations = standard @ standard.T / count
    assert abs(correlations - np.diag(np.diag(correlations))).max() * math.sqrt(count) < 4.5
    neighbours = (standard[:, 1:] * standard[:, :-1]).mean(1)  # within one block of four words, and across
    assert abs(neighbours).max() * math.sqrt(count) < 4.5
    cells = np.stack([np.bincount((row * 256).astype(int), minlength=256) for row in drawn])
    chi_square = ((cells - count / 256) ** 2 / (count / 256)).sum(1)  # 255 degrees of freedom
    assert (abs(chi_square - 255) < 4.5 * math.sqrt(2 * 255)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BATCHED)
def test_tasks_and_noise_of_a_device_are_a_cpus_to_rounding(name, device):
    ours, env = stream([1, 2], 0, epoch=3), ENVS[name]
    theirs = envs.Stream(*(torch.from_numpy(x).to(device) for x in ours))
    pairs = [(envs.sample_tasks(env, x, 3), draw_noise(env, x, range(3), 2)) for x in (ours, theirs)]
    (phi, noise), (phi_there, noise_there) = pairs
    torch.testing.assert_close(phi_there.cpu(), torch.from_numpy(phi))
    for key, x in noise_there.items():
        torch.testing.assert_close(x.cpu(), torch.from_numpy(noise[key]), rtol=1e-4, atol=1e-5)


def test_a_runs_noise_depends_on_its_seed_purpose_epoch_and_call_alone():
    def draw(seeds, *stream_of, call=1):
        return draw_noise(CARTPOLE, stream(seeds, *stream_of), range(2), 2, call)

    together, alone = draw([1, 2, 3], 1, 7), draw([2], 1, 7)
    assert all((together[key][1:2] == alone[key]).all() for key in alone)
    for other in (draw([2], 1, 8), draw([2], 2, 7), draw([3], 1, 7), draw([2], 1, 7, call=2)):
        assert not (other["action"] == alone["action"]).any()


def test_action_noise_is_gumbel_for_discrete_and_normal_for_box_actions():
    gumbel = noise_of(CARTPOLE, [0], 0, 20, 20)["action"]
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert gumbel.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
    normal = noise_of(ENVS["point"], [0], 0, 50, 50)["action"]
    assert normal.mean().item() == pytest.approx(0, abs=0.02) and normal.std().item() == pytest.approx(1, abs=0.02)
    assert (normal.abs() < 1).float().mean().item() == pytest.approx(0.6827, abs=0.01)


# --- tasks ---


@pytest.mark.parametrize("name", BATCHED)
def test_tasks_are_uniform_over_phi(name):
    env = ENVS[name]
    phi = tasks_of(env, [0], 0, 20_000)[0]
    low, high = torch.tensor(env.low), torch.tensor(env.high)
    assert (phi >= low).all() and (phi <= high).all()
    torch.testing.assert_close(phi.mean(0), (low + high) / 2, rtol=0.02, atol=0.02)
    torch.testing.assert_close(phi.std(0), (high - low) / math.sqrt(12), rtol=0.02, atol=0)


def test_medium_tasks():
    phi = envs.sample_tasks(CARTPOLE, stream([0, 1], 0), 5)
    drawing = stream([0, 1], 1)
    assert (medium_task(CARTPOLE, "mean", phi, drawing) == np.full((2, 1, 1), 10.0)).all()  # Eq. 3
    np.testing.assert_allclose(medium_task(CARTPOLE, "sampled", phi, drawing), phi.sum(1, keepdims=True) / 5)  # Eq. 4
    drawn = [medium_task(CARTPOLE, "random", phi, stream([0, 1], 1, epoch)) for epoch in (0, 1)]
    assert drawn[0].shape == (2, 1, 1) and not (drawn[0] == drawn[1]).any() and not (drawn[0] == phi[:, :1]).any()
    both = medium_task(ENVS["point"], [0.1, 0.2], phi.repeat(2, 2), drawing)
    np.testing.assert_allclose(both, [[[0.1, 0.2]]] * 2)


@pytest.mark.parametrize(
    ("dist", "mean", "below_a_fifth"),
    [("uniform", 0.5, 0.2), ("bimodal", 0.5, 0.5), ("skewed", 0.25, 0.2 ** (1 / 3))],  # u³ < 0.2
)
def test_task_distributions_have_their_mean_and_shape(dist, mean, below_a_fifth):
    env = replace(CARTPOLE, task_dist=dist)
    share = (tasks_of(env, [1], 0, 40_000) - 5) / 10
    assert share.min() >= 0 and share.max() <= 1
    assert share.mean().item() == pytest.approx(mean, abs=0.01)
    assert (share < 0.2).float().mean().item() == pytest.approx(below_a_fifth, abs=0.01)
    if dist == "bimodal":
        assert not ((share > 0.2) & (share < 0.8)).any()
    assert medium_task(env, "mean", np.zeros((1, 1, 1)), stream([1], 0)).item() == pytest.approx(5 + 10 * mean)


def test_the_geometric_median_has_the_least_sum_of_distances_and_in_one_dimension_is_the_median():
    points = torch.randn(3, 7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    median = medium_task(ENVS["point"], "median", points, None)  # (3, 1, 2)

    def distances(x):
        return (points - x).norm(dim=-1).sum(1)

    for direction in torch.eye(2, dtype=torch.float64):
        for step in (-1e-3, 1e-3):
            assert (distances(median) <= distances(median + step * direction)).all()
    line = torch.tensor([[[6.0], [5.5], [14.0], [14.5], [15.0]]])
    assert medium_task(CARTPOLE, "median", line, None).item() == pytest.approx(14.0, abs=0.02)


def test_held_out_grids_may_reach_beyond_phi():
    assert held_out_tasks(CARTPOLE, [0, 20]).flatten().tolist() == [1.0 + 2 * i for i in range(10)]


def test_held_out_grids_cover_phi():
    torch.testing.assert_close(held_out_tasks(CARTPOLE)[:, 0], torch.arange(5.5, 15))
    grid = held_out_tasks(ENVS["point"])
    assert grid.shape == (36, 2) and grid.unique(dim=0).shape == (36, 2)
    assert grid.amin().item() == pytest.approx(-5 / 12) and grid.amax().item() == pytest.approx(5 / 12)


@pytest.mark.parametrize("bounds", [[15, 5], [5], [5, 15, 1, 2], [math.nan, 5], [5, math.inf]])
def test_bounds_that_make_no_sense_are_refused(bounds):
    with pytest.raises(envs.ArgumentError, match="bounds .*(LOW HIGH|LOW first)") as error:
        envs.make("cartpole", bounds=bounds)
    assert error.value.argument == "bounds" and error.value.line("--range").startswith("--range ")


# --- gymnasium's environments ---


def plain_loop(env_id, attribute, value, seed, actions):
    """One episode by hand: gymnasium's own environment, and nothing around it."""
    env = gymnasium.make(env_id)
    setattr(env.unwrapped, attribute, value)
    obs, rewards = [env.reset(seed=seed)[0]], []
    for action in actions:
        first, reward, terminated, truncated, _ = env.step(action)
        obs.append(first)
        rewards.append(reward)
        if terminated or truncated:
            break
    return np.array(obs, np.float32), np.array(rewards, np.float32), terminated, truncated


@pytest.mark.parametrize(
    ("name", "options", "env_id", "attribute", "sign", "values"),
    [
        ("lunarlander", {}, "LunarLander-v3", "gravity", -1, [5.0, 7.5, 10.0, 12.5, 15.0]),
        ("Pendulum-v1", {"names": ["g"], "bounds": [5, 15]}, "Pendulum-v1", "g", 1, [5.0, 15.0]),
        ("CartPole-v1", {"names": ["gravity"], "bounds": [5, 15]}, "CartPole-v1", "gravity", 1, [5.0, 15.0]),
    ],
)
def test_a_rollout_is_a_plain_loop_over_gymnasium(name, options, env_id, attribute, sign, values):
    env = make(name, horizon=250, **options)
    noise = noise_of(env, [3], 0, len(values), 2)

    def act(obs, noise):
        return noise.argmax(-1) if isinstance(env.actions, int) else noise

    batch = rollout(env, act, torch.tensor(values)[None, :, None], noise)
    seen = set()
    for i, value in enumerate(values):
        for k in range(2):
            actions = batch["actions"][0, i, k].numpy()
            if not isinstance(env.actions, int):
                low, high = np.array(env.actions, np.float32)
                actions = low + (actions.clip(-1, 1) + 1) / 2 * (high - low)
            seed = int(noise["reset"][0, i, k, 0].item() * 2**24)
            length = int(batch["mask"][0, i, k].sum())
            obs, rewards, terminated, truncated = plain_loop(env_id, attribute, sign * value, seed, actions[:length])
            assert len(rewards) == length and (length == 250 or terminated or truncated)
            np.testing.assert_array_equal(batch["obs"][0, i, k, :length].numpy(), obs[:-1])
            np.testing.assert_array_equal(batch["rewards"][0, i, k, :length].numpy(), rewards)
            assert terminated == batch["terminated"][0, i, k]
            if not terminated:  # truncated, or the horizon: the critic is asked what the last observation is worth
                np.testing.assert_array_equal(batch["last_obs"][0, i, k].numpy(), obs[-1])
            seen.add((terminated, truncated))
    assert (False, True) in seen if name == "Pendulum-v1" else (True, False) in seen  # Pendulum ends after 200 steps


def test_gravity_beyond_what_the_constructor_asserts_works_and_matters():
    with pytest.raises(AssertionError):
        gymnasium.make("LunarLander-v3", gravity=-15.0)
    env = make("lunarlander", horizon=30)
    noise = noise_of(env, [0], 0, 1, 1)
    noise = {key: x.expand(-1, 3, *x.shape[2:]) for key, x in noise.items()}
    batch = rollout(
        env, lambda obs, noise: torch.zeros(3, 1, dtype=torch.long), torch.tensor([[[5.0], [10.0], [15.0]]]), noise
    )
    falling = batch["obs"][0, :, 0, 20, 3]
    assert falling[0] > falling[1] > falling[2]  # vertical speed after 20 steps of free fall


def test_actions_that_are_not_numbers_end_no_environment():
    """Box2D asserts, and the runs beside the one that exploded would end with it."""
    box = ((-1.0,) * 4, (1.0,) * 4)
    walker = Gymnasium("BipedalWalker-v3", ("hardcore",))
    env = replace(FAMILIES["lunarlander"], dynamics=walker, actions=box, horizon=5)
    noise, phi = noise_of(env, [0], 0, 2, 1), tasks_of(env, [0], 1, 2)
    batch = rollout(env, lambda obs, noise: torch.full_like(noise, math.nan), phi, noise)
    assert batch["mask"].all() and batch["rewards"].isfinite().all() and batch["actions"].isnan().all()


def test_several_parameters_are_a_vector_phi():
    env = make("Pendulum-v1", names=["g", "l"], bounds=[5, 15, 0.5, 1.5])
    assert env.low == (5, 0.5) and env.high == (15, 1.5) and env.horizon == 200
    assert tasks_of(env, [0], 0, 4).shape == (1, 4, 2) and len(held_out_tasks(env)) == 36


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("Pendulum-v1", {}, "names: say which parameter of Pendulum-v1 is φ, one of: .*g"),
        ("Pendulum-v1", {"names": ["g"]}, "bounds: give LOW HIGH for g of Pendulum-v1, e.g. 5 15"),
        (
            "Pendulum-v1",
            {"names": ["gravity"], "bounds": [5, 15]},
            "names gravity: Pendulum-v1 has no such number",
        ),
        ("Pendulum-v1", {"names": ["g", "l"], "bounds": [5, 15]}, "expected LOW HIGH for each of 2 parameter"),
        (
            "CartPole-v1",
            {"names": ["total_mass", "screen_width"], "bounds": [1, 2, 500, 700]},
            "names screen_width: .* gives the same episode .* at 500 and 700",
        ),
        (
            "CartPole-v1",
            {"names": ["masscart"], "bounds": [0.5, 2]},
            "names masscart: .* gives the same episode",
        ),
        (
            "Blackjack-v1",
            {"names": ["make.natural"], "bounds": [0, 1]},
            "a switch of Blackjack-v1, False",
        ),
        ("LunarLanderr-v3", {}, "did you mean LunarLander-v3?"),
        ("cartpole", {"names": ["gravity"]}, "names gravity: cartpole has its own φ; leave it out"),
    ],
)
def test_environments_that_cannot_be_used_are_refused_in_one_line(name, options, says):
    with pytest.raises(ValueError, match=says) as error:
        make(name, **options)
    assert "\n" not in str(error.value) and "--" not in str(error.value)


@pytest.mark.parametrize("dist", envs.TASK_DISTS)
@pytest.mark.parametrize(("components", "cells"), [(1, 10), (2, 6), (3, 4)])
def test_held_out_tasks_are_midpoints_of_equal_cells_and_the_mean_task_is_none_of_them(components, cells, dist):
    low, high = (5.0, -0.5, 0.0)[:components], (15.0, 0.5, 2.0)[:components]
    env = replace(CARTPOLE, phi_names=("x",) * components, low=low, high=high, task_dist=dist)
    grid = held_out_tasks(env).double()
    # Of 10 or 6 cells the second one's midpoint is a quarter of the way, which is the skewed distribution's mean.
    cells += 2 * (dist == "skewed" and components < 3)
    assert grid.shape == (cells**components, components)
    for i in range(components):
        width = (high[i] - low[i]) / cells
        expected = torch.tensor([low[i] + width * (j + 0.5) for j in range(cells)], dtype=torch.float64)
        torch.testing.assert_close(grid[:, i].unique(), expected, rtol=0, atol=1e-6)
    mean = torch.tensor(envs.mean_task(env), dtype=torch.float64)
    assert (grid - mean).abs().max(1).values.min() > 0.01


@pytest.mark.parametrize("xp", [np, torch])
def test_phi_observed_is_scaled_over_phi_at_the_end_of_every_observation_and_changes_nothing_else(xp):
    env = replace(CARTPOLE, low=(5.0,), high=(15.0,), horizon=30)
    oracle = envs.with_phi_observed(env)
    assert oracle.obs_dim == 5
    phi = torch.tensor([[[5.0], [7.5], [15.0], [20.0]]])
    noise = noise_of(env, [0], 0, 4, 3)
    if xp is np:
        phi, noise = phi.numpy(), {key: x.numpy() for key, x in noise.items()}
    seen = []

    def act(obs, noise):
        seen.append(obs.shape[-1])
        return noise.argmax(-1)

    plain, got = (envs.rollout(x, act, phi, noise, xp) for x in (env, oracle))
    assert seen[0] == 4 and seen[-1] == 5
    plain, got = ({key: torch.as_tensor(x) for key, x in d.items()} for d in (plain, got))
    for key in plain:
        assert torch.equal(plain[key], got[key][..., :4] if "obs" in key else got[key]), key
    mask = got["mask"]
    for i, expected in enumerate((-1.0, -0.5, 1.0, 2.0)):  # (φ − 10) / 5
        assert (got["obs"][0, i, ..., 4][mask[0, i]] == expected).all()
    assert (got["obs"][..., 4][~mask] == 0).all()


def test_phi_observed_reaches_gymnasium_environments_and_a_component_without_a_range_is_zero():
    env = make("Pendulum-v1", ["g", "m"], [5, 15, 1, 1], 6)
    oracle = envs.with_phi_observed(env)
    assert oracle.is_gymnasium and oracle.obs_dim == 5
    phi = np.array([[[5.0, 1.0], [12.5, 1.0]]], np.float32)
    noise = {key: x.numpy() for key, x in noise_of(env, [0], 0, 2, 2).items()}
    plain, got = (envs.rollout(x, lambda obs, noise: noise, phi, noise) for x in (env, oracle))
    assert np.array_equal(plain["obs"], got["obs"][..., :3]) and np.array_equal(plain["rewards"], got["rewards"])
    assert (got["obs"][0, 0, ..., 3] == -1).all() and (got["obs"][0, 1, ..., 3] == 0.5).all()
    assert (got["obs"][..., 4] == 0).all() and got["obs"].dtype == np.float32
