"""What the user sees: one clear line for whatever is wrong, and progress."""

import contextlib
import signal
import sys
import time
import traceback

from tqdm import tqdm

from harness.checkpoints import RunError
from harness.errors import End, ends_seen, with_place
from harness.plan import LESS_MEMORY
from harness.processes import ProcessError
from harness.ranks import Ranks
from harness.text import printable


@contextlib.contextmanager
def one_clear_line(argv=()):
    """Whatever is wrong, with the command or with the machine, ends in one line on standard error and an exit code; of
    several ranks, the one that failed first says it. Where --debug is in argv, the traceback comes before it. Yields
    this process's `Ranks`."""
    ranks = None
    try:
        ranks = Ranks()
        with ends_seen():
            yield ranks
        ranks.leave()
        return
    except BaseException as error:
        said = line_and_code(error)
        if said is None:
            raise
        if "--debug" in argv:
            traceback.print_exc()
    line, code = said
    if ranks is None or ranks.first_to_fail():
        print("run.py:", printable(str(line)), file=sys.stderr)
    if ranks is not None and ranks.count > 1:
        ranks.exit(code)
    raise SystemExit(code)


def line_and_code(error):
    """What to say of an error and the exit code; None of one that nobody expects."""
    if isinstance(error, RunError):
        return error, error.code
    if isinstance(error, ProcessError):
        return f"{error}; continue from the last checkpoint with --resume", 1
    if isinstance(error, OSError):  # a full disk, a folder that is gone or may not be written
        path = error.filename2 or error.filename or "files"  # of two, the one to be put in its place
        return f"{path}: {error.strerror or error}; fix this, then rerun with --resume", 1
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
        return f"out of memory; {LESS_MEMORY}", 1
    if isinstance(error, KeyboardInterrupt):  # outside of training, or the second one
        return "stopped at once; continue from the last checkpoint with --resume", 128 + signal.SIGINT
    if isinstance(error, SystemExit) and not isinstance(error, End):
        return f"the environment's code called exit: {with_place(error)}; take that out", 1
    return None


class Progress:
    """One bar for all runs of the command, counting every run's epochs; without a terminal, a line every 30 seconds."""

    def __init__(self, runs, args, ranks):
        self.show = not args.quiet and ranks.rank == 0
        done = sum(run.state["epoch"] for run in runs)
        self.bar = tqdm(total=args.epochs * len(runs), initial=done, unit="epoch", disable=None if self.show else True)
        self.lines, self.said, self.start = self.show and self.bar.disable, time.monotonic(), time.monotonic()
        self.done, self.begun, self.total = done, done, args.epochs * len(runs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def update(self, news):
        algo, count, mean_return = news
        self.done += count
        self.bar.set_description(algo, refresh=False)
        self.bar.set_postfix(return_post=f"{mean_return:.4g}", refresh=False)
        self.bar.update(count)
        now = time.monotonic()
        if self.lines and now - self.said > 30:
            left = (now - self.start) / (self.done - self.begun) * (self.total - self.done)
            print(f"{algo}: return {mean_return:.4g}; {self.done} of all runs' {self.total} epochs, {left:.0f} s left",
                  file=sys.stderr)  # fmt: skip
            self.said = now
