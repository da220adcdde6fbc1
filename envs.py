"""Task families: an environment whose parameter φ differs from task to task, its batched dynamics, and rollouts.

Axes: S runs, M tasks, K trajectories, H time steps, D features; B = S·M. Every random number of a rollout is drawn up
front (`draw_noise`), so a rollout is a pure function of the policy's parameters, φ and noise.
"""

import copy
import difflib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from numbers import Real

import gymnasium
import numpy as np
import torch

# --- randomness: one generator per run, set anew for every purpose ---


def generators(seeds, *stream):
    """One torch.Generator per run; `stream` (integers, e.g. purpose and epoch) names independent number streams.

    A run's numbers depend on its seed and the stream alone: not on the runs beside it, nor on the algorithm, nor on
    what was drawn before. So paired runs share tasks and noise, and resuming needs no generator state.
    """
    states = [np.random.SeedSequence([seed, *stream]).generate_state(1)[0] for seed in seeds]
    return [torch.Generator().manual_seed(int(state)) for state in states]


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
    draw: Callable | str | None = None  # (axes, obs so far (t, D), φ (P,)): draws the last one with matplotlib; or the
    #     id of the gymnasium environment that renders these states; None: observations against time
    dt: float = 0.1  # s between two states, as they are shown
    phi_observed: bool = False  # rollouts add φ, scaled to [−1, 1] over Φ, to the end of every observation

    @property
    def in_workers(self):
        """Whether sampling is worth processes of its own: gymnasium's environments."""
        return isinstance(self.dynamics, Gymnasium)

    @property
    def action_dim(self):
        return self.actions if isinstance(self.actions, int) else len(self.actions[0])


def constants(like, values, xp):
    """A vector of numbers of the dtype of `like`, filled on its device: no CUDA graph holds a copy from the host."""
    return xp.stack([xp.full_like(like.reshape(-1)[0], value) for value in values])


def cartpole(phi, noise, xp):
    """gymnasium's CartPole-v1, equations and constants, at gravity φ (m/s²).

    State: position (m), velocity (m/s), angle (rad), angular velocity (rad/s). Action 0 pushes left, 1 right.
    """
    gravity = phi[..., 0]
    force, tau = 10.0 + 0 * gravity, 0.02  # N, s
    pole_mass, total_mass, half_length = 0.1, 1.1, 0.5  # kg, kg, m
    pole_moment = pole_mass * half_length
    limits = constants(phi, (2.4, math.inf, 12 * 2 * math.pi / 360, math.inf), xp)
    reward = 1 + 0 * noise[..., 0]

    def step(state, action):
        _, x_dot, angle, angle_dot = (state[..., i] for i in range(4))
        cos, sin = xp.cos(angle), xp.sin(angle)
        temp = (xp.where(action == 1, force, -force) + pole_moment * angle_dot**2 * sin) / total_mass
        angle_acc = (gravity * sin - cos * temp) / (half_length * (4 / 3 - pole_mass / total_mass * cos**2))
        x_acc = temp - pole_moment / total_mass * angle_acc * cos
        state = state + tau * xp.stack((x_dot, x_acc, angle_dot, angle_acc), -1)
        terminated = (abs(state) > limits).any(-1)
        return state, reward, terminated, terminated

    return noise * 0.1 - 0.05, step


def point(phi, noise, xp):
    """A point in the plane, at the origin at first, moves by the action (m); φ = goal (m); reward −|s − goal|²."""
    never = noise[..., 0] < 0

    def step(state, action):
        state = state + action
        return state, -((state - phi) ** 2).sum(-1), never, never

    return xp.zeros_like(noise), step


def draw_point(axes, obs, phi):
    axes.plot(*obs.T, color="#0072B2", marker="o", markersize=3, label="path")
    axes.plot(*phi, "*", color="#D55E00", markersize=14, label="goal")
    axes.set(xlabel="x (m)", ylabel="y (m)", aspect="equal")


# A body on a line, at rest at first, changes its velocity v by the action (m/s); φ = target v*; reward −(v − v*)².
# The same arithmetic as the point's, in one dimension.
velocity = point


def draw_velocity(axes, obs, phi):
    axes.plot(obs[:, 0], color="#0072B2", marker="o", markersize=3, label="velocity")
    axes.axhline(phi[0], color="#D55E00", linestyle="--", label="target")
    axes.set(xlabel="step", ylabel="velocity (m/s)")


CROSSING_UNIT = 50.0  # m: the crossing's positions in units near 1, as networks want them


def crossing(phi, noise, xp):
    """Vehicle 1 drives north, vehicle 2 east at speed φ = u (m/s), both toward one crossing; u is not observed.

    State: (Δx, Δy), vehicle 2's position less vehicle 1's, in units of 50 m; as each vehicle stays on its road, it is
    also (x₂, −y₁). Both start 35 to 45 m before the crossing, independently and uniformly. Action: vehicle 1's speed v
    in m/s, held for 0.1 s. Reward of a step: 1 − ((v − 10) / 10)² − 2 max(0, 1 − d / 15), with 10 m/s the optimal
    speed and 15 m the safe distance; a distance d below 3 m is a collision, which costs 10 and ends the episode.
    """
    dt, best_speed, safe_distance, collision_distance = 0.1, 10.0, 15.0, 3.0  # s, m/s, m, m
    other_speed = phi[..., 0] + 0 * noise[..., 0]
    start = constants(noise, (-1.0, 1.0), xp) * (35 + 10 * noise) / CROSSING_UNIT

    def step(state, action):
        speed = action[..., 0]
        state = state + xp.stack((other_speed, -speed), -1) * (dt / CROSSING_UNIT)
        distance = xp.sqrt((state**2).sum(-1)) * CROSSING_UNIT
        reward = 1 - (speed / best_speed - 1) ** 2 - 2 * (1 - distance / safe_distance).clip(0)
        collided = distance < collision_distance
        return state, xp.where(collided, reward - 10, reward), collided, collided

    return start, step


def draw_crossing(axes, obs, phi):
    x, y = obs[-1] * [CROSSING_UNIT, -CROSSING_UNIT]  # m
    axes.axhspan(-2, 2, color="0.9")
    axes.axvspan(-2, 2, color="0.9")
    axes.plot(0, y, "^", color="#0072B2", markersize=14, label="vehicle 1, the policy's")
    axes.plot(x, 0, ">", color="#D55E00", markersize=14, label=f"vehicle 2, {phi[0]:g} m/s")
    axes.set(xlim=(-50, 50), ylim=(-50, 50), xlabel="east (m)", ylabel="north (m)")


class Gymnasium:
    """Dynamics of a gymnasium environment whose attributes `names` are φ times `scale`; an instance for each
    trajectory.

    The attributes are set on the unwrapped environment before every reset: a constructor may refuse what the physics
    can do (LunarLander's asserts gravity < 12), and setting an attribute on a wrapper does nothing. Finished episodes
    are not stepped. Keeps its instances for the next rollout.
    """

    def __init__(self, env_id, names, scale=1.0, **options):
        self.env_id, self.names, self.scale, self.options = env_id, names, scale, options
        self.instances = {}  # by the trajectory's index in (B, K)

    @cached_property
    def spec(self):
        """Of instances without the wrapper that asks at every step whether there was a reset: 4% of a step."""
        spec = copy.deepcopy(gymnasium.make(self.env_id).spec)
        spec.order_enforce = False
        return spec

    def reset(self, i, phi, seed):
        """First observation (D,) of a new episode of trajectory i."""
        if i not in self.instances:
            self.instances[i] = gymnasium.make(self.spec, disable_env_checker=True, **self.options)
        for name, value in zip(self.names, phi, strict=True):
            setattr(self.instances[i].unwrapped, name, self.scale * value)
        return self.instances[i].reset(seed=seed)[0].ravel()

    def __call__(self, phi, noise, xp, own=slice(None)):
        """Env's dynamics; of the B·K trajectories it makes its `own` alone, the others count as ended."""
        shape = noise.shape[:2]
        phi = np.broadcast_to(phi.astype(float), (*shape, phi.shape[-1])).reshape(-1, phi.shape[-1]).tolist()
        seeds = [int(u * 2**24) for u in noise[..., 0].ravel().tolist()]
        running = list(range(len(seeds))[own])
        first = {i: self.reset(i, phi[i], seeds[i]) for i in running}
        obs = np.zeros((len(seeds), len(first[running[0]])), np.float32)
        rewards, terminated, ended = (
            np.zeros(len(seeds), np.float32),
            np.zeros(len(seeds), bool),
            np.ones(len(seeds), bool),
        )
        for i in running:
            obs[i], ended[i] = first[i], False

        def shaped(x):
            return x.reshape(*shape, *x.shape[1:]).copy()

        def step(state, action):
            action = action.reshape(len(seeds), *action.shape[2:])
            # Python numbers step faster; not a number comes from a run that fails alone, but Box2D would end them all.
            actions = action.tolist() if action.ndim == 1 else np.nan_to_num(action)
            rewards[:] = 0
            for i in tuple(running):
                observed, rewards[i], final, truncated, _ = self.instances[i].step(actions[i])
                obs[i] = observed.ravel()
                if final or truncated:
                    terminated[i], ended[i] = final, True
                    running.remove(i)
            return shaped(obs), shaped(rewards), shaped(terminated), shaped(ended)

        return shaped(obs), step

    def check(self, low, high):
        """Raises ValueError where an end of Φ makes the environment fail, or one seed and one sequence of actions give
        the same episode at both ends."""
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        for i, name in enumerate(self.names):
            episodes = []
            for value in (low[i], high[i]):
                try:
                    episodes.append(self.random_episode([*middle[:i], value, *middle[i + 1 :]]))
                except Exception as error:  # whatever it may raise at values that it was not written for
                    raise ValueError(
                        f"`bounds`: {self.env_id} fails at {name} = {value:g} ({first_line(error)}); give another range"
                    ) from error
            if episodes[0] == episodes[1] and low[i] < high[i]:
                raise ValueError(
                    f"{self.env_id}: {name} = {low[i]:g} and {high[i]:g} give the same episode, so it is no task "
                    "parameter; name an attribute that the environment reads at every step"
                )

    def random_episode(self, phi, steps=200):
        """What is seen and paid under random actions, always the same ones."""
        episode = [self.reset(0, phi, seed=0).tolist()]
        env = self.instances[0]
        env.action_space.seed(0)
        over = False
        while not over and len(episode) <= steps:
            obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            episode.append([*obs.ravel().tolist(), reward])
            over = terminated or truncated
        return episode


ENVS = {
    "cartpole": Env(
        phi_names=("gravity (m/s²)",), low=(5.0,), high=(15.0,), horizon=200, obs_dim=4, actions=2, reset_noise=4,
        dynamics=cartpole, draw="CartPole-v1", defaults={"threshold": 175.0, "epochs": 400},
    ),
    "lunarlander": Env(  # its attribute is the vertical component, −φ
        phi_names=("gravity (m/s²)",), low=(5.0,), high=(15.0,), horizon=400, obs_dim=8, actions=4, reset_noise=1,
        dynamics=Gymnasium("LunarLander-v3", ("gravity",), scale=-1.0), defaults={"threshold": 75.0},
    ),
    "crossing": Env(
        phi_names=("speed of vehicle 2 (m/s)",), low=(5.0,), high=(15.0,), horizon=60, obs_dim=2, reset_noise=2,
        actions=((0.0,), (15.0,)), dynamics=crossing, draw=draw_crossing,
        defaults={"alpha": 0.003, "beta": 0.0005, "delta": 0.0025, "baseline": "step", "threshold": 38.0, "epochs":
        400}, ), "point": Env( phi_names=("goal x (m)", "goal y (m)"), low=(-0.5, -0.5), high=(0.5, 0.5), horizon=20,
        obs_dim=2, reset_noise=2, actions=((-0.1, -0.1), (0.1, 0.1)), dynamics=point, draw=draw_point,
        defaults={"alpha": 0.03, "baseline": "step", "threshold": -2.0, "epochs": 200}, ), "velocity": Env(
        phi_names=("target velocity (m/s)",), low=(0.0,), high=(2.0,), horizon=20, obs_dim=1, reset_noise=1,
        actions=((-0.5,), (0.5,)), dynamics=velocity, draw=draw_velocity, defaults={ "alpha": 0.01, "beta": 0.0003,
        "delta": 0.0015, "baseline": "step", "threshold": -5.0, "epochs": 200, }, ), }  # fmt: skip


def make(name, names=None, bounds=None, horizon=None):
    """The task family `name`, one of ENVS or a gymnasium id, with φ, Φ and the horizon given.

    names: attributes of the gymnasium environment that are φ; bounds: [low, high] for each, one after the other.
    Raises ValueError, one line that names the argument in backquotes and the remedy.
    """
    if name in ENVS:
        if names is not None:
            raise ValueError(f"`names` {' '.join(names)}: {name} has its own φ; leave `names` out")
        env = ENVS[name]
    else:
        env = gymnasium_env(name, names, horizon)
    if bounds is not None:
        check_bounds("bounds", bounds, env.phi_names)
        env = replace(env, low=tuple(bounds[::2]), high=tuple(bounds[1::2]))
    elif not env.low:
        raise ValueError(f"`name` {name}: give the range of {', '.join(env.phi_names)}, e.g. `bounds` 5 15")
    if isinstance(env.dynamics, Gymnasium):
        env.dynamics.check(env.low, env.high)
    return env if horizon is None else replace(env, horizon=horizon)


def with_phi_observed(env):
    """The family with φ in its observations, now D + P numbers: an oracle, the best that adaptation could do."""
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
    """Raises ValueError where `bounds` is not LOW HIGH for each component of φ."""
    shown = f"`{argument}` {' '.join(f'{x:g}' for x in bounds)}"
    if len(bounds) != 2 * len(phi_names):
        raise ValueError(
            f"{shown}: expected LOW HIGH for each of {len(phi_names)} parameter(s): {', '.join(phi_names)}"
        )
    if not all(map(math.isfinite, bounds)) or any(a > b for a, b in zip(bounds[::2], bounds[1::2], strict=True)):
        raise ValueError(f"{shown}: expected finite numbers, LOW first and not above HIGH")


def first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


def hint(word, known, choices):
    """What to say about an unknown word: the nearest known one, or else the choices."""
    close = difflib.get_close_matches(word, known, 1, 0.7) or difflib.get_close_matches(word.lower(), known, 1, 0.7)
    return f"did you mean {close[0]}?" if close else f"choose from {choices}"


def gymnasium_env(env_id, names, horizon):
    """A task family from any gymnasium id with box observations and discrete or bounded box actions; Φ is to be set."""
    if env_id not in gymnasium.registry and ":" not in env_id:  # module:id imports the module first
        remedy = hint(env_id, [*ENVS, *gymnasium.registry], f"{', '.join(ENVS)}, or a gymnasium id")
        raise ValueError(f"`name` {env_id}: unknown environment; {remedy}")
    try:
        probe = gymnasium.make(env_id)
    except Exception as error:  # whatever a constructor may raise: it is shown
        raise ValueError(f"`name` {env_id}: gymnasium cannot make it: {first_line(error)}") from error
    numbers = [key for key, x in vars(probe.unwrapped).items() if isinstance(x, (int, float)) and key[0] != "_"]
    if not names:
        raise ValueError(f"`name` {env_id}: say which attribute is φ with `names`, one of: {', '.join(numbers)}")
    for name in names:
        if not isinstance(getattr(probe.unwrapped, name, None), Real):
            raise ValueError(f"`names` {name}: {env_id} has no such number; its numbers are: {', '.join(numbers)}")
    if len(set(names)) < len(names):
        raise ValueError(f"`names` {' '.join(names)}: duplicate attribute")
    horizon = horizon or probe.spec.max_episode_steps
    if horizon is None:
        raise ValueError(f"`name` {env_id}: its episodes have no end; give `horizon`, e.g. `horizon` 200")
    obs_dim, actions = check_spaces(env_id, probe.observation_space, probe.action_space)
    return Env(
        phi_names=tuple(names), low=(), high=(), horizon=horizon, obs_dim=obs_dim, actions=actions, reset_noise=1,
        dynamics=Gymnasium(env_id, tuple(names)),
    )  # fmt: skip


def check_spaces(env_id, observation, action):
    """(D, actions as in Env) of gymnasium's spaces. Raises ValueError where they are of other kinds."""
    spaces = gymnasium.spaces
    if not isinstance(observation, spaces.Box):
        raise ValueError(f"`name` {env_id}: observations are {observation}; expected a Box")
    if isinstance(action, spaces.Discrete) and action.start == 0:
        return int(np.prod(observation.shape)), int(action.n)
    if isinstance(action, spaces.Box) and action.is_bounded() and action.low.ndim == 1:
        return int(np.prod(observation.shape)), (tuple(action.low.tolist()), tuple(action.high.tolist()))
    raise ValueError(f"`name` {env_id}: actions are {action}; expected Discrete from 0, or a bounded Box vector")


# --- tasks ---


# The distribution ρ of a component of φ within its range, as a function of u ~ U[0, 1), and its mean.
TASK_DISTS = {
    "uniform": (lambda u: u, 0.5),
    "bimodal": (lambda u: torch.where(u < 0.5, 0.4 * u, 0.6 + 0.4 * u), 0.5),  # the lowest or the highest fifth
    "skewed": (lambda u: u**3, 0.25),  # most near the low end
}


def sample_tasks(env, generators, num_tasks):
    """M tasks for each run, φ ~ ρ: (S, M, P)."""
    low, high = torch.tensor(env.low), torch.tensor(env.high)
    draws = torch.stack([torch.rand(num_tasks, len(env.low), generator=g) for g in generators])
    return low + (high - low) * TASK_DISTS[env.task_dist][0](draws)


MEDIUM_TASKS = ("mean", "sampled", "median", "random", "pooled")


def medium_task(env, medium, phi, generators):
    """φ_med (S, 1, P). medium: mean of ρ (Eq. 3), sampled: mean of the tasks `phi` (S, M, P) (Eq. 4), median: their
    geometric median, random: a task drawn anew (the control: same cost, no direction), or the P numbers of a φ.
    pooled: `phi` itself (S, M, P), whose trajectories are then pooled."""
    if medium == "pooled":
        return phi
    if medium == "mean":
        medium = mean_task(env)
    elif medium == "sampled":
        return phi.mean(1, keepdim=True)
    elif medium == "median":
        return geometric_median(phi)
    elif medium == "random":
        return sample_tasks(env, generators, 1)
    return torch.tensor(medium).expand(len(phi), 1, -1)


def mean_task(env):
    """The mean of ρ (Eq. 3): a list of P numbers."""
    mean = TASK_DISTS[env.task_dist][1]
    return [low + (high - low) * mean for low, high in zip(env.low, env.high, strict=True)]


def geometric_median(points, iterations=100):
    """The point (S, 1, P) with the least sum of distances to `points` (S, M, P), by Weiszfeld's iteration."""
    median = points.mean(1, keepdim=True)
    for _ in range(iterations):
        weights = 1 / ((points - median).norm(dim=-1, keepdim=True) + 1e-9)
        median = (weights * points).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    return median


def held_out_tasks(env, bounds=None):
    """A fixed grid inside Φ, or inside `bounds` [low, high] for each component of φ: (G, P).

    The midpoints of 10 equal cells of one parameter, of 6 × 6 of two, of 4 each of more. An even number of cells keeps
    the mean task, on which directed learners train, off the grid; where ρ is skewed and it is on it, two cells more.
    """
    low, high = (env.low, env.high) if bounds is None else (bounds[::2], bounds[1::2])
    count = {1: 10, 2: 6}.get(len(low), 4)
    axes = [midpoints(*ends, count) for ends in zip(low, high, strict=True)]
    if all(np.isclose(axis, mean).any() for axis, mean in zip(axes, mean_task(env), strict=True)):
        axes = [midpoints(*ends, count + 2) for ends in zip(low, high, strict=True)]
    return torch.tensor(list(itertools.product(*axes)), dtype=torch.get_default_dtype())


def midpoints(low, high, count):
    return low + (high - low) * (np.arange(count) + 0.5) / count


# --- rollouts ---


def draw_noise(env, generators, num_tasks, num_trajectories):
    """All randomness of one rollout: reset (S, M, K, R) uniform, action (S, M, K, H, A) Gumbel or normal."""
    shape = (num_tasks, num_trajectories)
    reset, action = [], []
    for g in generators:
        reset.append(torch.rand(*shape, env.reset_noise, generator=g))
        draws = torch.empty(*shape, env.horizon, env.action_dim)
        action.append(draws.exponential_(generator=g) if isinstance(env.actions, int) else draws.normal_(generator=g))
    action = torch.stack(action)
    return {"reset": torch.stack(reset), "action": action.log().neg() if isinstance(env.actions, int) else action}


def in_box(action, low, high):
    """The policy's action, clipped to [−1, 1], within the box (low, high)."""
    return low + (action.clip(-1, 1) + 1) / 2 * (high - low)


def from_box(action, low, high):
    """The reverse of `in_box`."""
    return (action - low) / (high - low) * 2 - 1


@np.errstate(over="ignore", invalid="ignore")  # a run that diverges fails, which is said once
def rollout(env, act, phi, noise, xp=np):
    """K trajectories of every task of every run at once, a pure function of (act, phi, noise).

    act: (obs (B, K, D), noise (B, K, A)) -> actions; phi: (S, M, P); noise: from `draw_noise`; all arrays of xp: numpy,
    or torch on a GPU. Returns the trajectories that policies.py describes, H steps long, with zeros where an
    episode had ended before. numpy stops when every episode has ended; a GPU, which would stall if asked, never does.
    """
    lead = noise["reset"].shape[:3]  # (S, M, K)

    def flat(x):
        return x.reshape(-1, *x.shape[2:])  # (B, ...)

    dynamics = partial(observed_dynamics, env) if env.phi_observed else env.dynamics
    state, step = dynamics(flat(phi)[:, None], flat(noise["reset"]), xp)
    box = [] if isinstance(env.actions, int) else [constants(state, bound, xp) for bound in env.actions]
    over = xp.zeros_like(state[..., 0], dtype=bool)
    steps, action_noise = [], flat(noise["action"])  # a (state, action, reward, terminated, over before) for each t
    for t in range(env.horizon):
        action = act(state, action_noise[:, :, t])
        next_state, reward, terminated, ended = step(state, in_box(action, *box) if box else action)
        steps.append((state, action, reward, terminated, over))
        state, over = next_state, over | ended
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
