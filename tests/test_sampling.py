"""Sampling workers: the bits of one process, and one clear line when another one dies."""

import os
import sys

import pytest
import torch

from bench import compare
from envs import rollout
from harness import sampling
from harness.checkpoints import RunError
from harness.gyms import make
from harness.processes import ProcessError
from harness.sampling import Workers
from tests.commands import train
from tests.noise import in_numpy, noise_itself, noise_of, tasks_of

GYM = ["--param", "g", "--range", "5", "15"]
PENDULUM = ["--env", "Pendulum-v1", *GYM, "--algo", "fomaml", "--workers", "2"]
PENDULUM_RUN = "Pendulum-v1-pg/fomaml/seed1"
COMMAND = ["--env", "point", "--algo", "directed-maml", "--seed", 1, 2, "--tasks", 10]  # of ranks
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def random_actions(params):
    """A policy that acts by noise alone, nearly; importable, as worker processes need it where they are spawned."""
    return most_noise


def most_noise(obs, noise):
    return (noise + 0.1 * obs[..., :1]).argmax(-1)


def noise_or_failure(params):
    """Fails under parameters, and acts without."""
    if params:
        raise FloatingPointError("no such luck")
    return noise_itself(params)


def same(ours, theirs):
    """The same trajectories to the last bit."""
    return ours.keys() == theirs.keys() and all((x == theirs[key]).all() for key, x in ours.items())


@pytest.fixture(scope="module")
def lander():
    """An environment, φ, noise and the trajectories of a LunarLander rollout in this process."""
    env = make("lunarlander", horizon=120)
    noise = noise_of(env, [0, 1], 0, 3, 3)
    phi, noise = in_numpy(tasks_of(env, [0, 1], 1, 3), noise)
    return env, phi, noise, rollout(env, most_noise, phi, noise)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_workers_change_no_bit(lander, count):
    env, phi, noise, expected = lander
    with Workers(env, random_actions, count) as workers:
        trajectories = workers.rollout({}, phi, noise)
    assert same(trajectories, expected)


def test_more_workers_than_trajectories_change_no_bit(pendulum):
    env, phi, noise = pendulum
    with Workers(env, noise_itself, 3) as workers:
        trajectories = workers.rollout({}, phi, noise)
    assert same(trajectories, rollout(env, noise_itself({}), phi, noise))


def test_what_fails_in_a_worker_is_said_here_and_it_serves_on(pendulum):
    env, phi, noise = pendulum
    with Workers(env, noise_or_failure, 2) as workers:
        says = "the environment failed in a sampling worker: FloatingPointError: no such luck"
        with pytest.raises(RunError, match=says):
            workers.rollout({"w": torch.zeros(1)}, phi, noise)
        assert same(workers.rollout({}, phi, noise), rollout(env, noise_itself({}), phi, noise))


def test_what_fails_in_this_process_is_said_the_same_way(pendulum):
    env, phi, noise = pendulum
    with pytest.raises(RunError, match="the environment failed: FloatingPointError: no such luck"):
        sampling.rollout_of_stranger(env, noise_or_failure, {"w": torch.zeros(1)}, phi, noise)


def test_a_dead_worker_is_noticed_and_none_is_left(pendulum):
    env, phi, noise = pendulum
    with Workers(env, noise_itself, 2) as workers:
        workers.rollout({}, phi, noise)
        workers.processes[1].kill()
        workers.processes[1].join()
        with pytest.raises(ProcessError, match="a sampling worker died"):
            workers.rollout({}, phi, noise)
        left = workers.processes
    assert not any(process.is_alive() for process in left)


def test_training_does_not_depend_on_the_workers_and_resumes_exactly(tmp_path):
    for name, commands in (("once", [(4, 0)]), ("twice", [(2, 2), (4, 1)])):
        for epochs, workers in commands:
            words = [*GYM, "--workers", workers, "--resume"]
            train(tmp_path / name, *words, env="Pendulum-v1", algo="directed-maml", epochs=epochs)
    assert compare.differences(tmp_path / "once", tmp_path / "twice") == []
