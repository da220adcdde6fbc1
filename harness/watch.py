"""`--watch RUN`: one episode of a finished run's policy as a GIF, and what φ changes in words."""

import io
import os
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np

import envs
import policies
from envs import WATCH
from harness import checkpoints
from harness.checkpoints import RunError
from harness.errors import first_line
from harness.trained import as_numpy, load

STEP_SECONDS = 0.1  # of a family that has no clock of its own
BLUE, ORANGE = "#0072B2", "#D55E00"


def watch(folder, phi=None, trusted_env=None):
    """One episode of a run's policy, adapted to φ (default: the mean task), as a GIF in its folder,
    and in a window where there is a display. Returns what to tell the user. Raises RunError."""
    policy = load(folder, trusted_env)
    env = policy.env
    try:
        phi = policy.check_phi(default_task(env) if phi is None else phi)
        print(what_phi_changes(env))
        adapted = policy.adapt(phi[0, 0].tolist())
        noise = envs.draw_noise(env, envs.stream([policy.settings["seed"]], WATCH, 1), range(1), 1)
        act = policies.actor(as_numpy(adapted.theta), policy.head)
        episode = envs.rollout(env, act, phi, noise)
        pictures = frames(policy.settings["env"], env, phi, noise, episode)
        animation = as_gif(pictures, milliseconds(policy.settings["env"], env))
    except ImportError as error:
        remedy = "animations need matplotlib: pip install matplotlib"
        raise RunError(f"--watch: {error}; {remedy}") from error
    except envs.ArgumentError as error:
        raise RunError(error.line(f"--{error.argument}"), 2) from error
    path = Path(folder) / f"watch-{'_'.join(f'{x:g}' for x in phi.flatten().tolist())}.gif"
    checkpoints.write_atomically(path, animation)
    length, total = int(episode["mask"].sum()), float(episode["rewards"].sum())
    steps = policy.inner_steps
    return f"{length} steps, return {total:.4g} after {steps} inner step(s); wrote {path}"


def default_task(env):
    """The mean task, or the first one where tasks are a list and their mean is not in it."""
    mean = envs.mean_task(env)
    return mean if not env.values or tuple(mean) in env.values else env.values[0]


def as_gif(pictures, duration):
    """Pictures (height, width, 3), at half their size, as the bytes of an animation."""
    from PIL import Image

    images = [Image.fromarray(picture) for picture in pictures]
    first, *others = [image.resize((image.width // 2, image.height // 2)) for image in images]
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=duration, loop=0)
    return file.getvalue()


def milliseconds(name, env):
    """Of a step on the environment's own clock: gymnasium's render_fps, or STEP_SECONDS. In tens,
    and 20 or more, which is what a GIF can say and viewers obey."""
    env_id = env.dynamics.env_id if env.is_gymnasium else RENDERED.get(name)
    step = 1000 * STEP_SECONDS
    if env_id is not None:
        made = gymnasium.make(env_id)
        step = 1000 / (made.metadata.get("render_fps") or 20)
        made.close()
    return max(round(step / 10), 2) * 10


# --- what φ changes ---


def what_phi_changes(env, steps=5):
    """What tells tasks apart at first, as text: the observations that differ most, and the rewards,
    after some steps at both ends of Φ from the same start with the same random actions."""
    ends = [env.values[0], env.values[-1]] if env.values else [env.low, env.high]
    env = replace(env, horizon=min(env.horizon, steps + 1))
    noise = envs.draw_noise(env, envs.stream([0], WATCH, 2), range(1), 1)
    noise = {key: x.repeat(2, 1) for key, x in noise.items()}
    episode = envs.rollout(env, random_actions(env), np.array([ends], np.float32), noise)
    steps = int(episode["mask"].sum(-1).min()) - 1  # both episodes still run
    seen = state_part(env, episode["obs"])[0, :, 0]  # (2, H, D)
    start, obs = seen[:, 0], seen[:, steps]
    paid = episode["rewards"][0, :, 0, :steps].sum(-1)
    apart = abs(obs[1] - obs[0])
    most = [i for i in np.argsort(-apart)[:3] if apart[i] > 0]
    parts = [changes(i, start, obs) for i in most] or ["no observation differs"]
    phi = " | ".join(" ".join(f"{x:g}" for x in end) for end in ends)
    first = f"{', '.join(env.phi_names)} = {phi}: after {steps} equal random actions"
    return f"{first} {', '.join(parts)}; the rewards sum to {paid[0]:.4g} | {paid[1]:.4g}"


def random_actions(env):
    if isinstance(env.actions, int):
        return lambda obs, noise: noise.argmax(-1)
    return lambda obs, noise: noise


def changes(i, start, obs):
    """Observation i at both ends of Φ, from its start on."""
    ends = [f"{a[i]:.4g} → {b[i]:.4g}" for a, b in zip(start, obs, strict=True)]
    return f"observation {i} went {' | '.join(ends)}"


def state_part(env, obs):
    """Observations (..., D) without the φ that --oracle adds to their end."""
    return obs[..., : -len(env.phi_names)] if env.phi_observed else obs


# --- pictures ---


def frames(name, env, phi, noise, episode):
    """An episode (S = M = K = 1) of the family `name` as pictures (height, width, 3): as gymnasium
    renders it, or drawn by the family's function of `DRAWN`."""
    episode = episode | {key: state_part(env, episode[key]) for key in ("obs", "last_obs")}
    if env.is_gymnasium:
        render, env_id = partial(replay, env, phi, noise), env.dynamics.env_id
    elif name in RENDERED:
        render, env_id = partial(render_states, RENDERED[name]), RENDERED[name]
    else:
        return draw_frames(DRAWN.get(name, draw_observations), phi, episode)
    windows = sys.platform in ("win32", "darwin")
    windows = windows or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if not windows:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    try:
        with warnings.catch_warnings(action="ignore"):  # glfw warns of what the error below says
            for mode in ["human", "rgb_array"] if windows else ["rgb_array"]:
                pictures = render(episode, mode)
        if not all(isinstance(picture, np.ndarray) for picture in pictures):
            raise TypeError("render returns no picture")
    except Exception as error:  # whatever an environment or its graphics library may raise
        why = f"--watch: {env_id} cannot be rendered here ({first_line(error)})"
        remedy = "it needs the render_mode rgb_array"
        remedy += "; MuJoCo without a display needs MUJOCO_GL=egl, or osmesa"
        raise RunError(f"{why}; {remedy}") from error
    return pictures


def render_states(env_id, episode, mode):
    """By a gymnasium environment that is set to every state."""
    shown = gymnasium.make(env_id, render_mode=mode).unwrapped
    pictures = []
    for state in episode["obs"][episode["mask"]]:
        shown.state = state
        pictures.append(shown.render())
    shown.close()
    return pictures


def replay(env, phi, noise, episode, mode):
    """By the gymnasium environment itself, in a rollout with the episode's actions."""
    shown = env.dynamics.changed(keywords=env.dynamics.keywords | {"render_mode": mode})
    length = int(episode["mask"].sum())
    pictures, actions = [], iter(episode["actions"][episode["mask"]])

    def act(obs, noise):
        pictures.append(shown.instances[0].render())
        return next(actions)[None, None]

    noise = noise | {"action": noise["action"][:, :, :, :length]}
    envs.rollout(replace(env, dynamics=shown, horizon=length), act, phi, noise)
    shown.instances[0].close()
    return pictures


def draw_frames(draw, phi, episode):
    """With matplotlib. draw: (axes, obs so far (t, D), φ (P,)), draws the last of them."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    length = int(episode["mask"].sum())
    obs = np.concatenate([episode["obs"][0, 0, 0, :length], episode["last_obs"][0, 0]])
    pictures, limits = [], None
    # First the whole episode, whose axes are those of all pictures.
    for t in (len(obs), *range(1, len(obs) + 1)):
        figure, axes = plt.subplots(figsize=(6, 6), layout="constrained")
        draw(axes, obs[:t], phi.flatten().tolist())
        limits = limits or {"xlim": axes.get_xlim(), "ylim": axes.get_ylim()}
        axes.set(**limits)
        figure.legend(loc="outside lower center", ncols=4)  # covers nothing
        figure.canvas.draw()
        pictures.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
        plt.close(figure)
    return pictures[1:]


def draw_point(axes, obs, phi):
    axes.plot(*obs.T, color=BLUE, marker="o", markersize=3, label="path")
    axes.plot(*phi, "*", color=ORANGE, markersize=14, label="goal")
    axes.set(xlabel="x (m)", ylabel="y (m)", aspect="equal")


def draw_velocity(axes, obs, phi):
    axes.plot(obs[:, 0], color=BLUE, marker="o", markersize=3, label="velocity")
    axes.axhline(phi[0], color=ORANGE, linestyle="--", label="target")
    axes.set(xlabel="step", ylabel="velocity (m/s)")


def draw_crossing(axes, obs, phi):
    x, y = obs[-1] * [envs.CROSSING_UNIT, -envs.CROSSING_UNIT]  # m
    axes.axhspan(-2, 2, color="0.9")
    axes.axvspan(-2, 2, color="0.9")
    axes.plot(0, y, "^", color=BLUE, markersize=14, label="vehicle 1, the policy's")
    axes.plot(x, 0, ">", color=ORANGE, markersize=14, label=f"vehicle 2, {phi[0]:g} m/s")
    axes.set(xlim=(-50, 50), ylim=(-50, 50), xlabel="east (m)", ylabel="north (m)")


def draw_observations(axes, obs, phi):
    """Against time; a legend for as many as one can tell apart."""
    for i, values in enumerate(obs.T):
        axes.plot(values, label=f"observation {i}" if len(obs.T) <= 12 else None)
    axes.set(xlabel="step", title=f"φ = {', '.join(f'{x:g}' for x in phi)}")


RENDERED = {"cartpole": "CartPole-v1"}  # by the gymnasium environment that has the same states
DRAWN = {"point": draw_point, "velocity": draw_velocity, "crossing": draw_crossing}
