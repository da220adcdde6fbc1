"""Task families: an environment whose parameter φ differs from task to task, its batched dynamics, and rollouts.

Needs torch and numpy alone. Gymnasium's environments become task families in harness/gyms.py.

Axes: S runs, M tasks, K trajectories, H time steps, D features; B = S·M. Every random number of a rollout is drawn up
front (`draw_noise`), so a rollout is a pure function of the policy's parameters, φ and noise.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

# --- random numbers: each is a pure function of (run's key, purpose, epoch, call, task, index) ---

PURPOSES = INIT, TASKS, MEDIUM, EVALUATION, WATCH, OTHER = range(6)  # what random numbers are drawn for
WORD = 0xFFFFFFFF  # the low 32 bits


class Stream(NamedTuple):
    """The random numbers of S runs for one purpose in one epoch: arrays of numpy, or tensors on any device.

    A run's numbers depend on its seed, the purpose and the epoch alone: not on the device, the runs beside it, the
    algorithm, nor what was drawn before. So paired runs share tasks and noise, and resuming needs no generator state.
    """

    keys: np.ndarray | torch.Tensor  # (2, S, 1, 1): two 32-bit words for each run
    epoch: np.ndarray | torch.Tensor  # (1,): a recorded CUDA graph reads it anew at every replay

    @property
    def xp(self):
        return np if isinstance(self.keys, np.ndarray) else torch

    def integers(self, numbers):
        """A Python range as integers (n,) where the keys are."""
        ends = numbers.start, numbers.stop, numbers.step
        return np.arange(*ends) if self.xp is np else torch.arange(*ends, device=self.keys.device)

    def floats(self, integers):
        """Integers in torch's default dtype, float32 unless a test says otherwise."""
        dtype = torch.get_default_dtype()
        return integers.astype(str(dtype).split(".")[1]) if self.xp is np else integers.to(dtype)


def stream(seeds, purpose, epoch=0):
    """The `Stream` of runs with these seeds, in numpy."""
    keys = [np.random.SeedSequence([seed, purpose]).generate_state(2) for seed in seeds]
    return Stream(np.array(keys, np.int64).T[..., None, None], np.array([epoch]))


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011): four random 32-bit words for each counter, four words, and key, two words.

    Words are int64 arrays that broadcast, numpy's or torch's. Products wrap around at 64 bits, >> keeps the sign, and
    only the low 32 bits of b and d are meant: what is used is masked.
    """
    a, b, c, d = counter
    key_a, key_c = key
    for _ in range(10):
        product_a, product_c = a * 0xD2511F53, c * 0xCD9E8D57
        a = ((product_c >> 32) ^ b ^ key_a) & WORD
        c = ((product_a >> 32) ^ d ^ key_c) & WORD
        b, d = product_c, product_a
        key_a, key_c = key_a + 0x9E3779B9, key_c + 0xBB67AE85
    return a, b & WORD, c, d & WORD


def random_words(stream, call, tasks, shape):
    """Random 32-bit words of each run for each of the M `tasks`, a range of their numbers: int64 (S, M, *shape)."""
    count = math.prod(shape)
    blocks, tasks = stream.integers(range(math.ceil(count / 4))), stream.integers(tasks)[:, None]
    words = stream.xp.stack(philox((blocks, call, stream.epoch, tasks), stream.keys), -1)  # (S, M, blocks, 4)
    lead = words.shape[:2]
    return words.reshape(*lead, -1)[..., :count].reshape(*lead, *shape)


def uniform(stream, call, tasks, shape):
    """Numbers in (0, 1), (S, M, *shape): the midpoints of 2²³ equal cells, exact in float32, so never 0 or 1."""
    return (stream.floats(random_words(stream, call, tasks, shape) >> 9) + 0.5) * 2.0**-23


def gumbel(u, xp):
    """Gumbel noise −log(−log u) of uniform u."""
    return -xp.log(-xp.log(u))


def normal(u, v, xp):
    """Standard normal noise √(−2 log u) cos(2πv) of uniform u and v (Box, Muller 1958)."""
    return xp.sqrt(-2 * xp.log(u)) * xp.cos(2 * math.pi * v)


# --- the task families ---


@dataclass(frozen=True)
class Env:
    """One task family. States are arrays (B, K, D) and are observed whole; φ is not, but for `with_phi_observed`.

    dynamics: (φ (B, 1, P), noise (B, K, R) uniform in [0, 1), xp) -> the initial state, and step: (state, action) ->
        (state, reward, terminated, ended), the last three (B, K); ended: terminated, or truncated. Actions are (B, K)
        in 0 .. actions−1, or (B, K, A) within the box `actions` = (low, high). xp is numpy on a CPU, where a step of so
        small arrays costs half of torch's; torch on a GPU: dynamics use what both have.
    """

    phi_names: tuple[str, ...]  # with units, of φ's P components
    low: tuple[float, ...]
    high: tuple[float, ...]
    horizon: int  # H
    obs_dim: int  # D
    actions: int | tuple[tuple[float, ...], tuple[float, ...]]
    reset_noise: int  # R
    dynamics: Callable
    defaults: dict = field(default_factory=dict)  # run.py's settings, where this family has others
    task_dist: str = "uniform"  # ρ over Φ, one of TASK_DISTS
    values: tuple[tuple[float, ...], ...] = ()  # the tasks, where they are a list: ρ is uniform over it, Φ holds it
    phi_observed: bool = False  # rollouts add φ, scaled to [−1, 1] over Φ, to the end of every observation
    is_gymnasium: bool = False  # stepped one by one, on a CPU, by harness/gyms.py: worth processes of its own

    @property
    def action_dim(self):
        return self.actions if isinstance(self.actions, int) else len(self.actions[0])


def constants(like, values, xp):
    """A vector of numbers of the dtype of `like`, filled on its device: no CUDA graph holds a copy from the host."""
    return xp.stack([xp.full_like(like.reshape(-1)[0], value) for value in values])


def last_axis(xp, *parts):
    """xp.stack(parts, -1), in less than half of numpy's time for it."""
    return xp.concatenate([part[..., None] for part in parts], -1)


def same_shape(noise, *values):
    """Numbers, or arrays (B, 1), as arrays (B, K): numpy takes a third of the time for two arrays of one shape."""
    return [value + 0 * noise[..., 0] for value in values]


def cartpole(phi, noise, xp):
    """gymnasium's CartPole-v1, equations and constants, at gravity φ (m/s²).

    State: position (m), velocity (m/s), angle (rad), angular velocity (rad/s). Action 0 pushes left, 1 right.
    """
    # Arrays of the state's shape, not numbers: on 50 tasks of 10 episodes a step then takes 12% less.
    gravity, force, pole_mass, total_mass, half_length = same_shape(noise, phi[..., 0], 10.0, 0.1, 1.1, 0.5)  # N, kg, m
    pole_moment, tau = pole_mass * half_length, 0.02  # kg m, s
    limits = 0 * noise + constants(noise, (2.4, math.inf, 12 * 2 * math.pi / 360, math.inf), xp)  # m, -, rad, -
    reward = 1 + 0 * noise[..., 0]

    def step(state, action):
        x_dot, angle, angle_dot = state[..., 1], state[..., 2], state[..., 3]
        cos, sin = xp.cos(angle), xp.sin(angle)
        temp = (xp.where(action == 1, force, -force) + pole_moment * angle_dot * angle_dot * sin) / total_mass
        angle_acc = (gravity * sin - cos * temp) / (half_length * (4 / 3 - pole_mass / total_mass * cos * cos))
        x_acc = temp - pole_moment / total_mass * angle_acc * cos
        state = state + tau * last_axis(xp, x_dot, x_acc, angle_dot, angle_acc)
        beyond = abs(state) > limits
        terminated = beyond[..., 0] | beyond[..., 2]
        return state, reward, terminated, terminated

    return noise * 0.1 - 0.05, step


def point(phi, noise, xp):
    """A point in the plane, at the origin at first, moves by the action (m); φ = goal (m); reward −|s − goal|²."""
    never = noise[..., 0] < 0

    def step(state, action):
        state = state + action
        return state, -((state - phi) ** 2).sum(-1), never, never

    return xp.zeros_like(noise), step


# A body on a line, at rest at first, changes its velocity v by the action (m/s); φ = target v*; reward −(v − v*)².
# The same arithmetic as the point's, in one dimension.
velocity = point


CROSSING_UNIT = 50.0  # m: the crossing's positions in units near 1, as networks want them


def crossing(phi, noise, xp):
    """Vehicle 1 drives north, vehicle 2 east at speed φ = u (m/s), both toward one crossing; u is not observed.

    State: (Δx, Δy), vehicle 2's position less vehicle 1's, in units of 50 m; as each vehicle stays on its road, it is
    also (x₂, −y₁). Both start 35 to 45 m before the crossing, independently and uniformly. Action: vehicle 1's speed v
    in m/s, held for 0.1 s. Reward of a step: 1 − ((v − 10) / 10)² − 2 max(0, 1 − d / 15), with 10 m/s the optimal
    speed and 15 m the safe distance; a distance d below 3 m is a collision, which costs 10 and ends the episode.
    """
    dt, best_speed, safe_distance, collision_distance = 0.1, 10.0, 15.0, 3.0  # s, m/s, m, m
    (other_speed,) = same_shape(noise, phi[..., 0])
    start = constants(noise, (-1.0, 1.0), xp) * (35 + 10 * noise) / CROSSING_UNIT

    def step(state, action):
        speed = action[..., 0]
        state = state + last_axis(xp, other_speed, -speed) * (dt / CROSSING_UNIT)
        distance = xp.sqrt((state**2).sum(-1)) * CROSSING_UNIT
        reward = 1 - (speed / best_speed - 1) ** 2 - 2 * (1 - distance / safe_distance).clip(0)
        collided = distance < collision_distance
        return state, xp.where(collided, reward - 10, reward), collided, collided

    return start, step


# fmt: off
ENVS = {
    "cartpole": Env(
        phi_names=("gravity (m/s²)",), low=(5.0,), high=(15.0,), horizon=200,
        obs_dim=4, actions=2, reset_noise=4, dynamics=cartpole,
        defaults={"threshold": 175.0, "epochs": 400},
    ),
    "crossing": Env(
        phi_names=("speed of vehicle 2 (m/s)",), low=(5.0,), high=(15.0,), horizon=60,
        obs_dim=2, actions=((0.0,), (15.0,)), reset_noise=2, dynamics=crossing,
        defaults={
            "alpha": 0.003, "beta": 0.0005, "delta": 0.0025, "baseline": "step", "threshold": 38.0,
            "epochs": 400,
        },
    ),
    "point": Env(
        phi_names=("goal x (m)", "goal y (m)"), low=(-0.5, -0.5), high=(0.5, 0.5), horizon=20,
        obs_dim=2, actions=((-0.1, -0.1), (0.1, 0.1)), reset_noise=2, dynamics=point,
        defaults={"alpha": 0.03, "baseline": "step", "threshold": -2.0, "epochs": 200},
    ),
    "velocity": Env(
        phi_names=("target velocity (m/s)",), low=(0.0,), high=(2.0,), horizon=20,
        obs_dim=1, actions=((-0.5,), (0.5,)), reset_noise=1, dynamics=velocity,
        defaults={
            "alpha": 0.01, "beta": 0.0003, "delta": 0.0015, "baseline": "step", "threshold": -5.0,
            "epochs": 200,
        },
    ),
}
# fmt: on


class ArgumentError(ValueError):
    """What is wrong with an argument, in one line with the remedy. value: what it was, as text."""

    def __init__(self, argument, value, problem):
        super().__init__(argument, value, problem)
        self.argument, self.value, self.problem = argument, value, problem

    def __str__(self):
        return self.line(self.argument)

    def line(self, name):
        """The message, with another name for the argument."""
        return f"{name} {self.value}".rstrip() + f": {self.problem}"


def make(name, bounds=None, horizon=None, values=None):
    """The task family `name` of ENVS, with Φ and the horizon as in `with_tasks`."""
    if name not in ENVS:
        raise ArgumentError("name", name, f"unknown task family; choose from {', '.join(ENVS)}")
    return with_tasks(ENVS[name], bounds, horizon, values)


def with_tasks(env, bounds=None, horizon=None, values=None):
    """The family with another Φ or horizon, where they are given.

    bounds: [low, high] for each component of φ, one after the other; values: a list of tasks instead,
    P numbers each, one after the other. Raises ArgumentError.
    """
    if bounds is not None:
        check_bounds("bounds", bounds, env.phi_names)
        env = replace(env, low=tuple(bounds[::2]), high=tuple(bounds[1::2]))
    elif values is not None:
        tasks = list_of_tasks("values", values, env.phi_names)
        components = list(zip(*tasks, strict=True))
        low, high = tuple(map(min, components)), tuple(map(max, components))
        env = replace(env, low=low, high=high, values=tasks)
    return env if horizon is None else replace(env, horizon=horizon)


def with_phi_observed(env):
    """The family with φ in its observations, now D + P numbers: an oracle, whose policy is told its task."""
    return replace(env, obs_dim=env.obs_dim + len(env.phi_names), phi_observed=True)


def scaled_phi(env, phi, xp=np):
    """φ (..., P) with Φ mapped to [−1, 1]; a component with no range to 0."""
    low, high = (constants(phi, bound, xp) for bound in (env.low, env.high))
    return (2 * phi - low - high) / xp.where(high > low, high - low, 1.0)


def observed_dynamics(env, phi, noise, xp):
    """env.dynamics with `scaled_phi` at the end of every state."""
    state, step = env.dynamics(phi, noise, xp)
    seen = scaled_phi(env, phi, xp) + xp.zeros_like(state[..., :1])  # (B, K, P)
    size = state.shape[-1]

    def observed_step(state, action):
        state, *rest = step(state[..., :size], action)
        return xp.concatenate((state, seen), -1), *rest

    return xp.concatenate((state, seen), -1), observed_step


def check_bounds(argument, bounds, phi_names):
    """Raises ArgumentError where `bounds` is not LOW HIGH for each component of φ."""
    shown, names = " ".join(f"{x:g}" for x in bounds), ", ".join(phi_names)
    if len(bounds) != 2 * len(phi_names):
        expected = f"expected LOW HIGH for each of {len(phi_names)} parameter(s): {names}"
        raise ArgumentError(argument, shown, expected)
    ordered = all(low <= high for low, high in zip(bounds[::2], bounds[1::2], strict=True))
    if not (ordered and all(map(math.isfinite, bounds))):
        raise ArgumentError(argument, shown, "expected finite numbers, LOW first and not above HIGH")


def list_of_tasks(argument, numbers, phi_names):
    """Tasks φ from their numbers, one after the other. Raises ArgumentError where they are not P each, or one is there
    twice."""
    size, shown = len(phi_names), " ".join(f"{x:g}" for x in numbers)
    if not numbers or len(numbers) % size:
        expected = f"expected {size} number(s) for each task: {', '.join(phi_names)}"
        raise ArgumentError(argument, shown, expected)
    if not all(map(exact, numbers)):
        raise ArgumentError(argument, shown, f"expected finite numbers, whole ones up to {2**24}")
    tasks = tuple(tuple(map(float, numbers[i : i + size])) for i in range(0, len(numbers), size))
    if len(set(tasks)) < len(tasks):
        raise ArgumentError(argument, shown, "duplicate task")
    return tasks


def exact(x):
    """Whether float32 still holds a whole number."""
    return math.isfinite(x) and (abs(x) <= 2**24 or not float(x).is_integer())


# --- tasks ---


# The distribution ρ of a component of φ within its range, as a function of u ~ U(0, 1), and its mean.
TASK_DISTS = {
    "uniform": (lambda u, xp: u, 0.5),
    "bimodal": (lambda u, xp: xp.where(u < 0.5, 0.4 * u, 0.6 + 0.4 * u), 0.5),  # the lowest or the highest fifth
    "skewed": (lambda u, xp: u**3, 0.25),  # most near the low end
}


def sample_tasks(env, stream, num_tasks, call=0):
    """M tasks for each run, φ ~ ρ: (S, M, P)."""
    tasks, xp = range(num_tasks), stream.xp
    if env.values:
        chosen = random_words(stream, call, tasks, (1,)) * len(env.values) >> 32  # (S, M, 1), all equally likely
        values = [constants(stream.floats(chosen), phi, xp) for phi in env.values]
        return xp.stack(values)[chosen[..., 0]]
    u = uniform(stream, call, tasks, (len(env.low),))
    low, high = constants(u, env.low, xp), constants(u, env.high, xp)
    return low + (high - low) * TASK_DISTS[env.task_dist][0](u, xp)


MEDIUM_TASKS = ("mean", "sampled", "median", "random", "pooled")


def medium_task(env, medium, phi, stream):
    """φ_med (S, 1, P). medium: mean of ρ (Eq. 3), sampled: mean of the tasks `phi` (S, M, P) (Eq. 4), median: their
    geometric median, random: a task drawn anew (the control: same cost, no direction), or the P numbers of a φ.
    pooled: `phi` itself (S, M, P), whose trajectories are then pooled."""
    if medium == "pooled":
        return phi
    if medium == "sampled":
        return phi.mean(axis=1, keepdims=True)
    if medium == "median":
        return geometric_median(phi)
    if medium == "random":
        return sample_tasks(env, stream, 1)
    return constants(phi, mean_task(env) if medium == "mean" else medium, stream.xp) + 0 * phi[:, :1]


def mean_task(env):
    """The mean of ρ (Eq. 3): a list of P numbers."""
    if env.values:
        return [sum(component) / len(env.values) for component in zip(*env.values, strict=True)]
    mean = TASK_DISTS[env.task_dist][1]
    return [low + (high - low) * mean for low, high in zip(env.low, env.high, strict=True)]


def geometric_median(points, iterations=100):
    """The point (S, 1, P) with the least sum of distances to `points` (S, M, P), by Weiszfeld's iteration."""
    median = points.mean(axis=1, keepdims=True)
    for _ in range(iterations):
        distances = ((points - median) ** 2).sum(axis=-1, keepdims=True) ** 0.5
        weights = 1 / (distances + 1e-9)
        median = (weights * points).sum(axis=1, keepdims=True) / weights.sum(axis=1, keepdims=True)
    return median


def held_out_tasks(env, bounds=None, values=None):
    """A fixed grid inside Φ, or inside `bounds` [low, high] for each component of φ: (G, P). Where tasks are a list, or
    `values` lists them as in `make`, that list.

    The midpoints of 10 equal cells of one parameter, of 6 × 6 of two, of 4 each of more. An even number of cells keeps
    the mean task, on which directed learners train, off the grid; where ρ is skewed and it is on it, two cells more.
    """
    if values is not None or (env.values and bounds is None):
        return torch.tensor(list_of_tasks("eval_values", values, env.phi_names) if values is not None else env.values)
    low, high = (env.low, env.high) if bounds is None else (bounds[::2], bounds[1::2])
    count = {1: 10, 2: 6}.get(len(low), 4)
    axes = [midpoints(*ends, count) for ends in zip(low, high, strict=True)]
    if all(np.isclose(axis, mean).any() for axis, mean in zip(axes, mean_task(env), strict=True)):
        axes = [midpoints(*ends, count + 2) for ends in zip(low, high, strict=True)]
    return torch.tensor(list(itertools.product(*axes)), dtype=torch.get_default_dtype())


def midpoints(low, high, count):
    return low + (high - low) * (np.arange(count) + 0.5) / count


# --- rollouts ---


def draw_noise(env, stream, tasks, num_trajectories, call=1):
    """All randomness of one rollout of these tasks, a range: reset (S, M, K, R) uniform, action (S, M, K, H, A) Gumbel
    or normal. call: 1, 2, .. for the rollouts of an epoch; `sample_tasks` has 0."""
    discrete, xp = isinstance(env.actions, int), stream.xp
    first = num_trajectories * env.reset_noise
    count = env.horizon * num_trajectories * env.action_dim
    u = uniform(stream, call, tasks, (first + count if discrete else first + 2 * count,))
    reset, action = u[..., :first], u[..., first:]
    action = gumbel(action, xp) if discrete else normal(action[..., :count], action[..., count:], xp)
    # in memory, what one time step needs stands together
    action = action.reshape(*u.shape[:2], env.horizon, num_trajectories, env.action_dim).swapaxes(2, 3)
    return {"reset": reset.reshape(*u.shape[:2], num_trajectories, env.reset_noise), "action": action}


def in_box(action, low, high):
    """The policy's action, clipped to [−1, 1], within the box (low, high)."""
    return low + (action.clip(-1, 1) + 1) / 2 * (high - low)


def from_box(action, low, high):
    """The reverse of `in_box`."""
    return (action - low) / (high - low) * 2 - 1


@np.errstate(over="ignore", invalid="ignore")  # a run that diverges fails, which is said once
def rollout(env, act, phi, noise, xp=np, compiled=None):
    """K trajectories of every task of every run at once, a pure function of (act, phi, noise).

    act: (obs (B, K, D), noise (B, K, A)) -> actions; phi: (S, M, P); noise: from `draw_noise`; all arrays of xp: numpy,
    or torch on a GPU. compiled: what makes a faster function of a time step, e.g. torch.compile. Returns the
    trajectories that policies.py describes, H steps long, with zeros where an episode had ended before. numpy stops
    when every episode has ended; a GPU, which would stall if asked, never does.
    """
    lead = noise["reset"].shape[:3]  # (S, M, K)

    def flat(x):
        return x.reshape(-1, *x.shape[2:])  # (B, ...)

    dynamics = partial(observed_dynamics, env) if env.phi_observed else env.dynamics
    state, step = dynamics(flat(phi)[:, None], flat(noise["reset"]), xp)
    box = [] if isinstance(env.actions, int) else [constants(state, bound, xp) for bound in env.actions]

    def time_step(state, over, noise):
        action = act(state, noise)
        next_state, reward, terminated, ended = step(state, in_box(action, *box) if box else action)
        return next_state, over | ended, (state, action, reward, terminated, over)

    if compiled is not None:
        time_step = compiled(time_step)
    over = xp.zeros_like(state[..., 0], dtype=bool)
    steps, action_noise = [], flat(noise["action"])  # a (state, action, reward, terminated, over before) for each t
    for t in range(env.horizon):
        state, over, taken = time_step(state, over, action_noise[:, :, t])
        steps.append(taken)
        if xp is np and over.all():
            break
    steps += [tuple(0 * x for x in steps[0][:3]) + (~over, over)] * (env.horizon - len(steps))
    obs, actions, rewards, terminated, padding = (
        xp.stack(x, 2).reshape(*lead, env.horizon, *x[0].shape[2:]) for x in zip(*steps, strict=True)
    )
    mask = ~padding
    terminated = (terminated & mask).any(-1)  # (S, M, K)
    state = state.reshape(*lead, -1)
    return {
        "obs": xp.where(mask[..., None], obs, 0.0),
        "actions": xp.where(mask[..., None] if box else mask, actions, 0),
        "rewards": xp.where(mask, rewards, 0.0),
        "mask": mask,
        "last_obs": xp.where(terminated[..., None], 0.0, state),
        "terminated": terminated,
    }
