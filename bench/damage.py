"""Damage to the files of runs, and what --resume, the report and others make of it. Run by
`python bench/torture.py --kind truncations operations files`; each of these three functions gives
how many runs it tried, and a line for each that failed.
"""

import builtins
import contextlib
import copy
import csv
import errno
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

import run
from bench.compare import differences
from harness import checkpoints, figures, trained
from harness.checkpoints import CHECKPOINT, PENDING

WORDS = "--env point --algo fomaml --tasks 2 --trajectories 2 --horizon 3 --hidden 2 --quiet"
WORDS += " --eval-every 2 --eval-steps 1 --workers 1"
FIRST, SECOND = "point-pg/fomaml/seed1", "point-pg/fomaml/seed2"
CRASHED = 77
SECONDS, MEMORY = 100, 2**31  # what a command may take


# --- commands, each in a process of its own ---


def train(out, *words, epochs):
    run.main([*WORDS.split(), "--epochs", str(epochs), "--out", str(out), *words])


def outcome(function):
    """The exit code of function() in a forked process, and its standard error. A negative code is
    the signal that ended it; SIGALRM: it took too long."""
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            in_child(function, file)
        _, status = os.waitpid(child, 0)
        file.seek(0)
        return os.waitstatus_to_exitcode(status), file.read().decode(errors="replace")


def in_child(function, file):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = io.TextIOWrapper(io.FileIO(1, "w")), io.TextIOWrapper(io.FileIO(2, "w"))
    signal.alarm(SECONDS)
    limit_memory()
    code = 0
    try:
        function()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def limit_memory():
    import resource  # Windows has none

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def wrong_with(code, error):
    """What is wrong with a command that may fail; "" where it trained, or said why not in lines of
    its own."""
    lines = error.splitlines()
    own = all(line.startswith("run.py: ") and line.isprintable() for line in lines)
    good = own and "out of memory" not in error and (code == 0 or (code in (1, 2) and len(lines) == 1))
    return "" if good else f"exit code {code}: {error[-400:]}"


def wrong_after_resume(out, whole, epochs):
    """What is wrong with the runs in `out`, continued, which are to be those in `whole`."""
    code, error = outcome(lambda: train(out, "--seed", "1", "2", "--resume", epochs=epochs))
    if code or error:
        return f"--resume ended with {code}: {error[-400:]}"
    return ", ".join(differences(whole, out))


@contextlib.contextmanager
def prepared(*epochs):
    """A folder with two runs of so many epochs each, in folders of these names."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(figures, "draw", lambda labels, root: []),  # they take seconds
        mock.patch.object(run, "CHECKPOINT_SECONDS", 0.0),
    ):
        torch.set_num_threads(1)
        for count in epochs:
            train(Path(folder, str(count)), "--seed", "1", "2", epochs=count)
        yield Path(folder)


def spread(count, limit):
    """`limit` of the numbers 0, .., count - 1, first and last among them, or all."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).astype(int)).tolist()


# --- a checkpoint that was cut off while it was written ---


def truncations(limit, seed):
    """A kill while the second run's checkpoint of epoch 3 was written, after each length: the first
    run's is pending or, as after a crash of the disk, in its place."""
    failures, count = [], 0
    with prepared(2, 3, 5) as folder:
        new = {run: (folder / "3" / run / CHECKPOINT).read_bytes() for run in (FIRST, SECOND)}
        lengths = spread(len(new[SECOND]) + 1, max(limit // 2, 2))
        for length, name in tqdm(list(itertools.product(lengths, (PENDING, CHECKPOINT)))):
            out = shutil.copytree(folder / "2", folder / "cut")
            (out / FIRST / name).write_bytes(new[FIRST])
            (out / SECOND / PENDING).write_bytes(new[SECOND][:length])
            problem = wrong_after_resume(out, folder / "5", 5)
            if problem:
                failures.append(f"{length} bytes, the other in {name}: {problem}")
            shutil.rmtree(out)
            count += 1
    return count, failures


# --- a file operation that fails, or is the last ---


def crash(last, number, writes):
    if number == last:
        os._exit(CRASHED)


def full_disk(last, number, writes):
    if number >= last and writes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def one_error(last, number, writes):
    if number == last:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@contextlib.contextmanager
def operations_of(folder, before):
    """Inside, before(number, writes) is called before every file operation in the folder: open,
    write (half of it is done), fsync, rename, unlink, mkdir. Yields the iterator of the numbers."""
    numbers = itertools.count()

    def is_inside(path):
        return not isinstance(path, (str, os.PathLike)) or Path(path).is_relative_to(folder)

    def counted(function, writes):
        def operation(path, *args, **options):
            if is_inside(path):
                before(next(numbers), writes)
            return function(path, *args, **options)

        return operation

    def opened(path, mode="r", *args, **options):
        writes = not mode.startswith("r")
        if isinstance(path, int) or not is_inside(path):
            return real_open(path, mode, *args, **options)
        before(next(numbers), writes)
        file = real_open(path, mode, *args, **options)
        if writes:
            file.write = partial(write_in_halves, file, file.write)
        return file

    def write_in_halves(file, write, data):
        half = len(data) // 2
        written = write(data[:half])
        file.flush()
        before(next(numbers), True)
        return written + write(data[half:])

    real_open = builtins.open
    with contextlib.ExitStack() as patches:
        for name in ("fsync", "replace", "mkdir"):
            patches.enter_context(mock.patch.object(os, name, counted(getattr(os, name), True)))
        for name in ("open", "unlink"):
            patches.enter_context(mock.patch.object(os, name, counted(getattr(os, name), False)))
        for module in (builtins, io):
            patches.enter_context(mock.patch.object(module, "open", opened))
        yield numbers


def operations(limit, seed):
    """A crash at each file operation of a command that begins or continues two runs, a disk that is
    full from there on, and an operation that fails alone; then --resume."""
    failures, count = [], 0
    faults, commands = (crash, full_disk, one_error), ((), (2,))  # from no epoch on, or from 2
    with prepared(2, 4) as folder:
        out = folder / "damaged"

        def begin(start):
            shutil.rmtree(out, ignore_errors=True)
            for epochs in start:
                shutil.copytree(folder / str(epochs), out)

        def attempt(before):
            with operations_of(out, before) as numbers:
                train(out, "--seed", "1", "2", "--resume", epochs=4)
            return next(numbers)

        for start, fault in tqdm(list(itertools.product(commands, faults))):
            begin(start)
            total = attempt(lambda number, writes: None)
            for last in spread(total, max(limit // 6, 2)):
                begin(start)
                before = partial(fault, last)
                code, error = outcome(lambda before=before: attempt(before))
                problem = "" if code == CRASHED and not error else wrong_with(code, error)
                problem = problem or wrong_after_resume(out, folder / "4", 4)
                if problem:
                    failures.append(f"{fault.__name__} at {last} of {total}: {problem}")
                count += 1
    return count, failures


# --- hostile files ---


def nested(depth):
    x = []
    for _ in range(depth):
        x = [x]
    return x


DEEP = "in place of which a deep list is written"
VALUES = [math.nan, math.inf, 1e308, 1e-308, 10**400, 10**12, -1, 0, 0.5, None, True, [], {}, [1, 2]]
VALUES += [{"a": {"b": 1}}, "", "x", "x" * 10**6, "\x1b[31m\x07", "=HYPERLINK(1)", '"', "../../x", "\udcff", DEEP]
TENSORS = [
    lambda x: x * math.nan,
    lambda x: x * math.inf,
    lambda x: x[..., :1],
    lambda x: x.double(),
    lambda x: x.to(torch.complex64),
    lambda x: x.to_sparse(),
    lambda x: x.to("meta"),
    lambda x: torch.zeros(1).expand(10**10),
    lambda x: torch.zeros(0),
]


def json_with(change):
    def damage(path):
        config = change(json.loads(path.read_text()))
        text = json.dumps(config).replace(json.dumps(DEEP), "[" * 10**5 + "]" * 10**5)
        path.write_text(text)

    return damage


def csv_with(line, column, value):
    def damage(path):
        with open(path, newline="") as file:
            lines = list(csv.reader(file))
        lines[line][column] = value
        text = "".join(",".join(map(str, cells)) + "\n" for cells in lines)
        path.write_text(text, errors="surrogateescape")

    return damage


def state_with(keys, change):
    def damage(path):
        state = torch.load(path, weights_only=True)
        place = state
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = change(place[keys[-1]])
        path.write_bytes(checkpoints.packed(state))

    return damage


def instead(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(2**40)


# what stands in the place of a file
OTHERS = {
    "nothing": lambda path: None,
    "an empty file": Path.touch,
    "a folder": Path.mkdir,
    "a FIFO": lambda path: os.mkfifo(path),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to zeros without end": lambda path: path.symlink_to("/dev/zero"),
    "a link to a file of the other run": lambda path: path.symlink_to(f"../seed2/{path.name}"),
    "a terabyte": sparse,
    "random bytes": lambda path: path.write_bytes(random.Random(0).randbytes(10**4)),
    "a deep list": lambda path: path.write_text("[" * 10**6),
    "a long line": lambda path: path.write_text("x," * 10**6),
}


def all_damages(folder):
    """[(file, what is done to it, function of its path)] of a run."""
    damages = [(name, kind, instead(make)) for name in checkpoints.RUN_FILES for kind, make in OTHERS.items()]
    config = json.loads((folder / "config.json").read_text())
    for value in VALUES:
        shown = repr(value)[:30]
        damages.append(("config.json", shown, json_with(lambda config, value=value: value)))
        for key in config:
            change = json_with(lambda config, key=key, value=value: config | {key: value})
            damages.append(("config.json", f"{key} = {shown}", change))
        for name, columns in checkpoints.TABLES.items():
            for line, column in itertools.product((0, 1, -1), range(len(columns))):
                what = f"line {line}, {columns[column]} = {shown}"
                damages.append((f"{name}.csv", what, csv_with(line, column, value)))
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    for keys, x in leaves(state):
        changes = [lambda x, value=value: nested(200) if value is DEEP else copy.deepcopy(value) for value in VALUES]
        for i, change in enumerate(changes + (TENSORS if torch.is_tensor(x) else [])):
            where = ".".join(map(str, keys))
            damages.append((CHECKPOINT, f"{where}, change {i}", state_with(keys, change)))
    return damages


def leaves(x, keys=()):
    """All that is in a state, of lists the first and the last, with the keys that lead to it."""
    if keys:
        yield keys, x
    parts = ()
    if isinstance(x, dict):
        parts = x.items()
    elif isinstance(x, list) and x:
        parts = {0: x[0], len(x) - 1: x[-1]}.items()
    for key, part in parts:
        yield from leaves(part, (*keys, key))


def files(limit, seed):
    """Hostile values in every file of the first run, and others in its place. The same command goes
    on with it; another trains beside it, reports, takes its settings or loads it."""
    failures, count = [], 0
    with prepared(2, 3) as folder:
        damages = all_damages(folder / "2" / FIRST)
        chosen = random.Random(seed).sample(damages, min(limit, len(damages)))
        for name, what, damage in tqdm(chosen):
            out = shutil.copytree(folder / "2", folder / "damaged")
            path = out / FIRST / name
            if not path.exists():  # no failed.txt, nothing pending
                path.touch()
            damage(path)
            healing = name != CHECKPOINT  # the other files are made anew from it
            problems = wrong_with_damaged(out, folder / "like", folder / "3" if healing else None)
            failures += [f"{name}: {what}: {problem}" for problem in problems]
            shutil.rmtree(out)
            shutil.rmtree(folder / "like", ignore_errors=True)
            count += 1
    return count, failures


def wrong_with_damaged(out, like, whole):
    """What is wrong with commands on a folder of a damaged run: list of texts. whole: the folder of
    the runs that --resume is to make of it, or None; like: an empty one."""
    commands = {
        "beside it": lambda: train(out, "--seed", "3", epochs=1),
        "--report": lambda: run.main(["--report", str(out / "point-pg")]),
        "--like": lambda: run.main([*f"--like {out / FIRST} --epochs 1 --quiet --out {like}".split()]),
        "load": lambda: load(out / FIRST),
        "--resume": lambda: train(out, "--seed", "1", "2", "--resume", epochs=3),
    }
    found = []
    for name, command in commands.items():
        code, error = outcome(command)
        problem = wrong_with(code, error)
        if name in ("beside it", "--report") and code:
            problem = f"exit code {code}: {error[-400:]}"
        if name == "--resume" and code == 0 and whole:
            problem = problem or ", ".join(differences(whole, out, "seed[12]"))
        if problem:
            found.append(f"{name}: {problem}")
    return found


def load(folder):
    """trained.load, whose one error is RunError, as a command."""
    try:
        trained.load(folder)
    except checkpoints.RunError as error:
        print("run.py:", error, file=sys.stderr)
        raise SystemExit(error.code) from error
