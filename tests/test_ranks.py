"""torchrun's ranks: the numbers of one process, and one clear line when another one dies."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from harness import processes
from tests.commands import PATIENCE, REPOSITORY, SMALL, rows, train

GYM = ["--param", "g", "--range", "5", "15"]
PENDULUM = ["--env", "Pendulum-v1", *GYM, "--algo", "fomaml", "--workers", "2"]
PENDULUM_RUN = "Pendulum-v1-pg/fomaml/seed1"
COMMAND = ["--env", "point", "--algo", "directed-maml", "--seed", 1, 2, "--tasks", 10]  # of ranks
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module", autouse=True)
def torchrun(tmp_path_factory):
    """A training by torchrun itself, two ranks and two epochs: its process, and the folder. Three processes that import
    torch take long, so it starts with the first test of this file, beside those before the one that waits for it."""
    out = tmp_path_factory.mktemp("torchrun")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "run.py"]
    words += ["--epochs", "2", "--out", str(out), *SMALL, *map(str, COMMAND)]
    process = subprocess.Popen(words, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"})
    yield process, out
    process.terminate()  # which ends its ranks too
    process.wait()


def keep_store(pipe):
    """What a process of its own runs, as torchrun is one: the ranks are forked from the tests', and
    a thread of the store's there could hold a lock of the C library just then, for ever in a rank."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    with contextlib.suppress(EOFError):  # the tests' process has ended
        pipe.recv()


@pytest.fixture
def start_ranks(start):
    """start_ranks(count, out, *words): the ranks' processes as torchrun starts them, which keeps the store for them; or
    rank 0 keeps it, as without torchrun. Ranks from 1 on get the words `others` too."""
    stores = []

    def start_ranks(count, out, *words, others=(), rank_0_keeps_the_store=False):
        if rank_0_keeps_the_store:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
        else:
            pipe, process = processes.start(keep_store, daemon=True)
            stores.append((pipe, process))
            port = pipe.recv()
        place = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place["TORCHELASTIC_USE_AGENT_STORE"] = not rank_0_keeps_the_store
        return [
            start(*COMMAND, *words, *(others if rank else ()), out=out, checkpoint_seconds=0.0,
                  environment=place | {"RANK": rank, "LOCAL_RANK": rank})
            for rank in range(count)
        ]  # fmt: skip

    yield start_ranks
    processes.end([process for _, process in stores])


def ends(ranks):
    """Exit codes, and the lines on standard error of all ranks together."""
    codes, lines = zip(*(rank.wait() for rank in ranks), strict=True)
    return list(codes), [line for own in lines for line in own]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of the command."""
    out = tmp_path_factory.mktemp("alone")
    train(out, *COMMAND, epochs=3)
    return out


def assert_same_numbers(got, expected, rel=1e-5):
    paths = sorted(path.relative_to(expected) for path in expected.rglob("seed*/*.csv"))
    assert len(paths) == 4  # two seeds' log.csv and eval.csv
    for path in paths:
        for ours, theirs in zip(rows(got / path), rows(expected / path), strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours.keys() - {"phi"}:
                assert float(ours[key] or 0) == pytest.approx(float(theirs[key] or 0), rel=rel)  # "": no δ-step
    for path in expected.rglob("checkpoint.pt"):
        states = [torch.load(p, weights_only=True) for p in (path, got / path.relative_to(expected))]
        for name, expected_value in states[0]["theta"].items():
            torch.testing.assert_close(states[1]["theta"][name], expected_value, rtol=1e-5, atol=1e-6)


def test_five_ranks_make_the_numbers_of_one_up_to_summation_order(alone, tmp_path, start_ranks):
    assert ends(start_ranks(5, tmp_path, "--epochs", 3)) == ([0] * 5, [])
    assert_same_numbers(tmp_path, alone)


PROMP = ["--outer-steps", 3, "--clip", 0.1, "--kl-penalty", 1]


@pytest.mark.parametrize(("algo", "more"), [("directed-sharp-maml", PROMP), ("imaml", []), ("maml++", [])])
def test_two_ranks_take_the_norm_of_their_common_gradient_and_whatever_else_a_learner_needs(
    tmp_path, start_ranks, algo, more
):
    words = ["--algo", algo, "--tasks", 2, "--epochs", 2, *more]
    train(tmp_path / "alone", *COMMAND, *words)
    assert ends(start_ranks(2, tmp_path / "ranks", *words)) == ([0] * 2, [])
    # Sharp-MAML divides by a norm, and the KL is a small difference: 1.3e-5 was seen
    assert_same_numbers(tmp_path / "ranks", tmp_path / "alone", rel=1e-4 if more else 1e-5)


def test_two_ranks_of_torchrun_do_too_and_one_process_continues_what_they_began(alone, torchrun):
    process, out = torchrun
    assert process.wait(timeout=5 * PATIENCE) == 0
    train(out, *COMMAND, "--resume", epochs=3)
    assert_same_numbers(out, alone)


def test_tasks_that_the_ranks_cannot_share_evenly_are_refused(tmp_path, start_ranks):
    codes, lines = ends(start_ranks(2, tmp_path, "--tasks", 5))
    assert codes == [2, 2] and list(tmp_path.iterdir()) == []
    assert lines == ["run.py: --tasks 5: not a multiple of the 2 ranks; give a multiple"]


def test_a_rank_with_other_settings_is_named_and_all_stop(tmp_path, start_ranks):
    codes, lines = ends(start_ranks(2, tmp_path, "--beta", 0.001, others=["--beta", 0.002]))
    assert lines == ["run.py: --beta: 0.002 on rank 1, 0.001 on rank 0; start all with the same command"]
    assert 0 not in codes and not list(tmp_path.rglob("log.csv"))


def test_what_rank_0_refuses_is_said_once_and_all_stop(alone, start_ranks):
    codes, lines = ends(start_ranks(2, alone))
    assert 0 not in codes
    assert len(lines) == 1 and "this run exists" in lines[0]


@posix
@pytest.mark.parametrize("rank_0_keeps_the_store", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_stops_the_others_in_one_line_with_the_files_intact(
    tmp_path, start_ranks, rank, rank_0_keeps_the_store, monkeypatch
):
    monkeypatch.setattr("harness.ranks.LAST_WORDS_SECONDS", 0.2)  # forked with it: nobody is left to hear them
    ranks = start_ranks(2, tmp_path, rank_0_keeps_the_store=rank_0_keeps_the_store)
    ranks[0].wait_for_epoch(tmp_path / "point-pg/directed-maml/delta0.005/seed2/log.csv")
    ranks[rank].send(signal.SIGKILL)
    codes, lines = ends(ranks)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    assert len(lines) == 1 and "another rank stopped" in lines[0] and "--resume" in lines[0]
    states = [torch.load(path, weights_only=True) for path in tmp_path.rglob("checkpoint.pt")]
    assert len(states) == 2 and all(len(rows(log)) >= states[0]["epoch"] for log in tmp_path.rglob("log.csv"))


@posix
def test_a_signal_to_one_rank_stops_all_after_the_epoch(tmp_path, start_ranks):
    ranks = start_ranks(2, tmp_path)
    ranks[0].wait_for_epoch(tmp_path / "point-pg/directed-maml/delta0.005/seed2/log.csv")
    ranks[1].send(signal.SIGTERM)
    codes, lines = ends(ranks)
    assert codes == [128 + signal.SIGTERM] * 2
    assert len(lines) == 1 and lines[0].startswith("run.py: stopped; continue with: torchrun .. ")
    states = [torch.load(path, weights_only=True) for path in tmp_path.rglob("checkpoint.pt")]
    assert [state["epoch"] for state in states] == [len(rows(log)) for log in tmp_path.rglob("log.csv")]
