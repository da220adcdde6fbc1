"""Words for what went wrong."""

import contextlib
import difflib
import os
import sys
import traceback

from harness.text import printable


def first_line(error):
    return printable(f"{type(error).__name__}: {error}".splitlines()[0])


def hint(word, known, choices):
    """What to say about an unknown word: the nearest known one, or else the choices."""
    close = difflib.get_close_matches(word, known, 1, 0.7) or difflib.get_close_matches(word.lower(), known, 1, 0.7)
    return f"did you mean {close[0]}?" if close else f"choose from {choices}"


def with_place(error):
    """`first_line` of an error of code that is not ours, with the file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if frame.filename != __file__] or frames
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f"{first_line(error)} ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})"


class End(SystemExit):
    """An end of the command that is its own; any other SystemExit is of code that is not ours."""


@contextlib.contextmanager
def ends_seen():
    """Inside, os._exit raises SystemExit in this process, as sys.exit does: where an environment
    calls it, the command would end without a word, and with the exit code 0."""
    own, leave = os.getpid(), os._exit

    def seen(code):
        if os.getpid() != own:  # a process forked from this one, which must end here
            leave(code)
        raise SystemExit(code)

    os._exit = seen
    try:
        yield
    finally:
        os._exit = leave


said = set()


def warn(text):
    """Say it on standard error, once; of several ranks, the first does."""
    if text not in said and os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)
    said.add(text)
