"""The report and figures of run folders written by hand."""

import builtins
import json
import math
import shutil

import numpy as np
import pytest

import run
from harness import measures, report
from tests.test_measures import logged


def test_numbers_of_env_steps_are_short():
    assert [report.thousands(x) for x in (3, 999.4, 999.6, 1234, 999_600, 3_984_000)] == [
        "3", "999", "1k", "1.23k", "1M", "3.98M",
    ]  # fmt: skip


def write_run(folder, algo, delta, returns, seconds=0.5, threshold=15.0, phi=("gravity (m/s²)",), failed=False):
    folder.mkdir(parents=True)
    config = {"env": "toy", "rl": "pg", "algo": algo, "delta": delta, "inner_steps": 1, "eval_steps": 2}
    config |= {"seed": int(folder.name.removeprefix("seed")), "beta": 0.001, "threshold": threshold}
    config |= {"phi_names": phi, "range": [-1.0 if len(phi) > 1 else 5.0, 15.0] * len(phi)}
    (folder / "config.json").write_text(json.dumps(config))
    rows = ["epoch,env_steps,seconds,sample_seconds,return_pre,return_post,return_med"]
    for i, x in enumerate(returns, 1):
        rows.append(f"{i},{100 * i},{seconds * i},{0.1 * i},{x - 1},{x},")
    (folder / "log.csv").write_text("\n".join(rows) + "\n")
    rows = ["epoch,phi,step,return"]
    grid = ["5", "10", "15"] if len(phi) == 1 else ["-1 0", "0 0", "0 1", "0 -1", "1 0"]
    rows += [f"{len(returns)},{p},{step},{10 + step}" for p in grid for step in range(3)]
    (folder / "eval.csv").write_text("\n".join(rows) + "\n")
    if failed:
        (folder / "failed.txt").write_text("not finite\n")


@pytest.fixture
def experiment(tmp_path):
    """maml: over 15 at epoch 4, 4 and never; directed-maml: at epoch 2 in all three."""
    root = tmp_path / "toy-pg"
    for seed, jump in ((1, 4), (2, 4), (3, 99)):
        write_run(
            root / "maml" / f"seed{seed}",
            "maml",
            None,
            [10.0] * (jump - 1) + [100.0] * (6 - jump + 1) if jump < 6 else [10.0] * 6,
        )
        write_run(root / "directed-maml" / "delta0.1" / f"seed{seed}", "directed-maml", 0.1, [10.0] + [100.0] * 5, 1.0)
    return root


def cells(root, label):
    """All cells of a line of report.md, from its three tables."""
    found, header = {}, []
    for line in (root / "report.md").read_text().splitlines():
        row = [cell.strip() for cell in line.split("|")[1:-1]]
        if row and row[0] == "algorithm":
            header = row
        elif row and row[0] == label:
            found |= dict(zip(header, row, strict=True))
    return found


def test_the_table_by_hand(experiment):
    report.write(experiment)
    maml, directed = cells(experiment, "maml"), cells(experiment, "directed-maml")
    assert maml["runs"] == "3" and maml["epochs trained"] == "6" and maml["converged"] == "2/3"
    assert maml["s per epoch"] == "0.5 ± 0" and maml["s per 1000 epochs"] == "500 ± 0"
    assert maml["epochs to convergence"] == "4 [0, never]"  # of three runs one is infinite
    assert directed["converged"] == "3/3"
    assert directed["epochs to convergence"] == "2 [2, 2]"
    assert directed["env steps to convergence"] == "200 [200, 200]"
    assert directed["s to convergence"] == "2 [2, 2]"
    assert directed["final return"] == "100 [100, 100]"
    assert directed["held-out before"] == "10 [10, 10]" and directed["held-out after"] == "11 [11, 11]"
    assert directed["speed-up by δ: epochs; steps; s"] == "2× [0, ∞]; 2× [0, ∞]; 1× [0, ∞]"  # 4/2, 4/2 and never/2
    assert directed["P(fewer epochs by δ)"].startswith("1.00 [")


def test_the_report_says_which_intervals_they_are_and_how_many_arms_are_compared(experiment, tmp_path):
    report.write(experiment)
    text = (experiment / "report.md").read_text()
    assert (
        "95% intervals for the median" in text
        and "Arms compared: 2; epochs trained: 6 each; env steps trained: 600 each." in text
    )


def test_the_report_says_where_its_arms_had_unequal_budgets(experiment):
    write_run(experiment / "fomaml" / "seed1", "fomaml", None, [10.0] * 3)
    report.write(experiment)
    text = (experiment / "report.md").read_text()
    said = "Arms compared: 3; epochs trained: 3 to 6, not equal; env steps trained: 300 to 600, not equal."
    assert text.count(said) == 3  # with every table
    assert "over the first 300 env" in text


# --- convergence, by two criteria ---


def test_both_criteria_and_the_area_are_in_the_summary_and_the_tables(tmp_path):
    """maml is over 15 from epoch 21 on, directed-maml from epoch 11 on; both for good.

    A mean of 20 epochs, n of them at 100 and the others at 10, is over 15 from n = 2 on, which is from 18 epochs before
    the jump on: 3, and before the first. The means over 40 epochs are
    (20 · 10 + 20 · 100) / 40 and (10 · 10 + 30 · 100) / 40."""
    for seed in (1, 2):
        write_run(tmp_path / "a" / f"seed{seed}", "maml", None, [10.0] * 20 + [100.0] * 20)
        write_run(tmp_path / "b" / f"seed{seed}", "directed-maml", 0.1, [10.0] * 10 + [100.0] * 30)
    report.write(tmp_path)
    maml, directed = cells(tmp_path, "maml"), cells(tmp_path, "directed-maml")
    assert maml["epochs to convergence"] == "21 [21, 21]" and directed["epochs to convergence"] == "11 [11, 11]"
    assert maml["sustained"] == "2/2" and maml["epochs to sustained"] == "3 [3, 3]"
    assert maml["env steps to sustained"] == "300 [300, 300]" and directed["env steps to sustained"] == "100 [100, 100]"
    assert maml["area"] == "55 [55, 55]" and directed["area"] == "77.5 [77.5, 77.5]"
    assert directed["speed-up by δ: epochs; steps; s, sustained"] == "3× [3, 3]; 3× [3, 3]; 3× [3, 3]"
    assert directed["P(fewer epochs by δ, sustained)"].startswith("1.00 [")


def test_a_summary_without_the_new_columns_shows_dashes(experiment):
    report.write(experiment)
    numbers = report.read_summary((experiment / "summary.csv").read_text())
    old = {
        label: {
            key: x for key, x in runs.items() if "sustained" not in key and "area" not in key and key != "env_steps"
        }
        for label, runs in numbers.items()
    }
    line = report.cells("directed-maml", "directed-maml", old)
    for column in ("sustained", "epochs to sustained", "area", "P(fewer epochs by δ, sustained)"):
        assert line[column] == "–"
    assert line["epochs to convergence"] == "2 [2, 2]"
    assert "env steps trained: not recorded" in report.text(old, "toy, pg", "15")


def test_the_medians_of_what_the_delta_step_does_are_shown_where_they_were_logged(tmp_path):
    for algo, rows in (("maml", ["", "", ""]), ("directed-maml", ["2,4,0.5", "3,5,-0.5", "10,6,0.1"])):
        write_run(tmp_path / algo / "seed1", algo, 0.1 if rows[0] else None, [1.0] * 3)
        path = tmp_path / algo / "seed1" / "log.csv"
        lines = path.read_text().splitlines()
        columns = ["delta_norm,beta_norm,delta_beta_cosine", *(row or ",7," for row in rows)]
        path.write_text("\n".join(f"{line},{more}" for line, more in zip(lines, columns, strict=True)) + "\n")
    report.write(tmp_path)
    names = ["norm of the δ-step", "norm of the β-step", "their cosine"]
    assert [cells(tmp_path, "directed-maml")[name] for name in names] == ["3", "5", "0.1"]
    assert [cells(tmp_path, "maml")[name] for name in names] == ["–", "7", "–"]


def test_without_norms_in_the_log_the_tables_have_no_columns_for_them(experiment):
    report.write(experiment)
    assert "norm of the δ-step" not in cells(experiment, "directed-maml")


def test_one_run_has_no_interval(tmp_path):
    write_run(tmp_path / "seed1", "maml", None, [10.0] * 3 + [100.0])
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "[" not in text and "95%" not in text and "one run for each line" in text
    assert cells(tmp_path, "maml")["epochs to convergence"] == "4"
    titles = [report.over_seeds({"maml": [None] * runs, "fomaml": [None]}) for runs in (1, 2, 3)]
    assert titles == ["", "; median over seeds", "; median over seeds, pointwise 95% interval"]
    assert (tmp_path / "curves.csv").read_text().splitlines()[1] == '"maml",epoch,1,10,nan,nan'


def test_a_run_that_is_there_twice_counts_once(experiment):
    shutil.copytree(experiment / "maml" / "seed1", experiment / "other" / "seed1")
    lines, left_out = report.write(experiment)
    assert cells(experiment, "maml")["runs"] == "3"
    assert len(left_out) == 1 and "the same settings and seed as" in left_out[0]


# --- lines: runs that differ in nothing but their seeds ---


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_runs_that_differ_in_a_setting_are_lines_of_their_own_and_named_by_it(tmp_path):
    for alpha in (0.001, 0.01, 0.1):
        write_run(tmp_path / f"alpha{alpha}" / "seed1", "maml", None, [1.0] * 3)
        change(tmp_path / f"alpha{alpha}" / "seed1", alpha=alpha, hidden=[64, 64])
    write_run(tmp_path / "seed2", "maml", None, [1.0] * 3)
    change(tmp_path / "seed2", alpha=0.1, hidden=[8])
    labels, _ = report.read(tmp_path)
    assert list(labels) == [
        "maml, α = 0.001, hidden = 64 64", "maml, α = 0.01, hidden = 64 64", "maml, α = 0.1, hidden = 64 64",
        "maml, α = 0.1, hidden = 8",
    ]  # fmt: skip
    report.write(tmp_path)
    assert cells(tmp_path, "maml, α = 0.01, hidden = 64 64")["runs"] == "1"


def test_algorithms_that_differ_in_a_setting_are_named_by_it_but_for_reptiles_own(tmp_path):
    write_run(tmp_path / "a" / "seed1", "maml", None, [1.0] * 3)
    write_run(tmp_path / "b" / "seed1", "reptile", None, [1.0] * 3)
    change(tmp_path / "b" / "seed1", beta=1, inner_steps=5)
    assert list(report.read(tmp_path)[0]) == ["maml", "reptile"]
    change(tmp_path / "b" / "seed1", beta=1, inner_steps=5, tasks=20)
    change(tmp_path / "a" / "seed1", tasks=5)
    assert list(report.read(tmp_path)[0]) == ["maml, tasks = 5", "reptile, tasks = 20"]


def test_imaml_and_maml_plus_plus_have_their_own_number_of_inner_steps_and_lambda_follows_from_alpha(tmp_path):
    owns = {"a": ("maml", 1, {}), "b": ("maml++", 2, {}), "c": ("imaml", 3, {"lambda_": 1000})}
    owns["d"] = ("imaml", 3, {"lambda_": 100, "alpha": 0.01})
    for name, (algo, inner_steps, own) in owns.items():
        write_run(tmp_path / name / "seed1", algo, None, [1.0] * 3)
        change(tmp_path / name / "seed1", **{"inner_steps": inner_steps, "alpha": 0.001} | own)
    labels = ["maml, α = 0.001", "maml++, α = 0.001", "imaml, α = 0.001", "imaml, α = 0.01"]
    assert list(report.read(tmp_path)[0]) == labels
    change(tmp_path / "d" / "seed1", inner_steps=3, alpha=0.001, lambda_=5)
    assert "imaml, λ = 5" in report.read(tmp_path)[0]


def test_what_follows_from_other_settings_or_does_not_matter_names_no_line(tmp_path):
    for alpha, epochs in ((0.001, 10), (0.01, 20)):
        write_run(tmp_path / f"{alpha}" / "seed1", "meta-sgd", None, [1.0] * 3)
        change(tmp_path / f"{alpha}" / "seed1", alpha=alpha, beta_alpha=alpha * 0.001, epochs=epochs, device="cpu")
    assert list(report.read(tmp_path)[0]) == ["meta-sgd, α = 0.001", "meta-sgd, α = 0.01"]
    change(tmp_path / "0.01" / "seed1", alpha=0.001, beta_alpha=0.001)
    assert "meta-sgd, beta_alpha = 0.001" in report.read(tmp_path)[0]


def test_numbers_written_as_1_and_1_0_are_the_same_setting(tmp_path):
    for seed, beta in ((1, 1), (2, 1.0)):
        write_run(tmp_path / f"seed{seed}", "maml", None, [1.0] * 3)
        change(tmp_path / f"seed{seed}", beta=beta)
    assert len(report.read(tmp_path)[0]["maml"]) == 2


SPEED_UP = "speed-up by δ: epochs; steps; s"


def test_a_speed_up_is_shown_only_where_the_delta_step_is_all_that_differs(experiment):
    report.write(experiment)
    assert cells(experiment, "directed-maml")[SPEED_UP].startswith("2×")
    directed = list(experiment.glob("directed-maml/*/*"))
    for folder in directed:
        change(folder, medium="random", delta_schedule="decay")
    report.write(experiment)
    assert cells(experiment, "directed-maml")[SPEED_UP].startswith("2×")
    for folder in directed:
        change(folder, trajectories=20)
    for folder in experiment.glob("maml/*"):
        change(folder, trajectories=10)
    report.write(experiment)
    line = cells(experiment, "directed-maml, trajectories = 20")
    assert line[SPEED_UP] == line["P(fewer epochs by δ)"] == "–"


def test_each_directed_line_is_compared_with_its_own_counterpart(tmp_path):
    """maml gets there in 4 epochs with α = 1 and in 3 with α = 2; directed-maml in 2 with either."""
    for alpha, epochs in ((1, 4), (2, 3)):
        write_run(tmp_path / f"a{alpha}" / "seed1", "maml", None, [10.0] * (epochs - 1) + [100.0])
        write_run(tmp_path / f"b{alpha}" / "seed1", "directed-maml", 0.1, [10.0, 100.0])
        for name in "ab":
            change(tmp_path / f"{name}{alpha}" / "seed1", alpha=alpha)
    report.write(tmp_path)
    assert cells(tmp_path, "directed-maml, α = 1")[SPEED_UP] == "2×; 2×; 2×"
    assert cells(tmp_path, "directed-maml, α = 2")[SPEED_UP] == "1.5×; 1.5×; 1.5×"


def test_old_summaries_compare_the_lines_of_one_command_unless_their_beta_differs(experiment):
    report.write(experiment)
    numbers = report.read_summary((experiment / "summary.csv").read_text())
    for runs in numbers.values():
        del runs["counterpart"]
    assert report.by_delta("directed-maml", numbers)[0].startswith("2×")
    assert report.by_delta("maml", numbers) == ("–", "–")
    numbers["maml"]["beta"] = [0.002] * 3
    assert report.by_delta("directed-maml", numbers) == ("–", "–")


def test_failed_runs_are_counted_and_not_dropped(experiment):
    write_run(experiment / "maml" / "seed4", "maml", None, [10.0, 100.0, 100.0], failed=True)
    report.write(experiment)
    maml = cells(experiment, "maml")
    assert maml["runs"] == "4 (1 failed)" and maml["converged"] == "2/4" and maml["epochs trained"] == "3-6"


def test_several_deltas_are_lines_of_their_own(experiment):
    write_run(experiment / "directed-maml" / "delta0" / "seed1", "directed-maml", 0.0, [10.0] * 6)
    report.write(experiment)
    assert cells(experiment, "directed-maml, δ = 0")["converged"] == "0/1"
    assert cells(experiment, "directed-maml, δ = 0.1")["converged"] == "3/3"


def test_held_out_tasks_inside_and_outside_phi_by_the_number_of_steps(tmp_path):
    write_run(tmp_path / "seed1", "maml", None, [1.0])
    rows = [f"1,{phi},{step},{phi * (step + 1)}" for phi in (0, 5, 15, 30) for step in range(3)]
    (tmp_path / "seed1" / "eval.csv").write_text("\n".join(["epoch,phi,step,return", *rows]) + "\n")
    report.write(tmp_path)
    numbers = report.read_summary((tmp_path / "summary.csv").read_text())["maml"]
    assert [numbers[f"held_out_inside_{step}"] for step in range(3)] == [[10], [20], [30]]
    assert [numbers[f"held_out_outside_{step}"] for step in range(3)] == [[15], [30], [45]]
    line = report.cells("maml", "maml", {"maml": numbers})
    assert line["held-out before"] == line["inside Φ, 0 steps"] == "10"
    assert line["held-out after"] == line["inside Φ, 1 step"] == "20"
    assert "outside Φ, 2 steps" in report.tables({"maml": numbers})[2]


def test_tables_without_a_held_out_task_outside_phi_have_no_columns_for_them(experiment):
    report.write(experiment)
    assert "outside" not in (experiment / "report.md").read_text()


def test_runs_evaluated_after_different_numbers_of_steps_share_a_summary(experiment):
    write_run(experiment / "fomaml" / "seed1", "fomaml", None, [10.0] * 3)
    config = json.loads((experiment / "fomaml" / "seed1" / "config.json").read_text())
    (experiment / "fomaml" / "seed1" / "config.json").write_text(json.dumps(config | {"eval_steps": 1}))
    report.write(experiment)
    assert "| fomaml, eval_steps = 1 | 10 | 11 | – |" in (experiment / "report.md").read_text()


def test_without_an_undirected_twin_delta_0_is_the_twin(tmp_path):
    write_run(tmp_path / "delta0" / "seed1", "directed-maml", 0.0, [10.0, 10.0, 10.0, 100.0])
    write_run(tmp_path / "delta0.1" / "seed1", "directed-maml", 0.1, [10.0, 100.0])
    report.write(tmp_path)
    assert cells(tmp_path, "directed-maml, δ = 0")["P(fewer epochs by δ)"] == "–"
    assert cells(tmp_path, "directed-maml, δ = 0.1")["speed-up by δ: epochs; steps; s"] == "2×; 2×; 2×"


def test_the_probability_of_improvement_by_hand():
    """Of four pairs (1 or 3 against 2 or 3): 1 < 2, 1 < 3, 3 > 2, and a tie, which counts half: 2.5 / 4.

    If all pairs of 5 and 5 runs agree, the low end P has 25 (1 - P) = 1.96² P [1 + 4 ((1 - P)/(2 - P) + P/(1 + P))]:
    at 0.6427 that is 8.932 = 3.8416 · 0.6427 · [1 + 4 (0.2633 + 0.3912)] = 8.933."""
    p, low, high = measures.probability_interval([1, 3], [2, 3])
    assert p == 0.625 and low < 0.5 < high
    np.testing.assert_allclose(measures.probability_interval([1] * 5, [math.inf] * 5), (1, 0.6427, 1), atol=1e-4)
    np.testing.assert_allclose(measures.probability_interval([2] * 5, [1] * 5), (0, 0, 1 - 0.6427), atol=1e-4)
    assert measures.probability_interval([math.inf] * 3, [math.inf, math.inf, math.nan])[0] == 0.5
    assert report.improvement([1] * 5, [2] * 5) == "1.00 [0.64, 1.00]"
    assert report.improvement([1], [2, 3]) == report.improvement([1, 2], [3]) == "–"
    assert np.isnan(measures.probability_interval([], [1])).all()


def test_the_tables_are_made_of_summary_csv_alone(experiment):
    report.write(experiment)
    numbers = report.read_summary((experiment / "summary.csv").read_text())
    for table in report.tables(numbers):
        assert table in (experiment / "report.md").read_text()


def test_the_command_writes_reports_and_says_in_one_line_what_is_not_a_folder(experiment, capsys):
    run.main(["--report", str(experiment), str(experiment / "maml")])
    assert cells(experiment, "maml") == cells(experiment / "maml", "maml")
    assert capsys.readouterr().out.splitlines()[0] == f"wrote {experiment / 'report.md'}"
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


@pytest.mark.parametrize("phi", [("gravity (m/s²)",), ("goal x (m)", "goal y (m)")])
def test_figures_are_drawn(tmp_path, phi, figures):
    write_run(tmp_path / "a" / "seed1", "maml", None, [1.0, 2.0], phi=phi)
    for seed in (1, 2, 3):
        write_run(tmp_path / "b" / f"seed{seed}", "directed-maml", 0.1, [1.0, 2.0] * 15, phi=phi)
    lines, left_out = report.write(tmp_path)
    assert len(lines) == 4 and left_out == []
    for name in ("curves.png", "thresholds.png", "adaptation.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_the_passages_of_a_figure_by_hand():
    """Runs that reach 10, 20 and 30 in their first epochs of 100, 200 and 300 env steps: over 5 at the median of those,
    over 15 at 200, 300 and never, over 25 at 300, never and never, which ends the line."""
    runs = [logged([reached] * 20, steps + np.arange(20)) for reached, steps in ((10, 100), (20, 200), (30, 300))]
    x, middle, low, high = report.passages(runs, "convergence", np.array([5, 15, 25]))
    np.testing.assert_array_equal(x, [5, 15, 25])
    np.testing.assert_array_equal(middle, [200, 300, math.nan])
    assert low[0] < 100 and 300 < high[0] <= 319 and high[1] == 319  # the band ends with the training


def test_ticks_are_short():
    assert [report.short(x) for x in (-200_000.0, 0.0, 350_000.0, 1.2e6)] == ["-200k", "0", "350k", "1.2M"]


def test_lines_have_looks_of_their_own_however_many_values_an_algorithm_has():
    runs = [{"config": {"algo": algo}} for algo in ("maml", "maml", "directed-maml", "fomaml", "fomaml")]
    looks = report.style({str(i): [run] for i, run in enumerate(runs)}, lambda x: x)
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == 5


def test_held_out_returns_of_a_plane_are_averaged_over_equal_distance(tmp_path):
    write_run(tmp_path / "seed1", "maml", None, [1.0], phi=("goal x (m)", "goal y (m)"))
    x, returns = report.held_out(report.read(tmp_path)[0]["maml"])
    np.testing.assert_allclose(x, [0, 1])
    np.testing.assert_allclose(returns, [[[10, 10], [11, 11], [12, 12]]])


def test_without_matplotlib_one_line_says_how_to_get_the_figures(experiment, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    lines, _ = report.write(experiment)
    assert len(lines) == 2 and "pip install matplotlib" in lines[1]
    assert (experiment / "report.md").exists() and not (experiment / "curves.png").exists()


# --- damaged runs ---


def changed(**changes):
    def damage(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def holding(data):
    return lambda path: path.write_bytes(data)


def garbled(path):
    path.write_bytes(path.read_bytes() + b"\xff\xfe,1\n")


def folder_instead(path):
    path.unlink()
    path.mkdir()


def test_a_run_of_an_earlier_version_is_left_out_in_one_line_that_says_so(tmp_path):
    """Its config.json has low, high and phi."""
    write_run(tmp_path / "maml/seed1", "maml", None, [1.0])
    path = tmp_path / "zfoma/seed1/config.json"
    write_run(path.parent, "fomaml", None, [1.0])
    config = json.loads(path.read_text())
    config |= {"low": config["range"][::2], "high": config["range"][1::2], "phi": config["phi_names"]}
    path.write_text(json.dumps({key: x for key, x in config.items() if key not in ("range", "phi_names")}))
    [line] = report.write(tmp_path)[1]
    assert line.startswith(f"{path}: written by an earlier version of this code;") and "\n" not in line


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.json", holding(b'{"env": "to')),
        ("config.json", garbled),
        ("config.json", holding(b"[]")),
        ("config.json", changed(algo="../../x")),
        ("config.json", changed(delta="large")),
        ("config.json", changed(threshold=[1])),
        ("config.json", changed(phi_names=["another"])),
        ("config.json", changed(range=[5.0])),
        ("config.json", changed(range=[5.0, "15"])),
        ("log.csv", garbled),
        ("log.csv", holding(b"epoch,seconds\n1,2\n")),
        ("log.csv", holding(b"epoch,env_steps,seconds,return_post\n1,2,x,4\n")),
        ("log.csv", folder_instead),
        ("eval.csv", garbled),
        ("eval.csv", holding(b"epoch\n1\n")),
        ("eval.csv", holding(b"epoch,phi,step,return\n1,5 5,0,9\n")),
    ],
)
def test_a_damaged_run_is_left_out_of_the_report_in_one_line(tmp_path, name, damage):
    write_run(tmp_path / "maml" / "seed1", "maml", None, [1.0])
    damaged = tmp_path / "zfoma" / "seed1"  # after the good run, which says what φ is
    write_run(damaged, "fomaml", None, [1.0])
    damage(damaged / name)
    _, [line] = report.write(tmp_path)
    assert str(damaged / name) in line and "left out of the report" in line and "\n" not in line
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| maml | 1 |" in text and "| fomaml" not in text and f"{damaged / name}: " in text


def test_half_a_row_at_the_end_of_a_log_is_no_damage(tmp_path):
    """Another command may be writing it just now."""
    write_run(tmp_path / "seed1", "maml", None, [1.0, 2.0])
    for name in ("log.csv", "eval.csv"):
        with open(tmp_path / "seed1" / name, "a") as file:
            file.write("3,9")
    assert report.write(tmp_path)[1] == []
    assert "| maml | 1 | 2 |" in (tmp_path / "report.md").read_text(encoding="utf-8")
