"""Seconds, memory and profile of one configuration of run.py's, in a process of its own. Used by benchmark.py."""

import contextlib
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch

import maml
import policies
import run
from bench import reference
from harness import log, processes, ranks, sampling
from harness.log import Rows
from harness.plan import make_env
from harness.settings import parse
from harness.start import new_runs

WARM_UP = 2  # epochs: until then large batches get their memory from the system, at twice the time


@dataclass(frozen=True)
class Configuration:
    """S runs of an algorithm; design: the shipped code's, or the conventional one."""

    env: str
    algo: str
    S: int
    M: int
    K: int
    H: int | None  # None: the environment's
    hidden: int
    design: str = "shipped"

    def plan(self):
        """What run.py makes of it: the task family and the runs."""
        words = ["--env", self.env, "--algo", self.algo, "--seed", *range(1, self.S + 1), "--tasks", self.M]
        words += ["--trajectories", self.K, "--hidden", self.hidden, self.hidden]
        args = parse([str(word) for word in words + (["--horizon", self.H] if self.H else [])])
        env = make_env(args)
        return env, new_runs(args, env)


def endless(env):
    """The task family with every trajectory of full length: the most work there can be, and always the same.

    gymnasium's environments, which worker processes hold, stay as they are.
    """

    def dynamics(phi, noise, xp):
        state, step = env.dynamics(phi, noise, xp)
        never = noise[..., 0] < 0
        return state, lambda state, action: (*step(state, action)[:2], never, never)

    return env if env.is_gymnasium else replace(env, dynamics=dynamics)


@contextlib.contextmanager
def opened(env, runs, device):
    """A batch of runs, ready to train as run.py trains them."""
    torch.set_num_threads(1)
    processes.keep_memory()
    head = policies.make_head(env.actions)
    with sampling.open_sampler(env, head, device, os.cpu_count()) as sample:
        yield run.Batch(runs, env, head, sample, device, ranks.Ranks(), Rows(writes=False))


def opened_endless(configuration, device):
    """The configuration's batch, with trajectories of full length."""
    env, runs = configuration.plan()
    return opened(endless(env), runs, device)


def clock():
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_epoch(batch, epoch=run.train_epoch):
    """Seconds of one epoch and, on a CPU, of its parts, which add up to it; and its env steps.

    epoch: run.train_epoch, or that `Recorded`. "outer" is what is neither sampling nor the inner gradient: the δ-step's
    gradient and the optimiser too.
    """
    inner, adapt, on_cpu = [], maml.adapt, batch.device == "cpu"

    def timed_adapt(*args, **kwargs):
        start, sampled = clock(), batch.sample.seconds
        adapted = adapt(*args, **kwargs)
        inner.append(clock() - start - (batch.sample.seconds - sampled))
        return adapted

    batch.sample.take_seconds()
    batch.set_schedules()
    start = clock()
    with mock.patch.object(maml, "adapt", timed_adapt) if on_cpu else contextlib.nullcontext():
        measured = log.fetched(epoch(batch))
    timed = {"epoch": clock() - start}
    timed["env_steps"] = int(sum(measured[name].sum() for name in ("env_steps", "medium_steps") if name in measured))
    if on_cpu:
        timed |= {"sampling": batch.sample.take_seconds(), "inner": sum(inner)}
        timed["outer"] = timed["epoch"] - timed["sampling"] - timed["inner"]
    return timed


def repeat(epoch, seconds):
    """The median of the epochs in so many seconds, one at least, after WARM_UP. epoch: a function that times one."""
    for _ in range(WARM_UP):
        epoch()
    start, epochs = clock(), []
    while not epochs or clock() - start < seconds:
        epochs.append(epoch())
    return median_epoch(epochs)


def make_reference_epoch(configuration):
    """A function that trains one epoch by the conventional design; returns its seconds and env steps."""
    torch.set_num_threads(1)
    env, [planned] = configuration.plan()
    settings = planned.settings
    policy = reference.make_policy(configuration.hidden)
    sample = reference.make_sampler(policy, settings["trajectories"], settings["horizon"])
    optimizer = torch.optim.SGD(policy.parameters(), settings["beta"])
    alpha, gamma, delta = (settings[key] for key in ("alpha", "gamma", "delta"))
    second_order = configuration.algo != "fomaml"

    def epoch():
        start, sample.env_steps = clock(), 0
        if delta is not None:
            reference.medium_step(policy, sample, sum(env.low + env.high) / 2, delta, gamma)
        gravities = torch.empty(settings["tasks"]).uniform_(*env.low, *env.high).tolist()
        reference.meta_gradient(policy, sample, gravities, alpha, gamma, second_order)
        optimizer.step()
        return {"epoch": clock() - start, "env_steps": sample.env_steps}

    return epoch


def median_epoch(epochs):
    return sorted(epochs, key=lambda epoch: epoch["epoch"])[len(epochs) // 2]


def measure(configuration, device, seconds=0.5):
    """The median of the epochs in so many seconds, one at least, after WARM_UP; and the peak memory, MB."""
    with contextlib.ExitStack() as stack:
        if configuration.design == "shipped":
            epoch = partial(time_epoch, stack.enter_context(opened_endless(configuration, device)))
        else:
            epoch = make_reference_epoch(configuration)
        return repeat(epoch, seconds) | {"memory": peak_memory(device)}


def peak_memory(device):
    """MB: of the GPU, or of this process and its workers, each taken to be as large as the largest."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    own, worker = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (own + os.cpu_count() * worker) * (1 if sys.platform == "darwin" else 1024) / 1e6


def profile(configuration, device):
    """One epoch by torch's profiler, after WARM_UP: {operation: (calls, seconds of its own)}, and "Python"."""
    on_gpu = device == "cuda"
    activities = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
    with opened_endless(configuration, device) as batch:
        for _ in range(WARM_UP):
            run.train_epoch(batch)
        with torch.profiler.profile(activities=activities) as profiler:
            start = clock()
            run.train_epoch(batch)
            seconds = clock() - start
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    spent = {event.key: (event.count, getattr(event, own) / 1e6) for event in profiler.key_averages()}
    return spent | {"(Python, or idle)": ("", seconds - sum(s for _, s in spent.values()))}


def in_fresh_processes(function, *calls):
    """function(*call) for every call at once, each in a process of its own that has imported this module only."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.measure", "torch._dynamo"])  # the latter for torch.optim, in the reference
    with ProcessPoolExecutor(len(calls), context, max_tasks_per_child=1) as pool:
        return [future.result() for future in [pool.submit(function, *call) for call in calls]]
