import os

# Where rank 0 keeps the store, torch warns at length of every connection that it loses with it. Read when torch loads.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

import pytest
import torch

import report
from envs import make
from tests.commands import SMALL, Command
from tests.noise import in_numpy, noise_of, tasks_of

torch.set_num_threads(1)  # as run.py does: small tensors, and tests that run beside other programs


FIGURES = {name: getattr(report, name) for name in ("draw_curves", "draw_thresholds", "draw_adaptation")}


@pytest.fixture(scope="session", autouse=True)
def no_figures():
    """Figures take a second each, most of a small training's time: only a test that uses `figures` draws them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in FIGURES:
            patch.setattr(report, name, lambda plt, labels, path: False)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_fsync():
    """Files need not survive the machine's end, and thousands of them take seconds: commands are forked with this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def figures(monkeypatch):
    pytest.importorskip("matplotlib")
    for name, draw in FIGURES.items():
        monkeypatch.setattr(report, name, draw)


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
