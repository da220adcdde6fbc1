"""Several processes, as torchrun starts them: the numbers of one, and one clear line when something goes wrong."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.test_run import SMALL, rows

REPOSITORY = Path(__file__).parent.parent
# A checkpoint after every epoch, and no figures.
PROGRAM = "import sys; sys.modules['matplotlib'] = None; import run; run.CHECKPOINT_SECONDS = 0; run.main(sys.argv[1:])"
COMMAND = ["--env", "point", "--algo", "directed-maml", "--seed", "1", "2", *SMALL, "--tasks", "10"]


def start(count, out, *words, others=()):
    """The ranks' processes, without torchrun around them; ranks from 1 on get the words `others` too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        # Without torchrun rank 0 keeps the store, and torch itself warns at length of every connection that it lost.
        place |= {"TORCH_CPP_LOG_LEVEL": "FATAL"}
        program = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            PROGRAM,
            *COMMAND,
            "--out",
            out,
            *words,
            *(others if rank else []),
        ]
        processes.append(
            subprocess.Popen(
                list(map(str, program)),
                cwd=REPOSITORY,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {key: str(value) for key, value in place.items()},
            )  # fmt: skip
        )
    return processes


def finish(processes):
    """Exit codes, and the lines on standard error of all ranks together."""
    ends = [process.communicate(timeout=60)[1] for process in processes]
    return [process.returncode for process in processes], [line for end in ends for line in end.splitlines()]


def wait_for_epoch(out, epoch):
    deadline = time.monotonic() + 60
    while not any(len(rows(log)) >= epoch for log in out.rglob("seed1/log.csv")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of the command."""
    out = tmp_path_factory.mktemp("alone")
    assert finish(start(1, out, "--epochs", 3)) == ([0], [])
    return out


def assert_same_numbers(got, expected):
    paths = sorted(path.relative_to(expected) for path in expected.rglob("seed*/*.csv"))
    assert len(paths) == 4  # two seeds' log.csv and eval.csv
    for path in paths:
        for ours, theirs in zip(rows(got / path), rows(expected / path), strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours.keys() - {"phi"}:
                assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=1e-5)
    for path in expected.rglob("checkpoint.pt"):
        states = [torch.load(p, weights_only=True) for p in (path, got / path.relative_to(expected))]
        for name, expected_value in states[0]["theta"].items():
            torch.testing.assert_close(states[1]["theta"][name], expected_value, rtol=1e-5, atol=1e-6)


def test_five_ranks_make_the_numbers_of_one_up_to_summation_order(alone, tmp_path):
    assert finish(start(5, tmp_path, "--epochs", 3)) == ([0] * 5, [])
    assert_same_numbers(tmp_path, alone)


def test_two_ranks_of_torchrun_do_too_and_one_process_goes_on_with_what_they_began(alone, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*torchrun, "run.py", *COMMAND, "--epochs", "2", "--out", tmp_path], cwd=REPOSITORY, check=True, timeout=90,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert finish(start(1, tmp_path, "--epochs", 3, "--resume")) == ([0], [])
    assert_same_numbers(tmp_path, alone)


def test_tasks_that_the_ranks_cannot_share_evenly_are_refused(tmp_path):
    codes, lines = finish(start(2, tmp_path, "--tasks", 5, "--epochs", 1))
    assert codes == [2, 2] and list(tmp_path.iterdir()) == []
    assert lines == ["run.py: --tasks 5: 2 ranks cannot share them evenly; give a multiple of 2"]


def test_a_rank_with_other_settings_is_named_and_all_stop(tmp_path):
    codes, lines = finish(start(2, tmp_path, "--beta", 0.001, "--epochs", 1, others=["--beta", 0.002]))
    assert lines == ["run.py: --beta: 0.002 on rank 1, 0.001 on rank 0; start all with the same command"]
    assert 0 not in codes and not list(tmp_path.rglob("log.csv"))


def test_a_refusal_by_rank_0_is_said_once_and_all_stop(alone, tmp_path):
    codes, lines = finish(start(2, alone, "--epochs", 3))
    assert 0 not in codes
    assert len(lines) == 1 and "this run exists" in lines[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_stops_the_others_in_one_line_with_the_files_intact(alone, tmp_path, rank):
    processes = start(2, tmp_path, "--epochs", 100_000)
    wait_for_epoch(tmp_path, 3)
    processes[rank].kill()
    codes, lines = finish(processes)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    assert len(lines) == 1 and "another rank stopped" in lines[0] and "--resume" in lines[0]
    states = [torch.load(path, weights_only=True) for path in tmp_path.rglob("checkpoint.pt")]
    assert len(states) == 2 and all(len(rows(log)) >= states[0]["epoch"] for log in tmp_path.rglob("log.csv"))


def test_a_signal_to_one_rank_stops_all_after_the_epoch(tmp_path):
    processes = start(2, tmp_path, "--epochs", 100_000)
    wait_for_epoch(tmp_path, 3)
    processes[1].send_signal(signal.SIGTERM)
    codes, lines = finish(processes)
    assert codes == [128 + signal.SIGTERM] * 2
    assert len(lines) == 1 and lines[0].startswith("run.py: stopped; go on with: torchrun .. run.py")
    states = [torch.load(path, weights_only=True) for path in tmp_path.rglob("checkpoint.pt")]
    assert [state["epoch"] for state in states] == [len(rows(log)) for log in tmp_path.rglob("log.csv")]
