"""What is tried before training: that an environment returns what it promises, plays a task the
same again, and that φ changes what it does. Raises `envs.ArgumentError`."""

import contextlib
import math
import random
from dataclasses import replace
from numbers import Real

import numpy as np

from envs import ArgumentError
from harness.checkpoints import HUGE, is_info
from harness.errors import first_line, warn, with_place

MOST_STEPS = 200  # of an episode that is tried


class BrokenPromise(ValueError):
    """What an environment returns in place of what gymnasium's interface says."""


def check_range(env):
    """`check_tasks` of the ends of Φ, for each component; of what lies between a whole number's."""
    middle = [(a + b) / 2 for a, b in zip(env.low, env.high, strict=True)]
    for i, name in enumerate(env.dynamics.names):
        low, high = env.low[i], env.high[i]

        def tasks_at(values, i=i):
            return [[*middle[:i], x, *middle[i + 1 :]] for x in values]

        if name in env.dynamics.whole and low < high:
            between = low + 0.382 * (high - low) + 1e-3
            check_fractions(env, name, tasks_at([between, math.floor(between), math.ceil(between)]))
        check_tasks(env, "bounds", tasks_at([low, high] if low < high else [low]), [name])


def check_fractions(env, name, tasks):
    """Raises ArgumentError where the first task, a fraction, fails or is one of its neighbours."""
    problem = f"{env.dynamics.env_id} takes whole numbers as {name}; list them, e.g. 1 2 3, in place of a range"
    try:
        between, below, above = (random_episode(env, phi) for phi in tasks)
    except BrokenPromise as error:
        raise ArgumentError("name", env.dynamics.env_id, str(error)) from error
    except Exception as error:  # whatever it may raise at values that it was not written for
        raise ArgumentError("values", "", f"{problem} ({first_line(error)})") from error
    if below != above and between in (below, above):
        raise ArgumentError("values", "", f"{problem} (it rounds others)")


def check_tasks(env, argument, tasks, names=None):
    """Try the tasks φ. names: the parameters that they are about.

    Raises ArgumentError where the environment fails or breaks a promise, where one seed and one
    sequence of actions give the same episode on all tasks, or where gravity points upward. Warns
    where the first task is played otherwise after the others: it has a state of its own.
    """
    dynamics = env.dynamics
    names = names or dynamics.names
    check_gravity(dynamics, argument, tasks, names)
    with seeded():
        episodes = [try_task(env, argument, phi, names) for phi in tasks]
    shown = [shown_task(dynamics, phi, names) for phi in tasks]
    if len({len(episode[0]) for episode in episodes}) > 1:
        problem = f"{dynamics.env_id} has observations of different sizes at {', '.join(shown)}"
        raise ArgumentError(argument, "", problem)
    exact = try_task(env, argument, tasks[0], names) == episodes[0]
    same = all(episode == episodes[0] for episode in episodes)
    if not (exact or same):  # of new instances, what differs is φ's doing
        first, last = (try_new(env, argument, phi, names) for phi in (tasks[0], tasks[-1]))
        same = first == last
    given = [name for name in names if dynamics.defaults.get(name, 0.0) is not None]  # with a default
    if same and given and len(tasks) > 1:
        where = f"{', '.join(shown[:-1])} and {shown[-1]}"
        problem = f"{dynamics.env_id} gives the same episode under random actions at {where}, so it is no task"
        remedy = "name an attribute that it reads at every step, or make.NAME, a keyword of its constructor"
        raise ArgumentError("names", ", ".join(names), f"{problem} parameter; {remedy}, with what that needs")
    if not exact:
        problem = f"{dynamics.env_id} plays a task otherwise the second time, with the same seed and actions"
        warn(f"{problem}: it keeps state, or draws random numbers of its own, so its runs cannot be repeated exactly")


def check_gravity(dynamics, argument, tasks, names):
    """Raises ArgumentError where gravity points upward on all tasks, and warns of some."""
    for i, name in enumerate(dynamics.names):
        default = dynamics.defaults.get(name) or 0
        upward = [phi[i] for phi in tasks if default * phi[i] < 0]
        if "gravity" not in name or name not in names or not upward:
            continue
        problem = f"{name} is {default:g} in {dynamics.env_id}, and {upward[0]:g} points upward"
        if len(upward) == len(tasks):
            raise ArgumentError(argument, "", f"{problem}; give it the same sign")
        warn(problem)


def try_task(env, argument, phi, names):
    """A random episode on the task φ. Raises ArgumentError."""
    try:
        return random_episode(env, phi)
    except BrokenPromise as error:
        raise ArgumentError("name", env.dynamics.env_id, str(error)) from error
    except Exception as error:  # whatever it may raise at values that it was not written for
        where = f"{', '.join(names)} = {shown_task(env.dynamics, phi, names)}"
        problem = f"{env.dynamics.env_id} fails at {where} ({with_place(error)}); give others"
        raise ArgumentError(argument, "", problem) from error


def shown_task(dynamics, phi, names):
    return " ".join(f"{x:g}" for name, x in zip(dynamics.names, phi, strict=True) if name in names)


def try_new(env, argument, phi, names):
    """`try_task` with an instance that is new, so that no state differs."""
    new = replace(env, dynamics=env.dynamics.changed())
    with seeded():
        episode = try_task(new, argument, phi, names)
    new.dynamics.instances[0].close()
    return episode


def random_episode(env, phi):
    """What is seen and paid under random actions, always the same, in `horizon` steps at most."""
    instance = env.dynamics.instance(0, phi)
    instance.action_space.seed(0)
    episode, over = [promised_reset(instance)], False
    while not over and len(episode) <= min(env.horizon, MOST_STEPS):
        seen, over, info = promised_step(instance)
        names = info if isinstance(info, dict) else {}
        numbers = {x for x in names if is_info(x) and not math.isnan(number_in(info, x))}
        env.dynamics.tried.update(numbers)
        episode.append(seen)
    return episode


def promised_reset(instance):
    result = instance.reset(seed=0)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise BrokenPromise("its reset returns no pair; expected (observation, info)")
    return promised_observation(instance, result[0])


def promised_step(instance):
    """The next observation and the reward as a list, whether the episode is over, and its info."""
    result = instance.step(instance.action_space.sample())
    if not (isinstance(result, tuple) and len(result) == 5):
        expected = "(observation, reward, terminated, truncated, info)"
        raise BrokenPromise(f"its step returns other than five values; expected {expected}")
    obs, reward, terminated, truncated, info = result
    try:
        reward = float(np.asarray(reward).item())  # also of shape (1,), a common mistake
    except (TypeError, ValueError) as error:
        problem = f"its reward is {reward!r}, of shape {np.shape(reward)}"
        raise BrokenPromise(f"{problem}; expected one number, e.g. float(reward.sum())") from error
    if not math.isfinite(reward):
        raise ValueError(f"its reward is {reward}")
    return [*promised_observation(instance, obs), reward], bool(terminated or truncated), info


def promised_observation(instance, obs):
    expected = instance.observation_space.shape
    if np.shape(obs) != expected:
        raise BrokenPromise(f"its observation has shape {np.shape(obs)}, its observation_space {expected}")
    if not np.isfinite(obs).all():
        raise ValueError("its observation is not finite")
    return np.ravel(obs).tolist()


def number_in(info, name):
    """What an environment's info says of a name: a number that a report reads, a switch as 0 or 1,
    NaN for all else."""
    value = info.get(name) if isinstance(info, dict) else None
    if isinstance(value, np.generic):
        value = value.item()
    is_number = isinstance(value, Real) and abs(value) <= HUGE
    return float(value) if is_number else math.nan


def warn_of_missing(dynamics, names):
    """Warn of each of the names that no trial episode reports: it may be misspelt, or may be
    reported later, as where a task is solved."""
    for name in names:
        if name not in dynamics.tried:
            reported = ", ".join(sorted(dynamics.tried)) or "no number at all"
            warn(f"{dynamics.env_id} reports no number {name} in a trial episode, but {reported}")


@contextlib.contextmanager
def seeded():
    """Inside, Python's and numpy's own random numbers are the same each time."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    np.random.seed(0)
    random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
