"""torchrun's ranks: processes, perhaps on several machines, that share the tasks of one training."""

import contextlib
import os
import re
import signal
import sys
import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from harness.checkpoints import RunError
from harness.processes import ProcessError, end_with_parent
from harness.settings import ALL_SETTINGS, default_of

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


def check_ranks(args, ranks):
    """All ranks must do the same, and have equally many tasks."""
    own = {key: value for key, value in vars(args).items() if key not in ("workers", "threads", "quiet")}
    for key, value in ranks.object_from_first(lambda: own).items():
        if own[key] != value:
            mine, first = (" ".join(map(str, x)) if isinstance(x, list) else x for x in (own[key], value))
            line = f"{ALL_SETTINGS[key].flag}: {mine} on rank {ranks.rank}, {first} on rank 0"
            raise RunError(f"{line}; start all with the same command", 2)
    tasks = args.tasks or default_of(ALL_SETTINGS["tasks"])
    if tasks % ranks.count:
        ranks.sum([torch.zeros(1)])  # all have come so far; or a slow one would lose its peer before it refuses this
        raise RunError(f"--tasks {tasks}: not a multiple of the {ranks.count} ranks; give a multiple", 2)
