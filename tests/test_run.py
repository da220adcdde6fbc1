"""run.py as a user meets it: settings, files, determinism, resuming, learning, and one clear line for what is wrong."""

import json
import os
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import policies
import run
from harness import measures, optimizers, plan
from harness.checkpoints import TABLES, Run
from harness.settings import ALL_SETTINGS, algorithms, parse
from tests.commands import REPOSITORY, SMALL, refused, rows, snapshot, train

PENDULUM = ["--param", "g", "--range", "5", "15"]


# --- wrong commands ---


def test_config_json_alone_repeats_the_run(tmp_path):
    words = ["--range", 6, 14, "--rl", "ac", "--medium", 9, "--delta-schedule", "converged", "--threshold", 11]
    words += ["--seed", 3, "--delta", 0.01, "--optimizer", "adam", "--eval-range", 0, 20, "--inner-steps", 2]
    train(tmp_path / "first", *words, algo="directed-meta-sgd", epochs=3)
    folder = "cartpole-ac/directed-meta-sgd/delta0.01/seed3"
    config = json.loads((tmp_path / "first" / folder / "config.json").read_text())
    again = ["--out", str(tmp_path / "again"), "--quiet"]
    for name, value in config.items():
        if name in ALL_SETTINGS and value is not None and value is not False:
            again += [ALL_SETTINGS[name].flag, *map(str, value if isinstance(value, list) else [value])]
    run.main(again)
    for name in ("log.csv", "eval.csv", "config.json"):
        first, again = (tmp_path / out / folder / name for out in ("first", "again"))
        assert first.read_text() == again.read_text() if name == "config.json" else rows(first) == rows(again)
    assert config["cpu"].endswith(torch.backends.cpu.get_cpu_capability())
    assert config["versions"]["torch"] == torch.__version__ and config["phi_names"] == ["gravity (m/s²)"]


def test_the_settings_of_the_delta_step_are_those_of_directed_runs_alone(tmp_path):
    """What a command with both algorithms began, each algorithm's own command continues."""
    words = ["--medium", "random", "--delta-schedule", "converged"]
    train(tmp_path, *words, algo="maml directed-maml", epochs=1)
    train(tmp_path, "--resume", algo="maml", epochs=2)
    train(tmp_path, *words, "--resume", algo="directed-maml", epochs=2)
    for folder in ("maml/seed1", "directed-maml/delta0.005/seed1"):
        assert len(rows(tmp_path / "cartpole-pg" / folder / "log.csv")) == 2


# --- wrong commands ---

FLAGS = [
    # numbers out of range and of the wrong type
    (["--delta", "-0.1"], "--delta: '-0.1': expected a finite number >= 0"),
    (["--delta", "nan"], "--delta: 'nan': expected a finite number >= 0"),
    (["--delta", "inf"], "--delta: 'inf': expected a finite number >= 0"),
    (["--delta", "1e999"], "--delta: '1e999': expected a finite number >= 0"),
    (["--alpha", "-1"], "--alpha: '-1': expected a finite number >= 0"),
    (["--alpha", "small"], "--alpha: 'small': expected a finite number >= 0"),
    (["--beta", "-1"], "--beta: '-1': expected a finite number > 0"),
    (["--beta-alpha", "0"], "--beta-alpha: '0': expected a finite number > 0"),
    (["--gamma", "1.5"], "--gamma: '1.5': expected a finite number > 0 and <= 1"),
    (["--gamma", "0"], "--gamma: '0': expected a finite number > 0 and <= 1"),
    (["--gae-lambda", "-0.5"], "--gae-lambda: '-0.5': expected a finite number >= 0 and <= 1"),
    (["--seed", "-1"], "--seed: '-1': expected a finite whole number >= 0"),
    (["--seed", "1.5"], "--seed: '1.5': expected a finite whole number >= 0"),
    (["--seed", "5-1"], "--seed: '5-1': expected FIRST-LAST, at least one seed and at most a million"),
    (["--seed", "1-3000000000"], "--seed: '1-3000000000': expected FIRST-LAST"),
    (["--seed", "1-5", "3"], "--seed 1 2 3 4 5 3: duplicate value"),
    (["--seed", "one"], "--seed: 'one': expected a finite whole number >= 0"),
    (["--tasks", "0"], "--tasks: '0': expected a finite whole number >= 1"),
    (["--trajectories", "0"], "--trajectories: '0': expected a finite whole number >= 1"),
    (["--trajectories", "2.5"], "--trajectories: '2.5': expected a finite whole number >= 1"),
    (["--horizon", "0"], "--horizon: '0': expected a finite whole number >= 1"),
    (["--epochs", "-4"], "--epochs: '-4': expected a finite whole number >= 1"),
    (["--inner-steps", "-1"], "--inner-steps: '-1': expected a finite whole number >= "),
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
    (["--eval-range", "5"], "--eval-range 5: expected LOW HIGH for each of 1 parameter(s)"),
    (["--eval-range", "20", "0"], "--eval-range 20 0: expected finite numbers, LOW first"),
    (
        ["--algo", "directed-maml", "--medium", "9", "8"],
        "--medium 9 8: expected mean, sampled, median, ",
    ),
    (["--algo", "directed-maml", "--medium", "middle"], "--medium middle: expected mean, sampled, median, random"),
    (["--algo", "directed-maml", "--medium", "nan"], "--medium nan: expected mean, sampled, median, random"),
    (["--algo", "maml,fomaml"], "--algo: 'maml,fomaml': separate values by spaces: maml fomaml"),
    (["--seed", "1,2"], "--seed: '1,2': separate values by spaces: 1 2"),
    (["--rl", "pg", "ac"], "ac: a value too many for --rl; give a command for each"),
    (["--quiet", "stray"], "stray: a value too many for --quiet"),
    (["--like", "no-such-run"], "--like no-such-run: FileNotFoundError"),
    # missing values
    (["--delta"], "--delta: expected at least one argument"),
    (["--tasks"], "--tasks: expected one argument"),
    # unknown words
    (["--algo", "fomal"], "--algo: 'fomal': did you mean fomaml?"),
    (["--algo", "directed_maml"], "--algo: 'directed_maml': did you mean directed-maml?"),
    (["--algo", "xyz"], "--algo: 'xyz': choose from maml, fomaml, meta-sgd, reptile, maml++, imaml"),
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
    (["--seed", "1", "1"], "--seed 1 1: duplicate value"),
    (["--algo", "directed-maml", "--delta", "0.1", "0.10"], "--delta 0.1 0.1: duplicate value"),
    (["--algo", "maml", "maml"], "--algo maml maml: duplicate value"),
    (["--delta", "0.1"], "--delta does nothing without an algorithm that begins with directed-"),
    (["--medium", "random"], "--medium does nothing without an algorithm that begins with directed-"),
    (["--delta-schedule", "decay"], "--delta-schedule does nothing without an algorithm that begins with directed-"),
    (["--beta-alpha", "0.1"], "--beta-alpha does nothing without an algorithm whose α is learned"),
    (["--gae-lambda", "0.9"], "--gae-lambda does nothing without --rl ac"),
    (["--phi", "12"], "--phi does nothing without --watch RUN"),
    (["--param", "gravity"], "--param gravity: cartpole has its own φ; leave it out"),
    (
        ["--env", "Pendulum-v1", *PENDULUM, "--algo", "directed-maml", "--delta-schedule", "converged"],
        "--delta-schedule converged: give the return that counts as converged, --threshold",
    ),
    # environments
    (["--env", "carpole"], "--env carpole: unknown environment; did you mean cartpole?"),
    (["--env", "qqqq"], "--env qqqq: unknown environment; choose from cartpole, crossing"),
    (["--env", ""], "--env: unknown environment; choose from cartpole"),
    (["--env", "../../x"], "--env ../../x: unknown environment; choose from cartpole"),
    (["--env", "no_such_module:Env-v0"], "--env no_such_module:Env-v0: gymnasium cannot make it: ModuleNotFoundError"),
    (["--env", "..:Env-v0"], "--env ..:Env-v0: gymnasium cannot make it"),
    (["--env", "LunarLander-v2"], "--env LunarLander-v2: "),
    (["--env", "Pendulum-v1"], "--param: say which parameter of Pendulum-v1 is φ, one of: "),
    (["--env", "Pendulum-v1", "--param", "g"], "--range: give LOW HIGH for g of Pendulum-v1, e.g. 5 15"),
    (["--env", "Pendulum-v1", "--param", "gg", "--range", "5", "15"], "--param gg: Pendulum-v1 has no such number"),
    (["--env", "Pendulum-v1", "--param", "step", "--range", "5", "15"], "--param step: Pendulum-v1 has no such number"),
    (["--env", "Pendulum-v1", "--param", "g", "g", "--range", *"1212"], "--param g g: duplicate attribute"),
    (["--env", "Pendulum-v1", "--param", "l", "--range", "0", "1"], "--range: Pendulum-v1 fails at l = 0"),
    (
        ["--env", "CartPole-v1", "--param", "masscart", "--range", "1", "2"],
        "so it is no task",
    ),
    (
        ["--env", "Blackjack-v1", "--param", "natural", "--range", "0", "1"],
        "natural: a switch of Blackjack-v1",
    ),
    # a run to watch
    (["--watch", "no-such-run"], "no-such-run: there is no checkpoint.pt; name the folder of one run"),
]


@pytest.mark.parametrize(("words", "says"), FLAGS, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_wrong_command_is_answered_in_one_line_and_writes_nothing(tmp_path, capsys, words, says):
    error = refused(capsys, tmp_path, *words)
    assert says in error and "`" not in error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--env", "cartpole"], ["--algo", "maml"], []])
def test_an_environment_and_an_algorithm_are_required(capsys, words):
    with pytest.raises(SystemExit) as stop:
        run.main(words)
    assert stop.value.code == 2 and "--env and --algo are required, e.g." in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_asked_for_and_absent(tmp_path, capsys):
    assert "--device cuda: no CUDA device" in refused(capsys, tmp_path, "--device", "cuda")


def test_too_large_for_the_memory(tmp_path, capsys):
    for words in (["--hidden", 10**9], ["--tasks", 10**9], ["--trajectories", 10**8], ["--horizon", 10**9]):
        error = refused(capsys, tmp_path, *words)
        assert "run.py: this needs " in error and "GiB of memory at the least, and the machine has" in error
        assert words[0] in error.split("; give ")[1]
    assert not any(tmp_path.iterdir())


def test_algorithms_that_train_at_once_need_their_memory_together(tmp_path, capsys, monkeypatch):
    """Of two seeds, M = 5 tasks have their parameters, 4 · 1000 + 1000 · 2 of them, twice; three times K = 1 trajectory
    of one step has the activations of every layer; 4 bytes each."""
    need = 4 * 2 * 5 * (2 * (4 * 1000 + 1000 * 2) + 3 * (1000 + 2))
    words = ["--hidden", 1000, "--tasks", 5, "--trajectories", 1, "--horizon", 1, "--seed", 1, 2]
    for workers, algos, have in ((1, 1, need), (1, 2, need), (2, 1, need), (2, 2, 2 * need)):
        monkeypatch.setattr(plan, "memory", lambda device, have=have: have - 1)
        out = tmp_path / f"{workers}-{algos}"
        algo = " ".join(["maml", "fomaml"][:algos])
        assert "this needs" in refused(capsys, out, *words, "--workers", workers, algo=algo)
        monkeypatch.setattr(plan, "memory", lambda device, have=have: have)
        plan.check_memory(args := parse(full(words, workers, algo)), plan.make_env(args), "cpu")
    plan.check_memory(args, plan.make_env(args), "cpu")
    monkeypatch.setattr(plan, "memory", lambda device: need)
    plan.check_memory(args, plan.make_env(args), "cuda")  # one process, one algorithm at a time


def full(words, workers, algo):
    return [*map(str, words), "--workers", str(workers), "--env", "cartpole", "--algo", *algo.split()]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_memory_that_runs_out_while_it_trains_is_one_line(tmp_path, capsys, monkeypatch, error):
    def full(*args):
        raise error

    monkeypatch.setattr(run, "train_epoch", full)
    error = refused(capsys, tmp_path, code=1)
    assert "out of memory; give fewer --seed, --delta, --tasks" in error and "--horizon" in error


# `python run.py words`, then the same words and --help, and with a wrong one: as programs, in one process.
THREE_COMMANDS = """
import contextlib, runpy, sys
sys.modules["matplotlib"] = None
words = ["run.py", *sys.argv[1:]]
for more in ([], ["--help"], ["--medium", "\\u03c6"]):
    sys.argv = [*words, *more]
    with contextlib.suppress(SystemExit):
        runpy.run_module("run", run_name="__main__")
"""


def test_spaces_and_letters_of_other_scripts_in_a_relative_path_in_the_c_locale_without_a_terminal(tmp_path):
    folder = tmp_path / "mit Leerzeichen und Ümläuten δφ"
    folder.mkdir()
    environment = os.environ | {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["--env", "Pendulum-v1", *PENDULUM, "--workers", "1", "--algo", "directed-maml", "--epochs", "2"]
    words += [x for x in SMALL if x != "--quiet"] + ["--out", "läufe δ"]
    done = subprocess.run(
        [sys.executable, "-c", THREE_COMMANDS, *words],
        cwd=folder, env=environment | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert done.stderr.count(b"\n") == 1 and b"--medium" in done.stderr  # no progress bar in a log file
    assert b"wrote " in done.stdout and b"--delta-schedule" in done.stdout
    root = folder / "läufe δ/Pendulum-v1-pg"
    assert len(rows(root / "directed-maml/delta0.005/seed1/log.csv")) == 2
    assert "directed-maml" in (root / "report.md").read_text(encoding="utf-8")


def test_without_a_terminal_a_line_every_30_seconds_tells_the_time_left_over_all_runs(capsys, monkeypatch):
    """Two algorithms, two runs each, 10 epochs: 40; an update of 2 takes 11 s, so that each line comes at the third."""
    runs = [Run(None, {}, {"epoch": 0}) for _ in range(4)]
    now = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    with run.Progress(runs, SimpleNamespace(quiet=False, epochs=10), SimpleNamespace(rank=0)) as progress:
        for i in range(20):
            now[0] += 11
            progress.update(("maml" if i < 10 else "directed-maml", 2, 20.0 + i))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[0] == "maml: return 22; 6 of all runs' 40 epochs, 187 s left"  # 34 epochs at 5.5 s
    assert lines[3] == "directed-maml: return 31; 24 of all runs' 40 epochs, 88 s left"


# --- files ---


@pytest.mark.parametrize(("env", "rl"), [("cartpole", "pg"), ("point", "ac"), ("velocity", "pg")])
def test_every_algorithm_trains_logs_evaluates_and_is_reported(tmp_path, env, rl):
    train(tmp_path, "--rl", rl, "--seed", 1, 2, "--eval-steps", 3, env=env, algo=" ".join(algorithms()), epochs=2)
    root = tmp_path / f"{env}-{rl}"
    for algo in algorithms():
        delta = "delta0.0015" if env == "velocity" else "delta0.005"
        folder = root / algo / (delta if algo.startswith("directed") else "") / "seed2"
        assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.pt", "config.json", "eval.csv", "log.csv"]
        log = rows(folder / "log.csv", without_times=False)
        assert list(log[0]) == TABLES["log"] and [row["epoch"] for row in log] == ["1", "2"]
        assert 0 < float(log[0]["sample_seconds"]) < float(log[0]["seconds"]) < float(log[1]["seconds"])
        assert (log[0]["return_med"] != "") == algo.startswith("directed")
        evaluation = rows(folder / "eval.csv")
        grid, steps = 36 if env == "point" else 10, "0123"
        assert list(evaluation[0]) == TABLES["eval"] and len(evaluation) == grid * len(steps)
        assert [row["step"] for row in evaluation[:4]] == list(steps)
        config = json.loads((folder / "config.json").read_text())
        assert config["seed"] == 2 and config["algo"] == algo
    text = (root / "report.md").read_text(encoding="utf-8")
    assert all(f"| {algo} | 2 |" in text for algo in algorithms())


def test_env_steps_count_what_was_sampled(tmp_path):
    """point never ends early: M tasks × K trajectories × H steps, before and after adaptation, and the medium one."""
    train(tmp_path, env="point", algo="maml directed-maml reptile", epochs=3)
    per_task = 3 * 12
    for folder, tasks in (("maml", 2 + 2), ("directed-maml/delta0.005", 1 + 2 + 2), ("reptile", 5 * 2)):
        log = rows(tmp_path / "point-pg" / folder / "seed1" / "log.csv")
        assert [int(row["env_steps"]) for row in log] == [tasks * per_task * epoch for epoch in (1, 2, 3)]


# --- steps ---


@pytest.mark.parametrize(("ours", "torchs"), [(optimizers.SGD, torch.optim.SGD), (optimizers.Adam, torch.optim.Adam)])
def test_the_beta_step_of_every_run_is_torchs_with_that_runs_beta(ours, torchs):
    betas, g = torch.tensor([0.1, 0.003], dtype=torch.float64), torch.Generator().manual_seed(0)
    theta, gradients = torch.randn(2, 1, 3, 4, generator=g), torch.randn(3, 2, 1, 3, 4, generator=g)
    together = theta.clone()
    moments = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(2, 1, 3, 4), "exp_avg_sq": torch.zeros(2, 1, 3, 4)}
    optimizer = ours([together], [betas], {0: moments})
    for gradient in gradients:
        together.grad = gradient
        optimizer.step()
    for i, beta in enumerate(betas.tolist()):
        alone = theta[i : i + 1].clone()
        optimizer = torchs([alone], lr=beta)
        for gradient in gradients:
            alone.grad = gradient[i : i + 1].clone()
            optimizer.step()
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-6, atol=1e-7)


def test_alpha_and_beta_vary_in_one_program_as_in_programs_of_their_own(tmp_path):
    for algo, optimizer in (("directed-maml", "adam"), ("meta-sgd", "sgd"), ("reptile", "sgd")):
        words = ["--optimizer", optimizer, "--workers", 1]
        train(tmp_path / "all", *words, "--alpha", 0.001, 0.1, "--beta", 0.01, 0.03, algo=algo)
        for alpha, beta in ((0.001, 0.03), (0.1, 0.01)):
            train(tmp_path / f"{alpha}-{beta}", *words, "--alpha", alpha, "--beta", beta, algo=algo)
            delta = "delta0.005/" if algo.startswith("directed") else ""
            folder = f"alpha{alpha:g}/beta{beta:g}/{delta}seed1"
            together = tmp_path / "all/cartpole-pg" / algo / folder
            alone = tmp_path / f"{alpha}-{beta}/cartpole-pg" / algo / f"{delta}seed1"
            assert rows(together / "log.csv") == rows(alone / "log.csv")
            states = [torch.load(x / "checkpoint.pt", weights_only=True)["theta"] for x in (together, alone)]
            assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_meta_sgds_alpha_has_a_step_of_its_own(tmp_path):
    """One SGD step moves α by beta_alpha times its gradient, and θ by beta: twice the step, twice the way."""
    moves, thetas = {}, []
    for step in (1e-6, 2e-6):
        train(tmp_path / str(step), "--beta-alpha", step, algo="meta-sgd", epochs=1)
        state = torch.load(tmp_path / str(step) / "cartpole-pg/meta-sgd/seed1/checkpoint.pt", weights_only=True)
        moves[step] = state["alpha"]["policy.1.weight"].double() - 0.001
        thetas.append(state["theta"]["policy.1.weight"])
    assert moves[1e-6].abs().max() > 0
    torch.testing.assert_close(moves[2e-6], 2 * moves[1e-6], rtol=0.05, atol=1e-9)
    assert torch.equal(*thetas)


def test_delta_decays_as_one_over_one_plus_a_hundredth_of_the_epoch():
    """δ_t = δ / (1 + t / 100), t epochs done; one δ for each run."""
    settings = {"delta": 0.1, "delta_schedule": "decay"}
    assert run.scheduled_delta(Run(None, settings, {"epoch": 50})) == pytest.approx(0.1 / 1.5)


def test_delta_ends_at_convergence_for_each_run_by_itself(tmp_path):
    """It is 0 after the EMA 0.9 of return_post has once been above the threshold."""
    words = ("--seed", 1, 2, 3)
    train(tmp_path / "on", *words, algo="directed-fomaml", epochs=12)
    logs = {seed: rows(next((tmp_path / "on").rglob(f"seed{seed}/log.csv"))) for seed in (1, 2, 3)}
    averages = {seed: measures.ema([float(row["return_post"]) for row in log]) for seed, log in logs.items()}
    threshold = sum(sorted(average[:6].max() for average in averages.values())[1:]) / 2  # one of three passes in 6
    words += ("--threshold", threshold, "--delta-schedule", "converged")
    train(tmp_path / "off", *words, algo="directed-fomaml", epochs=12)
    for seed, log in logs.items():
        got = rows(next((tmp_path / "off").rglob(f"seed{seed}/log.csv")))
        over = [epoch for epoch, average in enumerate(averages[seed]) if average > threshold]
        same = over[0] + 1 if over else 12  # rows until the run passed: the δ-step after it is the first to be left out
        assert got[:same] == log[:same] and (same >= 11 or got[same + 1 :] != log[same + 1 :])


# --- determinism ---


# --- resume ---


@pytest.mark.parametrize(
    ("algo", "optimizer"), [("directed-maml", "sgd"), ("directed-meta-sgd", "adam"), ("reptile", "adam")]
)
def test_three_epochs_and_three_more_are_six_row_for_row(tmp_path, algo, optimizer):
    words = ["--seed", 1, 2, "--optimizer", optimizer]
    train(tmp_path / "once", *words, algo=algo, epochs=6)
    train(tmp_path / "twice", *words, algo=algo, epochs=3)
    train(tmp_path / "twice", *words, "--resume", algo=algo, epochs=6)
    folders = [p.parent.relative_to(tmp_path / "once") for p in (tmp_path / "once").rglob("log.csv")]
    assert len(folders) == 2
    for folder in folders:
        for name in ("log.csv", "eval.csv"):
            assert rows(tmp_path / "once" / folder / name) == rows(tmp_path / "twice" / folder / name)
        states = [torch.load(tmp_path / x / folder / "checkpoint.pt", weights_only=True) for x in ("once", "twice")]
        assert all(torch.equal(states[0]["theta"][key], states[1]["theta"][key]) for key in states[0]["theta"])


def test_resume_of_a_finished_run_rewrites_the_report_and_changes_nothing(tmp_path):
    train(tmp_path, epochs=5)  # evaluated every 2 epochs, and at the end
    before = snapshot(tmp_path)
    (tmp_path / "cartpole-pg/report.md").unlink()
    train(tmp_path, "--resume", epochs=5)
    assert snapshot(tmp_path) == before


def test_overwrite_removes_the_runs_own_files_alone(tmp_path):
    train(tmp_path)
    note = tmp_path / "cartpole-pg/fomaml/seed1/note.txt"
    note.write_text("mine")
    train(tmp_path, "--overwrite", epochs=2)
    assert note.read_text() == "mine" and len(rows(note.with_name("log.csv"))) == 2


# --- not a number ---


@pytest.mark.filterwarnings("error")  # which would be more lines
@pytest.mark.parametrize(
    ("algo", "rl"), [("directed-maml", "pg"), ("directed-meta-sgd", "ac"), ("directed-reptile", "pg")]
)
def test_a_run_that_explodes_fails_alone_and_is_counted_before_and_after_resuming(tmp_path, capsys, rl, algo):
    words = ["--seed", 1, 2, "--delta", 0.005, 1e39, "--rl", rl]  # δ beyond float32: it explodes in the first epoch
    root = tmp_path / f"cartpole-{rl}" / algo
    train(tmp_path / "alone", *words[:5], *words[6:], algo=algo, epochs=6)
    for epochs, resume in ((3, []), (6, ["--resume"])):
        with pytest.raises(SystemExit) as stop:
            train(tmp_path, *words, *resume, algo=algo, epochs=epochs)
        error = capsys.readouterr().err.splitlines()
        assert stop.value.code == 1 and len(error) == 2
        for seed, line in zip((1, 2), error, strict=True):
            folder = root / f"delta1e+39/seed{seed}"
            assert line.startswith(f"run.py: {folder}: a loss or parameter is not finite after epoch 1; try a smaller")
            assert (root / f"delta1e+39/seed{seed}/failed.txt").read_text() == line.removeprefix("run.py: ") + "\n"
        assert f"| {algo}, δ = 1e+39 | 2 (2 failed) | 1 |" in (root.parent / "report.md").read_text(encoding="utf-8")
    for seed in (1, 2):
        alone = tmp_path / f"alone/cartpole-{rl}" / algo / f"delta0.005/seed{seed}"
        assert rows(root / f"delta0.005/seed{seed}/log.csv") == rows(alone / "log.csv")


def test_a_loss_that_is_not_finite_stops_its_run_though_the_parameters_are(tmp_path, capsys, monkeypatch):
    """An infinite loss of run 2 alone, whose gradient is zero."""

    def loss(params, trajectories, **options):
        loss = shipped(params, trajectories, **options)
        return loss + torch.tensor([0.0, float("inf")])[:, None] if len(loss) == 2 else loss

    shipped = policies.loss
    monkeypatch.setattr(policies, "loss", loss)
    with pytest.raises(SystemExit):
        train(tmp_path, "--seed", 1, 2, "--workers", 1, epochs=1)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "fomaml/seed2: a loss or parameter is not finite after epoch 1" in error
    states = [tmp_path / f"cartpole-pg/fomaml/seed{seed}/checkpoint.pt" for seed in (1, 2)]
    assert states[0].exists() and not states[1].exists()


# --- CUDA ---


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("env", ["cartpole", "crossing", "point", "velocity"])
@pytest.mark.parametrize("rl", ["pg", "ac"])
def test_cuda_agrees_with_the_cpu_and_checkpoints_move_between_them(tmp_path, env, rl):
    logs = []
    torch.set_default_dtype(torch.float64)
    try:
        for device in ("cpu", "cuda"):
            train(tmp_path / device, "--device", device, "--rl", rl, env=env, algo="directed-maml", epochs=3)
            (log,) = (tmp_path / device).rglob("log.csv")
            logs.append(rows(log))
        train(tmp_path / "cuda", "--device", "cpu", "--rl", rl, "--resume", env=env, algo="directed-maml", epochs=4)
    finally:
        torch.set_default_dtype(torch.float32)
    for cpu, cuda in zip(*logs, strict=True):
        for key in ("return_pre", "return_post", "return_med"):
            assert float(cpu[key]) == pytest.approx(float(cuda[key]), rel=1e-6)


# --- it learns ---


@pytest.mark.parametrize(
    ("env", "epochs", "least"),
    [("crossing", 60, 36.5), ("point", 80, -2.6), ("velocity", 80, -5.2)],
)
def test_every_continuous_family_learns_no_more_slowly_than_it_did(tmp_path, env, epochs, least):
    """The median over 4 seeds of the return in the last ten epochs. When the bounds were set it was 38.7, -2.17 and
    -4.54; with the form of σ before, which slowed the crossing down to half its speed, 34.8, -2.19 and -5.37. CartPole
    is in test_trained.py."""
    words = ["--seed", "1-4", "--tasks", 5, "--trajectories", 10, "--hidden", 32, 32, "--eval-every", 1000]
    words += ["--horizon", 60 if env == "crossing" else 20]
    train(tmp_path, *words, env=env, epochs=epochs)
    logs = [rows(path)[-10:] for path in tmp_path.rglob("log.csv")]
    returns = [sum(float(row["return_post"]) for row in log) / 10 for log in logs]
    assert len(returns) == 4 and statistics.median(returns) > least
