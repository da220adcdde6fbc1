"""The figures of a report, and the numbers that they show. Needs matplotlib, which is imported
where it is used."""

import io
import math
import textwrap
import warnings

import numpy as np

from harness.checkpoints import write_atomically
from harness.measures import CRITERIA, EMA, WINDOW, ema, first_passage, median_interval, spent
from harness.runs import learner_order, title, values_of
from harness.text import counted, printable, span, thousands

# Okabe & Ito's colours, told apart by colour-blind readers, and three of Tol's; in the order of the
# learners. Line style and marker tell the rest.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000 #7F7F7F #882255 #999933 #332288"
COLOURS = COLOURS.split()
MARKERS = "osD^vPX*<>"
# Before adaptation, after one inner step, after the last.
LOOKS = [("#000000", "o", ":"), ("#0072B2", "s", "-"), ("#D55E00", "D", "--")]

BAND = 3  # runs from which there is a band; that of two is 13 times their range, and would hide all else
MOST = 40  # lines that a figure shows


# --- numbers ---


def curve(runs, key, points=200):
    """Smoothed return after adaptation against a log column: (x, median, low, high), (points,)
    each.

    It ends where the first run ends; one that failed keeps its last return.
    """
    starts = [run.log[key][0] for run in runs]
    ends = [run.log[key][-1] for run in runs if not run.failed]
    end = min(ends) if ends else max(run.log[key][-1] for run in runs)
    x = np.linspace(max(starts), end, points)
    smooth = [np.interp(x, run.log[key], ema(run.log["return_post"])) for run in runs]
    return x, *median_interval(np.stack(smooth))


def passages(runs, criterion, thresholds):
    """Env steps to thresholds: (x, median, low, high), (T,) each; it ends where the median is
    infinite, and the band at the end of training."""
    steps = np.stack([spent(run, criterion, "env_steps", thresholds) for run in runs])
    middle, low, high = median_interval(steps, positive=True)
    end = max(run.log["env_steps"][-1] for run in runs)
    reached = np.isfinite(middle)
    middle, low, high = (np.where(reached, np.minimum(x, end), math.nan) for x in (middle, low, high))
    return thresholds, middle, low, high


def held_out(runs):
    """The last evaluation of runs that have one: (x (G,), returns (runs, steps + 1, G)); x is φ,
    or φ's distance from the grid's centre, over equal ones of which the returns are averaged."""
    phi = runs[0].evaluation.phi  # (G, P), the same for all
    returns = np.stack([run.evaluation.returns for run in runs])
    if phi.shape[1] == 1:
        return phi[:, 0], returns
    distance = np.linalg.norm(phi - phi.mean(0), axis=1).round(9)
    groups = np.unique(distance)
    return groups, np.stack([returns[:, :, distance == d].mean(2) for d in groups], axis=2)


# --- looks ---


def style(labels, ramp):
    """A look for every label: colour and marker tell the algorithm, or the line where an algorithm
    has several (from the colour map `ramp`); with the δ-step solid and filled, without dashed and
    hollow."""
    lines = [runs[0] for runs in labels.values()]
    order = learner_order(lines)
    one_line_each = len({run.algo for run in lines}) == len(lines)
    looks = {}
    for i, (label, run) in enumerate(zip(labels, lines, strict=True)):
        place = order.index(run.base) if one_line_each else i
        colour = COLOURS[place % len(COLOURS)] if one_line_each else ramp(0.9 * i / (len(lines) - 1))
        looks[label] = {
            "color": colour,
            "linestyle": "-" if run.directed else "--",
            "marker": MARKERS[place % len(MARKERS)],
            "markerfacecolor": colour if run.directed else "white",
            "markersize": 5,
            "label": f"{label} ({counted(len(labels[label]), 'run')})",
        }
    return looks


def over_seeds(labels):
    """What a figure's title says of its lines and bands."""
    most = max(map(len, labels.values()))
    if most >= BAND:
        return "; median over seeds, pointwise 95% interval"
    return "; median over seeds" if most > 1 else ""


def finish(figure, handles, said, path):
    """Title and legend, in as many lines and columns as fit into the figure's width, and the
    file."""
    characters = int(11 * figure.get_figwidth())  # of the title's font
    figure.suptitle(textwrap.fill(said, characters))
    longest = max(map(len, handles[1]))
    columns = int(1.4 * characters // (8 + longest))
    columns = min(max(columns, 1), 4)
    figure.legend(*handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_atomically(path, picture.getvalue())


def short(x, position=None):
    """An axis tick: 350k, 1.2M."""
    return "-" + thousands(-x) if x < 0 else thousands(x)


# --- the figures ---


def draw(labels, root):
    """Draw all figures of {label: runs} into the folder root; returns what there is to say of
    it."""
    try:
        import matplotlib
    except ImportError:
        remedy = f"pip install matplotlib, then python run.py --report {root}"
        return [printable(f"no figures: matplotlib is not installed ({remedy})")]
    matplotlib.use("agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $
    import matplotlib.pyplot as plt

    shown = dict(list(labels.items())[:MOST])
    said = []
    if len(shown) < len(labels):
        said = [f"the figures show the first {MOST} of {len(labels)} lines"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e.g. of a glyph that the font lacks
        draw_curves(plt, shown, root / "curves.png")
        draw_thresholds(plt, shown, root / "thresholds.png")
        drawn = ["curves.png", "thresholds.png"]
        evaluated = {label: [run for run in runs if run.evaluation] for label, runs in shown.items()}
        evaluated = {label: runs for label, runs in evaluated.items() if runs}
        if evaluated:
            draw_adaptation(plt, evaluated, root / "adaptation.png")
            drawn.append("adaptation.png")
    return [*(f"wrote {printable(str(root / name))}" for name in drawn), *said]


def draw_curves(plt, labels, path):
    """Fig. 2 and 3: smoothed return after adaptation against epochs and env steps, one line a
    label."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharey=True)
    for axes, key, name in ((left, "epoch", "epoch"), (right, "env_steps", "env steps")):
        draw_lines(plt, axes, labels, {label: curve(runs, key) for label, runs in labels.items()})
        for threshold in thresholds_of(labels):
            axes.axhline(threshold, color="0.5", linewidth=0.8, linestyle=":")
        axes.xaxis.set_major_formatter(short)
        axes.set(xlabel=name, ylabel=f"mean return (undiscounted, EMA {EMA})")
        axes.label_outer()
    said = f"{title(labels)}: return after adaptation, by epochs and by env steps"
    finish_lines(plt, figure, left, labels, said, path)


def draw_thresholds(plt, labels, path):
    """Env steps to every return as threshold, by both criteria: which algorithm is first may
    depend on either."""
    smoothed = [first_passage(run.log["return_post"]) for runs in labels.values() for run in runs]
    low = np.nanmedian([highest[0] for highest in smoothed])
    high = np.nanmax([highest[-1] for highest in smoothed])
    thresholds = np.linspace(low, high, 100)
    titles = {
        "convergence": "first passage: the smoothed return exceeds it",
        "sustained": f"sustained: means of {WINDOW} epochs stay over it",
    }
    figure, both = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharex=True, sharey=True)
    for axes, criterion in zip(both, CRITERIA, strict=True):
        lines = {label: passages(runs, criterion, thresholds) for label, runs in labels.items()}
        draw_lines(plt, axes, labels, lines)
        for threshold in thresholds_of(labels):
            axes.axvline(threshold, color="0.5", linewidth=0.8, linestyle=":")
        axes.yaxis.set_major_formatter(short)
        axes.set_title(titles[criterion], fontsize=10)
        axes.set(xlabel="threshold of the mean return after adaptation", ylabel="env steps")
        axes.label_outer()
    said = f"{title(labels)}: env steps to every threshold, by two criteria"
    finish_lines(plt, figure, both[0], labels, said, path)


def draw_lines(plt, axes, labels, lines):
    """Lines {label: (x, median, low, high)}, with bands where a line has runs enough."""
    looks = style(labels, plt.get_cmap("viridis"))
    for i, (label, (x, middle, low, high)) in enumerate(lines.items()):
        if len(labels[label]) >= BAND:
            axes.fill_between(x, low, high, color=looks[label]["color"], alpha=0.15, linewidth=0)
        first_marker = i * 16 // len(labels)  # so that those of lines on each other are all seen
        axes.plot(x, middle, markevery=(first_marker, 16), **looks[label])
    axes.grid(alpha=0.3)


def finish_lines(plt, figure, axes, labels, said, path):
    said += over_seeds(labels)
    if thresholds_of(labels):
        said += f"; dotted: convergence, {values_of('threshold', labels)}"
    finish(figure, axes.get_legend_handles_labels(), said, path)
    plt.close(figure)


def thresholds_of(labels):
    """The returns from which runs count as converged, as a set."""
    return {run.config.get("threshold") for runs in labels.values() for run in runs} - {None}


def draw_adaptation(plt, labels, path):
    """Held-out return before and after adaptation against φ, one panel a label; all runs have an
    evaluation."""
    columns = min(len(labels), 4)
    rows = math.ceil(len(labels) / columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(max(0.8 + 3.2 * columns, 6), 1.6 + 2.8 * rows),
        squeeze=False, sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for panel in panels.flat[len(labels) :]:
        panel.set_visible(False)
    names = next(iter(labels.values()))[0].config["phi_names"]
    for i, (label, runs) in enumerate(labels.items()):
        panel = panels.flat[i]
        draw_panel(panel, runs)
        epochs = span([run.evaluation.epoch for run in runs])
        said = f"{counted(len(runs), 'run')}, epoch {epochs}"
        panel.set_title(f"{textwrap.fill(label, 36)}\n{said}", fontsize=9)
        panel.grid(alpha=0.3)
        lowest_of_its_column = i + columns >= len(labels)
        if lowest_of_its_column:
            panel.set_xlabel(names[0] if len(names) == 1 else "distance of φ from the mean task")
            panel.tick_params(labelbottom=True)
    figure.supylabel("mean return (undiscounted)", fontsize=10)
    said = f"{title(labels)}: held-out tasks before and after adaptation{over_seeds(labels)}"
    finish(figure, panels.flat[0].get_legend_handles_labels(), said, path)
    plt.close(figure)


def draw_panel(panel, runs):
    """Returns against φ before adaptation, after one inner step and after the last."""
    x, returns = held_out(runs)
    last = returns.shape[1] - 1
    steps = sorted({0, min(1, last), last})
    for step, (colour, mark, line) in zip(steps, LOOKS, strict=False):
        middle, low, high = median_interval(returns[:, step])
        if len(runs) >= BAND:
            panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        name = f"after {counted(step, 'inner step')}" if step else "before adaptation"
        look = {"color": colour, "marker": mark, "markersize": 4, "linestyle": line}
        panel.plot(x, middle, label=name, **look)
