"""The experiment of PROTOCOL.md: tune every arm, run the chosen configurations on fresh seeds, compare.

From the repository's root: `python -m results.protocol point velocity` tunes and tests these families, one process a
core, and resumes where it stopped; run folders go to runs/protocol/. `--commands point` prints the commands of the test
runs alone. Without a family it compares what there is: choices.csv, differences.csv and same-sizes.csv.
"""

import argparse
import csv
import io
import math
import os
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import run  # first, because it sets what numpy reads when it loads

# isort: split
import numpy as np

from harness import checkpoints, figures, report, runs

ROOT = Path(__file__).parent / "protocol"
RUNS = Path("runs/protocol")
TASKS = 5  # M, so that β + δ / M without the δ-step is as large a step as β and δ with it

ARMS = {
    "A": "--algo fomaml",
    "B": "--algo directed-fomaml",
    "C": "--algo directed-fomaml --medium random",
    "D": "--algo directed-fomaml --medium pooled",
    "E": "--algo fomaml",
    "F": "--algo fomaml --inner-steps 0",
    "G": "--algo fomaml --inner-steps 0 --oracle",
}
DIRECTED, ADAPTING = "BCD", "ABCDE"
PRIMARY = ("B-A", "B-E", "B-D")
COMPARISONS = (*PRIMARY, "B-C", "A-F")


@dataclass(frozen=True)
class Family:
    """A family's row of the tables in PROTOCOL.md; alpha, beta: ranges of log-uniform step sizes."""

    alpha: tuple
    beta: tuple
    window: int  # env steps of the area
    epochs: int  # of an arm that adapts; one that does not takes half the env steps an epoch
    effect: float  # the smallest of interest
    flags: str = ""
    arms: str = "ABCDEFG"
    configurations: int = 12
    tuning_seeds: str = "101-103"
    first_seed: int = 1001  # of the test
    repeats: str = ""  # the family whose experiment this one repeats
    learner: str = "fomaml"

    def epochs_of(self, arm):
        return self.epochs if arm in ADAPTING else 2 * self.epochs


FAMILIES = {
    "point": Family((0.01, 0.1), (0.001, 0.03), 400_000, 200, 0.1),
    "velocity": Family((0.003, 0.03), (0.0001, 0.003), 400_000, 200, 0.75),
    "cartpole": Family((0.001, 0.03), (0.001, 0.03), 1_300_000, 150, 4),
    "crossing": Family((0.001, 0.01), (0.0005, 0.01), 1_100_000, 220, 0.5),
    "lunarlander": Family(
        (0.001, 0.03), (0.001, 0.03), 1_200_000, 70, 12,
        "--optimizer adam --baseline step", "ABDEF", 6, "101-102",
    ),
}  # fmt: skip


def repeated(name, learner="fomaml"):
    """The row of a family's repetition: what the primary comparisons need, on fresh seeds, tuned by more of them."""
    fresh = {"arms": "ABDE", "tuning_seeds": "111-120", "first_seed": 2001}
    return replace(FAMILIES[name], **fresh, repeats=name, learner=learner)


FAMILIES |= {
    "cartpole-again": repeated("cartpole"),
    "point-maml": repeated("point", "maml"),
    "velocity-maml": repeated("velocity", "maml"),
}
RATIO = (0.5, 10)  # δ / β
EXTENSION = 3  # an extension's β lie within this factor beyond the range
FEWEST, MOST = 12, 48  # test seeds
FACTOR = 14.3  # (2.94 + 0.84)²: 80% power at p < 0.05 / 15, by a normal's quantiles


# --- configurations ---


def env_of(name):
    """The environment of a family, which a repetition shares."""
    return FAMILIES[name].repeats or name


def configurations(name):
    """A family's (N, 3) step sizes α, β, δ: a Latin hypercube on log scales, to three digits."""
    family = FAMILIES[name]
    return drawn(env_of(name), family.configurations, family.beta)


def extension(name, upwards):
    """A third as many configurations with β beyond the range."""
    low, high = FAMILIES[name].beta
    beta = (high, high * EXTENSION) if upwards else (low / EXTENSION, low)
    return drawn(f"{env_of(name)} extended", FAMILIES[name].configurations // 3, beta)


def drawn(text, count, beta):
    """(count, 3) α, β, δ with β in this range; the random numbers follow from the text."""
    random = np.random.default_rng(list(text.encode()))
    strata = np.stack([random.permutation(count) for _ in range(3)], 1)
    u = (strata + random.random((count, 3))) / count
    low, high = np.log(np.array([FAMILIES[text.split()[0]].alpha, beta, RATIO])).T
    alpha, beta, ratio = np.exp(low + u * (high - low)).T
    return np.array([[float(f"{x:.3g}") for x in row] for row in zip(alpha, beta, beta * ratio, strict=True)])


def flags(name, arm, sizes, seeds):
    """The flags of an arm's runs, without --out."""
    family, (alpha, beta, delta) = FAMILIES[name], sizes
    own = ARMS[arm].replace("fomaml", family.learner)
    said = f"--env {env_of(name)} {own} {family.flags} --beta {beta:g}"
    if arm in ADAPTING:
        said += f" --alpha {alpha:g}"
    if arm in DIRECTED:
        said += f" --delta {delta:g}"
    epochs = family.epochs_of(arm)
    return f"{said} --seed {seeds} --epochs {epochs} --eval-every {epochs} --window {family.window}".split()


# --- runs ---


def train(job):
    """Train the runs of (flags, folder), or resume them. A run that fails is a result; anything else is an error."""
    words, out = job
    sys.modules["matplotlib"] = None  # no figures: those of results/ are drawn from its CSV files
    try:
        run.main([*words, "--out", str(out), "--workers", "1", "--quiet", "--resume"])
    except SystemExit as stop:
        if stop.code != 1 or not list(out.glob("**/failed.txt")):
            raise RuntimeError(f"{shlex.join(words)}: ended with {stop.code}") from stop
    return f"{name_of(out)}"


def name_of(out):
    return out.relative_to(RUNS)


def train_all(jobs):
    """Train (flags, folder) of every job, one process a core."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(train, jobs):
            print(done, flush=True)


def logged(out):
    """All runs of a folder, which are one line of a report."""
    labels, left_out = runs.read(out)
    if left_out or len(labels) != 1:
        raise RuntimeError(f"{out}: expected one line of runs, found {list(labels)} {left_out}")
    [found] = labels.values()
    return found


def tune(name):
    """Run all configurations of all arms, and more beyond the range where the best of an arm is at its edge."""
    train_configurations(name, configurations(name))
    train_configurations(name, tried(name))


def train_configurations(name, tried):
    """Run these (N, 3) configurations of all arms but E, and write their summary."""
    family, folder = FAMILIES[name], RUNS / name / "tuning"
    arms = [arm for arm in family.arms if arm != "E"]
    numbered = [(arm, number, sizes) for number, sizes in enumerate(tried, 1) for arm in arms]
    train_all([(flags(name, arm, sizes, family.tuning_seeds), folder / f"{arm}{n}") for arm, n, sizes in numbered])
    labels = {f"{arm}{n}": logged(folder / f"{arm}{n}") for arm, n, _ in sorted(numbered, key=lambda x: x[:2])}
    write(ROOT / name / "tuning" / "summary.csv", report.summary(labels, family.window))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_atomically(path, text)


def summary_of(name, phase="."):
    return report.read_summary((ROOT / name / phase / "summary.csv").read_text(encoding="utf-8"))


def mean_areas(name, arm):
    """{configuration: mean area over the tuning seeds}; of a run that is not a number the worst there can be."""
    found = summary_of(name, "tuning")
    numbers = {label: np.nan_to_num(runs["area"], nan=-math.inf).mean() for label, runs in found.items()}
    return {int(label[1:]): area for label, area in numbers.items() if label[0] == arm}


def chosen(name, arm):
    """The number of the arm's best configuration; E has B's."""
    areas = mean_areas(name, "B" if arm == "E" else arm)
    return max(areas, key=areas.get)


def edge_of(name, arm):
    """Whether the arm's best β of the first configurations is the largest (True), the smallest (False), or neither."""
    beta = configurations(name)[:, 1]
    areas = {number: area for number, area in mean_areas(name, arm).items() if number <= len(beta)}
    best = max(areas, key=areas.get) - 1
    return {beta.argmax(): True, beta.argmin(): False}.get(best)


def tried(name):
    """All configurations: the first, and those beyond each end of the range at which an arm is best."""
    edges = {edge_of(name, arm) for arm in FAMILIES[name].arms if arm not in "EG"} - {None}
    return np.concatenate([configurations(name), *(extension(name, upwards) for upwards in sorted(edges))])


def sizes_of(name, arm):
    """The chosen α, β, δ of an arm, from the committed tuning runs."""
    found = summary_of(name, "tuning")[f"{'B' if arm == 'E' else arm}{chosen(name, arm)}"]
    alpha, beta, delta = (found[key][0] for key in ("alpha", "beta", "delta"))
    return (alpha, float(f"{beta + delta / TASKS:.6g}"), 0.0) if arm == "E" else (alpha, beta, delta)


def seeds_needed(name):
    """The number of test seeds that shows the smallest effect of interest, from the spread of B − A over tuning seeds
    at the three best configurations of either: (number, SD)."""
    found, best = summary_of(name, "tuning"), {}
    for arm in "AB":
        areas = mean_areas(name, arm)
        best[arm] = sorted(areas, key=areas.get)[-3:]
    pairs = [(found[f"A{a}"]["area"], found[f"B{b}"]["area"]) for a in best["A"] for b in best["B"]]
    sd = math.sqrt(np.mean([np.var(np.subtract(b, a), ddof=1) for a, b in pairs]))
    return int(np.clip(math.ceil(FACTOR * (sd / FAMILIES[name].effect) ** 2), FEWEST, MOST)), sd


def test_seeds(name):
    first = FAMILIES[name].first_seed
    return f"{first}-{first + seeds_needed(name)[0] - 1}"


def seeds_of(text):
    """ "1001-1003" -> [1001, 1002, 1003]."""
    first, last = map(int, text.split("-"))
    return list(range(first, last + 1))


def test_flags(name, arm):
    """The flags of the arm's test runs."""
    return flags(name, arm, sizes_of(name, arm), test_seeds(name))


def test(name):
    """Run every arm's chosen configuration on the test seeds."""
    family, folder = FAMILIES[name], RUNS / name / "test"
    train_all([(test_flags(name, arm), folder / arm) for arm in family.arms])
    labels = {arm: logged(folder / arm) for arm in family.arms}
    write(ROOT / name / "summary.csv", report.summary(labels, family.window))
    write(ROOT / name / "curves.csv", figures.curves(labels, family.window))


# --- statistics ---


@cache
def signs(n):
    """All (2^n, n) sign flips, or 2^16 drawn ones, the first of which flips nothing."""
    if n <= 16:
        return 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.int8)
    drawn = np.random.default_rng(0).choice(np.array([-1, 1], dtype=np.int8), (2**16, n))
    drawn[0] = 1  # so that p is never 0
    return drawn


def p_value(differences):
    """Two-sided p of the sign-flip test that (n,) differences are symmetric about 0."""
    flipped = abs(signs(len(differences)) @ differences)
    return float((flipped >= abs(differences.sum()) * (1 - 1e-12)).mean())


def interval(differences, level):
    """The shifts that the sign-flip test does not reject at 1 − level: (low, high)."""
    ends = []
    for side in (-1, 1):
        inside, outside = differences.mean(), differences.mean() + side * 10 * (np.ptp(differences) + 1e-9)
        for _ in range(50):
            middle = (inside + outside) / 2
            rejected = p_value(differences - middle) < 1 - level
            inside, outside = (inside, middle) if rejected else (middle, outside)
        ends.append(inside)
    return ends


def holm(p, count):
    """Holm's adjusted p of `count` tests, of which those that are not in {key: p} count as 1."""
    adjusted, highest = {}, 0
    for place, key in enumerate(sorted(p, key=p.get)):
        highest = max(highest, min(1, (count - place) * p[key]))
        adjusted[key] = highest
    return adjusted


def adjust(p):
    """{(family, comparison): p} -> the same by Holm's method, for the main experiment and for each repetition apart."""
    repetitions = [{name} for name, family in FAMILIES.items() if family.repeats]
    adjusted = {}
    for names in (FAMILIES.keys() - set().union(*repetitions), *repetitions):
        adjusted |= holm({key: p[key] for key in p if key[0] in names}, len(names) * len(PRIMARY))
    return adjusted


def tested():
    """The families whose test runs are there."""
    return [name for name in FAMILIES if (ROOT / name / "summary.csv").exists()]


def differences():
    """A row for each family and comparison that was run."""
    found = {}
    for name in tested():
        labels = summary_of(name)
        for comparison in COMPARISONS:
            ours, theirs = (labels.get(arm) for arm in comparison.split("-"))
            if ours and theirs:
                assert ours["seed"] == theirs["seed"]
                found[name, comparison] = np.array(ours["area"]) - np.array(theirs["area"])
    p = {key: p_value(x) for key, x in found.items()}
    adjusted = adjust({key: p[key] for key in p if key[1] in PRIMARY})
    rows = []
    for key, x in found.items():
        name, comparison = key
        wide, narrow, effect = interval(x, 0.95), interval(x, 0.90), FAMILIES[name].effect
        row = {"family": name, "comparison": comparison, "pairs": len(x), "mean": x.mean(), "sd": x.std(ddof=1)}
        row |= {"low95": wide[0], "high95": wide[1], "low90": narrow[0], "high90": narrow[1]}
        detectable = math.sqrt(FACTOR / len(x)) * row["sd"]  # with 80% power
        row |= {"p": p[key], "holm": adjusted.get(key, math.nan), "effect": effect, "detectable": detectable}
        rows.append(row | {"verdict": verdict(row)})
    return rows


def verdict(row):
    """A primary comparison in words; of another one nothing is claimed."""
    if math.isnan(row["holm"]):
        return "exploratory"
    small = -row["effect"] < row["low90"] and row["high90"] < row["effect"]
    if row["holm"] < 0.05:
        better = "better" if row["mean"] > 0 else "worse"
        return f"{better}, by less than matters" if small else better
    return "equal" if small else "cannot tell"


def choices():
    """A row for each arm of each family that was run: its step sizes, which of them are an end of those tried, and its
    mean area on the tuning seeds and on the test seeds."""
    rows = []
    for name in tested():
        alpha, beta, delta = tried(name).T
        labels = summary_of(name)
        for arm in FAMILIES[name].arms:
            row = dict(zip(("family", "arm", "alpha", "beta", "delta"), (name, arm, *sizes_of(name, arm)), strict=True))
            tuned = {"α": alpha, "β": beta, "δ / β": delta / beta}
            if arm not in DIRECTED:
                del tuned["δ / β"]
            if arm not in ADAPTING:
                del tuned["α"]
            place = chosen(name, arm) - 1
            ends = [f"lowest {what}" for what, values in tuned.items() if place == values.argmin()]
            ends += [f"highest {what}" for what, values in tuned.items() if place == values.argmax()]
            row["ends"] = "as B" if arm == "E" else ", ".join(ends) or "none"
            row["tuning"] = math.nan if arm == "E" else mean_areas(name, arm)[place + 1]
            rows.append(row | {"test": float(np.mean(labels[arm]["area"]))})
    return rows


def same_sizes():
    """A row for each family: in how many configurations B's mean area over the tuning seeds is above that of another
    arm with the same step sizes, of which the arm ignores those that it has not."""
    rows = []
    for name in tested():
        family, ours = FAMILIES[name], mean_areas(name, "B")
        row = {"family": name, "seeds": len(seeds_of(family.tuning_seeds))}
        for arm in "ACD":
            theirs = mean_areas(name, arm)
            above = sum(ours[number] > area for number, area in theirs.items())
            row[arm] = f"{above} of {len(ours)}" if theirs else "not run"
        rows.append(row)
    return rows


def text_of(rows):
    """Rows as the text of a CSV file."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{x:.4g}" if isinstance(x, float) else x for k, x in row.items()} for row in rows)
    return file.getvalue()


def tables():
    """{file: text} of what is computed from the summaries."""
    made = {"choices.csv": choices(), "differences.csv": differences(), "same-sizes.csv": same_sizes()}
    return {name: text_of(rows) for name, rows in made.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m results.protocol", description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--commands", action="store_true", help="print the commands of the test runs")
    args = parser.parse_args(arguments)
    for name in args.families:
        if name not in FAMILIES:
            parser.error(f"unknown family {name}; there are {', '.join(FAMILIES)}")
    for name in args.families:
        if args.commands:
            for arm in FAMILIES[name].arms:
                print(f"{arm}: python run.py {shlex.join(test_flags(name, arm))}")
            continue
        tune(name)
        test(name)
    if not args.commands:
        for file, text in tables().items():
            write(ROOT / file, text)


if __name__ == "__main__":
    main()
