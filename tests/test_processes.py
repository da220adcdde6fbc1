"""Training processes and signals: the numbers of one process, one clear line when another one dies, no orphans."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import run
from bench import compare, torture
from harness import processes, sampling
from harness.checkpoints import Run
from harness.processes import share_out
from harness.sampling import Workers
from tests.commands import SMALL, rows, train, wait_for
from tests.noise import noise_itself

GYM = ["--param", "g", "--range", "5", "15"]
PENDULUM = ["--env", "Pendulum-v1", *GYM, "--algo", "fomaml", "--workers", "2"]
PENDULUM_RUN = "Pendulum-v1-pg/fomaml/seed1"
COMMAND = ["--env", "point", "--algo", "directed-maml", "--seed", 1, 2, "--tasks", 10]  # of ranks
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# --- training processes ---


@pytest.mark.parametrize(
    ("env", "size"),
    [("cartpole", ["--horizon", 100, "--beta", 0.09, "--eval-every", 99]), ("lunarlander", ["--horizon", 20])],
)
def test_a_run_is_the_same_to_the_last_bit_alone_and_in_a_sweep_in_any_number_of_processes(tmp_path, env, size):
    """While CartPole's episodes grow, so that the runs beside it have episodes of other lengths."""
    epochs = 9 if env == "cartpole" else 2
    words = {"env": env, "algo": "directed-maml", "epochs": epochs}
    sweep = ["--seed", "1-2", *(["--delta", 0.005, 0.02] if env == "cartpole" else [])]
    train(tmp_path / "alone", *size, "--seed", 2, "--workers", 0, **words)
    train(tmp_path / "one", *size, *sweep, "--workers", 1, **words)
    train(tmp_path / "two", *size, *sweep, "--workers", 2, **words)
    assert compare.differences(tmp_path / "one", tmp_path / "two") == []
    assert compare.differences(tmp_path / "alone", tmp_path / "two", "delta0.005/seed2") == []
    log = rows(tmp_path / f"alone/{env}-pg/directed-maml/delta0.005/seed2/log.csv")
    assert len(log) == epochs
    assert env != "cartpole" or float(log[-1]["return_post"]) > 1.5 * float(log[0]["return_post"])


@pytest.mark.parametrize(
    "words",
    [
        # sizes for which BLAS and vectorised loops have other code in another batch
        "velocity fomaml --tasks 1 --trajectories 3 --horizon 13 --hidden 64 64",
        "velocity maml --rl ac --tasks 7 --trajectories 2 --horizon 5 --hidden 5 --estimator dice",
        "velocity reptile --rl ac --tasks 3 --trajectories 10 --horizon 20 --hidden 20 12 --baseline linear",
        "point directed-maml --rl ac --tasks 3 --trajectories 10 --horizon 37 --hidden 64 --baseline linear",
        "point meta-sgd --rl ac --tasks 1 --trajectories 2 --horizon 60 --hidden 7 9 --baseline linear",
        "point sharp-maml --rl ac --tasks 3 --trajectories 5 --horizon 60 --hidden 5",
        "crossing directed-maml --tasks 7 --trajectories 2 --horizon 37 --hidden 64 64",
        "crossing imaml --tasks 1 --trajectories 5 --horizon 5 --hidden 64 64 --advantages raw",
        "crossing maml --tasks 3 --trajectories 3 --horizon 11 --hidden 3 --outer-steps 3 --clip 0.1 --kl-penalty 1",
        "cartpole maml++ --rl ac --tasks 5 --trajectories 2 --horizon 60 --hidden 8 8 --baseline linear",
        "cartpole directed-fomaml --rl ac --tasks 2 --trajectories 2 --horizon 13 --hidden 64 --optimizer adam",
        "Pendulum-v1 directed-maml --param g --range 5 15 --trajectories 3 --horizon 7 --hidden 5",
    ],
)
def test_a_run_is_the_same_to_the_last_bit_alone_and_in_a_sweep_whatever_the_sizes(tmp_path, words):
    env, algo, *size = words.split()
    train(tmp_path / "alone", *size, "--seed", 2, env=env, algo=algo, epochs=2)
    train(tmp_path / "sweep", *size, "--seed", "1-5", env=env, algo=algo, epochs=2)
    assert compare.differences(tmp_path / "alone", tmp_path / "sweep", "seed2") == []


SWEEP = ["--env", "cartpole", "--algo", "maml", "fomaml", "--seed", 1, 2, "--workers", 2]


def test_every_process_has_equally_many_jobs_and_each_job_is_of_one_algorithm():
    runs = [Run(None, {"algo": algo}, {"epoch": 0}) for algo in ("maml", "fomaml", "reptile") for _ in range(4)]
    assert [len(job) for job in share_out(runs, 1)] == [4, 4, 4]
    assert [len(job) for job in share_out(runs, 2)] == [2] * 6
    assert [len(job) for job in share_out(runs, 3)] == [4, 4, 4]
    assert [len(job) for job in share_out(runs[:4], 8)] == [1] * 4
    runs[0].state["epoch"] = 3
    assert sorted(len(job) for job in share_out(runs, 1)) == [1, 3, 4, 4]
    assert all(len({run.settings["algo"] for run in job}) == 1 for job in share_out(runs, 2))


@linux
def test_a_training_process_that_dies_ends_the_command_in_one_line_with_every_other_run_saved(tmp_path, start):
    command = start(*SWEEP, out=tmp_path)
    for algo in ("maml", "fomaml"):
        command.wait_for_epoch(tmp_path / f"cartpole-pg/{algo}/seed2/log.csv")
    os.kill(workers_of(command.pid)[0], signal.SIGKILL)
    code, lines = command.wait()
    assert code == 1
    assert lines == ["run.py: a training process died; continue from the last checkpoint with --resume"]
    assert len(list(tmp_path.rglob("checkpoint.pt"))) == 2
    torture.wait_for_the_end(command.pid)


@linux
def test_a_signal_stops_all_training_processes_after_their_epoch_and_the_command_continues(tmp_path, start):
    command = start(*SWEEP, out=tmp_path)
    for algo in ("maml", "fomaml"):
        command.wait_for_epoch(tmp_path / f"cartpole-pg/{algo}/seed2/log.csv")
    command.send(signal.SIGTERM)
    code, lines = command.wait()
    assert code == 128 + signal.SIGTERM and len(lines) == 1 and lines[0].startswith("run.py: stopped; continue with")
    states = [torch.load(path, weights_only=True) for path in tmp_path.rglob("checkpoint.pt")]
    assert len(states) == 4 and all(state["epoch"] >= 3 for state in states)
    epochs = max(state["epoch"] for state in states) + 1
    train(tmp_path, "--seed", 1, 2, "--workers", 2, "--resume", algo="maml fomaml", epochs=epochs)
    assert {len(rows(log)) for log in tmp_path.rglob("log.csv")} == {epochs}


@linux
def test_training_processes_of_a_killed_main_process_end_without_a_word(tmp_path, start):
    command = start(*SWEEP, out=tmp_path)
    command.wait_for_epoch(tmp_path / "cartpole-pg/maml/seed2/log.csv")
    command.send(signal.SIGKILL)
    assert command.wait() == (-signal.SIGKILL, [])
    torture.wait_for_the_end(command.pid)


def failing(job, tell):
    if job == 1:
        raise OSError(28, "No space left on device", "x/log.csv")
    return [job]


def test_an_error_in_a_training_process_is_raised_here_with_what_it_names():
    with pytest.raises(OSError) as error:
        processes.run_jobs(failing, [0, 1, 2], 2, print, [])
    assert (error.value.errno, error.value.filename) == (28, "x/log.csv")
    assert sorted(processes.run_jobs(failing, [0, 2, 3], 2, print, [])) == [0, 2, 3]


def ask_to_stop(job, tell):
    """Endless work, until it is asked to stop; returns the signals."""
    while not (signals := tell(job)):
        pass
    return signals


@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_reaches_the_jobs_that_run_and_no_other_begins(count):
    signals = []
    results = processes.run_jobs(ask_to_stop, [1, 2, 3], count, lambda news: signals or signals.append(15), signals)
    assert results == [15] * count


def workers_of(pid):
    """The other processes of a command's session."""
    return sorted(set(torture.members(pid)) - {pid})


@linux
def test_a_killed_worker_ends_the_run_in_one_line_with_the_checkpoint_intact_and_no_orphans(tmp_path, start):
    train(tmp_path, *GYM, "--workers", 0, env="Pendulum-v1", epochs=2)
    folder = tmp_path / PENDULUM_RUN
    checkpoint = (folder / "checkpoint.pt").read_bytes()
    command = start(*PENDULUM, "--resume", out=tmp_path)
    command.wait_for_epoch(folder / "log.csv", 5)
    workers = workers_of(command.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    code, lines = command.wait()
    assert code == 1 and len(lines) == 1
    assert lines[0].startswith("run.py: a sampling worker died") and "--resume" in lines[0]
    assert (folder / "checkpoint.pt").read_bytes() == checkpoint
    torture.wait_for_the_end(command.pid)


@linux
def test_workers_of_a_killed_main_process_end_without_a_word(tmp_path, start):
    command = start(*PENDULUM, out=tmp_path)
    command.wait_for_epoch(tmp_path / PENDULUM_RUN / "log.csv")
    assert len(workers_of(command.pid)) == 2
    command.send(signal.SIGKILL)
    assert command.wait()[0] == -signal.SIGKILL
    torture.wait_for_the_end(command.pid)
    assert command.error.read_text() == ""


def serve_late(env):
    """A worker that comes to serve when its parent has gone."""
    parent = os.getppid()
    wait_for(lambda: os.getppid() != parent)
    pipe, _kept = multiprocessing.Pipe()  # both ends are here: it never closes
    sampling.serve(pipe, env, noise_itself, 0, 1)


def start_and_die(env):
    os.setsid()
    multiprocessing.get_context("fork").Process(target=serve_late, args=(env,)).start()
    os._exit(0)


@linux
def test_a_worker_whose_main_process_has_gone_before_it_serves_ends_too(pendulum):
    process = multiprocessing.get_context("fork").Process(target=start_and_die, args=(pendulum[0],))
    process.start()
    process.join()
    try:
        torture.wait_for_the_end(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


# --- signals ---


@posix
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_epoch_saves_and_says_how_to_continue(tmp_path, start, signum):
    command = start("--env", "cartpole", "--algo", "directed-maml", out=tmp_path)
    folder = tmp_path / "cartpole-pg/directed-maml/delta0.005/seed1"
    command.wait_for_epoch(folder / "log.csv")
    command.send(signum)
    words = f"--epochs 100000 --out {tmp_path} {' '.join(SMALL)} --env cartpole --algo directed-maml"
    says = f"run.py: stopped; continue with: python {os.path.relpath(run.__file__)} {words} --resume"
    assert command.wait() == (128 + signum, [says])
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] == len(rows(folder / "log.csv"))


def is_waiting(pid):
    """Whether a process sleeps, and no signal is on its way to it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return fields["State"].startswith("S") and int(fields["SigPnd"], 16) == int(fields["ShdPnd"], 16) == 0


@linux
@pytest.mark.parametrize("times", [1, 2])
def test_a_terminals_ctrl_c_reaches_the_workers_too_and_harms_nothing(tmp_path, start, times):
    """Once: the epoch ends. Twice: it stops at once. Either way the files are good and the run continues from them."""
    log = tmp_path / PENDULUM_RUN / "log.csv"
    command = start(*PENDULUM, out=tmp_path)
    command.wait_for_epoch(log)
    if times == 2:  # so that the epoch does not end: the main process waits for a worker that has stopped
        os.kill(workers_of(command.pid)[0], signal.SIGSTOP)
        command.wait_for(lambda: is_waiting(command.pid))
    os.killpg(command.pid, signal.SIGINT)
    if times == 2:
        os.killpg(command.pid, signal.SIGTERM)  # two of one kind that are pending at once would count as one
    code, lines = command.wait()
    says = "stopped; continue with: python " if times == 1 else "stopped at once; continue from the last"
    assert code == 128 + signal.SIGINT and len(lines) == 1 and lines[0].startswith(f"run.py: {says}")
    torture.wait_for_the_end(command.pid)
    epochs = len(rows(log)) + 1
    train(tmp_path, *GYM, "--workers", 0, "--resume", env="Pendulum-v1", epochs=epochs)
    assert [row["epoch"] for row in rows(log)] == [str(epoch) for epoch in range(1, epochs + 1)]


def slowly(wait, start):
    """`processes.start`, or another function, that returns after `wait`."""

    def slow(*args, **kwargs):
        returned = start(*args, **kwargs)
        wait()
        return returned

    return slow


@linux
@pytest.mark.parametrize("words", [[*PENDULUM], ["--env", "point", "--algo", "maml", "--seed", "1-30"]])
def test_a_second_ctrl_c_ends_everything_at_once_while_processes_start(tmp_path, start, monkeypatch, words):
    """Thirty training or sampling processes, each of which takes a tenth of a second to start."""
    for module in (processes, sampling):
        monkeypatch.setattr(module, "start", slowly(lambda: time.sleep(0.1), module.start))
    monkeypatch.setattr(processes, "most_processes", lambda: 100)
    command = start(*words, *("--trajectories", 30, "--workers", 30), out=tmp_path)
    command.wait_for(lambda: len(workers_of(command.pid)) >= 2)
    os.killpg(command.pid, signal.SIGTERM)
    command.wait_for(lambda: len(workers_of(command.pid)) >= 5)  # which start after it has handled the first
    os.killpg(command.pid, signal.SIGTERM)
    code, lines = command.wait()
    assert code == 128 + signal.SIGINT and len(lines) == 1 and lines[0].startswith("run.py: stopped at once;")
    assert not list(tmp_path.rglob("checkpoint.pt"))
    torture.wait_for_the_end(command.pid)


def test_a_signal_while_processes_are_ended_spares_none(pendulum, monkeypatch):
    """It comes after the first is killed."""
    workers = Workers(pendulum[0], noise_itself, 3)
    kill = workers.processes[0].kill
    with processes.caught_signals() as signals:
        signals.append(signal.SIGINT)
        monkeypatch.setattr(workers.processes[0], "kill", lambda: (kill(), signal.raise_signal(signal.SIGINT)))
        with pytest.raises(KeyboardInterrupt):
            workers.close()
    wait_for(lambda: not any(process.is_alive() for process in workers.processes))


@pytest.mark.parametrize(
    ("workers", "trajectories", "fit", "count"), [(1024, 1, 50, 0), (1024, 4, 50, 8), (9, 4, 3, 3)]
)
def test_no_more_sampling_workers_than_trajectories_or_than_memory_has_room_for(
    tmp_path, monkeypatch, workers, trajectories, fit, count
):
    started = []
    monkeypatch.setattr(processes, "most_processes", lambda: fit)
    monkeypatch.setattr(sampling, "start", slowly(lambda: started.append(1), sampling.start))
    words = ["--tasks", 1 if trajectories == 1 else 2, "--trajectories", trajectories, "--workers", workers]
    train(tmp_path, *GYM, *words, env="Pendulum-v1", epochs=1)
    assert len(started) == count


def test_processes_fit_into_half_the_memory(monkeypatch):
    monkeypatch.setattr(processes, "memory", lambda: 16e9)
    most = processes.most_processes()
    assert most == (80 if processes.context().get_start_method() == "fork" else 16)
    monkeypatch.setattr(processes, "memory", lambda: 1e6)
    assert processes.most_processes() == 1
