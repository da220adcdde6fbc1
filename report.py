"""The run folders of one experiment -> report.md, its figures, and the numbers behind both: summary.csv, curves.csv.

Needs numpy; figures need matplotlib. run.py writes all this after training; `python report.py FOLDER ..` rewrites it.
What its numbers and intervals are: measures.py.
"""

import argparse
import csv
import io
import itertools
import json
import math
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from harness.checkpoints import write_atomically
from measures import (
    CRITERIA,
    EMA,
    WINDOW,
    area,
    ema,
    equal_env_steps,
    first_passage,
    median_interval,
    probability_interval,
    ratio_interval,
    spent,
)

# Okabe & Ito's colours, told apart by colour-blind readers; line style and marker tell the rest.
COLOURS = {"maml": "#0072B2", "fomaml": "#D55E00", "meta-sgd": "#009E73", "reptile": "#CC79A7", "maml++": "#56B4E9"}
COLOURS |= {"imaml": "#E69F00", "sharp-maml": "#000000", "sharp-fomaml": "#7F7F7F"}
MARKERS = "osD^vPX*<>"


# --- reading ---


# What may differ between the runs of one line: which run it is, how long and on what it was trained.
MAY_DIFFER = {"seed", "epochs", "eval_every", "device", "phi_names", "runs_in_batch", "versions"}
LETTERS = {
    "alpha": "α",
    "beta": "β",
    "delta": "δ",
    "gamma": "γ",
    "lambda_": "λ",
    "rho": "ρ",
    "clip": "ε",
    "kl_penalty": "η",
}
OWN_DEFAULTS = {"reptile": ("beta", "inner_steps"), "maml++": ("inner_steps",), "imaml": ("inner_steps",)}
DELTA_STEP = {"algo", "delta", "medium", "delta_schedule"}  # all that a directed run and its counterpart differ in


def read(root):
    """All runs under root, {label: [run, ..]}, and a line for each that is left out, because it cannot be read."""
    runs, left_out, seen = [], [], {}
    for path in sorted(Path(root).glob("**/config.json")):
        try:
            run = read_run(path.parent)
            names = runs[0]["config"]["phi_names"] if runs else run["config"]["phi_names"]
            if run["config"]["phi_names"] != names:
                raise ValueError(f"{path}: its φ is {run['config']['phi_names']}, that of the runs before {names}")
            key = json.dumps([run["settings"], run["config"]["seed"]], sort_keys=True)
            if seen.setdefault(key, path) != path:
                raise ValueError(f"{path}: the same settings and seed as {seen[key]}")
        except ValueError as error:
            left_out.append(f"{error}; the run is left out of the report")
            continue
        if len(run["log"]["epoch"]):
            runs.append(run)
    return labelled(runs), left_out


def settings_of(config):
    """All of a configuration that must be equal within a line, without what follows from the rest."""
    config = json.loads(json.dumps(config), parse_int=float)  # 1 and 1.0 are the same
    settings = {key: value for key, value in config.items() if key not in MAY_DIFFER and value is not None}
    if math.isclose(settings.get("beta_alpha", 0), settings.get("alpha", 0) * settings["beta"]):
        settings.pop("beta_alpha", None)
    if settings.get("outer_steps") == 1:  # as in runs from before there was more than one
        settings.pop("outer_steps")
    if math.isclose(settings.get("lambda_", 0) * (settings.get("alpha") or 0), 1):
        settings.pop("lambda_", None)
    return settings


def varies(key, runs):
    """Whether runs differ in a setting: two of one algorithm, or any two that both have it. OWN_DEFAULTS are not those
    of the others."""
    values = defaultdict(set)
    for settings in (run["settings"] for run in runs):
        value, base = json.dumps(settings.get(key)), settings["algo"].removeprefix("directed-")
        values[settings["algo"]].add(value)
        if key in settings:
            values[base if key in OWN_DEFAULTS.get(base, ()) else ""].add(value)
    return any(len(found) > 1 for found in values.values())


def labelled(runs):
    """{label: runs}: those of a line differ in their seeds alone. The label is the algorithm and every setting that
    varies; each undirected algorithm stands before the directed one, and each by its settings."""

    def place(run):
        algo = run["settings"]["algo"]
        base = algo.removeprefix("directed-")
        values = [run["settings"].get(key, -math.inf) for key in varying]
        by_value = [(0, x, "") if isinstance(x, float) else (1, 0, json.dumps(x)) for x in values]
        return list(COLOURS).index(base), algo != base, by_value

    keys = dict.fromkeys(key for run in runs for key in run["settings"] if key != "algo")
    varying = [key for key in keys if varies(key, runs)]
    labels = {}
    for run in sorted(runs, key=place):
        own = run["settings"]
        parts = [f"{LETTERS.get(key, key)} = {shown(own[key])}" for key in varying if key in own]
        labels.setdefault(", ".join([own["algo"], *parts]), []).append(run)
    return labels


def shown(value):
    """A setting's value in a label."""
    if isinstance(value, list):
        return " ".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def counterpart(run, labels):
    """The label of the undirected runs, or else those with δ = 0, that differ from this one in nothing but the δ-step;
    "" where there are none."""
    own = run["settings"]
    base = own["algo"].removeprefix("directed-")
    for algo, delta in ((base, None), (own["algo"], 0)) if own["algo"] != base and own.get("delta") else ():
        for label, runs in labels.items():
            other = runs[0]["settings"]
            alike = all(own.get(key) == other.get(key) for key in {*own, *other} - DELTA_STEP)
            if alike and other["algo"] == algo and other.get("delta") == delta:
                return label
    return ""


def read_run(folder):
    """A run: config, log columns, rows of evaluation, and whether it failed. Raises ValueError that names the file."""
    run = {"failed": (folder / "failed.txt").exists()}
    for name, parse in (("config.json", parse_config), ("log.csv", parse_log), ("eval.csv", parse_evaluation)):
        path = folder / name
        try:
            run[path.stem] = parse(path.read_text(encoding="utf-8") if path.exists() else "")
        except OlderFormat as error:
            raise ValueError(f"{path}: {error}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: damaged ({type(error).__name__}: {str(error)[:100]})") from error
    run["settings"] = settings_of(run["config"])
    if any(len(row["phi"].split()) != len(run["config"]["phi_names"]) for row in run["eval"]):
        raise ValueError(f"{folder / 'eval.csv'}: damaged (a φ does not consist of {run['config']['phi_names']})")
    return run


class OlderFormat(ValueError):
    """A run that is not damaged, but of an earlier version."""


def parse_config(text):
    config = json.loads(text)
    if "range" not in config and {"low", "high"} <= config.keys():
        raise OlderFormat("written by an earlier version of this code; report on it with that version, or train anew")
    number = (int, float, type(None))
    kinds = {"env": str, "rl": str, "algo": str, "seed": int, "phi_names": list, "range": list, "inner_steps": int}
    kinds |= {"eval_steps": int, "beta": number[:2], "delta": number, "threshold": number}
    for key, kind in kinds.items():
        if not isinstance(config[key], kind) or isinstance(config[key], bool):
            raise ValueError(f"{key} is {config[key]!r}")
    if not all(isinstance(config.get(key), number) for key in ("alpha", "beta_alpha", "lambda_")):
        raise ValueError("alpha, beta_alpha or lambda_ is not a number")
    bounds = config["range"]
    if len(bounds) != 2 * len(config["phi_names"]) or not all(isinstance(x, number[:2]) for x in bounds):
        raise ValueError(f"range is {bounds!r}")
    values = config.get("values") or []
    if not isinstance(values, list) or not all(isinstance(x, number[:2]) for x in values):
        raise ValueError(f"values is {values!r}")
    if config["algo"].removeprefix("directed-") not in COLOURS:
        raise ValueError(f"algo is {config['algo']!r}")
    return config


def parse_rows(text):
    """The rows of a CSV file as dicts; a last one may be half there, while another process writes or after a crash."""
    rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines(), restkey="more", restval=None))
    if any("more" in row or None in row.values() for row in rows):
        raise ValueError("a row has other columns than the header")
    return rows


def parse_log(text):
    rows = parse_rows(text)
    keys = rows[0] if rows else ["epoch"]
    log = {key: np.array([float(row[key] or "nan") for row in rows]) for key in keys}
    if rows and not {"epoch", "env_steps", "seconds", "return_post"} <= log.keys():
        raise ValueError("a column is missing")
    return log


def parse_evaluation(text):
    """The complete evaluations."""
    rows = parse_rows(text)
    for row in rows:
        int(row["step"]), float(row["return"]), [float(x) for x in row["phi"].split()]
    counts = Counter(row["epoch"] for row in rows)
    return [row for row in rows if counts[row["epoch"]] == max(counts.values())]


# --- a line of numbers for each run ---


def summarise(label, run, other, env_steps):
    """What the tables need of a run: {column of summary.csv: value}; `other` is the label of its undirected
    counterpart, `env_steps` what the area goes over."""
    config, log = run["config"], run["log"]
    seconds = np.diff(log["seconds"], prepend=0)
    threshold = math.inf if config["threshold"] is None else config["threshold"]
    returns = log["return_post"]
    return {
        "label": label,
        "algo": config["algo"],
        "counterpart": other,
        "beta": config["beta"],
        "delta": 0.0 if config["delta"] is None else config["delta"],
        "seed": config["seed"],
        "failed": int(run["failed"]),
        "epochs": len(returns),
        "env_steps": log["env_steps"][-1],
        "seconds_mean": seconds.mean(),
        "seconds_std": seconds.std(),
        **{
            f"{key}_to_{criterion}": spent(run, criterion, key, [threshold])[0]
            for criterion in CRITERIA
            for key in ("epoch", "env_steps", "seconds")
        },
        "area": area(run, env_steps),
        "area_env_steps": env_steps,
        "final_return": returns[-max(len(returns) // 10, 1) :].mean(),
        "spread": returns[-100:].std(),
        "inner_steps": config["inner_steps"],
        **{key: median_interval(log[key])[0] for key in STEPS if key in log},
        **{
            f"held_out_{where}_{step}": held_out_return(run, step, where == "inside")
            for where in ("inside", "outside")
            for step in range(config["eval_steps"] + 1)
        },
    }


# Columns of log.csv -> of the tables: what the δ-step does.
STEPS = {"delta_norm": "norm of the δ-step", "beta_norm": "norm of the β-step", "delta_beta_cosine": "their cosine"}


def held_out_return(run, step, inside):
    """Mean over the held-out tasks inside Φ, or outside, after `step` inner steps, at the last evaluation; NaN where
    there are none."""
    returns = []
    for row in run["eval"]:
        if row["epoch"] != run["eval"][-1]["epoch"] or int(row["step"]) != step:
            continue
        phi, values = row["phi"].split(), run["config"].get("values")
        bounds = zip(map(float, phi), run["config"]["range"][::2], run["config"]["range"][1::2], strict=True)
        within = all(abs(x - (a + b) / 2) <= 0.50001 * (b - a) for x, a, b in bounds)  # φ is written to six digits
        if values:
            within = phi in [[f"{x:g}" for x in values[i : i + len(phi)]] for i in range(0, len(values), len(phi))]
        if within == inside:
            returns.append(float(row["return"]))
    return np.mean(returns) if returns else math.nan


def summary(labels):
    """summary.csv: a row for each run, all that the tables are made of."""
    env_steps = equal_env_steps(labels)
    rows = []
    for label, runs in labels.items():
        other = counterpart(runs[0], labels)
        rows += [summarise(label, run, other, env_steps) for run in runs]
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))  # --eval-steps may differ
    writer = csv.DictWriter(text, columns, restval="nan", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{x:.8g}" if isinstance(x, float) else x for k, x in row.items()} for row in rows)
    return text.getvalue()


def read_summary(text):
    """summary.csv -> {label: {column: values of its runs}}."""
    labels = {}
    for row in csv.DictReader(text.splitlines()):
        columns = labels.setdefault(row["label"], {})
        for key, value in row.items():
            columns.setdefault(key, []).append(value if key in ("label", "algo", "counterpart") else float(value))
    return labels


# --- the table ---


def span(values):
    """The lowest and the highest, or the one that all are."""
    return "-".join(f"{x:g}" for x in sorted({min(values), max(values)}))


def plus_minus(mean, std):
    return f"{thousands(mean)} ± {thousands(round(std, 9))}"


def thousands(x):
    """Three digits, with k or M."""
    x = float(f"{x:.3g}")
    return f"{x / 1e6:.3g}M" if x >= 1e6 else f"{x / 1e3:.3g}k" if x >= 1e3 else f"{x:g}"


def with_interval(values, show="{:.4g}".format, positive=False):
    """Median [low, high]; what was never reached counts as infinite and shows as such; one value stands alone; – where
    there is nothing."""
    values = [x for x in values if not math.isnan(x)]
    if not values:
        return "–"
    middle, low, high = (show(x) if math.isfinite(x) else "never" for x in median_interval(values, positive))
    return middle if len(values) == 1 else f"{middle} [{low}, {high}]"


def speed_up(theirs, ours):
    """Their median multiple of ours, with its interval; – for what the runs do not tell."""
    middle, low, high = (
        "–" if math.isnan(x) else thousands(x) if math.isfinite(x) else "∞" for x in ratio_interval(theirs, ours)
    )
    middle += "×" * (middle != "–")
    return middle if low == "–" else f"{middle} [{low}, {high}]"


SHOWN = ("{:.4g}".format, thousands, thousands)  # epochs, env steps, seconds


def improvement(ours, theirs):
    """The probability that a run of ours needs less than one of theirs, with its interval; – for single runs."""
    if min(len(ours), len(theirs)) < 2:
        return "–"
    return "{:.2f} [{:.2f}, {:.2f}]".format(*probability_interval(ours, theirs))


def spent_columns(criterion):
    return [f"{key}_to_{criterion}" for key in ("epoch", "env_steps", "seconds")]


def training_cells(runs):
    """What a line says of its runs but for convergence: {column: text}."""
    count, failed = len(runs["failed"]), int(sum(runs["failed"]))
    epochs, means, stds = (np.array(runs[key]) for key in ("epochs", "seconds_mean", "seconds_std"))
    mean = np.average(means, weights=epochs)
    std = math.sqrt(np.average(stds**2 + (means - mean) ** 2, weights=epochs))  # of all epochs of all runs
    after = [cell for column, cell in by_inner_steps(runs).items() if column.startswith("inside")]
    return {
        "runs": f"{count}" + (f" ({failed} failed)" if failed else ""),
        "epochs trained": span(epochs),
        "s per epoch": plus_minus(mean, std),
        "s per 1000 epochs": plus_minus(1000 * means.mean(), 1000 * means.std()),
        "area": with_interval(runs.get("area", [])),
        "final return": with_interval(without_failed(runs, "final_return")),
        "spread": with_interval(without_failed(runs, "spread")),
        "held-out before": after[0],
        "held-out after": after[int(min(runs["inner_steps"][0], len(after) - 1))],
        **{name: with_interval(runs.get(key, [])) for key, name in STEPS.items()},
    }


def convergence_cells(label, labels):
    """What a line says of the convergence of its runs, by both criteria: {column: text}."""
    found = {}
    for criterion in CRITERIA:
        how = "converged" if criterion == "convergence" else criterion
        columns = [labels[label].get(key, []) for key in spent_columns(criterion)]
        times = columns[0]
        found[how] = f"{sum(map(math.isfinite, times))}/{len(times)}" if times else "–"
        for name, values, show in zip(("epochs", "env steps", "s"), columns, SHOWN, strict=True):
            found[f"{name} to {criterion}"] = with_interval(values, show, positive=True)
        suffix = "" if criterion == "convergence" else f", {criterion}"
        found[f"speed-up by δ: epochs; steps; s{suffix}"], found[f"P(fewer epochs by δ{suffix})"] = (
            by_delta(label, labels, criterion) if times else ("–", "–")
        )
    return found


def cells(name, label, labels):
    """All that tables can say of the runs `label` of a summary, shown as `name`: {column: text}."""
    runs = labels[label]
    return {"algorithm": name, **training_cells(runs), **convergence_cells(label, labels), **by_inner_steps(runs)}


def without_failed(runs, key):
    """A column of a label's runs without those that failed."""
    return [value for value, failed in zip(runs[key], runs["failed"], strict=True) if not failed]


def by_inner_steps(runs):
    """The columns of held-out returns inside and outside Φ."""
    texts = {}
    for key in runs:
        if key.startswith("held_out_"):
            where, step = key.split("_")[2:]
            texts[f"{where} Φ, {step} step{'s' * (step != '1')}"] = with_interval(without_failed(runs, key))
    return texts


def by_delta(label, labels, criterion="convergence"):
    """The counterpart's epochs, env steps and seconds over these runs', seed by seed, and the probability that these
    need fewer epochs; – without a counterpart that differs in the δ-step alone."""
    runs, columns = labels[label], spent_columns(criterion)
    other = labels.get(counterpart_of(label, labels), {})
    if columns[0] not in other:
        return "–", "–"
    pairs = ([dict(zip(x["seed"], x[key], strict=True)) for x in (other, runs)] for key in columns)
    return "; ".join(speed_up(*pair) for pair in pairs), improvement(runs[columns[0]], other[columns[0]])


def counterpart_of(label, labels):
    """The label of the undirected counterpart, or ""; summaries from before this column hold the runs of one command,
    in which β may vary."""
    runs = labels[label]
    if "counterpart" in runs:
        return runs["counterpart"][0]
    base, zero = runs["algo"][0].removeprefix("directed-"), f"{runs['algo'][0]}, δ = 0"
    other = base if base in labels else zero
    alike = other in labels and set(labels[other]["beta"]) == set(runs["beta"])
    return other if alike and label not in (base, zero) else ""


def markdown(lines):
    """A table of lines that are dicts with the same columns."""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(line.values() for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def tables(labels):
    """The tables of a summary, in Markdown: of training, of convergence, and of held-out returns by inner steps."""
    optional = {*STEPS.values(), *(column for runs in labels.values() for column in by_inner_steps(runs))}
    found = []
    for part in (
        {label: training_cells(runs) for label, runs in labels.items()},
        {label: convergence_cells(label, labels) for label in labels},
        {label: by_inner_steps(runs) for label, runs in labels.items()},
    ):
        columns = list(dict.fromkeys(column for line in part.values() for column in line))
        shown = [x for x in columns if x not in optional or any(line.get(x, "–") != "–" for line in part.values())]
        found.append(markdown([{"algorithm": label, **{x: line.get(x, "–") for x in shown}}
                               for label, line in part.items()]))  # fmt: skip
    return tuple(found)


def budget(labels):
    """How many arms a table compares, and over which epochs and env steps."""
    said = [f"Arms compared: {len(labels)}"]
    for name, key, show in (("epochs", "epochs", SHOWN[0]), ("env steps", "env_steps", SHOWN[1])):
        values = [x for runs in labels.values() for x in runs.get(key, [math.nan])]
        low, high = min(values), max(values)
        spans = f"{show(low)} each" if low == high else f"{show(low)} to {show(high)}, not equal"
        said.append(f"{name} trained: {'not recorded' if any(map(math.isnan, values)) else spans}")
    return "; ".join(said) + "."


def values_of(key, labels):
    """All values of a setting, as text; "" where it is not given."""
    values = dict.fromkeys(run["config"][key] for runs in labels.values() for run in runs)
    return " or ".join(shown(value) for value in values if value is not None)


def title(labels):
    """What was learned how: "cartpole, pg"."""
    return f"{values_of('env', labels)}, {values_of('rl', labels)}"


def text(labels, title, threshold):
    """report.md, made of a summary's {label: {column: values}} alone."""
    training, convergence, by_steps = tables(labels)
    threshold = threshold or "a threshold, here not given"
    steps = max(sum(key.startswith("held_out_inside") for key in runs) for runs in labels.values()) - 1
    first = next(iter(labels.values()))
    area_over = f"the first {thousands(first['area_env_steps'][0])}" if "area" in first else "an equal number of"
    return f"""# {title}

{training}

{budget(labels)}

Seconds: training time, evaluation excluded, as mean ± standard deviation, of an epoch over all epochs, of 1000 over
runs; runs trained in one batch share its time evenly. Area: the mean return after adaptation over {area_over} env
steps, the same for all runs of this report. Final return: mean return after adaptation over the last tenth of the
epochs; spread: its standard deviation over the last 100. Held-out: mean return over the fixed grid of tasks inside Φ
at the last evaluation, before adaptation and after as many inner steps as in training (at most {steps}). The δ-step,
where it was logged: its norm, that of the β-step and their cosine, each the median over a run's epochs.

## Convergence

{convergence}

{budget(labels)}

Two criteria, each over all epochs of a run. "To convergence" is the paper's first passage: the first epoch at which the
mean return after adaptation, smoothed (EMA {EMA}), is above {threshold}; noisy learners get there early. "To
sustained": the first epoch from which the mean over {WINDOW} epochs stays above it until the end of training. A run
that never gets there counts as infinite ("never") and is not dropped.

{about_intervals(labels)}

## Held-out return by inner steps

{by_steps}

{budget(labels)}
"""


def about_intervals(labels):
    """What the report says of its statistics: which intervals, and how many arms are compared."""
    if max(len(runs["seed"]) for runs in labels.values()) == 1:
        return "There is one run for each line, so nothing has an interval."
    return f"""Numbers are medians over seeds with 95% intervals for the median: from 5 runs on by order statistics,
whatever the distribution (5 runs: 93.75%); below 5 by the range, widened as for normal returns and for log-normal
convergence; one run has no interval. Speed-up, for epochs; env steps; s: the undirected counterpart's (or that of
δ = 0) over this one's, seed by seed, the median over the seeds that both have, with the same interval on the log; –
where there are no runs that differ in the δ-step alone. P: the probability that a run with the δ-step needs fewer
epochs than one without, ties half, with Newcombe's interval (method 5). No interval is adjusted for the number of arms,
{len(labels)}: about one in 20 misses."""


# --- the figures ---


BAND = 3  # runs from which a figure has a band; that of two is 13 times their range, and nothing else could be seen


def style(labels, ramp):
    """A look for every label: colour and marker tell the algorithm, or the line where an algorithm has several (from
    the colour map `ramp`); with the δ-step solid and filled, without dashed and hollow."""
    algos = [runs[0]["config"]["algo"] for runs in labels.values()]
    looks = {}
    for i, (label, algo) in enumerate(zip(labels, algos, strict=True)):
        base, directed = algo.removeprefix("directed-"), algo.startswith("directed-")
        alone = len(set(algos)) == len(algos)
        colour = COLOURS[base] if alone else ramp(0.9 * i / (len(algos) - 1))
        looks[label] = {
            "color": colour,
            "linestyle": "-" if directed else "--",
            "marker": MARKERS[(list(COLOURS).index(base) if alone else i) % len(MARKERS)],
            "markerfacecolor": colour if directed else "white",
            "markersize": 5,
            "label": f"{label} ({number_of(labels[label])})",
        }
    return looks


def number_of(runs):
    return f"{len(runs)} run{'s' * (len(runs) > 1)}"


def over_seeds(labels):
    """What a figure's title says of its lines and bands."""
    runs = max(map(len, labels.values()))
    return "; median over seeds" * (runs > 1) + ", pointwise 95% interval" * (runs >= BAND)


def finish(figure, handles, said, path):
    """Title and legend, in as many lines and columns as fit into the figure's width, and the file."""
    characters = int(11 * figure.get_figwidth())  # of the title's font
    figure.suptitle(textwrap.fill(said, characters))
    columns = 1.4 * characters // (8 + max(map(len, handles[1])))
    figure.legend(*handles, loc="outside lower center", ncols=min(max(int(columns), 1), 4), frameon=False, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_atomically(path, picture.getvalue())


def curve(runs, key, points=200):
    """Smoothed return after adaptation against a log column: (x, median, low, high), (points,) each.

    It ends where the first run ends; one that failed keeps its last return.
    """
    ends = [run["log"][key][-1] for run in runs if not run["failed"]] or [max(run["log"][key][-1] for run in runs)]
    x = np.linspace(max(run["log"][key][0] for run in runs), min(ends), points)
    smooth = np.stack([np.interp(x, run["log"][key], ema(run["log"]["return_post"])) for run in runs])
    return x, *median_interval(smooth)


def curves(labels):
    """curves.csv: the lines of curves.png at 40 points each, and the same against seconds."""
    lines = ["label,against,x,median,low,high"]
    for label, runs in labels.items():
        for key in ("epoch", "env_steps", "seconds"):
            for numbers in zip(*curve(runs, key, 40), strict=True):
                lines.append(f'"{label}",{key},' + ",".join(f"{x:.4g}" for x in numbers))
    return "\n".join(lines) + "\n"


def draw_lines(plt, labels, panels, said, path, thresholds_on):
    """Two panels, each {label: (x, median, low, high)} and what its axes are called; thresholds_on: "x" or "y"."""
    figure, both = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharex=thresholds_on == "x", sharey=True)
    looks = style(labels, plt.get_cmap("viridis"))
    thresholds = {run["config"]["threshold"] for runs in labels.values() for run in runs} - {None}
    for axes, (lines, names) in zip(both, panels, strict=True):
        for offset, (label, (x, middle, low, high)) in enumerate(lines.items()):
            if len(labels[label]) >= BAND:
                axes.fill_between(x, low, high, color=looks[label]["color"], alpha=0.15, linewidth=0)
            axes.plot(x, middle, markevery=(offset * 16 // len(labels), 16), **looks[label])
        for at in thresholds:
            (axes.axvline if thresholds_on == "x" else axes.axhline)(at, color="0.5", linewidth=0.8, linestyle=":")
        (axes.yaxis if thresholds_on == "x" else axes.xaxis).set_major_formatter(short)
        axes.set(**names)
        axes.title.set_fontsize(10)
        axes.label_outer()
        axes.grid(alpha=0.3)
    dotted = f"; dotted: convergence, {values_of('threshold', labels)}" if thresholds else ""
    said = f"{title(labels)}: {said}{over_seeds(labels)}{dotted}"
    finish(figure, both[0].get_legend_handles_labels(), said, path)
    plt.close(figure)


def draw_curves(plt, labels, path):
    """Fig. 2 and 3: smoothed return after adaptation against epochs and env steps, one line a label."""
    panels = [
        ({label: curve(runs, key) for label, runs in labels.items()},
         {"xlabel": name, "ylabel": f"mean return (undiscounted, EMA {EMA})"})
        for key, name in (("epoch", "epoch"), ("env_steps", "env steps"))
    ]  # fmt: skip
    draw_lines(plt, labels, panels, "return after adaptation, by epochs and by env steps", path, "y")


def draw_thresholds(plt, labels, path):
    """Env steps to every return as threshold, by both criteria: which algorithm is first may depend on either."""
    ends = [first_passage(run["log"]["return_post"])[[0, -1]] for runs in labels.values() for run in runs]
    thresholds = np.linspace(np.nanmedian(ends, 0)[0], np.nanmax(ends, 0)[1], 100)
    titles = ("first passage: the smoothed return exceeds it", f"sustained: means of {WINDOW} epochs stay over it")
    panels = [
        ({label: passages(runs, criterion, thresholds) for label, runs in labels.items()},
         {"title": name, "xlabel": "threshold of the mean return after adaptation", "ylabel": "env steps"})
        for criterion, name in zip(CRITERIA, titles, strict=True)
    ]  # fmt: skip
    draw_lines(plt, labels, panels, "env steps to every threshold, by two criteria", path, "x")


def passages(runs, criterion, thresholds):
    """Env steps to thresholds: (x, median, low, high), (T,) each; it ends where the median is infinite, and the band at
    the end of training."""
    steps = np.stack([spent(run, criterion, "env_steps", thresholds) for run in runs])
    middle, low, high = median_interval(steps, positive=True)
    end = max(run["log"]["env_steps"][-1] for run in runs)
    return thresholds, *(np.where(np.isfinite(middle), np.minimum(x, end), math.nan) for x in (middle, low, high))


def short(x, position=None):
    """An axis tick: 350k, 1.2M."""
    return ("-" if x < 0 else "") + thousands(abs(x))


def held_out(runs):
    """The last evaluation: (x (G,), returns (runs, steps + 1, G)); x is φ, or φ's distance from the grid's centre."""
    returns = []
    for run in runs:
        last = run["eval"][-1]["epoch"]
        rows = [r for r in run["eval"] if r["epoch"] == last]
        phi = np.array([[float(x) for x in r["phi"].split()] for r in rows if r["step"] == "0"])
        returns.append(np.array([float(r["return"]) for r in rows]).reshape(len(phi), -1).T)
    returns = [r[: min(map(len, returns))] for r in returns]  # --eval-steps may differ
    if phi.shape[1] == 1:
        return phi[:, 0], np.stack(returns)
    distance = np.linalg.norm(phi - phi.mean(0), axis=1).round(9)
    groups = np.unique(distance)
    return groups, np.stack([[r[:, distance == d].mean(1) for d in groups] for r in returns]).swapaxes(1, 2)


LOOKS = [("#000000", "o", ":"), ("#0072B2", "s", "-"), ("#D55E00", "D", "--")]  # before, after one step, after the last


def draw_adaptation(plt, labels, path):
    """Held-out return before and after adaptation against φ, one panel an algorithm."""
    labels = {label: [run for run in runs if run["eval"]] for label, runs in labels.items()}
    labels = {label: runs for label, runs in labels.items() if runs}
    if not labels:
        return False
    columns = min(len(labels), 4)
    rows = math.ceil(len(labels) / columns)
    figure, panels = plt.subplots(rows, columns, figsize=(max(0.8 + 3.2 * columns, 6), 1.6 + 2.8 * rows),
                                  squeeze=False, sharex=True, sharey=True, layout="constrained")  # fmt: skip
    for panel in panels.flat[len(labels) :]:
        panel.set_visible(False)
    names = next(iter(labels.values()))[0]["config"]["phi_names"]
    for i, (panel, (label, runs)) in enumerate(zip(panels.flat, labels.items(), strict=False)):
        x, returns = held_out(runs)
        for step, (colour, mark, line) in zip(sorted({0, 1, returns.shape[1] - 1}), LOOKS, strict=False):
            middle, low, high = median_interval(returns[:, step])
            name = "before adaptation" if step == 0 else f"after {step} inner step{'s' * (step > 1)}"
            if len(runs) >= BAND:
                panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            panel.plot(x, middle, color=colour, marker=mark, markersize=4, label=name, linestyle=line)
        after = span([int(run["eval"][-1]["epoch"]) for run in runs])
        panel.set_title(f"{textwrap.fill(label, 36)}\n{number_of(runs)}, epoch {after}", fontsize=9)
        panel.grid(alpha=0.3)
        if i + columns >= len(labels):  # the lowest panel of its column
            panel.set_xlabel(names[0] if len(names) == 1 else "distance of φ from the mean task")
            panel.tick_params(labelbottom=True)
    figure.supylabel("mean return (undiscounted)", fontsize=10)
    said = f"{title(labels)}: held-out tasks before and after adaptation{over_seeds(labels)}"
    finish(figure, panels.flat[0].get_legend_handles_labels(), said, path)
    plt.close(figure)
    return True


def write(root):
    """Rewrite report.md, summary.csv, curves.csv and the figures under root from all runs there; returns lines that say
    what was written, and lines that say what was left out."""
    root = Path(root)
    labels, left_out = read(root)
    if not labels:
        return [f"{root}: no run with a log, so no report"], left_out
    numbers = summary(labels)
    write_atomically(root / "summary.csv", numbers)
    write_atomically(root / "curves.csv", curves(labels))
    body = text(read_summary(numbers), title(labels), values_of("threshold", labels))
    write_atomically(root / "report.md", body + "".join(f"\n{line}.\n" for line in left_out))
    lines = [f"wrote {root / 'report.md'}"]
    try:
        import matplotlib
    except ImportError:
        remedy = "pip install matplotlib, then the same with --resume"
        return [*lines, f"no figures: matplotlib is not installed ({remedy})"], left_out
    matplotlib.use("agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $
    import matplotlib.pyplot as plt

    draw_curves(plt, labels, root / "curves.png")
    draw_thresholds(plt, labels, root / "thresholds.png")
    lines += [f"wrote {root / name}" for name in ("curves.png", "thresholds.png")]
    if draw_adaptation(plt, labels, root / "adaptation.png"):
        lines.append(f"wrote {root / 'adaptation.png'}")
    return lines, left_out


def main(arguments=None):
    """Write the reports of these folders of runs."""
    parser = argparse.ArgumentParser(
        prog="report.py",
        description="Rewrite report.md, summary.csv, curves.csv and the figures of folders from the runs in them.",
        epilog="Example: python report.py runs/cartpole-pg",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a folder with runs in it, at any depth")
    for name in parser.parse_args(arguments).folders:
        if not Path(name).is_dir():
            sys.exit(f"report.py: {name}: there is no such folder")
        try:
            print(*itertools.chain(*write(name)), sep="\n")
        except (OSError, ValueError, KeyError) as error:
            sys.exit(f"report.py: {name}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
