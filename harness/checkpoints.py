"""A training run on the disk: its folder and lock, files that are never half-written, checkpoints
and how they resume.

A run's checkpoint holds everything: θ, the optimiser's state, and the rows of log.csv and eval.csv.
The two CSV files are views of it for people and the report: rows are appended as training goes, and
--resume writes them anew.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import stat
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from harness.errors import first_line

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = None

FORMAT = 6
CHECKPOINT, PENDING, FAILED = "checkpoint.pt", "checkpoint.pt.tmp", "failed.txt"
# fmt: off
TABLES = {  # the CSV files, and their columns
    "log": ["epoch", "env_steps", "seconds", "sample_seconds", "return_pre", "return_post", "return_med", "delta_norm",
            "beta_norm", "delta_beta_cosine", "kl"],
    "eval": ["epoch", "phi", "step", "return"],  # and then those of state["info"]
}
# fmt: on
HUGE = 1e100  # sums and squares of larger numbers overflow, and the report does not read them
RUN_FILES = [CHECKPOINT, PENDING, FAILED, "log.csv", "eval.csv", "config.json"]
TENSORS = ("theta", "alpha", "optimizer")  # what of a state is stacked when runs train together
REMEDY = "restore it, or start again with --overwrite"
LARGEST = 2**32  # bytes of a file that is read
OTHER_FILES = 200  # that a command has open beside its runs' folders, and more


class RunError(Exception):
    """What is wrong with a run, in one line with the remedy. code: the command's exit code."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


@dataclass(eq=False)  # a run is itself; comparing states would compare tensors
class Run:
    """One training run. settings: what makes it this run, plain numbers and words.

    state: how far it has come, with format, settings, epoch, theta (a dict of leaves (1, 1, ...)),
    alpha (the same where it is learned, or {}), optimizer ({index of the parameter: its tensors}),
    totals (env_steps, seconds, ..), the rows of log.csv and eval.csv, and info, the columns of
    eval.csv for what the environment reports.
    """

    folder: Path
    settings: dict
    state: dict
    # what a checkpoint from before a flag stands for: {setting: its value}
    before_flags: dict = field(default_factory=dict)
    place: tuple | None = None  # the `identity` of its folder, once it is locked


def columns_of(table, state):
    """The columns of log.csv or eval.csv."""
    return TABLES[table] + (state["info"] if table == "eval" else [])


def is_info(name):
    """Whether a column of eval.csv may have this name of a number in an environment's info."""
    plain = isinstance(name, str) and re.fullmatch(r"\w[\w .:/-]{0,99}", name)
    return bool(plain) and name not in TABLES["eval"]


def flag_of(name):
    """The flag of a setting. A name that Python keeps for itself has a _ after it: lambda_."""
    return "--" + name.rstrip("_").replace("_", "-")


# --- files: whoever reads one sees the old content or the new, never half of it ---


@contextlib.contextmanager
def named(path):
    """Add the path to any OSError raised inside."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_durably(path, data):
    """bytes or text -> a new file, on the disk when this returns; none where that fails."""
    path.unlink(missing_ok=True)  # it may be a link to elsewhere, in a folder from a stranger
    try:
        with named(path), open(path, "xb") as file:
            file.write(data if isinstance(data, bytes) else data.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def write_atomically(path, data):
    """bytes or text -> path, through a temporary file beside it."""
    temporary = path.with_name(path.name + ".tmp")
    write_durably(temporary, data)
    os.replace(temporary, path)


def read_regular(path):
    """The bytes of a file, or None where there is none. Raises RunError for what is no regular
    file, such as a FIFO, which would be waited for without end, and for one that is too large."""
    try:
        with open(path, "rb", opener=without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise RunError(f"{path}: not a regular file; {REMEDY}")
            if status.st_size > LARGEST:
                raise RunError(f"{path}: {status.st_size} bytes, more than {LARGEST}; {REMEDY}")
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}; {REMEDY}") from error


def without_waiting(path, flags):
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has neither


def csv_lines(rows):
    """Rows of None, words and numbers, floats to seven digits, as the text of a CSV file."""
    return "".join(",".join(map(cell, row)) + "\n" for row in rows)


def cell(x):
    if x is None:
        return ""
    return f"{x:.7g}" if isinstance(x, float) else str(x)


def append_rows(run, table, rows):
    """Add rows to the end of log.csv or eval.csv."""
    check_place(run)
    path = run.folder / f"{table}.csv"
    with named(path), open(path, "a", newline="") as file:
        file.write(csv_lines(rows))


# --- the folder ---


@contextlib.contextmanager
def locked(folder, wait=False):
    """Keep other processes from writing in this folder. The lock is on the folder itself, so there
    is no lock file, and the system releases it however the process ends. There is none on Windows,
    nor where the file system has no locks.
    """
    if fcntl is None:
        yield
        return
    descriptor = lock(folder, wait)
    while identity(os.fstat(descriptor)) != identity(os.stat(folder)):  # made anew meanwhile
        os.close(descriptor)
        descriptor = lock(folder, wait)
    try:
        yield
    finally:
        os.close(descriptor)


def lock(folder, wait):
    """A locked descriptor of the folder. Raises RunError where another process has the lock."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        problem = "another process is training this run; wait for its end, or give another --out"
        raise RunError(f"{folder}: {problem}") from error
    except OSError:  # e.g. NFS, which wants the descriptor to be writable, and a folder's cannot be
        pass
    return descriptor


def identity(status):
    """What tells a folder from another of the same name. It is not given again while locked."""
    return status.st_dev, status.st_ino


def check_place(run):
    """Raises RunError where the run's folder is no longer the one that this command locked."""
    if run.place not in (None, identity(os.stat(run.folder))):
        problem = "the folder was deleted while this run trained, and another process made it anew"
        raise RunError(f"{run.folder}: {problem}; this run is lost")


@contextlib.contextmanager
def opened(runs, resume, overwrite, epochs):
    """The runs' folders, locked for this process; with `resume` each run's state is that of its
    checkpoint.

    Each run comes with the state that it begins with. Nothing is written before all are found good,
    and then nothing of what they replace is left: a crash before the last of them trains must not
    leave it for a later --resume. Raises RunError for a run that exists without `resume` or
    `overwrite`, is beyond `epochs`, has other settings, or a damaged checkpoint.
    """
    allow_open_files(len(runs) + OTHER_FILES)
    for run in runs:
        check_links(run)
    new = [run for run in runs if not run.folder.exists()]
    with contextlib.ExitStack() as locks:
        for run in runs:
            if run not in new:
                locks.enter_context(locked(run.folder))
                if not (resume or overwrite):
                    check_absent(run)
        saved = [read_checkpoint(run, CHECKPOINT) if resume else None for run in runs]
        for run, state in zip(runs, saved, strict=True):
            if state and state["epoch"] > epochs:
                epoch = state["epoch"]
                raise RunError(f"{run.folder}: is at epoch {epoch} already; give --epochs {epoch} or more", 2)
        for run in new:
            run.folder.mkdir(parents=True)  # raises where another process has just made it
            locks.enter_context(locked(run.folder))
        for run, state in zip(runs, saved, strict=True):
            run.state, run.place = state or run.state, identity(os.stat(run.folder))
        if resume:
            roll_forward(runs)
        for run in runs:
            for name in RUN_FILES if run.state["epoch"] == 0 else []:
                (run.folder / name).unlink(missing_ok=True)
        yield


def allow_open_files(count):
    """Raise the limit of open files, of which each locked folder is one. Raises RunError where the
    system refuses that."""
    if fcntl is None:
        return
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not 0 <= limit < count:  # it is -1 where there is none
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, most))
    except (ValueError, OSError) as error:
        problem = f"so many runs need {count} open files, and the system allows {most}"
        raise RunError(f"{problem}; give fewer --seed, --delta or --algo, or raise ulimit -n", 2) from error


def check_links(run):
    """Raises RunError where a run's folder, or one up to its algorithm's, is a link to elsewhere."""
    for folder in (run.folder, *run.folder.parents):
        if folder.is_symlink():
            raise RunError(f"{folder}: a link to another folder; remove it, or give another --out", 2)
        if folder.name == run.settings["algo"]:
            return


def check_absent(run):
    if any((run.folder / name).exists() for name in RUN_FILES):
        remedy = "give --resume to continue it, --overwrite to start again, or another --out"
        raise RunError(f"{run.folder}: this run exists; {remedy}", 2)


def begin(run, config, evaluated, info):
    """Make the run's folder ready for training from its state on. evaluated: the epochs at which an
    evaluation belongs; one off the schedule, at what was the last epoch, is not one that a longer
    run would have made. info: what its evaluations take from the environment's info; a column of
    those before stays, and in a new one their cells are empty."""
    (run.folder / FAILED).unlink(missing_ok=True)
    write_atomically(run.folder / "config.json", json.dumps(config, indent=1) + "\n")
    new = [name for name in info if name not in run.state["info"]]
    run.state["info"] = run.state["info"] + new
    rows = [row for row in run.state["eval"] if row[0] in evaluated]
    run.state["eval"] = [row + [None] * len(new) for row in rows]
    for table in TABLES:
        text = csv_lines([columns_of(table, run.state), *run.state[table]])
        write_atomically(run.folder / f"{table}.csv", text)


# --- checkpoints ---


def save(runs):
    """The checkpoints of runs that train together. All are complete beside their places before the
    first is put in its place, so that no crash in between parts the runs: see `roll_forward`."""
    for run in runs:
        check_place(run)
        write_durably(run.folder / PENDING, packed(run.state))
    for run in runs:
        os.replace(run.folder / PENDING, run.folder / CHECKPOINT)


def packed(state):
    """The bytes of a checkpoint: torch's, and a last line with their checksum, which torch ignores."""
    data = io.BytesIO()
    torch.save(state, data)
    return with_checksum(data.getvalue())


def with_checksum(data):
    return data + b"sha256 " + hashlib.sha256(data).hexdigest().encode() + b"\n"


CHECKSUM_LENGTH = len(with_checksum(b""))


def roll_forward(runs):
    """After a crash while checkpoints were put in place, some runs are at the new epoch, and all
    others have a complete checkpoint of that epoch pending: put it in place, and they continue
    together."""
    for algo in {run.settings["algo"] for run in runs}:
        together = [run for run in runs if run.settings["algo"] == algo]
        epochs = {run.state["epoch"] for run in together} - {0}
        for run in together:
            with contextlib.suppress(RunError):  # half-written: the crash came before any was put in place
                pending = read_checkpoint(run, PENDING)
                if pending and pending["epoch"] in epochs and pending["epoch"] > run.state["epoch"]:
                    os.replace(run.folder / PENDING, run.folder / CHECKPOINT)
                    run.state = pending


def read_checkpoint(run, name):
    """The state in a run's folder, checked against its settings and first state; None without."""
    state = load(run.folder / name)
    if state is not None:
        check_settings(state, run)
        check_layout(state, run.state, run.folder / name)
    return state


def load(path):
    """The state in a checkpoint file, or None where there is none. None of its code is run.

    Raises RunError, and nothing else, whatever the file holds.
    """
    data = read_regular(path)
    if data is None:
        return None
    content = data[:-CHECKSUM_LENGTH]
    if data != with_checksum(content):
        problem = "its checksum is wrong: damaged, half-written, or of an earlier version of this program"
        raise RunError(f"{path}: {problem}; {REMEDY}")
    try:
        check_members(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        check_plain(state, len(content))
    except Exception as error:  # torch raises many kinds, all of which mean the same here
        reason = first_line(error)[:120]
        raise RunError(f"{path}: not a checkpoint that torch can read ({reason}); {REMEDY}") from error
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        raise RunError(f"{path}: not a checkpoint of this program; {REMEDY}")
    if str(state.get("format")) != str(FORMAT):  # as text: it may even be a tensor
        problem = f"its format is {str(state.get('format'))[:40]}, this program's is {FORMAT}"
        raise RunError(f"{path}: {problem}; {REMEDY}")
    return {"info": []} | state  # which runs from before --info do not have


def check_members(content):
    """Raises ValueError where a zip file's members, compressed or overlapping, are larger than it."""
    members = zipfile.ZipFile(io.BytesIO(content)).infolist()
    if sum(member.file_size for member in members) > len(content):
        raise ValueError("its parts are larger than the file")


def check_plain(state, most):
    """Raises ValueError where a state is not made of dicts, lists, words, numbers and ordinary
    tensors, or of more than `most` of them: a list may stand in a file once and be in its state a
    million times."""
    for count, part in enumerate(parts(state)):
        plain = part is None or isinstance(part, (dict, list, tuple, str, float))
        if isinstance(part, int):
            plain = abs(part) < 10**100
        elif torch.is_tensor(part):
            special = part.layout != torch.strided or part.is_meta or part.is_nested
            plain = not special and part.is_contiguous()
        if not plain:
            raise ValueError(f"no run has this {type(part).__name__}")
        if count > most:
            raise ValueError("more parts than its bytes can hold")


def parts(x, depth=4):
    """x and all that is in it. Raises ValueError beyond a depth, so also for a cycle."""
    yield x
    if isinstance(x, (dict, list, tuple)):
        if depth == 0:
            raise ValueError("too deep")
        for part in [*x, *x.values()] if isinstance(x, dict) else x:
            yield from parts(part, depth - 1)


def check_settings(state, run):
    """Raises RunError where a checkpoint's settings are not those of this command's run."""
    for key, value in run.settings.items():
        before = state["settings"].get(key, run.before_flags.get(key))
        if json.dumps(before, default=repr, skipkeys=True) != json.dumps(value):  # as text: it may even be a tensor
            problem = f"began with {key} {before}, this command says {value}"
            remedy = f"give {flag_of(key)} as before, another --out, or --overwrite"
            raise RunError(f"{run.folder}: {problem}; {remedy}", 2)


def check_layout(state, first, path):
    """Raises RunError where a state is not made like a run's first, or has not its epochs' rows."""
    got, expected = layout(state), layout(first)
    for name in {**expected, **got}:
        if got.get(name) != expected.get(name):
            raise RunError(f"{path}: {name} is {got.get(name)}, expected {expected.get(name)}; {REMEDY}")
    if state["epoch"] < 1:
        raise RunError(f"{path}: epoch is {state['epoch']}, expected at least 1; {REMEDY}")
    if not all(map(is_info, state["info"])):
        problem = f"info is {str(state['info'])[:40]}, expected columns of eval.csv"
        raise RunError(f"{path}: {problem}; {REMEDY}")
    for table in TABLES:
        columns = columns_of(table, state)
        for row in state[table]:
            if not isinstance(row, list) or len(row) != len(columns) or not all(map(is_cell, row)):
                raise RunError(f"{path}: {str(row)[:40]} is no row of {','.join(columns)}; {REMEDY}")
    epochs = [row[0] for row in state["log"]]
    if len(epochs) != state["epoch"] or epochs != list(range(1, len(epochs) + 1)):
        raise RunError(f"{path}: its log does not hold epochs 1 to {state['epoch']}; {REMEDY}")


def is_cell(x):
    return x is None or isinstance(x, (int, float)) or (isinstance(x, str) and set(x) <= set("0123456789+-.einfa "))


def layout(x, name="checkpoint"):
    """What a state is made of, its values aside: {name: shape and type}."""
    if isinstance(x, dict):
        return {k: v for key in x if key != "settings" for k, v in layout(x[key], f"{name}.{key}").items()}
    return {name: f"{list(x.shape)} {x.dtype}" if torch.is_tensor(x) else type(x).__name__}


# --- runs that train together, along the first axis ---


def stack(trees, device):
    """Nested dicts of tensors (1, ...), one for each run -> one such dict of tensors (S, ...) on
    the device. What has no axis, such as Adam's step count, is the same for all."""
    if isinstance(trees[0], dict):
        return {key: stack([tree[key] for tree in trees], device) for key in trees[0]}
    return (torch.cat([x.detach() for x in trees]) if trees[0].dim() else trees[0].clone()).to(device)


def to_cpu(tree):
    """A nested dict of tensors on the CPU."""
    if isinstance(tree, dict):
        return {key: to_cpu(x) for key, x in tree.items()}
    return tree.detach().cpu()


def take(tree, run):
    """The reverse of `stack`: one run's part of tensors on the CPU."""
    if isinstance(tree, dict):
        return {key: take(x, run) for key, x in tree.items()}
    return (tree[run : run + 1] if tree.dim() else tree).clone()
