"""Any gymnasium environment as a task family, with parameters as φ; an instance a trajectory.

A parameter is a path from the environment, such as `gravity`, `config[duration]` or
`model.opt.gravity[2]`, or make.NAME, a keyword of its constructor. Axes as in envs.py. What is
wrong raises `envs.ArgumentError`.
"""

import ast
import contextlib
import copy
import importlib
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral

import gymnasium
import numpy as np

import envs
from envs import ArgumentError, Env
from harness.errors import first_line, hint
from harness.parameters import keywords_of, numbers_of, parameter, path_parts, set_parameter
from harness.trial import check_range, check_tasks, number_in, warn_of_missing


@dataclass(eq=False)
class Gymnasium:
    """Dynamics of a gymnasium environment whose parameters `names` are φ times `scale`; an instance
    for each trajectory.

    names: paths from the environment, which are set before every reset (a constructor may refuse
        what the physics can do: LunarLander's asserts gravity < 12), or make.NAME, a keyword of the
        constructor, for which the environment is made anew for every episode.
    defaults: {name: value without φ}. Finished episodes are not stepped.
    """

    env_id: str
    names: tuple[str, ...]
    scale: float = 1.0
    defaults: dict = field(default_factory=dict)
    keywords: dict = field(default_factory=dict)  # of the constructor, the same in every episode
    first_action: int = 0  # of discrete ones; those of envs.py begin with 0
    whole_actions: str = ""  # the box holds whole numbers, of this dtype
    info: tuple[str, ...] = ()  # the numbers of a step's info that are kept of an episode's end
    own: slice = field(default_factory=lambda: slice(None))  # of the B·K; others count as ended
    instances: dict = field(default_factory=dict)  # by the index in (B, K), for the next rollout
    tried: set = field(default_factory=set)  # names of the numbers that trial episodes report
    reported: np.ndarray | None = None  # (B·K, N), `info` at the ends of the last rollout's episodes

    def __getstate__(self):
        """A spawned process makes environments of its own, since not all can be pickled."""
        return {key: x for key, x in vars(self).items() if key != "spec"} | {"instances": {}}

    def changed(self, **changes):
        """The same but for the changes, with instances of its own."""
        return replace(self, instances={}, tried=set(), **changes)

    @property
    def whole(self):
        """The parameters that may be whole numbers only: the default is one, or there is none."""
        return [name for name, value in self.defaults.items() if value is None or isinstance(value, Integral)]

    @cached_property
    def spec(self):
        """Without the wrapper that asks at every step whether there was a reset: 4% of a step."""
        spec = copy.deepcopy(spec_of(self.env_id))
        spec.order_enforce = False
        return spec

    def reset(self, i, phi, seed):
        """First observation (D,) of a new episode of trajectory i."""
        obs, _ = self.instance(i, phi).reset(seed=seed)
        return obs.ravel()

    def instance(self, i, phi):
        """The environment of trajectory i, with its parameters set."""
        values = self.values(phi)
        keywords = {name.removeprefix("make."): x for name, x in values.items() if name.startswith("make.")}
        if keywords and i in self.instances:
            self.instances.pop(i).close()
        if i not in self.instances:
            env = gymnasium.make(self.spec, disable_env_checker=True, **(self.keywords | keywords))
            self.instances[i] = flattened(env)
        for name, value in values.items():
            if not name.startswith("make."):
                set_parameter(self.instances[i], path_parts(name), value)
        return self.instances[i]

    def values(self, phi):
        """{parameter: its value at φ}, whole numbers as Python's."""
        values = dict(zip(self.names, (self.scale * x for x in phi), strict=True))
        return values | {name: int(values[name]) for name in self.whole if values[name].is_integer()}

    def taken(self, actions):
        """Actions of envs.py, (B,) or (B, A), as the environment takes them."""
        if actions.ndim == 1:
            return (actions + self.first_action).tolist()  # Python numbers step faster
        # Not a number comes from a run that fails alone, but Box2D would end them all.
        actions = np.nan_to_num(actions)
        return np.rint(actions).astype(self.whole_actions) if self.whole_actions else actions

    def __call__(self, phi, noise, xp):
        """Env's dynamics."""
        shape, count = noise.shape[:2], noise[..., 0].size
        phi = np.broadcast_to(phi.astype(float), (*shape, phi.shape[-1])).reshape(count, -1).tolist()
        seeds = [seed_of(u) for u in noise[..., 0].ravel().tolist()]
        running = list(range(count))[self.own]
        first = {i: self.reset(i, phi[i], seeds[i]) for i in running}
        obs = np.zeros((count, len(first[running[0]])), np.float32)
        rewards = np.zeros(count, np.float32)
        terminated, ended = np.zeros(count, bool), np.ones(count, bool)
        self.reported = np.full((count, len(self.info)), np.nan)
        for i in running:
            obs[i], ended[i] = first[i], False
        self.check_finite(obs, rewards)

        def shaped(x):
            return x.reshape(*shape, *x.shape[1:]).copy()

        def step(state, action):
            actions = self.taken(action.reshape(count, *action.shape[2:]))
            rewards[:] = 0
            for i in tuple(running):
                observed, reward, final, truncated, info = self.instances[i].step(actions[i])
                obs[i], rewards[i] = observed.ravel(), np.asarray(reward).item()
                self.reported[i] = [number_in(info, name) for name in self.info]
                if final or truncated:
                    terminated[i], ended[i] = final, True
                    running.remove(i)
            self.check_finite(obs, rewards)
            return shaped(obs), shaped(rewards), shaped(terminated), shaped(ended)

        return shaped(obs), step

    def check_finite(self, obs, rewards):
        """Raises ValueError: the environment's mistake is not to pass for a run that diverged."""
        for name, x in (("observations", obs), ("rewards", rewards)):
            if not np.isfinite(x).all():
                raise ValueError(f"{self.env_id} returned {name} that are not finite")


def seed_of(u):
    """The seed of a reset, the number of the cell of which u in (0, 1) is the midpoint: 0 to
    2²³ − 1, odd and even."""
    return int(u * 2**23)


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


def family_of(settings):
    """The task family that settings describe, those of a command line or of a run."""
    bounds = None if settings["values"] else settings["range"]
    name, names, horizon = settings["env"], settings["param"], settings["horizon"]
    keywords, info = settings.get("make"), settings.get("info")
    env = make(name, names, bounds, horizon, settings["values"], keywords, info)
    env = replace(env, task_dist=settings["task_dist"] or env.task_dist)
    return envs.with_phi_observed(env) if settings["oracle"] else env


def make(name, names=None, bounds=None, horizon=None, values=None, keywords=None, info=None):
    """The task family `name`, one of FAMILIES or a gymnasium id, with φ, Φ and the horizon given.

    names: parameters of the gymnasium environment that are φ; bounds, values: as in
    `envs.with_tasks`; keywords: for its constructor, a list of NAME=VALUE; info: names of numbers
    in its info, beside those of SUCCESS.
    """
    fixed = dict(map(keyword_of, keywords or []))
    env = FAMILIES.get(name)
    if env and names is not None:
        raise ArgumentError("names", " ".join(names), f"{name} has its own φ; leave it out")
    if env and keywords is not None and not env.is_gymnasium:
        raise ArgumentError("make", " ".join(keywords), f"{name} has no constructor; leave it out")
    if env is None:
        first = dict(zip(names or (), values or (bounds or [])[::2], strict=False))
        env = gymnasium_env(name, names, first, horizon, fixed)
    elif env.is_gymnasium:
        check_keywords(env.dynamics.env_id, fixed, env.dynamics.names)
        env = replace(env, dynamics=env.dynamics.changed(keywords=fixed))
    env = envs.with_tasks(env, bounds, horizon, values)
    if not env.low:
        expected = f"give LOW HIGH for {', '.join(env.phi_names)} of {name}, e.g. 5 15"
        raise ArgumentError("bounds", "", expected)
    if env.is_gymnasium and env.values:
        check_tasks(env, "values", env.values)
    elif env.is_gymnasium:
        check_range(env)
    if env.is_gymnasium:
        warn_of_missing(env.dynamics, info or ())
        success = [name for name in SUCCESS if name in env.dynamics.tried]
        env.dynamics.info = tuple(dict.fromkeys([*success, *(info or ())]))
    return env


SUCCESS = ("success", "is_success")  # what is taken of an info by itself


def info_names(env):
    """The numbers that are kept of an episode's end, beside its return."""
    return env.dynamics.info if env.is_gymnasium else ()


def keyword_of(word):
    """NAME=VALUE, a Python number, True, False, None or else a word, as (name, value)."""
    name, equals, text = word.partition("=")
    if not (name.isidentifier() and equals):
        raise ArgumentError("make", word, "expected NAME=VALUE")
    try:
        return name, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return name, text


def check_keywords(env_id, keywords, names):
    """Raises ArgumentError for a keyword that the constructor does not take, or that is φ."""
    known = keywords_of(spec_of(env_id)) if keywords else {}
    for keyword, value in keywords.items():
        if f"make.{keyword}" in names:
            raise ArgumentError("make", f"{keyword}={value}", "it is φ; leave it out")
        if keyword not in known and not isinstance(known, defaultdict):
            problem = f"{env_id} has no such keyword; {hint(keyword, known, ', '.join(known))}"
            raise ArgumentError("make", f"{keyword}={value}", problem)


def gymnasium_env(env_id, names, first, horizon, keywords):
    """A task family from any gymnasium id with observations that are or flatten to a box, and
    discrete or bounded box actions; Φ is to be set. first: {name: value} of one task."""
    if env_id not in gymnasium.registry and ":" not in env_id:  # package:id imports the package first
        known = [*FAMILIES, *gymnasium.registry]
        choices = f"{', '.join(FAMILIES)}, a gymnasium id, or package:id where importing a package registers it"
        raise ArgumentError("name", env_id, f"unknown environment; {hint(env_id, known, choices)}")
    probe = flattened(probe_of(env_id, first, keywords))
    module, colon, _ = env_id.rpartition(":")
    env_id = module + colon + probe.spec.id  # with its version
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
    first_action = int(getattr(probe.action_space, "start", 0))
    whole = "" if np.issubdtype(probe.action_space.dtype, np.floating) else probe.action_space.dtype.name
    dynamics = Gymnasium(env_id, tuple(names), 1.0, defaults, keywords, first_action, whole)
    return Env(
        phi_names=tuple(names),
        low=(),
        high=(),
        horizon=horizon,
        obs_dim=obs_dim,
        actions=actions,
        reset_noise=1,
        dynamics=dynamics,
        is_gymnasium=True,
    )


def probe_of(env_id, first, keywords):
    """The environment at its defaults, or on a task where its constructor requires what is φ."""
    required = {name.removeprefix("make."): x for name, x in first.items() if name.startswith("make.")}
    required = {name: int(x) if float(x).is_integer() else x for name, x in required.items()}
    try:
        check_keywords(env_id, keywords, first)
        try:
            return gymnasium.make(env_id, disable_env_checker=True, **keywords)
        except TypeError:
            if not required:
                raise
            return gymnasium.make(env_id, disable_env_checker=True, **(required | keywords))
    except ArgumentError:
        raise
    except Exception as error:  # whatever an import or a constructor may raise: it is shown
        problem = f"gymnasium cannot make it: {first_line(error)}"
        raise ArgumentError("name", env_id, problem) from error


def spec_of(env_id):
    """gymnasium's spec of an id, or of package:id, whose package is imported first."""
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    return gymnasium.spec(name)


def flattened(env):
    """The environment with Dict, Tuple and discrete observations flattened by gymnasium's wrapper."""
    space = env.observation_space
    with contextlib.suppress(NotImplementedError):  # of a space that gymnasium does not know, as MiniGrid's missions
        if not isinstance(space, gymnasium.spaces.Box) and space.is_np_flattenable:
            return gymnasium.wrappers.FlattenObservation(env)
    return env


def check_spaces(env_id, observation, action):
    """(D, actions as in Env) of gymnasium's spaces. Raises ArgumentError for other kinds."""
    spaces = gymnasium.spaces
    if not isinstance(observation, spaces.Box):
        problem = f"observations are {observation}; expected a Box, or what gymnasium flattens to one"
        raise ArgumentError("name", env_id, f"{problem}; wrap them (README, Add an environment)")
    if isinstance(action, spaces.Discrete):
        return int(np.prod(observation.shape)), int(action.n)
    if isinstance(action, spaces.Box) and action.is_bounded() and action.low.ndim == 1:
        return int(np.prod(observation.shape)), tuple(map(tuple, (action.low.tolist(), action.high.tolist())))
    problem = f"actions are {action}; expected Discrete, or a bounded Box vector"
    raise ArgumentError("name", env_id, f"{problem}{action_wrapper(action)}")


def action_wrapper(action):
    """The line of code that makes such actions usable, as the end of a message; "" without one."""
    spaces = gymnasium.spaces
    if isinstance(action, (spaces.MultiDiscrete, spaces.MultiBinary)) and len(action.shape) == 1:
        counts = tuple(getattr(action, "nvec", np.full(action.shape, 2)).tolist())
        function = f"lambda a: np.unravel_index(a, {counts})"
        space = f"gymnasium.spaces.Discrete({np.prod(counts)})"
    elif isinstance(action, spaces.Box):
        size = int(np.prod(action.shape))
        function = "lambda a: a" if action.low.ndim == 1 else f"lambda a: a.reshape({action.shape})"
        space = f"gymnasium.spaces.Box(-1, 1, ({size},))"
    else:
        return ""
    return f"; register an environment that is gymnasium.wrappers.TransformAction(env, {function}, {space})"


def mixes(env):
    """Whether what lies between tasks is a task: not where a list has whole numbers."""
    return not (env.values and env.is_gymnasium and env.dynamics.whole)
