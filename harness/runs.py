"""Run folders as the report reads them, and its lines: runs that differ in their seeds alone.

A folder may hold untrusted runs: one that cannot be read is left out with one line.
"""

import csv
import json
import math
import re
from collections import ChainMap
from dataclasses import dataclass
from pathlib import Path
from statistics import mode

import numpy as np

import maml
from harness.checkpoints import CHECKPOINT, FAILED, HUGE, is_info
from harness.gyms import FAMILIES
from harness.settings import ALL_SETTINGS, default_of
from harness.text import printable, setting_text

# What is the same for the runs of a line, besides the algorithm: all that makes a run that run, and
# the threshold, from which convergence is counted.
COMPARED = [x for x in ALL_SETTINGS.values() if x.identity or x.name == "threshold"]
COMPARED = [x for x in COMPARED if x.name not in ("algo", "seed")]
# What a directed run and its counterpart differ in, besides the algorithm.
DELTA_STEP = {x.name for x in COMPARED if x.needs == ALL_SETTINGS["delta"].needs}

LARGEST = {"config.json": 10**6, "log.csv": 10**8, "eval.csv": 10**8}  # bytes, of a million epochs
LONGEST = 200  # characters of a text in config.json

# What config.json holds; [kind]: a list of those.
NUMBER = (int, float)
REQUIRED = {"env": str, "rl": str, "algo": str, "seed": int, "phi_names": [str], "range": [NUMBER]}
REQUIRED |= {"beta": NUMBER, "inner_steps": int, "eval_steps": int}
OPTIONAL = {"alpha": NUMBER, "delta": NUMBER, "threshold": NUMBER, "values": [NUMBER]}


@dataclass
class LoggedRun:
    """A run as its files say it."""

    config: dict
    log: dict  # {column of log.csv: (E,)}
    # The last that is complete: epoch, phi (G, P), returns (steps + 1, G), and of what the environment
    # reports info, {name: (steps + 1, G)}.
    evaluation: dict | None
    failed: bool

    def __post_init__(self):
        self.algo = self.config["algo"]
        self.base = self.algo.removeprefix("directed-")
        self.directed = self.algo != self.base
        values = {x.name: plain(self.config.get(x.name)) for x in COMPARED}
        self.settings = {name: value for name, value in values.items() if value is not None}
        self.own = own_settings(self.settings, self.algo)
        self.besides_delta = {x: value for x, value in self.own.items() if x not in DELTA_STEP}
        self.line = json.dumps([self.algo, self.own])  # that of all runs of a line


# --- settings ---


def plain(value):
    """A setting's value as JSON has it: numbers are floats, (64,) and [64] are 64, off is None."""
    value = json.loads(json.dumps(value), parse_int=float)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return None if value is False else value


def own_settings(settings, algo):
    """The settings that are not at the default of the run's own algorithm and task family. So a
    run from before a setting existed is like one that has its default."""
    env = FAMILIES.get(settings["env"])
    defaults = {x.name: plain(default_of(x, env, algo)) for x in COMPARED}
    alpha = settings.get("alpha") or defaults["alpha"]
    # These follow from others in run.py.
    defaults |= {"beta_alpha": alpha * settings["beta"], "lambda_": 1 / alpha, "eval_alpha": alpha}
    return {name: value for name, value in settings.items() if value != defaults[name]}


# --- lines ---


def lines_of(runs):
    """{label: runs of a line}. The label is the algorithm and every setting in which lines differ;
    the undirected algorithm stands before the directed one, and each by its settings."""
    lines = {}
    for run in runs:
        lines.setdefault(run.line, []).append(run)
    varying = [x for x in COMPARED if varies(x.name, runs)]
    order = learner_order(runs)

    def place(line):
        values = [sorting_key(value_of(line, x.name)) for x in varying]
        return order.index(line[0].base), line[0].directed, values

    labels = {}
    for line in sorted(lines.values(), key=place):
        values = [(x.letter or x.name, value_of(line, x.name)) for x in varying]
        shown = [f"{name} = {setting_text(value)}" for name, value in values if value is not None]
        label = ", ".join([line[0].algo, *shown])
        if label in labels:  # they differ in what it does not show, as the seventh digit
            label = f"{label} ({len(labels) + 1})"
        labels[label] = line
    return labels


def value_of(line, name):
    """A line's value of a setting: that of any run that has it."""
    return ChainMap(*(run.settings for run in line)).get(name)


def varies(name, runs):
    """Whether runs differ in a setting. Not where each is at the default of its own algorithm."""
    values = {json.dumps(run.settings.get(name)) for run in runs}
    return len(values) > 1 and any(name in run.own for run in runs)


def learner_order(runs):
    """The names of all undirected algorithms in their order: those of the table, then others."""
    return [*maml.LEARNERS, *sorted({run.base for run in runs} - set(maml.LEARNERS))]


def sorting_key(value):
    """No value comes first, then numbers by size, then all else by its text."""
    number = value if isinstance(value, float) else math.inf
    return value is not None, number, json.dumps(value)


def counterpart(run, labels):
    """The label of the undirected runs, or else those with δ = 0, that differ from this one in
    nothing but the δ-step; "" where there are none."""
    if not run.settings.get("delta"):
        return ""
    alike = {}  # {(algorithm, δ): label}
    for label, line in labels.items():
        other = line[0]
        if other.besides_delta == run.besides_delta:
            alike.setdefault((other.algo, other.settings.get("delta")), label)
    return alike.get((run.base, None)) or alike.get((run.algo, 0), "")


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
            run = read_run(path.parent)
        except ValueError as error:
            left_out.append(str(error))
            continue
        if len(run.log["epoch"]):
            runs[path.parent] = run
    for folder, why in misfits(runs).items():
        del runs[folder]
        left_out.append(f"{folder}: {why}")
    messages = [printable(f"{line}; the run is left out of the report") for line in left_out]
    return lines_of(list(runs.values())), messages


def misfits(runs):
    """Runs that cannot stand beside the others, as {folder: why}."""
    names = {folder: " ".join(run.config["phi_names"]) for folder, run in runs.items()}
    most = mode(names.values()) if names else ""
    grids = {}  # of each line
    for run in runs.values():
        if run.evaluation:
            grids.setdefault(run.line, []).append(run.evaluation["phi"].tobytes())
    first, found = {}, {}
    for folder, run in runs.items():
        key = run.line, run.config["seed"]
        if names[folder] != most:
            found[folder] = f"its φ is {names[folder]}, that of most runs {most}"
        elif first.setdefault(key, folder) != folder:
            found[folder] = f"the same settings and seed as {first[key]}"
        elif run.evaluation and run.evaluation["phi"].tobytes() != mode(grids[run.line]):
            found[folder] = "its held-out tasks are not those of the other runs of its line"
    return found


def read_run(folder):
    """A run. Raises ValueError that names the file and what is wrong with it."""
    config = read_file(folder / "config.json", parse_config)
    log = read_file(folder / "log.csv", parse_log)
    evaluation = read_file(folder / "eval.csv", lambda text: parse_evaluation(text, config))
    if not len(log["epoch"]) and (folder / CHECKPOINT).exists():
        raise ValueError(f"{folder / 'log.csv'}: holds no epochs, though there is a {CHECKPOINT}")
    return LoggedRun(config, log, evaluation, (folder / FAILED).exists())


def read_file(path, parse):
    """What `parse` makes of a file's text, "" where there is none."""
    try:
        if not path.exists():
            return parse("")
        if not path.is_file():  # e.g. a FIFO, which may never end
            raise ValueError("it is not a regular file")
        if path.stat().st_size > LARGEST[path.name]:
            raise ValueError(f"it is larger than {LARGEST[path.name] / 1e6:g} MB")
        return parse(path.read_text(encoding="utf-8"))
    except Exception as error:  # whatever is wrong with it must not stop the report
        what = f"{type(error).__name__}: {str(error)[:100]}"
        raise ValueError(f"{path}: cannot be read ({what})") from error


def parse_config(text):
    config = cleaned(json.loads(text))
    if "range" not in config and {"low", "high"} <= config.keys():
        remedy = "report on it with that version, or train anew"
        raise ValueError(f"written by an earlier version of this code; {remedy}")
    optional = {key: kind for key, kind in OPTIONAL.items() if config.get(key) is not None}
    for key, kind in (REQUIRED | optional).items():
        if not is_of(kind, config.get(key)):
            raise ValueError(f"{key} is {config.get(key)!r}")
    names, bounds = config["phi_names"], config["range"]
    if not names or len(bounds) != 2 * len(names):
        raise ValueError(f"phi_names is {names!r}, range is {bounds!r}")
    if min(config["inner_steps"], config["eval_steps"]) < 0:
        raise ValueError("inner_steps or eval_steps is negative")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", config["algo"]):  # a label begins with it
        raise ValueError(f"algo is {config['algo']!r}")
    return config


def is_of(kind, value):
    """Whether a value is of a type, or a list of one."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(is_of(kind[0], x) for x in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def cleaned(x):
    """JSON with printable texts. Raises ValueError for long ones, and for numbers that overflow."""
    if isinstance(x, dict):
        return {key: cleaned(value) for key, value in x.items()}
    if isinstance(x, list):
        return [cleaned(value) for value in x]
    if isinstance(x, str) and len(x) > LONGEST:
        raise ValueError(f"a text of {len(x)} characters")
    if isinstance(x, NUMBER) and not abs(x) <= HUGE:  # nor NaN
        raise ValueError(f"a number is {x!r:.30}")
    return printable(x) if isinstance(x, str) else x


def parse_rows(text):
    """The rows of a CSV file as dicts, without half a row at the end, written just now or never."""
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.DictReader(whole.splitlines()))
    if any(None in row or None in row.values() for row in rows):  # longer or shorter
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
    """The last complete evaluation, or None; rows are task by task, each after 0, 1, .. steps."""
    steps = config["eval_steps"] + 1
    by_epoch = {}
    for row in parse_rows(text):
        epoch = int(float(row["epoch"]))  # of infinity an OverflowError
        rows = by_epoch.setdefault(epoch, [])
        step = len(rows) % steps
        if int(row["step"]) != step or (step and row["phi"] != rows[-1]["phi"]):
            raise ValueError(f"epoch {epoch} is not task by task, each step 0 to {steps - 1}")
        rows.append(row)
    complete = max(map(len, by_epoch.values()), default=0)
    if complete < steps or complete % steps:  # it stopped inside the first
        return None
    *_, epoch = (epoch for epoch, rows in by_epoch.items() if len(rows) == complete)
    rows = by_epoch[epoch]
    phi = np.array([numbers(row["phi"].split()) for row in rows[::steps]])
    if phi.shape[1:] != (len(config["phi_names"]),) or not np.isfinite(phi).all():
        raise ValueError(f"a φ does not consist of {config['phi_names']}")

    def by_steps(column):
        return numbers([row[column] for row in rows]).reshape(-1, steps).T

    info = {name: by_steps(name) for name in rows[0] if is_info(name)}
    return {"epoch": epoch, "phi": phi, "returns": by_steps("return"), "info": info}
