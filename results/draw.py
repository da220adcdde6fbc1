"""Draw every figure that a page of this folder shows from its CSV files; needs matplotlib.

From the repository's root: `python -m results.draw`. Nothing here reads runs: the figures can be drawn again from what
is committed.
"""

import math
from pathlib import Path

import numpy as np

import maml
from harness.figures import COLOURS, MARKERS, short
from results import fill, protocol

ROOT = Path(__file__).parent
NAMES = {
    "A": "A: without a δ-step",
    "B": "B: the medium task",
    "C": "C: a random task",
    "D": "D: the epoch's tasks",
    "E": "E: a larger β",
    "F": "F: no adaptation",
    "G": "G: told the task",
}
CONTROLS = {  # FOMAML with 2β
    "cartpole-pg": "larger-beta/cartpole",
    "crossing-pg": "larger-beta/crossing",
    "cartpole-ac": "larger-beta/cartpole-ac",
    "crossing-ac": "larger-beta/crossing-ac",
    "lunarlander": "larger-beta/lunarlander",
}


def read_curves(path, against):
    """curves.csv -> {label: (x, median, low, high)}."""
    found = {}
    for row in fill.read_rows(path):
        if row["against"] == against:
            found.setdefault(row["label"], []).append([float(row[key]) for key in ("x", "median", "low", "high")])
    return {label: np.array(numbers).T for label, numbers in found.items()}


def looks(labels):
    """{label: how its line looks}: the colour and marker of its algorithm where each has one line, else of its place;
    with the δ-step solid, without dashed."""
    algos = [label.split(",")[0] for label in labels]
    bases = [algo.removeprefix("directed-") for algo in algos]
    order = list(maml.LEARNERS)
    own = len(set(algos)) == len(algos) and set(bases) <= set(order)
    found = {}
    for i, (label, algo, base) in enumerate(zip(labels, algos, bases, strict=True)):
        place = (order.index(base) if own else i) % len(MARKERS)
        solid = not own or algo != base
        look = {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": "-" if solid else "--"}
        found[label] = look | {"markersize": 4, "markerfacecolor": COLOURS[place] if solid else "white"}
    return found


def draw_lines(panel, curves, names=None):
    """Lines with bands; names: {label: what the legend says}, of whose lines some may be missing."""
    names = names or {label: label for label in curves}
    for i, (label, look) in enumerate(looks(list(names)).items()):
        if label in curves:
            x, middle, low, high = curves[label]
            panel.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
            panel.plot(x, middle, markevery=(i % 8, 8), label=names[label], **look)
    panel.grid(alpha=0.3)
    panel.xaxis.set_major_formatter(short)


def draw_experiment(plt, folder):
    """Return after adaptation by epochs and by env steps, up to where half of the lines have ended."""
    curves = {key: read_curves(folder / "curves.csv", key) for key in ("epoch", "env_steps")}
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharey=True)
    name = folder.relative_to(ROOT).as_posix()
    for panel, (key, lines) in zip(panels, curves.items(), strict=True):
        draw_lines(panel, lines)
        if name in CONTROLS:
            x, middle, *_ = read_curves(ROOT / CONTROLS[name] / "curves.csv", key)["fomaml"]
            panel.plot(x, middle, ":", color="black", linewidth=2, label="fomaml, 2β")
        panel.set(xlabel=key.replace("_", " "))
        ends = sorted(x[-1] for x, *_ in lines.values())
        panel.set_xlim(0, 1.02 * ends[len(ends) // 2])  # one slow arm does not stretch the axis
    panels[0].set_ylabel("mean return (undiscounted, EMA 0.9)")
    seeds = len(next(iter(fill.read_summary(folder).values()))["seed"])
    figure.suptitle(f"{name}: return after adaptation; median of {seeds} seeds, pointwise 95% interval")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_family(plt, name):
    """The arms of a family of the protocol, over its window."""
    curves = read_curves(ROOT / "protocol" / name / "curves.csv", "env_steps")
    summary = fill.read_summary(ROOT / "protocol" / name)
    figure, panel = plt.subplots(figsize=(8, 5.5), layout="constrained")
    draw_lines(panel, curves, NAMES)
    window = protocol.FAMILIES[name].window
    learned = np.concatenate([line[1:4, line[0] >= window / 10].ravel() for line in curves.values()])
    low, high = learned.min(), learned.max()  # not of the first steps, whose returns are far below all others
    panel.set(xlim=(0, window), ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low)))
    panel.set(xlabel="env steps", ylabel="mean return after adaptation (EMA 0.9)")
    seeds = len(summary["A"]["seed"])
    panel.set_title(f"{name}: tuned arms, {seeds} test seeds; median, pointwise 95% interval", fontsize=11)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_differences(plt):
    """The paired differences of the area, in units of each family's smallest effect of interest."""
    rows = fill.read_rows(ROOT / "protocol" / "differences.csv")
    names = {
        "B-A": "B − A: δ-step − none",
        "B-E": "B − E: δ-step − larger β",
        "B-D": "B − D: medium − epoch's tasks",
        "B-C": "B − C: medium − random task",
        "A-F": "A − F: adapting − joint training",
    }
    families = list(dict.fromkeys(row["family"] for row in rows))
    columns = min(len(families), 4)
    lines = math.ceil(len(families) / columns)
    size = 2.6 * columns + 2.2, 3 * lines + 0.6
    figure, panels = plt.subplots(lines, columns, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for panel in panels.flat[len(families) :]:
        panel.remove()
    for panel, family in zip(panels.flat, families, strict=False):
        own = {row["comparison"]: row for row in rows if row["family"] == family}
        panel.axvspan(-1, 1, color="0.9")
        panel.axvline(0, color="0.5", linewidth=0.8)
        for place, comparison in enumerate(names):
            if comparison not in own:
                continue
            row = {key: float(own[comparison][key]) for key in ("mean", "low95", "high95", "low90", "high90", "effect")}
            mean, low95, high95, low90, high90 = (row[key] / row["effect"] for key in list(row)[:5])
            colour = COLOURS[0] if comparison in protocol.PRIMARY else "0.45"
            panel.plot([low95, high95], [place, place], color=colour, linewidth=1)
            panel.plot([low90, high90], [place, place], color=colour, linewidth=3.5)
            panel.plot(mean, place, "o", color=colour, markerfacecolor="white", markersize=6)
        panel.set_title(f"{family} (1 = {own['B-A']['effect']})", fontsize=10)
        panel.set_xlabel("difference of the area", fontsize=9)
        panel.grid(alpha=0.3, axis="x")
        panel.set_xscale("symlog", linthresh=2)
        low, high = panel.get_xlim()
        ticks = [x for x in (-30, -10, -5, -2, -1, 0, 1, 2, 5, 10, 30, 100) if low <= x <= high]
        panel.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=8)
        panel.set_xticks([], minor=True)
    panels[0, 0].invert_yaxis()  # they share it
    for panel in panels[:, 0]:
        panel.set_yticks(range(len(names)), list(names.values()))
    figure.suptitle(
        "In smallest effects of interest (grey band: too small to matter), logarithmic beyond ±2; mean, 90% and 95% "
        "interval\nblue: primary comparisons; grey: secondary, of which nothing is claimed",
        fontsize=11,
    )
    return figure


def main():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    for path in fill.figures(ROOT):
        folder = path.parent
        if path == ROOT / "protocol" / "differences.png":
            figure = draw_differences(plt)
        elif folder.parent == ROOT / "protocol":
            figure = draw_family(plt, folder.name)
        else:
            figure = draw_experiment(plt, folder)
        figure.savefig(path, dpi=110)
        plt.close(figure)
        print(path.relative_to(ROOT.parent))


if __name__ == "__main__":
    main()
