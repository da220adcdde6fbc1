"""run.py as a user meets it: files, resume, determinism, learning, and one clear line for whatever is wrong."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import report
import run

REPOSITORY = Path(__file__).parent.parent
SMALL = ["--tasks", "2", "--trajectories", "3", "--horizon", "12", "--hidden", "8", "--eval-every", "2", "--quiet"]
TIMES = ("seconds", "sample_seconds")


def go(out, *words, env="cartpole", algo="fomaml", epochs=4):
    """Run a small command in this process."""
    run.main(
        ["--env", env, "--algo", *algo.split(), "--epochs", str(epochs), "--out", str(out), *SMALL, *map(str, words)]
    )


def refused(capsys, out, *words, code=2, **kwargs):
    """The one line on standard error of a command that must fail with this exit code."""
    with pytest.raises(SystemExit) as stop:
        go(out, *words, **kwargs)
    captured = capsys.readouterr()
    assert stop.value.code == code and captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("run.py: ")
    return captured.err


def rows(path, without_times=True):
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if not (without_times and k in TIMES)} for row in csv.DictReader(file)]


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- files ---


@pytest.mark.parametrize("env", ["cartpole", "point", "velocity"])
@pytest.mark.parametrize("rl", ["pg", "ac"])
def test_every_algorithm_trains_logs_evaluates_and_is_reported(tmp_path, env, rl):
    go(tmp_path, "--rl", rl, "--seed", 1, 2, env=env, algo=" ".join(run.ALGORITHMS), epochs=2)
    root = tmp_path / f"{env}-{rl}"
    for algo in run.ALGORITHMS:
        delta = "delta0.0015" if env == "velocity" else "delta0.005"
        folder = root / algo / (delta if algo.startswith("directed") else "") / "seed2"
        assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.pt", "config.json", "eval.csv", "log.csv"]
        log = rows(folder / "log.csv", without_times=False)
        assert list(log[0]) == run.LOG_FIELDS and [row["epoch"] for row in log] == ["1", "2"]
        assert 0 < float(log[0]["sample_seconds"]) < float(log[0]["seconds"]) < float(log[1]["seconds"])
        assert (log[0]["return_med"] != "") == algo.startswith("directed")
        grid = 25 if env == "point" else 11
        evaluation = rows(folder / "eval.csv")
        steps = "01234"[:4]
        assert list(evaluation[0]) == run.EVAL_FIELDS and len(evaluation) == grid * len(steps)
        assert [row["step"] for row in evaluation[:4]] == list(steps)
        config = json.loads((folder / "config.json").read_text())
        assert config["seed"] == 2 and config["algo"] == algo and config["versions"]["torch"] == torch.__version__
    report = (root / "report.md").read_text()
    assert all(f"| {algo} | 2 |" in report for algo in run.ALGORITHMS)


def test_env_steps_count_what_was_sampled(tmp_path):
    """point never ends early: M tasks × K trajectories × H steps, before and after adaptation, and the medium one."""
    go(tmp_path, env="point", algo="maml directed-maml reptile", epochs=3)
    per_task = 3 * 12
    for folder, tasks in (("maml", 2 + 2), ("directed-maml/delta0.005", 1 + 2 + 2), ("reptile", 5 * 2)):
        log = rows(tmp_path / "point-pg" / folder / "seed1" / "log.csv")
        assert [int(row["env_steps"]) for row in log] == [tasks * per_task * epoch for epoch in (1, 2, 3)]


def test_defaults_are_table_i(tmp_path):
    args = run.parse_args(["--env", "cartpole", "--algo", "directed-maml"])
    (settings,) = run.resolve_runs(args, "directed-maml", run.resolve_env(args)).values()
    table = {"delta": 0.005, "alpha": 0.001, "beta": 0.001, "gamma": 0.99, "tasks": 5, "trajectories": 10}
    assert {key: settings[key] for key in table} == table
    assert settings["inner_steps"] == 1 and settings["horizon"] == 200 and settings["optimizer"] == "sgd"


def test_help_gives_every_flag_with_an_example_and_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        run.parse_args(["--help"])
    text = capsys.readouterr().out.split("options:")[1]
    entries = {entry.split()[0]: entry for entry in text.split("\n  --")[1:]}
    assert len(entries) > 25
    for flag, entry in entries.items():
        if flag not in ("env", "algo", "param", "watch", "resume", "overwrite", "quiet"):
            assert "(default " in entry, entry
        if flag not in ("resume", "overwrite", "quiet"):
            assert f"e.g. --{flag} " in entry, entry


def test_the_plain_step_is_torchs_sgd_bit_for_bit():
    leaves = [[torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)] for _ in range(2)]
    optimizers = []
    for (a, b, *gradients), make in zip(leaves, (run.SGD, torch.optim.SGD), strict=True):
        optimizers.append(make([{"params": [a]}, {"params": [b], "lr": 0.3}], lr=0.1))
        for p, gradient in zip((a, b), gradients, strict=True):
            p.grad = gradient
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    for ours, torchs in zip(*leaves, strict=True):
        assert torch.equal(ours, torchs)


def test_meta_sgds_alpha_has_a_step_of_its_own(tmp_path):
    """One SGD step moves α by beta_alpha times its gradient, and θ by beta: twice the step, twice the way."""
    moves = {}
    for step in (1e-6, 2e-6):
        go(tmp_path / str(step), "--beta-alpha", step, algo="meta-sgd", epochs=1)
        path = tmp_path / str(step) / "cartpole-pg/meta-sgd/seed1/checkpoint.pt"
        state = torch.load(path, weights_only=True)
        moves[step] = state["alpha"]["policy.1.weight"].double() - 0.001
        theta = state["theta"]["policy.1.weight"]
    assert moves[1e-6].abs().max() > 0
    torch.testing.assert_close(moves[2e-6], 2 * moves[1e-6], rtol=0.05, atol=1e-9)
    other = torch.load(tmp_path / "1e-06/cartpole-pg/meta-sgd/seed1/checkpoint.pt", weights_only=True)
    assert torch.equal(theta, other["theta"]["policy.1.weight"])


# --- determinism ---


def test_the_same_command_twice_gives_the_same_log(tmp_path):
    logs = []
    for name in ("a", "b"):
        go(tmp_path / name, "--seed", 1, 2, algo="directed-maml", epochs=5)
        logs.append(rows(tmp_path / name / "cartpole-pg/directed-maml/delta0.005/seed2/log.csv"))
    assert logs[0] == logs[1]


def test_a_run_alone_equals_the_same_run_inside_a_sweep(tmp_path):
    go(tmp_path / "alone", "--seed", 2, algo="directed-maml")
    go(tmp_path / "sweep", "--seed", 1, 2, 3, "--delta", 0, 0.005, algo="directed-maml")
    alone, inside = (
        rows(tmp_path / name / "cartpole-pg/directed-maml/delta0.005/seed2/log.csv") for name in ("alone", "sweep")
    )
    assert alone == inside


def test_delta_zero_is_the_undirected_twin_epoch_by_epoch(tmp_path):
    go(tmp_path, "--delta", 0, algo="maml directed-maml")
    plain, zero = (rows(tmp_path / "cartpole-pg" / f / "seed1/log.csv") for f in ("maml", "directed-maml/delta0"))
    assert [r["return_post"] for r in plain] == [r["return_post"] for r in zero]
    assert int(plain[-1]["env_steps"]) < int(zero[-1]["env_steps"])


# --- resume ---


def test_delta_decays_or_ends_at_convergence_for_each_run_by_itself(tmp_path):
    """δ_t = δ / (1 + t / 100), t epochs done; 0 after the EMA 0.9 of return_post has once been above the threshold."""
    settings = {"delta": 0.1, "delta_schedule": "decay"}
    batch = run.Batch([], [settings], 50, {}, 0.1, None, [{"converged": False}])
    assert run.delta_of(batch, 0) == pytest.approx(0.1 / 1.5)

    words = ("--seed", 1, 2, 3)
    go(tmp_path / "on", *words, algo="directed-fomaml", epochs=12)
    logs = {seed: rows(next((tmp_path / "on").rglob(f"seed{seed}/log.csv"))) for seed in (1, 2, 3)}
    averages = {seed: report.ema([float(row["return_post"]) for row in log]) for seed, log in logs.items()}
    threshold = sorted(average[:6].max() for average in averages.values())[1]  # one run of three passes in 6 epochs
    go(tmp_path / "off", *words, "--threshold", threshold, "--delta-schedule", "converged", algo="directed-fomaml",
       epochs=12)  # fmt: skip
    for seed, log in logs.items():
        got = rows(next((tmp_path / "off").rglob(f"seed{seed}/log.csv")))
        over = [epoch for epoch, average in enumerate(averages[seed]) if average > threshold]
        same = over[0] + 1 if over else 12  # rows until the run passed: the δ-step after it is the first to be left out
        assert got[:same] == log[:same] and (same >= 11 or got[same + 1 :] != log[same + 1 :])


@pytest.mark.parametrize("algo", ["directed-maml", "directed-meta-sgd", "reptile"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_three_epochs_and_three_more_are_six_row_for_row(tmp_path, algo, optimizer):
    words = ["--seed", 1, 2, "--optimizer", optimizer]
    go(tmp_path / "once", *words, algo=algo, epochs=6)
    go(tmp_path / "twice", *words, algo=algo, epochs=3)
    go(tmp_path / "twice", *words, "--resume", algo=algo, epochs=6)
    folders = [p.parent.relative_to(tmp_path / "once") for p in (tmp_path / "once").rglob("log.csv")]
    assert len(folders) == 2
    for folder in folders:
        for name in ("log.csv", "eval.csv"):
            assert rows(tmp_path / "once" / folder / name) == rows(tmp_path / "twice" / folder / name)
        states = [torch.load(tmp_path / x / folder / "checkpoint.pt", weights_only=True) for x in ("once", "twice")]
        assert all(torch.equal(states[0]["theta"][key], states[1]["theta"][key]) for key in states[0]["theta"])


def test_rows_behind_the_checkpoint_and_half_a_row_are_cut_on_resume(tmp_path):
    go(tmp_path / "a", epochs=3)
    go(tmp_path / "b", epochs=6)
    folder = tmp_path / "a/cartpole-pg/fomaml/seed1"
    with open(folder / "log.csv", "a") as file:
        file.write("4,999,1,1,1,1,\n5,99")  # what a crash leaves after the last checkpoint
    go(tmp_path / "a", "--resume", epochs=6)
    assert rows(folder / "log.csv") == rows(tmp_path / "b/cartpole-pg/fomaml/seed1/log.csv")


def test_resume_starts_new_seeds_and_goes_on_with_old_ones(tmp_path):
    go(tmp_path, "--seed", 1, epochs=2)
    go(tmp_path, "--seed", 1, 2, "--resume", epochs=4)
    for seed in (1, 2):
        assert len(rows(tmp_path / f"cartpole-pg/fomaml/seed{seed}/log.csv")) == 4


def test_resume_of_a_finished_run_rewrites_the_report_and_nothing_else(tmp_path):
    go(tmp_path)
    before = snapshot(tmp_path)
    (tmp_path / "cartpole-pg/report.md").unlink()
    go(tmp_path, "--resume")
    after = snapshot(tmp_path)
    unchanged = {name for name in before if name.endswith((".csv", ".pt", ".json", ".md"))}
    assert {name: before[name] for name in unchanged} == {name: after[name] for name in unchanged}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_signal_finishes_the_epoch_saves_and_says_how_to_go_on(tmp_path):
    words = ["--env", "cartpole", "--algo", "directed-maml", "--epochs", "100000", "--out", str(tmp_path), *SMALL]
    process = subprocess.Popen([sys.executable, "run.py", *words], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "cartpole-pg/directed-maml/delta0.005/seed1"
    deadline = time.time() + 60
    while time.time() < deadline and not ((folder / "log.csv").exists() and len(rows(folder / "log.csv")) > 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert error == f"run.py: stopped; go on with: python run.py {' '.join(words)} --resume\n"
    epochs = len(rows(folder / "log.csv"))
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] == epochs


def test_overwrite_removes_the_runs_own_files_alone(tmp_path):
    go(tmp_path)
    note = tmp_path / "cartpole-pg/fomaml/seed1/note.txt"
    note.write_text("mine")
    go(tmp_path, "--overwrite")
    assert note.read_text() == "mine"


# --- gymnasium's environments ---

PENDULUM = ["--param", "g", "--range", "5", "15"]


def test_a_gymnasium_environment_resumes_exactly_and_does_not_depend_on_the_workers(tmp_path):
    for name, workers in (("once", 0), ("twice", 2)):
        for epochs, resume in ((4, []),) if name == "once" else ((2, []), (4, ["--resume"])):
            words = [*PENDULUM, "--workers", workers, *resume]
            go(tmp_path / name, *words, env="Pendulum-v1", algo="directed-maml", epochs=epochs)
    for name in ("log.csv", "eval.csv"):
        once, twice = (
            rows(tmp_path / x / "Pendulum-v1-pg/directed-maml/delta0.005/seed1" / name) for x in ("once", "twice")
        )
        assert once == twice and len(once) > 3


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_worker_ends_the_run_in_one_line_with_the_checkpoint_intact_and_no_orphans(tmp_path):
    words = ["--env", "Pendulum-v1", "--algo", "fomaml", *PENDULUM, "--workers", "2", "--out", str(tmp_path), *SMALL]
    folder = tmp_path / "Pendulum-v1-pg/fomaml/seed1"
    subprocess.run([sys.executable, "run.py", *words, "--epochs", "2"], cwd=REPOSITORY, check=True)
    saved = (folder / "checkpoint.pt").read_bytes()
    words += ["--epochs", "100000", "--resume"]
    process = subprocess.Popen([sys.executable, "run.py", *words], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while time.time() < deadline and len(rows(folder / "log.csv")) < 5:
        time.sleep(0.05)
    children = [p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if process.pid == parent_of(p)]
    workers = [p for p in children if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    assert error.startswith("run.py: a sampling worker died") and error.count("\n") == 1 and "--resume" in error
    assert (folder / "checkpoint.pt").read_bytes() == saved
    assert not any(
        parent_of(p) == process.pid or p in workers for p in map(int, filter(str.isdigit, os.listdir("/proc")))
    )


def parent_of(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def test_the_mean_task_is_watched_after_adaptation(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    for env, words, phi, name in (
        ("cartpole", [], ["12"], "watch-12.gif"),
        ("crossing", [], [], "watch-10.gif"),
        ("point", [], ["0.1", "-0.2"], "watch-0.1_-0.2.gif"),
        ("Pendulum-v1", PENDULUM, [], "watch-10.gif"),
    ):
        go(tmp_path, *words, "--workers", 0, env=env, epochs=1)
        folder = tmp_path / f"{env}-pg/fomaml/seed1"
        run.main(["--watch", str(folder), *(["--phi", *phi] if phi else [])])
        assert str(folder / name) in capsys.readouterr().out
        with image.open(folder / name) as animation:
            assert animation.n_frames > 3


# --- CUDA ---


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("env", ["cartpole", "crossing", "point", "velocity"])
@pytest.mark.parametrize("rl", ["pg", "ac"])
def test_cuda_agrees_with_the_cpu_and_checkpoints_move_between_them(tmp_path, monkeypatch, env, rl):
    logs = []
    torch.set_default_dtype(torch.float64)
    try:
        for device in ("cpu", "cuda"):
            go(tmp_path / device, "--device", device, "--rl", rl, env=env, algo="directed-maml", epochs=3)
            (log,) = (tmp_path / device).rglob("log.csv")
            logs.append(rows(log))
        go(tmp_path / "cuda", "--device", "cpu", "--rl", rl, "--resume", env=env, algo="directed-maml", epochs=4)
    finally:
        torch.set_default_dtype(torch.float32)
    for cpu, cuda in zip(*logs, strict=True):
        for key in ("return_pre", "return_post", "return_med"):
            assert float(cpu[key]) == pytest.approx(float(cuda[key]), rel=1e-6)


def test_the_settings_of_the_delta_step_are_those_of_directed_runs_alone(tmp_path, capsys):
    """What a mixed command began, each algorithm's own command goes on with, and --watch opens."""
    words = ["--medium", "random", "--delta-schedule", "converged"]
    go(tmp_path, *words, algo="maml directed-maml", epochs=1)
    go(tmp_path, "--resume", algo="maml", epochs=2)
    go(tmp_path, *words, "--resume", algo="directed-maml", epochs=2)
    for folder in ("maml/seed1", "directed-maml/delta0.005/seed1"):
        assert len(rows(tmp_path / "cartpole-pg" / folder / "log.csv")) == 2
        run.main(["--watch", str(tmp_path / "cartpole-pg" / folder)])
    assert capsys.readouterr().out.count("wrote ") == 2


# --- it learns ---


def test_cartpole_learns_in_few_epochs(tmp_path):
    go(
        tmp_path,
        "--tasks",
        5,
        "--trajectories",
        10,
        "--horizon",
        200,
        "--hidden",
        64,
        64,
        algo="directed-fomaml",
        epochs=40,
    )
    log = rows(tmp_path / "cartpole-pg/directed-fomaml/delta0.005/seed1/log.csv")
    first, last = (sum(float(row["return_post"]) for row in part) / 5 for part in (log[:5], log[-5:]))
    assert first < 30 and last > 2 * first


def test_point_adapts_in_one_inner_step(tmp_path):
    go(
        tmp_path,
        "--tasks",
        5,
        "--trajectories",
        10,
        "--horizon",
        20,
        "--hidden",
        64,
        64,
        env="point",
        algo="maml",
        epochs=60,
    )
    evaluation = [row for row in rows(tmp_path / "point-pg/maml/seed1/eval.csv") if row["epoch"] == "60"]
    before, after = (sum(float(row["return"]) for row in evaluation if row["step"] == step) / 25 for step in ("0", "1"))
    assert after > before + 0.5
