"""run.py's commands as the tests give them: in this process, or in forked ones, which signals may end."""

import csv
import io
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

import run
from bench.compare import TIMES
from harness import processes

REPOSITORY = Path(run.__file__).parent
SMALL = ["--tasks", "2", "--trajectories", "3", "--horizon", "12", "--hidden", "8", "--eval-every", "2"]
SMALL += ["--eval-steps", "1", "--workers", "1", "--quiet"]
PATIENCE = 120  # seconds that a test waits for what takes one or two on an idle machine


def train(out, *words, env="cartpole", algo="fomaml", epochs=4):
    """Run a small command in this process."""
    run.main(
        ["--env", env, "--algo", *algo.split(), "--epochs", str(epochs), "--out", str(out), *SMALL, *map(str, words)]
    )


def refused(capsys, out, *words, code=2, **kwargs):
    """The one line on standard error of a command that must fail with this exit code."""
    with pytest.raises(SystemExit) as stop:
        train(out, *words, **kwargs)
    captured = capsys.readouterr()
    assert stop.value.code == code and captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("run.py: ")
    return captured.err


def rows(path, without_times=True):
    """The rows of a CSV file, a dict each."""
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if not (without_times and k in TIMES)} for row in csv.DictReader(file)]


def snapshot(folder):
    """{path: content} of all files under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Command:
    """A command in a process and a session of its own. Forked from this one, which has torch loaded: it starts in a few
    milliseconds instead of seconds. It saves a checkpoint every `checkpoint_seconds`."""

    def __init__(self, words, environment=None, checkpoint_seconds=run.CHECKPOINT_SECONDS):
        with tempfile.NamedTemporaryFile(delete=False) as file:
            self.error = Path(file.name)
        environment = {key: str(value) for key, value in (environment or {}).items()}
        self.process = processes.context().Process(
            target=in_child, args=(list(map(str, words)), environment, self.error, checkpoint_seconds)
        )
        self.process.start()
        self.pid = self.process.pid

    def send(self, signum):
        os.kill(self.pid, signum)

    def wait(self):
        """The exit code, negative for a signal that killed it, and the lines on standard error."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"still running: {self.error.read_text()}"
        return self.process.exitcode, self.error.read_text().splitlines()

    def wait_for(self, condition):
        """Wait until the condition holds, while the process lives."""
        wait_for(lambda: condition() or not self.process.is_alive())
        assert self.process.is_alive(), self.error.read_text()

    def wait_for_epoch(self, log, epoch=3):
        """Wait until the log has a row for the epoch."""
        self.wait_for(lambda: log.exists() and len(rows(log)) >= epoch)

    def end(self):
        """Kill it and all that it started."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended, or not yet made its session
            self.process.kill()
        self.process.join()
        self.error.unlink(missing_ok=True)


def in_child(words, environment, error, checkpoint_seconds):
    os.setsid()
    os.environ.update(environment)
    descriptor = os.open(error, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(i, "w"), line_buffering=True) for i in (1, 2))
    run.CHECKPOINT_SECONDS = checkpoint_seconds
    code = 0
    try:
        run.main(words)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
