"""results/: tables filled from summaries written by hand, checks, script, statistics and figures on toy folders.

Whether the committed results agree with each other is not tested here: `python -m results.check` says that.
"""

import json
import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.settings import SETTINGS, parse
from results import check, directions, draw, fill, protocol

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


def write_tables(root, **tables):
    (root / "tables.json").write_text(json.dumps(tables))


MARKER = "<!-- table toy -->"

TABLE = """| algorithm | runs | epochs to convergence |
| --- | --- | --- |
| ours | 3 | 2 [2, 2] |

Arms compared: 1; epochs trained: 10 each; env steps trained: not recorded.
"""


def lines_table(**lines):
    return {"columns": ["runs", "epochs to convergence"], "lines": lines}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page with an outdated table of three runs that converge at epoch 2."""
    monkeypatch.setattr(fill, "ROOT", tmp_path)
    write_summary(tmp_path / "toy-pg", "maml", 0.001, 0, [200, 200, 200])
    write_tables(tmp_path, toy=lines_table(ours="toy-pg/maml"))
    path = tmp_path / "page.md"
    path.write_text(f"before\n\n{MARKER}\n| stale |\n| --- |\nafter\n")
    return path


# --- fill ---


def test_fill_writes_the_marked_table_and_nothing_else(page):
    for _ in range(2):
        fill.fill(page)
        assert page.read_text() == f"before\n\n{MARKER}\n\n{TABLE}\nafter\n"


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
    write_tables(page.parent, toy=lines_table(ours="toy-pg/maml", theirs="other/maml"))
    fill.fill(page)
    assert (
        "\n\nArms compared: 2; epochs trained: 10 to 30, not equal; env steps trained: not recorded.\n"
        in page.read_text()
    )


def test_a_comment_without_a_table_gets_one_and_two_in_a_page_stay_apart(page):
    page.write_text(f"{MARKER}\n{MARKER}\nafter\n")
    fill.fill(page)
    assert page.read_text() == 2 * f"{MARKER}\n\n{TABLE}\n" + "after\n"


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


def test_a_table_of_csv_rows_by_hand(page):
    (page.parent / "toy.csv").write_text("name,low,high\na,1.25,inf\nb,2,3\n")
    columns = {"what": "{name}", "from, to": "{low:.2g}, {high:g}"}
    write_tables(page.parent, toy={"csv": "toy.csv", "where": {"name": "a"}, "columns": columns})
    assert fill.table("toy", page.parent) == "| what | from, to |\n| --- | --- |\n| a | 1.2, inf |"


def test_a_table_of_medians_by_hand(page):
    """Of five seeds the interval is the range."""
    rows = [f"a,{seed},{5 - seed}\nb,{seed},0\n" for seed in range(5)]
    (page.parent / "toy.csv").write_text("name,seed,x\n" + "".join(rows))
    write_tables(page.parent, toy={"medians": "toy.csv", "by": ["name"]})
    assert fill.table("toy", page.parent).splitlines()[2:] == ["| a | 3.00 [1.00, 5.00] |", "| b | 0.00 [0.00, 0.00] |"]


def test_a_claim_shows_the_ratio_by_seed_and_what_the_seeds_could_show(page):
    """Ratios 2, 4 and 8: the median is 4; the logarithms' SD is log 2, so exp(2.8 log 2 / √3) = 3.07. A run that never
    converges counts in the median alone."""
    write_summary(page.parent / "slow", "maml", 0.001, 0, [400, 800, 1600, math.inf])
    write_summary(page.parent / "fast", "maml", 0.001, 0, [200, 200, 200, 200])
    pairs = {"ours": ["slow/maml", "fast/maml"]}
    claim = {"says": "faster", "here": "so", "column": "epoch_to_convergence", "pairs": pairs}
    write_tables(page.parent, toy={"claims": [claim], "heading": "the paper"})
    row = fill.table("toy", page.parent).splitlines()[-1].strip("| ").split(" | ")
    assert row[:2] == ["faster", "so"] and row[3] == "3.07×"
    assert row[2].startswith("ours 5.66×")  # of 2, 4, 8, ∞ it lies between 4 and 8: √32 = 5.66


@pytest.mark.parametrize(
    "text, tables, says",
    [
        (MARKER, {"toy": lines_table(ours="toy-pg/unknown")}, "toy-pg/summary.csv has no label 'unknown'; it has maml"),
        (MARKER, {"toy": lines_table(ours="nowhere/maml")}, "nowhere"),
        (MARKER, {"toy": {"columns": ["speed"], "lines": {"ours": "toy-pg/maml"}}}, "unknown column 'speed'"),
        (MARKER, {"toy": {"csv": "toy-pg/summary.csv", "columns": {"x": "{speed:g}"}}}, "speed"),
        (MARKER, {"toy": {"csv": "toy-pg/summary.csv", "where": {"label": "x"}, "columns": {}}}, "no row"),
        (MARKER, {"toy": {"columns": ["runs"]}}, "has not one of lines, csv, medians, claims"),
        (MARKER, {"toy": {"lines": {}}}, "columns"),
        (MARKER, {"toy": {"medians": "toy-pg/summary.csv", "by": ["speed"]}}, "speed"),
        (MARKER, {"other": {}}, "unknown table 'toy'; there are other"),
        ("<!-- flags alhpa -->", {}, "unknown flag 'alhpa'"),
    ],
)
def test_what_cannot_be_filled_ends_in_one_line_and_leaves_the_page_as_it_was(page, text, tables, says):
    page.write_text(text + "\n")
    write_tables(page.parent, **tables)
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
    write_tables(page.parent, toy=lines_table(ours="toy-pg/unknown"))
    (line,) = check.check_pages([page])
    assert "no label 'unknown'" in line


def test_experiments_and_folders_are_checked_both_ways(tmp_path):
    for name in ("toy-pg", "learners/toy/joint", "protocol/toy", "protocol/toy/tuning"):
        write_summary(tmp_path / name, "maml", 0.001, 0, [200])
    (tmp_path / "directions.csv").write_text("environment,epoch,seed\n")
    (tmp_path / "README.md").write_text("<!-- not run: later -->\nThe experiment `later` was not run.\n")
    names = {"toy-pg", "learners/toy/joint", "protocol/toy", "directions", "later"}
    assert list(check.check_experiments(tmp_path, names)) == []
    (line,) = check.check_experiments(tmp_path, names | {"missing"})
    assert line.startswith(f"{tmp_path / 'missing'}: ")
    (line,) = check.check_experiments(tmp_path, names - {"learners/toy/joint"})
    assert line.startswith(f"{tmp_path / 'learners' / 'toy' / 'joint' / 'summary.csv'}: ")
    (line,) = check.check_experiments(tmp_path, names - {"later"})
    assert "later is no experiment" in line
    write_summary(tmp_path / "later", "maml", 0.001, 0, [200])
    (line,) = check.check_experiments(tmp_path, names)
    assert line == f"{tmp_path / 'later'}: README.md says that it was not run"


def test_figures_are_those_that_pages_show(tmp_path):
    (tmp_path / "page.md").write_text("![Toy](toy/curves.png)\n")
    (line,) = check.check_figures(tmp_path)
    assert line.startswith(f"{tmp_path / 'toy' / 'curves.png'}: there is no such figure")
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "curves.png").write_bytes(b"")
    assert list(check.check_figures(tmp_path)) == []
    (tmp_path / "page.md").write_text("Toy.\n")
    assert list(check.check_figures(tmp_path)) == [f"{tmp_path / 'toy' / 'curves.png'}: no page shows it"]


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
cd "$2/x" && touch report.md summary.csv curves.csv curves.png
"""


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
    done = run_all(tmp_path, "fig3", "learners/point")
    assert done.returncode == 0, done.stderr
    made = {path.relative_to(tmp_path / "results").as_posix() for path in (tmp_path / "results").glob("**/*.*")}
    folders = ("fig3", "learners/point/adapting", "learners/point/joint")
    files = {f"{folder}/{name}" for folder in folders for name in ("summary.csv", "curves.csv")}
    assert made == {"run_all.sh"} | files
    commands = (tmp_path / "commands.txt").read_text().splitlines()
    assert len(commands) == 4 and commands[-1] == "-m results.fill"


def test_run_all_lists_the_names_of_its_experiments_and_runs_nothing(tmp_path):
    done = run_all(tmp_path, "--list")
    names = done.stdout.splitlines()
    assert done.returncode == 0 and len(names) == len(set(names))
    assert {"cartpole-pg", "promp/pendulum/5/joint", "directions"} <= set(names)
    assert {f"protocol/{family}" for family in protocol.FAMILIES} <= set(names)
    shown = run_all(tmp_path, "--list", "fig3", "learners/point").stdout.splitlines()
    assert shown == ["fig3", "learners/point/adapting", "learners/point/joint"]
    assert not (tmp_path / "commands.txt").exists() and not (tmp_path / "runs").exists()
    assert check.list_experiments(RUN_ALL) == set(names)


def test_run_all_refuses_an_unknown_name(tmp_path):
    done = run_all(tmp_path, "unknown")
    assert done.returncode == 2 and done.stderr.startswith("run_all.sh: unknown experiment unknown")


# --- the protocol ---


def test_configurations_are_a_latin_hypercube_within_the_ranges_of_the_protocol():
    for name, family in protocol.FAMILIES.items():
        found = protocol.configurations(name)
        assert len(found) == family.configurations and np.array_equal(found, protocol.configurations(name))
        alpha, beta, delta = found.T
        for values, (low, high) in ((alpha, family.alpha), (beta, family.beta), (delta / beta, protocol.RATIO)):
            place = len(found) * np.log(values / low) / math.log(high / low)
            assert sorted((place + 0.02 * (0.5 - place % 1)).astype(int)) == list(range(len(found)))  # three digits
        low, high = family.beta
        for upwards, ends in ((True, (high, 3 * high)), (False, (low / 3, low))):
            beyond = protocol.extension(name, upwards)
            assert len(beyond) == family.configurations // 3
            assert (0.99 * ends[0] <= beyond[:, 1]).all() and (beyond[:, 1] <= 1.01 * ends[1]).all()


def test_every_arm_is_a_command_and_has_the_settings_of_the_protocol():
    for name, family in protocol.FAMILIES.items():
        for arm in family.arms:
            args = parse(protocol.flags(name, arm, (0.01, 0.02, 0.03), "1001-1003"))
            assert args.beta == [0.02] and args.seed == [1001, 1002, 1003] and args.window == family.window
            assert args.alpha == ([0.01] if arm in "ABCDE" else None)
            assert args.delta == ([0.03] if arm in "BCD" else None)
            assert args.epochs == family.epochs * (2 if arm in "FG" else 1)


def test_the_sign_flip_test_by_hand():
    """Of the 8 flips of (1, 2, 3) only the two with all signs alike have a sum as far from 0 as 6; of (1, 2, −3), with
    the sum 0, all have."""
    assert protocol.p_value(np.array([1.0, 2.0, 3.0])) == 2 / 8
    assert protocol.p_value(np.array([1.0, 2.0, -3.0])) == 1
    assert protocol.p_value(np.ones(40)) == 2**-16  # of those drawn the one that flips nothing


def test_the_sign_flip_test_rejects_as_often_as_it_says_and_its_interval_holds_as_often():
    random = np.random.default_rng(0)
    samples = 0.5 + random.standard_normal((300, 12))
    holds = [low <= 0.5 <= high for low, high in (protocol.interval(x, 0.9) for x in samples[:100])]
    assert abs(np.mean(holds) - 0.9) < 3 * math.sqrt(0.09 / 100)
    rejected = [protocol.p_value(x - 0.5) < 0.1 for x in samples]
    assert abs(np.mean(rejected) - 0.1) < 3 * math.sqrt(0.09 / 300)


def test_an_interval_lies_about_the_mean_and_is_wider_at_a_higher_level():
    x = np.random.default_rng(1).standard_normal(20)
    (low90, high90), (low95, high95) = protocol.interval(x, 0.9), protocol.interval(x, 0.95)
    assert low95 < low90 < x.mean() < high90 < high95
    t, sd = 2.093, x.std(ddof=1)  # Student's, 19 degrees
    assert high95 - low95 == pytest.approx(2 * t * sd / math.sqrt(20), rel=0.1)


def test_holms_adjustment_by_hand():
    """Of four tests, one of which is not there: 4 · 0.01, then 3 · 0.02, then the same, since 2 · 0.025 is less."""
    assert protocol.holm({"a": 0.02, "b": 0.01, "c": 0.025}, 4) == pytest.approx({"b": 0.04, "a": 0.06, "c": 0.06})


def test_a_repetition_has_the_same_configurations_fresh_seeds_and_an_adjustment_of_its_own():
    repetitions = {name: family for name, family in protocol.FAMILIES.items() if family.repeats}
    for name, family in repetitions.items():
        first = protocol.FAMILIES[family.repeats]
        assert np.array_equal(protocol.configurations(name), protocol.configurations(family.repeats))
        args = parse(protocol.flags(name, "B", (0.01, 0.02, 0.03), "1-3"))
        assert args.env == family.repeats and args.algo == [f"directed-{family.learner}"]
        assert not set(protocol.seeds_of(family.tuning_seeds)) & set(protocol.seeds_of(first.tuning_seeds))
        assert family.first_seed > first.first_seed + protocol.MOST
        same = replace(family, arms=first.arms, tuning_seeds=first.tuning_seeds, first_seed=first.first_seed)
        assert replace(same, repeats="", learner="fomaml") == first
    adjusted = protocol.adjust({(name, "B-A"): 0.01, (family.repeats, "B-A"): 0.002})
    assert adjusted == pytest.approx({(name, "B-A"): 3 * 0.01, (family.repeats, "B-A"): 15 * 0.002})


@pytest.mark.parametrize(
    "holm, mean, low90, high90, says",
    [
        (0.01, 3, 2, 4, "better"),
        (0.01, -3, -4, -2, "worse"),
        (0.01, 0.5, 0.2, 0.8, "better, by less than matters"),
        (0.2, 0.5, -0.9, 0.9, "equal"),
        (0.2, 0.5, -0.9, 1.1, "cannot tell"),
        (math.nan, 3, 2, 4, "exploratory"),
    ],
)
def test_verdicts(holm, mean, low90, high90, says):
    row = {"holm": holm, "mean": mean, "low90": low90, "high90": high90, "effect": 1}
    assert protocol.verdict(row) == says


@pytest.fixture
def small_protocol(tmp_path, monkeypatch):
    """The protocol on point with three configurations, and the summaries that its runs would write."""
    monkeypatch.setattr(protocol, "ROOT", tmp_path)
    family = protocol.FAMILIES["point"]
    monkeypatch.setitem(protocol.FAMILIES, "point", replace(family, configurations=3))

    def write(phase, lines):
        rows = ["label,algo,counterpart,alpha,beta,delta,seed,area"]
        for label, ((alpha, beta, delta), areas, first) in lines.items():
            arm = label[0]
            shown = [alpha if arm in "ABCDE" else 0, beta, delta if arm in "BCD" else 0]
            sizes = ",".join(f"{x:.8g}" for x in shown)
            rows += [f"{label},x,,{sizes},{seed},{area}" for seed, area in enumerate(areas, first)]
        folder = tmp_path / "point" / phase
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.csv").write_text("\n".join(rows) + "\n")

    def tuning(beta_order):
        """Every arm's area is highest at the configuration whose β has this place, and falls from there."""
        tried = protocol.configurations("point")
        places = np.argsort(np.argsort(tried[:, 1]))
        areas = {n: -abs(int(places[n - 1]) - beta_order) for n in (1, 2, 3)}
        lines = {f"{arm}{n}": (tried[n - 1], [areas[n] + x for x in (0, 0.1, 0.2)], 101)
                 for arm in "ABCDFG" for n in (1, 2, 3)}  # fmt: skip
        write("tuning", lines)
        return int(np.argsort(tried[:, 1])[beta_order]) + 1

    return write, tuning


def test_the_best_configuration_is_chosen_and_the_range_extended_where_it_lies_at_an_end(small_protocol):
    _, tuning = small_protocol
    middle = tuning(1)
    assert protocol.chosen("point", "A") == protocol.chosen("point", "E") == middle
    assert len(protocol.tried("point")) == 3
    tuning(2)
    added = protocol.tried("point")[3:]
    assert np.array_equal(added, protocol.extension("point", upwards=True))
    alpha, beta, delta = protocol.sizes_of("point", "B")
    assert protocol.sizes_of("point", "E") == (alpha, pytest.approx(beta + delta / 5, rel=1e-5), 0)


def test_choices_say_which_step_sizes_lie_at_an_end_of_those_tried(small_protocol):
    write, tuning = small_protocol
    best = tuning(0) - 1
    write(".", {arm: (protocol.sizes_of("point", arm), range(12), 1001) for arm in "ABCDEFG"})
    rows = {row["arm"]: row for row in protocol.choices()}
    every = protocol.tried("point")
    assert len(every) == 4  # β is the lowest of three, and one is beyond
    assert rows["F"]["ends"] == "none" and rows["E"]["ends"] == "as B"
    alpha, ratio = every[:, 0], every[:, 2] / every[:, 1]
    for what, values in (("α", alpha), ("δ / β", ratio)):
        assert (f"lowest {what}" in rows["B"]["ends"]) == (best == values.argmin())
        assert (f"highest {what}" in rows["B"]["ends"]) == (best == values.argmax())


def test_the_number_of_seeds_follows_from_the_spread_of_the_differences(small_protocol):
    """B − A has no spread where all runs of a seed agree: the fewest. With areas 0, x, −x of B its SD is x, and at
    x = 0.12, for the effect 0.1, it takes 14.3 · 1.44 = 20.6 seeds."""
    write, tuning = small_protocol
    tuning(1)
    assert protocol.seeds_needed("point") == (12, pytest.approx(0, abs=1e-9))
    tried = protocol.configurations("point")
    lines = {f"A{n}": (tried[n - 1], [0, 0, 0], 101) for n in (1, 2, 3)}
    lines |= {f"B{n}": (tried[n - 1], [0, 0.12, -0.12], 101) for n in (1, 2, 3)}
    write("tuning", lines)
    assert protocol.seeds_needed("point") == (21, pytest.approx(0.12))


def test_the_protocols_runs_and_comparisons_are_checked(small_protocol, tmp_path):
    write, tuning = small_protocol
    tuning(1)
    lines = {arm: (protocol.sizes_of("point", arm), np.arange(12) + i, 1001) for i, arm in enumerate("ABCDEFG")}
    write(".", lines)
    assert [line.split(": ")[0] for line in check.check_protocol()] == [
        str(tmp_path / name) for name in ("choices.csv", "differences.csv", "same-sizes.csv")
    ]
    protocol.main([])
    assert list(check.check_protocol()) == []
    rows = {row["comparison"]: row for row in fill.read_rows(tmp_path / "differences.csv")}
    assert float(rows["B-A"]["mean"]) == 1 and float(rows["A-F"]["mean"]) == -5
    assert rows["B-A"]["verdict"] == "better"  # p is 2 / 2^12, times 15
    assert float(rows["B-A"]["holm"]) == pytest.approx(15 * 2 / 2**12, rel=1e-3)
    assert float(rows["B-A"]["detectable"]) == 0  # all differences are 1
    (alpha, beta, delta), areas, first = lines["B"]
    write(".", lines | {"B": ((alpha, 2 * beta, delta), areas, first)})
    (line,) = check.check_runs("point")
    assert line.startswith("point/B: beta is")
    write(".", lines | {"B": ((alpha, beta, delta), areas[1:], first)})
    assert any("point/B: its seeds are" in line for line in check.check_runs("point"))


# --- the figures, and the directions ---


def test_the_figures_are_drawn_from_committed_files_alone(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(draw, "ROOT", tmp_path)
    monkeypatch.setattr(protocol, "ROOT", tmp_path / "protocol")
    curves = "label,against,x,median,low,high\n"
    for label in ("A", "B"):
        curves += "".join(f"{label},{key},{x},{x},0,9\n" for key in ("epoch", "env_steps") for x in (1, 4e5))
    for folder in (tmp_path / "protocol" / "point", tmp_path / "toy"):
        write_summary(folder, "A", 0.001, 0, [200, 200])
        (folder / "curves.csv").write_text(curves)
    row = {"family": "point", "comparison": "B-A", "mean": 1, "low95": -1, "high95": 2, "low90": 0, "high90": 2}
    row |= {"effect": 0.5}
    lines = ",".join(row), ",".join(map(str, row.values()))
    (tmp_path / "protocol" / "differences.csv").write_text("\n".join(lines) + "\n")
    names = ("protocol/differences.png", "protocol/point/curves.png", "toy/curves.png")
    (tmp_path / "README.md").write_text("".join(f"![A figure]({name})\n" for name in names))
    draw.main()
    for name in names:
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


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


def test_arms_are_compared_at_the_same_step_sizes(small_protocol):
    """B is better than A in the first two of three configurations, than C in none, and as good as D in all."""
    write, _ = small_protocol
    tried = protocol.configurations("point")
    areas = {"A": (0, 1, 2), "B": (1, 2, 1), "C": (2, 3, 4), "D": (1, 2, 1), "F": (0, 0, 0), "G": (0, 0, 0)}
    lines = {f"{arm}{n}": (tried[n - 1], [own[n - 1]] * 3, 101) for arm, own in areas.items() for n in (1, 2, 3)}
    write("tuning", lines)
    write(".", {arm: (protocol.sizes_of("point", arm), range(12), 1001) for arm in "ABCDEFG"})
    expected = {"family": "point", "seeds": 3, "A": "2 of 3", "C": "0 of 3", "D": "0 of 3"}
    assert protocol.same_sizes() == [expected]
