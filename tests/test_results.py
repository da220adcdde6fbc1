"""results/: tables filled from summaries written by hand, its checks, its script and its figure on toy folders.

Whether the committed results agree with each other is not tested here: `python -m results.check` says that.
"""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from harness.settings import SETTINGS
from results import check, directions, fill, steps

RUN_ALL = Path(check.__file__).parent / "run_all.sh"


def write_summary(folder, algo, beta, delta, env_steps):
    """A summary.csv with one run for each number of env steps to convergence, of 100 env steps an epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    header = "label,algo,beta,delta,seed,failed,epochs,seconds_mean,seconds_std,epoch_to_convergence,"
    header += "env_steps_to_convergence,seconds_to_convergence,final_return,spread,inner_steps,"
    header += "held_out_inside_0,held_out_inside_1"
    rows = [
        f"{algo},{algo},{beta},{delta},{seed},0,10,0.5,0,{spent / 100},{spent},{spent / 200},7,1,1,3,4"
        for seed, spent in enumerate(env_steps, 1)
    ]
    (folder / "summary.csv").write_text("\n".join([header, *rows]) + "\n")


def write_report(folder):
    tables = fill.report_tables(folder)
    (folder / "report.md").write_text("\n\n".join(["# Toy", *tables]) + "\n")


def marker(**lines):
    return f"<!-- report {json.dumps({'columns': ['runs', 'epochs to convergence'], 'lines': lines})} -->"


TABLE = """| algorithm | runs | epochs to convergence |
| --- | --- | --- |
| ours | 3 | 2 [2, 2] |

Arms compared: 1; epochs trained: 10 each; env steps trained: not recorded.
"""


@pytest.fixture
def page(tmp_path):
    """A page with an outdated table of three runs that converge at epoch 2."""
    write_summary(tmp_path / "toy-pg", "maml", 0.001, 0, [200, 200, 200])
    path = tmp_path / "page.md"
    path.write_text(f"before\n\n{marker(ours='toy-pg/maml')}\n| stale |\n| --- |\nafter\n")
    return path


# --- fill ---


def test_fill_writes_the_marked_table_and_nothing_else(page):
    for _ in range(2):
        fill.fill(page)
        assert page.read_text() == f"before\n\n{marker(ours='toy-pg/maml')}\n\n{TABLE}\nafter\n"


def test_every_flag_is_in_the_flag_table_once_in_the_group_that_help_shows(page):
    page.write_text("before\n\n<!-- flags -->\nafter\n")
    fill.fill(page)
    _, _, *rows, _ = page.read_text().split("<!-- flags -->\n\n")[1].partition("\n\nafter")[0].split("\n") + [""]
    shown = [row.split(" | ")[0].strip("| ") for row in rows]
    expected = [[f"**{title}**", *(f"`{s.flag}`" for s in settings)] for title, settings in SETTINGS.items()]
    assert shown == sum(expected, [])
    assert all(row.count(" | ") == 2 and "None" not in row for row in rows)
    assert fill.is_filled(page)


def test_some_flags_have_a_table_of_their_own_in_the_order_of_the_comment(page):
    page.write_text("<!-- flags inner-steps alpha -->\nafter\n")
    fill.fill(page)
    _, _, _, _, *rows, _, after = page.read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| `--inner-steps`", "| `--alpha`"] and after == "after"
    assert fill.is_filled(page)


def test_a_table_says_whether_its_arms_had_equal_budgets(page):
    summary = page.parent / "other" / "summary.csv"
    write_summary(summary.parent, "maml", 0.001, 0, [200])
    summary.write_text(summary.read_text().replace("maml,maml,0.001,0,1,0,10,", "maml,maml,0.001,0,1,0,30,"))
    page.write_text(marker(ours="toy-pg/maml", theirs="other/maml") + "\n")
    fill.fill(page)
    assert (
        "\n\nArms compared: 2; epochs trained: 10 to 30, not equal; env steps trained: not recorded.\n"
        in page.read_text()
    )


def test_a_comment_without_a_table_gets_one_and_two_in_a_page_stay_apart(page):
    page.write_text(f"{marker(ours='toy-pg/maml')}\n{marker(ours='toy-pg/maml')}\nafter\n")
    fill.fill(page)
    assert page.read_text() == 2 * f"{marker(ours='toy-pg/maml')}\n\n{TABLE}\n" + "after\n"


def test_the_command_fills_several_pages(page):
    other = page.with_name("other.md")
    shutil.copy(page, other)
    fill.main([str(page), str(other)])
    assert fill.is_filled(page) and page.read_text() == other.read_text()


def test_check_names_each_outdated_page_and_writes_nothing(page, capsys):
    other, good = page.with_name("other.md"), page.with_name("good.md")
    for path in (other, good):
        shutil.copy(page, path)
    fill.fill(good)
    texts = {path: path.read_text() for path in (page, other, good)}
    with pytest.raises(SystemExit) as stop:
        fill.main(["--check", *map(str, texts)])
    assert stop.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(page), str(other)]
    assert {path: path.read_text() for path in texts} == texts
    fill.main(["--check", str(good)])  # does not exit


@pytest.mark.parametrize(
    "text, says",
    [
        (marker(ours="toy-pg/unknown"), "toy-pg/summary.csv has no label 'unknown'; it has maml"),
        (marker(ours="nowhere/maml"), "nowhere"),
        ('<!-- report {"columns": ["speed"], "lines": {"ours": "toy-pg/maml"}} -->', "unknown column 'speed'"),
        ("<!-- flags alhpa -->", "unknown flag 'alhpa'"),
        ('<!-- report {"columns": [] -->', "expected"),
        ('<!-- report {"columns": []} -->', "expected"),
    ],
)
def test_what_cannot_be_filled_ends_in_one_line_and_leaves_the_page_as_it_was(page, text, says):
    page.write_text(text + "\n")
    with pytest.raises(SystemExit) as stop:
        fill.main([str(page)])
    assert str(stop.value).startswith(f"results.fill: {page}: ") and says in str(stop.value)
    assert "\n" not in str(stop.value)
    assert page.read_text() == text + "\n"


# --- check ---


def test_pages_are_checked(page):
    (line,) = check.check_pages([page])
    assert line.startswith(f"{page}: its tables are out of date")
    fill.fill(page)
    assert list(check.check_pages([page])) == []
    page.write_text(marker(ours="toy-pg/unknown") + "\n")
    (line,) = check.check_pages([page])
    assert "no label 'unknown'" in line


def test_reports_are_checked(tmp_path):
    folder = tmp_path / "toy-pg"
    write_summary(folder, "maml", 0.001, 0, [200, 200, 200])
    (line,) = check.check_reports(tmp_path)
    assert line.startswith(f"{folder}: ") and "report.md" in line  # there is none
    write_report(folder)
    assert list(check.check_reports(tmp_path)) == []
    write_summary(folder, "maml", 0.001, 0, [300, 300, 300])
    (line,) = check.check_reports(tmp_path)
    assert line == f"{folder / 'report.md'}: its tables differ from those of summary.csv"


def test_experiments_and_folders_are_checked_both_ways(tmp_path):
    for name in ("toy-pg", "controls/toy/beta"):
        write_summary(tmp_path / name, "maml", 0.001, 0, [200])
    (tmp_path / "directions.md").write_text("# Directions\n")
    names = {"toy-pg", "controls/toy/beta", "directions"}
    assert list(check.check_experiments(tmp_path, names)) == []
    (line,) = check.check_experiments(tmp_path, names | {"missing"})
    assert line.startswith(f"{tmp_path / 'missing'}: ")
    (line,) = check.check_experiments(tmp_path, names - {"controls/toy/beta"})
    assert line.startswith(f"{tmp_path / 'controls' / 'toy' / 'beta' / 'summary.csv'}: ")


def write_grid(folder):
    """12 + 15 cells of 5 seeds; the best are β = 0.003 alone (1200 env steps), and β = 0.002 with δ = 0.01 (1100)."""
    for i in range(1, 13):
        write_summary(folder / f"beta{i}", "fomaml", i / 1000, 0, [1200 + 100 * abs(i - 3)] * 5)
    for i in range(1, 6):
        for delta in (0.005, 0.01, 0.02):
            spent = 1100 + 100 * abs(i - 2) + 1e4 * abs(delta - 0.01)
            write_summary(folder / f"directed-beta{i}-{delta}", "directed-fomaml", i / 1000, delta, [spent] * 5)


def test_grids_are_checked(tmp_path):
    write_grid(tmp_path)
    assert list(check.check_grid(tmp_path)) == []
    write_summary(tmp_path / "beta4", "fomaml", 0.004, 0, [1300] * 4)
    shutil.rmtree(tmp_path / "directed-beta1-0.005")
    assert list(check.check_grid(tmp_path)) == [
        f"{tmp_path}: 14 cells of directed-fomaml, expected 15",
        f"{tmp_path}: 4 runs of fomaml, β = 0.004, δ = 0, expected 5",
    ]


def test_the_cells_that_were_run_again_are_the_best(tmp_path):
    grid, tuned = tmp_path / "grid", tmp_path / "tuned"
    write_grid(grid)
    write_summary(tuned / "undirected", "fomaml", 0.003, 0, [1200] * 10)
    (line,) = check.check_tuned(grid, tuned)
    assert line.startswith(f"{tuned / 'directed'}: ")  # there is none
    write_summary(tuned / "directed", "directed-fomaml", 0.002, 0.02, [1200] * 10)
    (line,) = check.check_tuned(grid, tuned)
    assert line == f"{tuned / 'directed'}: β = 0.002, δ = 0.02, but the grid's best cell is β = 0.002, δ = 0.01"
    write_summary(tuned / "directed", "directed-fomaml", 0.002, 0.01, [1100] * 10)
    assert list(check.check_tuned(grid, tuned)) == []


def test_the_command_prints_a_line_for_each_problem_and_exits_with_1(monkeypatch, capsys):
    for lines, code in ((["a: wrong", "b: wrong"], 1), ([], 0)):
        monkeypatch.setattr(check, "problems", lambda lines=lines: iter(lines))
        with pytest.raises(SystemExit) as stop:
            check.main()
        assert stop.value.code == code and capsys.readouterr().out.splitlines() == lines


# --- run_all.sh ---

STAND_IN = """#!/bin/sh
echo "$@" >> commands.txt
[ "$1" = run.py ] || exit 0
while [ "$1" != --out ]; do shift; done
mkdir -p "$2/x"
cd "$2/x" && touch report.md summary.csv curves.csv curves.png thresholds.png adaptation.png
"""

FILES = ("report.md", "summary.csv", "curves.csv", "curves.png", "thresholds.png", "adaptation.png")


def run_all(root, *arguments):
    """results/run_all.sh in an otherwise empty repository, with a stand-in for python that makes empty files."""
    python = root / "bin" / "python"
    if not python.exists():
        python.parent.mkdir()
        python.write_text(STAND_IN)
        python.chmod(0o755)
        (root / "results").mkdir()
        shutil.copy(RUN_ALL, root / "results")
    env = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    script = root / "results" / RUN_ALL.name
    return subprocess.run(["bash", script, *arguments], env=env, capture_output=True, text=True)


def test_run_all_trains_what_is_named_and_copies_its_results(tmp_path):
    done = run_all(tmp_path, "fig3", "controls/velocity")
    assert done.returncode == 0, done.stderr
    made = {path.relative_to(tmp_path / "results").as_posix() for path in (tmp_path / "results").glob("**/*.*")}
    figures = {f"fig3/{name}" for name in FILES}
    controls = {f"controls/velocity/{name}/summary.csv" for name in ("beta", "random", "samples")}
    assert made == {"run_all.sh"} | figures | controls
    commands = (tmp_path / "commands.txt").read_text().splitlines()
    assert len(commands) == 5 and commands[-1] == "-m results.fill README.md results/README.md"


def test_run_all_lists_the_names_of_its_experiments_and_runs_nothing(tmp_path):
    done = run_all(tmp_path, "--list")
    names = done.stdout.splitlines()
    assert done.returncode == 0 and len(names) == len(set(names))
    assert {"cartpole-pg", "grid/crossing/beta0.00035", "grid/point/directed-beta0.008", "directions"} <= set(names)
    assert run_all(tmp_path, "--list", "fig3", "controls/velocity").stdout.splitlines() == [
        "fig3", "controls/velocity/beta", "controls/velocity/random", "controls/velocity/samples",
    ]  # fmt: skip
    assert not (tmp_path / "commands.txt").exists() and not (tmp_path / "runs").exists()
    assert check.list_experiments(RUN_ALL) == set(names)


def test_run_all_refuses_an_unknown_name(tmp_path):
    done = run_all(tmp_path, "unknown")
    assert done.returncode == 2 and done.stderr.startswith("run_all.sh: unknown experiment unknown")


# --- the grids' figure, and the directions ---


def test_the_grids_figure_is_drawn_and_the_best_cells_are_printed(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for env in steps.ENVS:
        write_grid(tmp_path / env)
    write_summary(tmp_path / steps.ENVS[0] / "beta12", "fomaml", 0.012, 0, [math.inf] * 5)
    steps.main(tmp_path)
    assert (tmp_path / "steps.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{steps.ENVS[0]}, fomaml: β 0.003, δ 0: 1.2k [1.2k, 1.2k] env steps, 12 [12, 12] epochs",
        f"{steps.ENVS[0]}, directed-fomaml: β 0.002, δ 0.01: 1.1k [1.1k, 1.1k] env steps, 11 [11, 11] epochs",
    ]


def test_cosines_of_gradients_without_noise_by_hand():
    """Tasks (1, 1), (1, 0), (1, −1): the shared direction is (1, 0), so the cosines are 1/√2, 1, 1/√2."""
    tasks = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, -1.0]], dtype=torch.float64)
    found = directions.cosines(tasks.expand(4, 2, 3, 2))  # 4 repeats, 2 runs
    mean = (1 + math.sqrt(2)) / 3
    for column, value in found.items():
        assert value.tolist() == pytest.approx([1 if column.startswith("medium") else mean] * 2)


def test_noise_lowers_a_single_estimates_cosine_and_not_the_expected_ones():
    """Estimates (1, 1) and (1, −1) in turn have the mean (1, 0): expected cosine 1, a single estimate's 1/√2."""
    estimates = torch.tensor([[1.0, 1.0], [1.0, -1.0]] * 2, dtype=torch.float64).reshape(4, 1, 1, 2)
    found = directions.cosines(estimates)
    assert found["medium task, expected"].item() == pytest.approx(1)
    assert found["medium task, K = 10"].item() == pytest.approx(1 / math.sqrt(2))
