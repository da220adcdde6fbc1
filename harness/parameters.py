"""The parameters of a gymnasium environment: their names, how they are set, which cannot be φ."""

import inspect
import math
import re
from collections import defaultdict
from functools import lru_cache
from numbers import Real

import gymnasium
import numpy as np

from envs import ArgumentError
from harness.errors import first_line, hint

# Attributes that gymnasium's step uses together with what its constructor derived from them, which stays as it was.
HALF_READ = {"CartPole": ("masspole", "length", "polemass_length")}


@lru_cache
def path_parts(path):
    """`model.opt.gravity[2]` -> ["model", "opt", "gravity", (2,)]: what is in [] is a tuple."""
    parts = re.findall(r"([^.\[\]]+)|\[([^\[\]]+)\]", path)
    return [name or ((int(key),) if re.fullmatch(r"-?\d+", key) else (key,)) for name, key in parts]


def value_at(env, parts):
    """What a path leads to; its first attribute is that of the outermost wrapper which has it."""
    value = env.get_wrapper_attr(parts[0])
    for part in parts[1:]:
        value = value[part[0]] if isinstance(part, tuple) else getattr(value, part)
    return value


def set_parameter(env, parts, value):
    """Set what a path leads to, where it is defined. Raises ValueError where that fails."""
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
    """The value of a parameter without φ, None for a constructor's keyword without one. Raises
    ArgumentError where there is no such number that can be set."""
    keywords = keywords_of(env.unwrapped.spec)
    parts, known = path_parts(name), numbers_of(env)
    try:
        if any(str(part).startswith("__") for part in parts):
            raise AttributeError
        value = keywords[parts[1]] if parts[0] == "make" else value_at(env, parts)
    except (LookupError, AttributeError, TypeError):
        value = "nothing"
    if isinstance(value, (bool, np.bool_)):
        problem = f"a switch of {env_id}, {value}, and φ is a number; make it one in a wrapper"
        raise ArgumentError("names", name, problem)
    if not (is_number(value) or (value is None and parts[0] == "make")):
        nothing = "nothing: it has no numbers, so set what you mean in a wrapper"
        remedy = hint(name, known, ", ".join(known) or nothing)
        raise ArgumentError("names", name, f"{env_id} has no such number; {remedy}")
    if name in HALF_READ.get(env.unwrapped.spec.id.split("-")[0], ()):
        problem = f"{env_id} computes with it and with constants that its constructor derived from it, which would stay"
        remedy = "set all of them in a wrapper of your own (README, Add an environment)"
        raise ArgumentError("names", name, f"{problem} as they were; {remedy}")
    if parts[0] != "make":
        try:
            set_parameter(env, parts, value)
        except Exception as error:  # whatever a property may raise
            problem = f"{env_id} does not take it ({first_line(error)})"
            raise ArgumentError("names", name, problem) from error
    return value


def keywords_of(spec):
    """{keyword of the constructor: its default, or None}; any keyword where it takes any."""
    creator = spec.entry_point
    creator = creator if callable(creator) else gymnasium.envs.registration.load_env_creator(creator)
    found = inspect.signature(creator).parameters.values()
    named = {x.name: None if x.default is x.empty else x.default for x in found if x.kind is not x.VAR_KEYWORD}
    return named | spec.kwargs if len(named) == len(found) else defaultdict(lambda: None, named | spec.kwargs)


def numbers_of(env):
    """What may be a task parameter: the numbers among the attributes and properties of an
    environment and its wrappers, the entries of its dicts, and its constructor's keywords."""
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
    found |= {f"make.{name}": value for name, value in keywords_of(env.unwrapped.spec).items()}
    return [name for name, value in found.items() if is_number(value)]
