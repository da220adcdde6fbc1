"""envs.py's random numbers as tensors, for the tests that need some."""

import itertools

import torch

import envs
import policies


def noise_of(env, seeds, purpose, num_tasks, num_trajectories, call=1):
    noise = envs.draw_noise(env, envs.stream(seeds, purpose), range(num_tasks), num_trajectories, call)
    return {key: torch.from_numpy(x) for key, x in noise.items()}


def tasks_of(env, seeds, purpose, num_tasks):
    return torch.from_numpy(envs.sample_tasks(env, envs.stream(seeds, purpose), num_tasks))


def uniform_of(seeds):
    """What `policies.init` draws the parameters of runs with these seeds with."""
    stream, calls = envs.stream(seeds, envs.INIT), itertools.count()
    return lambda *shape: torch.from_numpy(envs.uniform(stream, next(calls), range(1), shape))


def rollout_of(env, head, params, phi, noise):
    """envs.rollout in numpy of the policy under params, with tensors in and out."""
    params, noise = ({key: x.detach().numpy() for key, x in d.items()} for d in (params, noise))
    trajectories = envs.rollout(env, policies.actor(params, head), phi.numpy(), noise)
    return {key: torch.from_numpy(x) for key, x in trajectories.items()}


def noise_itself(params):
    return lambda obs, noise: noise


def in_numpy(phi, noise):
    return phi.numpy(), {key: x.numpy() for key, x in noise.items()}
