"""Plan: what a parsed command line becomes: the task family, and the folder and settings of each run."""

import argparse
import itertools
import math
import re
from types import SimpleNamespace

import envs
from harness import gyms
from harness.checkpoints import RunError
from harness.device import memory
from harness.settings import ALL_SETTINGS, SWEPT, applies, default_of, is_directed, learner_of
from harness.trial import check_tasks

FLAGS = {"name": "--env", "names": "--param", "bounds": "--range"}  # of arguments of gyms.make with other names


def make_env(args):
    """The command line's task family, and its held-out tasks checked."""
    try:
        env = gyms.family_of(vars(args))
        if args.eval_range is not None:
            envs.check_bounds("eval_range", args.eval_range, env.phi_names)
        grid = envs.held_out_tasks(env, args.eval_range, args.eval_values)
        if env.is_gymnasium and (args.eval_range or args.eval_values):
            check_tasks(env, "eval_values" if args.eval_values else "eval_range", grid.unique(dim=0).tolist())
    except envs.ArgumentError as error:
        raise RunError(error.line(FLAGS.get(error.argument) or ALL_SETTINGS[error.argument].flag), 2) from error
    return env


def with_family_defaults(args, env):
    """The command line with --epochs and --threshold as the task family has them, where they are not given."""
    missing = [name for name in ("epochs", "threshold") if getattr(args, name) is None]
    defaults = {name: default_of(ALL_SETTINGS[name], env) for name in missing}
    return argparse.Namespace(**vars(args) | defaults)


def plan(args, algo, env):
    """The runs of one algorithm, a folder and settings each: every setting that makes a run what it is; None for those
    that do not apply to it."""
    settings = identity(args, algo, env, vars(args))
    settings["threshold"] = default_of(ALL_SETTINGS["threshold"], env) if args.threshold is None else args.threshold
    settings |= {"algo": algo, "range": [x for pair in zip(env.low, env.high, strict=True) for x in pair]}
    if settings["delta_schedule"] != "converged":
        settings["threshold"] = None
    elif settings["threshold"] is None:
        raise RunError("--delta-schedule converged: give the return that counts as converged, --threshold", 2)
    if settings["medium"] is not None:
        settings["medium"] = medium_of(args, env)
    swept = {name: getattr(args, name) or [settings[name]] for name in SWEPT}
    if not is_directed(algo):
        swept["delta"] = [None]
    learner, runs = learner_of(algo), []
    for values in itertools.product(*swept.values()):
        own = settings | dict(zip(swept, values, strict=True))
        if not (own["alpha"] or own["eval_alpha"] or learner.learns_alpha):
            own["eval_alpha"] = default_of(ALL_SETTINGS["alpha"], env, algo)
        check_run(own, args.beta_alpha)
        if learner.learns_alpha and args.beta_alpha is None:
            # Paper: α by β too. Here: α times β; at β = 0.001 every step moves α by many times its 0.001: it diverges.
            own["beta_alpha"] = own["alpha"] * own["beta"]
        if learner.proximal and args.lambda_ is None:
            # Then α(∇L(θ') + λ(θ' − θ)) = α∇L(θ') + θ' − θ: every inner step is θ' ← θ − α∇L(θ'), as far as MAML's one.
            own["lambda_"] = 1 / own["alpha"]
        check_pull(own)
        varied = [x for x in SWEPT if own[x] is not None and (x in ("delta", "seed") or len(swept[x]) > 1)]
        names = [f"{x}{own[x]:.12g}" if x != "seed" else f"seed{own[x]}" for x in varied]
        runs.append((folder_of_all(args) / algo / "/".join(names), own))
    return runs


def before_flags(settings, env=None):
    """What each setting was in runs from before its flag existed: its default where it applies.

    settings: of such a run, or of the command that resumes it; env: its task family, if it is a listed one.
    """
    algo = settings["algo"]
    args = SimpleNamespace(**dict.fromkeys(ALL_SETTINGS) | settings)
    return identity(args, algo, env, {})


def identity(args, algo, env, given):
    """What makes a run that run, as config.json has it: what is given, else the default; None where it does not apply.

    args: what decides whether a setting applies; given: {name: value, or None}.
    """
    found = {}
    for setting in (x for x in ALL_SETTINGS.values() if x.identity):
        value = given.get(setting.name)
        if value is None:
            value = False if setting.type is bool else default_of(setting, env, algo)
        value = list(value) if isinstance(value, tuple) else value
        found[setting.name] = value if setting.kept or applies(setting, args, algo) else None
    return found


def check_run(settings, beta_alpha):
    """Reject settings under which a run would train nothing, or that do not fit together."""
    algo, baseline, trajectories = settings["algo"], settings["baseline"], settings["trajectories"]
    if settings["medium"] == "pooled" and trajectories % settings["tasks"]:
        tasks = f"--tasks {settings['tasks']}"
        raise RunError(
            f"--medium pooled: --trajectories {trajectories} is not a multiple of {tasks}; give one that is", 2
        )
    learner = learner_of(algo)
    if settings["inner_steps"] == 0 and not learner.joint_training:
        raise RunError(f"--inner-steps 0: {algo} learns from inner steps; for joint training give --algo maml", 2)
    alpha_grows = learner.learns_alpha and beta_alpha is not None
    if settings["alpha"] == 0 and not (learner.joint_training or alpha_grows):
        remedy = "--alpha above 0, or --beta-alpha" if learner.learns_alpha else "--alpha above 0"
        raise RunError(f"--alpha 0: {algo} would never take an inner step; give {remedy}", 2)
    if settings["outer_steps"] > 1 and settings["estimator"] != "lvc":
        steps = f"--outer-steps {settings['outer_steps']}"
        raise RunError(f"{steps}: --estimator {settings['estimator']} has no likelihood ratio; give lvc", 2)
    if trajectories == 1 and baseline in ("step", "linear"):
        remedy = "give --trajectories 2 or more, or --baseline task"
        raise RunError(f"--trajectories 1: --baseline {baseline} compares trajectories of a task; {remedy}", 2)


def check_pull(settings):
    """Reject a λ with which every inner step overshoots θ itself by as much as it was away, or more."""
    alpha, lambda_ = settings["alpha"], settings["lambda_"]
    if lambda_ is not None and alpha * lambda_ >= 2:
        raise RunError(
            f"--lambda {lambda_:g}: with --alpha {alpha:g} the inner steps diverge, since α λ >= 2; give a --lambda "
            f"below {2 / alpha:g}, or a smaller --alpha", 2,
        )  # fmt: skip


def folder_of_all(args):
    """The folder of all runs on one environment; ids such as module:Name/Env-v0 stay one folder deep."""
    return args.out / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', args.env)}-{args.rl or 'pg'}"


def medium_of(args, env):
    """--medium as one of the words, or a φ as a list of numbers."""
    words = args.medium or default_of(ALL_SETTINGS["medium"])
    mean_in_list = words[0] == "mean" and tuple(envs.mean_task(env)) in env.values
    if words[0] in ("mean", "sampled", "median") and env.values and not mean_in_list:
        remedy = "give --medium one of them, random or pooled"
        if not gyms.mixes(env):
            raise RunError(f"--medium {words[0]}: what lies between whole-numbered --values is no task; {remedy}", 2)
        if args.medium is None:
            problem = "--medium mean: the mean of --values is none of them, and may be no task"
            raise RunError(f"{problem}; {remedy}, or mean where it is one", 2)
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


LESS_MEMORY = "give fewer --seed, --delta, --tasks, --trajectories or a smaller --horizon or --hidden"


def check_memory(args, env, device):
    """Refuse what cannot fit into memory before it starts: at the least, every task has its parameters twice, and the
    gradient needs every layer's activations three times; all runs of one algorithm train at once, and those of others
    too where there are as many processes."""

    def value(name):
        given = getattr(args, name)
        return default_of(ALL_SETTINGS[name], env) if given is None else given

    sizes = [env.obs_dim, *value("hidden"), env.action_dim]
    params = sum(a * b for a, b in itertools.pairwise(sizes))
    activations = value("trajectories") * env.horizon * sum(sizes[1:])
    alike = math.prod(len(getattr(args, name) or [0]) for name in SWEPT if name != "delta")
    runs = [alike * (len(args.delta or [0]) if is_directed(algo) else 1) for algo in args.algo]
    at_once = sum(sorted(runs)[-1 if device == "cuda" else -max(args.workers, 1) :])  # the largest
    need = 4 * at_once * value("tasks") * (2 * params + 3 * activations)
    have = memory(device)
    if need > have:
        what = "GPU" if device == "cuda" else "machine"
        raise RunError(
            f"this needs {need / 2**30:,.0f} GiB of memory at the least, and the {what} has {have / 2**30:.0f}; "
            f"{LESS_MEMORY}", 2,
        )  # fmt: skip
