"""Run folders as the report reads them, and the lines that it makes of them: runs that differ in
their seeds alone.

A folder may hold the runs of others. One that cannot be read, whatever is wrong with it, is left
out with one line.
"""

import csv
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import maml
from harness.checkpoints import CHECKPOINT, FAILED
from harness.gyms import FAMILIES
from harness.settings import ALL_SETTINGS, default_of
from harness.text import printable, setting_text

KNOWN = tuple(maml.LEARNERS)  # the learners, in the order of the lines and of their colours


def is_compared(setting):
    """Whether the runs of a line have the same: all that makes a run that run, but the seed; and the
    threshold, from which convergence is counted."""
    if setting.name in ("algo", "seed"):  # the algorithm, too, has a place of its own
        return False
    return setting.identity or setting.name == "threshold"


COMPARED = [setting for setting in ALL_SETTINGS.values() if is_compared(setting)]
# All that a directed run and its counterpart differ in, besides the algorithm.
DELTA_STEP = {x.name for x in COMPARED if x.needs == ALL_SETTINGS["delta"].needs}

LARGEST = {"config.json": 10**6, "log.csv": 10**8, "eval.csv": 10**8}  # bytes; a million epochs are 10⁸
LONGEST = 200  # characters of a text in config.json
HUGE = 1e100  # sums and squares of larger numbers overflow


@dataclass
class Evaluation:
    """Returns on the held-out tasks after 0, 1, .. inner steps."""

    epoch: int
    tasks: list  # G texts, as in eval.csv
    phi: np.ndarray  # (G, P)
    returns: np.ndarray  # (steps + 1, G)


@dataclass
class LoggedRun:
    """A run as its files say it."""

    config: dict
    log: dict  # {column of log.csv: (E,)}
    evaluation: Evaluation | None  # the last that is complete
    failed: bool

    def __post_init__(self):
        self.algo = self.config["algo"]
        self.base = self.algo.removeprefix("directed-")
        self.directed = self.algo != self.base
        self.own = own_settings(self.config)

    def value(self, name):
        """A setting's value; None where it does not apply, or in a run from before it existed."""
        return plain(self.config.get(name))

    def identity(self):
        """What is equal for the runs of a line, as text."""
        return json.dumps([self.algo, self.own], sort_keys=True)


# --- settings ---


def own_settings(config):
    """The settings that are not at the default of the run's own algorithm and task family: {name:
    value}.

    So a run from before a setting existed, which has its default, is like one that gives the
    default.
    """
    env, algo = FAMILIES.get(config["env"]), config["algo"]
    follows = following(config, env)
    own = {}
    for setting in COMPARED:
        name, value = setting.name, plain(config.get(setting.name))
        default = plain(default_of(setting, env, algo))
        if value not in (None, default) and not close(value, follows.get(name)):
            own[name] = value
    return own


def following(config, env):
    """What run.py takes for settings that are not given, from those that are: {name: value}."""
    alpha = config.get("alpha") or default_of(ALL_SETTINGS["alpha"], env, config["algo"])
    return {"beta_alpha": alpha * config["beta"], "lambda_": 1 / alpha, "eval_alpha": alpha}


def close(value, other):
    return other is not None and isinstance(value, float) and math.isclose(value, other)


def plain(value):
    """A setting's value as JSON has it: numbers are floats, (64,) and [64] are 64, and off is
    None."""
    value = json.loads(json.dumps(value), parse_int=float)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return None if value is False else value


# --- lines ---


def lines_of(runs):
    """{label: runs}, runs of a line differing in their seeds alone. The label is the algorithm and
    every setting in which lines differ; the undirected algorithm stands before the directed one,
    and each by its settings."""
    found = {}
    for run in runs:
        found.setdefault(run.identity(), []).append(run)
    lines = list(found.values())
    varying = [setting for setting in COMPARED if varies(setting.name, runs)]
    order = learner_order(runs)

    def place(line):
        values = [value_of(line, setting.name) for setting in varying]
        return order.index(line[0].base), line[0].directed, [sorting_key(value) for value in values]

    labels = {}
    for line in sorted(lines, key=place):
        label = label_of(line, varying)
        if label in labels:  # they differ in what it does not show, as the seventh digit
            label = f"{label} ({len(labels) + 1})"
        labels[label] = line
    return labels


def learner_order(runs):
    """The names of all undirected algorithms in their order: those of the table, then others."""
    others = sorted({run.base for run in runs} - set(KNOWN))
    return [*KNOWN, *others]


def varies(name, runs):
    """Whether runs differ in a setting. Not where each is at the default of its own algorithm."""
    values = {json.dumps(run.value(name)) for run in runs}
    return len(values) > 1 and any(name in run.own for run in runs)


def value_of(line, name):
    """A line's value of a setting: that of any run that has it."""
    return next((run.value(name) for run in line if run.value(name) is not None), None)


def sorting_key(value):
    """Numbers by size, before all else by its text; what has no value comes first."""
    if value is None:
        return 0, 0.0, ""
    if isinstance(value, float):
        return 1, value, ""
    return 2, 0.0, json.dumps(value)


def label_of(line, varying):
    parts = [line[0].algo]
    for setting in varying:
        value = value_of(line, setting.name)
        if value is not None:
            parts.append(f"{setting.letter or setting.name} = {setting_text(value)}")
    return ", ".join(parts)


def counterpart(run, labels):
    """The label of the undirected runs, or else those with δ = 0, that differ from this one in
    nothing but the δ-step; "" where there are none."""
    if not run.directed or not run.value("delta"):
        return ""
    own = without_delta_step(run)
    alike = {label: line[0] for label, line in labels.items() if without_delta_step(line[0]) == own}
    for label, other in alike.items():
        if other.algo == run.base:
            return label
    for label, other in alike.items():
        if other.algo == run.algo and other.value("delta") == 0:
            return label
    return ""


def without_delta_step(run):
    return {name: value for name, value in run.own.items() if name not in DELTA_STEP}


def values_of(key, labels):
    """All values of a setting, as text; "" where it is not given."""
    values = dict.fromkeys(run.config.get(key) for runs in labels.values() for run in runs)
    return " or ".join(setting_text(value) for value in values if value is not None)


def title(labels):
    """What was learned how: "cartpole, pg"."""
    return f"{values_of('env', labels)}, {values_of('rl', labels)}"


# --- reading ---


def read(root):
    """All runs under root as {label: [run, ..]}, and a message for each that is left out."""
    runs, left_out = {}, []
    for path in sorted(Path(root).glob("**/config.json")):
        try:
            runs[path.parent] = read_run(path.parent)
        except ValueError as error:
            left_out.append(str(error))
    runs = {folder: run for folder, run in runs.items() if len(run.log["epoch"])}
    for drop in (drop_other_tasks, drop_duplicates, drop_other_grids):
        for folder, why in drop(runs).items():
            del runs[folder]
            left_out.append(f"{folder}: {why}")
    messages = [printable(f"{line}; the run is left out of the report") for line in left_out]
    return lines_of(list(runs.values())), messages


def drop_other_tasks(runs):
    """Runs whose φ is not that of most runs, as {folder: why}."""
    if not runs:
        return {}
    most, _ = Counter(" ".join(run.config["phi_names"]) for run in runs.values()).most_common(1)[0]
    names = {folder: " ".join(run.config["phi_names"]) for folder, run in runs.items()}
    return {x: f"its φ is {name}, that of most runs {most}" for x, name in names.items() if name != most}


def drop_duplicates(runs):
    """Runs that are there twice, as {folder: why}."""
    first, dropped = {}, {}
    for folder, run in runs.items():
        same = first.setdefault((run.identity(), run.config["seed"]), folder)
        if same != folder:
            dropped[folder] = f"the same settings and seed as {same}"
    return dropped


def drop_other_grids(runs):
    """Runs whose held-out tasks are not those of most runs of their line, as {folder: why}."""
    grids = {}
    for run in runs.values():
        if run.evaluation:
            grids.setdefault(run.identity(), Counter())[tuple(run.evaluation.tasks)] += 1
    dropped = {}
    for folder, run in runs.items():
        if run.evaluation:
            most, _ = grids[run.identity()].most_common(1)[0]
            if tuple(run.evaluation.tasks) != most:
                dropped[folder] = "its held-out tasks are not those of the other runs of its line"
    return dropped


def read_run(folder):
    """A run. Raises ValueError that names the file and what is wrong with it."""
    config = read_file(folder / "config.json", parse_config)
    log = read_file(folder / "log.csv", parse_log)
    evaluation = read_file(folder / "eval.csv", lambda text: parse_evaluation(text, config))
    if not len(log["epoch"]) and (folder / CHECKPOINT).exists():
        raise ValueError(f"{folder / 'log.csv'}: holds no epochs, though there is a {CHECKPOINT}")
    return LoggedRun(config, log, evaluation, (folder / FAILED).exists())


class OlderFormat(ValueError):
    """A run that is not damaged, but of an earlier version."""


def read_file(path, parse):
    """What `parse` makes of a file's text, "" where there is none."""
    try:
        return parse(read_text(path))
    except OlderFormat as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # a stranger's file may be wrong in every way, and must not stop the report
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {str(error)[:100]})") from error


def read_text(path):
    """A regular file's text: others, such as a FIFO, may never end."""
    if not path.exists():
        return ""
    if not path.is_file():
        raise ValueError("it is not a regular file")
    if path.stat().st_size > LARGEST[path.name]:
        raise ValueError(f"it is larger than {LARGEST[path.name] / 1e6:g} MB")
    return path.read_text(encoding="utf-8")


NUMBER = (int, float)
OPTIONAL = (int, float, type(None))
KINDS = {"env": str, "rl": str, "algo": str, "seed": int, "phi_names": list, "range": list}
KINDS |= {"beta": NUMBER, "inner_steps": int, "eval_steps": int, "values": (list, type(None))}
KINDS |= dict.fromkeys(("alpha", "delta", "beta_alpha", "lambda_", "eval_alpha", "threshold"), OPTIONAL)


def parse_config(text):
    config = cleaned(json.loads(text))
    if "range" not in config and {"low", "high"} <= config.keys():
        raise OlderFormat("written by an earlier version of this code; report on it with that version, or train anew")
    for key, kind in KINDS.items():
        check(key, config.get(key), kind)
    names, bounds = config["phi_names"], config["range"]
    for key, kind in (("phi_names", str), ("range", NUMBER), ("values", NUMBER)):
        for x in config.get(key) or []:
            check(key, x, kind)
    if not names or len(bounds) != 2 * len(names):
        raise ValueError(f"phi_names is {names!r}, range is {bounds!r}")
    if min(config["inner_steps"], config["eval_steps"]) < 0:
        raise ValueError("inner_steps or eval_steps is negative")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", config["algo"]):
        raise ValueError(f"algo is {config['algo']!r}")
    return config


def check(key, value, kind):
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}")


def cleaned(x):
    """JSON, its texts made printable. Raises ValueError for long texts, and for numbers that
    overflow."""
    if isinstance(x, dict):
        return {cleaned(key): cleaned(value) for key, value in x.items()}
    if isinstance(x, list):
        return [cleaned(value) for value in x]
    if isinstance(x, str) and len(x) > LONGEST:
        raise ValueError(f"a text of {len(x)} characters")
    if isinstance(x, NUMBER) and not abs(x) <= HUGE:  # nor NaN
        raise ValueError(f"a number is {x!r:.30}")
    return printable(x) if isinstance(x, str) else x


def parse_rows(text):
    """The rows of a CSV file as dicts. The last one may be half there: another process writes it,
    or was killed."""
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.DictReader(whole.splitlines(), restkey="more", restval=None))
    if any("more" in row or None in row.values() for row in rows):
        raise ValueError("a row has other columns than the header")
    return rows


def numbers(texts):
    """(N,) of texts; an empty one is NaN."""
    values = np.array([float(text or "nan") for text in texts])
    if (abs(values[np.isfinite(values)]) > HUGE).any():
        raise ValueError(f"a number is beyond {HUGE:g}")
    return values


def parse_log(text):
    """{column: (E,)}."""
    rows = parse_rows(text)
    if not rows:
        return {"epoch": np.array([])}
    log = {key: numbers([row[key] for row in rows]) for key in rows[0]}
    if not {"epoch", "env_steps", "seconds", "return_post"} <= log.keys():
        raise ValueError("a column is missing")
    if not np.array_equal(log["epoch"], np.arange(1, len(rows) + 1)):
        raise ValueError("the epochs are not 1, 2, ..")
    for key, least in (("env_steps", 1), ("seconds", 0)):
        values = log[key]
        if not np.isfinite(values).all() or values[0] < least or (np.diff(values) < 0).any():
            raise ValueError(f"the column {key} does not count up")
    return log


def parse_evaluation(text, config):
    """The last complete evaluation, or None. Its rows are each task's returns after 0, 1, ..
    steps, task by task."""
    steps = config["eval_steps"] + 1
    by_epoch = {}
    for row in parse_rows(text):
        by_epoch.setdefault(int(row["epoch"]), []).append(row)
    for epoch, rows in by_epoch.items():
        if [int(row["step"]) for row in rows] != [i % steps for i in range(len(rows))]:
            raise ValueError(f"the steps of epoch {epoch} are not 0 to {steps - 1} of each task")
        if not 0 < epoch < 10**12:
            raise ValueError(f"an epoch is {epoch}")
    most = max(map(len, by_epoch.values()), default=0)
    if most < steps or most % steps:  # none yet: it stopped inside the first
        return None
    epoch, rows = [(epoch, rows) for epoch, rows in by_epoch.items() if len(rows) == most][-1]
    tasks = [row["phi"] for row in rows[::steps]]
    if [row["phi"] for row in rows] != [task for task in tasks for _ in range(steps)]:
        raise ValueError(f"the rows of epoch {epoch} are not task by task")
    phi = np.array([numbers(task.split()) for task in tasks])
    if phi.shape != (len(tasks), len(config["phi_names"])) or not np.isfinite(phi).all():
        raise ValueError(f"a φ does not consist of {config['phi_names']}")
    returns = numbers([row["return"] for row in rows]).reshape(-1, steps).T
    return Evaluation(epoch, tasks, phi, returns)
