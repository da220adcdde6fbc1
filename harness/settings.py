"""Settings: the one table of flags, and how a command line becomes the task family and each run's settings.

A new flag is one row of `SETTINGS`. The parser, --help, the checks, config.json, what a checkpoint is
checked with and the README's table of flags come from it.
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
from types import SimpleNamespace

import envs
import maml
import policies
from harness import checkpoints, gyms
from harness.checkpoints import RunError
from harness.device import memory
from harness.errors import End, first_line, hint
from harness.trial import check_tasks


@dataclass(frozen=True)
class Need:
    """What a flag does nothing without, in words. holds: (args, algo) -> whether it is there."""

    words: str
    holds: Callable


@dataclass(frozen=True)
class Setting:
    """A flag of the command line."""

    name: str
    help: str  # {choices} stands for what it may be
    example: str = ""
    type: Callable = str  # of one value; bool: a switch
    default: object = None  # where neither gyms.FAMILIES nor maml.LEARNERS has another
    shown: str = ""  # the default in words, where it is no value
    nargs: str | None = None
    choices: tuple | Callable = ()  # the words it takes, or a function of them, for a table that grows
    needs: Need | None = None  # what it does nothing without: it is refused, and None in runs without
    kept: bool = False  # in runs without what it needs it has a value all the same
    identity: bool = True  # part of what makes a run that run: it cannot change on --resume
    letter: str = ""  # the paper's, for the lines of a report

    @property
    def flag(self):
        return checkpoints.flag_of(self.name)

    @property
    def words(self):
        return tuple(self.choices() if callable(self.choices) else self.choices)

    @property
    def text(self):
        return self.help.replace("{choices}", ", ".join(self.words))


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
    try:
        all_of_them = range(number(int, 0)(first), number(int, 0)(last) + 1)
    except argparse.ArgumentTypeError as error:
        raise wrong(text, "expected FIRST-LAST, two whole numbers >= 0") from error
    if not 0 < all_of_them.stop - all_of_them.start <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIRST-LAST, at least one seed and at most a million")
    return all_of_them


def info_name(text):
    """An argparse type: what may be a column of eval.csv beside those that it has."""
    if not checkpoints.is_info(text):
        others = ", ".join(checkpoints.TABLES["eval"])
        raise wrong(text, f"expected letters, digits, blanks and _ . : / -, and other than {others}")
    return text


# --- algorithms: the learners of maml.py, each with and without the δ-step ---


def algorithms():
    return (*maml.LEARNERS, *("directed-" + name for name in maml.LEARNERS))


def is_directed(algo):
    return algo.startswith("directed-")


def learner_of(algo):
    """The algorithm's row of maml.LEARNERS."""
    return maml.LEARNERS[algo.removeprefix("directed-")]


def both(first, second):
    return Need(
        f"{first.words}, and {second.words}",
        lambda args, algo: first.holds(args, algo) and second.holds(args, algo),
    )


def owner_of(name):
    """The need of a setting that is some learners' own: one of those."""
    owners = [algo for algo in algorithms() if name in learner_of(algo).settings]
    return Need(
        f"the algorithm {' or '.join(owners)}",
        lambda args, algo: name in learner_of(algo).settings,
    )


DIRECTED = Need(
    "an algorithm that begins with directed-",
    lambda args, algo: is_directed(algo),
)
LEARNED_ALPHA = Need(
    "an algorithm whose α is learned",
    lambda args, algo: learner_of(algo).learns_alpha,
)
FIXED_ALPHA = Need(
    "an algorithm whose α is not learned",
    lambda args, algo: not learner_of(algo).learns_alpha,
)
SHARP = Need(
    "an algorithm with sharp- in its name",
    lambda args, algo: learner_of(algo).sharp,
)
ADAPTING = Need("--inner-steps 1 or more", lambda args, algo: args.inner_steps != 0)
ACTOR_CRITIC = Need("--rl ac", lambda args, algo: args.rl in policies.LOSSES and policies.LOSSES[args.rl].critic)
WHITENED = Need("--advantages whitened", lambda args, algo: args.advantages != "raw")
WATCH = Need("--watch RUN", lambda args, algo: args.watch is not None)
SOLVING = Need("--cg-steps 1 or more", lambda args, algo: args.cg_steps != 0)
SEVERAL_STEPS = Need("--inner-steps 2 or more", lambda args, algo: args.inner_steps != 1)
REPLAYING = both(
    Need("--outer-steps 2 or more", lambda args, algo: (args.outer_steps or 1) > 1),
    Need("a learner other than reptile", lambda args, algo: learner_of(algo).losses_after > 0),
)


GYMNASIUM = Need(
    "an environment of gymnasium's",
    lambda args, algo: args.env not in gyms.FAMILIES or gyms.FAMILIES[args.env].is_gymnasium,
)


def has_second_order_terms(args, algo):
    """Whether the meta-gradient sees a Hessian, which is all that estimators differ in."""
    learner = learner_of(algo)
    if learner.proximal:
        return args.cg_steps != 0
    moves = learner.learns_alpha or args.alpha not in (0, [0])
    return learner.second_order and args.inner_steps != 0 and moves


SECOND_ORDER = Need(
    "an algorithm whose meta-gradient has second-order terms, e.g. maml, and inner steps",
    has_second_order_terms,
)

# --- the table ---

OPTIMIZERS = ("sgd", "adam")
SWEPT = ("alpha", "beta", "delta", "seed")  # settings of which a command may give several values
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
        Setting("algo", "one or several of {choices}", "maml directed-maml", nargs="+", choices=algorithms),
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
                needs=LEARNED_ALPHA),
    ],
    "settings of single algorithms": [
        Setting("lambda_", "λ of iMAML's inner objective L + λ/2 ‖θ' − θ‖²", "100", step_size, None, "1 / α",
                needs=owner_of("lambda_"), letter="λ"),
        Setting("cg_steps", "steps of conjugate gradients for iMAML's meta-gradient; 0: no Hessian", "10",
                number(int, 0, 10**9), 1, needs=owner_of("cg_steps")),
        Setting("cg_damping", "d: iMAML's meta-gradient takes (1 + d) λ for λ; above 0 it is bounded", "0.1", size, 1.0,
                needs=both(owner_of("cg_damping"), SOLVING)),
        Setting("first_order_epochs", "first epochs of MAML++ with first-order meta-gradients", "0",
                number(int, 0, 10**9), 50, needs=owner_of("first_order_epochs")),
        Setting("multi_step_epochs", "MAML++ weighs the losses after all inner steps alike at first, the last alone "
                "from this epoch on, linearly in between", "0", number(int, 0, 10**9), 50,
                needs=both(owner_of("multi_step_epochs"), SEVERAL_STEPS)),
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
                choices=policies.ESTIMATORS, needs=SECOND_ORDER, kept=True),
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
        Setting("info", "numbers or switches in the environment's info at an episode's end, whose means on the "
                "held-out tasks stand beside the returns; success and is_success need no asking", "crashed",
                info_name, None, "none", "+", needs=GYMNASIUM, identity=False),
        Setting("watch", "show one episode of that run's policy, adapted to a task: a GIF in its folder, and a window "
                "where there is a display", "runs/cartpole-pg/maml/seed1 --phi 12", Path, identity=False),
        Setting("phi", "the task to watch", "12", number(float), None, "the mean task", "+", needs=WATCH,
                identity=False),
        Setting("window", "env steps over which the report takes the area under the returns", "400000", count, None,
                "the least that all runs have reached", identity=False),
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
        Setting("like", "take all settings that make that run what it is, not --epochs and the like, from its "
                "config.json; other flags override them", "runs/cartpole-pg/maml/seed1 --seed 2", Path, identity=False),
        Setting("resume", "continue runs that exist, e.g. with more --epochs", type=bool, identity=False),
        Setting("overwrite", "start runs that exist again", type=bool, identity=False),
        Setting("quiet", "no progress, only errors", type=bool, identity=False),
        Setting("debug", "the traceback of what went wrong, in other processes too, before the line that says it",
                type=bool, identity=False),
    ],
}
# fmt: on
ALL_SETTINGS = {setting.name: setting for settings in SETTINGS.values() for setting in settings}


def default_of(setting, env=None, algo=""):
    """A setting's default for a task family (None: a gymnasium id) and an algorithm."""
    if setting.name == "horizon":
        return env.horizon if env else None
    default = env.defaults.get(setting.name, setting.default) if env else setting.default
    learner = maml.LEARNERS.get(algo.removeprefix("directed-"))  # None: none, or that of a run made elsewhere
    return learner.defaults.get(setting.name, default) if learner else default


def shown_default(setting):
    """The default in words, with those of the task families and algorithms that have others."""

    def show(x):
        return " ".join(map(show, x)) if isinstance(x, tuple) else f"{x:g}" if isinstance(x, float) else str(x)

    general = default_of(setting)
    others = {name: default_of(setting, env) for name, env in gyms.FAMILIES.items()}
    others |= {algo: default_of(setting, algo=algo) for algo in maml.LEARNERS}
    names = defaultdict(list)
    for name, value in others.items():
        if value != general:
            names[show(value)].append(name)
    first = [] if general is None and not setting.shown else [setting.shown or show(general)]
    return "; ".join(first + [f"{', '.join(who)} {value}" for value, who in names.items()])


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise RunError(f"{message} (see --help)", 2)

    def exit(self, status=0, message=None):
        raise End(status)  # after --help


def parse(argv):
    """The command line as a namespace; None for what it does not say. Raises RunError for what is wrong with it."""
    parser = Parser(
        prog="run.py",
        allow_abbrev=False,
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
            shown_last = f" (default {default})" if default else ""
            text = f"{setting.text}{shown_last}; e.g. {setting.flag} {setting.example}"
            kind = one_of(setting.words) if setting.words else setting.type
            few = 0 < len(setting.words) < 5
            shown = "{" + ",".join(setting.words) + "}" if few else setting.name.rstrip("_").upper()
            section.add_argument(
                setting.flag, dest=setting.name, type=kind, nargs=setting.nargs, metavar=shown, help=text
            )
    # argparse's own pattern takes -1. and -1e-05 for flags
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
    for flag, _, value in (word.partition("=") for word in argv):
        if flag.startswith("--") and value == "--":  # which argparse takes for an empty list
            parser.error(f"{flag}: expected a value, not --")
    args, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("-"):
        before = [word for word in argv[: argv.index(unknown[0])] if word.startswith("--")]
        why = f"a value too many for {before[-1]}; give a command for each" if before else "a value before any flag"
        parser.error(f"{unknown[0]}: {why}")
    if unknown:
        flags = [setting.flag for setting in ALL_SETTINGS.values()]
        parser.error(f"{unknown[0]}: {hint(unknown[0], flags, 'those of --help')}")
    args.seed = args.seed and [seed for part in args.seed for seed in (part if isinstance(part, range) else [part])]
    if args.like is not None:
        follow(args)
    check_pairs(args, parser.error)
    for setting in (*SETTINGS["evaluation"], *SETTINGS["running"]):  # these depend on nothing else
        if getattr(args, setting.name) is None:
            cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this rank
            setattr(args, setting.name, max(cores, 1) if setting.name == "workers" else setting.default)
    return args


INSTEAD = {"values": "range", "range": "values", "eval_values": "eval_range", "eval_range": "eval_values"}


def follow(args):
    """Fill in what the command line leaves open with the settings of the run that --like names."""
    taken = settings_in(args.like)
    env = taken.get("env", "")
    if ":" in env and args.env is None:
        raise RunError(f"--like {args.like}: runs the code of module {env}; if you trust it, give --env {env} too", 2)
    given = {name for name, value in vars(args).items() if value not in (None, False)}
    open_ones = [name for name in taken if name not in given and INSTEAD.get(name) not in given]
    for name in open_ones:
        setattr(args, name, taken[name])
    for name in open_ones:  # e.g. δ, where --algo says an undirected one instead
        if not any(applies(ALL_SETTINGS[name], args, algo) for algo in args.algo or ()):
            setattr(args, name, None)


def settings_in(folder):
    """What makes the run in a folder that run: {name: value} from its config.json, which may be a stranger's.

    Each goes through its flag's own type, and none becomes a word of a command line.
    """
    try:
        text = checkpoints.read_regular(folder / "config.json")
        if text is None:
            raise FileNotFoundError("no config.json")
        config = json.loads(text)
        if "phi_names" not in config:
            raise ValueError("written by an earlier version of this code, or no run's")
        names = [setting.name for setting in ALL_SETTINGS.values() if setting.identity]
        if config.get("values"):
            names.remove("range")  # which then says their ends
        if config.get("delta_schedule") == "converged":
            names.append("threshold")
        given = {name: config[name] for name in names if config.get(name) is not None}
        return {name: value_of(ALL_SETTINGS[name], value) for name, value in given.items()}
    except (OSError, LookupError, TypeError, ValueError, RecursionError, argparse.ArgumentTypeError) as error:
        raise RunError(f"--like {folder}: {first_line(error)}; name the folder of a run", 2) from error


def value_of(setting, value):
    """A value of config.json as `parse` gives it. Raises ValueError or ArgumentTypeError."""
    several = value if isinstance(value, list) and setting.nargs else [value]
    expected = {bool: bool, seeds: int}.get(setting.type, (str, int, float))
    if not all(isinstance(x, expected) for x in several):
        raise ValueError(f"{setting.name} is {str(value)[:100]}")
    if setting.type is bool:
        return value
    kind = one_of(setting.words) if setting.words else setting.type
    values = [kind(str(x)) for x in several]
    return values if setting.nargs else values[0]


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
        algos = args.algo or [next(iter(maml.LEARNERS))]  # none with --watch
        if values is not None and not any(applies(setting, args, algo) for algo in algos):
            needed = setting.needs.words
            raise RunError(f"{setting.flag} does nothing without {needed}; leave it out, or add that", 2)
        if setting.name in ("algo", *SWEPT):
            names = [f"{x:.12g}" if isinstance(x, float) else x for x in values or ()]  # as folders are named
            if len(set(names)) < len(names):
                raise RunError(f"{setting.flag} {' '.join(map(str, values))}: duplicate value", 2)


def applies(setting, args, algo):
    return setting.needs is None or setting.needs.holds(args, algo)


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
        value = getattr(args, setting.name)
        value = default_of(setting, env, algo) if value is None else value
        value = list(value) if isinstance(value, tuple) else value
        settings[setting.name] = value if setting.kept or applies(setting, args, algo) else None
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
    before = {}
    for setting in (x for x in ALL_SETTINGS.values() if x.identity):
        default = False if setting.type is bool else default_of(setting, env, algo)
        default = list(default) if isinstance(default, tuple) else default
        before[setting.name] = default if setting.kept or applies(setting, args, algo) else None
    return before


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
