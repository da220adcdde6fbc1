"""How a run begins: its first state, and a folder with all that somebody needs to repeat it."""

import itertools
import math
import platform

import gymnasium
import numpy
import torch

import envs
import maml
import policies
from harness import checkpoints
from harness.checkpoints import Run
from harness.gyms import info_names
from harness.plan import before_flags, plan
from harness.settings import learner_of


def new_runs(args, env):
    """All runs of a command, at their first state."""
    planned = [pair for algo in args.algo for pair in plan(args, algo, env)]
    return [Run(folder, own, first_state(own, env), before_flags(own, env)) for folder, own in planned]


def first_state(settings, env):
    """Where a run begins: the same θ for every algorithm with the same seed."""
    stream, calls = envs.stream([settings["seed"]], envs.INIT), itertools.count()

    def uniform(*shape):
        return torch.from_numpy(envs.uniform(stream, next(calls), range(1), shape))

    head, critic = policies.make_head(env.actions), policies.LOSSES[settings["rl"]].critic
    theta = policies.init(env.obs_dim, head, uniform, settings["hidden"], critic)
    learner, alpha = learner_of(settings["algo"]), {}
    if learner.learns_alpha:
        steps = settings["inner_steps"] if learner.alpha_by_step else None
        alpha = maml.learned_alpha(theta, settings["alpha"], steps)
    optimizer = {}
    if settings["optimizer"] == "adam":
        zeros = [torch.zeros_like(p) for p in (*theta.values(), *alpha.values())]
        optimizer = {i: {"step": torch.tensor(0.0), "exp_avg": z, "exp_avg_sq": z.clone()} for i, z in enumerate(zeros)}
    totals = {"env_steps": 0, "seconds": 0.0, "sample_seconds": 0.0, "smoothed": math.nan, "converged": False}
    state = {"format": checkpoints.FORMAT, "settings": settings, "epoch": 0, "totals": totals, "log": [], "eval": []}
    return state | {"info": [], "theta": theta, "alpha": alpha, "optimizer": optimizer}


def begin(run, args, env, device, runs_in_batch):
    """Make the run's folder ready, with everything that somebody needs to repeat the run in config.json."""
    versions = {m.__name__: m.__version__ for m in (torch, gymnasium, numpy)} | {"python": platform.python_version()}
    here = {"epochs": args.epochs, "eval_every": args.eval_every, "threshold": args.threshold, "device": device}
    here |= {"phi_names": list(env.phi_names), "runs_in_batch": runs_in_batch, "versions": versions}
    here["cpu"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"  # bits depend on it
    evaluated = {args.epochs, *range(0, args.epochs, args.eval_every)}
    checkpoints.begin(run, run.settings | here, evaluated, info_names(env))
