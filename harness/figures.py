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
from harness.text import counted, span, thousands

# Okabe & Ito's colours, told apart by colour-blind readers, and three of Tol's; in the order of the
# learners. Line style and marker tell the rest.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000 #7F7F7F #882255 #999933 #332288"
COLOURS = COLOURS.split()
MARKERS = "osD^vPX*<>"
# Before adaptation, after one inner step, after the last.
LOOKS = [("#000000", "o", ":"), ("#0072B2", "s", "-"), ("#D55E00", "D", "--")]

BAND = 3  # runs from which there is a band: that of two, 13 times their range, would hide all else
MOST = 40  # lines that a figure shows
MOST_COMPONENTS = 6  # of φ, each of which has a panel
MOST_TICKS = 20  # tasks of a list that a panel names


# --- numbers ---


def curve(runs, key, points=200, end=None):
    """Smoothed return after adaptation against a log column: (x, median, low, high), (points,)
    each. It ends at `end`, or where the first run ends; one that failed, or ended before, keeps its
    last return."""
    starts = [run.log[key][0] for run in runs]
    ends = [run.log[key][-1] for run in runs if not run.failed]
    if end is None:
        end = min(ends) if ends else max(run.log[key][-1] for run in runs)
    x = np.linspace(max(starts), end, points)
    smooth = [np.interp(x, run.log[key], ema(run.log["return_post"])) for run in runs]
    return x, *median_interval(np.stack(smooth))


def curves(labels, window=None):
    """The text of curves.csv: the lines of curves.png at 40 points each, and the same against
    seconds. Against env steps they end at the window if there is one."""
    lines = ["label,against,x,median,low,high"]
    for label, runs in labels.items():
        quoted = '"' + label.replace('"', '""') + '"'
        for key in ("epoch", "env_steps", "seconds"):
            end = window if key == "env_steps" else None
            for numbers in zip(*curve(runs, key, 40, end), strict=True):
                lines.append(",".join([quoted, key, *(f"{x:.4g}" for x in numbers)]))
    return "\n".join(lines) + "\n"


def passages(runs, criterion, thresholds):
    """Env steps to thresholds: (x, median, low, high), (T,) each; it ends where the median is
    infinite, and the band at the end of training."""
    steps = np.stack([spent(run, criterion, "env_steps", thresholds) for run in runs])
    numbers = np.stack(median_interval(steps, positive=True))  # (3, T)
    end = max(run.log["env_steps"][-1] for run in runs)
    reached = np.isfinite(numbers[0])
    return thresholds, *np.where(reached, np.minimum(numbers, end), math.nan)


def held_out(runs, component):
    """The last evaluation of runs that have one, by a component of φ: (its X values, returns (runs,
    steps + 1, X), means over all other components). Of tasks in a list, component None, the values
    are their places in it: 0, 1, .."""
    phi = runs[0].evaluation["phi"]  # (G, P), the same for all
    returns = np.stack([run.evaluation["returns"] for run in runs])
    if component is None:
        return np.arange(len(phi)), returns
    values = np.unique(phi[:, component])
    by_value = [returns[:, :, phi[:, component] == x].mean(2) for x in values]
    return values, np.stack(by_value, axis=2)


def components_of(run):
    """The components of φ, each of which has a panel; [None] where the held-out tasks are a list,
    which may be of names: what lies between two is no task, and no line joins them."""
    config = run.config
    if config.get("eval_values") or (config.get("values") and not config.get("eval_range")):
        return [None]
    return range(min(len(config["phi_names"]), MOST_COMPONENTS))


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
        if one_line_each:
            place = order.index(run.base)
            colour = COLOURS[place % len(COLOURS)]
        else:
            place, colour = i, ramp(0.9 * i / (len(lines) - 1))
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
    said = "; median over seeds" if most > 1 else ""
    return said + ", pointwise 95% interval" if most >= BAND else said


def finish(figure, axes, labels, said, thresholds=""):
    """Title and legend, in as many lines and columns as fit into the figure's width. thresholds:
    the returns that are dotted lines."""
    said = f"{title(labels)}: {said}{over_seeds(labels)}"
    if thresholds:
        said += f"; dotted: convergence, {thresholds}"
    characters = int(11 * figure.get_figwidth())  # of the title's font
    figure.suptitle(textwrap.fill(said, characters))
    marks, names = axes.get_legend_handles_labels()
    ncols = int(1.4 * characters // (8 + max(map(len, names))))
    ncols = min(max(ncols, 1), 4)
    figure.legend(marks, names, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)


def short(x, position=None):
    """An axis tick: 350k, 1.2M."""
    return thousands(x)


# --- the figures ---


def draw(labels, root):
    """Draw all figures of {label: runs} into the folder root; returns what there is to say of
    it."""
    try:
        import matplotlib
    except ImportError:
        remedy = f"pip install matplotlib, then python run.py --report {root}"
        return [f"no figures: matplotlib is not installed ({remedy})"]
    matplotlib.use("agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $
    import matplotlib.pyplot as plt

    shown = dict(list(labels.items())[:MOST])
    evaluated = {label: [run for run in runs if run.evaluation] for label, runs in shown.items()}
    evaluated = {label: runs for label, runs in evaluated.items() if runs}
    figures = {"curves.png": (draw_curves, shown), "thresholds.png": (draw_thresholds, shown)}
    if evaluated:
        figures["adaptation.png"] = (draw_adaptation, evaluated)
    for name, (draw_figure, lines) in figures.items():
        picture = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # e.g. of a glyph that the font lacks
            figure = draw_figure(plt, lines)
            figure.savefig(picture, dpi=150, format="png")
        plt.close(figure)
        write_atomically(root / name, picture.getvalue())
    said = [f"wrote {root / name}" for name in figures]
    if len(shown) < len(labels):
        said.append(f"the figures show the first {MOST} of {len(labels)} lines")
    return said


def draw_curves(plt, labels):
    """Fig. 2 and 3: smoothed return after adaptation against epochs and env steps."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharey=True)
    for axes, key in zip(panels, ("epoch", "env_steps"), strict=True):
        lines = {label: curve(runs, key) for label, runs in labels.items()}
        draw_lines(plt, axes, labels, lines, axes.axhline)
        axes.xaxis.set_major_formatter(short)
        axes.set(xlabel=key.replace("_", " "), ylabel=f"mean return (undiscounted, EMA {EMA})")
        axes.label_outer()
    said = "return after adaptation, by epochs and by env steps"
    finish(figure, panels[0], labels, said, values_of("threshold", labels))
    return figure


def draw_thresholds(plt, labels):
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
    shared = {"sharex": True, "sharey": True}
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", **shared)
    for axes, criterion in zip(panels, CRITERIA, strict=True):
        lines = {label: passages(runs, criterion, thresholds) for label, runs in labels.items()}
        draw_lines(plt, axes, labels, lines, axes.axvline)
        axes.yaxis.set_major_formatter(short)
        axes.set_title(titles[criterion], fontsize=10)
        axes.set(xlabel="threshold of the mean return after adaptation", ylabel="env steps")
        axes.label_outer()
    said = "env steps to every threshold, by two criteria"
    finish(figure, panels[0], labels, said, values_of("threshold", labels))
    return figure


def draw_lines(plt, axes, labels, lines, draw_threshold):
    """Lines {label: (x, median, low, high)}, with bands where a line has runs enough."""
    looks = style(labels, plt.get_cmap("viridis"))
    for i, (label, (x, middle, low, high)) in enumerate(lines.items()):
        if len(labels[label]) >= BAND:
            axes.fill_between(x, low, high, color=looks[label]["color"], alpha=0.15, linewidth=0)
        first_marker = i * 16 // len(labels)  # so that those of lines on each other are all seen
        axes.plot(x, middle, markevery=(first_marker, 16), **looks[label])
    thresholds = {run.config.get("threshold") for runs in labels.values() for run in runs}
    for threshold in thresholds - {None}:
        draw_threshold(threshold, color="0.5", linewidth=0.8, linestyle=":")
    axes.grid(alpha=0.3)


def draw_adaptation(plt, labels):
    """Held-out return before and after adaptation against φ, a panel for each label and component
    of φ; all runs have an evaluation."""
    shown = [(label, x) for label, runs in labels.items() for x in components_of(runs[0])]
    each = len(shown) // len(labels)  # panels of a label, which stand side by side
    columns = min(len(shown), each * max(4 // each, 1))
    rows = math.ceil(len(shown) / columns)
    size = max(0.8 + 3.2 * columns, 6), 1.6 + 2.8 * rows
    shared = {"sharey": True, "squeeze": False}
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", **shared)
    for panel in panels.flat[len(shown) :]:
        panel.set_visible(False)
    for panel, (label, component) in zip(panels.flat, shown, strict=False):
        runs = labels[label]
        draw_panel(panel, runs, component)
        epochs = span([run.evaluation["epoch"] for run in runs])
        heading = f"{textwrap.fill(label, 36)}\n{counted(len(runs), 'run')}, epoch {epochs}"
        panel.set_title(heading, fontsize=9)
        panel.grid(alpha=0.3)
    figure.supylabel("mean return (undiscounted)", fontsize=10)
    said = "held-out tasks before and after adaptation"
    if each > 1:
        names = runs[0].config["phi_names"]
        said += f", by {each} of {len(names)} components of φ, means over the others"
    finish(figure, panels.flat[0], labels, said)
    return figure


def draw_panel(panel, runs, component):
    """Returns against a component of φ before adaptation, after one inner step and after the last;
    marks side by side for each task of a list, component None."""
    x, returns = held_out(runs, component)
    last = returns.shape[1] - 1
    steps = sorted({0, min(1, last), last})
    name_axis(panel, runs[0], component)
    for i, (step, (colour, mark, line)) in enumerate(zip(steps, LOOKS, strict=False)):
        middle, low, high = median_interval(returns[:, step])
        at = x
        if component is None:
            at, line = x + 0.2 * (i - (len(steps) - 1) / 2), "none"
        if len(runs) >= BAND and component is None:
            panel.vlines(at, low, high, color=colour, alpha=0.4)
        elif len(runs) >= BAND:
            panel.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        name = f"after {counted(step, 'inner step')}" if step else "before adaptation"
        look = {"color": colour, "marker": mark, "linestyle": line, "markersize": 4}
        panel.plot(at, middle, label=name, **look)


def name_axis(panel, run, component):
    """The name of a component of φ; of a list of tasks all names, and a tick for each task, or for
    some of very many."""
    names = run.config["phi_names"]
    if component is not None:
        panel.set_xlabel(names[component])
        return
    panel.set_xlabel(", ".join(names))
    tasks = [" ".join(f"{number:g}" for number in phi) for phi in run.evaluation["phi"]]
    every = math.ceil(len(tasks) / MOST_TICKS)
    rotation = 90 if sum(map(len, tasks[::every])) > MOST_TICKS else 0
    panel.set_xticks(range(0, len(tasks), every), tasks[::every], rotation=rotation)
