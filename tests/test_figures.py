"""The numbers that figures show, their looks, and that they are drawn."""

import builtins
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from harness import figures, report, runs
from maml import LEARNERS
from tests.conftest import DRAW
from tests.test_measures import logged
from tests.test_runs import GOAL, GRAVITY, change, write_evaluation, write_run


@pytest.mark.parametrize("phi", [GRAVITY, GOAL])
def test_figures_are_drawn(tmp_path, phi, drawn):
    write_run(tmp_path / "a" / "seed1", "maml", [1.0, 2.0], phi)
    for seed in (1, 2, 3):
        write_run(tmp_path / "b" / f"seed{seed}", "directed-maml", [1.0, 2.0] * 15, phi)
    write_run(tmp_path / "c" / "seed1", "fomaml", [1.0], phi)
    write_evaluation(tmp_path / "c" / "seed1", [])
    labels, _ = runs.read(tmp_path)
    names = ("curves.png", "thresholds.png", "adaptation.png")
    assert figures.draw(labels, tmp_path) == [f"wrote {tmp_path / name}" for name in names]
    for name in names:
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.filterwarnings("error")
def test_numbers_that_are_not_finite_and_names_that_no_font_has_are_drawn_without_a_word(tmp_path, drawn):
    write_run(tmp_path / "a" / "seed1", "maml", [float("nan")], env="漢字")
    write_run(tmp_path / "b" / "seed1", "maml", [float("inf"), 1.0], env="$x_$")
    for seed, x in ((1, "nan"), (2, "inf"), (3, "1")):
        write_run(tmp_path / "c" / f"seed{seed}", "fomaml", [1.0], values=[5, 10])
        write_evaluation(tmp_path / "c" / f"seed{seed}", [f"1,{5 * i},{k},{x}" for i in (1, 2) for k in range(3)])
    wrote, left_out = report.write(tmp_path)
    assert len(wrote) == 4 and left_out == []


def test_of_very_many_lines_the_first_are_drawn(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(figures, "MOST", 2)
    for i in range(1, 4):
        write_run(tmp_path / f"{i}" / "seed1", "maml", [1.0], alpha=i)
    *_, said = figures.draw(runs.read(tmp_path)[0], tmp_path)
    assert said == "the figures show the first 2 of 3 lines"


def test_without_matplotlib_one_line_says_how_to_get_the_figures(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    [line] = DRAW({}, tmp_path)
    assert "pip install matplotlib" in line and list(tmp_path.iterdir()) == []


def test_a_curve_begins_with_the_last_run_and_ends_with_the_first_that_did_not_fail():
    ended = [logged([2, 2, 2], [100, 200, 300]), logged([4, 4], [200, 250])]
    failed = [logged([0, 0], [90, 150], failed=True), logged([0, 0], [90, 280], failed=True)]
    x, middle, *_ = figures.curve([*ended, failed[0]], "env_steps", 3)
    np.testing.assert_array_equal([x, middle], [[200, 225, 250], [2, 2, 2]])
    np.testing.assert_array_equal(figures.curve(failed, "env_steps", 2)[0], [90, 280])


def test_a_curve_goes_on_to_a_window_with_the_last_return_of_runs_that_ended_before():
    runs = [logged([2, 2, 2], [100, 200, 300]), logged([4, 4], [200, 250])]
    x, middle, *_ = figures.curve(runs, "env_steps", 3, end=400)
    np.testing.assert_array_equal([x, middle], [[200, 300, 400], [3, 3, 3]])
    for run in runs:
        run.log["seconds"] = run.log["epoch"]
    lines = [line.split(",") for line in figures.curves({"a": runs}, window=400).splitlines()[1:]]
    ends = {key: max(float(x) for _, against, x, *_ in lines if against == key) for _, key, *_ in lines}
    assert ends == {"epoch": 2, "env_steps": 400, "seconds": 2}


def test_the_passages_of_a_figure_by_hand():
    """Runs that reach 10, 20 and 30 in their first epochs of 100, 200 and 300 env steps: over 5 at the median
    of those, over 15 at 200, 300 and never, over 25 at 300, never and never, which ends the line."""
    reached = [logged([x] * 20, steps + np.arange(20)) for x, steps in ((10, 100), (20, 200), (30, 300))]
    x, middle, low, high = figures.passages(reached, "convergence", np.array([5, 15, 25]))
    np.testing.assert_array_equal(x, [5, 15, 25])
    np.testing.assert_array_equal(middle, [200, 300, np.nan])
    assert low[0] < 100 and 300 < high[0] <= 319 and high[1] == 319  # the band ends with the training


def test_held_out_returns_by_a_component_are_means_over_the_others_and_of_a_list_as_they_are():
    phi = np.array([[2, 100], [1, 100], [2, 300]])
    evaluation = {"phi": phi, "returns": np.array([[4, 5, 6], [7, 8, 9]])}
    expected = {0: ([1, 2], [[5, 5], [8, 8]]), 1: ([100, 300], [[4.5, 6], [7.5, 9]])}
    expected[None] = [0, 1, 2], evaluation["returns"]
    for component, (values, means) in expected.items():
        x, returns = figures.held_out([SimpleNamespace(evaluation=evaluation)], component)
        np.testing.assert_array_equal(x, values)
        np.testing.assert_array_equal(returns, [means])


def adaptation(root):
    """The panels of adaptation.png of the runs under root that are seen."""
    plt = pytest.importorskip("matplotlib.pyplot")
    figure = figures.draw_adaptation(plt, runs.read(root)[0])
    plt.close(figure)
    return [panel for panel in figure.axes if panel.get_visible()]


def test_every_component_of_phi_has_a_panel(tmp_path):
    for algo in ("maml", "fomaml", "reptile"):
        write_run(tmp_path / algo / "seed1", algo, [1.0], GOAL)
    panels = adaptation(tmp_path)
    assert [panel.get_xlabel() for panel in panels] == [*GOAL] * 3
    assert [panel.get_title().split("\n")[0] for panel in panels[::2]] == ["maml", "fomaml", "reptile"]
    assert {tuple(line.get_xdata()) for panel in panels for line in panel.lines} == {(-1, 0, 1)}


@pytest.mark.parametrize(
    ("settings", "listed"),
    [
        ({}, False),
        ({"eval_range": [5, 15]}, False),
        ({"values": [5, 10, 15]}, True),
        ({"eval_values": [5, 10, 15]}, True),
        ({"values": [5, 15], "eval_range": [5, 15]}, False),
    ],
)
def test_no_line_joins_the_tasks_of_a_list(tmp_path, settings, listed):
    for seed in (1, 2, 3):
        write_run(tmp_path / f"seed{seed}", "maml", [1.0], **settings)
    [panel] = adaptation(tmp_path)
    assert all((line.get_linestyle() == "None") == listed for line in panel.lines) and len(panel.lines) == 3
    places = np.mean([line.get_xdata() for line in panel.lines], axis=0)
    np.testing.assert_allclose(places, [0, 1, 2] if listed else [5, 10, 15], atol=1e-9)
    if listed:
        assert [tick.get_text() for tick in panel.get_xticklabels()] == ["5", "10", "15"]
        assert len({tuple(line.get_xdata()) for line in panel.lines}) == 3  # side by side


def test_of_very_many_listed_tasks_some_are_named(tmp_path):
    write_run(tmp_path / "seed1", "maml", [1.0], GOAL, values=[0, 0])
    rows = [f"1,{task} 0.5,{step},1" for task in range(41) for step in range(3)]
    write_evaluation(tmp_path / "seed1", rows)
    [panel] = adaptation(tmp_path)
    assert [tick.get_text() for tick in panel.get_xticklabels()] == [f"{task} 0.5" for task in range(0, 41, 3)]
    assert panel.get_xlabel() == "goal x (m), goal y (m)"


def test_of_very_many_components_the_first_have_a_panel(tmp_path):
    names = [f"p{i}" for i in range(figures.MOST_COMPONENTS + 1)]
    write_run(tmp_path / "seed1", "maml", [1.0])
    change(tmp_path / "seed1", phi_names=names, range=[0, 1] * len(names))
    phi = " ".join("0" for _ in names)
    write_evaluation(tmp_path / "seed1", [f"1,{phi},{step},1" for step in range(3)])
    panels = adaptation(tmp_path)
    assert [panel.get_xlabel() for panel in panels] == names[:-1]
    assert "by 6 of 7 components of φ" in " ".join(panels[0].figure.get_suptitle().split())


def test_ticks_are_short():
    ticks = [figures.short(x) for x in (-1.2e6, -200_000.0, 0.0, 999.6)]
    assert ticks == ["-1.2M", "-200k", "0", "1k"]


def test_a_title_says_what_its_lines_and_bands_are():
    titles = [figures.over_seeds({"maml": [None] * count, "fomaml": [None]}) for count in (1, 2, 3)]
    assert titles == ["", "; median over seeds", "; median over seeds, pointwise 95% interval"]


# --- looks ---


def looks_of(*algos):
    """(colour, marker) of lines of these algorithms, in their order."""
    labels = {str(i): [runs.LoggedRun({"env": "toy", "algo": algo, "beta": 1}, {}, None, False)]
              for i, algo in enumerate(algos)}  # fmt: skip
    found = figures.style(labels, lambda x: x).values()
    return [(look["color"], look["marker"]) for look in found]


def test_a_learner_keeps_its_colour_whatever_stands_beside_it():
    alone = [looks_of(algo)[0] for algo in LEARNERS]
    assert alone == looks_of(*LEARNERS) == looks_of("a-maml", *LEARNERS)[1:]
    assert looks_of("directed-fomaml") == looks_of("fomaml")


def test_algorithms_that_are_not_in_the_table_have_the_next_colours():
    looks = looks_of(*LEARNERS, "a-maml", "b-maml")
    assert [colour for colour, _ in looks] == figures.COLOURS[: len(looks)]
    assert len(set(figures.COLOURS)) == len(figures.COLOURS)


def test_lines_of_one_algorithm_have_looks_of_their_own():
    looks = looks_of("maml", "maml", "directed-maml", "fomaml", "fomaml")
    assert all(a != b for a, b in itertools.combinations(looks, 2))
