"""Use a finished run: load it, adapt its policy to a new task or to episodes of your own, act, and watch it.

    policy = load("runs/cartpole-pg/directed-fomaml/delta0.005/seed1").adapt(phi=[12.0])
    action = policy.act(observation)

Untrusted runs are safe to open: a checkpoint is data, and an environment `module:id`, whose module is code, is made
only if the caller names it.
"""

import io
import itertools
import os
import sys
import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import checkpoints
import envs
import maml
import policies
from checkpoints import RunError
from envs import WATCH
from harness.settings import before_flags, learner_of


def load(folder, trusted_env=None):
    """The `Policy` of a run's folder as of its last checkpoint, not adapted to any task.

    trusted_env: must be the run's environment where that is `module:id`, since making it runs the module's code.
    A run with --oracle observes φ: give `act` D + P numbers, with envs.scaled_phi(policy.env, φ) at the end.
    Raises RunError, one line, for a folder without a checkpoint and for one that is damaged.
    """
    path = Path(folder) / checkpoints.CHECKPOINT
    state = checkpoints.load(path)
    if state is None:
        raise RunError(f"{folder}: there is no {checkpoints.CHECKPOINT}; name the folder of one run", 2)
    settings = state["settings"]
    name = settings.get("env")
    if isinstance(name, str) and ":" in name and name != trusted_env:
        raise RunError(f"{path}: runs the code of module {name}; if you trust it, give --env {name} too", 2)
    try:
        settings = before_flags(settings, envs.ENVS.get(name)) | settings
        for key, least in (("horizon", 1), ("trajectories", 1), ("inner_steps", 0), ("seed", 0)):
            if type(settings[key]) is not int or settings[key] < least:
                raise ValueError(f"{key} is {settings[key]!r}")
        values = settings.get("values")
        env = envs.make(name, settings["param"], None if values else settings["range"], settings["horizon"], values)
        env = envs.with_phi_observed(env) if settings["oracle"] else env
        alpha = state["alpha"] or float(settings["eval_alpha"] or settings["alpha"])
        policy = Policy(env, settings, state["theta"], alpha)
        obs = np.zeros((2, env.obs_dim))
        policy.adapt(episodes=[[(obs, [policy.act(obs[0])], [0.0])] * 2])  # a θ, α or loss of another kind fails here
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise RunError(
            f"{path}: its settings or parameters are not those of a run ({envs.first_line(error)})"
        ) from error
    return policy


@dataclass
class Policy:
    """π_θ of one run. theta: parameters (1, 1, ...); alpha: inner step size, a number or learned like theta."""

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
        """An action that gymnasium's env.step takes, for one observation of any shape that has D numbers.

        Drawn from the policy; `greedy`: its mode. Box actions are scaled from the policy's [−1, 1] to the box.
        """
        obs = np.asarray(observation, np.float32).reshape(1, 1, self.env.obs_dim)
        draw = self.rng.gumbel if isinstance(self.env.actions, int) else self.rng.normal
        noise = draw(size=(1, 1, self.env.action_dim)).astype(np.float32) * (not greedy)
        (action,) = policies.actor(as_numpy(self.theta), self.head)(obs, noise)[0]
        return int(action) if isinstance(self.env.actions, int) else envs.in_box(action, *self.box)

    @property
    def box(self):
        return [np.array(bound, np.float32) for bound in self.env.actions]

    def adapt(self, phi=None, episodes=None, steps=None, seed=0):
        """The policy after the run's inner steps (or `steps`) on a task: θ' = θ − α ∇L(θ), each on fresh episodes.

        iMAML's are on its proximal objective; steps beyond those for which MAML++ learned an α take the last one's.

        phi: the P numbers of a task of the run's own environment, sampled here with K trajectories a step.
        episodes: data of your own instead: a list for each step of (observations, actions, rewards), one for each
            episode; T actions as the environment took them, and T observations, or T + 1 where it did not terminate.
        Raises ValueError for a phi or episodes of another shape.
        """
        if (phi is None) == (episodes is None):
            raise ValueError("adapt: give either phi or episodes")
        if episodes is None:
            draw = partial(self.sample, self.check_phi(phi), envs.stream([seed], WATCH), itertools.count(1))
            steps = self.inner_steps if steps is None else steps
        else:
            parts = iter([self.trajectories(part) for part in episodes])
            draw = lambda params: next(parts)  # noqa: E731
            steps = len(episodes)
        theta = {name: p.detach().requires_grad_() for name, p in self.theta.items()}
        objective = lambda params: self.loss(params, draw(params))  # noqa: E731
        if learner_of(self.settings["algo"]).proximal:
            lambda_ = self.settings["lambda_"] * self.settings["alpha"] / self.alpha  # as run.py's evaluation
            objective = maml.proximal(objective, theta, lambda_)
        adapted = maml.adapt(theta, objective, self.alpha, steps, second_order=False)
        return replace(self, theta={name: p.detach() for name, p in adapted.items()})

    def check_phi(self, phi):
        if len(phi) != len(self.env.phi_names):
            shown = " ".join(f"{x:g}" for x in phi)
            expected = f"{len(self.env.phi_names)} number(s): {', '.join(self.env.phi_names)}"
            raise ValueError(f"phi {shown}: expected {expected}")
        return np.array([[phi]], np.float32)

    def sample(self, phi, stream, calls, params, num_trajectories=None):
        """K trajectories (1, 1, K, ...) of the task φ (1, 1, P) under params; the random numbers of the next call."""
        count = num_trajectories or self.settings["trajectories"]
        noise = envs.draw_noise(self.env, stream, range(1), count, next(calls))
        trajectories = envs.rollout(self.env, policies.actor(as_numpy(params), self.head), phi, noise)
        return {key: torch.from_numpy(x) for key, x in trajectories.items()}

    def loss(self, params, trajectories):
        options = {key: self.settings[key] for key in policies.OPTIONS}
        return policies.LOSSES[self.settings["rl"]](params, trajectories, head=self.head, **options)

    def trajectories(self, episodes):
        """[(observations, actions, rewards), ..] -> the dict that policies.py describes, S = M = 1."""
        lengths = [len(rewards) for _, _, rewards in episodes]
        discrete = isinstance(self.env.actions, int)
        lead = (1, 1, len(episodes), max(lengths))
        parts = {
            "obs": torch.zeros(*lead, self.env.obs_dim), "rewards": torch.zeros(lead),
            "actions": torch.zeros(lead, dtype=torch.long) if discrete else torch.zeros(*lead, self.env.action_dim),
            "mask": torch.arange(max(lengths)) < torch.tensor(lengths).view(1, 1, -1, 1),
            "last_obs": torch.zeros(1, 1, len(episodes), self.env.obs_dim),
            "terminated": torch.ones(1, 1, len(episodes), dtype=torch.bool),
        }  # fmt: skip
        for k, (observations, actions, rewards) in enumerate(episodes):
            count = len(rewards)
            obs = torch.as_tensor(np.asarray(observations, np.float32)).reshape(len(observations), -1)
            if len(actions) != count or len(obs) not in (count, count + 1) or obs.shape[1] != self.env.obs_dim:
                raise ValueError(
                    f"episode {k}: {len(obs)} observations of {obs.shape[1]} numbers, {len(actions)} actions, {count} "
                    f"rewards; expected T or T + 1 observations of {self.env.obs_dim}, T actions and T rewards"
                )
            parts["obs"][0, 0, k, :count] = obs[:count]
            parts["rewards"][0, 0, k, :count] = torch.as_tensor(np.asarray(rewards, np.float32))
            taken = torch.as_tensor(np.asarray(actions))
            parts["actions"][0, 0, k, :count] = (
                taken if discrete else torch.as_tensor(envs.from_box(taken.numpy(), *self.box))
            )
            if len(obs) > count:
                parts["last_obs"][0, 0, k], parts["terminated"][0, 0, k] = obs[count], False
        return parts


def as_numpy(tensors):
    return {key: x.detach().numpy() for key, x in tensors.items()}


# --- watch ---


def watch(folder, phi=None, trusted_env=None):
    """One episode of a run's policy, adapted to φ (default: the mean task), as a GIF in its folder, and in a window
    where there is a display. Returns what to tell the user. Raises RunError."""
    policy = load(folder, trusted_env)
    env = policy.env
    mean = envs.mean_task(env)
    phi = (mean if envs.mixes(env) or tuple(mean) in env.values else env.values[0]) if phi is None else phi
    try:
        phi = policy.check_phi(phi)
        print(what_phi_changes(env))
        adapted = policy.adapt(phi[0, 0].tolist())
        noise = envs.draw_noise(env, envs.stream([policy.settings["seed"]], WATCH, 1), range(1), 1)
        episode = envs.rollout(env, policies.actor(as_numpy(adapted.theta), policy.head), phi, noise)
        pictures = frames(env, phi, noise, episode)
        from PIL import Image
    except ImportError as error:
        raise RunError(f"--watch: {error}; animations need matplotlib: pip install matplotlib") from error
    except ValueError as error:
        raise RunError(f"--{error}", 2) from error
    images = [Image.fromarray(picture) for picture in pictures]
    images = [image.resize((image.width // 2, image.height // 2)) for image in images]
    animation = io.BytesIO()
    images[0].save(animation, format="GIF", save_all=True, append_images=images[1:], duration=milliseconds(env), loop=0)
    path = Path(folder) / f"watch-{'_'.join(f'{x:g}' for x in phi.flatten().tolist())}.gif"
    checkpoints.write_atomically(path, animation.getvalue())
    length, total = int(episode["mask"].sum()), float(episode["rewards"].sum())
    return f"{length} steps, return {total:.4g} after {policy.inner_steps} inner step(s); wrote {path}"


def what_phi_changes(env, steps=5):
    """What tells tasks apart at first, as text: the observations that differ most, and the rewards, after some steps at
    both ends of Φ from the same start with the same random actions."""
    ends = [env.values[0], env.values[-1]] if env.values else [env.low, env.high]
    env = replace(env, horizon=min(env.horizon, steps + 1))
    noise = envs.draw_noise(env, envs.stream([0], WATCH, 2), range(1), 1)
    noise = {key: x.repeat(2, 1) for key, x in noise.items()}
    act = (lambda obs, noise: noise.argmax(-1)) if isinstance(env.actions, int) else (lambda obs, noise: noise)
    episode = envs.rollout(env, act, np.array([ends], np.float32), noise)
    steps = int(episode["mask"].sum(-1).min()) - 1  # both episodes still run
    seen = episode["obs"][0, :, 0, :, : env.obs_dim - len(env.phi_names) * env.phi_observed]  # (2, H, D)
    start, obs = seen[:, 0], seen[:, steps]
    paid = episode["rewards"][0, :, 0, :steps].sum(-1)
    apart = abs(obs[1] - obs[0])
    most = [i for i in np.argsort(-apart)[:3] if apart[i] > 0]
    parts = [
        f"observation {i} went {' | '.join(f'{a[i]:.4g} → {b[i]:.4g}' for a, b in zip(start, obs, strict=True))}"
        for i in most
    ]
    phi = " | ".join(" ".join(f"{x:g}" for x in end) for end in ends)
    parts = ", ".join(parts or ["no observation differs"])
    first = f"{', '.join(env.phi_names)} = {phi}: after {steps} equal random actions"
    return f"{first} {parts}; the rewards sum to {paid[0]:.4g} | {paid[1]:.4g}"


def milliseconds(env):
    """Of a step on the environment's own clock: gymnasium's render_fps, or the family's dt. In tens, and 20 or more,
    which is what a GIF can say and viewers obey."""
    env_id = env.draw if isinstance(env.draw, str) else env.dynamics.env_id if env.in_workers else None
    step = 1000 * env.dt
    if env_id is not None:
        made = envs.gymnasium.make(env_id)
        step = 1000 / (made.metadata.get("render_fps") or 20)
        made.close()
    return max(round(step / 10), 2) * 10


def frames(env, phi, noise, episode):
    """The episode (S = M = K = 1) as pictures (height, width, 3): as gymnasium renders it, or as the family's
    `draw`."""
    if env.phi_observed:
        state = env.obs_dim - len(env.phi_names)
        episode = episode | {key: episode[key][..., :state] for key in ("obs", "last_obs")}
    if not (isinstance(env.draw, str) or env.in_workers):
        return draw_frames(env, phi, episode)
    windows = sys.platform in ("win32", "darwin") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if not windows:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    draw = render_states if isinstance(env.draw, str) else partial(replay, phi=phi, noise=noise)
    name = env.draw or env.dynamics.env_id
    try:
        with warnings.catch_warnings(action="ignore"):  # glfw warns of what the error below says
            for mode in ["human", "rgb_array"] if windows else ["rgb_array"]:
                pictures = draw(env, episode=episode, mode=mode)
        if not all(isinstance(picture, np.ndarray) for picture in pictures):
            raise TypeError("render returns no picture")
    except Exception as error:  # whatever an environment or its graphics library may raise
        remedy = "it needs the render_mode rgb_array; MuJoCo without a display needs MUJOCO_GL=egl, or osmesa"
        raise RunError(f"--watch: {name} cannot be rendered here ({envs.first_line(error)}); {remedy}") from error
    return pictures


def render_states(env, episode, mode):
    """By the gymnasium environment `env.draw`, set to every state."""
    shown = envs.gymnasium.make(env.draw, render_mode=mode).unwrapped
    pictures = []
    for state in episode["obs"][episode["mask"]]:
        shown.state = state
        pictures.append(shown.render())
    shown.close()
    return pictures


def replay(env, episode, mode, phi, noise):
    """By the gymnasium environment itself, in a rollout with the episode's actions."""
    shown = env.dynamics.rendered(mode)
    pictures, actions = [], iter(episode["actions"][episode["mask"]])

    def act(obs, noise):
        pictures.append(shown.instances[0].render())
        return next(actions)[None, None]

    envs.rollout(replace(env, dynamics=shown, horizon=int(episode["mask"].sum())), act, phi,
                 noise | {"action": noise["action"][:, :, :, : int(episode["mask"].sum())]})  # fmt: skip
    shown.instances[0].close()
    return pictures


def draw_frames(env, phi, episode):
    """With matplotlib, by the task family's `draw`; observations against time where it has none."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    length = int(episode["mask"].sum())
    obs = np.concatenate([episode["obs"][0, 0, 0, :length], episode["last_obs"][0, 0]])
    pictures, limits = [], None
    for t in (len(obs), *range(1, len(obs) + 1)):  # first the whole episode, whose axes are those of all pictures
        figure, axes = plt.subplots(figsize=(6, 6), layout="constrained")
        (env.draw or draw_observations)(axes, obs[:t], phi.flatten().tolist())
        limits = limits or {"xlim": axes.get_xlim(), "ylim": axes.get_ylim()}
        axes.set(**limits)
        figure.legend(loc="outside lower center", ncols=4)  # covers nothing
        figure.canvas.draw()
        pictures.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
        plt.close(figure)
    return pictures[1:]


def draw_observations(axes, obs, phi):
    """Against time; a legend for as many as one can tell apart."""
    for i, values in enumerate(obs.T):
        axes.plot(values, label=f"observation {i}" if len(obs.T) <= 12 else None)
    axes.set(xlabel="step", title=f"φ = {', '.join(f'{x:g}' for x in phi)}")
