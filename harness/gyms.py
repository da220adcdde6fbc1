"""Any gymnasium environment as batched dynamics: its parameters are φ, each trajectory has an instance of its own.

A parameter is a path from the environment, such as `gravity`, `config[duration]` or `model.opt.gravity[2]`, or
make.NAME, a keyword of its constructor. Axes as in envs.py, which alone uses this.
"""

import contextlib
import copy
import difflib
import inspect
import math
import re
from collections import defaultdict
from functools import cached_property
from numbers import Integral, Real

import gymnasium
import numpy as np


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
                    raise ValueError(f"{self.fractions(name)} ({first_line(error)})") from error
                if episodes[1] != episodes[2] and episodes[0] in episodes[1:]:
                    raise ValueError(f"{self.fractions(name)} (it rounds others)")
            self.check("bounds", tasks if low[i] < high[i] else tasks[:1], [name])

    def fractions(self, name):
        return f"`bounds`: {self.env_id} takes whole numbers as {name}; list them with `values`, e.g. `values` 1 2 3"

    def check(self, argument, tasks, names=None):
        """Raises ValueError where the environment fails at one of the tasks φ, where one seed and one sequence of
        actions give the same episode at all of them, or where gravity, one of its `names`, would point upward."""
        episodes, shown = [], []
        for phi in tasks:
            values = {name: x for name, x in zip(self.names, phi, strict=True) if name in (names or self.names)}
            shown.append(" ".join(f"{x:g}" for x in values.values()))
            for name, x in values.items():
                if "gravity" in name and (self.defaults.get(name) or 0) * x < 0:
                    raise ValueError(
                        f"`{argument}`: {name} is {self.defaults[name]:g} in {self.env_id}, and {x:g} points upward; "
                        "give it the same sign"
                    )
            try:
                episodes.append(self.random_episode(phi))
            except Exception as error:  # whatever it may raise at values that it was not written for
                raise ValueError(
                    f"`{argument}`: {self.env_id} fails at {', '.join(values)} = {shown[-1]} ({first_line(error)}); "
                    "give others"
                ) from error
        if len({len(episode[0]) for episode in episodes}) > 1:
            raise ValueError(f"`{argument}`: {self.env_id} has observations of different sizes at {', '.join(shown)}")
        attributes = [name for name in values if not name.startswith("make.")]  # the constructor reads its keywords
        if attributes and len(episodes) > 1 and all(episode == episodes[0] for episode in episodes):
            raise ValueError(
                f"{self.env_id}: {', '.join(values)} = {', '.join(shown[:-1])} and {shown[-1]} give the same episode "
                "under random actions, so it is no task parameter; name an attribute that the environment reads at "
                "every step, or make.NAME, a keyword of its constructor"
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


# --- what an environment has ---


def flattened(env):
    """The environment with observations in a box: Dict, Tuple and discrete ones by gymnasium's own wrapper."""
    space = env.observation_space
    with contextlib.suppress(NotImplementedError):  # of a space that gymnasium does not know, as MiniGrid's missions
        if not isinstance(space, gymnasium.spaces.Box) and space.is_np_flattenable:
            return gymnasium.wrappers.FlattenObservation(env)
    return env


def check_spaces(env_id, observation, action):
    """(D, actions as in Env) of gymnasium's spaces. Raises ValueError where they are of other kinds."""
    spaces = gymnasium.spaces
    if not isinstance(observation, spaces.Box):
        raise ValueError(
            f"`name` {env_id}: observations are {observation}; expected a Box, or what gymnasium flattens to one; wrap "
            "them (README, Add an environment)"
        )
    if isinstance(action, spaces.Discrete) and action.start == 0:
        return int(np.prod(observation.shape)), int(action.n)
    if isinstance(action, spaces.Box) and action.is_bounded() and action.low.ndim == 1:
        return int(np.prod(observation.shape)), (tuple(action.low.tolist()), tuple(action.high.tolist()))
    raise ValueError(f"`name` {env_id}: actions are {action}; expected Discrete from 0, or a bounded Box vector")


# Attributes that gymnasium's step uses together with what its constructor derived from them, which stays as it was.
HALF_READ = {"CartPole": ("masspole", "length", "polemass_length")}


def path_parts(path):
    """`model.opt.gravity[2]` -> ["model", "opt", "gravity", (2,)]; an index or a dict's key is a tuple."""
    parts = re.findall(r"([^.\[\]]+)|\[([^\[\]]+)\]", path)
    return [name or ((int(key),) if re.fullmatch(r"-?\d+", key) else (key,)) for name, key in parts]


def value_at(env, parts):
    """What a path leads to; its first attribute is that of the outermost wrapper which has it."""
    value = env.get_wrapper_attr(parts[0])
    for part in parts[1:]:
        value = value[part[0]] if isinstance(part, tuple) else getattr(value, part)
    return value


def set_parameter(env, parts, value):
    """Set what a path leads to, where it is defined. Raises ValueError where it then has another value."""
    *path, last = parts
    if not path:
        env.set_wrapper_attr(last, value)
    elif isinstance(last, tuple):
        value_at(env, path)[last[0]] = value
    else:
        setattr(value_at(env, path), last, value)
    if not math.isclose(value_at(env, parts), value, rel_tol=1e-6, abs_tol=1e-6):
        raise ValueError(f"set to {value:g}, it is {value_at(env, parts):g}")


def is_number(x):
    return isinstance(x, Real) and not isinstance(x, bool)


def parameter(env_id, env, name):
    """The value of a parameter without φ, None for a constructor's keyword without one. Raises ValueError where there
    is no such number that can be set."""
    keywords = keywords_of(env)
    parts, known = path_parts(name), numbers_of(env)
    try:
        if any(str(part).startswith("__") for part in parts):
            raise AttributeError
        value = keywords[parts[1]] if parts[0] == "make" else value_at(env, parts)
    except (LookupError, AttributeError, TypeError):
        value = "nothing"
    if isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`names` {name}: a switch of {env_id}, {value}, and φ is a number; make it one in a wrapper")
    if not (is_number(value) or (value is None and parts[0] == "make")):
        remedy = hint(name, known, ", ".join(known) or "nothing: it has no numbers, so set what you mean in a wrapper")
        raise ValueError(f"`names` {name}: {env_id} has no such number; {remedy}")
    if name in HALF_READ.get(env.unwrapped.spec.id.split("-")[0], ()):
        raise ValueError(
            f"`names` {name}: {env_id} computes with it and with constants that its constructor derived from it, which "
            "would stay as they were; set all of them in a wrapper of your own (README, Add an environment)"
        )
    if parts[0] != "make":
        try:
            set_parameter(env, parts, value)
        except Exception as error:  # whatever a property may raise
            raise ValueError(f"`names` {name}: {env_id} does not take it ({first_line(error)})") from error
    return value


def keywords_of(env):
    """{keyword of the constructor: its default, None where there is none}; any keyword where it takes any."""
    spec = env.unwrapped.spec
    creator = spec.entry_point
    creator = creator if callable(creator) else gymnasium.envs.registration.load_env_creator(creator)
    found = inspect.signature(creator).parameters.values()
    named = {x.name: None if x.default is x.empty else x.default for x in found if x.kind is not x.VAR_KEYWORD}
    return named | spec.kwargs if len(named) == len(found) else defaultdict(lambda: None, named | spec.kwargs)


def numbers_of(env):
    """What may be a task parameter: the numbers among the attributes and properties of an environment and its wrappers,
    the entries of its dicts, and its constructor's keywords."""
    layers, found = [env], {}
    while layers[-1] is not env.unwrapped:
        layers.append(layers[-1].env)
    for layer in layers:
        for name in dir(layer):
            if name[0] == "_" or hasattr(gymnasium.Wrapper, name):
                continue
            try:
                value = getattr(layer, name)
            except Exception:  # whatever a property may raise
                continue
            found |= {f"{name}[{key}]": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
    found |= {f"make.{name}": value for name, value in keywords_of(env).items()}
    return [name for name, value in found.items() if is_number(value)]


# --- errors ---


def first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


def hint(word, known, choices):
    """What to say about an unknown word: the nearest known one, or else the choices."""
    close = difflib.get_close_matches(word, known, 1, 0.7) or difflib.get_close_matches(word.lower(), known, 1, 0.7)
    return f"did you mean {close[0]}?" if close else f"choose from {choices}"
