"""Where rollouts run: numpy in this process, gymnasium's environments in worker processes, or torch on a GPU."""

import contextlib
import math
import time
import traceback
from dataclasses import replace
from functools import partial

import numpy as np
import torch

import envs
import policies
from harness.checkpoints import RunError
from harness.device import step_compiler
from harness.errors import with_place
from harness.gyms import info_names
from harness.processes import ProcessError, end, end_with_parent, signals_blocked, start


@contextlib.contextmanager
def open_sampler(env, head, device, workers):
    """A sampler: sample(params, phi, noise) -> trajectories on params' device, as `envs.rollout` with the policy under
    params, a dict of (S, M, ...).

    On a GPU a rollout is torch's; else it is numpy, and gymnasium's environments step in so many worker processes (0:
    in this one), which live as long as the context. Raises ProcessError.
    """
    make_act = partial(policies.actor, head=head)
    if device != "cpu" and not env.is_gymnasium:
        yield DeviceSampler(env, head, device, step_compiler(device))
    elif not env.is_gymnasium:
        yield HostSampler(partial(rollout_here, env, make_act))
    elif workers == 0:
        yield HostSampler(partial(rollout_of_stranger, env, make_act))
    else:
        with Workers(env, make_act, workers) as processes:
            yield HostSampler(processes.rollout)


class HostSampler:
    """Samples with numpy. phi (S, M, P) and noise are numpy's; params and trajectories are on params' device."""

    def __init__(self, rollout):
        self.rollout, self.seconds = rollout, 0.0

    def placed(self, x):
        """An array where random numbers and tasks must be."""
        return x.numpy() if isinstance(x, torch.Tensor) else x

    def __call__(self, params, phi, noise):
        start = time.perf_counter()
        home = next(iter(params.values())).device
        params = {key: x.detach().cpu().numpy() for key, x in params.items()}
        trajectories = {key: torch.from_numpy(x).to(home) for key, x in self.rollout(params, phi, noise).items()}
        self.seconds += time.perf_counter() - start
        return trajectories

    def take_seconds(self):
        """Seconds of sampling since this was last asked."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class DeviceSampler:
    """Samples with torch, on the device where params, phi and noise are. compiled: torch.compile, or None."""

    def __init__(self, env, head, device, compiled):
        self.env, self.head, self.device, self.compiled = env, head, device, compiled

    def placed(self, x):
        return torch.as_tensor(x).to(self.device)

    @torch.no_grad()
    def __call__(self, params, phi, noise):
        # contiguous: θ seen once per task is a view, for which a step would be compiled again
        params = {key: x.detach().contiguous() for key, x in params.items()}
        return envs.rollout(self.env, policies.actor(params, self.head, torch), phi, noise, torch, self.compiled)

    def take_seconds(self):
        return math.nan  # a GPU samples while Python is ahead of it, and inside a recorded epoch


def rollout_here(env, make_act, params, phi, noise):
    """`envs.rollout`, and where an environment is asked for it also its `info` (S, M, K, N), the
    numbers that it reports at an episode's end."""
    trajectories = envs.rollout(env, make_act(params), phi, noise)
    if info_names(env):
        lead = noise["reset"].shape[:3]
        trajectories["info"] = env.dynamics.reported.reshape(*lead, -1)
    return trajectories


def rollout_of_stranger(env, make_act, params, phi, noise):
    """As `rollout_here`; whatever an environment that is not ours raises is a RunError, which no --resume mends."""
    try:
        return rollout_here(env, make_act, params, phi, noise)
    except (Exception, SystemExit) as error:
        raise RunError(f"the environment failed: {with_place(error)}") from error


# --- sampling processes ---


class Workers:
    """Whole rollouts, policy included, in `count` processes: process i makes every count-th trajectory from the i-th
    on.

    So a worker waits for nothing but its own environments. Each policy sees all trajectories, those of other workers as
    zeros: its matrix products have one shape, hence one rounding, however many workers there are.
    """

    def __init__(self, env, make_act, count):
        self.count, self.pipes, self.processes = count, [], []
        try:
            for index in range(count):
                with signals_blocked():
                    pipe, process = start(serve, env, make_act, index, count, daemon=True)
                    self.pipes.append(pipe)
                    self.processes.append(process)
        except BaseException:  # a second Ctrl-C, or no memory for another process
            self.close()
            raise

    def rollout(self, params, phi, noise):
        """As `rollout_here`. Raises ProcessError."""
        try:
            for pipe in self.pipes:
                pipe.send((params, phi, noise))
            parts = [pipe.recv() for pipe in self.pipes]
        except (EOFError, OSError) as error:
            raise ProcessError(f"a sampling worker died ({type(error).__name__})") from error
        for part in parts:
            if isinstance(part, Exception):
                raise part
        return self.join({i: part for i, part in enumerate(parts) if part}, noise["reset"].shape[:3])

    def join(self, parts, lead):
        """{i: trajectories (n, ...) of process i} -> the trajectories of all (S, M, K, ...) = lead."""
        joined = {}
        for key, x in parts[0].items():
            joined[key] = np.zeros((math.prod(lead), *x.shape[1:]), x.dtype)
            for i, part in parts.items():
                joined[key][i :: self.count] = part[key]
        return {key: x.reshape(*lead, *x.shape[1:]) for key, x in joined.items()}

    def close(self):
        end(self.processes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def serve(pipe, env, make_act, index, count):
    """What a sampling worker runs: answers (params, phi, noise) with its trajectories (n, ...), {} where it has none,
    or a RunError, until the main process ends."""
    end_with_parent()
    torch.set_num_threads(1)
    own = slice(index, None, count)
    env = replace(env, dynamics=env.dynamics.changed(own=own))
    with contextlib.suppress(EOFError, OSError):  # the main process ended
        while True:
            params, phi, noise = pipe.recv()
            try:
                answer = {}
                if index < noise["reset"][..., 0].size:
                    trajectories = rollout_here(env, make_act, params, phi, noise)
                    answer = {key: x.reshape(-1, *x.shape[3:])[own] for key, x in trajectories.items()}
            except (Exception, SystemExit) as error:
                answer = RunError(f"the environment failed in a sampling worker: {with_place(error)}")
                answer.add_note(traceback.format_exc())  # which a pipe does not carry
            pipe.send(answer)
