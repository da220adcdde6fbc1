"""results/grid/*/*/summary.csv -> results/grid/steps.png: is a δ-step more than a larger step?

From the repository's root: `python -m results.steps`. Needs matplotlib. Prints the best cell of each grid, too.
"""

import math
from pathlib import Path

import numpy as np

import report

GRID = Path(__file__).parent / "grid"
ENVS = ["cartpole", "crossing", "point"]
TASKS = 5  # M: the β-step sums over so many tasks, so M·β + δ is how far an epoch moves θ along gradients alike
LOOKS = {"fomaml": ("#D55E00", "s", "none"), "directed-fomaml": ("#0072B2", "o", "full")}


def cells(env):
    """Both grids: [(algo, β, δ, env steps to convergence of each run, epochs to convergence of each run), ..]."""
    found = []
    for path in sorted((GRID / env).glob("*/summary.csv")):
        for runs in report.read_summary(path.read_text(encoding="utf-8")).values():
            spent = runs["env_steps_to_convergence"], runs["epoch_to_convergence"]
            found.append((runs["algo"][0], runs["beta"][0], runs["delta"][0], *spent))
    return found


def draw(panel, env, found):
    limit = 1.15 * max(np.median(steps) for *_, steps, _ in found if math.isfinite(np.median(steps)))
    for algo, (colour, marker, fill) in LOOKS.items():
        own = sorted((TASKS * beta + delta, steps) for a, beta, delta, steps, _ in found if a == algo)
        x = np.array([total for total, _ in own])
        middle, *ends = np.array([report.median_interval(steps, positive=True) for _, steps in own]).T
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
    panel.grid(alpha=0.3)


def main():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(ENVS), figsize=(15, 5), layout="constrained")
    for panel, env in zip(panels, ENVS, strict=True):
        found = cells(env)
        draw(panel, env, found)
        for algo in LOOKS:
            _, beta, delta, steps, epochs = min((x for x in found if x[0] == algo), key=lambda x: np.median(x[3]))
            print(f"{env}, {algo}: β {beta:g}, δ {delta:g}: {report.with_interval(steps, report.thousands, True)} env "
                  f"steps, {report.with_interval(epochs, positive=True)} epochs")  # fmt: skip
    panels[0].set_ylabel("env steps to convergence")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Every cell of the two grids, 5 seeds: median, 95% interval (order statistics)")
    report.save_figure(figure, GRID / "steps.png")


if __name__ == "__main__":
    main()
