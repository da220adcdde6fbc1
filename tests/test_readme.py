"""The README's commands and programs, as they stand but for shorter trainings."""

import os
import re
import shlex

import pytest
import torch
from torch.func import functional_call, vmap

import run
from harness import settings
from maml import maml
from tests.commands import REPOSITORY, SMALL

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SHORT = [*SMALL[: SMALL.index("--workers")], "--epochs", "2"]


def section(heading):
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """The words after `python run.py` of every line that holds it."""
    return [shlex.split(line, comments=True) for line in re.findall(r"python run\.py (.*)", text)]


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A new folder in which the first screen's command ran, then those of Use, in order and from there."""
    folder, before = tmp_path_factory.mktemp("used"), os.getcwd()
    os.chdir(folder)
    try:
        for words in commands("\n".join(blocks(README, "sh")[:1]) + blocks(section("Use"), "sh")[0]):
            if "--resume" in words:  # to more epochs than before
                words = [*words, *SHORT[:-1], "3"]
            elif "--watch" not in words:
                words = [*words, *SHORT]
            run.main(words)
    finally:
        os.chdir(before)
    return folder


def test_the_commands_of_use_run_in_order(used, capsys):
    runs = {str(path.parent.relative_to(used)) for path in used.rglob("checkpoint.pt")}
    assert "runs/cartpole-pg/directed-fomaml/delta0.005/seed1" in runs
    of_delta = {f"directed-maml/delta{delta}" for delta in ("0", "0.001", "0.005", "0.01")}
    assert {f"runs/cartpole-pg/{x}/seed{seed}" for x in ("maml", *of_delta) for seed in range(1, 6)} < runs
    epochs = torch.load(used / "runs/cartpole-pg/directed-maml/delta0.005/seed5/checkpoint.pt")["epoch"]
    assert epochs == 3  # resumed
    assert (used / "runs/Pendulum-v1-pg/fomaml/seed1/eval.csv").exists()
    assert (used / "runs/cartpole-pg/maml/seed1/watch-12.gif").exists()
    assert (used / "runs/cartpole-pg/report.md").exists()
    run.main(["--report", str(used / "runs/cartpole-pg")])


def test_a_trained_run_is_used_as_the_readme_says(used, monkeypatch):
    monkeypatch.chdir(used)
    [program] = blocks(section("Use a trained run"), "python")
    T = 5
    observations, actions, rewards = torch.zeros(T, 4).numpy(), [0, 1, 0, 1, 1], [1.0] * T
    names = {"observation": [0.0] * 4, "observations": observations, "actions": actions, "rewards": rewards}
    exec(program.replace(", ...]]", "] * 3]"), names)
    assert names["action"] in (0, 1) and names["policy"].theta.keys() == names["run"].theta.keys()


def test_the_words_of_every_command_are_right():
    text = re.sub(r"\\\n *| *(?<=seed)\n", " ", README).replace("$SLURM_ARRAY_TASK_ID", "3")  # lines that go on
    lines = re.findall(r"run\.py (--.*?)[`'#\n]", text)
    assert len(lines) >= 9
    for line in lines:
        settings.parse(line.split())


# --- your own module ---


def own_module():
    """The program of the README with a module, in two parts: what stands before its training, and the training."""
    [program] = [x for x in blocks(section("The modules"), "python") if "functional_call" in x]
    before, loop, after = program.partition("for epoch in range(3000):")
    return before, loop.replace("3000", "100") + after


def test_a_module_of_your_own_learns_to_adapt():
    torch.manual_seed(0)
    before, training = own_module()
    names = {}
    exec(before + training, names)
    theta, adapted, loss = (names[x] for x in ("theta", "adapted", "new_loss"))
    assert loss(adapted).mean() < 0.9 * loss(names["expand"](theta, 500)).mean()
    x = torch.linspace(-5, 5, 7)[:, None]  # the module itself has become the one of task 7
    torch.testing.assert_close(names["model"](x), names["predict"](adapted, x.expand(1, 500, 7, 1))[0, 7])


def batch_norm(track):
    layer = torch.nn.BatchNorm1d(5, track_running_stats=track)
    return torch.nn.Sequential(torch.nn.Linear(1, 5), layer, torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()


def own_gradient(model, x, **options):
    """The meta-gradient of the loss mean(output²) on support and query sets x (2, M, K, 1), as in the README."""
    theta = {name: p.detach().clone()[None, None].requires_grad_() for name, p in model.named_parameters()}
    predict = vmap(vmap(lambda params, x: functional_call(model, params, (x,)), **options), **options)
    batches = iter(x)
    maml(theta, lambda params: predict(params, next(batches)[None]).square().mean((2, 3)), 0.1, x.shape[1])
    return {name: p.grad[0, 0] for name, p in theta.items()}


def test_a_module_with_batch_statistics_gets_the_gradient_of_a_loop_over_tasks_summed():
    """Support, then query; each task is normalised by its own batch."""
    model, x = batch_norm(False), torch.randn(2, 3, 6, 1, dtype=torch.float64)
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    total = 0.0
    for support, query in zip(*x, strict=True):
        loss = functional_call(model, theta, (support,)).square().mean()
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        adapted = {name: p - 0.1 * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
        total = total + functional_call(model, adapted, (query,)).square().mean()
    expected = dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True))
    torch.testing.assert_close(own_gradient(model, x), expected)


def test_running_statistics_and_dropout_need_what_the_readme_says():
    x = torch.randn(2, 3, 6, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="track_running_stats"):
        own_gradient(batch_norm(True), x)
    dropout = torch.nn.Sequential(torch.nn.Linear(1, 5), torch.nn.Dropout(), torch.nn.Linear(5, 1)).double()
    with pytest.raises(RuntimeError, match="randomness"):
        own_gradient(dropout, x)
    assert all(g.isfinite().all() for g in own_gradient(dropout, x, randomness="different").values())
