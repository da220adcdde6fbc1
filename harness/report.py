"""The run folders of one experiment -> report.md, summary.csv and, by figures.py, the figures.

run.py writes all this after training, and `run.py --report FOLDER` rewrites it. What its numbers
and intervals are: measures.py; which runs it reads, and how it groups them into lines: runs.py.
"""

import csv
import io
import math
import textwrap

import numpy as np

from harness import figures, measures
from harness.checkpoints import RunError, locked, write_atomically
from harness.measures import CRITERIA, median_interval
from harness.runs import counterpart, read, title, values_of
from harness.text import counted, markdown, printable, span, thousands

WIDEST = 8  # columns of a table

# Columns of log.csv -> of the tables: what convergence takes, with the format of its numbers, and
# what the δ-step does.
COSTS = {"epoch": "epochs", "env_steps": "env steps", "seconds": "s"}
FORMATS = {"epoch": "{:.4g}".format, "env_steps": thousands, "seconds": thousands}
STEPS = {
    "delta_norm": "norm of the δ-step",
    "beta_norm": "norm of the β-step",
    "delta_beta_cosine": "their cosine",
}


# --- summary.csv: a row of numbers for each run, of which all tables are made ---


def summary(labels, window=None):
    """The text of summary.csv. window: the env steps of the area; None: those that all runs have
    reached."""
    env_steps = window or measures.equal_env_steps(labels)
    rows = []
    for label, runs in labels.items():
        names = {"label": label, "algo": runs[0].algo, "counterpart": counterpart(runs[0], labels)}
        rows += [names | summarise(run, env_steps) for run in runs]
    columns = dict.fromkeys(key for row in rows for key in row)  # --eval-steps may differ
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="nan", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{x:.8g}" if isinstance(x, float) else x for k, x in row.items()})
    return file.getvalue()


def summarise(run, env_steps):
    """What the tables need of a run, {column: value}; the area goes over `env_steps`."""
    config, log = run.config, run.log
    returns, seconds = log["return_post"], np.diff(log["seconds"], prepend=0)
    threshold = math.inf if config.get("threshold") is None else config["threshold"]
    row = {
        "alpha": config.get("alpha") or 0.0,
        "beta": config["beta"],
        "delta": config.get("delta") or 0.0,
        "seed": config["seed"],
        "failed": int(run.failed),
        "epochs": len(returns),
        "env_steps": log["env_steps"][-1],
        "seconds_mean": seconds.mean(),
        "seconds_std": seconds.std(),
    }
    for criterion in CRITERIA:
        for key in COSTS:
            [row[f"{key}_to_{criterion}"]] = measures.spent(run, criterion, key, [threshold])
    row |= {
        "area": measures.area(run, env_steps),
        "area_env_steps": env_steps,
        "final_return": returns[-max(len(returns) // 10, 1) :].mean(),  # of the last tenth
        "spread": returns[-100:].std(),
        "inner_steps": config["inner_steps"],
    }
    for key in STEPS:
        if key in log:
            row[key], *_ = median_interval(log[key])
    return row | held_out_returns(run)


def held_out_returns(run):
    """Mean returns over the held-out tasks inside and outside Φ by inner steps; NaN of no tasks.
    The names of what the environment reports end its columns."""
    row = {}
    if run.evaluation:
        inside = inside_phi(run)
        for where, tasks in (("inside", inside), ("outside", ~inside)):
            for step, returns in enumerate(run.evaluation["returns"]):
                row[f"held_out_{where}_{step}"] = returns[tasks].mean() if tasks.any() else math.nan
            for name, by_step in run.evaluation["info"].items():
                for step, values in enumerate(by_step):
                    there = values[tasks & ~np.isnan(values)]
                    row[f"held_out_{where}_{step}_{name}"] = there.mean() if len(there) else math.nan
    return row


def inside_phi(run):
    """Which of the held-out tasks lie inside Φ, or are one of the listed tasks: (G,) of bool."""
    phi, values = run.evaluation["phi"], run.config.get("values")
    if values:
        values = np.array([float(f"{x:g}") for x in values])  # as eval.csv has them
        return (phi[:, None] == values.reshape(-1, phi.shape[1])).all(2).any(1)
    low, high = np.array(run.config["range"], dtype=float).reshape(-1, 2).T
    from_middle = abs(phi - (low + high) / 2)
    return (from_middle <= 0.50001 * (high - low)).all(1)  # φ is written to six digits


def read_summary(text):
    """summary.csv -> {label: {column: values of its runs}}."""
    labels = {}
    for row in csv.DictReader(text.splitlines()):
        columns = labels.setdefault(row["label"], {})
        for key, value in row.items():
            is_text = key in ("label", "algo", "counterpart")
            columns.setdefault(key, []).append(value if is_text else float(value))
    return labels


# --- cells: what tables say of a line, {column: text} ---


def training_cells(runs):
    """What a line says of its runs."""
    count, failed = len(runs["failed"]), int(sum(runs["failed"]))
    held_out = list(by_inner_steps(runs, "inside").values()) or ["–"]
    inner_steps = min(int(runs["inner_steps"][0]), len(held_out) - 1)
    return {
        "runs": f"{count} ({failed} failed)" if failed else f"{count}",
        "epochs trained": span(runs["epochs"]),
        "area": with_interval(runs.get("area", [])),
        "final return": with_interval(without_failed(runs, "final_return")),
        "spread": with_interval(without_failed(runs, "spread")),
        "held-out before": held_out[0],
        "held-out after": held_out[inner_steps],
    }


def epoch_cells(runs):
    """How long an epoch takes, and what the δ-step does."""
    epochs, means, stds = (np.array(runs[key]) for key in ("epochs", "seconds_mean", "seconds_std"))
    mean = np.average(means, weights=epochs)  # over all epochs of all runs
    variance = np.average(stds**2 + (means - mean) ** 2, weights=epochs)
    return {
        "s per epoch": plus_minus(mean, math.sqrt(variance)),
        "s per 1000 epochs": plus_minus(1000 * means.mean(), 1000 * means.std()),
        **{name: with_interval(runs.get(key, [])) for key, name in STEPS.items()},
    }


def convergence_cells(label, labels, criterion):
    """How many runs converge by a criterion, what that takes, and how many times as much it takes
    the counterpart, seed by seed; – for a criterion that an older summary does not have."""
    ours, theirs = labels[label], labels.get(counterpart_of(label, labels), {})
    heading, suffix = criterion, f", {criterion}"
    if criterion == "convergence":
        heading, suffix = "converged", ""
    first = f"epoch_to_{criterion}"
    epochs = ours.get(first, [])
    found = {heading: f"{sum(map(math.isfinite, epochs))}/{len(epochs)}" if epochs else "–"}
    ratios = []
    for key, name in COSTS.items():
        column = f"{key}_to_{criterion}"
        values = ours.get(column, [])
        found[f"{name} to {criterion}"] = with_interval(values, FORMATS[key], positive=True)
        if column in theirs:
            ratios.append(speed_up(by_seed(theirs, column), by_seed(ours, column)))
    found[f"speed-up by δ: epochs; steps; s{suffix}"] = "; ".join(ratios) or "–"
    found[f"P(fewer epochs by δ{suffix})"] = improvement(epochs, theirs.get(first, []))
    return found


def by_seed(runs, key):
    return dict(zip(runs["seed"], runs[key], strict=True))


def counterpart_of(label, labels):
    """The label of the undirected counterpart, or ""; summaries from before this column hold the
    runs of one command, in which β may vary."""
    runs = labels[label]
    if "counterpart" in runs:
        return runs["counterpart"][0]
    algo, beta = runs["algo"][0], runs["beta"][0]
    for other in (algo.removeprefix("directed-"), f"{algo}, δ = 0"):
        if other in labels and other != label and labels[other]["beta"][0] == beta:
            return other
    return ""


def by_inner_steps(runs, where, info=False):
    """Held-out returns "inside" or "outside" Φ; info: what the environment reports instead."""
    found, prefix = {}, f"held_out_{where}_"
    for key in runs:
        step, _, name = key.removeprefix(prefix).partition("_")
        if key.startswith(prefix) and bool(name) == info:
            column = f"{name} {where} Φ, {counted(int(step), 'step')}".strip()
            found[column] = with_interval(without_failed(runs, key))
    return found


def without_failed(runs, key):
    """A column of a label's runs without those that failed."""
    return [x for x, failed in zip(runs[key], runs["failed"], strict=True) if not failed]


def plus_minus(mean, std):
    return f"{thousands(mean)} ± {thousands(round(std, 9))}"


def with_interval(values, show="{:.4g}".format, positive=False):
    """Median [low, high]; of `positive` values, what convergence took, infinite ones show as
    "never"; one value stands alone; – where there is nothing."""
    values = [x for x in values if not math.isnan(x)]
    if not values:
        return "–"
    ends = median_interval(values, positive)
    middle, low, high = ("never" if positive and math.isinf(x) else show(x) for x in ends)
    return middle if len(values) == 1 else f"{middle} [{low}, {high}]"


def speed_up(theirs, ours):
    """Their median multiple of ours, with its interval; – for what the runs do not tell."""
    middle, low, high = measures.ratio_interval(theirs, ours)
    text = "–" if math.isnan(middle) else f"{thousands(middle)}×"
    return text if math.isnan(low) else f"{text} [{thousands(low)}, {thousands(high)}]"


def improvement(ours, theirs):
    """P(a run of ours needs less than one of theirs), with its interval; – for single runs."""
    if min(len(ours), len(theirs)) < 2:
        return "–"
    p, low, high = measures.probability_interval(ours, theirs)
    return f"{p:.2f} [{low:.2f}, {high:.2f}]"


# --- tables ---


def cells_by_table(label, labels):
    """All that tables say of a line: {what a table is of: {column: text}}."""
    runs = labels[label]
    found = {"training": training_cells(runs), "epochs": epoch_cells(runs)}
    for criterion in CRITERIA:
        found[criterion] = convergence_cells(label, labels, criterion)
    for where in ("inside", "outside"):
        found[where] = by_inner_steps(runs, where)
    inside, outside = (by_inner_steps(runs, where, info=True) for where in ("inside", "outside"))
    return found | {"info": inside | outside}


def cells(name, label, labels):
    """All that tables say of a line, shown as `name`: {column: text}."""
    found = {"algorithm": name}
    for columns in cells_by_table(label, labels).values():
        found |= columns
    return found


def tables(labels):
    """The tables of a summary in Markdown: {what it is of: text}."""
    rows = {}
    for label in labels:
        for name, columns in cells_by_table(label, labels).items():
            rows.setdefault(name, []).append({"algorithm": label} | columns)
    return {name: table(rows) for name, rows in rows.items()}


def table(rows):
    """Rows {column: text} as a Markdown table, or several where it would be too wide. A column
    without a text other than – is left out."""
    columns = dict.fromkeys(column for row in rows for column in row)
    name, *others = [x for x in columns if any(row.get(x, "–") != "–" for row in rows)]
    parts = []
    for start in range(0, len(others), WIDEST - 1):
        part = [name, *others[start : start + WIDEST - 1]]
        parts.append(markdown([{x: row.get(x, "–") for x in part} for row in rows]))
    return "\n\n".join(parts)


def budget(labels):
    """How many arms a table compares, and over which epochs and env steps."""
    said = [f"Arms compared: {len(labels)}"]
    for key, show in (("epochs", "{:.4g}".format), ("env_steps", thousands)):
        values = [x for runs in labels.values() for x in runs.get(key, [math.nan])]
        low, high = min(values), max(values)
        trained = f"{show(low)} each" if low == high else f"{show(low)} to {show(high)}, not equal"
        if any(map(math.isnan, values)):
            trained = "not recorded"
        said.append(f"{key.replace('_', ' ')} trained: {trained}")
    return "; ".join(said) + "."


# --- report.md ---

TRAINING = """
Area: the mean return after adaptation over the first {env_steps} env steps, the same for all runs
of this report; one that failed, or ended before, keeps its last return. Final return: mean return
after adaptation over the last tenth of the epochs; spread: its standard deviation over the last
100. Held-out: mean return over the held-out tasks inside Φ at the last evaluation, before
adaptation and after as many inner steps as in training (at most {steps}). Seconds: training time,
evaluation excluded, as mean ± standard deviation, of an epoch over all epochs, of 1000 over runs;
runs trained in one batch share its time evenly. The δ-step, where it was logged: its norm, that of
the β-step and their cosine, each the median over a run's epochs.
"""

CONVERGENCE = """
"To convergence" is the paper's first passage: the first epoch at which the mean return after
adaptation, smoothed (EMA {EMA}), is above {threshold}; noisy learners get there early. "To
sustained": the first epoch from which, once converged, it stays above: the mean over the next
{WINDOW} epochs does until the end of training. A run of fewer than {WINDOW} epochs is never
sustained. A run that never gets there counts as infinite ("never") and is not dropped.
"""

ONE_RUN_EACH = "There is one run for each line, so nothing has an interval."

INTERVALS = """
Numbers are medians over seeds with 95% intervals for the median. From 5 runs on they are order
statistics: of 5 runs the range, 93.75% whatever the distribution; of more interpolated, which is
95% for smooth distributions and less where runs fall into two clusters (equal ones: 88% of 7 runs,
89% of 10). Below 5 they are the range, widened as for normal returns and for log-normal convergence
(two equal clusters: 75% of 3 runs). One run has no interval. Speed-up, for epochs; env steps; s:
the undirected counterpart's (or that of δ = 0) over this one's, seed by seed, the median over the
seeds that both have, with the same interval on the log; – where there are no runs that differ in
the δ-step alone. P: the probability that a run with the δ-step needs fewer epochs than one without,
ties half, with Newcombe's interval (method 5). No interval is adjusted for the number of arms,
{arms}: about one in 20 misses.
"""

HELD_OUT = """
The held-out tasks are an even grid over Φ, or over --eval-range, whatever ρ is: where ρ is not
uniform these are not means over ρ. Where tasks are a list, they are that of --eval-values, or else
that of --values, on which the runs trained. Lines whose names differ in eval_range, eval_values or
eval_alpha were evaluated on other tasks or with another α: their returns here cannot be compared.
"""

INFO = """
Numbers in the environment's info at an episode's end, a switch such as success as 0 or 1: the mean
over those of a task's episodes that report it, and then over the tasks of the last evaluation.
"""


def text(labels, title, threshold):
    """report.md, made of a summary's {label: {column: values}} alone."""
    runs = next(iter(labels.values()))
    steps = max(len(by_inner_steps(runs, "inside")) for runs in labels.values()) - 1
    one_run_each = all(len(runs["seed"]) == 1 for runs in labels.values())
    fields = {
        "EMA": measures.EMA,
        "WINDOW": measures.WINDOW,
        "arms": len(labels),
        "env_steps": thousands(runs["area_env_steps"][0]),
        "steps": max(steps, 0),
        "threshold": threshold or "a threshold, here not given",
    }

    def about(template):
        return textwrap.fill(template.format(**fields).strip(), 110)

    found, arms = tables(labels), budget(labels)
    parts = [f"# {title}", found["training"], found["epochs"], arms, about(TRAINING)]
    parts += ["## Convergence", found["convergence"], found["sustained"], arms, about(CONVERGENCE)]
    parts += [about(ONE_RUN_EACH if one_run_each else INTERVALS)]
    if found["inside"] or found["outside"]:
        parts += ["## Held-out return by inner steps", found["inside"], found["outside"], arms]
        parts += [about(HELD_OUT)]
    if found["info"]:
        parts += ["## What the environment reports of the held-out tasks", found["info"], arms]
        parts += [about(INFO)]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- all of it ---


def write(root, window=None):
    """Rewrite report.md, summary.csv, curves.csv and the figures under root from all runs there;
    returns lines that say what was written, and lines that say what was left out. window: see
    `summary`."""
    with np.errstate(all="ignore"):  # returns of runs that diverged
        labels, left_out = read(root)
        if not labels:
            return [printable(f"{root}: no run with a log, so no report")], left_out
        numbers = summary(labels, window)
        body = text(read_summary(numbers), title(labels), values_of("threshold", labels))
        write_atomically(root / "summary.csv", numbers)
        write_atomically(root / "curves.csv", figures.curves(labels))
        write_atomically(root / "report.md", body + "".join(f"\n{line}.\n" for line in left_out))
        wrote = [f"wrote {root / 'report.md'}", *figures.draw(labels, root)]
    return [printable(line) for line in wrote], left_out


def rewrite(folders, window=None):
    """What --report does: write these folders' reports, and print what was written and left out;
    window: see `summary`."""
    for folder in folders:
        if not folder.is_dir():
            raise RunError(f"--report {folder}: there is no such folder", 2)
    for folder in folders:
        is_run = (folder / "config.json").exists()  # its training would keep the lock to its end
        with locked(folder, wait=not is_run):  # another report may be written just now
            wrote, left_out = write(folder, window)
        print(*wrote, *left_out, sep="\n")
