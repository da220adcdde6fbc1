"""Use a finished run: load it, adapt its policy to a new task or to episodes of your own, and act.

    policy = load("runs/cartpole-pg/directed-fomaml/delta0.005/seed1").adapt(phi=[12.0])
    action = policy.act(observation)

Untrusted runs are safe to open: a checkpoint is data, and an environment `module:id`, whose module
is code, is made only if the caller names it.
"""

import itertools
import math
from argparse import ArgumentTypeError
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import envs
import maml
import policies
from envs import WATCH
from harness import checkpoints, gyms
from harness.checkpoints import RunError
from harness.errors import first_line
from harness.plan import before_flags
from harness.settings import ALL_SETTINGS, learner_of
from harness.text import setting_text

MOST_NUMBERS = 2**28  # of the episodes that one inner step samples


def load(folder, trusted_env=None):
    """The `Policy` of a run's folder as of its last checkpoint, not adapted to any task.

    trusted_env: must be the run's environment where that is `module:id`, since making it runs the
        module's code.
    A run with --oracle observes φ: give `act` D + P numbers, with envs.scaled_phi(policy.env, φ) at
    the end. Raises RunError, one line, for a folder without a checkpoint and a damaged one.
    """
    path = Path(folder) / checkpoints.CHECKPOINT
    state = checkpoints.load(path)
    if state is None:
        raise RunError(f"{folder}: there is no {checkpoints.CHECKPOINT}; name the folder of one run", 2)
    settings = state["settings"]
    name = settings.get("env")
    if isinstance(name, str) and ":" in name and name != trusted_env:
        problem = f"{path}: runs the code of module {name!r}; if you trust it"
        raise RunError(f"{problem}, give --env {name!r} too, or in Python trusted_env={name!r}", 2)
    try:
        settings = before_flags(settings, gyms.FAMILIES.get(name)) | settings
        check_settings(settings)
        env = gyms.family_of(settings)
        numbers = settings["trajectories"] * env.horizon * (env.obs_dim + env.action_dim)
        if numbers > MOST_NUMBERS:
            raise ValueError(f"episodes of {numbers} numbers")
        alpha = state["alpha"] or float(settings["eval_alpha"] or settings["alpha"])
        policy = Policy(env, settings, state["theta"], alpha)
        obs = np.zeros((2, env.obs_dim))
        policy.adapt(episodes=[[(obs, [policy.act(obs[0])], [0.0])] * 2])  # a θ, α or loss of another kind fails here
    except Exception as error:  # whatever a run from a stranger may lead to
        raise RunError(f"{path}: its settings or parameters are not those of a run ({first_line(error)})") from error
    return policy


def check_settings(settings):
    """Raises ValueError where a setting is not what its flag takes."""
    for setting in (x for x in ALL_SETTINGS.values() if x.identity):
        value = settings.get(setting.name)
        for x in value if isinstance(value, list) and setting.nargs else [value]:
            if not takes(setting, x):
                raise ValueError(f"{setting.name} is {x!r}")


def takes(setting, x):
    """Whether a setting may have this value; None where it does not apply, or has no default."""
    if x is None:
        return bool(setting.needs) or setting.default is None
    if setting.type is bool:
        return isinstance(x, bool)
    try:
        return x in setting.words if setting.words else setting.type(str(x)) == x
    except ArgumentTypeError:
        return False


@dataclass
class Policy:
    """π_θ of one run. theta: parameters (1, 1, ...); alpha: a number, or learned like theta."""

    env: envs.Env
    settings: dict
    theta: dict
    alpha: dict | float
    rng: np.random.Generator = field(default_factory=np.random.default_rng)  # of stochastic actions

    @property
    def inner_steps(self):
        """The run's, and 1 after joint training, which took none."""
        return self.settings["inner_steps"] or 1

    @property
    def head(self):
        return policies.make_head(self.env.actions)

    def act(self, observation, greedy=False):
        """An action that gymnasium's env.step takes, for one observation of D numbers in any shape.

        Drawn from the policy; `greedy`: its mode. Box actions are scaled from the policy's [−1, 1]
        to the box. Raises ValueError for another observation.
        """
        obs = self.as_numbers(observation)
        draw = self.rng.gumbel if isinstance(self.env.actions, int) else self.rng.normal
        noise = draw(size=(1, 1, self.env.action_dim)).astype(np.float32) * (not greedy)
        actions = policies.actor(as_numpy(self.theta), self.head)(obs, noise)[0]  # one of them
        if not isinstance(self.env.actions, int):
            actions = envs.in_box(actions, *self.box)
        (action,) = self.env.dynamics.taken(actions) if self.env.is_gymnasium else actions
        return int(action) if isinstance(self.env.actions, int) else action

    def as_numbers(self, observation):
        """One observation as an array (1, 1, D)."""
        try:
            obs = np.asarray(observation, np.float32).reshape(1, 1, self.env.obs_dim)
        except (TypeError, ValueError) as error:
            expected = f"{self.env.obs_dim} numbers, a Dict or Tuple as gymnasium.spaces.flatten gives it"
            raise ValueError(f"observation: expected {expected} ({first_line(error)})") from error
        if not np.isfinite(obs).all():
            raise ValueError(f"observation {obs.ravel()}: expected finite numbers")
        return obs

    @property
    def box(self):
        return [np.array(bound, np.float32) for bound in self.env.actions]

    def adapt(self, phi=None, episodes=None, steps=None, seed=0):
        """The policy after the run's inner steps (or `steps`) on a task: θ' = θ − α ∇L(θ).

        Each is on fresh episodes. iMAML's are on its proximal objective; steps beyond those for
        which MAML++ learned an α take the last one's.

        phi: the P numbers of a task of the run's own environment, sampled here with K trajectories
            a step.
        episodes: data of your own instead: a list for each step of (observations, actions,
            rewards), one for each episode; T actions as the environment took them, and T
            observations, or T + 1 where it did not terminate.
        Raises ValueError for a phi or episodes of another shape, or with numbers that are not finite.
        """
        if (phi is None) == (episodes is None):
            raise ValueError("adapt: give either phi or episodes")
        theta = {name: p.detach().requires_grad_() for name, p in self.theta.items()}
        if episodes is None:
            phi, stream, calls = self.check_phi(phi), envs.stream([seed], WATCH), itertools.count(1)
            steps = self.inner_steps if steps is None else steps

            def objective(params):
                return self.loss(params, self.sample(phi, stream, calls, params))
        else:
            batches = iter([self.trajectories(part) for part in episodes])
            steps = len(episodes)
            head = self.head if isinstance(self.env.actions, int) else AsTaken(self.env.action_dim)

            def objective(params):
                return self.loss(params, next(batches), head)

        if learner_of(self.settings["algo"]).proximal:
            # Steps of another α are pulled back by the same share α λ, as in run.py's evaluation.
            lambda_ = self.settings["lambda_"] * self.settings["alpha"] / self.alpha
            objective = maml.proximal(objective, theta, lambda_)
        adapted = maml.adapt(theta, objective, self.alpha, steps, second_order=False)
        return replace(self, theta={name: p.detach() for name, p in adapted.items()})

    def check_phi(self, phi):
        """φ as an array (1, 1, P)."""
        given = np.ravel(phi).tolist()  # also a single number
        try:
            with np.errstate(over="ignore"):
                numbers = np.array([[given]], np.float32)
        except (TypeError, ValueError):  # of a word or a dict
            numbers = np.array([np.nan])
        if len(given) != len(self.env.phi_names) or not np.isfinite(numbers).all():
            expected = f"expected {len(self.env.phi_names)} number(s): {', '.join(self.env.phi_names)}"
            raise envs.ArgumentError("phi", setting_text(given), expected)
        return numbers

    def sample(self, phi, stream, calls, params, num_trajectories=None):
        """K trajectories (1, 1, K, ...) of the task φ (1, 1, P) under params, of the next call."""
        count = num_trajectories or self.settings["trajectories"]
        noise = envs.draw_noise(self.env, stream, range(1), count, next(calls))
        episodes = envs.rollout(self.env, policies.actor(as_numpy(params), self.head), phi, noise)
        return {key: torch.from_numpy(x) for key, x in episodes.items()}

    def loss(self, params, trajectories, head=None):
        options = {key: self.settings[key] for key in policies.OPTIONS}
        return policies.loss(params, trajectories, head=head or self.head, **options)

    def trajectories(self, episodes):
        """[(observations, actions, rewards), ..] -> the dict of policies.py, S = M = 1."""
        arrays = []
        for k, episode in enumerate(episodes):
            try:
                arrays.append(self.as_arrays(episode))
            except ValueError as error:
                raise ValueError(f"episode {k}: {error}") from error
        if not arrays:
            raise ValueError("adapt: a step without episodes; leave it out")
        lengths = [len(rewards) for _, _, rewards in arrays]
        num_episodes, horizon = len(episodes), max(lengths)
        lead, obs_dim = (1, 1, num_episodes, horizon), self.env.obs_dim
        discrete = isinstance(self.env.actions, int)
        actions = torch.zeros(lead, dtype=torch.long) if discrete else torch.zeros(*lead, self.env.action_dim)
        parts = {
            "obs": torch.zeros(*lead, obs_dim),
            "rewards": torch.zeros(lead),
            "actions": actions,
            "mask": torch.arange(horizon) < torch.tensor(lengths).view(1, 1, -1, 1),
            "last_obs": torch.zeros(1, 1, num_episodes, obs_dim),
            "terminated": torch.ones(1, 1, num_episodes, dtype=torch.bool),
        }
        for k, (obs, actions, rewards) in enumerate(arrays):
            count = len(rewards)
            parts["obs"][0, 0, k, :count] = torch.as_tensor(obs[:count])
            parts["rewards"][0, 0, k, :count] = torch.as_tensor(rewards)
            parts["actions"][0, 0, k, :count] = torch.as_tensor(actions)
            if len(obs) > count:
                parts["last_obs"][0, 0, k] = torch.as_tensor(obs[count])
                parts["terminated"][0, 0, k] = False
        return parts

    def as_arrays(self, episode):
        """An episode as `adapt` takes it -> observations (T or T + 1, D), the policy's actions (T,)
        or (T, A), rewards (T,). Raises ValueError for another shape, and for what no policy does or
        sees."""
        discrete, obs_dim = isinstance(self.env.actions, int), self.env.obs_dim
        try:
            obs, taken, rewards = map(as_rows, episode)
            obs, rewards = obs.astype(np.float32), rewards.astype(np.float32)
            finite = all(np.isfinite(x).all() for x in (obs, taken, rewards))
        except (TypeError, ValueError) as error:
            what = "numbers, as (observations, actions, rewards)"
            raise ValueError(f"expected {what} ({first_line(error)})") from error
        size, count = 1 if discrete else self.env.action_dim, len(rewards)
        shapes = obs.shape[1], taken.shape, rewards.shape
        good = count > 0 and shapes == (obs_dim, (count, size), (count, 1))
        if not (good and len(obs) in (count, count + 1)):
            got = f"{len(obs)} observations of {obs.shape[1]} numbers, {len(taken)} actions"
            got += f" of {taken.shape[1]}, {count} rewards of {rewards.shape[1]}"
            expected = f"T or T + 1 observations of {obs_dim}, T actions of {size}, T rewards of 1"
            raise ValueError(f"{got}; expected {expected}, T > 0")
        if not finite:
            raise ValueError("a number is not finite")
        if not discrete:
            return obs, self.from_box(taken), rewards[:, 0]
        choices = range(self.first_action, self.first_action + self.env.actions)
        if not np.isin(taken, choices).all():
            raise ValueError(f"an action is none of {', '.join(map(str, choices))}")
        return obs, taken[:, 0] - self.first_action, rewards[:, 0]

    @property
    def first_action(self):
        return self.env.dynamics.first_action if self.env.is_gymnasium else 0

    def from_box(self, taken):
        """Actions of the environment as the policy's, in [−1, 1]; at an end of the box ±1 exactly."""
        low, high = self.box
        actions = envs.from_box(taken, low, high)
        rounding = 1e-6 * (1 + np.maximum(abs(low), abs(high)) / (high - low))
        at_end = abs(actions) > 1 - rounding
        return np.where(at_end, np.sign(actions), actions)


class AsTaken(policies.Gaussian):
    """Scores the actions that an environment took, which clips what is drawn beyond its box."""

    log_prob = policies.Gaussian.censored_log_prob


def as_numpy(tensors):
    return {key: x.detach().numpy() for key, x in tensors.items()}


def as_rows(x):
    """Numbers (T, ...) as an array (T, N)."""
    x = np.asarray(x)
    return x.reshape(len(x), math.prod(x.shape[1:]))
