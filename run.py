"""Train, evaluate and report: `python run.py --env cartpole --algo directed-fomaml --seed 1`; all flags: `--help`.

Runs of one algorithm, seeds × step sizes, are one batched program along the first axis S; several processes share them
out. Read `main` first, then `train` and `train_epoch`, which is Algorithm 1; Eq. 2b is in maml.py, the δ-step in
directed.py.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import gymnasium
import numpy
import torch
from tqdm import tqdm

import checkpoints
import envs
import maml
import parallel
import policies
import report
import trained
from checkpoints import Run, RunError
from directed import directed

NOTHING = contextlib.nullcontext()
INIT, TASKS, MEDIUM, EVALUATION = range(4)  # the purposes that random numbers are drawn for: see envs.generators
CHECKPOINT_SECONDS = 20  # the most training time that a crash can cost


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    with one_clear_line() as ranks:
        args = parse(argv)
        if args.watch is not None:
            return print(trained.watch(args.watch, args.phi, args.env))
        check_ranks(args, ranks)
        torch.set_num_threads(1)  # until training: a process forked from one that has used several threads hangs
        env = make_env(args)
        check_memory(args, env)
        runs = [run for algo in args.algo for run in plan(args, algo, env)]
        failures, stopped = train_all(runs, env, args, ranks)
        ranks.object_from_first(lambda: finish(failures, args))
        if stopped:
            line = [word for word in argv if word not in ("--resume", "--overwrite")]
            start = "python" if ranks.count == 1 else "torchrun .."
            ranks.leave()
            raise RunError(f"stopped; continue with: {start} run.py {shlex.join(line)} --resume", 128 + stopped[0])
        if failures:
            raise SystemExit(1)


# --- train ---


def train_all(runs, env, args, ranks):
    """Train all runs, in several processes where there are as many runs and cores, each with a share of the runs.

    Returns a line for each run that failed, and the signals that stopped the training, if any.
    """
    device = choose_device(args, env)
    parallel.keep_memory()
    with (
        checkpoints.opened(runs, args.resume, args.overwrite, args.epochs) if ranks.rank == 0 else NOTHING,
        parallel.caught_signals() as signals,
        Progress(runs, args, ranks) as progress,
    ):
        states = ranks.object_from_first(lambda: [run.state for run in runs])
        for run, state in zip(runs, states, strict=True):
            run.state = state
        processes = 1 if device == "cuda" or ranks.count > 1 else max(min(args.workers, len(runs)), 1)
        trajectories = runs[0].settings["tasks"] * runs[0].settings["trajectories"]
        samplers = min(args.workers // processes, trajectories)  # for each that trains, if gymnasium's environments
        work = partial(train_together, args=args, env=env, device=device, samplers=samplers, ranks=ranks)
        failures = parallel.run_jobs(work, share_out(runs, processes), processes, progress.update, signals)
    return failures, signals


def share_out(runs, processes):
    """The runs as jobs for so many processes. A job is one batch: runs of one algorithm at the same epoch."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.settings["algo"], run.state["epoch"]].append(run)
    parts = processes // math.gcd(processes, len(groups))  # the fewest that give all processes equally many jobs
    return [group[i::parts] for group in groups.values() for i in range(min(parts, len(group)))]


def train_together(runs, tell, args, env, device, samplers, ranks):
    """Train runs as one batch to the command's epochs. Returns a line for each run that failed.

    tell: a function of what there is to say of an epoch; returns the signals that ask to stop after it.
    """
    torch.set_num_threads(args.threads)
    head = policies.make_head(env.actions)
    for run in runs if ranks.rank == 0 else ():
        begin(run, args, env, device, len(runs))
    with parallel.open_sampler(env, head, device, samplers if samplers > 1 else 0) as sample:
        return train(Batch(runs, env, head, sample, device, ranks), args.epochs, args.eval_every, tell)


def train(batch, epochs, eval_every, tell):
    """Train a batch to `epochs`, evaluating and saving it on the way; see `train_together`."""
    failures, stopping, saved = [], [], time.perf_counter()
    while batch and batch.epoch < epochs and not stopping:
        start = time.perf_counter()
        losses = train_epoch(batch)
        finite = log_epoch(batch, losses, time.perf_counter() - start)
        stopping = batch.ranks.any(tell(batch.news()))
        if not all(finite):
            failures += [fail(batch, run) for run, good in zip(batch.runs, finite, strict=True) if not good]
            batch = batch.only(finite)
        if batch and (batch.epoch % eval_every == 0 or batch.epoch == epochs):
            evaluate(batch)
        if batch and (stopping or batch.epoch == epochs or time.perf_counter() - saved > CHECKPOINT_SECONDS):
            batch.save()
            saved = time.perf_counter()
    return failures


def train_epoch(batch):
    """One epoch of Algorithm 1, for all runs of the batch at once. Returns the losses, which know what was sampled."""
    num_tasks, medium = batch.settings["tasks"], batch.settings["medium"]
    rng, medium_rng = (envs.generators(batch.seeds, purpose, batch.epoch) for purpose in (TASKS, MEDIUM))
    phi = envs.sample_tasks(batch.env, rng, num_tasks)  # line 6: φ ~ ρ, (S, M, P)
    losses = [TaskLoss(batch, phi, rng, batch.ranks.tasks)]
    if medium is not None:
        phi_med = envs.medium_task(batch.env, medium, phi, medium_rng)  # line 1: (S, 1, P)
        losses.insert(0, TaskLoss(batch, phi_med, medium_rng, pooled=medium == "pooled"))
        batch.delta.copy_(scheduled_delta(batch))
    start = batch.position()
    # lines 4, 5: the δ-step, directed.py; 7 to 11: the inner steps and the meta-gradient, maml.py
    adapted = batch.meta_learner(batch.theta, *losses, batch.alpha, num_tasks)
    between = batch.position()  # after the δ-step alone
    batch.optimizer.step()  # line 12: the β-step
    batch.moves = between - start, batch.position() - between
    batch.epoch += 1
    losses[-1].unmeasured = adapted
    return losses


class TaskLoss:
    """task_loss(params) -> (S, M): K fresh trajectories of each task φ (S, M, P) under params, and the loss on them.
    pooled: (S, 1), K trajectories in all, K / M of each, as one task whose φ differs from episode to episode.

    Of the M tasks it takes its `own` alone, with the noise that they have in any company. Keeps the mean undiscounted
    return (S, M) of every call, and sums up env steps (S,) and seconds of sampling; finite: every loss of a run was
    (S,)."""

    def __init__(self, batch, phi, generators, own=slice(None), pooled=False):
        self.env, self.sample, self.phi, self.generators, self.own = batch.env, batch.sample, phi, generators, own
        self.num_trajectories, self.pooled = batch.settings["trajectories"] // (phi.shape[1] if pooled else 1), pooled
        options = {key: batch.settings[key] for key in policies.OPTIONS}
        self.loss = partial(policies.LOSSES[batch.settings["rl"]], head=batch.head, **options)
        self.returns, self.env_steps, self.seconds, self.finite = [], 0, 0.0, True
        self.unmeasured = None  # parameters whose return is still to be logged, at no cost to the training

    def __call__(self, params):
        start = time.perf_counter()
        trajectories = self.draw(params)
        self.env_steps = self.env_steps + trajectories["mask"].sum((1, 2, 3)).cpu()
        self.seconds += time.perf_counter() - start
        loss = self.loss(params, trajectories)
        self.finite = self.finite & loss.detach().isfinite().all(1)
        return loss

    def draw(self, params):
        """Fresh trajectories, whose returns are kept; their env steps and seconds are for the caller to count."""
        noise = envs.draw_noise(self.env, self.generators, self.phi.shape[1], self.num_trajectories)
        noise = {key: x[:, self.own] for key, x in noise.items()}
        policy = maml.expand(params, self.phi.shape[1]) if self.pooled else params
        trajectories = self.sample(policy, self.phi[:, self.own], noise)
        if self.pooled:
            trajectories = {key: x.flatten(1, 2).unsqueeze(1) for key, x in trajectories.items()}  # (S, 1, K, ...)
        self.returns.append(trajectories["rewards"].sum(3).mean(2))
        return trajectories


def scheduled_delta(batch):
    """δ of each run at this epoch: (S,)."""
    deltas = torch.tensor([run.settings["delta"] for run in batch.runs], dtype=torch.float64)
    if batch.settings["delta_schedule"] == "decay":
        return deltas / (1 + batch.epoch / 100)
    return deltas * torch.tensor([not run.state["totals"]["converged"] for run in batch.runs])


def log_epoch(batch, losses, seconds):
    """Add the epoch to every run's totals and log; returns for each run whether its losses and parameters are
    finite."""
    *_, task_loss = losses
    if task_loss.unmeasured is not None:
        # Reptile trains on no batch under θ', so its return there, as the other learners log it, takes trajectories of
        # its own. They are no training: neither env steps nor seconds count them (one rollout beside five).
        task_loss.draw(task_loss.unmeasured)
    pre, post = (task_loss.returns[i].double().sum(1).cpu() / batch.settings["tasks"] for i in (0, -1))  # (S,) each
    steps, broken = task_loss.env_steps.double(), (~task_loss.finite).double().cpu()
    batch.ranks.sum([pre, post, steps, broken])  # a rank knows its own tasks' alone, but the whole medium task
    steps = steps + sum(loss.env_steps for loss in losses[:-1])
    med = losses[0].returns[0].mean(1).tolist() if len(losses) > 1 else [None] * len(batch.runs)
    norms = step_norms(batch)
    share = 1 / len(batch.runs)  # runs of a batch share its time evenly
    for i, run in enumerate(batch.runs):
        totals, threshold = run.state["totals"], run.settings["threshold"]
        totals["env_steps"] += int(steps[i])
        totals["seconds"] += share * seconds
        totals["sample_seconds"] += share * sum(loss.seconds for loss in losses)
        totals["smoothed"] = report.smoothed(totals["smoothed"], float(post[i]))
        totals["converged"] |= threshold is not None and totals["smoothed"] > threshold
        times = [totals[key] for key in ("env_steps", "seconds", "sample_seconds")]
        run.state["epoch"] = batch.epoch
        batch.write(run, "log", [[batch.epoch, *times, float(pre[i]), float(post[i]), med[i], *norms[i]]])
    finite = [p.detach().isfinite().flatten(1).all(1).cpu() for p in batch.learned]
    finite += [broken == 0, *(loss.finite.cpu() for loss in losses[:-1])]
    return torch.stack(finite).all(0).tolist()


def step_norms(batch):
    """How far the δ-step and the β-step moved θ, and the cosine between the two: three numbers for each run, None for
    what there is not."""
    moves = [move.double() for move in batch.moves]
    delta, beta = ((move * move).sum(1).sqrt().tolist() for move in moves)
    product = (moves[0] * moves[1]).sum(1).tolist()
    if batch.settings["medium"] is None:
        return [[None, b, None] for b in beta]
    return [[d, b, p / (d * b) if d * b else None] for d, b, p in zip(delta, beta, product, strict=True)]


def evaluate(batch):
    """Returns on the held-out grid (G, P) after 0, 1, .. eval_steps inner steps, as rows of every run's eval.csv."""
    num_steps, ranks = batch.settings["eval_steps"], batch.ranks
    grid = envs.held_out_tasks(batch.env, batch.settings["eval_range"])
    rng = envs.generators(batch.seeds, EVALUATION, batch.epoch)
    task_loss = TaskLoss(batch, grid.expand(len(batch.runs), *grid.shape), rng, ranks.tasks)
    returns = torch.zeros(len(batch.runs), len(grid), num_steps + 1, dtype=torch.float64)
    own = returns[:, ranks.tasks]  # a view: (S, this rank's share of G, steps + 1)
    if own.numel():
        theta = maml.expand(batch.theta, own.shape[1])
        adapted = maml.adapt(theta, task_loss, batch.eval_alpha, num_steps, second_order=False)
        task_loss({name: p.detach() for name, p in adapted.items()})  # the returns after the last step
        own.copy_(torch.stack(task_loss.returns, 2))
    ranks.sum([returns])
    names = [" ".join(f"{x:g}" for x in phi) for phi in grid.tolist()]
    for run, by_task in zip(batch.runs, returns.tolist(), strict=True):
        rows = [
            [batch.epoch, name, step, x] for name, xs in zip(names, by_task, strict=True) for step, x in enumerate(xs)
        ]
        batch.write(run, "eval", rows)


def fail(batch, run):
    """Mark a run as failed; returns the line that says so."""
    line = f"{run.folder}: a loss or parameter is not finite after epoch {batch.epoch}; "
    line += "try a smaller --beta, --alpha or --delta"
    if batch.ranks.rank == 0:
        checkpoints.write_atomically(run.folder / checkpoints.FAILED, line + "\n")
    return line


# --- a batch of runs ---


class Batch:
    """S runs of one algorithm at the same epoch, trained as one program. Leaves of theta and alpha are (S, 1, ...)."""

    def __init__(self, runs, env, head, sample, device, ranks):
        self.runs, self.settings, self.epoch = runs, runs[0].settings, runs[0].state["epoch"]
        self.env, self.head, self.sample, self.device, self.ranks = env, head, sample, device, ranks
        self.seeds = [run.settings["seed"] for run in runs]
        stacked = checkpoints.stack([{key: run.state[key] for key in checkpoints.TENSORS} for run in runs], device)
        self.theta = {name: p.requires_grad_() for name, p in stacked["theta"].items()}
        learned_alpha = {name: p.requires_grad_() for name, p in stacked["alpha"].items()}
        sizes = {
            name: torch.tensor([run.settings[name] or 0.0 for run in runs], dtype=torch.float64, device=device)
            for name in ("alpha", "beta", "beta_alpha", "eval_alpha")
        }
        self.alpha = learned_alpha or sizes["alpha"][:, None]  # (S, 1), or (S, 1, ...) each
        self.eval_alpha = (
            learned_alpha or torch.where(sizes["eval_alpha"] > 0, sizes["eval_alpha"], sizes["alpha"])[:, None]
        )
        self.learned = [*self.theta.values(), *learned_alpha.values()]
        step_sizes = [sizes["beta"]] * len(self.theta) + [sizes["beta_alpha"]] * len(learned_alpha)
        self.optimizer = OPTIMIZERS[self.settings["optimizer"]](self.learned, step_sizes)
        for i, tensors in stacked["optimizer"].items():
            self.optimizer.state[self.learned[i]].update(tensors)
        base = self.settings["algo"].removeprefix("directed-")
        learner = partial(maml.META_LEARNERS[base], inner_steps=self.settings["inner_steps"])
        self.meta_learner = ranks.share(learner, self.learned, average=base == "reptile")
        if base != self.settings["algo"]:
            self.delta = torch.zeros(len(runs), dtype=torch.float64)  # set before every epoch
            self.meta_learner = directed(self.meta_learner, self.delta)

    def only(self, kept):
        """The batch of those runs alone for which `kept` holds; None where there are none."""
        self.update_states()
        runs = [run for run, keep in zip(self.runs, kept, strict=True) if keep]
        return Batch(runs, self.env, self.head, self.sample, self.device, self.ranks) if runs else None

    def position(self):
        """All of θ, a vector for each run: (S, N)."""
        return torch.cat([p.detach().flatten(1) for p in self.theta.values()], 1)

    def update_states(self):
        state = self.optimizer.state
        optimizer = {i: dict(state[p]) for i, p in enumerate(self.learned) if p in state}
        alpha = self.alpha if isinstance(self.alpha, dict) else {}
        for i, run in enumerate(self.runs):
            run.state |= checkpoints.take({"theta": self.theta, "alpha": alpha, "optimizer": optimizer}, i)

    def save(self):
        if self.ranks.rank == 0:
            self.update_states()
            checkpoints.save(self.runs)

    def news(self):
        """What there is to say of the last epoch: algorithm, number of runs, mean return after adaptation."""
        returns = [run.state["log"][-1][5] for run in self.runs]
        return self.settings["algo"], len(returns), sum(returns) / len(returns)

    def write(self, run, table, rows):
        run.state[table] += rows
        if self.ranks.rank == 0:
            checkpoints.append_rows(run, table, rows)


def first_state(settings, env):
    """Where a run begins: the same θ for every algorithm with the same seed."""
    rng = envs.generators([settings["seed"]], INIT)
    theta = policies.init(
        env.obs_dim, policies.make_head(env.actions), rng, settings["hidden"], critic=settings["rl"] == "ac"
    )
    alpha = maml.learned_alpha(theta, settings["alpha"]) if settings["algo"].endswith("meta-sgd") else {}
    optimizer = {}
    if settings["optimizer"] == "adam":
        zeros = [torch.zeros_like(p) for p in (*theta.values(), *alpha.values())]
        optimizer = {i: {"step": torch.tensor(0.0), "exp_avg": z, "exp_avg_sq": z} for i, z in enumerate(zeros)}
    totals = {"env_steps": 0, "seconds": 0.0, "sample_seconds": 0.0, "smoothed": math.nan, "converged": False}
    state = {"format": checkpoints.FORMAT, "settings": settings, "epoch": 0, "totals": totals, "log": [], "eval": []}
    return state | {"theta": theta, "alpha": alpha, "optimizer": optimizer}


def of_each_run(step_sizes, p):
    """Step sizes (S,) in the shape that multiplies a parameter (S, 1, ...)."""
    return step_sizes.to(p).view(-1, *[1] * (p.dim() - 1))


class SGD:
    """The plain step p ← p − β p.grad with a β for each run: step_sizes, (S,) for each parameter (S, 1, ...)."""

    def __init__(self, params, step_sizes):
        self.params, self.step_sizes, self.state = params, step_sizes, {}

    @torch.no_grad()
    def step(self):
        for p, beta in zip(self.params, self.step_sizes, strict=True):
            p -= of_each_run(beta, p) * p.grad


class Adam:
    """torch's Adam with a β for each run: p ← p + β u, where u is its step of size 1."""

    def __init__(self, params, step_sizes):
        self.params, self.step_sizes, self.adam = params, step_sizes, torch.optim.Adam(params, lr=1.0)
        self.state = self.adam.state

    @torch.no_grad()
    def step(self):
        before = [p.clone() for p in self.params]
        for p in self.params:
            p.zero_()  # so that torch's step leaves u itself in p
        self.adam.step()
        for p, start, beta in zip(self.params, before, self.step_sizes, strict=True):
            p.mul_(of_each_run(beta, p)).add_(start)


OPTIMIZERS = {"sgd": SGD, "adam": Adam}


# --- settings: the one table that the command line, its checks, config.json, --help and the README come from ---


@dataclass(frozen=True)
class Setting:
    """A flag of the command line. needs: what it does nothing without, a key of NEEDS."""

    name: str
    help: str
    example: str = ""
    type: Callable = str  # of one value; bool: a switch
    default: object = None  # where neither envs.ENVS nor ALGORITHM_DEFAULTS has another
    shown: str = ""  # the default in words, where it is no value
    nargs: str | None = None
    choices: tuple = ()
    needs: str = ""
    identity: bool = True  # part of what makes a run that run: it cannot change on --resume

    @property
    def flag(self):
        return "--" + self.name.replace("_", "-")


def wrong(text, expected):
    """The error of an argparse type: what was expected in place of the text, or that commas separate nothing."""
    remedy = f"separate values by spaces: {' '.join(text.split(','))}" if "," in text else expected
    return argparse.ArgumentTypeError(f"{text!r}: {remedy}")


def number(kind, low=-math.inf, high=math.inf, above=False):
    """An argparse type: a finite number of `kind` from `low` (exclusive where `above`) to `high`."""

    def parse(text):
        try:
            value = kind(text)
            good = math.isfinite(value) and low <= value <= high and not (above and value == low)
        except (ValueError, OverflowError):
            good = False
        if not good:
            what = "whole number" if kind is int else "number"
            bounds = [f" {'>' if above else '>='} {low:g}"] * (low > -math.inf) + [f" <= {high:g}"] * (high < math.inf)
            raise wrong(text, f"expected a finite {what}{' and'.join(bounds)}")
        return value

    return parse


def seeds(text):
    """An argparse type: a seed, or FIRST-LAST."""
    first, dash, last = text.partition("-")
    if not (first and dash):
        return number(int, 0)(text)
    all_of_them = range(number(int, 0)(first), number(int, 0)(last) + 1)
    if not 0 < all_of_them.stop - all_of_them.start <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIRST-LAST, at least one seed and at most a million")
    return all_of_them


ALGORITHMS = (*maml.META_LEARNERS, *("directed-" + name for name in maml.META_LEARNERS))
# Paper: β for every learner. Here: ε = 1 for Reptile, since ε = 0.001 moves θ by 1e-6 ∇; 5 steps of α add up to M·β.
ALGORITHM_DEFAULTS = {"reptile": {"beta": 1.0, "inner_steps": 5}}
NEEDS = {
    "an algorithm that begins with directed-": lambda args, algo: algo.startswith("directed-"),
    "the algorithm meta-sgd or directed-meta-sgd": lambda args, algo: algo.endswith("meta-sgd"),
    "--rl ac": lambda args, algo: args.rl == "ac",
    "--watch RUN": lambda args, algo: args.watch is not None,
    "--advantages whitened": lambda args, algo: args.advantages != "raw",
    "--inner-steps 1 or more": lambda args, algo: args.inner_steps != 0,
    "an algorithm whose α is not learned": lambda args, algo: not algo.endswith("meta-sgd"),
}
SWEPT = ("alpha", "beta", "delta", "seed")  # settings of which a command may give several values
DIRECTED, META_SGD, ACTOR_CRITIC, WATCH, WHITENED, ADAPTING, FIXED_ALPHA = NEEDS
count, size, step_size = number(int, 1, 10**9), number(float, 0), number(float, 0, above=True)
# fmt: off
SETTINGS = {
    "task": [
        Setting("env", f"task family: {', '.join(envs.ENVS)}, or any gymnasium id with --param, --range", "cartpole"),
        Setting("param", "attributes of a gymnasium environment that are φ", "g", nargs="+"),
        Setting("range", "Φ: LOW HIGH for each component of φ", "5 15", number(float), None, "by env", "+"),
        Setting("task_dist", "ρ over Φ: uniform; bimodal: its lowest and highest fifth; skewed: most near LOW",
                "bimodal", default="uniform", choices=tuple(envs.TASK_DISTS)),
        Setting("horizon", "H, time steps of an episode at most", "100", count, shown="gymnasium's"),
        Setting("oracle", "φ, scaled to [−1, 1] over Φ, is part of the observation: the best that adaptation could do",
                type=bool),
        Setting("threshold", "mean return from which a run counts as converged", "175", number(float), None, "none",
                identity=False),
    ],
    "algorithm": [
        Setting("algo", f"one or several of {', '.join(ALGORITHMS)}", "maml directed-maml", nargs="+",
                choices=ALGORITHMS),
        Setting("rl", "pg: policy gradient; ac: actor-critic", "ac", default="pg", choices=tuple(policies.LOSSES)),
        Setting("seed", "one or several, all trained at once; 1-10 is ten", "1 2 3 4 5", seeds, 1, nargs="+"),
        Setting("epochs", "E", "1000", count, 500, identity=False),
        Setting("inner_steps", "gradient steps of an adaptation, each on fresh trajectories; 0: joint training, the "
                "control without adaptation", "3", number(int, 0, 10**9), 1),
        Setting("medium", "the medium task: mean of ρ (Eq. 3); of the epoch's tasks sampled (their mean, Eq. 4) or "
                "median (geometric); random: another random task each epoch (the control); pooled: the epoch's own M "
                "tasks, K / M trajectories of each (the other control); or a φ", "sampled",
                default=("mean",), nargs="+", needs=DIRECTED),
        Setting("optimizer", "of the β-step; the δ-step is always plain", "adam", default="sgd",
                choices=tuple(OPTIMIZERS)),
        Setting("hidden", "widths of the tanh layers", "100 100", count, (64, 64), nargs="+"),
    ],
    "step sizes": [
        Setting("alpha", "inner step size α, one or several; 0: joint training with MAML's sampling", "0.01", size,
                0.001, nargs="+", needs=ADAPTING),
        Setting("beta", "outer step size β, Reptile's ε; one or several", "0.02", step_size, 0.001, nargs="+"),
        Setting("delta", "δ, one or several, all trained at once", "0 0.001 0.005", size, 0.005, nargs="+",
                needs=DIRECTED),
        Setting("delta_schedule", "constant; decay: δ / (1 + epoch / 100); converged: 0 once the smoothed return is "
                "over the threshold", "decay", default="constant", choices=("constant", "decay", "converged"),
                needs=DIRECTED),
        Setting("beta_alpha", "outer step size of Meta-SGD's α", "0.001", step_size, None, "α times β", needs=META_SGD),
    ],
    "sampling and estimation": [
        Setting("tasks", "M tasks an epoch", "20", count, 5),
        Setting("trajectories", "K trajectories a task, before and after adaptation alike", "40", count, 10),
        Setting("gamma", "discount γ", "1", number(float, 0, 1, above=True), 0.99),
        Setting("gae_lambda", "λ of generalised advantage estimation", "1", number(float, 0, 1), 0.95,
                needs=ACTOR_CRITIC),
        Setting("estimator", "of the meta-gradient's second-order terms", "dice", default="lvc",
                choices=policies.ESTIMATORS),
        Setting("advantages", "whitened: divided by their standard deviation, γᵗ dropped; raw: Eq. 1b and 2a to the "
                "letter, with γᵗ and without a baseline", "raw", default="whitened", choices=policies.ADVANTAGES),
        Setting("baseline", "what is subtracted from the advantages: each task's mean, each time step's, or linear: a "
                "least-squares fit on observation and time (Duan et al. 2016)", "step", default="task",
                choices=policies.BASELINES, needs=WHITENED),
    ],
    "evaluation": [
        Setting("eval_every", "epochs between evaluations on held-out tasks", "10", count, 50, identity=False),
        Setting("eval_steps", "evaluate after 0, 1, .. this many inner steps", "1", count, 3),
        Setting("eval_alpha", "α of the evaluation's inner steps", "0.001", step_size, None,
                "α, or the family's default α without one", needs=FIXED_ALPHA),
        Setting("eval_range", "the held-out tasks' range, LOW HIGH for each component of φ", "0 20", number(float),
                None, "Φ", "+"),
        Setting("watch", "show one episode of that run's policy, adapted to a task: a GIF in its folder, and a window "
                "where there is a display", "runs/cartpole-pg/maml/seed1 --phi 12", Path, identity=False),
        Setting("phi", "the task to watch", "12", number(float), None, "the mean task", "+", needs=WATCH,
                identity=False),
    ],
    "running": [
        Setting("device", "auto: cuda where there is one, but cpu for gymnasium's environments", "cpu", default="auto",
                choices=("auto", "cpu", "cuda"), identity=False),
        Setting("workers", "processes that share the runs, or the trajectories of a few runs; 1: this one", "4",
                number(int, 0, 1024), None,
                "the number of cores", identity=False),
        Setting("threads", "CPU threads; more than one pays only in large sweeps", "4", number(int, 1, 1024), 1,
                identity=False),
        Setting("out", "folder of all runs", "../runs", Path, Path("runs"), identity=False),
        Setting("like", "take every setting of that run from its config.json; other flags override it",
                "runs/cartpole-pg/maml/seed1 --seed 2", Path, identity=False),
        Setting("resume", "continue runs that exist, e.g. with more --epochs", type=bool, identity=False),
        Setting("overwrite", "start runs that exist again", type=bool, identity=False),
        Setting("quiet", "no progress, only errors", type=bool, identity=False),
    ],
}
# fmt: on
ALL_SETTINGS = {setting.name: setting for settings in SETTINGS.values() for setting in settings}


def default_of(setting, env=None, algo=""):
    """A setting's default for a task family (None: a gymnasium id) and an algorithm."""
    own = ALGORITHM_DEFAULTS.get(algo.removeprefix("directed-"), {})
    if setting.name == "horizon":
        return env.horizon if env else None
    return own.get(setting.name, env.defaults.get(setting.name, setting.default) if env else setting.default)


def shown_default(setting):
    """The default in words, with those of the task families and algorithms that have others."""

    def show(x):
        return " ".join(map(show, x)) if isinstance(x, tuple) else f"{x:g}" if isinstance(x, float) else str(x)

    general = default_of(setting)
    others = {name: default_of(setting, env) for name, env in envs.ENVS.items()}
    others |= {algo: default_of(setting, algo=algo) for algo in ALGORITHM_DEFAULTS}
    names = defaultdict(list)
    for name, value in others.items():
        if value != general:
            names[show(value)].append(name)
    first = [] if general is None and not setting.shown else [setting.shown or show(general)]
    return "; ".join(first + [f"{', '.join(who)} {value}" for value, who in names.items()])


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise RunError(f"{message} (see --help)", 2)


def parse(argv, follow_like=True):
    """The command line as a namespace; None for what it does not say. Raises RunError for what is wrong with it.

    follow_like: the settings of the run that --like names stand before the rest, which overrides them.
    """
    parser = Parser(
        prog="run.py",
        description="Train, evaluate and report Directed-MAML and its peers.",
        epilog="example: python run.py --env cartpole --algo directed-maml --seed 1 2 3 4 5 --delta 0 0.001 0.005 0.01",
    )
    for title, settings in SETTINGS.items():
        section = parser.add_argument_group(title)
        for setting in settings:
            if setting.type is bool:
                section.add_argument(setting.flag, action="store_true", help=setting.help)
                continue
            default = shown_default(setting)
            text = setting.help + f" (default {default})" * bool(default) + f"; e.g. {setting.flag} {setting.example}"
            kind = one_of(setting.choices) if setting.choices else setting.type
            metavar = "{" + ",".join(setting.choices) + "}" if 0 < len(setting.choices) < 5 else setting.name.upper()
            section.add_argument(setting.flag, type=kind, nargs=setting.nargs, metavar=metavar, help=text)
    # argparse's own pattern takes -1. and -1e-05 for flags
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
    args, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("-"):
        parser.error(f"{unknown[0]}: a value that no flag takes; flags that take several say so in --help")
    if unknown:
        flags = [setting.flag for setting in ALL_SETTINGS.values()]
        parser.error(f"{unknown[0]}: {envs.hint(unknown[0], flags, 'those of --help')}")
    if args.like is not None and follow_like:
        return parse([*words_of(args.like), *argv], follow_like=False)
    args.seed = args.seed and [seed for part in args.seed for seed in (part if isinstance(part, range) else [part])]
    check_pairs(args, parser.error)
    for setting in (*SETTINGS["evaluation"], *SETTINGS["running"]):  # these depend on nothing else
        if getattr(args, setting.name) is None:
            cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this rank
            setattr(args, setting.name, max(cores, 1) if setting.name == "workers" else setting.default)
    return args


def words_of(folder):
    """The settings of the run in a folder, from its config.json, as the words of a command line."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in ALL_SETTINGS if name != "device" and config.get(name) is not None]
        given = {ALL_SETTINGS[name]: config[name] for name in names if config[name] is not False}
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"--like {folder}: {envs.first_line(error)}; name the folder of a run", 2) from error
    values = {x: [] if value is True else value if isinstance(value, list) else [value] for x, value in given.items()}
    return [word for setting, value in values.items() for word in (setting.flag, *map(str, value))]


def one_of(choices):
    """An argparse type: one of these words; the nearest is suggested for another."""

    def parse(text):
        if text not in choices:
            raise wrong(text, envs.hint(text, choices, ", ".join(choices)))
        return text

    return parse


def check_pairs(args, error):
    """Reject flags that conflict or have no effect: an ablation would compare identical runs."""
    if args.watch is None and (args.env is None or args.algo is None):
        error("--env and --algo are required, e.g. --env cartpole --algo directed-fomaml")
    if args.resume and args.overwrite:
        error("--overwrite: not allowed with argument --resume")
    for setting in ALL_SETTINGS.values():
        values = getattr(args, setting.name)
        if (
            setting.needs
            and values is not None
            and not any(NEEDS[setting.needs](args, algo) for algo in args.algo or [""])
        ):
            raise RunError(f"{setting.flag} does nothing without {setting.needs}; leave it out, or add that", 2)
        if setting.name in ("algo", *SWEPT):
            names = [f"{x:.12g}" if isinstance(x, float) else x for x in values or ()]  # as folders are named
            if len(set(names)) < len(names):
                raise RunError(f"{setting.flag} {' '.join(map(str, values))}: duplicate value", 2)


# --- plan: from the command line to runs ---

ARGUMENTS = {"name": "--env", "names": "--param", "bounds": "--range", "horizon": "--horizon"}  # envs.make's, as flags


def make_env(args):
    """The task family with --param, --range, --horizon and --task-dist applied; fills in what depends on it alone."""
    try:
        env = envs.make(args.env, args.param, args.range, args.horizon)
        if args.eval_range is not None:
            envs.check_bounds("--eval-range", args.eval_range, env.phi_names)
    except ValueError as error:
        raise RunError(re.sub(r"`(\S+)`", lambda match: ARGUMENTS.get(match[1], match[1]), str(error)), 2) from error
    for name in ("epochs", "threshold"):
        if getattr(args, name) is None:
            setattr(args, name, default_of(ALL_SETTINGS[name], env))
    if args.delta_schedule == "converged" and args.threshold is None:
        raise RunError("--delta-schedule converged: give the return that counts as converged, --threshold", 2)
    env = replace(env, task_dist=args.task_dist or env.task_dist)
    return envs.with_phi_observed(env) if args.oracle else env


def plan(args, algo, env):
    """The runs of one algorithm: every setting that makes a run what it is; None for those that do not apply to it."""
    settings = {}
    for setting in (x for x in ALL_SETTINGS.values() if x.identity):
        applies = not setting.needs or NEEDS[setting.needs](args, algo)
        value = getattr(args, setting.name)
        value = default_of(setting, env, algo) if value is None else value
        settings[setting.name] = (list(value) if isinstance(value, tuple) else value) if applies else None
    settings |= {"algo": algo, "range": [x for pair in zip(env.low, env.high, strict=True) for x in pair]}
    settings["threshold"] = args.threshold if settings["delta_schedule"] == "converged" else None
    if settings["medium"] is not None:
        settings["medium"] = medium_of(args, env)
    swept = {name: getattr(args, name) or [settings[name]] for name in SWEPT}
    if not algo.startswith("directed-"):
        swept["delta"] = [None]
    runs = []
    for values in itertools.product(*swept.values()):
        own = settings | dict(zip(swept, values, strict=True))
        if not (own["alpha"] or own["eval_alpha"] or algo.endswith("meta-sgd")):
            own["eval_alpha"] = default_of(ALL_SETTINGS["alpha"], env, algo)
        check_run(own, args.beta_alpha)
        if algo.endswith("meta-sgd") and args.beta_alpha is None:
            # Paper: α by β too. Here: α times β; at β = 0.001 every step moves α by many times its 0.001: it diverges.
            own["beta_alpha"] = own["alpha"] * own["beta"]
        varied = [x for x in SWEPT if own[x] is not None and (x in ("delta", "seed") or len(swept[x]) > 1)]
        names = [f"{x}{own[x]:.12g}" if x != "seed" else f"seed{own[x]}" for x in varied]
        runs.append(Run(folder_of_all(args) / algo / "/".join(names), own, first_state(own, env)))
    return runs


def check_run(settings, beta_alpha):
    """Reject settings under which a run would train nothing, or that do not fit together."""
    algo, baseline, trajectories = settings["algo"], settings["baseline"], settings["trajectories"]
    if settings["medium"] == "pooled" and trajectories % settings["tasks"]:
        tasks = f"--tasks {settings['tasks']}"
        raise RunError(
            f"--medium pooled: --trajectories {trajectories} is not a multiple of {tasks}; give one that is", 2
        )
    if settings["inner_steps"] == 0 and algo.endswith(("reptile", "meta-sgd")):
        raise RunError(f"--inner-steps 0: {algo} learns from inner steps; for joint training give --algo maml", 2)
    if settings["alpha"] == 0 and (algo.endswith("reptile") or (algo.endswith("meta-sgd") and beta_alpha is None)):
        remedy = "--alpha above 0" + (", or --beta-alpha" if algo.endswith("meta-sgd") else "")
        raise RunError(f"--alpha 0: {algo} would never take an inner step; give {remedy}", 2)
    if trajectories == 1 and baseline in ("step", "linear"):
        remedy = "give --trajectories 2 or more, or --baseline task"
        raise RunError(f"--trajectories 1: --baseline {baseline} compares trajectories of a task; {remedy}", 2)


def folder_of_all(args):
    """The folder of all runs on one environment; ids such as module:Name/Env-v0 stay one folder deep."""
    return args.out / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', args.env)}-{args.rl or 'pg'}"


def medium_of(args, env):
    """--medium as one of the words, or a φ as a list of numbers."""
    words = args.medium or default_of(ALL_SETTINGS["medium"])
    if len(words) == 1 and words[0] in envs.MEDIUM_TASKS:
        return words[0]
    try:
        phi = [float(x) for x in words]
    except ValueError:
        phi = []
    if len(phi) != len(env.phi_names) or not all(map(math.isfinite, phi)):
        expected = f"{', '.join(envs.MEDIUM_TASKS)} or {len(env.phi_names)} number(s): {', '.join(env.phi_names)}"
        raise RunError(f"--medium {' '.join(words)}: expected {expected}", 2)
    return phi


def choose_device(args, env):
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: no CUDA device is available to torch; use --device cpu", 2)
    if args.device == "auto":
        return "cuda" if torch.cuda.is_available() and not env.in_workers else "cpu"
    return args.device


def check_memory(args, env):
    """Refuse what cannot fit into memory before it starts: at the least, every task has its parameters twice, and the
    gradient needs every layer's activations three times."""

    def value(name):
        given = getattr(args, name)
        return default_of(ALL_SETTINGS[name], env) if given is None else given

    sizes = [env.obs_dim, *value("hidden"), env.action_dim]
    params = sum(a * b for a, b in itertools.pairwise(sizes))
    activations = value("trajectories") * env.horizon * sum(sizes[1:])
    runs = math.prod(len(getattr(args, name) or [0]) for name in SWEPT)
    need = 4 * runs * value("tasks") * (2 * params + 3 * activations)
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if need > have:
        raise RunError(
            f"this needs {need / 2**30:,.0f} GiB of memory at the least, and the machine has {have / 2**30:.0f}; give "
            "fewer --seed, --delta, --tasks, --trajectories or a smaller --hidden", 2,
        )  # fmt: skip


def check_ranks(args, ranks):
    """All ranks must do the same, and have equally many tasks."""
    tasks = args.tasks or default_of(ALL_SETTINGS["tasks"])
    if tasks % ranks.count:
        raise RunError(f"--tasks {tasks}: not a multiple of the {ranks.count} ranks; give a multiple", 2)
    own = {key: value for key, value in vars(args).items() if key not in ("workers", "threads", "quiet")}
    for key, value in ranks.object_from_first(lambda: own).items():
        if own[key] != value:
            mine, first = (" ".join(map(str, x)) if isinstance(x, list) else x for x in (own[key], value))
            line = f"{ALL_SETTINGS[key].flag}: {mine} on rank {ranks.rank}, {first} on rank 0"
            raise RunError(f"{line}; start all with the same command", 2)


# --- what the user sees ---


def begin(run, args, env, device, runs_in_batch):
    """Make the run's folder ready, with everything that somebody needs to repeat the run in config.json."""
    versions = {m.__name__: m.__version__ for m in (torch, gymnasium, numpy)} | {"python": platform.python_version()}
    here = {"epochs": args.epochs, "eval_every": args.eval_every, "threshold": args.threshold, "device": device}
    here |= {"phi_names": list(env.phi_names), "runs_in_batch": runs_in_batch, "versions": versions}
    checkpoints.begin(run, run.settings | here, {args.epochs, *range(0, args.epochs, args.eval_every)})


class Progress:
    """One bar for all runs of the command, counting every run's epochs; without a terminal, a line every 30 seconds."""

    def __init__(self, runs, args, ranks):
        self.show = not args.quiet and ranks.rank == 0
        done = sum(run.state["epoch"] for run in runs)
        self.bar = tqdm(total=args.epochs * len(runs), initial=done, unit="epoch", disable=None if self.show else True)
        self.lines, self.said, self.start = self.show and self.bar.disable, time.monotonic(), time.monotonic()
        self.done, self.begun, self.total = done, done, args.epochs * len(runs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def update(self, news):
        algo, count, mean_return = news
        self.done += count
        self.bar.set_description(algo, refresh=False)
        self.bar.set_postfix(return_post=f"{mean_return:.4g}", refresh=False)
        self.bar.update(count)
        now = time.monotonic()
        if self.lines and now - self.said > 30:
            left = (now - self.start) / (self.done - self.begun) * (self.total - self.done)
            print(f"{algo}: epoch {self.done} of {self.total}, return {mean_return:.4g}, {left:.0f} s left",
                  file=sys.stderr)  # fmt: skip
            self.said = now


def finish(failures, args):
    """Say which runs failed, and rewrite the report."""
    for line in sorted(failures):
        print(f"run.py: {line}", file=sys.stderr)
    root = folder_of_all(args)
    with checkpoints.locked(root, wait=True):  # another command may end just now
        wrote, left_out = report.write(root)
    for line in left_out:
        print(f"run.py: {line}", file=sys.stderr)
    for line in [] if args.quiet else wrote:
        print(line)


@contextlib.contextmanager
def one_clear_line():
    """Whatever is wrong, with the command or with the machine, ends in one line on standard error and an exit code; of
    several ranks, the one that failed first says it. Yields this process's `Ranks`."""
    ranks = None
    try:
        ranks = parallel.Ranks()
        yield ranks
        ranks.leave()
        return
    except RunError as error:
        line, code = error, error.code
    except parallel.ProcessError as error:
        line, code = f"{error}; continue from the last checkpoint with --resume", 1
    except OSError as error:  # a full disk, a folder that is gone or may not be written
        path = error.filename2 or error.filename or "files"  # a file that cannot be put in its place: the place
        line, code = f"{path}: {error.strerror or error}; fix this, then rerun with --resume", 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        line, code = "out of memory; give fewer --seed, --delta, --tasks, --trajectories or a smaller --hidden", 1
    except KeyboardInterrupt:  # outside of training, or the second one
        line, code = "stopped at once; continue from the last checkpoint with --resume", 128 + signal.SIGINT
    if ranks is None or ranks.first_to_fail():
        print("run.py:", " ".join(str(line).split("\n")), file=sys.stderr)
    if ranks is not None and ranks.count > 1:
        ranks.exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal or a log file may have no δ
    main()
