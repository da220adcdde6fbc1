"""Where work runs: training and sampling in processes, rollouts as CUDA graphs, tasks on torchrun's ranks."""

import contextlib
import ctypes
import math
import multiprocessing
import multiprocessing.connection
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
from harness.checkpoints import RunError
from harness.errors import first_line, with_place


class ProcessError(RuntimeError):
    """Another process of this command died, or an environment in it failed. The message is one line."""


# --- sampling ---


@contextlib.contextmanager
def open_sampler(env, head, device, workers):
    """sample(params, phi, noise) -> trajectories, on params' device, as `envs.rollout` with the policy under params.

    params: dict of (S, M, ...); phi (S, M, P) on the CPU. On CUDA a rollout is a graph; else it is numpy, and
    gymnasium's environments step in so many worker processes (0: in this one), which live as long as the context.
    Raises ProcessError.
    """
    make_act = partial(policies.actor, head=head)
    if device == "cuda" and not env.is_gymnasium:
        yield CapturedRollout(env, partial(make_act, xp=torch))
    elif not env.is_gymnasium:
        yield partial(with_numpy, partial(rollout_here, env, make_act))
    elif workers == 0:
        yield partial(with_numpy, partial(rollout_of_stranger, env, make_act))
    else:
        with Workers(env, make_act, workers) as processes:
            yield partial(with_numpy, processes.rollout)


def with_numpy(rollout, params, phi, noise):
    """The rollout on numpy arrays, wherever params are and its trajectories are wanted."""
    home = next(iter(params.values())).device
    params, noise = ({key: x.detach().cpu().numpy() for key, x in d.items()} for d in (params, noise))
    return {key: torch.from_numpy(x).to(home) for key, x in rollout(params, phi.numpy(), noise).items()}


def rollout_here(env, make_act, params, phi, noise):
    return envs.rollout(env, make_act(params), phi, noise)


def rollout_of_stranger(env, make_act, params, phi, noise):
    """As `rollout_here`; whatever an environment that is not ours raises is a RunError, which no --resume mends."""
    try:
        return rollout_here(env, make_act, params, phi, noise)
    except Exception as error:
        raise RunError(f"the environment failed: {with_place(error)}") from error


class CapturedRollout:
    """Rollouts on a GPU, recorded once for each shape as a CUDA graph and then replayed: a step costs no Python and no
    launch. Where a rollout cannot be recorded it runs as it is, and one line says so."""

    def __init__(self, env, make_act):
        self.env, self.make_act, self.graphs = env, make_act, {}

    def __call__(self, params, phi, noise):
        given = {"phi": phi} | {f"noise {key}": x for key, x in noise.items()} | params
        device = next(iter(params.values())).device
        shapes = tuple((key, x.shape, x.dtype) for key, x in given.items())
        if shapes not in self.graphs:
            inputs = {key: x.detach().to(device, copy=True) for key, x in given.items()}
            try:
                self.graphs[shapes] = self.capture(inputs, list(params))
            except RuntimeError as error:
                print(f"rollouts run without a CUDA graph, so more slowly ({first_line(error)[:150]})")
                self.graphs[shapes] = None, inputs, None
        graph, inputs, trajectories = self.graphs[shapes]
        with torch.no_grad():
            for key, x in given.items():
                inputs[key].copy_(x)
            if graph is None:
                return self.run(inputs, list(params))
            graph.replay()
            return {key: x.clone() for key, x in trajectories.items()}

    def run(self, inputs, names):
        noise = {key: inputs[f"noise {key}"] for key in ("reset", "action")}
        return envs.rollout(self.env, self.make_act({key: inputs[key] for key in names}), inputs["phi"], noise, torch)

    @torch.no_grad()
    def capture(self, inputs, names):
        """A CUDA graph, the tensors that it reads and the trajectories that it writes."""
        warm_up = torch.cuda.Stream()  # as torch asks for: a first run outside the capture, on a stream of its own
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            self.run(inputs, names)
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            trajectories = self.run(inputs, names)
        return graph, inputs, trajectories


# --- training processes ---


def run_jobs(work, jobs, count, tell, signals):
    """All that work(job, tell) returns, a list for each job, in so many processes; in this one where count is 1.

    tell(news) hands on what a job says and returns `signals`, the list of those caught: work then ends soon. Where a
    process dies or work raises, the others are asked to end before the error is raised here.
    """
    if min(count, len(jobs)) == 1:
        return [x for job in jobs if not signals for x in work(job, lambda news: tell(news) or signals)]
    queue, results, errors, stopped = list(range(len(jobs)))[::-1], [], [], False
    pipes = {}
    try:
        for _ in range(min(count, len(jobs))):
            with signals_blocked():
                pipe, process = start(serve_jobs, work, jobs)
                pipes[pipe] = process
            pipe.send(queue.pop())
        busy = set(pipes)
        while busy:
            for pipe in multiprocessing.connection.wait(busy, timeout=0.2):
                try:
                    kind, value = pipe.recv()
                except (EOFError, OSError):
                    kind, value = "error", ProcessError("a training process died")
                if kind == "news":
                    tell(value)
                    continue
                (results.extend if kind == "done" else errors.append)(value)
                if kind == "done" and queue and not (signals or errors):
                    pipe.send(queue.pop())
                else:
                    busy.remove(pipe)
            if (signals or errors) and not stopped:
                stopped = True
                for pipe in busy:
                    with contextlib.suppress(OSError):  # it died, which the next turn sees
                        pipe.send(signals[:1] or [signal.SIGTERM])
    finally:
        end(pipes.values())
    if errors:
        raise errors[0]
    return results


def serve_jobs(pipe, work, jobs):
    """What a training process runs: the jobs whose numbers it is sent, until the main process ends."""
    end_with_parent()

    def tell(news):
        pipe.send(("news", news))
        return pipe.recv() if pipe.poll() else []

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the main process ended
        while True:
            order = pipe.recv()
            if not isinstance(order, int):  # a stop that came after the last job's end
                return
            try:
                answer = "done", work(jobs[order], tell)
            except Exception as error:
                answer = "error", error
            pipe.send(answer)


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
    or a ProcessError, until the main process ends."""
    end_with_parent()
    torch.set_num_threads(1)
    own = slice(index, None, count)
    env = replace(env, dynamics=partial(env.dynamics, own=own))
    with contextlib.suppress(EOFError, OSError):  # the main process ended
        while True:
            params, phi, noise = pipe.recv()
            try:
                answer = {}
                if index < noise["reset"][..., 0].size:
                    trajectories = rollout_here(env, make_act, params, phi, noise)
                    answer = {key: x.reshape(-1, *x.shape[3:])[own] for key, x in trajectories.items()}
            except Exception as error:
                answer = RunError(f"the environment failed in a sampling worker: {with_place(error)}")
            pipe.send(answer)


# --- processes and signals ---


def start(target, *args, daemon=False):
    """A process that runs target(pipe, *args), started: (this side's end of the pipe, the process)."""
    ours, theirs = context().Pipe()
    process = context().Process(target=target, args=(theirs, *args), daemon=daemon)
    process.start()
    theirs.close()
    return ours, process


def end(processes):
    with signals_blocked():  # or a second Ctrl-C would leave some, and Python's own end waits for them
        for process in processes:
            process.kill()
    for process in processes:
        process.join()


def memory(device="cpu"):
    """Bytes of memory that this machine, or its CUDA device, has; infinity where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def most_processes():
    """As many as fit into half the memory: a forked one shares most of its own, a spawned one loads torch anew."""
    each = 100e6 if context().get_start_method() == "fork" else 500e6
    return max(min(memory() / 2 / each, 1024) // 1, 1)


def context():
    """How processes start. Forked, one starts at once; but fork copies no threads, which CUDA and gloo have. Spawned,
    it imports torch anew, which takes seconds."""
    fork = sys.platform == "linux" and not torch.cuda.is_available() and not dist.is_initialized()
    return multiprocessing.get_context("fork" if fork else "spawn")


def end_with_parent(signum=signal.SIGKILL):
    """Have Linux end this process when its parent is gone, however that ended. Elsewhere the closed pipe ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signum)  # PR_SET_PDEATHSIG
        parent = multiprocessing.parent_process()
        if parent and os.getppid() != parent.pid:  # it had ended before; a pipe that was forked does not show that
            os.kill(os.getpid(), signum)


@contextlib.contextmanager
def signals_blocked():
    """Ctrl-C and SIGTERM are for the main process, which finishes the epoch; but a terminal and a batch system send
    them to all. A process started inside never sees them; those that arrive meanwhile are delivered at the end, before
    the next one is started."""
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

LAST_WORDS_SECONDS = 3  # that rank 0, if it keeps the store, stays for the others at most when it fails


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
        """The list of the signals that this rank has caught; where another has, SIGTERM is added to an empty one: one
        answer for all ranks, whenever a signal comes."""
        caught = torch.tensor([float(len(signals))])
        self.sum([caught])
        if caught and not signals:
            signals.append(signal.SIGTERM)
        return signals if caught else []

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

        def shared_meta_learner(theta, task_loss, alpha, num_tasks, **switches):
            self.take_from_first(list(theta.values()))  # after a δ-step, whose rounding may differ between machines
            returned = meta_learner(theta, task_loss, alpha, num_tasks // self.count, **switches)
            self.sum([p.grad for p in learned])
            for p in learned:
                p.grad /= self.count if average else 1
            return returned

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
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        with contextlib.suppress(RuntimeError):
            while self.keeps_store and self.store.add("failures", 0) < self.count and time.monotonic() < deadline:
                time.sleep(0.02)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
