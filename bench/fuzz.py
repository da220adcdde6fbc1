"""Random command lines, right and wrong, from run.py's table of settings. Run by `python bench/torture.py --kind fuzz`.

A line that is meant to be right must train; every other one must train too, or end in exactly one line on standard
error that begins with "run.py: ". A usage error (exit code 2) leaves all files as they were.
"""

import argparse
import contextlib
import io
import json
import random
import shlex
import shutil
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

import envs
import run
from harness import figures, gyms
from harness.settings import ALL_SETTINGS, applies, learner_of

PENDULUM = envs.Env(("g",), (5.0,), (15.0,), 200, 3, ((-2.0,), (2.0,)), 1, None)  # what right_line knows of it
# All small, since what is accepted is trained. Those that a setting's type accepts are right for it, others wrong.
NUMBERS = ["0", "1", "2", "3", "0.5", "0.001", "-1", "1e-4"]
WRONG = [
    "",
    "x",
    "nan",
    "inf",
    "-inf",
    "-7",
    "1e999",
    "1.5.2",
    "0x1",
    "1,2",
    "−1",
    "5-15",
    "9" * 5000,
    "\udcff",
    "--",
    "-",
]
HUGE = [  # more than the machine has: of bits, of memory (refused before any of it is used), of devices
    *([flag, "9" * 25] for flag in ("--tasks", "--trajectories", "--horizon", "--hidden", "--seed", "--eval-steps")),
    *([flag, str(2**63)] for flag in ("--tasks", "--trajectories", "--horizon", "--hidden", "--seed", "--eval-every")),
    ["--hidden", "100000", "1000000000"],
    ["--device", "cuda"],
]
# Chosen by `fuzz` itself, or never: --debug adds a traceback to the line.
FOLDERS = ("out", "watch", "report", "like", "resume", "overwrite", "debug")
SMALL = {"tasks": "2", "trajectories": "2", "horizon": "3", "hidden": "3", "epochs": "1", "eval_steps": "1"}
SMALL |= {"workers": "0", "inner_steps": "1"}


def accepted(setting, words):
    """Those of the words that the setting's type accepts."""

    def accepts(word):
        try:
            setting.type(word)
        except (argparse.ArgumentTypeError, ValueError):
            return False
        return True

    return [word for word in words if accepts(word)]


def right_values(setting, rng, env):
    """Words after the flag that are right for a task family."""
    if setting.type is bool:
        return []
    if setting.name == "device":
        return [rng.choice(["auto", "cpu"])]
    if setting.words:
        return rng.sample(setting.words, rng.randint(1, 2) if setting.nargs else 1)
    if setting.name in ("range", "eval_range"):
        return [str(x) for low, high in zip(env.low, env.high, strict=True) for x in (low, rng.choice([low, high]))]
    if setting.name in ("values", "eval_values"):
        return [str(x) for task in (env.low, env.high) for x in task]
    if setting.name in ("medium", "phi"):
        words = [*envs.MEDIUM_TASKS, None] if setting.name == "medium" else [None]
        word = rng.choice(words)
        return [word] if word else [str(x) for x in env.low]
    if setting.name == "make":
        return ["g=10"]
    words = accepted(setting, NUMBERS)
    return rng.sample(words, rng.randint(1, min(2, len(words))) if setting.nargs else 1)


def right_line(rng):
    """A command line that must train: [flag, its words] for each flag. Not yet with a folder."""
    name = rng.choice([*gyms.FAMILIES, "Pendulum-v1"])
    env = gyms.FAMILIES.get(name, PENDULUM)
    line = {"env": [name], "algo": right_values(ALL_SETTINGS["algo"], rng, env)}
    if env is PENDULUM:
        line |= {"param": ["g"], "range": ["5", "15"], "make": ["render_mode=None"]}
    chosen = [s for s in ALL_SETTINGS.values() if s.name not in (*line, *FOLDERS, "param", "make")]
    for setting in chosen:
        if rng.random() < 0.25:
            line[setting.name] = right_values(setting, rng, env)
        elif setting.name in SMALL:
            line[setting.name] = [SMALL[setting.name]]
    for name, excluded in (("values", ("range", "task_dist")), ("eval_values", ("eval_range",))):
        for other in excluded if name in line else ():
            line.pop(other, None)
    if "values" in line:  # whose mean may be no task
        line.setdefault("medium", ["random"])
    if line["inner_steps"] == ["0"]:  # joint training, which not every learner has
        line["inner_steps"] = ["1"]
    needs_steps = not all(learner_of(algo).joint_training for algo in line["algo"])
    if needs_steps and "0" in line.get("alpha", []):
        line["alpha"] = ["1"]  # α = 0 is joint training too
    if "lambda_" in line:
        line["lambda_"] = ["0.5"]  # α λ is below 2 for every α of NUMBERS
    if line["trajectories"] == ["1"]:  # too few for most baselines
        line["trajectories"] = ["2"]
    if line.get("medium") == ["pooled"]:  # K a multiple of M
        line |= {"tasks": ["1"]}
    if line.get("outer_steps", ["1"]) != ["1"]:  # the one estimator with a likelihood ratio
        line["estimator"] = ["lvc"]
    args = namespace(line)
    for setting in chosen:  # a flag that does nothing is an error
        if not any(applies(setting, args, algo) for algo in line["algo"]):
            line.pop(setting.name, None)
    if line.get("delta_schedule") == ["converged"] and env is PENDULUM:
        line.setdefault("threshold", ["1"])
    return [[ALL_SETTINGS[name].flag, *words] for name, words in line.items()]


def namespace(line):
    """What settings.parse makes of a right line's flags."""
    args = argparse.Namespace(**dict.fromkeys(ALL_SETTINGS))
    for name, words in line.items():
        values = [ALL_SETTINGS[name].type(word) for word in words or [True]]
        setattr(args, name, values if ALL_SETTINGS[name].nargs else values[0])
    return args


def spoil(line, rng):
    """The line with something changed that is most often wrong."""
    i = rng.randrange(len(line))
    flag, *words = line[i]
    kind = rng.randrange(10)
    setting = rng.choice(list(ALL_SETTINGS.values()))
    if kind == 0:  # a wrong value
        line[i] = [flag, *words[:-1], rng.choice(WRONG)]
    elif kind == 1:  # a value too many, or none
        line[i] = [flag, *words, rng.choice(NUMBERS + WRONG)] if rng.random() < 0.5 else [flag]
    elif kind == 2:  # a flag left out
        del line[i]
    elif kind == 3:  # a flag misspelt
        j = rng.randrange(len(flag))
        line[i] = [flag[:j] + rng.choice(["", "x", "-"]) + flag[j + 1 :], *words]
    elif kind == 4:  # any flag with whatever it accepts, though it may need another one, or be given twice
        if setting.name not in FOLDERS:
            line.append([setting.flag, *right_values(setting, rng, rng.choice(list(gyms.FAMILIES.values())))])
    elif kind == 9:  # what argparse takes for an empty list
        line[i] = [f"{flag}=--"]
    elif kind == 5:  # a value that is given twice
        line[i] = [flag, *words, *words]
    elif kind == 6:  # another environment
        line[0] = [
            "--env",
            rng.choice([*gyms.FAMILIES, "cartpol", "CartPole-v1", "Blackjack-v1", "mine:Env-v0", "Pong", ":"]),
        ]
    elif kind == 7:  # any flag with a wrong value
        words = [rng.choice(WRONG)] if rng.random() < 0.7 else rng.sample(NUMBERS, 2)
        if setting.name not in FOLDERS:
            line.append([setting.flag, *words])
    else:
        line.append(rng.choice(HUGE))
    return line


def files_in(folder):
    """{path: content} of a folder, itself included; {} where there is none."""
    paths = [folder, *folder.rglob("*")] if folder.exists() else []
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def command(words):
    """Run run.py in this process: exit code, standard error, traceback or ""."""
    error, trace, code = io.StringIO(), "", 0
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            run.main(words)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            trace = traceback.format_exc()
    return code, error.getvalue(), trace


def wrong_with(code, error, trace, right):
    """What an outcome violates, in words; "" if nothing."""
    if trace:
        return "a traceback"
    lines = [line for line in error.splitlines() if not line.startswith("warning: ")]
    if not all(line.startswith("run.py: ") for line in lines):
        return "standard error holds other lines"
    diverged = code == 1 and lines and all("is not finite" in line for line in lines)  # one line for each run
    if code == 0 and lines:
        return "exit code 0 with an error"
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if code and len(lines) != 1 and not diverged:
        return f"{len(lines)} lines of errors"
    if right and code and not diverged:
        return "a right command line was refused"
    return ""


@dataclass
class Fuzz:
    """What came of all command lines: how many trained and were refused, the flags in each, and what is wrong."""

    outcomes: Counter = field(default_factory=Counter)
    flags: dict = field(default_factory=lambda: {"trained": Counter(), "refused": Counter()})
    findings: list = field(default_factory=list)


def in_folder(line, right, rng, folder, previous):
    """The line with flags that concern files: a new --out, or the one of the line before. Returns it, the folder, and
    whether it must train."""
    place = rng.random()
    if place < 0.8 or previous is None:
        return [*line, ["--out", str(folder)]], folder, right
    before, out = previous
    if place < 0.9:  # once more what was there: with --resume or --overwrite it is right again
        switches = rng.sample(["--resume", "--overwrite"], rng.randrange(3))
        return [*before, *([flag] for flag in switches), ["--out", str(out)]], out, len(switches) == 1
    if place < 0.95:  # something else, in the same folder
        return [*line, ["--out", str(out)], [rng.choice(["--resume", "--overwrite", "--quiet"])]], out, False
    path = rng.choice(list(out.rglob("config.json")))
    if place < 0.975:
        others = rng.choice([[], [rng.choice(line)]])
        small = [["--epochs", "1"], ["--workers", "1"]]  # which are not taken from the run
        return [["--like", str(path.parent)], ["--out", str(folder)], *small, *others], folder, not others
    low = json.loads(path.read_text())["range"][::2]
    right_ones = rng.choice([[], [["--phi", *map(str, low)]]])
    others = rng.choice([[], [rng.choice(line)]])
    return [["--watch", str(rng.choice([path.parent, path.parent, out]))], *right_ones, *others], out, False


def fuzz(count, seed, show_bar=False):
    """So many command lines, and what came of them."""
    rng, result, previous = random.Random(seed), Fuzz(), None
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(figures, "draw", lambda labels, root: []),  # they take seconds
        mock.patch.object(torch, "set_num_threads"),  # a command must not fork after another used several threads
    ):
        for i in tqdm(range(count), "fuzz", disable=None if show_bar else True):
            right = rng.random() < 0.4
            line = right_line(rng)
            for _ in range(0 if right else rng.randint(1, 2)):
                line = spoil(line or [["--env", "point"]], rng)
            if not any(flag == "--epochs" for flag, *_ in line):  # the default takes minutes
                line.append(["--epochs", "1"])
            rng.shuffle(line)
            line, out, right = in_folder(line, right, rng, Path(folder) / str(i), previous)
            words = [word for part in line for word in part]
            before = files_in(out)
            code, error, trace = command(words)
            changed = code == 2 and files_in(out) != before
            problem = "a usage error changed files" if changed else wrong_with(code, error, trace, right)
            if problem:
                result.findings.append(f"{problem}: run.py {shlex.join(words)}\n{(error + trace)[-1500:]}")
            outcome = "refused" if code else "trained"
            result.outcomes[outcome] += 1
            result.flags[outcome].update({flag for flag, *_ in line})
            done = [out, *(previous or [])[1:]]
            if not {"--watch", "--like"} & set(words):
                again = [part for part in line if part[0] not in ("--out", "--resume", "--overwrite")]
                previous = (again, out) if code == 0 and not trace else None
            for place in done:
                if previous is None or place != previous[1]:
                    shutil.rmtree(place, ignore_errors=True)
    return result


def lines(limit, seed):
    """So many random command lines: (how many, what was found)."""
    result = fuzz(limit, seed, show_bar=True)
    print(f"{limit} command lines: {result.outcomes['trained']} trained, {result.outcomes['refused']} refused")
    for outcome, flags in result.flags.items():
        missing = [setting.flag for setting in ALL_SETTINGS.values() if setting.flag not in flags]
        print(f"flags in none that {'was ' * (outcome == 'refused')}{outcome}: {', '.join(missing) or 'none'}")
    return limit, result.findings
