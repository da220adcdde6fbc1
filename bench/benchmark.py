"""How fast the shipped code is, beside the conventional design (reference.py) measured in the same run.

`python bench/benchmark.py` takes some minutes and prints Markdown; its last table holds the targets. A configuration
is a command line of run.py, measured in a fresh process. All take turns, round by round, so that a busy moment of the
machine does not fall on one of them alone. Figures are those of the median round, [lowest, highest] beside them.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import gymnasium
import numpy
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import envs
import maml
import run
from bench import replay
from bench.measure import Configuration, in_fresh_processes, measure, median_epoch, opened, profile, time_epoch
from harness import checkpoints, gyms
from harness.settings import algorithms

REPOSITORY = Path(__file__).resolve().parent.parent
PARTS = ("epoch", "reference", "jax", "cores", "scaling", "lunarlander", "profile")
COMPARED = ("maml", "fomaml", "directed-maml")  # with the conventional design
JAX_DESIGNS = ("plain", "tuned")
# The first of each is where it stays while another one varies.
SIZES = {"S": (1, 4, 16, 64), "M": (5, 20, 80), "K": (10, 40, 160), "H": (200, 50, 800), "hidden": (64, 16, 256)}
SMALL = {"S": (1, 2), "M": (2, 3), "K": (2, 3), "H": (12, 6), "hidden": (8, 4)}
TABLE_II = {"maml": 2.34, "fomaml": 1.56, "meta-sgd": 1.41, "directed-maml": 2.52}  # the paper's s an epoch
LONG = 4.0  # s that measuring a configuration takes
SWEEP, CORES = 16, 64  # 10,000 runs: how many in a batch, on how many cores
TRAINING = 400  # epochs of CartPole


def measure_all(configurations, device, repeats, seconds):
    """{configuration: a measurement of each round}; one round is all for what takes long, such as starting workers."""
    measured, took = {c: [] for c in configurations}, dict.fromkeys(configurations, 0.0)
    for c in tqdm([*measured] * repeats, "measuring", disable=None):
        if took[c] < LONG:
            start = time.perf_counter()
            measured[c] += in_fresh_processes(measure, (c, device, seconds))
            took[c] = time.perf_counter() - start
    return measured


def mid(rows, key):
    """Of the median epoch: so its parts add up."""
    return median_epoch(rows)[key]


def spread(values):
    return f"{median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def table(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# --- seconds an epoch, and the conventional design ---


def conventional(c, base):
    """The same work by the conventional design: a loop over tasks and runs, so one run of few tasks stands for all."""
    algo = c.algo if c.algo in COMPARED else "maml"
    return replace(base, algo=algo, K=c.K, design="conventional")


def speedup(c, base, measured):
    """Env steps a second over those of the conventional design, whose work must be the same."""
    ours, theirs = measured[c], measured[conventional(c, base)]
    if c == replace(base, algo=c.algo, S=c.S, K=c.K) and c.algo in COMPARED:
        steps = mid(ours, "env_steps"), c.S * mid(theirs, "env_steps")
        if steps[0] != steps[1]:
            raise RuntimeError(f"{c}: {steps[0]:.0f} env steps an epoch, {steps[1]:.0f} by the conventional design")
    rates = [mid(rows, "env_steps") / mid(rows, "epoch") for rows in (ours, theirs)]
    return rates[0] / rates[1]


def epoch_table(configurations, base, measured, columns):
    rows = []
    for c in configurations:
        rows.append([getattr(c, column) for column in columns])
        rows[-1].append(spread([row["epoch"] / c.S for row in measured[c]]))
        rows[-1] += [f"{mid(measured[c], part) / c.S:.4f}" for part in ("sampling", "inner", "outer")]
        rows[-1].append(f"{mid(measured[c], 'env_steps') / mid(measured[c], 'epoch'):,.0f}")
        rows[-1] += [f"{speedup(c, base, measured):.1f}", f"{mid(measured[c], 'memory'):.0f}"]
    timed = ["s/epoch/run", "sampling", "inner gradient", "outer gradient", "env steps/s", "× reference", "MB"]
    return table([*columns, *timed], rows)


def reference_table(configurations, measured):
    rows = [
        [c.algo, c.K, spread([row["epoch"] for row in measured[c]]), f"{mid(measured[c], 'env_steps'):,.0f}"]
        for c in configurations
    ]
    return table(["conventional design", "K", "s/epoch", "env steps an epoch"], rows)


# --- the same epoch in JAX ---


def measure_in_jax(python, c, seconds, design):
    """What bench/jax_rival.py says of a configuration, by an interpreter that has jax; None where it has not."""
    words = ["--algo", c.algo, "--runs", str(c.S), "--seconds", str(seconds), "--design", design]
    ended = subprocess.run([python, REPOSITORY / "bench/jax_rival.py", *words], capture_output=True, text=True)
    if ended.returncode and "pip install jax" in ended.stderr:
        return None
    if ended.returncode:
        raise RuntimeError(f"bench/jax_rival.py {shlex.join(words)}: {ended.stderr[-1000:]}")
    return json.loads(ended.stdout)


def training_seconds(row):
    """Of a training, with what compiling takes; ours has nothing to compile."""
    return row.get("compile", row["epoch"]) + (TRAINING - 1) * row["epoch"]


def jax_section(args, base, target):
    """Markdown: ours and JAX's epochs of CartPole, measured in turns."""
    base, seconds = replace(base, M=5, K=10, H=200, hidden=64), 0.02 if args.small else 1.0  # the sizes of jax_rival.py
    sizes, algorithms = ((1,), COMPARED[:1]) if args.small else ((1, 4, 16), COMPARED)
    rounds = {replace(base, algo=algo, S=size): [] for algo in algorithms for size in sizes}
    for c in tqdm([*rounds] * args.repeats, "beside JAX", disable=None):
        theirs = {design: measure_in_jax(args.jax_python, c, seconds, design) for design in JAX_DESIGNS}
        if None in theirs.values():
            return ["## JAX", "Left out, because jax is missing: `pip install jax`, or name another interpreter that "
                    "has it with `--jax-python`."]  # fmt: skip
        [ours] = in_fresh_processes(measure, (c, "cpu", seconds))
        for design, row in theirs.items():
            if ours["env_steps"] != row["env_steps"]:
                raise RuntimeError(f"{c}: {ours['env_steps']} env steps an epoch, {row['env_steps']} by JAX, {design}")
        rounds[c].append((ours, theirs))
    rows = []
    for design in JAX_DESIGNS:
        for c, measured in rounds.items():
            pairs = [(ours, theirs[design]) for ours, theirs in measured]
            epochs = [[row["epoch"] / c.S for row in who] for who in zip(*pairs, strict=True)]
            whole = [[training_seconds(row) for row in who] for who in zip(*pairs, strict=True)]
            ratios = [[theirs / ours for ours, theirs in zip(*both, strict=True)] for both in (epochs, whole)]
            rows.append([design, c.algo, c.S, *map(spread, epochs), spread(ratios[0])])
            rows[-1] += [*map(spread, whole), spread(ratios[1])]
            if c.algo == "maml" and c.S == 1:
                target(f"CartPole MAML alone, times as fast as JAX, {design}", median(ratios[0]), 1, True)
            if c.algo == "maml" and c.S == 16:
                target(f"CartPole MAML, S = 16, times as fast as JAX, {design}", median(ratios[0]), 1.5, True)
            if c.algo == "fomaml" and c.S == 1:
                what = f"CartPole FOMAML alone, {TRAINING} epochs, times as fast as JAX, {design}"
                target(what, median(ratios[1]), 1, True)
    timed = ["s/epoch/run", "JAX", "times as fast", f"{TRAINING} epochs, s", "JAX, compiling included", "times as fast"]
    about = (
        "The same epoch of CartPole in JAX (`bench/jax_rival.py`), jitted as a whole, in two designs. plain: as JAX's "
        "users write it, by jax.grad through the inner step and vmap over tasks and runs; tuned: one task after the "
        "other, with the chain rule written out. All have one core and take turns; the ratios are those of each round."
    )
    return ["## JAX", about, table(["JAX's design", "algorithm", "S", *timed], rows)]


# --- a sweep on one core and on all ---


def cores_section(args, target):
    """Markdown: whole commands of run.py that train a sweep."""
    epochs = 2 if args.small else 100
    words = [
        "--env",
        "cartpole",
        "--algo",
        "maml",
        "--seed",
        f"1-{2 if args.small else SWEEP}",
        "--epochs",
        str(epochs),
    ]
    words += ["--tasks", "2", "--trajectories", "2", "--horizon", "10"] if args.small else []
    seconds = {count: [] for count in (1, os.cpu_count())}
    for count in tqdm([*seconds] * args.repeats, "cores", disable=None):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "run.py", *words, "--workers", str(count), "--out", out, "--quiet"]
            start = time.perf_counter()
            subprocess.run(command, cwd=REPOSITORY, check=True)
            seconds[count].append(time.perf_counter() - start)
    rows = [[count, spread(row)] for count, row in seconds.items()]
    ratio = median(one / all_of for one, all_of in zip(seconds[1], seconds[os.cpu_count()], strict=True))
    target(f"A sweep on {os.cpu_count()} cores, times as fast as on one", ratio, 0.9 * os.cpu_count(), True)
    told = f"`run.py {shlex.join(words)}`, start-up and report included, is {ratio:.2f} times as fast on all cores."
    return ["## A sweep on one core and on all", told, table(["processes", "s"], rows)]


# --- how cost grows ---


def floor_of(c):
    """The epoch that is all dispatch: one run, task, trajectory and hidden unit, and as many steps."""
    return replace(c, S=1, M=1, K=1, hidden=1)


def exponent(sizes, costs):
    """The slope of least squares in log-log over all sizes, and between the two largest."""
    x, y = numpy.log(sizes), numpy.log(costs)
    return f"{numpy.polyfit(x, y, 1)[0]:.2f}, {numpy.polyfit(x[-2:], y[-2:], 1)[0]:.2f}"


def bounds(c, device, measured):
    """An epoch's shares: dispatch, as much as the floor takes; and what comes on top of it, divided by the profile into
    matrix products and the rest, elementwise operations and copies, which memory bounds."""
    profiles = in_fresh_processes(profile, (c, device)) + in_fresh_processes(profile, (floor_of(c), device))
    products = [sum(s for key, (_, s) in spent.items() if "mm" in key) for spent in profiles]
    everything = [sum(s for _, s in spent.values()) for spent in profiles]
    dispatch = min(1.0, mid(measured[floor_of(c)], "epoch") / mid(measured[c], "epoch"))
    share = min(1.0, max(0.0, (products[0] - products[1]) / (everything[0] - everything[1])))
    return {"dispatch": dispatch, "products": (1 - dispatch) * share, "memory": (1 - dispatch) * (1 - share)}


def scaling_table(base, sizes, device, measured):
    rows, floor = [], mid(measured[floor_of(base)], "memory")
    for axis, values in sizes.items():
        values = sorted(values)
        line = [replace(base, **{axis: value}) for value in values]
        seconds = [mid(measured[c], "epoch") for c in line]
        memory = [max(1.0, mid(measured[c], "memory") - floor) for c in line]
        shares = bounds(line[-1], device, measured)
        rows.append([axis, ", ".join(map(str, values)), ", ".join(f"{s:.3g}" for s in seconds)])
        rows[-1] += [exponent(values, seconds), ", ".join(f"{m:.0f}" for m in memory), exponent(values, memory)]
        rows[-1] += [*(f"{share:.0%}" for share in shares.values()), max(shares, key=shares.get)]
    cost = ["s/epoch", "exponent", "MB above the floor's", "exponent"]
    return table(["axis", "sizes", *cost, "dispatch", "products", "memory", "the largest is bound by"], rows)


def sweep_cost(c, device, repeats, measured):
    """What 10,000 runs of 400 epochs cost, in words: in batches like c, on a GPU or on many cores."""
    seconds, memory, batches = mid(measured[c], "epoch"), mid(measured[c], "memory"), math.ceil(10_000 / c.S)
    told = f"10,000 runs of CartPole, {c.algo}, 400 epochs, as {batches} batches of {c.S}"
    if device == "cuda":
        hours = batches * 400 * seconds / 3600
        return f"{told}: {batches} × 400 × {seconds:.3g} s = **{hours:.3g} hours** on this GPU."
    ratios = []
    for _ in range(repeats):
        alone = in_fresh_processes(measure, (c, device))
        together = in_fresh_processes(measure, *[(c, device, 1.0)] * os.cpu_count())
        ratios.append(mid(together, "epoch") / mid(alone, "epoch"))
    slower, waves = median(ratios), math.ceil(batches / CORES)
    return (
        f"{told}, a process on each of {CORES} cores: ⌈{batches} / {CORES}⌉ × 400 × {seconds:.3g} s × {slower:.3g} "
        f"(as much slower is a process while each of this machine's {os.cpu_count()} cores runs one) = "
        f"**{waves * 400 * seconds * slower / 3600:.3g} hours**, with {CORES} × {memory / 1e3:.2g} GB of memory. "
        "At most: every trajectory has its full length here, and early ones are shorter."
    )


# --- LunarLander ---


def lunarlander_starts(paths, base):
    """(label, env, runs) of a fresh policy; of the first checkpoint; and of all of them as one batch."""
    horizon = min(base.H * 2, gyms.FAMILIES["lunarlander"].horizon)
    env, [fresh] = replace(base, env="lunarlander", algo="directed-maml", H=horizon).plan()
    yield "fresh policy", env, [fresh]
    of_delta_step = {key: fresh.settings[key] for key in ("delta", "medium", "delta_schedule")}
    runs = []
    for path in map(Path, paths):  # of any algorithm: they serve all
        state = checkpoints.load(path)
        if state is None:
            raise SystemExit(f"benchmark.py: --checkpoint {path}: no such file")
        runs.append(checkpoints.Run(path.parent, fresh.settings | state["settings"] | of_delta_step, state))
    for some in [runs[:1], runs][: len(runs)]:
        label = f"{len(some)} run{'s' * (len(some) > 1)} after {some[0].state['epoch']} epochs"
        yield label, gyms.make("lunarlander", horizon=some[0].settings["horizon"]), some


def as_run_of(algo, original):
    """The run continued by another algorithm, without what the optimiser has remembered."""
    settings = original.settings | {"algo": algo}
    settings["beta_alpha"] = settings["alpha"] * settings["beta"]
    if not algo.startswith("directed-"):
        settings |= {"delta": None, "medium": None, "delta_schedule": None}
    alpha = maml.learned_alpha(original.state["theta"], settings["alpha"]) if algo == "meta-sgd" else {}
    return replace(original, settings=settings, state=original.state | {"alpha": alpha, "optimizer": {}})


def lunarlander_tables(args, base):
    """Rows of sampling beside gymnasium alone, and of seconds an epoch beside the paper's."""
    torch.set_num_threads(1)
    cores = os.cpu_count()
    sampling, epochs = [], []
    for label, env, runs in lunarlander_starts(args.checkpoint, base):
        count, settings = len(runs), runs[0].settings
        rates, timed = [], {algo: [] for algo in TABLE_II}
        with replay.replayers(cores) as pool, opened(env, [as_run_of("maml", r) for r in runs], args.device) as first:
            batches = {
                algo: run.Batch(
                    [as_run_of(algo, r) for r in runs],
                    env,
                    first.head,
                    first.sample,
                    args.device,
                    first.ranks,
                    first.rows,
                )  # fmt: skip
                for algo in TABLE_II
            }
            for turn in tqdm(range(args.repeats + 1), f"lunarlander, {label}", disable=None):
                stream = envs.stream(range(count), envs.OTHER, turn)
                phi = envs.sample_tasks(env, stream, settings["tasks"])
                noise = envs.draw_noise(env, stream, range(settings["tasks"]), settings["trajectories"])
                start = time.perf_counter()
                trajectories = first.sample(maml.expand(batches["maml"].theta, settings["tasks"]), phi, noise)
                seconds, steps = time.perf_counter() - start, trajectories["mask"].sum(-1).double()
                raw = replay.replay_rates(env, phi, noise, trajectories, pool, cores, turn)
                rates.append([float(steps.mean()), float(steps.sum()) / seconds, *raw])
                for algo, batch in batches.items():
                    timed[algo].append(time_epoch(batch))
        length, ours, alone, together = zip(*rates[1:], strict=True)  # the first warmed up
        shares = [[x / y for x, y in zip(ours, raw, strict=True)] for raw in ([cores * x for x in alone], together)]
        shown = [f"{median(x):,.0f}" for x in (length, ours, alone, together)]
        sampling.append([label, *shown, *map(spread, shares)])
        for algo, rows in timed.items():
            seconds = [row["epoch"] / count for row in rows[1:]]
            share = mid(rows[1:], "sampling") / mid(rows[1:], "epoch")
            steps = f"{mid(rows[1:], 'env_steps') / count:,.0f}"
            epochs.append([label, algo, spread(seconds), f"{share:.0%}", steps, TABLE_II[algo]])
    return sampling, epochs


# --- where the time goes ---


def profile_table(c, device, measured, count=12):
    [spent] = in_fresh_processes(profile, (c, device))
    total = sum(seconds for _, seconds in spent.values())
    ops = sorted(spent.items(), key=lambda item: -item[1][1])[:count]
    sampling = mid(measured[c], "sampling") / mid(measured[c], "epoch")
    rows = [[key, calls, f"{seconds * 1e3:.1f}", f"{seconds / total:.0%}"] for key, (calls, seconds) in ops]
    heading = f"{c.algo}, S = {c.S}: sampling is {sampling:.0%} of an epoch; under the profiler it takes {total:.3g} s."
    return heading + "\n\n" + table(["operation", "calls", "ms of its own", "share"], rows)


# --- the command ---


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=PARTS, help="which tables (default: all)")
    add("--env", nargs="+", choices=gyms.FAMILIES, default=list(gyms.FAMILIES), help="of the part epoch (default: all)")
    add("--algo", nargs="+", choices=algorithms(), default=algorithms(), help="of the part epoch (default: all)")
    add("--repeats", type=int, default=3, help="rounds (default 3)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default cpu)")
    add("--checkpoint", nargs="+", default=[], help="checkpoint.pt of LunarLander runs, to measure them too")
    add("--jax-python", default=sys.executable, metavar="PATH", help="an interpreter that has jax (default: this one)")
    add("--small", action="store_true", help="tiny sizes, to try the script")
    add("--out", type=Path, help="a folder for what is printed, e.g. results/benchmark")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    sizes = dict(SMALL if args.small else SIZES)
    if args.device == "cuda":
        sizes["S"] += (256,)
    base = Configuration("cartpole", "maml", **{axis: values[0] for axis, values in sizes.items()})
    varied = list(dict.fromkeys(replace(base, **{axis: x}) for axis, values in sizes.items() for x in values))
    swept = replace(base, S=SWEEP if SWEEP in sizes["S"] else sizes["S"][-1])
    chosen = {
        "epoch": [
            replace(base, env=env, algo=algo, H=base.H if args.small else gyms.FAMILIES[env].horizon)
            for env in args.env for algo in args.algo
        ],
        "reference": [
            replace(c, algo=algo) for algo in COMPARED for c in varied
            if (c.H, c.hidden) == (base.H, base.hidden) and c.K in sizes["K"][:2]
        ],
        "scaling": [*varied, swept, *map(floor_of, varied)],
        "lunarlander": [],
        "profile": [base, swept],
    }  # fmt: skip
    chosen = {part: some for part, some in chosen.items() if part in args.part}
    compared = [conventional(c, base) for part in ("epoch", "reference") for c in chosen.get(part, [])]
    seconds = 0.02 if args.small else 0.3  # epochs for so long, in each round
    measured = measure_all([*compared, *sum(chosen.values(), [])], args.device, args.repeats, seconds)
    text, targets = [], []

    def target(what, value, limit, at_least=False):
        met = "yes" if (value >= limit if at_least else value <= limit) else "no"
        targets.append([what, f"{'≥' if at_least else '≤'} {limit:g}", f"{value:.3g}", met])

    if "epoch" in chosen:
        text += ["## Every task family and algorithm", epoch_table(chosen["epoch"], base, measured, ["env", "algo"])]
    if "reference" in chosen:
        text += ["## CartPole: runs, tasks and trajectories"]
        text += [epoch_table(chosen["reference"], base, measured, ["algo", "S", "M", "K"])]
        text += [reference_table(list(dict.fromkeys(conventional(c, base) for c in chosen["reference"])), measured)]
        seconds = {c: mid(measured[c], "epoch") for c in chosen["reference"]}
        target("CartPole MAML alone, s an epoch", seconds[base], 0.10)
        target(f"CartPole MAML, S = {swept.S}, s an epoch and run", seconds[swept] / swept.S, 0.07)
        target("CartPole MAML alone, times the conventional design", speedup(base, base, measured), 7, True)
        if args.device == "cuda" and not args.small:
            target("CartPole MAML, S = 64, times the epoch of one run", seconds[replace(base, S=64)] / seconds[base], 2)
    if "jax" in args.part:
        text += jax_section(args, base, target)
    if "cores" in args.part:
        text += cores_section(args, target)
    if "scaling" in chosen:
        text += ["## How cost grows", scaling_table(base, sizes, args.device, measured)]
        text += [sweep_cost(swept, args.device, args.repeats, measured)]
    if "lunarlander" in chosen:
        sampling, epochs = lunarlander_tables(args, base)
        raw = ["gymnasium: one process", "a process on every core", "rollout / (cores × one)", "rollout / all"]
        text += ["## LunarLander", table(["policy", "mean episode", "rollout, steps/s", *raw], sampling)]
        text += [table(["policy", "algorithm", "s/epoch/run", "sampling", "env steps", "the paper's s"], epochs)]
        share = float(sampling[-1][5].split()[0])
        limit = 0.9 if args.checkpoint else 0.8  # a fresh policy's episodes end at different times
        target(f"LunarLander, {sampling[-1][0]}: rollout / (cores × gymnasium alone)", share, limit, True)
    if "profile" in chosen:
        text += ["## Profile", *(profile_table(c, args.device, measured) for c in chosen["profile"])]
    if targets:
        text += ["## Targets", table(["target", "limit", "measured", "met"], targets)]

    command = shlex.join(["python", "bench/benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    about = (
        f"`{command}`: torch {torch.__version__}, gymnasium {gymnasium.__version__}, {os.cpu_count()} cores, one "
        f"thread, device {args.device}. The median of {args.repeats} rounds, one where a round takes over {LONG:g} s "
        "[lowest, highest]. Every trajectory has its full length; only LunarLander's end by themselves, and its own "
        "rate counts the reset before each. The outer gradient includes the δ-step's and the optimiser. MB: peak "
        "memory, imports included. × reference: env steps a second over those of the conventional design, a Python "
        "loop over tasks with `torch.func.functional_call` and gymnasium's vector CartPole."
    )
    text = "\n\n".join(["# Benchmark", about, *text]) + "\n"
    print(text, end="")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        checkpoints.write_atomically(args.out / "README.md", text)


if __name__ == "__main__":
    main()
