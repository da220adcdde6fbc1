"""Where work runs: sampling in worker processes, rollouts as CUDA graphs, training shared out over torchrun's ranks."""

import contextlib
import ctypes
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

import envs
import policies


class ProcessError(RuntimeError):
    """Another process of this command died, or an environment in it failed. The message is one line."""


# --- sampling ---


@contextlib.contextmanager
def open_sampler(env, head, device, workers):
    """sample(params, phi, noise) -> trajectories, on params' device, as `envs.rollout` with the policy under params.

    params: dict of (S, M, ...); phi (S, M, P) and noise on the CPU. gymnasium's environments step on the CPU, in so
    many worker processes (0: in this one), which live as long as the context; all else on `device`. Raises
    ProcessError."""
    make_act = partial(policies.actor, head=head)
    if not env.in_workers:
        rollout = CapturedRollout(env, make_act) if device == "cuda" else partial(rollout_here, env, make_act)
        yield partial(sample_on, device, rollout)
    elif workers == 0:
        yield partial(sample_on, "cpu", partial(rollout_of_stranger, env, make_act))
    else:
        with Workers(env, make_act, workers) as processes:
            yield partial(sample_on, "cpu", processes.rollout)


def sample_on(device, rollout, params, phi, noise):
    """The rollout on a device, wherever params are and its trajectories are wanted."""
    home = next(iter(params.values())).device
    acting = {key: p.detach().to(device) for key, p in params.items()}
    trajectories = rollout(acting, phi.to(device), {key: x.to(device) for key, x in noise.items()})
    return {key: x.to(home) for key, x in trajectories.items()}


def rollout_here(env, make_act, params, phi, noise):
    return envs.rollout(env, make_act(params), phi, noise)


def rollout_of_stranger(env, make_act, params, phi, noise):
    """As `rollout_here`; whatever an environment that is not ours raises is a ProcessError."""
    try:
        return rollout_here(env, make_act, params, phi, noise)
    except Exception as error:
        raise ProcessError(f"the environment failed: {envs.first_line(error)}") from error


class CapturedRollout:
    """Rollouts on a GPU, recorded once for each shape as a CUDA graph and then replayed: a step costs no Python and no
    launch. Cuts the trajectories to the longest episode, with one wait for the GPU."""

    def __init__(self, env, make_act):
        self.env, self.make_act, self.graphs = env, make_act, {}

    def __call__(self, params, phi, noise):
        given = {"phi": phi} | {f"noise {key}": x for key, x in noise.items()} | params
        shapes = tuple((key, x.shape, x.dtype) for key, x in given.items())
        if shapes not in self.graphs:
            self.graphs[shapes] = self.capture({key: x.detach().clone() for key, x in given.items()}, params)
        graph, inputs, trajectories = self.graphs[shapes]
        with torch.no_grad():
            for key, x in given.items():
                inputs[key].copy_(x)
        graph.replay()
        length = int(trajectories["mask"].sum(-1).max())
        return {key: (x[:, :, :, :length] if key in envs.IN_TIME else x).clone() for key, x in trajectories.items()}

    def capture(self, inputs, params):
        """A CUDA graph, the tensors that it reads and the trajectories that it writes."""

        def run():
            noise = {key: inputs[f"noise {key}"] for key in ("reset", "action")}
            return rollout_here(self.env, self.make_act, {key: inputs[key] for key in params}, inputs["phi"], noise)

        warm_up = torch.cuda.Stream()  # as torch asks for: a first run outside the capture, on a stream of its own
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            run()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            trajectories = run()
        return graph, inputs, trajectories


# --- worker processes ---


class Workers:
    """Whole rollouts, policy included, in `count` processes: process i makes every count-th trajectory from the i-th
    on.

    So a worker waits for nothing but its own environments. Each policy sees all trajectories, those of other workers as
    zeros: its matrix products have one shape, hence one rounding, however many workers there are.
    """

    def __init__(self, env, make_act, count):
        self.count, self.pipes, self.processes = count, [], []
        with signals_blocked():
            for index in range(count):
                pipe, end = context().Pipe()
                process = context().Process(target=serve, args=(end, env, make_act, index, count), daemon=True)
                self.pipes.append(pipe)
                self.processes.append(process)
                process.start()
                end.close()

    def rollout(self, params, phi, noise):
        """As `rollout_here`. Raises ProcessError."""
        params, noise = ({key: x.numpy() for key, x in d.items()} for d in (params, noise))
        try:
            for pipe in self.pipes:
                pipe.send((params, phi.numpy(), noise))
            parts = [pipe.recv() for pipe in self.pipes]
        except (EOFError, OSError) as error:
            raise ProcessError(f"a sampling worker died ({type(error).__name__})") from error
        for part in parts:
            if isinstance(part, Exception):
                raise part
        return self.join({i: part for i, part in enumerate(parts) if part}, noise["reset"].shape[:3])

    def join(self, parts, lead):
        """{i: trajectories (n, ...) of process i} -> the trajectories of all (S, M, K, ...) = lead."""
        length = max(part["mask"].shape[1] for part in parts.values())
        joined = {}
        for key, x in parts[0].items():
            in_time = key in envs.IN_TIME
            joined[key] = np.zeros((math.prod(lead), *((length, *x.shape[2:]) if in_time else x.shape[1:])), x.dtype)
            for i, part in parts.items():
                rows = joined[key][i :: self.count]
                (rows[:, : part[key].shape[1]] if in_time else rows)[...] = part[key]
        return {key: torch.from_numpy(x).unflatten(0, lead) for key, x in joined.items()}

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def serve(pipe, env, make_act, index, count):
    """What a sampling worker runs: answers (params, phi, noise) with its trajectories (n, ...), {} where it has none,
    or a ProcessError, until the main process ends."""
    end_with_parent()
    if os.getppid() != multiprocessing.parent_process().pid:  # it had ended before; a forked pipe does not show that
        return
    torch.set_num_threads(1)
    own = slice(index, None, count)
    env = replace(env, dynamics=partial(env.dynamics, own=own))
    with contextlib.suppress(EOFError, OSError):  # the main process ended
        while True:
            params, phi, noise = pipe.recv()
            try:
                params, noise = ({key: torch.from_numpy(x) for key, x in d.items()} for d in (params, noise))
                answer = {}
                if index < noise["reset"][..., 0].numel():
                    trajectories = rollout_here(env, make_act, params, torch.from_numpy(phi), noise)
                    answer = {key: x.flatten(0, 2)[own].numpy() for key, x in trajectories.items()}
            except Exception as error:
                answer = ProcessError(f"the environment failed in a sampling worker: {envs.first_line(error)}")
            pipe.send(answer)


def context():
    """How processes start. Forked, one starts at once; but fork copies no threads, which CUDA and gloo have. Spawned,
    it imports torch anew, which takes seconds."""
    fork = sys.platform == "linux" and not torch.cuda.is_available() and not dist.is_initialized()
    return multiprocessing.get_context("fork" if fork else "spawn")


def end_with_parent(signum=signal.SIGKILL):
    """Have Linux end this process when its parent is gone, however that ended. Elsewhere the closed pipe ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signum)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def signals_blocked():
    """Ctrl-C and SIGTERM are for the main process, which finishes the epoch; but a terminal and a batch system send
    them to all. Processes started inside never see them; those that arrive meanwhile are delivered at the end."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    if context().get_start_method() == "spawn":
        multiprocessing.resource_tracker.ensure_running()  # its own process, which unblocks them when it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def caught_signals():
    """A list to which a first Ctrl-C or SIGTERM is added, so that training ends after its epoch; a second ends at once,
    a third even inside a library."""
    signals = []

    def on_signal(signum, frame):
        signals.append(signum)
        if len(signals) > 1:
            for each in before:
                signal.signal(each, signal.SIG_DFL)
            raise KeyboardInterrupt

    before = {signum: signal.signal(signum, on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def keep_memory():
    """Have glibc reuse freed memory. By default it returns every large tensor to the system, and a sweep of 16 runs
    then spends a third of its time on page faults."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# --- torchrun's ranks ---


class Ranks:
    """The processes that share one training: each adapts to every count-th task, and rank 0 alone writes files.

    One process alone is rank 0 of 1. torchrun sets the environment variables; a lost connection is a ProcessError.
    """

    def __init__(self):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.tasks = slice(self.rank, None, self.count)  # this rank's of M tasks
        if self.count > 1:
            end_with_parent(signal.SIGTERM)  # nobody ends the ranks of a torchrun that was killed
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
            # torchrun keeps the store itself, before there are ranks: if there is none, torchrun was killed meanwhile.
            by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            self.keeps_store = self.rank == 0 and not by_torchrun
            patience = timedelta(seconds=30) if by_torchrun else dist.default_pg_timeout
            with self.connected():
                self.store, *_ = next(dist.rendezvous("env://", timeout=patience))
                self.store.set_timeout(dist.default_pg_timeout)
                dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.count)

    @contextlib.contextmanager
    def connected(self):
        try:
            yield
        except RuntimeError as error:
            reason = re.sub(r"^\[\S*\] ", "", str(error).strip()).split(". ")[0]  # without the place in torch's source
            raise ProcessError(f"rank {self.rank}: another rank stopped ({reason})") from error

    def sum(self, tensors):
        """Each of the tensors becomes its sum over the ranks, in place, in one message."""
        if self.count > 1:
            self.exchange(tensors, dist.all_reduce)

    def take_from_first(self, tensors):
        """Each of the tensors becomes rank 0's, in place, in one message."""
        if self.count > 1:
            self.exchange(tensors, partial(dist.broadcast, src=0))

    @torch.no_grad()
    def exchange(self, tensors, send):
        message = torch.cat([x.flatten() for x in tensors])
        with self.connected():
            send(message)
        for x, part in zip(tensors, message.split([x.numel() for x in tensors]), strict=True):
            x.copy_(part.view_as(x))

    def any(self, signals):
        """The signal that this rank or another has caught, in a list: one answer for all ranks, whenever it comes."""
        caught = torch.tensor([float(len(signals))])
        self.sum([caught])
        return (signals[:1] or [signal.SIGTERM]) if caught else []

    def object_from_first(self, make):
        """What `make()` returns on rank 0."""
        box = [make() if self.rank == 0 else None]
        if self.count > 1:
            with self.connected():
                dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def share(self, meta_learner, learned, average):
        """The meta-learner on this rank's share of the tasks, with the sum of all ranks' meta-gradients in `.grad` of
        the parameters `learned`; or the average, for a meta-learner that averages over tasks itself."""

        def shared_meta_learner(theta, task_loss, alpha, num_tasks):
            self.take_from_first(list(theta.values()))  # after a δ-step, whose rounding may differ between machines
            meta_learner(theta, task_loss, alpha, num_tasks // self.count)
            self.sum([p.grad for p in learned])
            for p in learned:
                p.grad /= self.count if average else 1

        return meta_learner if self.count == 1 else shared_meta_learner

    def leave(self):
        """All ranks stop in good order."""
        if self.count > 1:
            dist.destroy_process_group()

    def first_to_fail(self):
        """True on one rank alone, whose failure is the cause of the others'."""
        try:
            return self.count == 1 or self.store.add("failures", 1) == 1
        except RuntimeError:  # the store went with the rank that kept it
            return True

    def exit(self, code):
        """End a rank that failed at once, since torch's tear-down may abort over a lost peer; but rank 0, if it keeps
        the store, after the others know."""
        deadline = time.monotonic() + 3
        with contextlib.suppress(RuntimeError):
            while self.keeps_store and self.store.add("failures", 0) < self.count and time.monotonic() < deadline:
                time.sleep(0.02)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
