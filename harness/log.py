"""What an epoch leaves to log, and the rows of log.csv and eval.csv on their way to the disk."""

import math
import time
from collections import defaultdict

import torch

from harness import checkpoints, measures
from harness.gyms import info_names

SECONDS = 1  # between two writes: opening the files of 256 runs takes longer than their epoch


class Rows:
    """Keeps the rows of runs and appends them to their files when SECONDS have passed, when asked, and at the end.

    What a kill -9 loses is in the checkpoint, or is trained again, and --resume writes the files anew.
    """

    def __init__(self, writes=True):
        self.writes, self.kept, self.written = writes, defaultdict(list), time.monotonic()

    def add(self, run, table, rows):
        run.state[table] += rows
        self.kept[run, table] += rows
        if time.monotonic() - self.written > SECONDS:
            self.append()

    def append(self):
        kept, self.kept = self.kept, defaultdict(list)
        for (run, table), rows in kept.items():
            if self.writes:
                checkpoints.append_rows(run, table, rows)
        self.written = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.append()


SUMS = ("pre", "post", "env_steps", "broken", "kl")  # what each rank measures of its own tasks alone


@torch.no_grad()
def measure(batch, medium_loss, task_loss, delta_move, beta_move):
    """What there is to log of an epoch: {name: (S,) in float64}; those of SUMS are sums over this rank's tasks.

    delta_move, beta_move: how far the δ-step and the β-steps moved θ, (S, N).
    """
    after = batch.settings["inner_steps"]  # the call that drew under θ'; Sharp-MAML goes on elsewhere
    delta_move, beta_move = delta_move.double(), beta_move.double()
    finite = torch.stack([p.isfinite().flatten(1).all(1) for p in batch.learned]).all(0)
    measured = {
        "pre": task_loss.returns[0].double().sum(1),
        "post": task_loss.returns[after].double().sum(1),
        "env_steps": task_loss.env_steps,
        "broken": ~task_loss.finite,
        "beta_norm": beta_move.square().sum(1).sqrt(),
    }
    kl = task_loss.kl(batch.theta)
    if kl is not None:
        measured["kl"] = kl.sum(1)
    if medium_loss is not None:
        finite = finite & medium_loss.finite
        measured |= {
            "med": medium_loss.returns[0].double().mean(1),
            "medium_steps": medium_loss.env_steps,
            "delta_norm": delta_move.square().sum(1).sqrt(),
            "product": (delta_move * beta_move).sum(1),
        }
    return {name: x.double() for name, x in measured.items()} | {"finite": finite.double()}


def fetched(measured):
    """`measure`'s tensors on the CPU, in one transfer, for which a GPU is waited."""
    return dict(zip(measured, torch.stack(list(measured.values())).cpu(), strict=True))


def log_epoch(batch, measured, seconds):
    """Add the epoch to every run's totals and log; returns for each run whether its losses and parameters are
    finite."""
    num_runs, num_tasks = len(batch.runs), batch.settings["tasks"]
    batch.ranks.sum([measured[name] for name in SUMS if name in measured])  # but all know the whole medium task
    finite = (measured["finite"] > 0) & (measured["broken"] == 0)
    measured |= {name: measured[name] / num_tasks for name in ("pre", "post", "kl") if name in measured}
    nothing = [None] * num_runs
    columns = defaultdict(lambda: nothing, {name: x.tolist() for name, x in measured.items()})
    sample_seconds = batch.sample.take_seconds()
    batch.mean_return = float(measured["post"].mean())
    for i, run in enumerate(batch.runs):
        pre, post, med, kl = (columns[name][i] for name in ("pre", "post", "med", "kl"))
        delta_norm, beta_norm, product = (columns[name][i] for name in ("delta_norm", "beta_norm", "product"))
        totals, threshold = run.state["totals"], run.settings["threshold"]
        run.state["epoch"] += 1
        totals["env_steps"] += int(columns["env_steps"][i] + (columns["medium_steps"][i] or 0))
        totals["seconds"] += seconds / num_runs  # runs of a batch share its time evenly
        totals["sample_seconds"] += sample_seconds / num_runs
        totals["smoothed"] = measures.smoothed(totals["smoothed"], post)
        totals["converged"] |= threshold is not None and totals["smoothed"] > threshold
        times = [totals[key] for key in ("env_steps", "seconds", "sample_seconds")]
        cosine = product / (delta_norm * beta_norm) if delta_norm and beta_norm else None
        batch.rows.add(run, "log", [[run.state["epoch"], *times, pre, post, med, delta_norm, beta_norm, cosine, kl]])
    return finite.tolist()


def info_means(trajectories):
    """The mean of each number in an environment's info over those of a task's episodes that report
    it at their end, NaN where none does: (S, M, N)."""
    if "info" not in trajectories:
        return trajectories["rewards"][:, :, 0, :0]  # N = 0
    return trajectories["info"].nanmean(2)


def log_evaluation(batch, grid, outcomes):
    """Add an evaluation to every run's rows of eval.csv. grid: the held-out tasks (G, P); outcomes:
    (S, G, steps + 1, 1 + N), the return and the N numbers of `info_means`."""
    names = [" ".join(f"{x:g}" for x in phi) for phi in grid.tolist()]
    for run, by_task in zip(batch.runs, outcomes.tolist(), strict=True):
        rows = []
        for name, by_step in zip(names, by_task, strict=True):
            for step, (mean_return, *means) in enumerate(by_step):
                info = dict(zip(info_names(batch.env), means, strict=True))
                # state["info"] has the names of earlier commands too
                found = [info.get(x, math.nan) for x in run.state["info"]]
                cells = [None if math.isnan(x) else x for x in found]
                rows.append([batch.epochs_done, name, step, mean_return, *cells])
        batch.rows.add(run, "eval", rows)


def fail(batch, run):
    """Mark a run as failed; returns the line that says so."""
    problem = f"a loss or parameter is not finite after epoch {batch.epochs_done}"
    line = f"{run.folder}: {problem}; try a smaller --beta, --alpha or --delta"
    if batch.ranks.rank == 0:
        checkpoints.write_atomically(run.folder / checkpoints.FAILED, line + "\n")
    return line
