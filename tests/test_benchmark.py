"""benchmark.py at tiny sizes; and its reference, the conventional design, against the shipped code."""

import math
from dataclasses import replace

import pytest
import torch

import run
from bench import benchmark, measure, reference
from harness.settings import parse


def tables(text):
    """{heading of the section: its tables, each a list of rows}."""
    found = {}
    for section in text.split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        blocks = [block.splitlines()[2:] for block in body.strip().split("\n\n") if block.startswith("| ")]
        found[heading] = [[row.strip("| ").split(" | ") for row in block] for block in blocks]
    return found


def test_every_configuration_has_its_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "in_fresh_processes", lambda function, *calls: [function(*call) for call in calls])
    monkeypatch.setattr(measure, "WARM_UP", 0)
    words = ["--small", "--repeats", "1", "--env", "point", "--algo", "maml", "--part", "epoch", "reference"]
    benchmark.main([*words, "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert (tmp_path / "README.md").read_text() == text and text.splitlines()[-1].startswith("| ")
    found = tables(text)
    [epoch] = found["Every task family and algorithm"]
    [sweep, conventional] = found["CartPole: runs, tasks and trajectories"]
    assert [row[:2] for row in epoch] == [["point", "maml"]]
    # a base and one other value of S, M and K, for three algorithms; the conventional design for both values of K
    assert len(sweep) == 3 * 4 and len(conventional) == 3 * 2
    assert len(found["Targets"][0]) == 3


def test_jax_is_beside_ours_or_left_out_in_one_line(capsys, monkeypatch):
    in_jax = {"epoch": 0.5, "compile": 9.5, "env_steps": 2 * 5 * 10 * 200}  # before and after, M, K, H
    monkeypatch.setattr(benchmark, "in_fresh_processes", lambda function, *calls: [function(*call) for call in calls])
    monkeypatch.setattr(benchmark, "measure_in_jax", lambda *asked: in_jax)
    benchmark.main(["--small", "--repeats", "1", "--part", "jax"])
    [found] = tables(capsys.readouterr().out)["JAX"]
    assert [row[:3] for row in found] == [["plain", "maml", "1"], ["tuned", "maml", "1"]]
    for row in found:
        assert row[4] == "0.5 [0.5, 0.5]" and row[7] == "209 [209, 209]"  # 9.5 + 399 · 0.5 s
    in_jax["env_steps"] = 1
    with pytest.raises(RuntimeError, match="20000 env steps an epoch, 1 by JAX"):
        benchmark.main(["--small", "--repeats", "1", "--part", "jax"])
    monkeypatch.setattr(benchmark, "measure_in_jax", lambda *asked: None)
    benchmark.main(["--small", "--repeats", "1", "--part", "jax"])
    assert "pip install jax" in capsys.readouterr().out.splitlines()[-1]


def test_a_sweep_is_timed_on_one_core_and_on_all(capsys, monkeypatch):
    commands = []
    monkeypatch.setattr(benchmark.subprocess, "run", lambda command, **options: commands.append(command))
    monkeypatch.setattr(benchmark.os, "cpu_count", lambda: 4)
    benchmark.main(["--small", "--repeats", "2", "--part", "cores"])
    processes = [command[command.index("--workers") + 1] for command in commands]
    assert processes == ["1", "4", "1", "4"]
    found = tables(capsys.readouterr().out)
    assert [row[0] for row in found["A sweep on one core and on all"][0]] == ["1", "4"]
    for command in commands:
        assert len(parse(command[2:]).seed) == 2


@pytest.mark.parametrize("algo", benchmark.TABLE_II)
def test_a_directed_run_goes_on_as_one_of_every_algorithm_of_table_ii(algo):
    env, [planned] = measure.Configuration("point", "directed-maml", S=1, M=2, K=2, H=3, hidden=3).plan()
    with measure.opened(env, [benchmark.as_run_of(algo, planned)], "cpu") as batch:
        batch.set_schedules()
        measured = run.train_epoch(batch)
    assert ("medium_steps" in measured) == algo.startswith("directed-")


def test_an_epoch_is_timed_whole_and_in_parts_and_trains_as_it_does_alone():
    configuration = measure.Configuration("crossing", "directed-maml", S=2, M=3, K=4, H=5, hidden=8)
    with measure.opened_endless(configuration, "cpu") as batch, measure.opened_endless(configuration, "cpu") as untimed:
        timed = measure.time_epoch(batch)
        untimed.set_schedules()
        run.train_epoch(untimed)
    assert all(torch.equal(p, untimed.theta[name]) for name, p in batch.theta.items())
    assert timed["env_steps"] == 2 * (1 + 3 + 3) * 4 * 5  # S (medium task + M before + M after) K H: nothing terminates
    parts = [timed[part] for part in ("sampling", "inner", "outer")]
    assert min(parts) > 0 and math.isclose(sum(parts), timed["epoch"])


def epoch_in_float64(algo):
    """θ after an epoch of one run by the shipped code, θ before, its settings, and the trajectories of each call."""
    env, [planned] = measure.Configuration("cartpole", algo, S=1, M=3, K=4, H=6, hidden=5).plan()
    env = measure.endless(env)
    settings = planned.settings | {"alpha": 0.1, "beta": 0.01, "delta": planned.settings["delta"] and 0.05}
    before = {name: p.double() for name, p in planned.state["theta"].items()}
    recorded = []

    def sample(params, phi, noise):
        recorded.append(sampler(params, phi.astype(float), {key: x.astype(float) for key, x in noise.items()}))
        return recorded[-1]

    in_float64 = replace(planned, settings=settings, state=planned.state | {"theta": before})
    with measure.opened(env, [in_float64], "cpu") as batch:
        sampler, batch.sample = batch.sample, sample
        batch.set_schedules()
        run.train_epoch(batch)
    return batch.theta, before, settings, recorded


def test_the_conventional_design_trains_as_the_shipped_code_on_the_same_trajectories():
    after = {}
    for algo in benchmark.COMPARED:
        theta, before, settings, recorded = epoch_in_float64(algo)
        after[algo] = torch.cat([p.detach().flatten() for p in theta.values()])
        policy = reference.make_policy(5).double()
        for p, name in zip(policy.parameters(), before, strict=True):  # weights, biases in the same order; (out, in)
            p.data = before[name][0, 0].T.clone() if p.dim() == 2 else before[name][0, 0, 0].clone()
        calls = [(recorded.pop(0), 0)] if algo.startswith("directed") else []
        inner, outer = recorded
        calls += [(drawn, task) for task in range(3) for drawn in (inner, outer)]  # the order of a loop over tasks

        def sample(params, gravity, calls=calls):
            drawn, task = calls.pop(0)
            return [drawn[key][0, task].transpose(0, 1) for key in ("obs", "actions", "rewards")]  # (H, K, ...)

        gamma = settings["gamma"]
        if algo.startswith("directed"):
            reference.medium_step(policy, sample, 10.0, settings["delta"], gamma)
        reference.meta_gradient(policy, sample, [0.0] * 3, settings["alpha"], gamma, second_order=algo != "fomaml")
        torch.optim.SGD(policy.parameters(), settings["beta"]).step()
        for p, name in zip(policy.parameters(), before, strict=True):
            expected = theta[name][0, 0].T if p.dim() == 2 else theta[name][0, 0, 0]
            assert torch.allclose(p, expected, rtol=0, atol=1e-12), (algo, name)
        assert not calls
    # at this precision the three are far apart
    assert min((after["maml"] - after[other]).abs().max() for other in benchmark.COMPARED[1:]) > 1e-6
