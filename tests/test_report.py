"""Statistics by hand, and the report and figures of run folders written by hand."""

import builtins
import json
import math

import numpy as np
import pytest

import report


def test_iqm_is_the_mean_without_the_outer_quarters():
    assert report.iqm([100, 1, 2, 3, -50]) == 2  # five runs: one dropped on each side
    assert report.iqm([1, 2]) == 1.5 and report.iqm([7]) == 7
    assert report.iqm([1, 2, 3, math.inf, math.inf]) == math.inf  # two of five never got there
    assert report.iqm([1, 2, 3, 4, math.inf]) == 3
    np.testing.assert_array_equal(report.iqm(np.array([[0, 9], [1, 5], [2, 4], [3, 0]])), [1.5, 4.5])


def test_interval_covers_the_mean_of_normal_samples_about_95_times_in_100():
    rng = np.random.default_rng(1)
    hits = [low <= 0 <= high for low, high in (report.interval(rng.normal(size=20)) for _ in range(200))]
    assert 0.85 <= np.mean(hits) <= 0.99


def test_interval_of_equal_values_is_a_point_and_infinite_values_pass_through():
    assert report.interval([3, 3, 3]) == (3, 3)
    assert report.interval([math.inf] * 4) == (math.inf, math.inf)


def test_ema_by_hand():
    np.testing.assert_allclose(report.ema([10, 20, 0], 0.9), [10, 11, 9.9])


def test_numbers_of_env_steps_are_short():
    assert [report.thousands(x) for x in (3, 999.4, 999.6, 1234, 999_600, 3_984_000)] == [
        "3", "999", "1k", "1.23k", "1M", "3.98M",
    ]  # fmt: skip


def write_run(folder, algo, delta, returns, seconds=0.5, threshold=15.0, phi=("gravity (m/s²)",), failed=False):
    folder.mkdir(parents=True)
    config = {"env": "toy", "rl": "pg", "algo": algo, "delta": delta, "seed": 1, "inner_steps": 1, "eval_steps": 2}
    config |= {"beta": 0.001, "range": [-1.0 if len(phi) > 1 else 5.0, 15.0] * len(phi)}
    (folder / "config.json").write_text(json.dumps(config | {"threshold": threshold, "phi_names": phi}))
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
    lines = (root / "report.md").read_text().splitlines()
    header = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    row = next(line for line in lines if line.startswith(f"| {label} |"))
    return dict(zip(header, (cell.strip() for cell in row.split("|")[1:-1]), strict=True))


def test_the_table_by_hand(experiment):
    report.write(experiment)
    maml, directed = cells(experiment, "maml"), cells(experiment, "directed-maml")
    assert maml["runs"] == "3" and maml["epochs trained"] == "6" and maml["converged"] == "2/3"
    assert maml["s per epoch"] == "0.5 ± 0" and maml["s per 1000 epochs"] == "500 ± 0"
    assert maml["epochs to convergence"].startswith("never")  # three runs: nothing is trimmed, and one is infinite
    assert directed["converged"] == "3/3"
    assert directed["epochs to convergence"] == "2 [2, 2]"
    assert directed["env steps to convergence"] == "200 [200, 200]"
    assert directed["s to convergence"] == "2 [2, 2]"
    assert directed["final return"] == "100 [100, 100]"
    assert directed["held-out before"] == "10 [10, 10]" and directed["held-out after"] == "11 [11, 11]"
    assert directed["speed-up by δ: epochs, steps, s"] == "–, –, –"  # no figure against a twin that is never there


def test_the_speed_up_is_the_twins_figure_over_ones_own(experiment, tmp_path):
    write_run(
        experiment / "maml" / "seed4", "maml", None, [10.0] * 3 + [100.0] * 3
    )  # four runs: the infinite one is cut
    report.write(experiment)
    assert cells(experiment, "directed-maml")["speed-up by δ: epochs, steps, s"] == "2.00×, 2.00×, 1.00×"


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
    assert line["held-out before"] == line["inside Φ, 0 steps"] == "10 [10, 10]"
    assert line["held-out after"] == line["inside Φ, 1 step"] == "20 [20, 20]"
    assert "outside Φ, 2 steps" in report.tables({"maml": numbers})[1]


def test_tables_without_a_held_out_task_outside_phi_have_no_columns_for_them(experiment):
    report.write(experiment)
    assert "outside" not in (experiment / "report.md").read_text()


def test_runs_evaluated_after_different_numbers_of_steps_share_a_summary(experiment):
    write_run(experiment / "fomaml" / "seed1", "fomaml", None, [10.0] * 3)
    config = json.loads((experiment / "fomaml" / "seed1" / "config.json").read_text())
    (experiment / "fomaml" / "seed1" / "config.json").write_text(json.dumps(config | {"eval_steps": 1}))
    report.write(experiment)
    assert "| fomaml | 10 [10, 10] | 11 [11, 11] | – |" in (experiment / "report.md").read_text()


def test_without_an_undirected_twin_delta_0_is_the_twin(tmp_path):
    write_run(tmp_path / "delta0" / "seed1", "directed-maml", 0.0, [10.0, 10.0, 10.0, 100.0])
    write_run(tmp_path / "delta0.1" / "seed1", "directed-maml", 0.1, [10.0, 100.0])
    report.write(tmp_path)
    assert cells(tmp_path, "directed-maml, δ = 0")["P(fewer epochs by δ)"] == "–"
    assert cells(tmp_path, "directed-maml, δ = 0.1")["speed-up by δ: epochs, steps, s"].startswith("2.00×")


def test_the_probability_of_improvement_by_hand():
    """Of four pairs (1 or 3 against 2 or 3): 1 < 2, 1 < 3, 3 > 2, and a tie, which counts half: 2.5 / 4."""
    assert report.improvement([1, 3], [2, 3]).startswith("0.62 [")
    assert report.improvement([1, 2], [math.inf, 3]) == "1.00 [1.00, 1.00]"


def test_the_tables_are_made_of_summary_csv_alone(experiment):
    report.write(experiment)
    numbers = report.read_summary((experiment / "summary.csv").read_text())
    for table in report.tables(numbers):
        assert table in (experiment / "report.md").read_text()


def test_the_command_writes_reports_and_says_in_one_line_what_is_not_a_folder(experiment, capsys):
    report.main([str(experiment)])
    assert "report.md" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        report.main([str(experiment / "x")])
    assert str(stop.value) == f"report.py: {experiment / 'x'}: ValueError: not a folder"


@pytest.mark.parametrize("phi", [("gravity (m/s²)",), ("goal x (m)", "goal y (m)")])
def test_figures_are_drawn(tmp_path, phi, figures):
    write_run(tmp_path / "a" / "seed1", "maml", None, [1.0, 2.0], phi=phi)
    write_run(tmp_path / "b" / "seed1", "directed-maml", 0.1, [1.0, 2.0], phi=phi)
    lines, left_out = report.write(tmp_path)
    assert len(lines) == 3 and left_out == []
    for name in ("curves.png", "adaptation.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


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
