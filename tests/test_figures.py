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
from tests.test_runs import GOAL, GRAVITY, write_evaluation, write_run


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


def test_the_passages_of_a_figure_by_hand():
    """Runs that reach 10, 20 and 30 in their first epochs of 100, 200 and 300 env steps: over 5 at the median
    of those, over 15 at 200, 300 and never, over 25 at 300, never and never, which ends the line."""
    reached = [logged([x] * 20, steps + np.arange(20)) for x, steps in ((10, 100), (20, 200), (30, 300))]
    x, middle, low, high = figures.passages(reached, "convergence", np.array([5, 15, 25]))
    np.testing.assert_array_equal(x, [5, 15, 25])
    np.testing.assert_array_equal(middle, [200, 300, np.nan])
    assert low[0] < 100 and 300 < high[0] <= 319 and high[1] == 319  # the band ends with the training


def test_held_out_returns_of_a_plane_are_averaged_over_equal_distance_from_its_centre():
    phi = np.array([[1, 1], [2, 1], [3, 1]])
    evaluation = {"phi": phi, "returns": np.array([[4, 5, 6], [7, 8, 8]])}
    x, returns = figures.held_out([SimpleNamespace(evaluation=evaluation)])
    np.testing.assert_array_equal(x, [0, 1])
    np.testing.assert_array_equal(returns, [[[5, 5], [8, 7.5]]])


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
