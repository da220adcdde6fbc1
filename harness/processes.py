"""Processes that this one starts: training processes, which share out the runs, and what all of them need."""

import contextlib
import ctypes
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import traceback
from collections import defaultdict

import torch
import torch.distributed as dist

from harness.device import memory


class ProcessError(RuntimeError):
    """Another process of this command died, or an environment in it failed. The message is one line."""


# --- training processes ---


def share_out(runs, count):
    """The runs as jobs for `count` processes. A job is one batch: runs of one algorithm at the same epoch."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.settings["algo"], run.state["epoch"]].append(run)
    parts = count // math.gcd(count, len(groups))  # the fewest that give all processes equally many jobs
    return [group[i::parts] for group in groups.values() for i in range(min(parts, len(group)))]


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
                error.add_note(traceback.format_exc())  # which a pipe does not carry
                answer = "error", error
            pipe.send(answer)


# --- processes ---


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
