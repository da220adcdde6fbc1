"""The run folders of one experiment -> report.md, its figures, and the numbers behind both:
summary.csv and curves.csv.

run.py writes all this after training, and `run.py --report FOLDER` rewrites it. What its numbers
and intervals are: measures.py; which runs it reads, and how it groups them into lines: runs.py.
"""

import csv
import io
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness import figures
from harness.checkpoints import RunError, locked, write_atomically
from harness.measures import (
    CRITERIA,
    EMA,
    WINDOW,
    area,
    equal_env_steps,
    median_interval,
    probability_interval,
    ratio_interval,
    spent,
)
from harness.runs import counterpart, read, title, values_of
from harness.text import counted, markdown, printable, span, thousands

WIDEST = 8  # columns of a table


class Cost(NamedTuple):
    """Something that convergence takes."""

    key: str  # column of log.csv
    name: str  # in the tables
    show: callable


COSTS = [
    Cost("epoch", "epochs", "{:.4g}".format),
    Cost("env_steps", "env steps", thousands),
    Cost("seconds", "s", thousands),
]
# Columns of log.csv -> of the tables: what the δ-step does.
STEPS = {
    "delta_norm": "norm of the δ-step",
    "beta_norm": "norm of the β-step",
    "delta_beta_cosine": "their cosine",
}


def column(cost, criterion):
    """The column of summary.csv that holds what a run spent until it converged."""
    return f"{cost.key}_to_{criterion}"


# --- summary.csv: a row of numbers for each run, of which all tables are made ---


def summary(labels):
    """The text of summary.csv."""
    env_steps = equal_env_steps(labels)
    rows = []
    for label, runs in labels.items():
        other = counterpart(runs[0], labels)
        rows += [{"label": label, **summarise(run, other, env_steps)} for run in runs]
    columns = dict.fromkeys(key for row in rows for key in row)  # --eval-steps may differ
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="nan", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{x:.8g}" if isinstance(x, float) else x for k, x in row.items()})
    return file.getvalue()


def summarise(run, other, env_steps):
    """What the tables need of a run: {column: value}; `other` is the label of its undirected
    counterpart, `env_steps` what the area goes over."""
    config, log = run.config, run.log
    seconds = np.diff(log["seconds"], prepend=0)
    returns = log["return_post"]
    last_tenth = returns[-max(len(returns) // 10, 1) :]
    threshold = config.get("threshold")
    threshold = math.inf if threshold is None else threshold
    row = {
        "algo": run.algo,
        "counterpart": other,
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
        for cost in COSTS:
            [row[column(cost, criterion)]] = spent(run, criterion, cost.key, [threshold])
    row |= {
        "area": area(run, env_steps),
        "area_env_steps": env_steps,
        "final_return": last_tenth.mean(),
        "spread": returns[-100:].std(),
        "inner_steps": config["inner_steps"],
    }
    for key in STEPS:
        if key in log:
            row[key], *_ = median_interval(log[key])
    return row | held_out_returns(run)


def held_out_returns(run):
    """Mean returns over the held-out tasks inside Φ, and outside, by inner steps; NaN where there
    are none."""
    if run.evaluation is None:
        return {}
    inside = inside_phi(run)
    row = {}
    for where, tasks in (("inside", inside), ("outside", ~inside)):
        for step, returns in enumerate(run.evaluation.returns):
            row[f"held_out_{where}_{step}"] = returns[tasks].mean() if tasks.any() else math.nan
    return row


def inside_phi(run):
    """Which of the held-out tasks lie inside Φ, or are one of the listed tasks: (G,) of bool."""
    phi, values = run.evaluation.phi, run.config.get("values")
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


def curves(labels):
    """The text of curves.csv: the lines of curves.png at 40 points each, and the same against
    seconds."""
    lines = ["label,against,x,median,low,high"]
    for label, runs in labels.items():
        quoted = '"' + label.replace('"', '""') + '"'
        for cost in COSTS:
            for numbers in zip(*figures.curve(runs, cost.key, 40), strict=True):
                cells = [f"{x:.4g}" for x in numbers]
                lines.append(",".join([quoted, cost.key, *cells]))
    return "\n".join(lines) + "\n"


# --- cells ---


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

    def show(x):
        if math.isnan(x):
            return "–"
        return thousands(x) if math.isfinite(x) else "∞"

    middle, low, high = map(show, ratio_interval(theirs, ours))
    if middle != "–":
        middle += "×"
    return middle if low == "–" else f"{middle} [{low}, {high}]"


def improvement(ours, theirs):
    """The probability that a run of ours needs less than one of theirs, with its interval; – for
    single runs."""
    if min(len(ours), len(theirs)) < 2:
        return "–"
    p, low, high = probability_interval(ours, theirs)
    return f"{p:.2f} [{low:.2f}, {high:.2f}]"


def without_failed(runs, key):
    """A column of a label's runs without those that failed."""
    return [x for x, failed in zip(runs[key], runs["failed"], strict=True) if not failed]


def training_cells(runs):
    """What a line says of its runs: {column: text}."""
    count, failed = len(runs["failed"]), int(sum(runs["failed"]))
    inside = by_inner_steps(runs, "inside")
    after = list(inside.values()) or ["–"]
    inner_steps = min(int(runs["inner_steps"][0]), len(after) - 1)
    return {
        "runs": f"{count} ({failed} failed)" if failed else f"{count}",
        "epochs trained": span(runs["epochs"]),
        "area": with_interval(runs.get("area", [])),
        "final return": with_interval(without_failed(runs, "final_return")),
        "spread": with_interval(without_failed(runs, "spread")),
        "held-out before": after[0],
        "held-out after": after[inner_steps],
    }


def epoch_cells(runs):
    """What a line says of an epoch: how long it takes, and what the δ-step does."""
    epochs, means, stds = (np.array(runs[key]) for key in ("epochs", "seconds_mean", "seconds_std"))
    mean = np.average(means, weights=epochs)
    variance = np.average(stds**2 + (means - mean) ** 2, weights=epochs)  # of all epochs of all runs
    return {
        "s per epoch": plus_minus(mean, math.sqrt(variance)),
        "s per 1000 epochs": plus_minus(1000 * means.mean(), 1000 * means.std()),
        **{name: with_interval(runs.get(key, [])) for key, name in STEPS.items()},
    }


def convergence_cells(label, labels, criterion):
    """What a line says of the convergence of its runs, by one criterion: {column: text}."""
    heading, suffix = ("converged", "") if criterion == "convergence" else (criterion, f", {criterion}")
    runs = labels[label]
    needed = {cost: runs.get(column(cost, criterion), []) for cost in COSTS}
    epochs = needed[COSTS[0]]
    found = {heading: f"{sum(map(math.isfinite, epochs))}/{len(epochs)}" if epochs else "–"}
    for cost, values in needed.items():
        found[f"{cost.name} to {criterion}"] = with_interval(values, cost.show, positive=True)
    speed_ups, probability = by_delta(label, labels, criterion) if epochs else ("–", "–")
    found[f"speed-up by δ: epochs; steps; s{suffix}"] = speed_ups
    found[f"P(fewer epochs by δ{suffix})"] = probability
    return found


def by_delta(label, labels, criterion="convergence"):
    """The counterpart's epochs, env steps and seconds over these runs', seed by seed, and the
    probability that these need fewer epochs; – without a counterpart that differs in the δ-step
    alone."""
    ours, theirs = labels[label], labels.get(counterpart_of(label, labels), {})
    keys = [column(cost, criterion) for cost in COSTS]
    epochs = keys[0]
    if epochs not in theirs:
        return "–", "–"
    ratios = []
    for key in keys:
        by_seed = [dict(zip(runs["seed"], runs[key], strict=True)) for runs in (theirs, ours)]
        ratios.append(speed_up(*by_seed))
    return "; ".join(ratios), improvement(ours[epochs], theirs[epochs])


def counterpart_of(label, labels):
    """The label of the undirected counterpart, or ""; summaries from before this column hold the
    runs of one command, in which β may vary."""
    runs = labels[label]
    if "counterpart" in runs:
        return runs["counterpart"][0]
    algo = runs["algo"][0]
    base, zero = algo.removeprefix("directed-"), f"{algo}, δ = 0"
    if label in (base, zero):
        return ""
    other = base if base in labels else zero
    alike = other in labels and set(labels[other]["beta"]) == set(runs["beta"])
    return other if alike else ""


def by_inner_steps(runs, where):
    """The columns of held-out returns "inside" or "outside" Φ."""
    texts = {}
    for key in runs:
        if key.startswith(f"held_out_{where}_"):
            step = int(key.removeprefix(f"held_out_{where}_"))
            texts[f"{where} Φ, {counted(step, 'step')}"] = with_interval(without_failed(runs, key))
    return texts


def cells(name, label, labels):
    """All that tables can say of the runs `label` of a summary, shown as `name`: {column: text}."""
    runs = labels[label]
    found = {"algorithm": name, **training_cells(runs), **epoch_cells(runs)}
    for criterion in CRITERIA:
        found |= convergence_cells(label, labels, criterion)
    return found | by_inner_steps(runs, "inside") | by_inner_steps(runs, "outside")


# --- report.md ---


def tables(labels):
    """The tables of a summary in Markdown: {what it is of: text}."""
    found = {
        "training": {label: training_cells(runs) for label, runs in labels.items()},
        "epochs": {label: epoch_cells(runs) for label, runs in labels.items()},
    }
    for criterion in CRITERIA:
        found[criterion] = {label: convergence_cells(label, labels, criterion) for label in labels}
    for where in ("inside", "outside"):
        found[where] = {label: by_inner_steps(runs, where) for label, runs in labels.items()}
    return {name: table(lines) for name, lines in found.items()}


def table(lines):
    """{label: {column: text}} as a Markdown table, or several where it would be too wide. A column
    without a text other than – is left out."""
    columns = dict.fromkeys(column for cells in lines.values() for column in cells)
    shown = [x for x in columns if any(cells.get(x, "–") != "–" for cells in lines.values())]
    parts = []
    for start in range(0, len(shown), WIDEST - 1):
        part = shown[start : start + WIDEST - 1]
        rows = []
        for label, cells in lines.items():
            rows.append({"algorithm": label, **{x: cells.get(x, "–") for x in part}})
        parts.append(markdown(rows))
    return "\n\n".join(parts)


def budget(labels):
    """How many arms a table compares, and over which epochs and env steps."""
    said = [f"Arms compared: {len(labels)}"]
    for name, key, show in (("epochs", "epochs", COSTS[0].show), ("env steps", "env_steps", thousands)):
        values = [x for runs in labels.values() for x in runs.get(key, [math.nan])]
        low, high = min(values), max(values)
        if any(map(math.isnan, values)):
            spans = "not recorded"
        elif low == high:
            spans = f"{show(low)} each"
        else:
            spans = f"{show(low)} to {show(high)}, not equal"
        said.append(f"{name} trained: {spans}")
    return "; ".join(said) + "."


def text(labels, title, threshold):
    """report.md, made of a summary's {label: {column: values}} alone."""
    found = tables(labels)
    parts = [
        f"# {title}",
        found["training"],
        found["epochs"],
        budget(labels),
        about_training(labels),
        "## Convergence",
        found["convergence"],
        found["sustained"],
        budget(labels),
        about_convergence(threshold or "a threshold, here not given", found["sustained"]),
        about_intervals(labels),
    ]
    if found["inside"] or found["outside"]:
        parts += [
            "## Held-out return by inner steps",
            found["inside"],
            found["outside"],
            budget(labels),
            about_held_out(),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def paragraph(text):
    return textwrap.fill(" ".join(text.split()), 110)


def about_training(labels):
    """What the columns on training mean."""
    steps = max(len(by_inner_steps(runs, "inside")) for runs in labels.values()) - 1
    first = next(iter(labels.values()))
    area_said = ""
    if "area" in first:
        env_steps = thousands(first["area_env_steps"][0])
        area_said = f"""Area: the mean return after adaptation over the first {env_steps} env steps,
            the same for all runs of this report."""
    return paragraph(f"""
        {area_said} Final return: mean return after adaptation over the last tenth of the epochs;
        spread: its standard deviation over the last 100. Held-out: mean return over the held-out
        tasks inside Φ at the last evaluation, before adaptation and after as many inner steps as
        in training (at most {max(steps, 0)}). Seconds: training time, evaluation excluded, as mean
        ± standard deviation, of an epoch over all epochs, of 1000 over runs; runs trained in one
        batch share its time evenly. The δ-step, where it was logged: its norm, that of the β-step
        and their cosine, each the median over a run's epochs.""")


def about_convergence(threshold, with_sustained):
    """What the criteria are."""
    sustained = ""
    if with_sustained:
        sustained = f"""
            "To sustained": the first epoch from which, once converged, it stays above: the mean
            over the next {WINDOW} epochs does until the end of training. A run of fewer than
            {WINDOW} epochs is never sustained."""
    return paragraph(f"""
        "To convergence" is the paper's first passage: the first epoch at which the mean return
        after adaptation, smoothed (EMA {EMA}), is above {threshold}; noisy learners get there
        early. {sustained} A run that never gets there counts as infinite ("never") and is not
        dropped.""")


def about_intervals(labels):
    """Which intervals there are, and how many arms are compared."""
    if max(len(runs["seed"]) for runs in labels.values()) == 1:
        return "There is one run for each line, so nothing has an interval."
    return paragraph(f"""
        Numbers are medians over seeds with 95% intervals for the median. From 5 runs on they are
        order statistics: of 5 runs the range, 93.75% whatever the distribution; of more
        interpolated, which is 95% for smooth distributions and less where runs fall into two
        clusters (equal ones: 88% of 7 runs, 89% of 10). Below 5 they are the range, widened as for
        normal returns and for log-normal convergence (two equal clusters: 75% of 3 runs). One run
        has no interval. Speed-up, for epochs; env steps; s: the undirected counterpart's (or that
        of δ = 0) over this one's, seed by seed, the median over the seeds that both have, with the
        same interval on the log; – where there are no runs that differ in the δ-step alone. P: the
        probability that a run with the δ-step needs fewer epochs than one without, ties half, with
        Newcombe's interval (method 5). No interval is adjusted for the number of arms,
        {len(labels)}: about one in 20 misses.""")


def about_held_out():
    """Which tasks are held out."""
    return paragraph("""
        The held-out tasks are an even grid over Φ, or over --eval-range, whatever ρ is: where ρ is
        not uniform these are not means over ρ. Where tasks are a list, they are that of
        --eval-values, or else that of --values, on which the runs trained. Lines whose names
        differ in eval_range, eval_values or eval_alpha were evaluated on other tasks or with
        another α: their returns here cannot be compared.""")


# --- all of it ---


def write(root):
    """Rewrite report.md, summary.csv, curves.csv and the figures under root from all runs there;
    returns lines that say what was written, and lines that say what was left out."""
    root = Path(root)
    with np.errstate(all="ignore"):  # returns of runs that diverged
        labels, left_out = read(root)
        if not labels:
            return [f"{printable(str(root))}: no run with a log, so no report"], left_out
        numbers = summary(labels)
        write_atomically(root / "summary.csv", numbers)
        write_atomically(root / "curves.csv", curves(labels))
        body = text(read_summary(numbers), title(labels), values_of("threshold", labels))
        write_atomically(root / "report.md", body + "".join(f"\n{line}.\n" for line in left_out))
        drawn = figures.draw(labels, root)
    return [f"wrote {printable(str(root / 'report.md'))}", *drawn], left_out


def rewrite(folders):
    """What --report does: rewrite the reports of these folders, and print what was written and
    left out."""
    for folder in folders:
        if not folder.is_dir():
            raise RunError(f"--report {folder}: there is no such folder", 2)
    for folder in folders:
        is_a_run = (folder / "config.json").exists()  # whose training would keep the lock to its end
        with locked(folder, wait=not is_a_run):  # another report may be written just now
            wrote, left_out = write(folder)
        print(*wrote, *left_out, sep="\n")
