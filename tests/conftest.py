import os

# Where rank 0 keeps the store, torch warns at length of every connection that it loses with it. Read when torch loads.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

import pytest
import torch

from harness import figures
from harness.gyms import make
from tests.commands import SMALL, Command, train
from tests.noise import in_numpy, noise_of, tasks_of

torch.set_num_threads(1)  # as run.py does: small tensors, and tests that run beside other programs


DRAW = figures.draw


@pytest.fixture(scope="session", autouse=True)
def no_figures():
    """Figures take a second each, most of a small training's time: only a test that uses `drawn` draws them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda labels, root: [])
        yield


@pytest.fixture(scope="session", autouse=True)
def no_fsync():
    """Files need not survive the machine's end, and thousands of them take seconds: commands are forked with this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with runs of one epoch: CartPole by policy gradient; velocity by actor-critic and Meta-SGD; Pendulum."""
    out = tmp_path_factory.mktemp("small")
    train(out, epochs=1)
    train(out, "--rl", "ac", "--horizon", 5, env="velocity", algo="meta-sgd", epochs=1)
    train(out, "--param", "g", "--range", 5, 15, "--workers", 0, env="Pendulum-v1", epochs=1)
    return out


@pytest.fixture
def drawn(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "draw", DRAW)


@pytest.fixture
def start():
    """start(*words, out=..): the `Command` of an endless small training; all end with the test."""
    commands = []

    def start(*words, out, **options):
        commands.append(Command(["--epochs", 100_000, "--out", out, *SMALL, *words], **options))
        return commands[-1]

    yield start
    for command in commands:
        command.end()


@pytest.fixture(scope="session")
def pendulum():
    """An environment, φ and noise for one rollout of S = 1, M = 1, K = 2."""
    env = make("Pendulum-v1", names=["g"], bounds=[5, 15], horizon=5)
    return env, *in_numpy(tasks_of(env, [0], 1, 1), noise_of(env, [0], 0, 1, 2))
