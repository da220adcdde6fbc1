"""Task families: an environment whose parameter φ differs from task to task, its batched dynamics, and rollouts.

Axes: S runs, M tasks, K trajectories, H time steps, D features; B = S·M. Every random number of a rollout is drawn up
front (`draw_noise`), so a rollout is a pure function of the policy's parameters, φ and noise.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

# --- randomness: one generator per run, set anew for every purpose ---


def generators(seeds, *stream):
    """One torch.Generator per run; `stream` (integers, e.g. purpose and epoch) names independent number streams.

    A run's numbers depend on its seed and the stream alone: not on the runs beside it, nor on the algorithm, nor on
    what was drawn before. So twins share their tasks and noise, and resuming needs no generator state.
    """
    states = [np.random.SeedSequence([seed, *stream]).generate_state(1)[0] for seed in seeds]
    return [torch.Generator().manual_seed(int(state)) for state in states]


# --- the task families ---


@dataclass(frozen=True)
class Env:
    """One task family. States are tensors (B, K, D) and are observed whole; φ is not observed.

    reset: noise (B, K, D) uniform in [0, 1) -> state
    dynamics: φ (B, 1, P) -> step: (state, action) -> (state, reward (B, K), terminated (B, K)), where actions are
        (B, K) in 0 .. actions−1, or (B, K, A) within the box `actions` = (low, high)
    """

    phi: tuple[str, ...]  # names and units of φ's P components
    low: tuple[float, ...]
    high: tuple[float, ...]
    horizon: int  # H
    obs_dim: int  # D
    actions: int | tuple[tuple[float, ...], tuple[float, ...]]
    reset: Callable
    dynamics: Callable
    threshold: float  # mean return from which a run counts as converged
    epochs: int
    defaults: dict = field(default_factory=dict)  # where those of run.py do not fit

    @property
    def action_dim(self):
        return self.actions if isinstance(self.actions, int) else len(self.actions[0])


# Each takes φ (B, 1, P) and returns step(state, action) -> (state, reward, terminated) for those tasks.


def cartpole(phi):
    """gymnasium's CartPole-v1, equations and constants, at gravity φ (m/s²).

    State: position (m), velocity (m/s), angle (rad), angular velocity (rad/s). Action 0 pushes left, 1 right.
    """
    force, tau, gravity = 10.0, 0.02, phi[..., 0]  # N, s
    pole_mass, total_mass, half_length = 0.1, 1.1, 0.5  # kg, kg, m
    pole_moment = pole_mass * half_length
    # Constants as tensors, and fused operations: with Python numbers a step of so small a batch takes twice as long.
    push = phi.new_tensor([-force / total_mass, force / total_mass])
    inertia = phi.new_tensor(half_length * 4 / 3)
    limits = phi.new_tensor([2.4, math.inf, 12 * 2 * math.pi / 360, math.inf])
    reward = phi.new_tensor(1.0)

    def step(state, action):
        _, x_dot, angle, angle_dot = state.unbind(-1)
        cos, sin = angle.cos(), angle.sin()
        # temp = (±force + pole_moment ω² sin) / total_mass, as gymnasium calls it
        temp = torch.addcmul(push.take(action), angle_dot.square(), sin, value=pole_moment / total_mass)
        # angle_acc = (gravity sin − cos temp) / (half_length (4/3 − pole_mass cos² / total_mass))
        angle_acc = torch.addcmul(gravity * sin, cos, temp, value=-1)
        angle_acc = angle_acc / inertia.sub(cos.square(), alpha=pole_moment / total_mass)
        # x_acc = temp − pole_moment angle_acc cos / total_mass
        x_acc = torch.addcmul(temp, angle_acc, cos, value=-pole_moment / total_mass)
        state = state.add(torch.stack((x_dot, x_acc, angle_dot, angle_acc), -1), alpha=tau)
        return state, reward.expand_as(x_dot), (state.abs() > limits).any(-1)

    return step


def point(phi):
    """A point in the plane, at the origin at first, moves by the action (m); φ = goal (m); reward −|s − goal|²."""

    def step(state, action):
        state = state + action
        return state, -(state - phi).square().sum(-1), state.new_zeros(state.shape[:-1], dtype=torch.bool)

    return step


# A body on a line, at rest at first, changes its velocity v by the action (m/s); φ = target v*; reward −(v − v*)².
# The same arithmetic as the point's, in one dimension.
velocity = point


ENVS = {
    "cartpole": Env(
        phi=("gravity (m/s²)",), low=(5.0,), high=(15.0,), horizon=200, obs_dim=4, actions=2,
        reset=lambda noise: noise * 0.1 - 0.05, dynamics=cartpole, threshold=175.0, epochs=400,
    ),
    "point": Env(
        phi=("goal x (m)", "goal y (m)"), low=(-0.5, -0.5), high=(0.5, 0.5), horizon=20, obs_dim=2,
        actions=((-0.1, -0.1), (0.1, 0.1)), reset=torch.zeros_like, dynamics=point, threshold=-2.0, epochs=200,
        defaults={"alpha": 0.03, "beta": 0.0003, "delta": 0.0015, "baseline": "step"},
    ),
    "velocity": Env(
        phi=("target velocity (m/s)",), low=(0.0,), high=(2.0,), horizon=20, obs_dim=1,
        actions=((-0.2,), (0.2,)), reset=torch.zeros_like, dynamics=velocity, threshold=-5.0, epochs=200,
        defaults={"alpha": 0.01, "beta": 0.0003, "delta": 0.0015, "baseline": "step"},
    ),
}  # fmt: skip


def configure(env, horizon=None, bounds=None):
    """`env` with another horizon, or another Φ: bounds [low, high] for each component of φ, one after the other.

    Raises ValueError where the bounds are not one finite pair low <= high for each component.
    """
    if bounds is not None:
        if len(bounds) != 2 * len(env.low):
            raise ValueError(f"expected LOW HIGH for each of {len(env.low)} parameter(s): {', '.join(env.phi)}")
        low, high = tuple(bounds[::2]), tuple(bounds[1::2])
        if not all(math.isfinite(x) for x in bounds) or any(a > b for a, b in zip(low, high, strict=True)):
            raise ValueError("expected finite numbers, LOW first and not above HIGH")
        env = replace(env, low=low, high=high)
    return env if horizon is None else replace(env, horizon=horizon)


# --- tasks ---


def sample_tasks(env, generators, num_tasks):
    """M tasks for each run, φ ~ U(Φ): (S, M, P)."""
    low, high = torch.tensor(env.low), torch.tensor(env.high)
    draws = torch.stack([torch.rand(num_tasks, len(env.low), generator=g) for g in generators])
    return low + (high - low) * draws


def medium_task(env, medium, phi, generators):
    """φ_med (S, 1, P). medium: mean of Φ (Eq. 3), sampled: mean of the tasks `phi` (S, M, P) (Eq. 4), random: a task
    drawn anew (the control: same cost, no direction), or the P numbers of a φ."""
    if medium == "mean":
        medium = [(low + high) / 2 for low, high in zip(env.low, env.high, strict=True)]
    elif medium == "sampled":
        return phi.mean(1, keepdim=True)
    elif medium == "random":
        return sample_tasks(env, generators, 1)
    return torch.tensor(medium).expand(len(phi), 1, -1)


def held_out_tasks(env):
    """A fixed grid over Φ, its ends included: (G, P), 11 values of one parameter, 5 of each of several."""
    count = 11 if len(env.low) == 1 else 5
    axes = [np.linspace(low, high, count) for low, high in zip(env.low, env.high, strict=True)]
    return torch.tensor(list(itertools.product(*axes)), dtype=torch.get_default_dtype())


# --- rollouts ---


def draw_noise(env, generators, num_tasks, num_trajectories):
    """All randomness of one rollout: reset (S, M, K, D) uniform, action (S, M, K, H, A) Gumbel or normal."""
    shape = (num_tasks, num_trajectories)
    reset, action = [], []
    for g in generators:
        reset.append(torch.rand(*shape, env.obs_dim, generator=g))
        draws = torch.empty(*shape, env.horizon, env.action_dim)
        action.append(draws.exponential_(generator=g) if isinstance(env.actions, int) else draws.normal_(generator=g))
    action = torch.stack(action)
    return {"reset": torch.stack(reset), "action": action.log().neg() if isinstance(env.actions, int) else action}


@torch.no_grad()
def rollout(env, act, phi, noise):
    """K trajectories of every task of every run at once, a pure function of (act, phi, noise).

    act: (obs (B, K, D), noise (B, K, A)) -> actions; phi: (S, M, P); noise: from `draw_noise`.
    Returns the batch that policies.py describes. It stops when every episode has ended, H steps at the latest, and
    holds zeros where an episode had ended before.
    """
    lead = noise["reset"].shape[:3]  # (S, M, K)
    phi = phi.flatten(0, 1).unsqueeze(1)  # (B, 1, P)
    step = env.dynamics(phi)
    state = env.reset(noise["reset"].flatten(0, 1))
    alive = torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
    if not isinstance(env.actions, int):
        low, high = (torch.tensor(bound, device=state.device, dtype=state.dtype) for bound in env.actions)
    steps = []
    for noise_t in noise["action"].flatten(0, 1).unbind(2):  # (B, K, A)
        action = act(state, noise_t)
        bounded = action if isinstance(env.actions, int) else low + (action.clamp(-1, 1) + 1) / 2 * (high - low)
        next_state, reward, terminated = step(state, bounded)
        steps.append((state, action, reward, alive))
        state, alive = next_state, alive & ~terminated
        if state.is_cpu and not alive.any():  # on a GPU, asking would stall it at every step
            break
    obs, actions, rewards, mask = (torch.stack(x, 2).unflatten(0, lead[:2]) for x in zip(*steps, strict=True))
    if not state.is_cpu:
        length = int(mask.sum(-1).max())
        obs, actions, rewards, mask = (x[:, :, :, :length] for x in (obs, actions, rewards, mask))
    return {
        "obs": obs.masked_fill(~mask.unsqueeze(-1), 0.0),
        "actions": actions,
        "rewards": rewards.masked_fill(~mask, 0.0),
        "mask": mask,
        "last_obs": state.masked_fill(~alive.unsqueeze(-1), 0.0).unflatten(0, lead[:2]),
        "terminated": ~alive.unflatten(0, lead[:2]),
    }
