"""report.md, summary.csv and curves.csv of run folders written by hand."""

import csv
from contextlib import ExitStack
from threading import Timer
from types import SimpleNamespace

import numpy as np
import pytest

import run
from harness import checkpoints, report
from tests.commands import train
from tests.test_runs import DAMAGES, change, write_evaluation, write_run

SPEED_UP = "speed-up by δ: epochs; steps; s"


@pytest.fixture
def experiment(tmp_path):
    """maml: over 15 at epoch 4, 4 and never, by 500, 500 and 2000 s an epoch; directed-maml: at
    epoch 2 in all three."""
    root = tmp_path / "toy-pg"
    for seed in (1, 2):
        write_run(root / "maml" / f"seed{seed}", "maml", [10.0] * 3 + [100.0] * 3, seconds=500)
    write_run(root / "maml" / "seed3", "maml", [10.0] * 6, seconds=2000)
    for seed in (1, 2, 3):
        folder = root / "directed-maml" / f"seed{seed}"
        write_run(folder, "directed-maml", [10.0] + [100.0] * 5, seconds=1000)
    return root


def rows_of(root):
    """The rows of all tables of report.md, as lists of cells."""
    lines = (root / "report.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]


def cells(root, label):
    """All cells of a line of report.md, from all its tables; a column that is not there has no text."""
    found, header = {}, []
    for row in rows_of(root):
        if row[0] == "algorithm":
            header = row
        elif row[0] == label:
            found |= dict(zip(header, row, strict=True))
    return found


def read_summary(root):
    return report.read_summary((root / "summary.csv").read_text(encoding="utf-8"))


def test_the_table_by_hand(experiment):
    """Seconds of all epochs of maml: mean 1000, variance (2 · 500² + 1000²) / 3 = 707²."""
    report.write(experiment)
    maml, directed = cells(experiment, "maml"), cells(experiment, "directed-maml")
    assert maml["runs"] == "3" and maml["epochs trained"] == "6" and maml["converged"] == "2/3"
    assert report.plus_minus(0.1, 1e-17) == "0.1 ± 0"
    assert maml["s per epoch"] == "1k ± 707" and maml["s per 1000 epochs"] == "1M ± 707k"
    assert maml["epochs to convergence"] == "4 [0, never]"  # of three runs one is infinite
    assert directed["converged"] == "3/3"
    assert directed["epochs to convergence"] == "2 [2, 2]"
    assert directed["env steps to convergence"] == "200 [200, 200]"
    assert directed["s to convergence"] == "2k [2k, 2k]"
    assert directed["final return"] == "100 [100, 100]"
    assert directed["held-out before"] == "10 [10, 10]" and directed["held-out after"] == "11 [11, 11]"
    assert directed["speed-up by δ: epochs; steps; s"] == "2× [0, ∞]; 2× [0, ∞]; 1× [0, ∞]"  # 4/2, 4/2 and never/2
    assert directed["P(fewer epochs by δ)"].startswith("1.00 [")


def test_the_report_says_where_its_arms_had_unequal_budgets(experiment):
    write_run(experiment / "fomaml" / "seed1", "fomaml", [10.0] * 3)
    report.write(experiment)
    text = (experiment / "report.md").read_text()
    said = "Arms compared: 3; epochs trained: 3 to 6, not equal; env steps trained: 300 to 600, not equal."
    assert text.count(said) == 3  # with every section
    assert "over the first 300 env" in text and "95% intervals for the median" in text
    assert "even grid over Φ" in text and "\n\n\n" not in text
    assert "(at most 2)" in " ".join(text.split())


def test_no_table_is_wider_than_eight_columns_and_none_has_an_empty_one(experiment):
    """Held-out returns after 0 to 9 steps take two tables."""
    for folder in experiment.glob("*/*"):
        change(folder, eval_steps=9)
        write_evaluation(folder, [f"6,{task},{step},{step}" for task in (5, 10) for step in range(10)])
    report.write(experiment)
    assert max(map(len, rows_of(experiment))) == 8
    line = cells(experiment, "directed-maml")
    assert line["inside Φ, 9 steps"] == "9 [9, 9]"
    assert not {"outside Φ, 0 steps", "norm of the δ-step"} & line.keys()
    assert "P(fewer epochs by δ)" in line and "–" in cells(experiment, "maml").values()


# --- convergence, by two criteria ---


def test_both_criteria_and_the_area_are_in_the_summary_and_the_tables(tmp_path):
    """Both are over 15 in the first epoch, and for good maml from epoch 121 on, directed-maml from epoch 111 on.

    A mean of 100 epochs, n of them at 100 and the others at 10, is over 15 from n = 6 on (15.4), which is from 94
    epochs before the jump on: 27 and 17. The means over 200 epochs are (119 · 10 + 81 · 100) / 200 and
    (109 · 10 + 91 · 100) / 200."""
    for seed in (1, 2):
        write_run(tmp_path / "a" / f"seed{seed}", "maml", [100.0] + [10.0] * 119 + [100.0] * 80)
        write_run(tmp_path / "b" / f"seed{seed}", "directed-maml", [100.0] + [10.0] * 109 + [100.0] * 90)
    report.write(tmp_path)
    maml, directed = cells(tmp_path, "maml"), cells(tmp_path, "directed-maml")
    assert maml["epochs to convergence"] == directed["epochs to convergence"] == "1 [1, 1]"
    assert maml["sustained"] == "2/2" and maml["epochs to sustained"] == "27 [27, 27]"
    assert directed["env steps to sustained"] == "1.7k [1.7k, 1.7k]"
    assert maml["area"] == "46.45 [46.45, 46.45]" and directed["area"] == "50.95 [50.95, 50.95]"
    assert directed["spread"] == "27 [27, 27]"  # 10 of the last 100 at 10: 90 √(0.1 · 0.9)
    sustained = directed["speed-up by δ: epochs; steps; s, sustained"]
    assert sustained == "1.59× [1.59, 1.59]; 1.59× [1.59, 1.59]; 1.59× [1.59, 1.59]"  # 27/17
    assert directed["P(fewer epochs by δ, sustained)"].startswith("1.00 [")
    text = " ".join((tmp_path / "report.md").read_text().split())
    assert "once converged, it stays above: the mean over the next 100 epochs" in text


def test_an_old_summary_shows_dashes_and_compares_the_lines_of_one_command(experiment):
    """It has neither the sustained criterion nor the counterpart; β may vary."""
    report.write(experiment)
    missing = {"counterpart", "area", "env_steps"} | {f"{x}_to_sustained" for x in ("epoch", "env_steps", "seconds")}
    old = {label: {key: x for key, x in runs.items() if key not in missing}
           for label, runs in read_summary(experiment).items()}  # fmt: skip
    line = report.cells("directed", "directed-maml", old)
    assert line["algorithm"] == "directed" and line["area"] == line["sustained"] == "–"
    assert line["epochs to convergence"] == "2 [2, 2]" and line[SPEED_UP].startswith("2×")
    assert report.cells("maml", "maml", old)[SPEED_UP] == "–"
    assert report.budget(old).endswith("epochs trained: 6 each; env steps trained: not recorded.")
    assert report.tables(old)["sustained"] == ""
    zero = {"directed-maml, δ = 0": old["maml"], "directed-maml, δ = 1": old["directed-maml"]}
    assert report.cells("", "directed-maml, δ = 1", zero)[SPEED_UP].startswith("2×")
    old["maml"]["beta"] = [0.002] * 3
    assert report.cells("directed", "directed-maml", old)[SPEED_UP] == "–"


def test_the_medians_of_what_the_delta_step_does_are_shown_where_they_were_logged(tmp_path):
    for algo, rows in (("maml", ["", "", ""]), ("directed-maml", ["2,4,0.5", "3,5,-0.5", "10,6,0.1"])):
        write_run(tmp_path / algo / "seed1", algo, [1.0] * 3)
        path = tmp_path / algo / "seed1" / "log.csv"
        lines = path.read_text().splitlines()
        columns = ["delta_norm,beta_norm,delta_beta_cosine", *(row or ",7," for row in rows)]
        path.write_text("\n".join(f"{line},{more}" for line, more in zip(lines, columns, strict=True)) + "\n")
    report.write(tmp_path)
    names = ["norm of the δ-step", "norm of the β-step", "their cosine"]
    assert [cells(tmp_path, "directed-maml")[name] for name in names] == ["3", "5", "0.1"]
    assert [cells(tmp_path, "maml")[name] for name in names] == ["–", "7", "–"]


def test_one_run_has_no_interval_and_without_an_evaluation_nothing_is_said_of_one(tmp_path):
    write_run(tmp_path / "seed1", "maml", [10.0] * 3 + [100.0])
    write_evaluation(tmp_path / "seed1", [])
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "[" not in text and "95%" not in text and "one run for each line" in text
    assert "## Held-out" not in text and "held-out before" not in text
    assert cells(tmp_path, "maml")["epochs to convergence"] == "4"
    assert (tmp_path / "curves.csv").read_text().splitlines()[1] == '"maml",epoch,1,10,nan,nan'


def test_each_directed_line_is_compared_with_its_own_counterpart_and_others_with_none(tmp_path):
    """maml gets there in 4 epochs with α = 1 and in 3 with α = 2; directed-maml in 2 with any α."""
    for alpha, epochs in ((1, 4), (2, 3)):
        write_run(tmp_path / f"a{alpha}" / "seed1", "maml", [10.0] * (epochs - 1) + [100.0], alpha=alpha)
    for alpha in (1, 2, 3):
        write_run(tmp_path / f"b{alpha}" / "seed1", "directed-maml", [10.0, 100.0], alpha=alpha)
    report.write(tmp_path)
    assert cells(tmp_path, "directed-maml, α = 1")[SPEED_UP] == "2×; 2×; 2×"
    assert cells(tmp_path, "directed-maml, α = 2")[SPEED_UP] == "1.5×; 1.5×; 1.5×"
    assert cells(tmp_path, "directed-maml, α = 3")[SPEED_UP] == cells(tmp_path, "maml, α = 1")[SPEED_UP] == "–"


def test_a_run_without_a_threshold_never_converges(tmp_path):
    write_run(tmp_path / "seed1", "maml", [10.0, 100.0])
    path = tmp_path / "seed1/config.json"
    path.write_text(path.read_text().replace('"threshold": 15.0', '"another": 1'))
    report.write(tmp_path)
    assert cells(tmp_path, "maml")["epochs to convergence"] == "never"
    assert "is above a threshold, here not given;" in (tmp_path / "report.md").read_text()


def test_failed_runs_are_counted_and_not_dropped(experiment):
    """But their returns are: the median of 100, 100, 10 is 100, with 50 it would be 75."""
    write_run(experiment / "maml" / "seed4", "maml", [10.0, 100.0, 50.0], failed=True)
    rows = [f"3,{task},{step},0" for task in (5, 10, 15) for step in range(3)]
    write_evaluation(experiment / "maml" / "seed4", rows)
    report.write(experiment)
    maml = cells(experiment, "maml")
    assert maml["final return"].startswith("100 [") and maml["held-out after"] == "11 [11, 11]"
    assert maml["runs"] == "4 (1 failed)" and maml["converged"] == "2/4" and maml["epochs trained"] == "3-6"


# --- held-out returns ---


@pytest.mark.parametrize("settings", [{}, {"range": [0, 30], "values": [5, 15]}])
def test_held_out_tasks_inside_and_outside_phi_by_the_number_of_steps(tmp_path, settings):
    """Φ is [5, 15], or the list of 5 and 15."""
    write_run(tmp_path / "seed1", "maml", [1.0], **settings)
    rows = [f"1,{phi},{step},{phi * (step + 1)}" for phi in (0, 5, 15, 30) for step in range(3)]
    write_evaluation(tmp_path / "seed1", rows)
    report.write(tmp_path)
    numbers = read_summary(tmp_path)["maml"]
    assert [numbers[f"held_out_inside_{step}"] for step in range(3)] == [[10], [20], [30]]
    assert [numbers[f"held_out_outside_{step}"] for step in range(3)] == [[15], [30], [45]]
    line = cells(tmp_path, "maml")
    assert line["held-out before"] == line["inside Φ, 0 steps"] == "10"
    assert line["held-out after"] == line["inside Φ, 1 step"] == "20"
    assert line["outside Φ, 2 steps"] == "45"


def test_what_an_environment_reports_inside_and_outside_phi_by_the_number_of_steps(tmp_path):
    """A task without a number counts in no mean, and neither does a run from before there were any."""
    for seed in (1, 2):
        write_run(tmp_path / f"seed{seed}", "maml", [1.0])
    text = "epoch,phi,step,return,success,inside_0_x,own name\n"
    for phi, success in ((5, (0, 1, 1)), (15, (1, "", "")), (30, ("", "", ""))):
        text += "".join(f"1,{phi},{step},9,{x},7,{phi}\n" for step, x in enumerate(success))
    (tmp_path / "seed1" / "eval.csv").write_text(text)
    write_evaluation(tmp_path / "seed2", [f"1,{phi},{step},9" for phi in (5, 15, 30) for step in range(3)])
    report.write(tmp_path)
    numbers, line = read_summary(tmp_path)["maml"], cells(tmp_path, "maml")
    assert [numbers[f"held_out_inside_{step}_success"][0] for step in range(3)] == [0.5, 1, 1]
    assert np.isnan(numbers["held_out_outside_0_success"] + numbers["held_out_inside_0_success"][1:]).all()
    assert line["success inside Φ, 0 steps"] == "0.5" and line["success inside Φ, 2 steps"] == "1"
    assert line["own name inside Φ, 1 step"] == "10" and line["own name outside Φ, 1 step"] == "30"
    assert line["inside_0_x inside Φ, 1 step"] == "7" and "success outside Φ, 0 steps" not in line
    assert "## What the environment reports of the held-out tasks\n" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("settings", [{}, {"values": [0, 0, 0, 3]}])
def test_a_task_is_inside_phi_if_all_its_components_are(settings):
    evaluation = {"phi": np.array([[0, 0], [0, 2]])}
    run = SimpleNamespace(evaluation=evaluation, config={"range": [-1, 1, -1, 1], **settings})
    assert report.inside_phi(run).tolist() == [True, False]


def test_the_final_return_is_the_mean_over_the_last_tenth(tmp_path):
    write_run(tmp_path / "seed1", "maml", [0.0] * 18 + [10.0, 20.0])
    report.write(tmp_path)
    assert cells(tmp_path, "maml")["final return"] == "15"


def test_lines_evaluated_after_different_numbers_of_steps_or_never_share_a_summary(experiment):
    write_run(experiment / "fomaml" / "seed1", "fomaml", [10.0] * 3, eval_steps=1)
    write_run(experiment / "reptile" / "seed1", "reptile", [10.0] * 3)
    write_evaluation(experiment / "reptile" / "seed1", ["3,5,0,1"])  # it stopped within the first
    report.write(experiment)
    rows = rows_of(experiment)
    assert ["fomaml, eval_steps = 1", "10", "11", "–"] in rows and ["reptile, eval_steps = 2", "–", "–", "–"] in rows
    assert cells(experiment, "reptile, eval_steps = 2")["held-out after"] == "–"


def test_the_tables_are_made_of_summary_csv_alone(experiment):
    report.write(experiment)
    numbers = read_summary(experiment)
    for table in report.tables(numbers).values():
        assert table in (experiment / "report.md").read_text()


# --- the command ---


def test_the_command_writes_reports_and_says_in_one_line_what_is_not_a_folder(experiment, capsys):
    write_run(experiment / "damaged" / "seed1", "../x", [1.0])
    run.main(["--report", str(experiment), str(experiment / "maml")])
    assert cells(experiment / "maml", "maml").items() <= cells(experiment, "maml").items()
    first, second, third = capsys.readouterr().out.splitlines()
    assert [first, third] == [f"wrote {x / 'report.md'}" for x in (experiment, experiment / "maml")]
    assert second.startswith(f"{experiment / 'damaged/seed1/config.json'}: cannot be read (")
    with pytest.raises(SystemExit) as stop:
        run.main(["--report", str(experiment / "x")])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err == f"run.py: --report {experiment / 'x'}: there is no such folder\n"


@pytest.mark.parametrize("words", [["--algo", "maml"], ["--watch", "runs/x"]])
def test_the_command_refuses_flags_that_would_do_nothing(experiment, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--report", str(experiment), *words])
    assert stop.value.code == 2
    assert f"--report: not allowed with argument {words[0]}" in capsys.readouterr().err


def test_a_folder_without_runs_has_no_report_and_is_named_printably(tmp_path):
    (tmp_path / "a\x1b").mkdir()
    said = f"{tmp_path}/a\\x1b: no run with a log, so no report"
    assert report.write(tmp_path / "a\x1b") == ([said], [])
    assert list(tmp_path.glob("*/*")) == []
    write_run(tmp_path / "a\x1b" / "seed1", "maml", [1.0])
    assert report.write(tmp_path / "a\x1b") == ([f"wrote {tmp_path}/a\\x1b/report.md"], [])


@pytest.mark.skipif(checkpoints.fcntl is None, reason="there are no locks")
def test_the_command_waits_for_another_report(experiment):
    with ExitStack() as other:
        other.enter_context(checkpoints.locked(experiment))
        Timer(0.1, other.pop_all().close).start()
        report.rewrite([experiment])
    assert (experiment / "report.md").exists()


@pytest.mark.skipif(checkpoints.fcntl is None, reason="there are no locks")
def test_the_command_does_not_wait_for_the_end_of_a_training(experiment, capsys):
    with checkpoints.locked(experiment / "maml/seed1"), pytest.raises(SystemExit):
        run.main(["--report", str(experiment / "maml/seed1")])
    assert "another process is training this run" in capsys.readouterr().err
    with checkpoints.locked(experiment / "maml/seed1"):
        run.main(["--report", str(experiment)])


# --- runs of others ---


@pytest.mark.filterwarnings("error")
def test_runs_that_cannot_be_read_are_named_below_the_report_of_the_others(experiment, drawn):
    files = []
    for i, (name, damages) in enumerate(DAMAGES.items()):
        folder = experiment / f"damaged{i}" / "seed7"
        write_run(folder, "maml", [1.0])
        damages[0](folder / name)
        files.append(folder / name)
    wrote, left_out = report.write(experiment)
    assert len(wrote) == 4 and len(left_out) == len(files)
    text = (experiment / "report.md").read_text(encoding="utf-8")
    for path, line in zip(files, left_out, strict=True):
        assert line.startswith(f"{path}: cannot be read (") and f"\n{line}.\n" in text
    assert cells(experiment, "maml")["runs"] == "3"


def test_labels_are_one_cell_in_every_file_and_no_formula(tmp_path):
    """In a label a setting may hold all that separates cells."""
    evil = '=a|b",c\nd\x1b[31m'
    for i, env in enumerate((evil, "toy"), 1):
        write_run(tmp_path / f"{i}" / "seed1", "maml", [1.0], env=env)
    report.write(tmp_path)
    label = 'maml, env = =a|b",c\\nd\\x1b[31m'
    for name in ("summary.csv", "curves.csv"):
        text = (tmp_path / name).read_text()
        assert {row["label"] for row in csv.DictReader(text.splitlines())} == {label, "maml, env = toy"}
    texts = [(tmp_path / name).read_text() for name in ("report.md", "summary.csv", "curves.csv")]
    assert all(line.isprintable() for text in texts for line in text.splitlines())
    assert "| " + label.replace("|", "\\|") + " | 1 |" in texts[0]


def test_the_exit_code_of_a_training_does_not_depend_on_other_runs(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "cartpole-pg" / "other" / "seed1", "maml", [1.0])
    (tmp_path / "cartpole-pg" / "other" / "seed1" / "log.csv").write_text("epoch\n")
    train(tmp_path)
    assert capsys.readouterr().err == ""  # it has no epochs
    (tmp_path / "cartpole-pg" / "other" / "seed1" / "log.csv").write_text("epoch\n1\n")
    train(tmp_path, "--resume")
    assert capsys.readouterr().err.count("left out") == 1

    def broken(root, window):
        raise ZeroDivisionError("never seen\nbefore")

    monkeypatch.setattr(report, "write", broken)
    train(tmp_path, "--resume")
    said = capsys.readouterr().err
    assert said.endswith("the runs are good, but there is no report: ZeroDivisionError: never seen\n")
    assert said.count("\n") == 1
