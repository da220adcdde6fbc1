"""Any gymnasium environment as a task family: its parameters are φ, each trajectory has an instance of its own.

A parameter is a path from the environment, such as `gravity`, `config[duration]` or `model.opt.gravity[2]`, or
make.NAME, a keyword of its constructor. Axes as in envs.py. Errors are `envs.ArgumentError`s.
"""

import contextlib
import copy
import math
from dataclasses import replace
from functools import cached_property
from numbers import Integral

import gymnasium
import numpy as np

import envs
from envs import ArgumentError, Env
from harness.errors import first_line, hint
from harness.parameters import numbers_of, parameter, path_parts, set_parameter


class Gymnasium:
    """Dynamics of a gymnasium environment whose parameters `names` are φ times `scale`; an instance for each
    trajectory.

    names: paths from the environment, which are set before every reset (a constructor may refuse what the physics can
    do: LunarLander's asserts gravity < 12), or make.NAME, a keyword of the constructor, for which the environment is
    made anew for every episode. defaults: {name: value without φ}. Finished episodes are not stepped. Keeps its
    instances for the next rollout.
    """

    def __init__(self, env_id, names, scale=1.0, defaults=None, **options):
        self.env_id, self.names, self.scale, self.options = env_id, names, scale, options
        self.defaults = defaults or {}
        self.parts = {name: path_parts(name) for name in names}
        self.instances = {}  # by the trajectory's index in (B, K)

    def __getstate__(self):
        """A spawned process makes environments of its own: not all can be pickled, nor can entry points."""
        return {key: x for key, x in vars(self).items() if key != "spec"} | {"instances": {}}

    def rendered(self, mode):
        """The same with instances that render."""
        return Gymnasium(self.env_id, self.names, self.scale, self.defaults, render_mode=mode)

    @property
    def whole(self):
        """The parameters that may be whole numbers only: the default is one, or there is none."""
        return [name for name, value in self.defaults.items() if value is None or isinstance(value, Integral)]

    @cached_property
    def spec(self):
        """Of instances without the wrapper that asks at every step whether there was a reset: 4% of a step."""
        spec = copy.deepcopy(gymnasium.registry[gymnasium.make(self.env_id).unwrapped.spec.id])
        spec.order_enforce = False
        return spec

    def reset(self, i, phi, seed):
        """First observation (D,) of a new episode of trajectory i."""
        values = dict(zip(self.names, (self.scale * x for x in phi), strict=True))
        values |= {name: int(values[name]) for name in self.whole if values[name].is_integer()}
        keywords = {name.removeprefix("make."): x for name, x in values.items() if name.startswith("make.")}
        if keywords and i in self.instances:
            self.instances.pop(i).close()
        if i not in self.instances:
            env = gymnasium.make(self.spec, disable_env_checker=True, **self.options, **keywords)
            self.instances[i] = flattened(env)
        for name, value in values.items():
            if not name.startswith("make."):
                set_parameter(self.instances[i], self.parts[name], value)
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

    def check_range(self, low, high):
        """`check` of the ends of Φ, for each component; where that is a whole number, of what lies between, too."""
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        for i, name in enumerate(self.names):
            tasks = [[*middle[:i], x, *middle[i + 1 :]] for x in (low[i], high[i])]
            if name in self.whole and low[i] < high[i]:
                between = low[i] + 0.382 * (high[i] - low[i]) + 1e-3
                near = [[*middle[:i], x, *middle[i + 1 :]] for x in (between, math.floor(between), math.ceil(between))]
                try:
                    episodes = [self.random_episode(phi) for phi in near]
                except Exception as error:  # as in `check`
                    raise self.no_fractions(name, first_line(error)) from error
                if episodes[1] != episodes[2] and episodes[0] in episodes[1:]:
                    raise self.no_fractions(name, "it rounds others")
            self.check("bounds", tasks if low[i] < high[i] else tasks[:1], [name])

    def no_fractions(self, name, why):
        problem = f"{self.env_id} takes whole numbers as {name}; list them, e.g. 1 2 3, in place of a range ({why})"
        return ArgumentError("values", "", problem)

    def check(self, argument, tasks, names=None):
        """Raises ArgumentError where the environment fails at one of the tasks φ, where one seed and one sequence of
        actions give the same episode at all of them, or where gravity, one of its `names`, would point upward."""
        episodes, shown = [], []
        for phi in tasks:
            values = {name: x for name, x in zip(self.names, phi, strict=True) if name in (names or self.names)}
            shown.append(" ".join(f"{x:g}" for x in values.values()))
            for name, x in values.items():
                if "gravity" in name and (self.defaults.get(name) or 0) * x < 0:
                    problem = f"{name} is {self.defaults[name]:g} in {self.env_id}, and {x:g} points upward"
                    raise ArgumentError(argument, "", f"{problem}; give it the same sign")
            try:
                episodes.append(self.random_episode(phi))
            except Exception as error:  # whatever it may raise at values that it was not written for
                where = f"{', '.join(values)} = {shown[-1]}"
                problem = f"{self.env_id} fails at {where} ({first_line(error)}); give others"
                raise ArgumentError(argument, "", problem) from error
        if len({len(episode[0]) for episode in episodes}) > 1:
            problem = f"{self.env_id} has observations of different sizes at {', '.join(shown)}"
            raise ArgumentError(argument, "", problem)
        attributes = [name for name in values if not name.startswith("make.")]  # the constructor reads its keywords
        if attributes and len(episodes) > 1 and all(episode == episodes[0] for episode in episodes):
            where = f"{', '.join(shown[:-1])} and {shown[-1]}"
            problem = f"{self.env_id} gives the same episode under random actions at {where}, so it is no task"
            remedy = "name an attribute that it reads at every step, or make.NAME, a keyword of its constructor"
            raise ArgumentError("names", ", ".join(values), f"{problem} parameter; {remedy}")

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


# --- what an environment has ---


def flattened(env):
    """The environment with observations in a box: Dict, Tuple and discrete ones by gymnasium's own wrapper."""
    space = env.observation_space
    with contextlib.suppress(NotImplementedError):  # of a space that gymnasium does not know, as MiniGrid's missions
        if not isinstance(space, gymnasium.spaces.Box) and space.is_np_flattenable:
            return gymnasium.wrappers.FlattenObservation(env)
    return env


def check_spaces(env_id, observation, action):
    """(D, actions as in Env) of gymnasium's spaces. Raises ArgumentError where they are of other kinds."""
    spaces = gymnasium.spaces
    if not isinstance(observation, spaces.Box):
        problem = f"observations are {observation}; expected a Box, or what gymnasium flattens to one; wrap them"
        raise ArgumentError("name", env_id, f"{problem} (README, Add an environment)")
    if isinstance(action, spaces.Discrete) and action.start == 0:
        return int(np.prod(observation.shape)), int(action.n)
    if isinstance(action, spaces.Box) and action.is_bounded() and action.low.ndim == 1:
        return int(np.prod(observation.shape)), (tuple(action.low.tolist()), tuple(action.high.tolist()))
    raise ArgumentError("name", env_id, f"actions are {action}; expected Discrete from 0, or a bounded Box vector")


# --- task families ---

FAMILIES = envs.ENVS | {
    "lunarlander": Env(  # its attribute is the vertical component, −φ
        phi_names=("gravity (m/s²)",),
        low=(5.0,),
        high=(15.0,),
        horizon=400,
        obs_dim=8,
        actions=4,
        reset_noise=1,
        dynamics=Gymnasium("LunarLander-v3", ("gravity",), scale=-1.0, defaults={"gravity": 10.0}),
        defaults={"threshold": 75.0},
        is_gymnasium=True,
    )
}


def make(name, names=None, bounds=None, horizon=None, values=None):
    """The task family `name`, one of FAMILIES or a gymnasium id, with φ, Φ and the horizon given.

    names: parameters of the gymnasium environment that are φ; bounds, values: as in `envs.with_tasks`.
    """
    if name in FAMILIES and names is not None:
        raise ArgumentError("names", " ".join(names), f"{name} has its own φ; leave it out")
    env = FAMILIES[name] if name in FAMILIES else gymnasium_env(name, names, horizon)
    env = envs.with_tasks(env, bounds, horizon, values)
    if not env.low:
        raise ArgumentError("bounds", "", f"give LOW HIGH for {', '.join(env.phi_names)} of {name}, e.g. 5 15")
    if env.is_gymnasium and env.values:
        env.dynamics.check("values", env.values)
    elif env.is_gymnasium:
        env.dynamics.check_range(env.low, env.high)
    return env


def family_of(settings):
    """The task family that settings describe, those of a command line or of a run."""
    bounds = None if settings["values"] else settings["range"]
    env = make(settings["env"], settings["param"], bounds, settings["horizon"], settings["values"])
    env = replace(env, task_dist=settings["task_dist"] or env.task_dist)
    return envs.with_phi_observed(env) if settings["oracle"] else env


def gymnasium_env(env_id, names, horizon):
    """A task family from any gymnasium id with observations that are or flatten to a box, and discrete or bounded box
    actions; Φ is to be set."""
    if env_id not in gymnasium.registry and ":" not in env_id:  # package:id imports the package first
        known = [*FAMILIES, *gymnasium.registry]
        choices = f"{', '.join(FAMILIES)}, a gymnasium id, or package:id where importing a package registers it"
        raise ArgumentError("name", env_id, f"unknown environment; {hint(env_id, known, choices)}")
    try:
        probe = flattened(gymnasium.make(env_id, disable_env_checker=True))
    except Exception as error:  # whatever an import or a constructor may raise: it is shown
        raise ArgumentError("name", env_id, f"gymnasium cannot make it: {first_line(error)}") from error
    if not names:
        known = ", ".join(numbers_of(probe))
        raise ArgumentError("names", "", f"say which parameter of {env_id} is φ, one of: {known}")
    if len(set(names)) < len(names):
        raise ArgumentError("names", " ".join(names), "duplicate attribute")
    defaults = {name: parameter(env_id, probe, name) for name in names}
    horizon = horizon or probe.spec.max_episode_steps
    if horizon is None:
        raise ArgumentError("horizon", "", f"episodes of {env_id} have no end; give their length, e.g. 200")
    obs_dim, actions = check_spaces(env_id, probe.observation_space, probe.action_space)
    return Env(
        phi_names=tuple(names),
        low=(),
        high=(),
        horizon=horizon,
        obs_dim=obs_dim,
        actions=actions,
        reset_noise=1,
        dynamics=Gymnasium(env_id, tuple(names), defaults=defaults),
        is_gymnasium=True,
    )


def mixes(env):
    """Whether what lies between tasks is a task too: not where they are a list and a component is a whole number."""
    return not (env.values and env.is_gymnasium and env.dynamics.whole)
