"""A run on the disk: damaged and hostile files, crashes, two processes at once, full disks. Nothing is lost, and one
clear line says what is wrong.

bench/torture.py does more of the damage, for longer.
"""

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import torch

import run
from bench import compare, torture
from harness import checkpoints
from tests.commands import refused, rows, snapshot, train

NO_LOCKS = pytest.mark.skipif(checkpoints.fcntl is None, reason="there are no locks")
RUN = "cartpole-pg/fomaml/seed1"
ADAM = "cartpole-pg/directed-meta-sgd/delta0.005/seed1"


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A folder with a run of FOMAML and one of Directed-Meta-SGD with Adam, 4 epochs each."""
    out = tmp_path_factory.mktemp("two-runs")
    train(out)
    train(out, "--optimizer", "adam", algo="directed-meta-sgd")
    return out


@pytest.fixture
def out(two_runs, tmp_path):
    return shutil.copytree(two_runs, tmp_path / "out")


# --- what a checkpoint holds ---


def test_runs_that_are_stacked_come_apart_as_they_were():
    g = torch.Generator().manual_seed(0)
    runs = [
        {"theta": {"w": torch.randn(1, 1, 2, 3, generator=g)}, "optimizer": {0: {"step": torch.tensor(7.0)}}}
        for _ in range(3)
    ]
    stacked = checkpoints.stack(runs, "cpu")
    assert stacked["theta"]["w"].shape == (3, 1, 2, 3)
    for i, original in enumerate(runs):
        assert compare.equal(checkpoints.take(stacked, i), original)


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    checkpoints.write_atomically(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as error:
            checkpoints.write_atomically(path, "new")
    assert str(path) in error.value.filename and snapshot(tmp_path) == {"file.txt": b"old"}
    checkpoints.write_atomically(path, "new")
    assert snapshot(tmp_path) == {"file.txt": b"new"}


# --- damaged CSV files ---


def cut_the_last_row(path):
    path.write_bytes(path.read_bytes()[:-5])


def drop_a_row(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def garble(path):
    path.write_bytes(path.read_bytes() + b"\xff\xfe,1\n")


def empty(path):
    path.write_bytes(b"")


def rows_of_another_run(path):
    path.write_text(path.read_text().replace("1", "2"))


def rows_of_a_crash(path):
    """What is left of epochs after the last checkpoint."""
    with open(path, "a") as file:
        file.write("5,999,1,1\n6,99")


@pytest.mark.parametrize("name", ["log.csv", "eval.csv"])
@pytest.mark.parametrize(
    "damage", [Path.unlink, cut_the_last_row, drop_a_row, garble, empty, rows_of_another_run, rows_of_a_crash]
)
def test_a_damaged_csv_file_heals_on_resume(out, damage, name):
    """Of a finished run, and of one that continues."""
    path = out / RUN / name
    good = path.read_bytes()
    damage(path)
    assert not path.exists() or path.read_bytes() != good
    train(out, "--resume")
    assert path.read_bytes() == good
    damage(path)
    train(out, "--resume", epochs=5)
    assert path.read_bytes().startswith(good)
    assert [row["epoch"] for row in rows(out / RUN / "log.csv")] == list("12345")
    assert {row["epoch"] for row in rows(out / RUN / "eval.csv")} == set("245")


# --- damaged checkpoints ---


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])


def folder_instead(path):
    path.unlink()
    path.mkdir()


def saved(x):
    """Damage: something else in the checkpoint's place."""
    return lambda path: path.write_bytes(checkpoints.packed(x))


def changed(change):
    """Damage: the state in a checkpoint after `change`."""

    def damage(path):
        state = torch.load(path, weights_only=True)
        change(state)
        path.write_bytes(checkpoints.packed(state))

    return damage


def state_with(**changes):
    """Damage: some entries of a checkpoint replaced; None: left out."""

    def change(state):
        for key, x in changes.items():
            state.pop(key)
            if x is not None:
                state[key] = x

    return changed(change)


def weight_as(make):
    """Damage: one parameter of θ replaced."""
    return changed(lambda state: state["theta"].update({"policy.0.weight": make(state["theta"]["policy.0.weight"])}))


class Code:
    def __reduce__(self):
        return (os.mkdir, (os.environ["HOSTILE_FOLDER"],))


def without_its_checksum(path):
    """As an earlier version wrote it."""
    path.write_bytes(path.read_bytes()[: -checkpoints.CHECKSUM_LENGTH])


def fifo_instead(path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("Windows has none")
    path.unlink()
    os.mkfifo(path)


def deflated(path):
    """A small file of a large state."""
    stored = zipfile.ZipFile(io.BytesIO(checkpoints.packed({"theta": torch.zeros(10**6)})))
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        for name in stored.namelist():
            file.writestr(name, stored.read(name))
    path.write_bytes(checkpoints.with_checksum(data.getvalue()))


def many_times_the_same(path):
    """10¹² numbers in a file of some kilobytes."""
    row = [0] * 10**4
    column = [row] * 10**4
    path.write_bytes(checkpoints.packed([column] * 10**4))


def hostile(path):
    path.write_bytes(checkpoints.packed({"format": checkpoints.FORMAT, "settings": Code()}))


DAMAGED = [
    (truncate, "checkpoint.pt: its checksum is wrong: damaged, half-written, or of an earlier version"),
    (empty, "checkpoint.pt: its checksum is wrong"),
    (without_its_checksum, "checkpoint.pt: its checksum is wrong"),
    (hostile, "checkpoint.pt: not a checkpoint that torch can read"),
    (folder_instead, "checkpoint.pt: Is a directory"),
    (fifo_instead, "checkpoint.pt: not a regular file"),
    (deflated, "checkpoint.pt: not a checkpoint that torch can read (ValueError: its parts are larger than the file)"),
    (state_with(theta=torch.zeros(3).to_sparse()), "torch can read (ValueError: no run has this Tensor)"),
    (state_with(theta=torch.zeros(3, device="meta")), "torch can read (ValueError: no run has this Tensor)"),
    (state_with(theta=torch.zeros(1).expand(10**12)), "torch can read (ValueError: no run has this Tensor)"),
    (changed(lambda s: s["settings"].update(horizon=10**300)), "torch can read (ValueError: no run has this int)"),
    (changed(lambda s: s["settings"].update(s)), "torch can read (ValueError: too deep)"),
    (changed(lambda s: s["log"].append(s["log"])), "torch can read (ValueError: too deep)"),
    (many_times_the_same, "torch can read (ValueError: more parts than its bytes can hold)"),
    (saved({"model": torch.zeros(3)}), "checkpoint.pt: not a checkpoint of this program"),
    (saved([1, 2]), "checkpoint.pt: not a checkpoint of this program"),
    (state_with(format=0), f"checkpoint.pt: its format is 0, this program's is {checkpoints.FORMAT}"),
    (state_with(format=None), f"checkpoint.pt: its format is None, this program's is {checkpoints.FORMAT}"),
    (state_with(format=torch.zeros(2)), "checkpoint.pt: its format is tensor([0., 0.])"),
    (state_with(settings=None), "checkpoint.pt: not a checkpoint of this program"),
    (state_with(settings={}), "began with env None, this command says cartpole"),
    (changed(lambda s: s["settings"].update(algo=torch.zeros(2, 2))), "began with algo tensor("),
    (changed(lambda s: s["settings"].update(algo={"a": (2, 3)})), "began with algo {'a': (2, 3)}"),
    (state_with(theta=None), "checkpoint.theta.policy.0.weight is None, expected [1, 1, 4, 8]"),
    (state_with(theta=3), "checkpoint.theta.policy.0.weight is None, expected [1, 1, 4, 8]"),
    (changed(lambda s: s["theta"].pop("policy.1.bias")), "checkpoint.theta.policy.1.bias is None"),
    (changed(lambda s: s["theta"].update(more=torch.zeros(1))), "checkpoint.theta.more is [1] torch"),
    (
        weight_as(lambda p: torch.zeros(1, 1, 4, 9)),
        "policy.0.weight is [1, 1, 4, 9] torch.float32, expected [1, 1, 4, 8] torch.float32",
    ),
    (
        weight_as(torch.Tensor.double),
        "policy.0.weight is [1, 1, 4, 8] torch.float64, expected [1, 1, 4, 8] torch.float32",
    ),
    (state_with(epoch=-3), "checkpoint.pt: epoch is -3, expected at least 1"),
    (state_with(epoch="4"), "checkpoint.epoch is str, expected int"),
    (state_with(epoch=7), "checkpoint.pt: its log does not hold epochs 1 to 7"),
    (state_with(epoch=10**15), "checkpoint.pt: its log does not hold epochs 1 to 1000000000000000"),
    (state_with(totals={}), "checkpoint.totals.env_steps is None, expected int"),
    (state_with(log=None), "checkpoint.log is None, expected list"),
    (changed(lambda s: s["log"].pop()), "checkpoint.pt: its log does not hold epochs 1 to 4"),
    (changed(lambda s: s["log"][0].pop()), "is no row of epoch,env_steps,"),
    (changed(lambda s: s["log"].append("abcdefg")), "abcdefg is no row of epoch,env_steps,"),
    (state_with(info=3), "checkpoint.info is int, expected list"),
    (state_with(info=[3]), "checkpoint.pt: info is [3], expected columns of eval.csv"),
    (state_with(info=["a,b"]), "checkpoint.pt: info is ['a,b'], expected columns of eval.csv"),
    (state_with(info=["x"]), "is no row of epoch,phi,step,return,x"),
    (changed(lambda s: s["eval"][0].__setitem__(1, "=1+1")), "is no row of epoch,phi,step,return"),
    (changed(lambda s: s["eval"][0].__setitem__(3, torch.zeros(2))), "is no row of epoch,phi,step,return"),
]
DAMAGED_ADAM = [
    (changed(lambda s: s["optimizer"][0].pop("exp_avg")), "optimizer.0.exp_avg is None, expected [1, 1, 4, 8]"),
    (state_with(optimizer={}), "optimizer.0.step is None, expected []"),
    (state_with(alpha=0.1), "alpha.policy.0.weight is None, expected [1, 1, 4"),
]


@pytest.mark.parametrize(
    ("folder", "damage", "says"), [(RUN, *case) for case in DAMAGED] + [(ADAM, *case) for case in DAMAGED_ADAM]
)
def test_a_damaged_checkpoint_is_named_with_the_remedy_and_nothing_is_harmed(
    out, capsys, monkeypatch, folder, damage, says
):
    monkeypatch.setenv("HOSTILE_FOLDER", str(out / "hostile"))
    path = out / folder / "checkpoint.pt"
    damage(path)
    before = snapshot(out)
    words = ["--optimizer", "adam"] if folder == ADAM else []
    code = 2 if "began with" in says else 1
    error = refused(capsys, out, *words, "--resume", algo=folder.split("/")[1], epochs=8, code=code)
    assert says in error and ("--overwrite" in error or "fix this, then rerun with --resume" in error)
    assert snapshot(out) == before and not (out / "hostile").exists()


def test_a_checkpoint_that_was_cut_off_anywhere_or_has_another_bit_is_seen(out, tmp_path):
    data, path = (out / RUN / "checkpoint.pt").read_bytes(), tmp_path / "checkpoint.pt"
    rng = random.Random(0)
    damaged = [data[:length] for length in range(0, len(data), 37)]
    for _ in range(300):
        place = rng.randrange(len(data))
        damaged.append(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(checkpoints.RunError, match="its checksum is wrong"):
            checkpoints.load(path)
    path.write_bytes(data)
    assert checkpoints.load(path)["epoch"] == 4


def test_a_file_that_is_too_large_is_not_read(out, monkeypatch):
    monkeypatch.setattr(checkpoints, "LARGEST", 1000)
    with pytest.raises(checkpoints.RunError, match="bytes, more than 1000"):
        checkpoints.load(out / RUN / "checkpoint.pt")


@pytest.mark.parametrize("name", ["log.csv", "eval.csv", "config.json"])
def test_a_folder_in_the_place_of_a_file_is_named(out, capsys, name):
    checkpoint = (out / RUN / "checkpoint.pt").read_bytes()
    folder_instead(out / RUN / name)
    error = refused(capsys, out, "--resume", epochs=8, code=1)
    assert f"{out / RUN / name}: Is a directory; fix this, then rerun with --resume" in error
    assert (out / RUN / "checkpoint.pt").read_bytes() == checkpoint


# --- runs that exist ---


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], f"{RUN}: this run exists; give --resume to continue it, --overwrite to start again, or another --out"),
        (["--algo", "maml", "fomaml"], f"{RUN}: this run exists"),  # and nothing else is begun
        (["--resume", "--beta", "0.5"], "began with beta 0.001, this command says 0.5; give --beta as before"),
        (["--resume", "--range", "6", "7"], "began with range [5.0, 15.0], this command says [6.0, 7.0]; give --range"),
        (["--resume", "--hidden", "9"], "began with hidden [8], this command says [9]; give --hidden as before"),
        (["--resume", "--inner-steps", "2"], "began with inner_steps 1, this command says 2; give --inner-steps as"),
        (["--resume", "--epochs", "3"], f"{RUN}: is at epoch 4 already; give --epochs 4 or more"),
    ],
)
def test_a_run_that_exists_is_kept(out, capsys, words, says):
    before = snapshot(out)
    assert says in refused(capsys, out, *words)
    assert snapshot(out) == before


@pytest.mark.skipif(os.name == "nt", reason="no such paths")
@pytest.mark.parametrize("name", ["two\nlines", "not \udcff UTF-8", "\x1b[31m"])
def test_a_folder_of_any_name_is_trained_in_and_named_on_one_line(tmp_path, capsys, name):
    train(tmp_path / name, epochs=1)
    error = refused(capsys, tmp_path / name)
    assert "this run exists" in error and error.rstrip("\n").isprintable()


@pytest.mark.parametrize("where", [".", "cartpole-pg", "cartpole-pg/fomaml", RUN])
def test_a_file_in_the_way_of_a_folder_is_named(tmp_path, capsys, where):
    path = tmp_path / "out" / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")
    assert str(path) in refused(capsys, tmp_path / "out", code=1)
    assert snapshot(tmp_path) == {str(path.relative_to(tmp_path)): b"in the way"}


@pytest.mark.skipif(os.name == "nt", reason="symbolic links")
@pytest.mark.parametrize("name", [*checkpoints.RUN_FILES, "log.csv.tmp", "../../report.md", "../../report.md.tmp"])
def test_links_in_an_untrusted_folder_are_replaced_and_not_followed(out, tmp_path, name):
    outside = tmp_path / "outside"
    path = out / RUN / name
    if path.exists():
        shutil.copy(path, outside)
        path.unlink()
    else:
        outside.write_text("mine")
    path.symlink_to(outside)
    before = outside.read_bytes()
    train(out, "--resume", epochs=5)
    assert outside.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="symbolic links")
@pytest.mark.parametrize("where", [RUN, "cartpole-pg/fomaml"])
@pytest.mark.parametrize("word", ["--resume", "--overwrite"])
def test_a_link_in_the_place_of_a_runs_folder_is_refused(out, tmp_path, capsys, where, word):
    """A run of somebody else's, which would be trained on, or written over."""
    elsewhere = tmp_path / "elsewhere"
    (out / where).rename(elsewhere)
    (out / where).symlink_to(elsewhere)
    before = snapshot(elsewhere)
    error = refused(capsys, out, word, epochs=6)
    assert f"{out / where}: a link to another folder; remove it" in error and snapshot(elsewhere) == before


# --- crashes ---


class Crash(BaseException):
    pass


THREE_RUNS = ["--seed", 1, 2, 3, "--optimizer", "adam", "--workers", 1]


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory):
    """The folder of a sweep that nothing interrupted."""
    out = tmp_path_factory.mktemp("three-runs")
    train(out, *THREE_RUNS)
    return out


@pytest.mark.parametrize("count", range(1, 9))
def test_a_crash_at_any_step_of_writing_checkpoints_parts_no_sweep(three_runs, tmp_path, monkeypatch, count):
    """Checkpoints of three runs are 3 pending files and 3 put in place, and each step may be the last; the first
    checkpoints are 6 steps, so that counts 1 to 8 crash in both phases of the first, and in the second."""
    left = count

    def crash_after(step):
        def stepping(source, *args):
            nonlocal left
            if Path(source).name == checkpoints.PENDING:
                left -= 1
                if left < 0:
                    raise Crash
            return step(source, *args)

        return stepping

    with monkeypatch.context() as patch:
        patch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(checkpoints, "write_durably", crash_after(checkpoints.write_durably))
        patch.setattr(os, "replace", crash_after(os.replace))
        with pytest.raises(Crash):
            train(tmp_path, *THREE_RUNS)
    sizes = []
    train_batch = run.train

    def counted(batch, *args):
        sizes.append(len(batch.runs))
        return train_batch(batch, *args)

    monkeypatch.setattr(run, "train", counted)
    train(tmp_path, *THREE_RUNS, "--resume")
    assert sizes == [3]  # they continue as one batch
    assert compare.differences(three_runs, tmp_path) == []


def test_a_stale_pending_checkpoint_is_not_taken(out, tmp_path):
    """It is of this run and of these settings, but of an epoch at which no other run stands: a crash while it was
    written. The run continues from its checkpoint, as it would have."""
    folder = out / RUN
    pending = torch.load(folder / checkpoints.CHECKPOINT, weights_only=True)
    pending |= {"epoch": 5, "theta": {key: p + 1 for key, p in pending["theta"].items()}}
    pending["log"].append([5, *pending["log"][-1][1:]])
    (folder / checkpoints.PENDING).write_bytes(checkpoints.packed(pending))
    train(out, "--resume", epochs=6)
    train(tmp_path / "whole", epochs=6)
    assert compare.differences(tmp_path / "whole/cartpole-pg/fomaml", out / "cartpole-pg/fomaml") == []


def test_a_crash_of_overwrite_leaves_no_old_run_for_resume(out, tmp_path, monkeypatch):
    """It comes while the first algorithm trains: the second's old run, of another β, must not pass for the new one."""
    train(out, "--overwrite", algo="fomaml directed-fomaml")
    words = ["--beta", 0.002, "--workers", 1]

    def crash(batch, *args):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", crash)
        with pytest.raises(Crash):
            train(out, *words, "--overwrite", algo="fomaml directed-fomaml")
    train(out, *words, "--resume", algo="fomaml directed-fomaml")
    train(tmp_path / "whole", *words, algo="fomaml directed-fomaml")
    for algo in ("fomaml", "directed-fomaml"):
        assert compare.differences(tmp_path / "whole/cartpole-pg" / algo, out / "cartpole-pg" / algo) == []


@pytest.mark.parametrize("damage", [truncate, empty, hostile, fifo_instead])
def test_a_pending_checkpoint_that_cannot_be_read_is_discarded(out, tmp_path, monkeypatch, damage):
    """A crash came while it was written, before any other was put in its place."""
    monkeypatch.setenv("HOSTILE_FOLDER", str(out / "hostile"))
    pending = out / RUN / checkpoints.PENDING
    shutil.copy(out / RUN / "checkpoint.pt", pending)
    damage(pending)
    train(out, "--resume", epochs=6)
    train(tmp_path / "whole", epochs=6)
    assert compare.differences(tmp_path / "whole/cartpole-pg/fomaml", out / "cartpole-pg/fomaml") == []


@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_a_sweep_killed_at_random_moments_equals_one_that_was_not(tmp_path, start):
    words = ["--seed", 1, 2, "--delta", 0.001, 0.005, "--eval-every", 4]
    log = tmp_path / "killed/cartpole-pg/directed-fomaml/delta0.005/seed2/log.csv"
    rng = random.Random(1)
    epochs = 0
    for _ in range(3):
        command = start("--env", "cartpole", "--algo", "directed-fomaml", *words, "--resume", out=tmp_path / "killed",
                        checkpoint_seconds=0.0)  # fmt: skip
        command.wait_for_epoch(log, epochs + 2)
        time.sleep(rng.expovariate(1 / 0.02))
        command.send(signal.SIGKILL)
        assert command.wait() == (-signal.SIGKILL, [])
        torture.wait_for_the_end(command.pid)  # its processes hold the locks until they have ended
        epochs = max(len(rows(path)) for path in (tmp_path / "killed").rglob("log.csv"))  # processes differ
    train(tmp_path / "killed", *words, "--resume", algo="directed-fomaml", epochs=epochs + 2)
    train(tmp_path / "whole", *words, algo="directed-fomaml", epochs=epochs + 2)
    assert compare.differences(tmp_path / "whole", tmp_path / "killed") == []


# --- two processes at once ---


@NO_LOCKS
def test_a_second_process_on_the_same_run_is_refused_and_harms_nothing(tmp_path, capsys, start):
    command = start("--env", "cartpole", "--algo", "fomaml", out=tmp_path)
    folder = tmp_path / RUN
    command.wait_for_epoch(folder / "log.csv")
    for words in (["--resume"], ["--overwrite"], []):
        error = refused(capsys, tmp_path, *words, "--seed", 2, 1, epochs=100000, code=1)
        assert f"{folder}: another process is training this run; wait for its end" in error
        assert not (tmp_path / "cartpole-pg/fomaml/seed2").exists()
    train(tmp_path, "--seed", 3)  # another run in the same experiment
    assert "| fomaml | 2 |" in (tmp_path / "cartpole-pg/report.md").read_text(encoding="utf-8")
    command.end()
    epochs = len(rows(folder / "log.csv"))
    assert epochs >= 3
    train(tmp_path, "--resume", epochs=5 + epochs)  # the dead process leaves no lock


@pytest.fixture
def one_run(tmp_path):
    """A run in a folder of its own, at epoch 0."""
    return checkpoints.Run(tmp_path / "maml/seed1", {"algo": "maml"}, {"epoch": 0, "log": [], "eval": []})


@NO_LOCKS
def test_a_run_whose_folder_was_deleted_and_made_anew_writes_nothing_there(one_run):
    """By `rm -r` and a second command, whose lock is on the new folder."""
    with checkpoints.opened([one_run], resume=False, overwrite=False, epochs=1):
        one_run.folder.rmdir()
        one_run.folder.mkdir()
        for write in (lambda: checkpoints.save([one_run]), lambda: checkpoints.append_rows(one_run, "log", [[1]])):
            with pytest.raises(checkpoints.RunError, match="seed1: the folder was deleted while this run trained"):
                write()
        assert snapshot(one_run.folder) == {}


@NO_LOCKS
def test_a_folder_that_is_made_anew_while_its_lock_is_awaited_is_locked(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    flock = checkpoints.fcntl.flock

    def made_anew(descriptor, how):
        monkeypatch.undo()
        folder.rmdir()
        folder.mkdir()
        flock(descriptor, how)

    monkeypatch.setattr(checkpoints.fcntl, "flock", made_anew)
    with checkpoints.locked(folder, wait=True), pytest.raises(checkpoints.RunError, match="another process"):
        checkpoints.lock(folder, wait=False)


# --- many runs ---

SWEEP = ["--seed", "1-60", "--horizon", 2, "--hidden", 2]


@pytest.fixture
def few_files():
    """A limit that leaves room for 40 more open files."""
    if checkpoints.fcntl is None:
        pytest.skip("there is no such limit")
    kind = checkpoints.resource.RLIMIT_NOFILE
    limit, most = checkpoints.resource.getrlimit(kind)
    free = os.open(".", os.O_RDONLY)  # the lowest number that is free
    os.close(free)
    checkpoints.resource.setrlimit(kind, (free + 40, most))
    yield
    checkpoints.resource.setrlimit(kind, (limit, most))


def test_more_runs_than_files_may_be_open_train_all_the_same(tmp_path, few_files):
    train(tmp_path, *SWEEP, epochs=1)
    assert len(list(tmp_path.rglob("checkpoint.pt"))) == 60


def test_more_runs_than_the_system_lets_lock_are_refused_before_a_folder_is_made(
    tmp_path, capsys, monkeypatch, few_files
):
    def refuse(kind, limits):
        raise ValueError("not allowed to raise maximum limit")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.resource, "setrlimit", refuse)
        error = refused(capsys, tmp_path, *SWEEP)
    assert "so many runs need 260 open files, and the system allows" in error
    assert not list(tmp_path.iterdir())


# --- disks ---


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, leave):
    """Fill a disk but for `leave` bytes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (folder / "ballast").write_bytes(b"x" * (free - leave))


@pytest.mark.parametrize("leave", [0, 4096, 16384])
def test_a_disk_that_fills_up_ends_in_one_line_and_the_last_checkpoint_continues(small_disk, tmp_path, capsys, leave):
    train(small_disk, "--seed", 1, 2)
    fill(small_disk, leave)
    error = refused(capsys, small_disk, "--seed", 1, 2, "--resume", epochs=200, code=1)
    assert f"{small_disk}" in error and ": No space left on device; fix this, then rerun with --resume" in error
    (small_disk / "ballast").unlink()
    train(small_disk, "--seed", 1, 2, "--resume", epochs=6)
    train(tmp_path / "whole", "--seed", 1, 2, epochs=6)
    assert compare.differences(tmp_path / "whole", small_disk) == []


def test_no_space_for_the_report_is_one_line_after_the_training_is_safe(small_disk, capsys, monkeypatch):
    opened = checkpoints.opened

    @contextlib.contextmanager
    def filled_at_the_end(*args):
        with opened(*args):
            yield
        fill(small_disk, 0)

    monkeypatch.setattr(checkpoints, "opened", filled_at_the_end)
    error = refused(capsys, small_disk, code=1)
    assert "No space left on device" in error and "summary.csv" in error
    assert torch.load(small_disk / RUN / "checkpoint.pt", weights_only=True)["epoch"] == 4


def test_a_disk_that_may_not_be_written_is_named(small_disk, capsys):
    train(small_disk)
    before = snapshot(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for words in (["--resume"], ["--seed", 2]):
        error = refused(capsys, small_disk, *words, epochs=8, code=1)
        assert f"{small_disk}" in error and "Read-only file system" in error
    assert snapshot(small_disk) == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(capsys, tmp_path, code=1)
    tmp_path.chmod(0o700)


def test_a_folder_deleted_while_it_trains_is_named(tmp_path, start):
    command = start("--env", "cartpole", "--algo", "fomaml", out=tmp_path / "out")
    command.wait_for_epoch(tmp_path / "out" / RUN / "log.csv")
    os.rename(tmp_path / "out", tmp_path / "gone")  # at one stroke, unlike the deletion of many files
    code, lines = command.wait()
    assert code == 1 and len(lines) == 1
    assert f"{tmp_path / 'out' / RUN}" in lines[0] and "No such file or directory; fix this" in lines[0]
