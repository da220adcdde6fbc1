"""Whether two folders of runs hold the same to the last bit, their times aside."""

import csv

import torch

from harness import checkpoints

TIMES = ("seconds", "sample_seconds")


def rows(path):
    """The rows of a CSV file without its time columns."""
    with open(path, newline="") as file:
        return [{key: x for key, x in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def without_times(state):
    totals = {key: x for key, x in state["totals"].items() if key not in TIMES}
    timed = [checkpoints.TABLES["log"].index(column) for column in TIMES]
    log = [[x for i, x in enumerate(row) if i not in timed] for row in state["log"]]
    return state | {"totals": totals, "log": log}


def equal(a, b):
    """Bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def differences(whole, killed, runs="seed*"):
    """What differs between the runs under two folders, their times and the reports on them aside: list of lines.

    runs: the end of the runs' folders, a pattern. Raises ValueError where there is none.
    """
    found = []
    paths = {path.relative_to(out) for out in (whole, killed) for path in out.rglob(f"{runs}/*")}
    if not paths:
        raise ValueError(f"no {runs} under {whole} or {killed}")
    for path in sorted(paths):
        if not ((whole / path).exists() and (killed / path).exists()):
            found.append(f"{path}: in one folder alone")
        elif path.suffix == ".csv" and rows(whole / path) != rows(killed / path):
            found.append(f"{path}: other rows")
        elif path.suffix == ".pt":
            states = [without_times(torch.load(out / path, weights_only=True)) for out in (whole, killed)]
            if not equal(*states):
                found.append(f"{path}: another state")
    return found
