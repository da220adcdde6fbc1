"""Settings: the one table of flags, and how a command line is read by it. What it becomes is in plan.py.

A new flag is one row of `SETTINGS`. The parser, --help, the checks, config.json, what a checkpoint is
checked with and the README's table of flags come from it.
"""

import argparse
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
from harness.errors import End, first_line, hint


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
        Setting("oracle", "φ, scaled to [−1, 1] over Φ, is part of the observation: a policy that is told its task",
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
