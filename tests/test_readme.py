"""README.md and docs/: programs and commands run as they stand, but for shorter trainings, and links lead somewhere."""

import re
import shlex
import sys

import pytest
import torch
from torch.func import functional_call, vmap

import run
from harness.plan import folder_of_all
from harness.settings import parse
from maml import expand, maml
from results import fill
from tests.commands import REPOSITORY, SMALL

README = REPOSITORY / "README.md"
PAGES = [README, *sorted(REPOSITORY.glob("docs/*.md"))]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
SHORT = [*SMALL[: SMALL.index("--workers")], "--epochs"]
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(text):
    """The words after `run.py` of every command, which end with the line or a quote; --help is none."""
    text = text.replace("\\\n", " ").replace("$SLURM_ARRAY_TASK_ID", "3")
    return [
        shlex.split(words, comments=True)
        for words in re.findall(r"run\.py (--(?!help).*?)(?:[`']|$)", text, re.MULTILINE)
    ]


def shortened(words):
    """The command with a training of 2 epochs, or of 3 where it continues one."""
    if "--watch" in words:
        return words
    return [*words, *SHORT, "3" if "--resume" in words else "2"]


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """(folder, names): the README's blocks have run there in order, those in Python in one session with these names.

    The tests that use it run there too.
    """
    folder, names = tmp_path_factory.mktemp("used"), {}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        for language, block in FENCED.findall(TEXTS[README]):
            if language == "sh":
                for words in commands(block):
                    run.main(shortened(words))
            elif block.startswith("# mine.py"):
                (folder / "mine.py").write_text(block, encoding="utf-8")
            else:
                assert language == "python"
                exec(block.replace("range(3000)", "range(100)"), names)
        yield folder, names
    sys.modules.pop("mine", None)


# --- the README from top to bottom ---


def test_its_commands_run_in_order(used):
    folder, _ = used
    runs = {str(path.parent.relative_to(folder / "runs")) for path in folder.rglob("checkpoint.pt")}
    of_delta = {f"directed-maml/delta{delta}" for delta in ("0", "0.001", "0.005", "0.01")}
    swept = {f"cartpole-pg/{algo}/seed{seed}" for algo in ("maml", *of_delta) for seed in range(1, 6)}
    single = {f"{env}-pg/fomaml/seed1" for env in ("Pendulum-v1", "mine-Pole-v0")}
    assert runs == {"cartpole-pg/directed-fomaml/delta0.005/seed1"} | swept | single
    resumed = folder / "runs/cartpole-pg/directed-maml/delta0.005/seed5/log.csv"
    assert len(resumed.read_text().splitlines()) == 1 + 3  # the header and three epochs
    for path in ("maml/seed1/watch-12.gif", "report.md", "maml/seed1/eval.csv"):
        assert (folder / "runs/cartpole-pg" / path).exists()


def test_a_trained_run_adapts_and_acts_as_it_says(used):
    _, names = used
    observations, actions, rewards = names["play"](names["policy"])
    assert set(actions) <= {0, 1} and len(actions) == len(rewards) and len(observations) - len(rewards) in (0, 1)
    before, after = names["run"].theta, names["policy"].theta
    assert before.keys() == after.keys() and any(not before[name].equal(after[name]) for name in before)
    [line] = re.findall(r'load\(".*?", trusted_env=".*?"\)', TEXTS[README])  # of the environment of one's own
    assert eval(line, names).settings["env"] == "mine:Pole-v0"


def test_its_module_learns_to_adapt(used):
    _, names = used
    theta, adapted, loss = (names[name] for name in ("theta", "adapted", "new_loss"))
    assert loss(adapted).mean() < 0.9 * loss(expand(theta, 500)).mean()
    x = torch.linspace(-5, 5, 7)[:, None]  # the module itself has become the one of task 7
    torch.testing.assert_close(names["model"](x), names["predict"](adapted, x.expand(1, 500, 7, 1))[0, 7])


def test_its_loop_over_tasks_is_the_double_vmap_and_takes_an_lstm(used):
    _, names = used
    [line] = re.findall(r"`(torch\.stack.*)`", TEXTS[README])
    x = torch.randn(1, 500, 4, 1)
    looped = eval(line, names | {"params": names["adapted"], "x": x})
    torch.testing.assert_close(looped, names["predict"](names["adapted"], x))
    model = Recurrent().double()
    theta = {name: p.detach().clone()[None, None].requires_grad_() for name, p in model.named_parameters()}
    x = torch.randn(2, 3, 4, 6, 1, dtype=torch.float64)  # support and query of 3 tasks: 4 sequences of 6
    batches = iter(x)

    def task_loss(params):
        outputs = eval(line, names | {"model": model, "params": params, "x": next(batches)[None]})
        return outputs.square().mean((2, 3, 4))

    maml(theta, task_loss, 0.1, 3)
    for name, expected in gradient_by_a_loop(model, x).items():
        torch.testing.assert_close(theta[name].grad[0, 0], expected)


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.last = torch.nn.LSTM(1, 5, batch_first=True), torch.nn.Linear(5, 1)

    def forward(self, x):
        return self.last(self.lstm(x)[0])


def gradient_by_a_loop(model, x):
    """Σᵢ ∇ mean(output²) at θ − 0.1 ∇ mean(output²), on support and query sets x (2, M, ...), task by task."""
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    total = 0.0
    for support, query in zip(*x, strict=True):
        loss = functional_call(model, theta, (support,)).square().mean()
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        adapted = {name: p - 0.1 * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
        total = total + functional_call(model, adapted, (query,)).square().mean()
    return dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True))


# --- what docs/modules.md says of other modules ---


def batch_norm(track):
    layer = torch.nn.BatchNorm1d(5, track_running_stats=track)
    return torch.nn.Sequential(torch.nn.Linear(1, 5), layer, torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()


def gradient_by_vmap(model, x, **options):
    """The same as `gradient_by_a_loop`, as in the README; options: vmap's."""
    theta = {name: p.detach().clone()[None, None].requires_grad_() for name, p in model.named_parameters()}
    predict = vmap(vmap(lambda params, x: functional_call(model, params, (x,)), **options), **options)
    batches = iter(x)
    maml(theta, lambda params: predict(params, next(batches)[None]).square().mean((2, 3)), 0.1, x.shape[1])
    return {name: p.grad[0, 0] for name, p in theta.items()}


def test_each_task_is_normalised_by_its_own_batch():
    model, x = batch_norm(False), torch.randn(2, 3, 6, 1, dtype=torch.float64)
    torch.testing.assert_close(gradient_by_vmap(model, x), gradient_by_a_loop(model, x))


def test_running_statistics_and_dropout_need_what_it_says():
    x = torch.randn(2, 3, 6, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="track_running_stats"):
        gradient_by_vmap(batch_norm(True), x)
    dropout = torch.nn.Sequential(torch.nn.Linear(1, 5), torch.nn.Dropout(), torch.nn.Linear(5, 1)).double()
    with pytest.raises(RuntimeError, match="randomness"):
        gradient_by_vmap(dropout, x)
    assert all(g.isfinite().all() for g in gradient_by_vmap(dropout, x, randomness="different").values())


# --- all pages ---


def test_the_readme_has_at_most_220_lines():
    assert len(TEXTS[README].splitlines()) <= 220


def test_its_first_line_with_pytest_is_the_command_that_sets_everything_up():
    """.ci/run runs it as it stands."""
    line = next(line for line in TEXTS[README].splitlines() if "pytest" in line)
    assert line.startswith("python3 -m venv .venv && .venv/bin/pip install") and line.endswith("-m pytest -q")


def test_no_command_makes_the_runs_of_one_above_it():
    made = set()
    given = [words for text in TEXTS.values() for words in commands(text)]
    assert len(given) >= 10
    for args in map(parse, given):
        if args.watch is None and args.report is None and not args.resume:
            algos = [(algo, delta) for algo in args.algo for delta in args.delta or [0.005] if "directed" in algo]
            algos += [(algo, None) for algo in args.algo if "directed" not in algo]
            new = {(folder_of_all(args), *algo, seed) for algo in algos for seed in args.seed or [1]}
            assert not made & new
            made |= new


@pytest.mark.parametrize("path", [README, REPOSITORY / "docs/flags.md"], ids=lambda path: path.name)
def test_tables_are_up_to_date(path):
    assert fill.is_filled(path), f"run python -m results.fill {path.relative_to(REPOSITORY)}"


def anchors(path):
    """The ends that GitHub gives to links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(FENCED, "", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "path", [*PAGES, *sorted(REPOSITORY.glob("results/*.md"))], ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_links_lead_to_files_and_headings_that_exist(path):
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links or path.name == "flags.md"
    for link in links:
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_all_modules_have_a_row_in_the_layout():
    rows = re.findall(r"^\| `(.*?)` \|", TEXTS[REPOSITORY / "docs/layout.md"], re.MULTILINE)
    harness = {f"harness/{path.name}" for path in REPOSITORY.glob("harness/*.py")} - {"harness/__init__.py"}
    assert harness <= set(rows) and len(set(rows)) == len(rows)


def test_all_pages_are_linked_from_the_readme():
    assert all(f"(docs/{path.name}" in TEXTS[README] for path in PAGES if path != README)
