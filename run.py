"""Train, evaluate and report: `python run.py --env cartpole --algo directed-fomaml --seed 1`; all flags: `--help`.

All runs of one algorithm, seeds × deltas, are one batched program along the first axis S. Read `main` first, then
`train` and `train_epoch`; Eq. 2b is in maml.py and the δ-step in directed.py.
"""

import argparse
import collections
import contextlib
import csv
import ctypes
import io
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
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy
import torch
import torch.distributed as dist
from tqdm import tqdm

import directed
import envs
import maml
import policies
import report

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ALGORITHMS = [*maml.META_LEARNERS, *("directed-" + name for name in maml.META_LEARNERS)]
LOG_FIELDS = ["epoch", "env_steps", "seconds", "sample_seconds", "return_pre", "return_post", "return_med"]
EVAL_FIELDS = ["epoch", "phi", "step", "return"]
INIT, TASKS, MEDIUM, EVALUATION, WATCH = range(5)  # the number streams of envs.generators
CHECKPOINT, ASIDE = "checkpoint.pt", "checkpoint.pt.tmp"
CHECKPOINT_SECONDS = 20  # the most training time that a crash can cost
CHECKPOINT_FORMAT = 2


# --- what is wrong ends here ---


class Failure(Exception):
    """Ends the command: one clear line, and an exit code."""


def fail(message, code=1):
    raise Failure(message, code)


@contextlib.contextmanager
def one_clear_line():
    """Whatever is wrong, with the command or with the machine, ends in one line on standard error and an exit code; of
    several ranks, the one that failed first says it. Yields this process's `Ranks`."""
    ranks = None
    try:
        ranks = Ranks()
        yield ranks
        ranks.leave()
        return
    except Failure as error:
        line, code = error.args
    except envs.WorkerError as error:
        line, code = f"{error}; go on from the last checkpoint with --resume", 1
    except OSError as error:  # a full disk, a folder that went away or is not ours to write
        line, code = f"{error.filename or 'files'}: {error.strerror or error}; mend that and go on with --resume", 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        line, code = "out of memory; give fewer --seed, --delta, --tasks, --trajectories or a smaller --hidden", 1
    except KeyboardInterrupt:  # outside of training, or the second one
        line, code = "stopped at once; go on from the last checkpoint with --resume", 128 + signal.SIGINT
    if ranks is None or ranks.first_to_fail():
        print("run.py:", " ".join(str(line).split("\n")), file=sys.stderr)
    raise SystemExit(code)


# --- the command line ---


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (see --help)", code=2)


def one_of(choices):
    """An argparse type: one of these words; the nearest is suggested for another."""

    def parse(text):
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r}: {envs.hint(text, choices, ', '.join(choices))}")
        return text

    return parse


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
            raise argparse.ArgumentTypeError(f"{text!r}: expected a finite {what}{' and'.join(bounds)}")
        return value

    return parse


def parse_args(argv):
    parser = Parser(
        prog="run.py",
        description="Train, evaluate and report Directed-MAML and its peers.",
        epilog="example: python run.py --env cartpole --algo directed-maml --seed 1 2 3 4 5 --delta 0 0.001 0.005 0.01",
    )

    def add(flag, example, text, default=None, shown=None, **options):
        shown = "" if shown is None and default is None else f" (default {shown or default})"
        if choices := options.pop("choices", None):
            options = {"type": one_of(choices), "metavar": "{" + ",".join(choices) + "}"} | options
        parser.add_argument(flag, default=default, help=f"{text}{shown}; e.g. {flag} {example}", **options)

    count, step_size = number(int, 1), number(float, 0, above=True)
    # fmt: off
    add("--env", "cartpole", f"task family: {', '.join(envs.ENVS)}, or any gymnasium id with --param and --range")
    add("--param", "g", "attribute(s) of a gymnasium environment that are φ", nargs="+", metavar="NAME")
    add("--algo", "maml directed-maml", "one or several of " + ", ".join(ALGORITHMS),
        nargs="+", choices=ALGORITHMS, metavar="ALGO")
    add("--rl", "ac", "pg: policy gradient, ac: actor-critic", "pg", choices=policies.LOSSES)
    add("--seed", "1 2 3 4 5", "one or several, all trained at once", [1], "1", nargs="+", type=number(int, 0))
    add("--delta", "0 0.001 0.005", "δ of directed-*, one or several, all trained at once",
        shown="0.005; crossing 0.0025; velocity 0.0015", nargs="+", type=number(float, 0))
    add("--alpha", "0.01", "inner step size α", shown="0.001; crossing 0.003; point 0.03; velocity 0.01",
        type=step_size)
    add("--beta", "0.02", "outer step size β", shown="0.001; crossing 0.0005; velocity 0.0003; reptile's ε 1",
        type=step_size)
    add("--beta-alpha", "0.001", "outer step size of Meta-SGD's α", shown="α times β", type=step_size)
    add("--gamma", "1", "discount γ", 0.99, type=number(float, 0, 1, above=True))
    add("--gae-lambda", "1", "λ of --rl ac", 0.95, type=number(float, 0, 1))
    add("--tasks", "20", "M tasks an epoch", 5, type=count)
    add("--trajectories", "40", "K trajectories a task, before and after adaptation alike", 10, type=count)
    add("--horizon", "100", "H steps an episode at most",
        shown="cartpole 200; lunarlander 400; crossing 60; point, velocity 20; gymnasium's", type=count)
    add("--epochs", "1000", "E", shown="cartpole, crossing 400; point, velocity 200; else 500", type=count)
    add("--threshold", "175", "mean return from which a run counts as converged",
        shown="cartpole 175; lunarlander 75; crossing 38; point -2; velocity -5", type=number(float))
    add("--inner-steps", "3", "gradient steps of an adaptation", shown="1; reptile 5", type=count)
    add("--hidden", "100 100", "widths of the tanh layers", [64, 64], "64 64", nargs="+", type=count)
    add("--medium", "sampled", "medium task: mean of ρ; sampled or median: mean or geometric median of the epoch's "
        "tasks; random: a random task each epoch; or a φ", ["mean"], "mean", nargs="+")
    add("--delta-schedule", "decay", "constant; decay: δ / (1 + epoch / 100); converged: 0 once the smoothed return is "
        "over the threshold", "constant", choices=DELTA_SCHEDULES)
    add("--task-dist", "bimodal", "ρ over Φ: uniform; bimodal: its lowest and highest fifth; skewed: most near LOW",
        "uniform", choices=envs.TASK_DISTS)
    add("--range", "5 15", "Φ: LOW HIGH for each component of φ", shown="the environment's",
        nargs="+", type=number(float), metavar="BOUND")
    add("--estimator", "dice", "of the meta-gradient's second-order terms", "lvc", choices=policies.ESTIMATORS)
    add("--baseline", "step", "taken from the advantages: each task's mean, or each time step's",
        shown="task; crossing, point, velocity step", choices=policies.BASELINES)
    add("--optimizer", "adam", "of the β-step", "sgd", choices=OPTIMIZERS)
    add("--device", "cpu", "auto: cuda where there is one, but cpu for gymnasium's environments", "auto",
        choices=["auto", "cpu", "cuda"])
    add("--workers", "4", "processes that step gymnasium environments; 0: this one", shown="the number of cores",
        type=number(int, 0, 1024))
    add("--threads", "4", "CPU threads; more than one pays only in large sweeps", 1, type=number(int, 1, 1024))
    add("--eval-every", "10", "epochs between evaluations", 50, type=count)
    add("--eval-range", "0 20", "the held-out tasks' range, LOW HIGH for each component of φ", shown="Φ",
        nargs="+", type=number(float), metavar="BOUND")
    add("--eval-steps", "1", "evaluate after 0, 1, .. this many inner steps", 3, type=count)
    add("--out", "../runs", "folder of all runs", Path("runs"), type=Path)
    add("--watch", "runs/cartpole-pg/maml/seed1 --phi 12", "show one episode of that run's policy, adapted to a task",
        type=Path, metavar="RUN")
    add("--phi", "12", "the task to watch", shown="the mean task", nargs="+", type=number(float))
    # fmt: on
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with runs that exist, e.g. with more --epochs")
    existing.add_argument("--overwrite", action="store_true", help="start runs that exist anew")
    parser.add_argument("--quiet", action="store_true", help="no progress, only errors")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        parser.error(f"{unknown[0]}: {envs.hint(unknown[0], flags, 'those of --help')}")
    if args.watch is None and (args.env is None or args.algo is None):
        parser.error("--env and --algo are required, e.g. --env cartpole --algo directed-fomaml")
    check_pairs(args)
    return args


DELTA_SCHEDULES = ["constant", "decay", "converged"]


def check_pairs(args):
    """Refuse what contradicts or does nothing: a study of it would compare equal things."""
    directed_, meta_sgd = (any(word in algo for algo in args.algo or ()) for word in ("directed-", "meta-sgd"))
    for flag, given, works, needs in (
        ("--delta", args.delta, directed_, "an algorithm that begins with directed-"),
        ("--medium", args.medium != ["mean"], directed_, "an algorithm that begins with directed-"),
        ("--delta-schedule", args.delta_schedule != "constant", directed_, "an algorithm that begins with directed-"),
        ("--beta-alpha", args.beta_alpha, meta_sgd, "the algorithm meta-sgd or directed-meta-sgd"),
        ("--phi", args.phi, args.watch, "--watch RUN"),
    ):
        if given and not works:
            fail(f"{flag} does nothing without {needs}; leave it out, or add that", 2)
    for flag, values in (("--algo", args.algo or ()), ("--seed", args.seed), ("--delta", args.delta or ())):
        if len({f"{x:.12g}" if isinstance(x, float) else x for x in values}) < len(values):  # as folders are named
            fail(f"{flag} {' '.join(map(str, values))}: a value stands twice; name each once", 2)


class SGD:
    """The plain step p ← p − lr p.grad, bit for bit torch.optim.SGD's; but the first use of that one imports torch's
    compiler, which takes 1.4 s: as long as all else before the first epoch."""

    def __init__(self, groups, lr):
        self.param_groups = [{"lr": lr} | group for group in groups]
        self.state = collections.defaultdict(dict)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])


OPTIMIZERS = {"sgd": SGD, "adam": torch.optim.Adam}
TABLE_I = {"alpha": 0.001, "beta": 0.001, "delta": 0.005, "inner_steps": 1, "baseline": "task"}
# Paper: β for every learner. Here: ε = 1 for Reptile, since ε = 0.001 moves θ by 1e-6 ∇; 5 steps of α add up to M·β.
REPTILE = {"beta": 1.0, "inner_steps": 5}


def resolve_env(args):
    """The task family with --param, --range, --horizon and --threshold applied."""
    try:
        env = envs.make(args.env, args.param, args.range, args.horizon)
        if args.eval_range is not None:
            envs.check_bounds("--eval-range", args.eval_range, env.phi)
    except ValueError as error:
        fail(error, 2)
    env = replace(env, task_dist=args.task_dist)
    if args.threshold is not None:
        env = replace(env, threshold=args.threshold)
    if args.delta_schedule == "converged" and env.threshold is None:
        fail("--delta-schedule converged: give the return that counts as converged, --threshold", 2)
    return env


def resolve_medium(args, env):
    """--medium as one of the words, or a φ as a list of numbers."""
    if args.medium in (["mean"], ["sampled"], ["median"], ["random"]):
        return args.medium[0]
    try:
        phi = [float(x) for x in args.medium]
    except ValueError:
        phi = []
    if len(phi) != len(env.low) or not all(map(math.isfinite, phi)):
        fail(
            f"--medium {' '.join(args.medium)}: expected mean, sampled, median, random or {len(env.low)} number(s): "
            + ", ".join(env.phi), 2,
        )  # fmt: skip
    return phi


def resolve_device(args, env):
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device is available to torch; use --device cpu", 2)
    if args.device == "auto":
        return "cuda" if torch.cuda.is_available() and not env.in_workers else "cpu"
    return args.device


def root(args):
    """The folder of all runs on one environment; ids such as module:Name/Env-v0 stay one folder deep."""
    return args.out / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', args.env)}-{args.rl}"


def resolve_runs(args, algo, env):
    """Every setting of every run of one algorithm: {folder: settings}."""
    base = algo.removeprefix("directed-")
    defaults = TABLE_I | env.defaults | (REPTILE if base == "reptile" else {})
    given = {key: value for key in defaults if (value := getattr(args, key)) is not None}
    plain = "env param task_dist rl gamma gae_lambda tasks trajectories hidden estimator optimizer eval_steps"
    plain += " eval_range delta_schedule"
    common = {"algo": algo} | {key: getattr(args, key) for key in plain.split()} | defaults | given
    common |= {"horizon": env.horizon, "low": list(env.low), "high": list(env.high)}
    if algo == base:  # no δ-step, so none of its settings
        common |= {"medium": None, "delta_schedule": None}
    else:
        common["medium"] = resolve_medium(args, env)
    # Paper: α by β too. Here: α times β, since at β = 0.001 every step moves α by many times its 0.001: it diverges.
    own_step = args.beta_alpha or common["alpha"] * common["beta"]
    common["beta_alpha"] = own_step if base == "meta-sgd" else None
    deltas = (args.delta or [defaults["delta"]]) if algo != base else [None]
    common["threshold"] = env.threshold if common["delta_schedule"] == "converged" else None  # else of reports alone
    runs = {}
    for delta, seed in itertools.product(deltas, args.seed):
        folder = root(args) / algo / ("" if delta is None else f"delta{delta:.12g}") / f"seed{seed}"
        runs[folder] = common | {"delta": delta, "seed": seed}
    return runs


# --- files: nothing is ever half-written ---


def append_rows(path, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with report.named(path), open(path, "a", newline="") as file:
        file.write(text.getvalue())


def complete_rows(path):
    """The rows of a CSV file as lines, without its header and without what a crash left of a last one."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines[1:] if line.endswith("\n")]


def trim_rows(path, fields, keep):
    """Cut from a CSV file the rows that `keep(epoch)` does not want, and what a crash left of a last one."""
    rows = [line for line in complete_rows(path) if keep(int(line.split(",")[0]))]
    report.write_atomically(path, "".join([",".join(fields) + "\n", *rows]))


def save(folders, states):
    """The checkpoints of runs that train together. All are complete beside their places before the first is put in its
    own, so that a crash in between never parts the runs: see `roll_forward`."""
    for folder, state in zip(folders, states, strict=True):
        for name in ("log.csv", "eval.csv"):  # a checkpoint must not outlive its rows
            report.sync(folder / name)
        data = io.BytesIO()
        torch.save(state, data)
        report.write_durably(folder / ASIDE, data.getvalue())
    for folder in folders:
        os.replace(folder / ASIDE, folder / CHECKPOINT)


def roll_forward(runs, states, env):
    """Where a crash came while checkpoints were put in their places, some runs stand at the new epoch, and of all the
    others a complete checkpoint of that epoch lies aside: put it in its place, and they go on together."""
    epochs = {state["epoch"] for folder in runs if (state := states[folder])}
    for folder, settings in runs.items():
        with contextlib.suppress(Failure):  # half-written: the crash came before any was put in its place
            aside = load(folder / ASIDE, env, settings)
            if aside and aside["epoch"] in epochs and aside["epoch"] > (states[folder] or {"epoch": 0})["epoch"]:
                os.replace(folder / ASIDE, folder / CHECKPOINT)
                states[folder] = aside


def load(path, env=None, settings=None):
    """A checkpoint, or None where there is none; it must agree with `env` and `settings` where they are given.
    Loading never runs code: weights_only=True."""
    if not path.exists():
        return None
    remedy = "restore it, or start anew with --overwrite"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds, all of which mean the same here
        reason = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
        fail(f"{path}: not a checkpoint that torch can read ({reason}); {remedy}")
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        fail(f"{path}: not a checkpoint of this program; {remedy}")
    if state.get("format") != CHECKPOINT_FORMAT:
        fail(f"{path}: of format {state.get('format')!r}, this program's is {CHECKPOINT_FORMAT}; {remedy}")
    for key, value in (settings or {}).items():
        before = state["settings"].get(key)
        if json.dumps(before, default=repr) != json.dumps(value):  # as text, for it may be anything, even a tensor
            flag = "--" + {"low": "range", "high": "range"}.get(key, key).replace("_", "-")
            fail(
                f"{path.parent}: began with {key} {before}, this command says {value}; "
                f"give {flag} as before, another --out, or --overwrite", 2,
            )  # fmt: skip
    if settings is not None:
        got, expected = layout(state), checkpoint_layout(settings, env)
        for name in {**expected, **got}:
            if got.get(name) != expected.get(name):
                fail(f"{path}: {name} is {got.get(name)}, expected {expected.get(name)}; {remedy}")
        if state["epoch"] < 1:
            fail(f"{path}: epoch is {state['epoch']}, expected at least 1; {remedy}")
    return state


def layout(x, name="checkpoint"):
    """What a state is made of, its values aside: {name: shape and type}."""
    if isinstance(x, dict):
        return {k: v for key in x if key != "settings" for k, v in layout(x[key], f"{name}.{key}").items()}
    return {name: f"{list(x.shape)} {x.dtype}" if torch.is_tensor(x) else type(x).__name__}


def checkpoint_layout(settings, env):
    """The layout of every checkpoint with these settings."""
    batch = stack([new_state(settings, env)], [None], "cpu")
    for p in learned_by(batch.optimizer):
        p.grad = torch.zeros_like(p)
    batch.optimizer.step()  # Adam has its state from the first step on
    return layout(split(batch)[0])


@contextlib.contextmanager
def locked(folder, wait=False):
    """Meanwhile no other process writes in this folder. The lock is on the folder itself, so there is no lock file, and
    the system releases it however the process ends. There is none on Windows, nor where the file system has no locks.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{folder}: another process is training this run; wait for its end, or give another --out")
        except OSError:  # e.g. NFS, which wants the descriptor to be writable, and a folder's cannot be
            pass
        yield
    finally:
        os.close(descriptor)


# --- a batch of runs, and its checkpoints ---


@dataclass
class Batch:
    """S runs of one algorithm, trained as one program. Leaves of theta and alpha are (S, 1, ...)."""

    folders: list
    settings: list
    epoch: int
    theta: dict
    alpha: dict | float  # a dict where it is learned: Meta-SGD
    optimizer: SGD | torch.optim.Adam
    totals: list  # one dict a run: env_steps, seconds, sample_seconds; smoothed return_post, converged

    @property
    def device(self):
        return next(iter(self.theta.values())).device

    @property
    def seeds(self):
        return [settings["seed"] for settings in self.settings]


def action_head(env):
    return policies.Categorical(env.actions) if isinstance(env.actions, int) else policies.Gaussian(env.action_dim)


def new_state(settings, env):
    """Where a run begins: the same θ for every algorithm with the same seed."""
    start = envs.generators([settings["seed"]], INIT)
    critic = settings["rl"] == "ac"
    theta = policies.init(env.obs_dim, action_head(env), start, settings["hidden"], critic)
    meta_sgd = settings["algo"].endswith("meta-sgd")
    return {
        "format": CHECKPOINT_FORMAT,
        "settings": settings,
        "epoch": 0,
        "theta": theta,
        "alpha": maml.learned_alpha(theta, settings["alpha"]) if meta_sgd else settings["alpha"],
        "optimizer": {},
        "totals": {"env_steps": 0, "seconds": 0.0, "sample_seconds": 0.0, "smoothed": math.nan, "converged": False},
    }


def stack(states, folders, device):
    """States of runs at the same epoch -> Batch."""

    def join(dicts):
        return {key: torch.cat([d[key].detach() for d in dicts]).to(device).requires_grad_() for key in dicts[0]}

    settings = states[0]["settings"]
    theta = join([state["theta"] for state in states])
    alpha = settings["alpha"]
    if isinstance(states[0]["alpha"], dict):
        alpha = join([state["alpha"] for state in states])
    groups = [{"params": list(theta.values())}]
    if isinstance(alpha, dict):
        groups.append({"params": list(alpha.values()), "lr": settings["beta_alpha"]})
    optimizer = OPTIMIZERS[settings["optimizer"]](groups, lr=settings["beta"])
    for i, p in enumerate(learned_by(optimizer)):
        for key in states[0]["optimizer"].get(i, {}):
            parts = [state["optimizer"][i][key] for state in states]
            optimizer.state[p][key] = torch.cat(parts).to(device) if parts[0].dim() else parts[0].clone()
    totals = [dict(state["totals"]) for state in states]
    return Batch(folders, [s["settings"] for s in states], states[0]["epoch"], theta, alpha, optimizer, totals)


def learned_by(optimizer):
    """All its parameters: θ, and Meta-SGD's α."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def split(batch):
    """Batch -> the states of its runs, on the CPU."""

    def part(x, run):  # one run's slice; Adam's step count is the same for all
        return x[run : run + 1].detach().cpu().clone() if x.dim() else x.cpu().clone()

    states = []
    for run, settings in enumerate(batch.settings):
        learned_alpha = isinstance(batch.alpha, dict)
        states.append({
            "format": CHECKPOINT_FORMAT,
            "settings": settings,
            "epoch": batch.epoch,
            "theta": {key: part(p, run) for key, p in batch.theta.items()},
            "alpha": {key: part(p, run) for key, p in batch.alpha.items()} if learned_alpha else batch.alpha,
            "optimizer": {
                i: {key: part(x, run) for key, x in batch.optimizer.state[p].items() if torch.is_tensor(x)}
                for i, p in enumerate(learned_by(batch.optimizer))
            },
            "totals": batch.totals[run],
        })  # fmt: skip
    return states


# --- ranks: torchrun's processes ---


class Ranks:
    """The processes that share one training: each adapts to every count-th task, and rank 0 alone touches files.

    One process alone is rank 0 of 1. torchrun sets the environment variables; a connection lost is a Failure.
    """

    def __init__(self):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.tasks = slice(self.rank, None, self.count)  # its own of M tasks
        if self.count > 1:
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: nobody ends a killed torchrun's ranks
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
            # torchrun keeps the store itself, before there are ranks: where it is not found, it was killed meanwhile.
            by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            patience = timedelta(seconds=30) if by_torchrun else dist.default_pg_timeout
            with self.connected():
                self.store, *_ = next(dist.rendezvous("env://", timeout=patience))
                self.store.set_timeout(dist.default_pg_timeout)
                dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.count)

    @contextlib.contextmanager
    def connected(self):
        try:
            yield
        except RuntimeError as error:
            reason = re.sub(r"^\[\S*\] ", "", str(error).strip()).split(". ")[0]  # without where in torch's source
            fail(f"rank {self.rank}: another rank stopped ({reason}); start all again with --resume")

    def sum(self, tensors):
        """Each of the tensors becomes its sum over the ranks, in place, in one message."""
        if self.count > 1:
            self.exchange(tensors, dist.all_reduce)

    def take_from_first(self, tensors):
        """Each of the tensors becomes rank 0's, in place, in one message."""
        if self.count > 1:
            self.exchange(tensors, partial(dist.broadcast, src=0))

    @torch.no_grad()
    def exchange(self, tensors, send):
        message = torch.cat([x.flatten() for x in tensors])
        with self.connected():
            send(message)
        for x, part in zip(tensors, message.split([x.numel() for x in tensors]), strict=True):
            x.copy_(part.view_as(x))

    def object_from_first(self, make):
        """What `make()` returns on rank 0."""
        box = [make() if self.rank == 0 else None]
        if self.count > 1:
            with self.connected():
                dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def leave(self):
        if self.count > 1:
            dist.destroy_process_group()

    def first_to_fail(self):
        """True on one rank alone, whose failure is the cause of the others'."""
        try:
            return self.count == 1 or self.store.add("failures", 1) == 1
        except RuntimeError:  # the store went with the rank that kept it
            return True


# --- training ---


class Problem(NamedTuple):
    """What is learned on: the task family, its action distribution, and sample(params, phi, noise) -> trajectories."""

    env: envs.Env
    head: policies.Categorical | policies.Gaussian
    sample: Callable


class TaskLoss:
    """task_loss(params) -> (S, M): K fresh trajectories of each task φ (S, M, P) under params, and the loss on them.

    Of the M tasks it takes its `own` alone, with the noise that they would have in any company. Keeps every call's mean
    undiscounted returns (S, M), sums up env steps (S,) and the seconds of sampling, and knows of which runs every loss
    was finite (S,).
    """

    def __init__(self, problem, settings, phi, generators, own=slice(None)):
        self.problem, self.phi, self.generators, self.own = problem, phi, generators, own
        self.num_trajectories = settings["trajectories"]
        options = {key: settings[key] for key in ("gamma", "estimator", "baseline", "gae_lambda")}
        self.loss = partial(policies.LOSSES[settings["rl"]], head=problem.head, **options)
        self.returns, self.env_steps, self.seconds, self.finite = [], 0, 0.0, True

    def __call__(self, params):
        start = time.perf_counter()
        device = next(iter(params.values())).device
        noise = envs.draw_noise(self.problem.env, self.generators, self.phi.shape[1], self.num_trajectories)
        there = "cpu" if self.problem.env.in_workers else device  # gymnasium steps on the CPU
        noise = {key: x[:, self.own].to(there) for key, x in noise.items()}
        acting = {key: p.detach().to(there) for key, p in params.items()}
        batch = self.problem.sample(acting, self.phi[:, self.own].to(there), noise)
        batch = {key: x.to(device) for key, x in batch.items()}
        self.returns.append(batch["rewards"].sum(3).mean(2))
        self.env_steps = self.env_steps + batch["mask"].sum((1, 2, 3)).cpu()
        self.seconds += time.perf_counter() - start
        loss = self.loss(params, batch)
        self.finite = self.finite & loss.detach().isfinite().all(1)
        return loss


def train_epoch(batch, problem, ranks):
    """One epoch of Algorithm 1 for all runs of the batch; returns their rows for log.csv, and which are finite."""
    start = time.perf_counter()
    settings = batch.settings[0]
    num_tasks = settings["tasks"]
    tasks_rng, medium_rng = (envs.generators(batch.seeds, stream, batch.epoch) for stream in (TASKS, MEDIUM))
    phi = envs.sample_tasks(problem.env, tasks_rng, num_tasks)  # (S, M, P)
    task_loss, medium_loss = TaskLoss(problem, settings, phi, tasks_rng, ranks.tasks), None
    base = settings["algo"].removeprefix("directed-")
    meta_learner = partial(maml.META_LEARNERS[base], inner_steps=settings["inner_steps"])
    meta_learner = over_ranks(meta_learner, ranks, learned_by(batch.optimizer), average=base == "reptile")
    if base != settings["algo"]:
        phi_med = envs.medium_task(problem.env, settings["medium"], phi, medium_rng)  # (S, 1, P)
        medium_loss = TaskLoss(problem, settings, phi_med, medium_rng)  # every rank: cheaper than waiting for rank 0
        deltas = torch.tensor([delta_of(batch, run) for run in range(len(batch.seeds))], dtype=torch.float64)
        directed.directed(meta_learner, deltas)(batch.theta, medium_loss, task_loss, batch.alpha, num_tasks)
    else:
        meta_learner(batch.theta, task_loss, batch.alpha, num_tasks)
    batch.optimizer.step()

    batch.epoch += 1
    pre, post = (task_loss.returns[i].double().sum(1).cpu() / num_tasks for i in (0, -1))  # (S,) each
    env_steps, broken = task_loss.env_steps.double(), (~task_loss.finite).double().cpu()
    ranks.sum([pre, post, env_steps, broken])
    sample_seconds, med = task_loss.seconds, [None] * len(batch.seeds)
    if medium_loss is not None:
        env_steps += medium_loss.env_steps
        broken += (~medium_loss.finite).cpu()
        sample_seconds += medium_loss.seconds
        med = medium_loss.returns[0].mean(1).tolist()
    seconds = time.perf_counter() - start
    rows = []
    for run, totals in enumerate(batch.totals):
        totals["env_steps"] += int(env_steps[run])
        totals["smoothed"] = report.smoothed(totals["smoothed"], float(post[run]))
        if settings["threshold"] is not None:
            totals["converged"] |= totals["smoothed"] > settings["threshold"]
        totals["seconds"] += seconds / len(batch.totals)  # a run's share of the batch's time
        totals["sample_seconds"] += sample_seconds / len(batch.totals)
        times = [f"{totals[key]:.4f}" for key in ("seconds", "sample_seconds")]
        returns = ["" if x is None else f"{x:.7g}" for x in (pre[run], post[run], med[run])]
        rows.append([batch.epoch, totals["env_steps"], *times, *returns])
    finite = [p.detach().isfinite().flatten(1).all(1).cpu() for p in learned_by(batch.optimizer)]
    return rows, torch.stack([*finite, broken == 0]).all(0).tolist()


def delta_of(batch, run):
    """δ of a run at this epoch."""
    settings = batch.settings[run]
    if settings["delta_schedule"] == "decay":
        return settings["delta"] / (1 + batch.epoch / 100)
    return 0.0 if batch.totals[run]["converged"] else settings["delta"]


def over_ranks(meta_learner, ranks, learned, average):
    """The meta-learner on this rank's share of the tasks, all ranks at rank 0's θ, and the sum of their meta-gradients
    in `.grad` of the parameters `learned`; or the average, for a meta-learner that averages over tasks itself."""

    def sharded_meta_learner(theta, task_loss, alpha, num_tasks):
        ranks.take_from_first(list(theta.values()))  # after a δ-step, whose rounding may differ between machines
        meta_learner(theta, task_loss, alpha, num_tasks // ranks.count)
        ranks.sum([p.grad for p in learned])
        for p in learned:
            p.grad /= ranks.count if average else 1

    return meta_learner if ranks.count == 1 else sharded_meta_learner


def evaluate(batch, problem, ranks):
    """Returns on the held-out grid (G, P) after 0, 1, .. eval_steps inner steps; each run's rows for eval.csv."""
    settings = batch.settings[0]
    grid = envs.held_out_tasks(problem.env, settings["eval_range"])
    rng = envs.generators(batch.seeds, EVALUATION, batch.epoch)
    task_loss = TaskLoss(problem, settings, grid.expand(len(batch.seeds), *grid.shape), rng, ranks.tasks)
    returns = torch.zeros(len(batch.seeds), len(grid), settings["eval_steps"] + 1, dtype=torch.float64)
    own = returns[:, ranks.tasks]  # a view: (S, this rank's share of G, steps + 1)
    if own.numel():
        theta = maml.expand(batch.theta, own.shape[1])
        adapted = maml.adapt(theta, task_loss, batch.alpha, settings["eval_steps"], second_order=False)
        task_loss({name: p.detach() for name, p in adapted.items()})  # the returns after the last step
        own.copy_(torch.stack(task_loss.returns, 2))
    ranks.sum([returns])
    names = [" ".join(f"{x:g}" for x in phi) for phi in grid.tolist()]
    return [
        [
            (batch.epoch, name, step, f"{x:.7g}")
            for name, xs in zip(names, run, strict=True)
            for step, x in enumerate(xs)
        ]
        for run in returns.tolist()
    ]


def fail_run(batch, run, writes):
    """Mark a run of the batch as failed, where this process writes; returns the line to say."""
    settings = batch.settings[run]
    delta = "" if settings["delta"] is None else f", delta {settings['delta']:g}"
    line = (
        f"{settings['algo']}, seed {settings['seed']}{delta}: a loss or parameter is not finite after epoch "
        f"{batch.epoch}; try a smaller --beta, --alpha or --delta"
    )
    if writes:
        report.write_atomically(batch.folders[run] / "failed.txt", line + "\n")
    return line


def train(batch, problem, epochs, eval_every, quiet, stop, ranks):
    """Train a batch to `epochs`; returns a line for each run that failed. Stops early where `stop()` says so."""
    failures = []
    writes = ranks.rank == 0
    saved = time.perf_counter()
    settings = batch.settings[0]
    name = f"{settings['algo']} x{len(batch.seeds)}" if len(batch.seeds) > 1 else settings["algo"]
    hidden = True if quiet or not writes else None  # None: where there is no terminal
    bar = tqdm(total=epochs, initial=batch.epoch, desc=name, unit="epoch", disable=hidden)
    with bar:
        while batch.epoch < epochs:
            rows, finite = train_epoch(batch, problem, ranks)
            if writes:
                for folder, row in zip(batch.folders, rows, strict=True):
                    append_rows(folder / "log.csv", [row])
            if not all(finite):
                failures += [fail_run(batch, run, writes) for run, good in enumerate(finite) if not good]
                kept = [run for run, good in enumerate(finite) if good]
                if not kept:
                    break
                states = split(batch)
                batch = stack([states[run] for run in kept], [batch.folders[run] for run in kept], batch.device)
            bar.set_postfix(return_post=f"{sum(float(row[5]) for row in rows) / len(rows):.4g}", refresh=False)
            bar.update()
            stopping = stop()
            if batch.epoch % eval_every == 0 or batch.epoch == epochs:
                evaluations = evaluate(batch, problem, ranks)
                if writes:
                    for folder, rows in zip(batch.folders, evaluations, strict=True):
                        append_rows(folder / "eval.csv", rows)
            due = stopping or batch.epoch == epochs or time.perf_counter() - saved > CHECKPOINT_SECONDS
            if writes and due:
                save(batch.folders, split(batch))
                saved = time.perf_counter()
            if stopping:
                break
    return failures


# --- the command ---


RUN_FILES = [CHECKPOINT, ASIDE, "failed.txt", "log.csv", "eval.csv", "config.json"]


@contextlib.contextmanager
def open_runs(plans, args, env):
    """{folder: state, None where it is new} of all runs, whose folders are this process's alone meanwhile. Nothing is
    written before all is found good."""
    runs = {folder: settings for plan in plans for folder, settings in plan.items()}
    new = [folder for folder in runs if not folder.exists()]
    with contextlib.ExitStack() as locks:
        for folder in runs:
            if folder not in new:
                locks.enter_context(locked(folder))
        states = {folder: open_run(folder, settings, args, env) for folder, settings in runs.items()}
        for folder in new:
            folder.mkdir(parents=True)  # raises where another process has just made it
            locks.enter_context(locked(folder))
        for plan in plans if args.resume else []:
            roll_forward(plan, states, env)
        yield states


def open_run(folder, settings, args, env):
    """The run's state, or None. Refuses a run that exists without --resume or --overwrite; writes nothing."""
    exists = any((folder / name).exists() for name in RUN_FILES)
    if exists and not (args.resume or args.overwrite):
        fail(f"{folder}: this run exists; give --resume to go on, --overwrite to start anew, or another --out", 2)
    state = load(folder / CHECKPOINT, env, settings) if args.resume else None
    if state is None:
        return None
    remedy = "restore it, or start anew with --overwrite"
    rows = [line.split(",") for line in complete_rows(folder / "log.csv")[: state["epoch"]]]
    if [row[0] for row in rows] != [str(epoch) for epoch in range(1, state["epoch"] + 1)]:
        fail(f"{folder / 'log.csv'}: does not hold epochs 1 to {state['epoch']}, as {CHECKPOINT} does; {remedy}")
    for name, fields in (("log.csv", LOG_FIELDS), ("eval.csv", EVAL_FIELDS)):
        for line in complete_rows(folder / name):
            if line.count(",") != len(fields) - 1 or not line.split(",")[0].isdecimal():
                fail(f"{folder / name}: {line.strip()[:40]!r} is no row of {','.join(fields)}; {remedy}")
    epochs = args.epochs or env.epochs
    if epochs < state["epoch"]:
        fail(f"{folder}: is at epoch {state['epoch']} already; give --epochs {state['epoch']} or more", 2)
    return state


def begin(folder, settings, state, args, env, extra):
    """Make the run's folder ready: an empty one, or one whose rows behind the checkpoint are cut off."""
    epochs = args.epochs or env.epochs
    epoch = state["epoch"] if state else 0
    for name in RUN_FILES if epoch == 0 else ["failed.txt"]:
        (folder / name).unlink(missing_ok=True)
    config = settings | {
        "epochs": epochs,
        "eval_every": args.eval_every,
        "threshold": env.threshold,
        "phi": list(env.phi),
        **extra,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gymnasium": gymnasium.__version__,
            "numpy": numpy.__version__,
        },
    }
    report.write_atomically(folder / "config.json", json.dumps(config, indent=1) + "\n")
    trim_rows(folder / "log.csv", LOG_FIELDS, lambda row: row <= epoch)
    # An evaluation off the schedule, at what was the last epoch, is not one that a longer run would have made.
    scheduled = {epochs, *range(0, epoch + 1, args.eval_every)}
    trim_rows(folder / "eval.csv", EVAL_FIELDS, lambda row: row <= epoch and row in scheduled)


def words(settings):
    """The command line of a run's settings."""
    line = []
    bounds = [x for pair in zip(settings["low"], settings["high"], strict=True) for x in pair]
    for key, value in (settings | {"range": bounds}).items():
        if value is not None and key not in ("low", "high"):
            values = value if isinstance(value, list) else [value]
            # Without an exponent, for argparse takes -1e-05 for a flag.
            shown = [numpy.format_float_positional(x) if isinstance(x, float) else str(x) for x in values]
            line += ["--" + key.replace("_", "-"), *shown]
    return line


def settings_of(state, path, trusted):
    """(settings, env) of a checkpoint that may come from anybody: what a command line may say, and nothing else.

    An environment module:id runs that module's code, so it must be the one that the user names, `trusted`.
    """
    try:
        args = parse_args(words(state["settings"]))
    except (KeyError, TypeError, ValueError) as error:
        fail(f"{path}: its settings are not those of a run ({error})")
    if ":" in args.env and args.env != trusted:
        fail(f"{path}: runs the code of module {args.env}; if you trust it, give --env {args.env} too", 2)
    env = resolve_env(args)
    (settings,) = resolve_runs(args, args.algo[0], env).values()
    load(path, env, settings)
    return settings, env


def watch(folder, phi, trusted):
    """One episode of a run's policy, adapted to φ: an animation in its folder, and a window where there is one."""
    state = load(folder / CHECKPOINT)
    if state is None:
        fail(f"--watch {folder}: there is no {CHECKPOINT}; name the folder of one run", 2)
    settings, env = settings_of(state, folder / CHECKPOINT, trusted)
    phi = envs.medium_task(env, "mean", torch.empty(1), None) if phi is None else torch.tensor([[phi]])
    if phi.shape[-1] != len(env.phi):
        fail(f"--phi: expected {len(env.phi)} number(s): {', '.join(env.phi)}", 2)
    rng = envs.generators([settings["seed"]], WATCH)
    batch = stack([state], [folder], "cpu")
    with open_problem(env, 0, "cpu") as problem:
        task_loss = TaskLoss(problem, settings, phi, rng)
        theta = maml.adapt(batch.theta, task_loss, batch.alpha, settings["inner_steps"], second_order=False)
        noise = envs.draw_noise(env, rng, 1, 1)
        episode = problem.sample(theta, phi, noise)
    path = folder / f"watch-{'_'.join(f'{x:g}' for x in phi.flatten().tolist())}.gif"
    try:
        report.animate(envs.frames(settings["env"], env, phi, noise, episode), episode, env, phi, path)
    except ImportError as error:
        fail(f"--watch: {error}; animations need matplotlib: pip install matplotlib")
    length, total = int(episode["mask"].sum()), float(episode["rewards"].sum())
    print(f"{length} steps, return {total:.4g} after {settings['inner_steps']} inner step(s); wrote {path}")


def main(argv=None):
    with one_clear_line() as ranks:
        command(sys.argv[1:] if argv is None else argv, ranks)


def command(argv, ranks):
    args = parse_args(argv)
    if args.watch is not None:
        return watch(args.watch, args.phi, args.env)
    env = resolve_env(args)
    device = resolve_device(args, env)
    plans = [resolve_runs(args, algo, env) for algo in args.algo]
    check_ranks(args, ranks)
    keep_memory()
    torch.set_num_threads(args.threads)
    failures, stopped = [], []
    cores = max(os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    workers = cores if args.workers is None else args.workers
    with (
        open_runs(plans, args, env) if ranks.rank == 0 else contextlib.nullcontext() as own_states,
        catch_signals() as signals,
        open_problem(env, workers, device) as problem,
    ):

        def stop():
            """Whether this rank or another has caught a signal: one answer for all, whenever it comes."""
            caught = torch.tensor([float(len(signals))])
            ranks.sum([caught])
            if caught:
                stopped.append(signals[0] if signals else signal.SIGTERM)
            return bool(caught)

        states = ranks.object_from_first(lambda: own_states)
        for group in (group for runs in plans for group in batches(runs, states)):
            if not stopped:
                failures += train_group(group, states, problem, args, device, stop, ranks)
    ranks.object_from_first(lambda: finish(failures, args))
    if stopped:
        line = [word for word in argv if word not in ("--resume", "--overwrite")]
        start = "python" if ranks.count == 1 else "torchrun .."
        ranks.leave()  # all stop in good order; without this torch's tear-down may abort
        fail(f"stopped; go on with: {start} run.py {shlex.join(line)} --resume", 128 + stopped[0])
    if failures:
        raise SystemExit(1)


def finish(failures, args):
    """Say which runs failed, and rewrite the report."""
    for line in failures:
        print(f"run.py: {line}", file=sys.stderr)
    with locked(root(args), wait=True):  # another command may end just now
        wrote, left_out = report.write(root(args))
    for line in left_out:
        print(f"run.py: {line}", file=sys.stderr)
    for line in [] if args.quiet else wrote:
        print(line)


def check_ranks(args, ranks):
    """All ranks must do the same, and have equally many tasks."""
    if args.tasks % ranks.count:
        fail(f"--tasks {args.tasks}: {ranks.count} ranks cannot share them evenly; give a multiple of {ranks.count}", 2)
    own = {key: value for key, value in vars(args).items() if key not in ("workers", "threads", "quiet")}
    for key, value in ranks.object_from_first(lambda: own).items():
        if own[key] != value:
            flag = f"--{key.replace('_', '-')}"
            fail(f"{flag}: {own[key]} on rank {ranks.rank}, {value} on rank 0; start all with the same command", 2)


def batches(runs, states):
    """The runs of one algorithm in groups that stand at the same epoch: [{folder: settings}, ..]."""
    groups = {}
    for folder, settings in runs.items():
        epoch = states[folder]["epoch"] if states[folder] else 0
        groups.setdefault(epoch, {})[folder] = settings
    return list(groups.values())


def train_group(group, states, problem, args, device, stop, ranks):
    """Begin or go on with the runs of a group as one batch; returns a line for each that failed."""
    for folder, settings in group.items() if ranks.rank == 0 else ():
        begin(folder, settings, states[folder], args, problem.env, {"device": device, "runs_in_batch": len(group)})
    begun = [states[folder] or new_state(settings, problem.env) for folder, settings in group.items()]
    batch = stack(begun, list(group), device)
    return train(batch, problem, args.epochs or problem.env.epochs, args.eval_every, args.quiet, stop, ranks)


@contextlib.contextmanager
def catch_signals():
    """A list that a first Ctrl-C or SIGTERM is put on, for training to end after its epoch; a second ends at once, a
    third even inside a library."""
    signals = []

    def on_signal(signum, frame):
        signals.append(signum)
        if len(signals) > 1:
            for each in before:
                signal.signal(each, signal.SIG_DFL)
            raise KeyboardInterrupt

    before = {signum: signal.signal(signum, on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def open_problem(env, workers, device):
    """The problem, with its worker processes for as long as it is open."""
    head = action_head(env)
    make_act = partial(policies.actor, head=head)
    if device == "cuda" and not env.in_workers:
        yield Problem(env, head, envs.CapturedRollout(env, make_act))
    elif not env.in_workers:
        yield Problem(env, head, lambda params, phi, noise: envs.rollout(env, make_act(params), phi, noise))
    elif workers == 0:
        yield Problem(env, head, partial(envs.rollout_here, env, make_act))
    else:
        with envs.Workers(env, workers) as processes:
            yield Problem(env, head, partial(processes.rollout, make_act))


def keep_memory():
    """Have glibc reuse freed memory. By default it returns every large tensor to the system, and a sweep of 16 runs
    then spends a third of its time on page faults."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal or a log file may have no δ
    main()
