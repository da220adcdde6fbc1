"""The controls and comparators of run.py: joint training, the oracle, pooled tasks, raw advantages, baselines."""

import csv

import pytest
import torch

import checkpoints
import run
import trained

SMALL = ["--tasks", "2", "--trajectories", "4", "--horizon", "12", "--hidden", "8", "--eval-every", "2", "--quiet"]


def go(out, *words, env="cartpole", algo="maml", epochs=2):
    """Run a small command in this process."""
    command = ["--env", env, "--algo", *algo.split(), "--epochs", epochs, "--out", out, "--workers", 1, *SMALL, *words]
    run.main([str(word) for word in command])


def refused(capsys, out, *words, **kwargs):
    """The one line on standard error of a command that is wrong."""
    with pytest.raises(SystemExit) as stop:
        go(out, *words, **kwargs)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1 and not any(out.iterdir())
    return captured.err


def rows(folder, table="log"):
    with open(folder / f"{table}.csv", newline="") as file:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]


def theta(folder):
    return checkpoints.load(folder / "checkpoint.pt")["theta"]


# --- advantages and baselines ---


@pytest.mark.parametrize("baseline", ["step", "linear"])
def test_one_trajectory_with_a_baseline_over_trajectories_is_refused(tmp_path, capsys, baseline):
    line = refused(capsys, tmp_path, "--trajectories", 1, "--baseline", baseline)
    assert f"--trajectories 1: --baseline {baseline}" in line and "--baseline task" in line
    assert "--trajectories 1" in refused(capsys, tmp_path, "--trajectories", 1, env="point")  # its default: step
    go(tmp_path / "fine", "--trajectories", 1)
    go(tmp_path / "fine", "--trajectories", 1, "--advantages", "raw", env="point")


def test_a_baseline_does_nothing_with_raw_advantages_and_is_refused(tmp_path, capsys):
    line = refused(capsys, tmp_path, "--advantages", "raw", "--baseline", "step")
    assert "--baseline does nothing without --advantages whitened" in line


@pytest.mark.parametrize("rl", ["pg", "ac"])
@pytest.mark.parametrize("words", [["--advantages", "raw"], ["--baseline", "linear"]])
def test_the_settings_reach_the_loss_and_a_run_alone_equals_itself_in_a_sweep(tmp_path, words, rl):
    go(tmp_path / "alone", "--rl", rl, "--seed", 2, *words)
    go(tmp_path / "sweep", "--rl", rl, "--seed", 1, 2, 3, 4, *words)
    go(tmp_path / "default", "--rl", rl, "--seed", 2)
    alone, sweep, default = (
        tmp_path / name / f"cartpole-{rl}" / "maml" / "seed2" for name in ("alone", "sweep", "default")
    )
    assert rows(alone) == rows(sweep) and rows(alone, "eval") == rows(sweep, "eval")
    for name, p in theta(alone).items():
        assert torch.equal(p, theta(sweep)[name])
    assert any(not torch.equal(p, theta(default)[name]) for name, p in theta(alone).items())
    trained.load(alone).adapt(phi=[12.0])  # with the run's own loss
