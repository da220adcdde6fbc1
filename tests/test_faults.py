"""Wrong commands, wrong and hostile files, crashes, full disks, two at once: one clear line, and nothing is lost.

tests/torture.py does more of the damage, for longer.
"""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import report
import run
from tests import torture
from tests.test_run import REPOSITORY, SMALL, go, refused, rows, snapshot

pytestmark = pytest.mark.usefixtures("without_figures")
RUN = "cartpole-pg/fomaml/seed1"
GYM = ["--param", "g", "--range", "5", "15"]


@pytest.fixture
def without_figures(monkeypatch):
    """As if matplotlib were not installed: figures take most of a short command's time."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of FOMAML and one of Directed-Meta-SGD with Adam, 4 epochs each."""
    out = tmp_path_factory.mktemp("trained")
    go(out)
    go(out, "--optimizer", "adam", algo="directed-meta-sgd")
    return out


@pytest.fixture
def out(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "out")


# --- wrong commands ---

FLAGS = [
    # numbers out of range and of the wrong type
    (["--delta", "-0.1"], "--delta: '-0.1': expected a finite number >= 0"),
    (["--delta", "nan"], "--delta: 'nan': expected a finite number >= 0"),
    (["--delta", "inf"], "--delta: 'inf': expected a finite number >= 0"),
    (["--delta", "1e999"], "--delta: '1e999': expected a finite number >= 0"),
    (["--alpha", "0"], "--alpha: '0': expected a finite number > 0"),
    (["--alpha", "small"], "--alpha: 'small': expected a finite number > 0"),
    (["--beta", "-1"], "--beta: '-1': expected a finite number > 0"),
    (["--beta-alpha", "0"], "--beta-alpha: '0': expected a finite number > 0"),
    (["--gamma", "1.5"], "--gamma: '1.5': expected a finite number > 0 and <= 1"),
    (["--gamma", "0"], "--gamma: '0': expected a finite number > 0 and <= 1"),
    (["--gae-lambda", "-0.5"], "--gae-lambda: '-0.5': expected a finite number >= 0 and <= 1"),
    (["--seed", "-1"], "--seed: '-1': expected a finite whole number >= 0"),
    (["--seed", "1.5"], "--seed: '1.5': expected a finite whole number >= 0"),
    (["--seed", "one"], "--seed: 'one': expected a finite whole number >= 0"),
    (["--tasks", "0"], "--tasks: '0': expected a finite whole number >= 1"),
    (["--trajectories", "0"], "--trajectories: '0': expected a finite whole number >= 1"),
    (["--trajectories", "2.5"], "--trajectories: '2.5': expected a finite whole number >= 1"),
    (["--horizon", "0"], "--horizon: '0': expected a finite whole number >= 1"),
    (["--epochs", "-4"], "--epochs: '-4': expected a finite whole number >= 1"),
    (["--inner-steps", "0"], "--inner-steps: '0': expected a finite whole number >= 1"),
    (["--hidden", "64", "0"], "--hidden: '0': expected a finite whole number >= 1"),
    (["--eval-every", "0"], "--eval-every: '0': expected a finite whole number >= 1"),
    (["--eval-steps", "0"], "--eval-steps: '0': expected a finite whole number >= 1"),
    (["--threads", "0"], "--threads: '0': expected a finite whole number >= 1 and <= 1024"),
    (["--workers", "-1"], "--workers: '-1': expected a finite whole number >= 0 and <= 1024"),
    (["--workers", "1000000"], "--workers: '1000000': expected a finite whole number >= 0 and <= 1024"),
    (["--threshold", "nan"], "--threshold: 'nan': expected a finite number"),
    (["--range", "5", "high"], "--range: 'high': expected a finite number"),
    (["--range", "nan", "15"], "--range: 'nan': expected a finite number"),
    (["--range", "15", "5"], "--range 15 5: expected finite numbers, LOW first"),
    (["--range", "5"], "--range 5: expected LOW HIGH for each of 1 parameter(s)"),
    (
        ["--algo", "directed-maml", "--medium", "9", "8"],
        "--medium 9 8: expected mean, sampled, median, random or 1 number(s): gravity (m/s²)",
    ),
    (["--algo", "directed-maml", "--medium", "middle"], "--medium middle: expected mean, sampled, median, random"),
    (["--algo", "directed-maml", "--medium", "nan"], "--medium nan: expected mean, sampled, median, random"),
    # missing values
    (["--delta"], "--delta: expected at least one argument"),
    (["--tasks"], "--tasks: expected one argument"),
    # unknown words
    (["--algo", "fomal"], "--algo: 'fomal': did you mean fomaml?"),
    (["--algo", "directed_maml"], "--algo: 'directed_maml': did you mean directed-maml?"),
    (["--algo", "xyz"], "--algo: 'xyz': choose from maml, fomaml, meta-sgd, reptile, directed-maml"),
    (["--rl", "ppo"], "--rl: 'ppo': choose from pg, ac"),
    (["--estimator", "dise"], "--estimator: 'dise': did you mean dice?"),
    (["--baseline", "steps"], "--baseline: 'steps': did you mean step?"),
    (["--optimizer", "Adam"], "--optimizer: 'Adam': did you mean adam?"),
    (["--device", "gpu"], "--device: 'gpu': choose from auto, cpu, cuda"),
    (["--epoch_s", "5"], "--epoch_s: did you mean --epochs?"),
    (["--sead", "5"], "--sead: did you mean --seed?"),
    (["-x"], "-x: choose from those of --help"),
    # what contradicts, or does nothing
    (["--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
    (["--seed", "1", "1"], "--seed 1 1: a value stands twice"),
    (["--algo", "directed-maml", "--delta", "0.1", "0.10"], "--delta 0.1 0.1: a value stands twice"),
    (["--algo", "maml", "maml"], "--algo maml maml: a value stands twice"),
    (["--delta", "0.1"], "--delta does nothing without an algorithm that begins with directed-"),
    (["--medium", "random"], "--medium does nothing without an algorithm that begins with directed-"),
    (["--beta-alpha", "0.1"], "--beta-alpha does nothing without the algorithm meta-sgd"),
    (["--phi", "12"], "--phi does nothing without --watch RUN"),
    (["--param", "gravity"], "--param gravity: cartpole has its φ"),
    # environments
    (["--env", "carpole"], "--env carpole: unknown environment; did you mean cartpole?"),
    (["--env", "qqqq"], "--env qqqq: unknown environment; choose from cartpole, lunarlander"),
    (["--env", ""], "--env : unknown environment; choose from cartpole"),
    (["--env", "../../x"], "--env ../../x: unknown environment; choose from cartpole"),
    (["--env", "no_such_module:Env-v0"], "--env no_such_module:Env-v0: gymnasium cannot make it: ModuleNotFoundError"),
    (["--env", "..:Env-v0"], "--env ..:Env-v0: gymnasium cannot make it"),
    (["--env", "LunarLander-v2"], "--env LunarLander-v2: "),
    (["--env", "Pendulum-v1"], "--env Pendulum-v1: say which attribute is φ with --param, one of: "),
    (["--env", "Pendulum-v1", "--param", "g"], "--env Pendulum-v1: give the range of g, e.g. --range 5 15"),
    (["--env", "Pendulum-v1", "--param", "gg", "--range", "5", "15"], "--param gg: Pendulum-v1 has no such number"),
    (["--env", "Pendulum-v1", "--param", "step", "--range", "5", "15"], "--param step: Pendulum-v1 has no such number"),
    (["--env", "Pendulum-v1", "--param", "g", "g", "--range", *"1212"], "--param g g: an attribute stands twice"),
    (["--env", "Pendulum-v1", "--param", "l", "--range", "0", "1"], "--range: Pendulum-v1 fails at l = 0"),
    (["--env", "CartPole-v1", "--param", "masscart", "--range", "1", "2"], "give the same episode, so it is no task"),
    (["--env", "Blackjack-v1", "--param", "natural", "--range", "0", "1"], "Blackjack-v1: observations are Tuple"),
    # a run to watch
    (["--watch", "no-such-run"], "--watch no-such-run: there is no checkpoint.pt; name the folder of one run"),
]


@pytest.mark.parametrize(("words", "says"), FLAGS, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_wrong_command_is_answered_in_one_line_and_writes_nothing(tmp_path, capsys, words, says):
    assert says in refused(capsys, tmp_path, *words)
    assert not any(tmp_path.iterdir())


def test_an_algorithm_is_required(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--env", "cartpole"])
    assert stop.value.code == 2 and "--env and --algo are required, e.g." in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_asked_for_and_absent(tmp_path, capsys):
    assert "--device cuda: no CUDA device" in refused(capsys, tmp_path, "--device", "cuda")


def test_too_large_for_the_memory(tmp_path, capsys):
    error = refused(capsys, tmp_path, "--hidden", 10**15, code=1)  # 16 petabytes: refused at once
    assert "out of memory; give fewer --seed, --delta, --tasks" in error


# --- wrong files ---


def truncate(path):
    path.write_bytes(path.read_bytes()[:100])


def empty(path):
    path.write_bytes(b"")


def cut_the_last_row(path):
    path.write_bytes(path.read_bytes()[:-5])


def drop_a_row(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def garble(path):
    path.write_bytes(path.read_bytes() + b"\xff\xfe,1\n")


def header_alone(path):
    path.write_text(path.read_text().splitlines(keepends=True)[0])


def folder_instead(path):
    path.unlink()
    path.mkdir()


def state_with(**changes):
    """Damage: some entries of a checkpoint replaced; None: left out."""

    def damage(path):
        state = torch.load(path, weights_only=True) | changes
        torch.save({key: x for key, x in state.items() if x is not None}, path)

    return damage


def theta_with(change):
    """Damage: θ of a checkpoint changed in place."""

    def damage(path):
        state = torch.load(path, weights_only=True)
        change(state["theta"])
        torch.save(state, path)

    return damage


class Code:
    def __reduce__(self):
        return (os.mkdir, (os.environ["HOSTILE_FOLDER"],))


def hostile(path):
    torch.save({"format": 1, "settings": Code()}, path)


def lose_adams_state(path):
    state = torch.load(path, weights_only=True)
    del state["optimizer"][0]["exp_avg"]
    torch.save(state, path)


ADAM = "cartpole-pg/directed-meta-sgd/delta0.005/seed1"
FILES = [
    # the file, what is done to it, the exit code, and the line
    ("checkpoint.pt", truncate, 1, "checkpoint.pt: not a checkpoint that torch can read"),
    ("checkpoint.pt", empty, 1, "checkpoint.pt: not a checkpoint that torch can read"),
    ("checkpoint.pt", hostile, 1, "checkpoint.pt: not a checkpoint that torch can read"),
    ("checkpoint.pt", folder_instead, 1, "checkpoint.pt: Is a directory"),
    ("checkpoint.pt", lambda p: torch.save({"model": torch.zeros(3)}, p), 1, "not a checkpoint of this program"),
    ("checkpoint.pt", lambda p: torch.save([1, 2], p), 1, "not a checkpoint of this program"),
    ("checkpoint.pt", state_with(format=0), 1, "checkpoint.pt: of format 0, this program's is 2"),
    ("checkpoint.pt", state_with(format=None), 1, "checkpoint.pt: of format None, this program's is 2"),
    ("checkpoint.pt", state_with(settings=None), 1, "not a checkpoint of this program"),
    ("checkpoint.pt", state_with(settings={}), 2, "began with algo None, this command says fomaml"),
    ("checkpoint.pt", state_with(settings={"algo": torch.zeros(2, 2)}), 2, "began with algo tensor("),
    ("checkpoint.pt", state_with(theta=None), 1, "checkpoint.theta.policy.0.weight is None, expected [1, 1, 4, 8]"),
    ("checkpoint.pt", state_with(theta=3), 1, "checkpoint.theta.policy.0.weight is None, expected [1, 1, 4, 8]"),
    ("checkpoint.pt", theta_with(lambda t: t.pop("policy.1.bias")), 1, "checkpoint.theta.policy.1.bias is None"),
    ("checkpoint.pt", theta_with(lambda t: t.update(more=torch.zeros(1))), 1, "checkpoint.theta.more is [1] torch"),
    (
        "checkpoint.pt",
        theta_with(lambda t: t.update({"policy.0.weight": torch.zeros(1, 1, 4, 9)})),
        1,
        "policy.0.weight is [1, 1, 4, 9] torch.float32, expected [1, 1, 4, 8] torch.float32",
    ),
    (
        "checkpoint.pt",
        theta_with(lambda t: t.update({"policy.0.weight": t["policy.0.weight"].double()})),
        1,
        "policy.0.weight is [1, 1, 4, 8] torch.float64, expected [1, 1, 4, 8] torch.float32",
    ),
    ("checkpoint.pt", state_with(epoch=-3), 1, "checkpoint.pt: epoch is -3, expected at least 1"),
    ("checkpoint.pt", state_with(epoch="4"), 1, "checkpoint.epoch is str, expected int"),
    ("checkpoint.pt", state_with(totals={}), 1, "checkpoint.totals.env_steps is None, expected int"),
    ("checkpoint.pt", state_with(epoch=7), 1, "log.csv: does not hold epochs 1 to 7, as checkpoint.pt does"),
    (f"../../../{ADAM}/checkpoint.pt", lose_adams_state, 1, "optimizer.0.exp_avg is None, expected [1, 1, 4, 8]"),
    (f"../../../{ADAM}/checkpoint.pt", state_with(alpha=0.1), 1, "alpha.policy.0.weight is None, expected [1, 1, 4"),
    ("log.csv", Path.unlink, 1, "log.csv: does not hold epochs 1 to 4, as checkpoint.pt does"),
    ("log.csv", drop_a_row, 1, "log.csv: does not hold epochs 1 to 4, as checkpoint.pt does"),
    ("log.csv", cut_the_last_row, 1, "log.csv: does not hold epochs 1 to 4, as checkpoint.pt does"),
    ("log.csv", header_alone, 1, "log.csv: does not hold epochs 1 to 4, as checkpoint.pt does"),
    ("log.csv", garble, 1, "log.csv: '��,1' is no row of epoch,env_steps"),
    ("eval.csv", garble, 1, "eval.csv: '��,1' is no row of epoch,phi,step,return"),
    ("log.csv", folder_instead, 1, "log.csv: Is a directory"),
]


@pytest.mark.parametrize(("name", "damage", "code", "says"), FILES)
def test_a_damaged_file_is_named_with_the_remedy_and_nothing_is_harmed(
    out, capsys, monkeypatch, name, damage, code, says
):
    monkeypatch.setenv("HOSTILE_FOLDER", str(out / "hostile"))
    path = (out / RUN / name).resolve()
    damage(path)
    before = snapshot(out)
    words = ["--optimizer", "adam"] if ADAM in str(path) else []
    error = refused(capsys, out, *words, "--resume", algo=path.parts[-4 if words else -3], epochs=8, code=code)
    assert says in error and ("--overwrite" in error or "mend that" in error)
    assert snapshot(out) == before and not (out / "hostile").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], f"{RUN}: this run exists; give --resume to go on, --overwrite to start anew, or another --out"),
        (["--algo", "maml", "fomaml"], f"{RUN}: this run exists"),  # and nothing else is begun
        (["--resume", "--beta", "0.5"], "began with beta 0.001, this command says 0.5; give --beta as before"),
        (["--resume", "--range", "6", "7"], "began with low [5.0], this command says [6.0]; give --range as before"),
        (["--resume", "--hidden", "9"], "began with hidden [8], this command says [9]; give --hidden as before"),
        (["--resume", "--inner-steps", "2"], "began with inner_steps 1, this command says 2; give --inner-steps as"),
        (["--resume", "--epochs", "3"], f"{RUN}: is at epoch 4 already; give --epochs 4 or more"),
    ],
)
def test_a_run_that_exists_is_kept(out, capsys, words, says):
    before = snapshot(out)
    assert says in refused(capsys, out, *words)
    assert snapshot(out) == before


@pytest.mark.parametrize("where", [".", "cartpole-pg", "cartpole-pg/fomaml", RUN])
def test_a_file_in_the_way_of_a_folder_is_named(tmp_path, capsys, where):
    path = tmp_path / "out" / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")
    assert str(path) in refused(capsys, tmp_path / "out", code=1)
    assert snapshot(tmp_path) == {str(path.relative_to(tmp_path)): b"in the way"}


# --- what comes from a stranger ---


def hostile_settings(**changes):
    def damage(path):
        state = torch.load(path, weights_only=True)
        torch.save(state | {"settings": state["settings"] | changes}, path)

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (hostile, "checkpoint.pt: not a checkpoint that torch can read"),
        (hostile_settings(env="../../x"), "--env ../../x: unknown environment"),
        (
            hostile_settings(env="hostile_module:Env-v0"),
            "runs the code of module hostile_module:Env-v0; if you trust it",
        ),
        (hostile_settings(algo="../../x"), "--algo: '../../x': choose from"),
        (hostile_settings(hidden=[-1]), "--hidden: '-1'"),
        (hostile_settings(hidden="--overwrite"), "--hidden: expected at least one argument"),
        (hostile_settings(hidden=[9]), "checkpoint.theta.policy.0.weight is [1, 1, 4, 8] torch.float32, expected"),
        (hostile_settings(horizon=torch.zeros(2)), "--horizon"),
        (hostile_settings(low=3), "its settings are not those of a run"),
        (hostile_settings(surprise=1), "--surprise: "),
        (hostile_settings(medium=["mean", "--out", "/x"]), "began with medium"),
        (state_with(settings={}), "its settings are not those of a run ('low')"),
        (theta_with(lambda t: t.clear()), "checkpoint.theta.policy.0.weight is None"),
    ],
)
def test_watching_a_strangers_run_runs_no_code_and_says_what_is_wrong(out, capsys, monkeypatch, tmp_path, damage, says):
    monkeypatch.setenv("HOSTILE_FOLDER", str(tmp_path / "hostile"))
    (tmp_path / "hostile_module.py").write_text(f"import os; os.mkdir({str(tmp_path / 'hostile')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    damage(out / RUN / "checkpoint.pt")
    before = snapshot(out)
    with pytest.raises(SystemExit) as stop:
        run.main(["--watch", str(out / RUN)])
    error = capsys.readouterr().err
    assert stop.value.code in (1, 2) and error.count("\n") == 1 and says in error
    assert snapshot(out) == before and not (tmp_path / "hostile").exists()


@pytest.mark.skipif(os.name == "nt", reason="symbolic links")
@pytest.mark.parametrize("name", [*run.RUN_FILES, "log.csv.tmp", "../../report.md", "../../report.md.tmp"])
def test_links_in_a_strangers_folder_are_replaced_and_not_followed(out, tmp_path, name):
    outside = tmp_path / "outside"
    path = out / RUN / name
    if path.exists():
        shutil.copy(path, outside)
        path.unlink()
    else:
        outside.write_text("mine")
    path.symlink_to(outside)
    before = outside.read_bytes()
    go(out, "--resume", epochs=5)
    assert outside.read_bytes() == before


def write_config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def in_file(name, damage):
    return lambda folder: damage(folder / name)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.json", in_file("config.json", truncate)),
        ("config.json", in_file("config.json", garble)),
        ("config.json", lambda folder: (folder / "config.json").write_text("[]")),
        ("config.json", write_config(algo="../../x")),
        ("config.json", write_config(delta="large")),
        ("config.json", write_config(threshold=[1])),
        ("config.json", write_config(phi=["another"])),
        ("config.json", write_config(low=[5.0, 5.0])),
        ("config.json", write_config(high=["15"])),
        ("log.csv", in_file("log.csv", garble)),
        ("log.csv", lambda folder: (folder / "log.csv").write_text("epoch,seconds\n1,2\n")),
        ("log.csv", lambda folder: (folder / "log.csv").write_text("epoch,env_steps,seconds,return_post\n1,2,x,4\n")),
        ("log.csv", in_file("log.csv", folder_instead)),
        ("eval.csv", in_file("eval.csv", garble)),
        ("eval.csv", lambda folder: (folder / "eval.csv").write_text("epoch\n1\n")),
        ("eval.csv", lambda folder: (folder / "eval.csv").write_text("epoch,phi,step,return\n1,5 5,0,9\n")),
    ],
)
def test_a_damaged_run_beside_is_left_out_of_the_report_in_one_line(out, capsys, name, damage):
    beside = out / "cartpole-pg/zfoma/seed1"  # after the good runs, which say what φ is
    shutil.copytree(out / RUN, beside)
    damage(beside)
    go(out, "--seed", 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(beside / name) in error and "left out of the report" in error
    text = (out / "cartpole-pg/report.md").read_text(encoding="utf-8")
    assert "| fomaml | 2 |" in text and f"{beside / name}: " in text


def test_half_a_row_at_the_end_of_a_log_is_no_damage_for_the_report(out, capsys):
    """Another command may be writing it just now."""
    shutil.copytree(out / RUN, out / "cartpole-pg/fomaml/seed9")
    for name in ("log.csv", "eval.csv"):
        with open(out / "cartpole-pg/fomaml/seed9" / name, "a") as file:
            file.write("5,9")
    go(out, "--seed", 2)
    assert capsys.readouterr().err == ""
    assert "| fomaml | 3 | 4 |" in (out / "cartpole-pg/report.md").read_text(encoding="utf-8")


# --- crashes ---


class Crash(BaseException):
    pass


@pytest.mark.parametrize("count", range(1, 9))
def test_a_crash_at_any_step_of_writing_checkpoints_parts_no_sweep(tmp_path, monkeypatch, count):
    """The second checkpoints of three runs are 3 files written aside and 3 put in place, and each step may be the last;
    the first ones are 6 steps too, so that counts 1 to 8 crash in both phases of the first, and in the second."""
    words = ["--seed", 1, 2, 3, "--optimizer", "adam"]
    go(tmp_path / "whole", *words, epochs=6)
    left = count

    def crash_after(step):
        def stepping(source, *args):
            nonlocal left
            if Path(source).name == run.ASIDE:
                left -= 1
                if left < 0:
                    raise Crash
            return step(source, *args)

        return stepping

    with monkeypatch.context() as patch:
        patch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(report, "write_durably", crash_after(report.write_durably))
        patch.setattr(os, "replace", crash_after(os.replace))
        with pytest.raises(Crash):
            go(tmp_path / "killed", *words, epochs=6)
    sizes = []
    whole_batch = run.train_group

    def train_group(group, *args):
        sizes.append(len(group))
        return whole_batch(group, *args)

    monkeypatch.setattr(run, "train_group", train_group)
    go(tmp_path / "killed", *words, "--resume", epochs=6)
    assert sizes == [3]  # they go on as one batch
    assert torture.differences(tmp_path / "whole", tmp_path / "killed") == []


def test_a_stale_checkpoint_aside_is_not_taken(out, tmp_path):
    """It is of this run and of these settings, but of an epoch at which no other run stands: a crash while it was
    written. The run goes on from its checkpoint, as it would have."""
    folder = out / RUN
    aside = torch.load(folder / run.CHECKPOINT, weights_only=True)
    torch.save(aside | {"epoch": 5, "theta": {key: p + 1 for key, p in aside["theta"].items()}}, folder / run.ASIDE)
    go(out, "--resume", epochs=6)
    go(tmp_path / "whole", epochs=6)
    assert torture.differences(tmp_path / "whole/cartpole-pg/fomaml", out / "cartpole-pg/fomaml") == []


def test_the_last_evaluation_off_the_schedule_survives_resuming_a_finished_run(tmp_path):
    go(tmp_path, epochs=5)  # evaluated every 2 epochs, and at the end
    before = snapshot(tmp_path)
    assert rows(tmp_path / RUN / "eval.csv")[-1]["epoch"] == "5"
    go(tmp_path, "--resume", epochs=5)
    assert snapshot(tmp_path)[f"{RUN}/eval.csv"] == before[f"{RUN}/eval.csv"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_sweep_killed_twice_equals_one_that_was_not(tmp_path, monkeypatch):
    """A short tests/torture.py."""
    words = ["--env", "cartpole", "--algo", "directed-fomaml", "--seed", "1", "2", "--delta", "0.001", "0.005"]
    monkeypatch.setitem(torture.CASES, "short", ([], [*words, "--horizon", "20", "--epochs", "40"]))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    go(whole, *words[4:], "--horizon", 20, "--eval-every", 4, algo="directed-fomaml", epochs=40)
    assert torture.torture("short", killed, 2, random.Random(1))["kills"] == 2
    assert torture.differences(whole, killed) == []


# --- signals ---


def begun(process, log, count=3):
    """Wait until the run of a process has logged `count` rows."""
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None and not (log.exists() and len(rows(log)) >= count):
        time.sleep(0.02)
    assert process.poll() is None and log.exists()


def popen(*words, out, **options):
    words = ["--epochs", "100000", "--out", str(out), *SMALL, *words]
    return subprocess.Popen(
        [sys.executable, "run.py", *words], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("times", [1, 2])
def test_a_terminals_ctrl_c_reaches_the_workers_too_and_harms_nothing(tmp_path, times):
    """Once: the epoch ends. Twice: it stops at once. Either way the files are good and the run goes on from them."""
    words = ["--env", "Pendulum-v1", *GYM, "--algo", "fomaml", "--workers", "2", "--horizon", "200"]
    process = popen(*words, out=tmp_path, start_new_session=True)
    folder = tmp_path / "Pendulum-v1-pg/fomaml/seed1"
    begun(process, folder / "log.csv")
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)  # two that are pending at once count as one
    error = process.communicate(timeout=300)[1]
    says = "stopped; go on with: python run.py" if times == 1 else "stopped at once; go on from the last checkpoint"
    assert process.returncode == 128 + signal.SIGINT and error.startswith(f"run.py: {says}") and error.count("\n") == 1
    torture.wait_for_the_end(process.pid)
    epochs = len(rows(folder / "log.csv")) + 1
    go(tmp_path, *GYM, "--workers", 0, "--horizon", 200, "--resume", env="Pendulum-v1", epochs=epochs)
    assert [row["epoch"] for row in rows(folder / "log.csv")] == [str(epoch) for epoch in range(1, epochs + 1)]


# --- two at once ---


@pytest.mark.skipif(run.fcntl is None, reason="there are no locks")
def test_a_second_process_on_the_same_run_is_refused_and_harms_nothing(tmp_path, capsys):
    process = popen("--env", "cartpole", "--algo", "fomaml", out=tmp_path)
    folder = tmp_path / RUN
    try:
        begun(process, folder / "log.csv")
        for words in (["--resume"], ["--overwrite"], []):
            error = refused(capsys, tmp_path, *words, "--seed", 2, 1, epochs=100000, code=1)
            assert f"{folder}: another process is training this run; wait for its end" in error
            assert not (tmp_path / "cartpole-pg/fomaml/seed2").exists()
        go(tmp_path, "--seed", 3)  # another run in the same experiment
        assert "| fomaml | 2 |" in (tmp_path / "cartpole-pg/report.md").read_text(encoding="utf-8")
    finally:
        process.kill()
        process.communicate()
    epochs = len(rows(folder / "log.csv"))
    assert epochs >= 3
    go(tmp_path, "--resume", epochs=5 + epochs)  # the dead process leaves no lock


# --- not a number ---


@pytest.mark.parametrize("rl", ["pg", "ac"])
@pytest.mark.parametrize("algo", ["directed-maml", "directed-meta-sgd", "directed-reptile"])
def test_a_run_that_explodes_fails_alone_and_is_counted_before_and_after_resuming(tmp_path, capsys, rl, algo):
    words = ["--seed", 1, 2, "--delta", 0.005, 1e39, "--rl", rl]  # δ beyond float32: it explodes in the first epoch
    root = tmp_path / f"cartpole-{rl}" / algo
    go(tmp_path / "alone", *words[:5], *words[6:], algo=algo, epochs=6)
    for epochs, resume in ((3, []), (6, ["--resume"])):
        with pytest.raises(SystemExit) as stop:
            go(tmp_path, *words, *resume, algo=algo, epochs=epochs)
        error = capsys.readouterr().err.splitlines()
        assert stop.value.code == 1 and len(error) == 2
        for seed, line in zip((1, 2), error, strict=True):
            assert f"{algo}, seed {seed}, delta 1e+39: a loss or parameter is not finite after epoch 1; try" in line
            assert (root / f"delta1e+39/seed{seed}/failed.txt").read_text() == line.removeprefix("run.py: ") + "\n"
        assert f"| {algo}, δ = 1e+39 | 2 (2 failed) | 1 |" in (root.parent / "report.md").read_text(encoding="utf-8")
    for seed in (1, 2):
        alone = tmp_path / f"alone/cartpole-{rl}" / algo / f"delta0.005/seed{seed}"
        assert rows(root / f"delta0.005/seed{seed}/log.csv") == rows(alone / "log.csv")


def test_a_loss_that_is_not_finite_stops_its_run_though_the_parameters_are(tmp_path, capsys, monkeypatch):
    """An infinite loss of run 2 alone, whose gradient is zero."""

    def pg(params, batch, **options):
        loss = run.policies.pg(params, batch, **options)
        return loss + torch.tensor([0.0, float("inf")])[:, None] if len(loss) == 2 else loss

    monkeypatch.setitem(run.policies.LOSSES, "pg", pg)
    with pytest.raises(SystemExit):
        go(tmp_path, "--seed", 1, 2, epochs=1)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "fomaml, seed 2: a loss or parameter is not finite after epoch 1" in error
    states = [tmp_path / f"cartpole-pg/fomaml/seed{seed}/checkpoint.pt" for seed in (1, 2)]
    assert states[0].exists() and not states[1].exists()


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


@pytest.mark.parametrize("leave", [0, 4096, 8192, 16384])
def test_a_disk_that_fills_up_ends_in_one_line_and_the_last_checkpoint_goes_on(small_disk, tmp_path, capsys, leave):
    go(small_disk, "--seed", 1, 2)
    fill(small_disk, leave)
    error = refused(capsys, small_disk, "--seed", 1, 2, "--resume", epochs=200, code=1)
    assert f"{small_disk}" in error and ": No space left on device; mend that and go on with --resume" in error
    (small_disk / "ballast").unlink()
    go(small_disk, "--seed", 1, 2, "--resume", epochs=6)
    go(tmp_path / "whole", "--seed", 1, 2, epochs=6)
    assert torture.differences(tmp_path / "whole", small_disk) == []


def test_no_space_for_the_report_is_one_line_after_the_training_is_safe(small_disk, capsys, monkeypatch):
    monkeypatch.setattr(run, "open_problem", functools.partial(filled_at_the_end, run.open_problem, small_disk))
    error = refused(capsys, small_disk, code=1)
    assert "No space left on device" in error and "summary.csv" in error
    assert torch.load(small_disk / RUN / "checkpoint.pt", weights_only=True)["epoch"] == 4


@run.contextlib.contextmanager
def filled_at_the_end(open_problem, folder, *args):
    with open_problem(*args) as problem:
        yield problem
    fill(folder, 0)


def test_a_disk_that_may_not_be_written_is_named(small_disk, capsys):
    go(small_disk)
    before = snapshot(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only file system" in refused(capsys, small_disk, "--resume", epochs=8, code=1)
    assert "Read-only file system" in refused(capsys, small_disk, "--seed", 2, code=1)
    assert snapshot(small_disk) == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(capsys, tmp_path, code=1)
    tmp_path.chmod(0o700)


def test_a_folder_deleted_while_it_runs_is_named(tmp_path):
    process = popen("--env", "cartpole", "--algo", "fomaml", out=tmp_path / "out")
    begun(process, tmp_path / "out" / RUN / "log.csv")
    os.rename(tmp_path / "out", tmp_path / "gone")  # at one stroke, unlike the deletion of many files
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 1 and error.count("\n") == 1
    assert f"{tmp_path / 'out' / RUN}" in error and "No such file or directory; mend that" in error


# --- other machines ---


def test_spaces_and_letters_of_other_scripts_in_a_relative_path_in_the_c_locale_without_a_terminal(tmp_path):
    folder = tmp_path / "mit Leerzeichen und Ümläuten δφ"
    folder.mkdir()
    environment = os.environ | {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["--env", "Pendulum-v1", *GYM, "--workers", "1", "--algo", "directed-maml", "--epochs", "2"]
    words += [x for x in SMALL if x != "--quiet"]
    for more in (["--help"], ["--out", "läufe δ"]):
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "run.py"), *words, *more],
            cwd=folder, env=environment, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        assert done.stderr == b""  # no progress bar in a log file
    root = folder / "läufe δ/Pendulum-v1-pg"
    assert len(rows(root / "directed-maml/delta0.005/seed1/log.csv")) == 2
    assert "directed-maml" in (root / "report.md").read_text(encoding="utf-8")
    bad = subprocess.run(
        [sys.executable, str(REPOSITORY / "run.py"), *words, "--medium", "φ"],
        cwd=folder, env=environment, capture_output=True,
    )  # fmt: skip
    assert bad.returncode == 2 and bad.stderr.count(b"\n") == 1 and b"--medium" in bad.stderr
