"""Settings: the one table of flags, and how a command line becomes the task family and the settings of each run.

A new flag is one row of `SETTINGS`. The parser, --help, the checks, config.json, what a checkpoint is checked with and
the README's table of flags come from it.
"""

import argparse
import itertools
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import envs
import maml
import policies
from harness import checkpoints, gyms
from harness.checkpoints import RunError
from harness.device import memory
from harness.errors import first_line, hint
from harness.trial import check_tasks


@dataclass(frozen=True)
class Setting:
    """A flag of the command line. needs: what it does nothing without, a key of NEEDS."""

    name: str
    help: str
    example: str = ""
    type: Callable = str  # of one value; bool: a switch
    default: object = None  # where neither gyms.FAMILIES nor ALGORITHM_DEFAULTS has another
    shown: str = ""  # the default in words, where it is no value
    nargs: str | None = None
    choices: tuple = ()
    needs: str = ""
    identity: bool = True  # part of what makes a run that run: it cannot change on --resume
    letter: str = ""  # the paper's, for the lines of a report

    @property
    def flag(self):
        return checkpoints.flag_of(self.name)


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


OPTIMIZERS = ("sgd", "adam")
UNDIRECTED = (*maml.META_LEARNERS, "imaml", "sharp-maml", "sharp-fomaml")
ALGORITHMS = (*UNDIRECTED, *("directed-" + name for name in UNDIRECTED))
LEARNED_ALPHA = ("meta-sgd", "maml++")  # these, with and without the δ-step, learn α
# Paper: β for every learner. Here: ε = 1 for Reptile, since ε = 0.001 moves θ by 1e-6 ∇; 5 steps of α add up to M·β.
# MAML++ is about several inner steps: with one it is Meta-SGD.
ALGORITHM_DEFAULTS = {"reptile": {"beta": 1.0, "inner_steps": 5}, "maml++": {"inner_steps": 2}}
NEEDS = {
    "an algorithm that begins with directed-": lambda args, algo: algo.startswith("directed-"),
    "an algorithm whose α is learned": lambda args, algo: algo.endswith(LEARNED_ALPHA),
    "--rl ac": lambda args, algo: args.rl == "ac",
    "--watch RUN": lambda args, algo: args.watch is not None,
    "--advantages whitened": lambda args, algo: args.advantages != "raw",
    "--inner-steps 1 or more": lambda args, algo: args.inner_steps != 0,
    "an algorithm whose α is not learned": lambda args, algo: not algo.endswith(LEARNED_ALPHA),
    "the algorithm imaml or directed-imaml": lambda args, algo: algo.endswith("imaml"),
    "the algorithm maml++ or directed-maml++": lambda args, algo: algo.endswith("maml++"),
    "an algorithm with sharp- in its name": lambda args, algo: "sharp-" in algo,
    "--outer-steps 2 or more, and a learner other than reptile": lambda args, algo: (
        (args.outer_steps or 1) > 1 and not algo.endswith("reptile")
    ),
}
SWEPT = ("alpha", "beta", "delta", "seed")  # settings of which a command may give several values
DIRECTED, LEARNS_ALPHA, ACTOR_CRITIC, WATCH, WHITENED, ADAPTING, FIXED_ALPHA, *OWN = NEEDS
IMAML, MAML_PLUS_PLUS, SHARP, REPLAYING = OWN
count, size, step_size = number(int, 1, 10**9), number(float, 0), number(float, 0, above=True)
# fmt: off
SETTINGS = {
    "task": [
        Setting("env", f"task family: {', '.join(gyms.FAMILIES)}, or any gymnasium id with --param, --range",
                "cartpole"),
        Setting("param", "numbers of a gymnasium environment that are φ: attributes, paths such as "
                "model.opt.gravity[2], or make.NAME, a keyword of its constructor", "g", nargs="+"),
        Setting("make", "keywords for the constructor of a gymnasium environment, NAME=VALUE", "enable_wind=True",
                shown="none", nargs="+"),
        Setting("range", "Φ: LOW HIGH for each component of φ", "5 15", number(float), None, "by env", "+"),
        Setting("values", "instead of --range: tasks φ one after the other, ρ is uniform over them", "0 1 2 5",
                number(float), nargs="+"),
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
        Setting("outer_steps", "β-steps on the same trajectories, all after the first on likelihood ratios to the "
                "policies that drew them (ProMP); the δ-step comes once, before the first", "5", count, 1),
        Setting("clip", "ε: later β-steps clip the likelihood ratios of their query batches to 1 ± ε", "0.3",
                step_size, None, "none", needs=REPLAYING, letter="ε"),
        Setting("kl_penalty", "η: later β-steps add η KL(π_old ‖ π), summed over time, of the policy before adaptation",
                "0.01", size, 0.0, needs=REPLAYING, letter="η"),
        Setting("medium", "the medium task: mean of ρ (Eq. 3); of the epoch's tasks sampled (their mean, Eq. 4) or "
                "median (geometric); random: another random task each epoch (the control); pooled: the epoch's own M "
                "tasks, K / M trajectories of each (the other control); or a φ", "sampled",
                default=("mean",), nargs="+", needs=DIRECTED),
        Setting("optimizer", "of the β-step; the δ-step is always plain", "adam", default="sgd",
                choices=OPTIMIZERS),
        Setting("hidden", "widths of the tanh layers", "100 100", count, (64, 64), nargs="+"),
    ],
    "step sizes": [
        Setting("alpha", "inner step size α, one or several; 0: joint training with MAML's sampling", "0.01", size,
                0.001, nargs="+", needs=ADAPTING, letter="α"),
        Setting("beta", "outer step size β, Reptile's ε; one or several", "0.02", step_size, 0.001, nargs="+",
                letter="β"),
        Setting("delta", "δ, one or several, all trained at once", "0 0.001 0.005", size, 0.005, nargs="+",
                needs=DIRECTED, letter="δ"),
        Setting("delta_schedule", "constant; decay: δ / (1 + epoch / 100); converged: 0 once the smoothed return is "
                "over the threshold", "decay", default="constant", choices=("constant", "decay", "converged"),
                needs=DIRECTED),
        Setting("beta_alpha", "outer step size of a learned α", "0.001", step_size, None, "α times β",
                needs=LEARNS_ALPHA),
    ],
    "settings of single algorithms": [
        Setting("lambda_", "λ of iMAML's inner objective L + λ/2 ‖θ' − θ‖²", "100", step_size, None, "1 / α",
                needs=IMAML, letter="λ"),
        Setting("cg_steps", "steps of conjugate gradients for iMAML's meta-gradient; 0: no Hessian", "10",
                number(int, 0, 10**9), 1, needs=IMAML),
        Setting("first_order_epochs", "first epochs of MAML++ with first-order meta-gradients", "0",
                number(int, 0, 10**9), 50, needs=MAML_PLUS_PLUS),
        Setting("multi_step_epochs", "MAML++ weighs the losses after all inner steps alike at first, the last alone "
                "from this epoch on, linearly in between", "0", number(int, 0, 10**9), 50, needs=MAML_PLUS_PLUS),
        Setting("rho", "radius ρ of Sharp-MAML: the meta-gradient g is taken at θ + ρ g/‖g‖; 0: at θ", "0.01", size,
                0.05, needs=SHARP, letter="ρ"),
    ],
    "sampling and estimation": [
        Setting("tasks", "M tasks an epoch", "20", count, 5),
        Setting("trajectories", "K trajectories a task, before and after adaptation alike", "40", count, 10),
        Setting("gamma", "discount γ", "1", number(float, 0, 1, above=True), 0.99, letter="γ"),
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
        Setting("eval_values", "the held-out tasks, one after the other", "3 4", number(float), None,
                "those of --values", "+"),
        Setting("watch", "show one episode of that run's policy, adapted to a task: a GIF in its folder, and a window "
                "where there is a display", "runs/cartpole-pg/maml/seed1 --phi 12", Path, identity=False),
        Setting("phi", "the task to watch", "12", number(float), None, "the mean task", "+", needs=WATCH,
                identity=False),
        Setting("report", "train nothing: rewrite report.md, the figures and their CSV files in these folders, from "
                "the runs in them", "runs/cartpole-pg", Path, nargs="+", identity=False),
    ],
    "running": [
        Setting("device", "auto: cuda where there is one, but cpu for gymnasium's environments", "cpu", default="auto",
                choices=("auto", "cpu", "cuda"), identity=False),
        Setting("workers", "processes that share the runs, or the trajectories of a few runs; never more than there "
                "are, or than fit into half the memory; 1: this one", "4",
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
    others = {name: default_of(setting, env) for name, env in gyms.FAMILIES.items()}
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
            shown = "{" + ",".join(setting.choices) + "}"
            shown = shown if 0 < len(setting.choices) < 5 else setting.name.rstrip("_").upper()
            section.add_argument(
                setting.flag, dest=setting.name, type=kind, nargs=setting.nargs, metavar=shown, help=text
            )
    # argparse's own pattern takes -1. and -1e-05 for flags
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
    args, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("-"):
        before = [word for word in argv[: argv.index(unknown[0])] if word.startswith("--")]
        why = f"a value too many for {before[-1]}; give a command for each" if before else "a value before any flag"
        parser.error(f"{unknown[0]}: {why}")
    if unknown:
        flags = [setting.flag for setting in ALL_SETTINGS.values()]
        parser.error(f"{unknown[0]}: {hint(unknown[0], flags, 'those of --help')}")
    if args.like is not None and follow_like:
        replaced = {other for name, other in INSTEAD.items() if getattr(args, name) is not None}
        return parse([*words_of(args.like, replaced), *argv], follow_like=False)
    args.seed = args.seed and [seed for part in args.seed for seed in (part if isinstance(part, range) else [part])]
    check_pairs(args, parser.error)
    for setting in (*SETTINGS["evaluation"], *SETTINGS["running"]):  # these depend on nothing else
        if getattr(args, setting.name) is None:
            cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this rank
            setattr(args, setting.name, max(cores, 1) if setting.name == "workers" else setting.default)
    return args


INSTEAD = {"values": "range", "range": "values", "eval_values": "eval_range", "eval_range": "eval_values"}


def words_of(folder, replaced):
    """The settings of the run in a folder, from its config.json and without those `replaced`, as the words of a command
    line."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if "phi_names" not in config:
            raise ValueError("written by an earlier version of this code, or no run's")
        replaced = {"device", *replaced} | ({"range"} if config.get("values") else set())  # which then says their ends
        names = [name for name in ALL_SETTINGS if name not in replaced and config.get(name) is not None]
        given = {ALL_SETTINGS[name]: config[name] for name in names if config[name] is not False}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"--like {folder}: {first_line(error)}; name the folder of a run", 2) from error
    values = {x: [] if value is True else value if isinstance(value, list) else [value] for x, value in given.items()}
    return [word for setting, value in values.items() for word in (setting.flag, *map(str, value))]


def one_of(choices):
    """An argparse type: one of these words; the nearest is suggested for another."""

    def parse(text):
        if text not in choices:
            raise wrong(text, hint(text, choices, ", ".join(choices)))
        return text

    return parse


def check_pairs(args, error):
    """Reject flags that conflict or have no effect: an ablation would compare identical runs."""
    if args.watch is None and args.report is None and (args.env is None or args.algo is None):
        error("--env and --algo are required, e.g. --env cartpole --algo directed-fomaml")
    excluded = [("overwrite", "resume"), ("range", "values"), ("eval_range", "eval_values")]
    excluded += [("report", "watch"), ("report", "algo")]
    for name, other in excluded:
        if getattr(args, name) and getattr(args, other):
            error(f"{ALL_SETTINGS[name].flag}: not allowed with argument {ALL_SETTINGS[other].flag}")
    if args.values and args.task_dist not in (None, "uniform"):
        error(f"--task-dist {args.task_dist}: not allowed with argument --values, of which all are equally likely")
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
    settings = {}
    for setting in (x for x in ALL_SETTINGS.values() if x.identity):
        applies = not setting.needs or NEEDS[setting.needs](args, algo)
        value = getattr(args, setting.name)
        value = default_of(setting, env, algo) if value is None else value
        settings[setting.name] = (list(value) if isinstance(value, tuple) else value) if applies else None
    settings["threshold"] = default_of(ALL_SETTINGS["threshold"], env) if args.threshold is None else args.threshold
    settings |= {"algo": algo, "range": [x for pair in zip(env.low, env.high, strict=True) for x in pair]}
    if settings["delta_schedule"] != "converged":
        settings["threshold"] = None
    elif settings["threshold"] is None:
        raise RunError("--delta-schedule converged: give the return that counts as converged, --threshold", 2)
    if settings["medium"] is not None:
        settings["medium"] = medium_of(args, env)
    swept = {name: getattr(args, name) or [settings[name]] for name in SWEPT}
    if not algo.startswith("directed-"):
        swept["delta"] = [None]
    runs = []
    for values in itertools.product(*swept.values()):
        own = settings | dict(zip(swept, values, strict=True))
        if not (own["alpha"] or own["eval_alpha"] or algo.endswith(LEARNED_ALPHA)):
            own["eval_alpha"] = default_of(ALL_SETTINGS["alpha"], env, algo)
        check_run(own, args.beta_alpha)
        if algo.endswith(LEARNED_ALPHA) and args.beta_alpha is None:
            # Paper: α by β too. Here: α times β; at β = 0.001 every step moves α by many times its 0.001: it diverges.
            own["beta_alpha"] = own["alpha"] * own["beta"]
        if algo.endswith("imaml") and args.lambda_ is None:
            # Then α(∇L(θ') + λ(θ' − θ)) = α∇L(θ') + θ' − θ: every inner step is θ' ← θ − α∇L(θ'), as far as MAML's one.
            own["lambda_"] = 1 / own["alpha"]
        varied = [x for x in SWEPT if own[x] is not None and (x in ("delta", "seed") or len(swept[x]) > 1)]
        names = [f"{x}{own[x]:.12g}" if x != "seed" else f"seed{own[x]}" for x in varied]
        runs.append((folder_of_all(args) / algo / "/".join(names), own))
    return runs


def check_run(settings, beta_alpha):
    """Reject settings under which a run would train nothing, or that do not fit together."""
    algo, baseline, trajectories = settings["algo"], settings["baseline"], settings["trajectories"]
    if settings["medium"] == "pooled" and trajectories % settings["tasks"]:
        tasks = f"--tasks {settings['tasks']}"
        raise RunError(
            f"--medium pooled: --trajectories {trajectories} is not a multiple of {tasks}; give one that is", 2
        )
    if settings["inner_steps"] == 0 and algo.endswith(("reptile", "imaml", *LEARNED_ALPHA)):
        raise RunError(f"--inner-steps 0: {algo} learns from inner steps; for joint training give --algo maml", 2)
    learned = algo.endswith(LEARNED_ALPHA)
    if settings["alpha"] == 0 and (algo.endswith(("reptile", "imaml")) or (learned and beta_alpha is None)):
        remedy = "--alpha above 0" + ", or --beta-alpha" * learned
        raise RunError(f"--alpha 0: {algo} would never take an inner step; give {remedy}", 2)
    if settings["outer_steps"] > 1 and settings["estimator"] != "lvc":
        steps = f"--outer-steps {settings['outer_steps']}"
        raise RunError(f"{steps}: --estimator {settings['estimator']} has no likelihood ratio; give lvc", 2)
    if trajectories == 1 and baseline in ("step", "linear"):
        remedy = "give --trajectories 2 or more, or --baseline task"
        raise RunError(f"--trajectories 1: --baseline {baseline} compares trajectories of a task; {remedy}", 2)


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
    runs = [alike * (len(args.delta or [0]) if algo.startswith("directed-") else 1) for algo in args.algo]
    at_once = sum(sorted(runs)[-1 if device == "cuda" else -max(args.workers, 1) :])  # the largest
    need = 4 * at_once * value("tasks") * (2 * params + 3 * activations)
    have = memory(device)
    if need > have:
        what = "GPU" if device == "cuda" else "machine"
        raise RunError(
            f"this needs {need / 2**30:,.0f} GiB of memory at the least, and the {what} has {have / 2**30:.0f}; give "
            "fewer --seed, --delta, --tasks, --trajectories or a smaller --hidden", 2,
        )  # fmt: skip
