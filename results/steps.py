"""Does the δ-step do more than a larger β would? Draws results/grid/steps.png from results/grid/*/*/summary.csv.

From the repository's root: `python -m results.steps`. Needs matplotlib. Also prints the best cell of each grid.
"""

import math
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from harness import figures, measures, report
from harness.text import thousands

GRID = Path(__file__).parent / "grid"
ENVS = ["cartpole", "crossing", "point"]
# M: the β-step sums over this many tasks. If all gradients were equal, an epoch would move θ by (M β + δ) times that
# gradient, so figures and controls compare arms with the same M β + δ.
TASKS = 5
LOOKS = {"fomaml": ("#D55E00", "s", "none"), "directed-fomaml": ("#0072B2", "o", "full")}


class Cell(NamedTuple):
    """One pair of step sizes; env_steps, epochs: what each run needed to converge, inf if it never did."""

    algo: str
    beta: float
    delta: float
    env_steps: list
    epochs: list


def grid_cells(folder):
    """All cells of an environment's two grids, without and with the δ-step."""
    cells = []
    for path in sorted(folder.glob("*/summary.csv")):
        for runs in report.read_summary(path.read_text(encoding="utf-8")).values():
            spent = runs["env_steps_to_convergence"], runs["epoch_to_convergence"]
            cells.append(Cell(runs["algo"][0], runs["beta"][0], runs["delta"][0], *spent))
    return cells


def best(cells, algo):
    """The algorithm's cell with the fewest env steps to convergence. Raises ValueError where it has none.

    Fewest by the mean of the runs without the lowest and the highest quarter: by this rule the cells were chosen that
    were run again on fresh seeds. On CartPole the median chooses another one.
    """

    def middle_mean(cell):
        quarter = len(cell.env_steps) // 4
        return np.mean(sorted(cell.env_steps)[quarter : len(cell.env_steps) - quarter])

    return min((cell for cell in cells if cell.algo == algo), key=middle_mean)


def draw(panel, env, cells):
    """Env steps to convergence against M β + δ, one mark a cell; cells that never converge lie on the upper line."""
    middles = [median(cell.env_steps) for cell in cells]
    limit = 1.15 * max(middle for middle in middles if math.isfinite(middle))
    for algo, (colour, marker, fill) in LOOKS.items():
        points = sorted((TASKS * cell.beta + cell.delta, cell.env_steps) for cell in cells if cell.algo == algo)
        x = np.array([total for total, _ in points])
        middle, *ends = np.array([measures.median_interval(env_steps, positive=True) for _, env_steps in points]).T
        low, high = np.minimum(ends, limit)
        reached = np.isfinite(middle)
        look = {"color": colour, "marker": marker, "fillstyle": fill, "linestyle": "none", "label": algo}
        bars = np.stack([middle - low, high - middle])[:, reached]
        panel.errorbar(x[reached], middle[reached], bars, linewidth=1, **look)
        panel.plot(x[~reached], np.full((~reached).sum(), limit), **look | {"label": None})
    panel.axhline(limit, color="0.7", linewidth=0.8, linestyle=":")
    panel.annotate("never", (0.5, limit), (0, -3), xycoords=("axes fraction", "data"), color="0.35", ha="center",
                   textcoords="offset points", va="top", fontsize=8)  # fmt: skip
    panel.set(xscale="log", title=env, xlabel="M β + δ", ylim=(0, 1.05 * limit))
    left, right = panel.get_xlim()
    ticks = [x for x in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1) if left <= x <= right]
    panel.set_xticks(ticks, [f"{x:g}" for x in ticks])
    panel.set_xticks([], minor=True)
    panel.yaxis.set_major_formatter(figures.short)
    panel.grid(alpha=0.3)


def main(grid=GRID):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(ENVS), figsize=(15, 5), layout="constrained")
    for panel, env in zip(panels, ENVS, strict=True):
        cells = grid_cells(grid / env)
        draw(panel, env, cells)
        for algo in LOOKS:
            cell = best(cells, algo)
            print(f"{env}, {algo}: β {cell.beta:g}, δ {cell.delta:g}: "
                  f"{report.with_interval(cell.env_steps, thousands, True)} env steps, "
                  f"{report.with_interval(cell.epochs, positive=True)} epochs")  # fmt: skip
    panels[0].set_ylabel("env steps to convergence")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Every cell of the two grids, 5 seeds: median, 95% interval (order statistics)")
    figure.savefig(grid / "steps.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
