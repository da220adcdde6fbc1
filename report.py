"""The run folders of one experiment -> report.md, curves.png and adaptation.png. Needs numpy; figures need matplotlib.

Statistics over seeds as rliable does them (Agarwal et al. 2021): the interquartile mean (IQM), and 95% percentile
bootstrap intervals.
"""

import contextlib
import csv
import io
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np

EMA = 0.9  # the paper's smoothing factor
RESAMPLES = 1000
# Okabe & Ito's colours, told apart by colour-blind readers; line style and marker tell the rest.
COLOURS = {"maml": "#0072B2", "fomaml": "#D55E00", "meta-sgd": "#009E73", "reptile": "#CC79A7"}
MARKERS = "osD^vPX*<>"


# --- statistics ---


def ema(values, factor=EMA):
    """Exponential moving average, started at the first value."""
    smooth, out = values[0], []
    for value in values:
        smooth = factor * smooth + (1 - factor) * value
        out.append(smooth)
    return np.array(out)


def iqm(values, axis=0):
    """Interquartile mean: the mean of what is left without the lowest and the highest quarter (rounded down)."""
    values = np.sort(np.asarray(values, dtype=float), axis=axis)
    cut = values.shape[axis] // 4
    return np.take(values, range(cut, values.shape[axis] - cut), axis=axis).mean(axis)


def interval(values, axis=0):
    """The IQM's 95% percentile bootstrap interval over `axis`, the seeds: (low, high)."""
    values = np.moveaxis(np.asarray(values, dtype=float), axis, 0)
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means = np.sort(iqm(values[draws], axis=1), axis=0)
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]


# --- files: whoever reads one sees the old content or the new, never half of it ---


@contextlib.contextmanager
def named(path):
    """What the system refuses while a file is open, e.g. for a full disk, names the file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync(path):
    """Have a file's content on the disk."""
    with named(path), open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_durably(path, data):
    """bytes or text -> a new file, on the disk when this returns; none where that fails."""
    path.unlink(missing_ok=True)  # it may be a link to elsewhere, in a folder from a stranger
    try:
        with named(path), open(path, "xb") as file:
            file.write(data if isinstance(data, bytes) else data.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def write_atomically(path, data):
    """bytes or text -> path, by way of a file beside it."""
    aside = path.with_name(path.name + ".tmp")
    write_durably(aside, data)
    os.replace(aside, path)


# --- reading ---


def read(root):
    """All runs under root, {label: [run, ..]}, and a line for each that is left out, for it cannot be read."""
    groups, left_out, phi = {}, [], None
    for path in sorted(Path(root).glob("**/config.json")):
        try:
            run = read_run(path.parent)
            phi = phi or run["config"]["phi"]
            if run["config"]["phi"] != phi:
                raise ValueError(f"{path}: its φ is {run['config']['phi']}, that of the runs before {phi}")
        except ValueError as error:
            left_out.append(f"{error}; the run is left out of the report")
            continue
        if len(run["log"]["epoch"]):
            groups.setdefault((run["config"]["algo"], run["config"]["delta"]), []).append(run)
    labels = {}
    for (algo, delta), runs in sorted(groups.items(), key=by_twins):
        several = sum(other == algo for other, _ in groups) > 1
        labels[f"{algo}, δ = {delta:g}" if several and delta is not None else algo] = runs
    return labels, left_out


def read_run(folder):
    """A run: config, log columns, rows of evaluation, and whether it failed. Raises ValueError that names the file."""
    run = {"failed": (folder / "failed.txt").exists()}
    for name, parse in (("config.json", parse_config), ("log.csv", parse_log), ("eval.csv", parse_evaluation)):
        path = folder / name
        try:
            run[path.stem] = parse(path.read_text(encoding="utf-8") if path.exists() else "")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: damaged ({type(error).__name__}: {str(error)[:100]})") from error
    return run


def parse_config(text):
    config = json.loads(text)
    number = (int, float, type(None))
    kinds = {"env": str, "rl": str, "algo": str, "phi": list, "delta": number, "threshold": number, "inner_steps": int}
    for key, kind in (kinds | {"eval_steps": int}).items():
        if not isinstance(config[key], kind):
            raise ValueError(f"{key} is {config[key]!r}")
    if config["algo"].removeprefix("directed-") not in COLOURS:
        raise ValueError(f"algo is {config['algo']!r}")
    return config


def parse_rows(text):
    """The rows of a CSV file as dicts; a last one may be half there, while another process writes or after a crash."""
    rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines(), restkey="more", restval=None))
    if any("more" in row or None in row.values() for row in rows):
        raise ValueError("a row has other columns than the header")
    return rows


def parse_log(text):
    rows = parse_rows(text)
    keys = rows[0] if rows else ["epoch"]
    log = {key: np.array([float(row[key] or "nan") for row in rows]) for key in keys}
    if rows and not {"epoch", "env_steps", "seconds", "return_post"} <= log.keys():
        raise ValueError("a column is missing")
    return log


def parse_evaluation(text):
    """The complete evaluations."""
    rows = parse_rows(text)
    for row in rows:
        int(row["step"]), float(row["return"]), [float(x) for x in row["phi"].split()]
    counts = Counter(row["epoch"] for row in rows)
    return [row for row in rows if counts[row["epoch"]] == max(counts.values())]


def by_twins(group):
    """Sort key: each algorithm before its directed twin, those by δ."""
    algo, delta = group[0]
    base = algo.removeprefix("directed-")
    return list(COLOURS).index(base), algo != base, delta or 0.0


def convergence(run):
    """Index of the first epoch whose smoothed return_post is over the environment's threshold, or None."""
    threshold = run["config"]["threshold"]
    over = np.flatnonzero(ema(run["log"]["return_post"]) > (math.inf if threshold is None else threshold))
    return None if run["failed"] or not len(over) else int(over[0])


# --- the table ---


def plus_minus(values, form="{:.3g}"):
    return f"{form.format(np.mean(values))} ± {form.format(np.std(values).round(9))}"


def with_interval(values, form="{:.4g}"):
    """IQM [low, high]; what was never reached counts as infinite and shows as such."""
    low, high = interval(values)
    return "{} [{}, {}]".format(*(form.format(x) if math.isfinite(x) else "never" for x in (iqm(values), low, high)))


def final_return(run):
    """Mean return after adaptation over the last tenth of the epochs."""
    values = run["log"]["return_post"]
    return values[-max(len(values) // 10, 1) :].mean()


def held_out_return(run, step):
    """Mean over the held-out grid after `step` inner steps, at the last evaluation."""
    rows = [row for row in run["eval"] if row["epoch"] == run["eval"][-1]["epoch"] and int(row["step"]) == step]
    return np.mean([float(row["return"]) for row in rows])


def reached(runs, key):
    """What each run had spent of a log column when it converged; infinite where it never did."""
    return [math.inf if (at := convergence(run)) is None else run["log"][key][at] for run in runs]


def row(label, runs, twins):
    """One line of the table; twins: the runs of the same algorithm without the δ-step, or None."""
    good = [run for run in runs if not run["failed"]]
    seconds = [np.diff(run["log"]["seconds"], prepend=0) for run in runs]
    epochs = reached(runs, "epoch")
    evaluated = [run for run in good if run["eval"]]
    steps = (0, min(runs[0]["config"]["inner_steps"], runs[0]["config"]["eval_steps"]))
    lengths = sorted({len(run["log"]["epoch"]) for run in runs})
    ratio = "–"
    if twins:
        pairs = [(iqm(reached(twins, key)), iqm(reached(runs, key))) for key in ("epoch", "env_steps", "seconds")]
        ratio = ", ".join(f"{a / b:.2f}×" if math.isfinite(a) and math.isfinite(b) else "–" for a, b in pairs)
    cells = [
        label,
        f"{len(runs)}" + (f" ({len(runs) - len(good)} failed)" if len(good) < len(runs) else ""),
        "-".join(map(str, lengths[:: len(lengths) - 1] if len(lengths) > 1 else lengths)),
        plus_minus(np.concatenate(seconds)),
        plus_minus([1000 * x.mean() for x in seconds]),
        f"{sum(map(math.isfinite, epochs))}/{len(runs)}",
        with_interval(epochs),
        with_interval(reached(runs, "env_steps"), "{:.3g}"),
        with_interval(reached(runs, "seconds"), "{:.3g}"),
        with_interval([final_return(run) for run in good]) if good else "–",
        *(with_interval([held_out_return(run, n) for run in evaluated]) if evaluated else "–" for n in steps),
        ratio,
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = [
    "algorithm", "runs", "epochs trained", "s per epoch", "s per 1000 epochs", "converged", "epochs to convergence",
    "env steps to convergence", "s to convergence", "final return", "held-out before", "held-out after",
    "speed-up by δ: epochs, steps, s",
]  # fmt: skip


def table(labels):
    """The paper's Table II for these runs, in Markdown."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    for label, runs in labels.items():
        algo = runs[0]["config"]["algo"]
        twins = labels.get(algo.removeprefix("directed-")) if algo.startswith("directed-") else None
        lines.append(row(label, runs, twins))
    return "\n".join(lines)


def text(labels):
    config = next(iter(labels.values()))[0]["config"]
    threshold = "a threshold, here not given" if config["threshold"] is None else f"{config['threshold']:g}"
    return f"""# {config["env"]}, {config["rl"]}

{table(labels)}

Seconds: training time, evaluation excluded, as mean ± standard deviation, of an epoch over all epochs, of 1000 over
runs; runs trained in one batch share its time evenly. Convergence: the first epoch at which the mean return after
adaptation, smoothed (EMA {EMA}), is above {threshold}; a run that never gets there counts as infinite ("never") and is
not dropped. Final return: mean return after adaptation over the last tenth of the epochs. Held-out: mean return over
the fixed grid of tasks at the last evaluation, before adaptation and after as many inner steps as in training (at most
{config["eval_steps"]}). Convergence and returns are interquartile means over seeds with 95% bootstrap intervals.
Speed-up: the undirected twin's interquartile mean over this one's.
"""


# --- the figures ---


def style(labels, ramp):
    """A look for every label: colour and marker tell the algorithm, or δ where there are several (from the colour map
    `ramp`); with the δ-step solid and filled, without dashed and hollow."""
    algos = [runs[0]["config"]["algo"] for runs in labels.values()]
    looks, seen = {}, Counter()
    for (label, runs), algo in zip(labels.items(), algos, strict=True):
        base = algo.removeprefix("directed-")
        several, directed = algos.count(algo), base != algo
        colour = COLOURS[base] if several == 1 else ramp(0.9 * seen[algo] / (several - 1))
        looks[label] = {
            "color": colour,
            "linestyle": "-" if directed else "--",
            "marker": MARKERS[(list(COLOURS).index(base) + seen[algo]) % len(MARKERS)],
            "markerfacecolor": colour if directed else "white",
            "markersize": 5,
            "label": f"{label} ({len(runs)} run{'s' * (len(runs) > 1)})",
        }
        seen[algo] += 1
    return looks


def save_figure(figure, path):
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_atomically(path, picture.getvalue())


def draw_curves(plt, labels, path):
    """Fig. 2 and 3: smoothed return after adaptation against epochs, one line an algorithm."""
    config = next(iter(labels.values()))[0]["config"]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for offset, (look, runs) in enumerate(
        zip(style(labels, plt.get_cmap("viridis")).values(), labels.values(), strict=True)
    ):
        length = min(len(run["log"]["epoch"]) for run in runs)
        curves = np.stack([ema(run["log"]["return_post"][:length]) for run in runs])
        epochs = runs[0]["log"]["epoch"][:length]
        low, high = interval(curves)
        axes.fill_between(epochs, low, high, color=look["color"], alpha=0.15, linewidth=0)
        every = max(length // 12, 1)
        axes.plot(epochs, iqm(curves), markevery=(offset * every // len(labels), every), **look)
    if (threshold := config["threshold"]) is not None:
        axes.axhline(threshold, color="0.5", linewidth=0.8, linestyle=":")
        axes.annotate(f"convergence: {threshold:g}", (0.995, threshold), (0, -3), color="0.35", ha="right", va="top",
                      fontsize=8, xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
    axes.set(
        title=f"{config['env']}, {config['rl']}: interquartile mean over seeds, 95% bootstrap interval",
        xlabel="epoch",
        ylabel=f"mean return after adaptation (undiscounted, EMA {EMA})",
    )
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, path)
    plt.close(figure)


def held_out(runs):
    """The last evaluation: (x (G,), returns (runs, steps + 1, G)); x is φ, or φ's distance from the grid's centre."""
    returns = []
    for run in runs:
        last = run["eval"][-1]["epoch"]
        rows = [r for r in run["eval"] if r["epoch"] == last]
        phi = np.array([[float(x) for x in r["phi"].split()] for r in rows if r["step"] == "0"])
        returns.append(np.array([float(r["return"]) for r in rows]).reshape(len(phi), -1).T)
    returns = [r[: min(map(len, returns))] for r in returns]  # --eval-steps may differ
    if phi.shape[1] == 1:
        return phi[:, 0], np.stack(returns)
    distance = np.linalg.norm(phi - phi.mean(0), axis=1).round(9)
    groups = np.unique(distance)
    return groups, np.stack([[r[:, distance == d].mean(1) for d in groups] for r in returns]).swapaxes(1, 2)


LOOKS = [("#000000", "o", ":"), ("#0072B2", "s", "-"), ("#D55E00", "D", "--")]  # before, after one step, after the last


def draw_adaptation(plt, labels, path):
    """Held-out return before and after adaptation against φ, one panel an algorithm."""
    labels = {label: [run for run in runs if run["eval"]] for label, runs in labels.items()}
    labels = {label: runs for label, runs in labels.items() if runs}
    if not labels:
        return False
    columns = min(len(labels), 4)
    count = math.ceil(len(labels) / columns)
    figure, panels = plt.subplots(
        count, columns, figsize=(0.8 + 3 * columns, 0.8 + 2.8 * count), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for panel in panels.flat[len(labels) :]:
        panel.set_visible(False)
    for panel, (label, runs) in zip(panels.flat, labels.items(), strict=False):
        config = runs[0]["config"]
        x, returns = held_out(runs)
        for step, (colour, mark, line) in zip(sorted({0, 1, returns.shape[1] - 1}), LOOKS, strict=False):
            low, high = interval(returns[:, step])
            name = "before adaptation" if step == 0 else f"after {step} inner step{'s' * (step > 1)}"
            panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            panel.plot(x, iqm(returns[:, step]), color=colour, marker=mark, markersize=4, label=name, linestyle=line)
        panel.set_title(f"{label} ({len(runs)} run{'s' * (len(runs) > 1)})", fontsize=10)
        panel.grid(alpha=0.3)
    figure.suptitle(f"{config['env']}, {config['rl']}: held-out tasks after epoch {runs[0]['eval'][-1]['epoch']}")
    for column in range(columns):  # the lowest panel of each column
        lowest = panels.flat[max(range(column, len(labels), columns))]
        lowest.set_xlabel(config["phi"][0] if len(config["phi"]) == 1 else "distance of φ from the mean task")
        lowest.tick_params(labelbottom=True)
    figure.supylabel("mean return (undiscounted)", fontsize=10)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)
    plt.close(figure)
    return True


# --- one episode as an animation ---


def animate(pictures, episode, env, phi, path):
    """Write a GIF of the episode's pictures, or, where there are none, of its positions drawn in the plane."""
    from PIL import Image

    pictures = draw_positions(episode, env, phi) if pictures is None else pictures
    images = [Image.fromarray(picture) for picture in pictures]
    images = [image.resize((image.width // 2, image.height // 2)) for image in images]
    animation = io.BytesIO()
    images[0].save(animation, format="GIF", save_all=True, append_images=images[1:], duration=50, loop=0)
    write_atomically(path, animation.getvalue())


def draw_positions(episode, env, phi):
    """point: the path and its goal. crossing: the two vehicles on their roads. velocity: v against time."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    length = int(episode["mask"].sum())
    obs = np.concatenate([episode["obs"].reshape(length, -1), episode["last_obs"].reshape(1, -1)])
    pictures = []
    for t in range(1, len(obs) + 1):
        figure, axes = plt.subplots(figsize=(6, 6), layout="constrained")
        if env.obs_dim == 1:
            axes.plot(obs[:t, 0], color="#0072B2", marker="o", markersize=3, label="velocity")
            axes.axhline(phi.item(), color="#D55E00", linestyle="--", label="target")
            axes.set(xlim=(0, length), xlabel="step", ylabel=env.phi[0])
        elif len(env.phi) == 2:
            axes.plot(*obs[:t].T, color="#0072B2", marker="o", markersize=3, label="path")
            axes.plot(*phi.flatten(), "*", color="#D55E00", markersize=14, label="goal")
            axes.set(xlim=(-0.7, 0.7), ylim=(-0.7, 0.7), xlabel="x (m)", ylabel="y (m)")
        else:
            x, y = obs[t - 1] * [50, -50]  # m, as envs.crossing has it
            axes.axhspan(-2, 2, color="0.9")
            axes.axvspan(-2, 2, color="0.9")
            axes.plot(0, y, "^", color="#0072B2", markersize=14, label="vehicle 1, the policy's")
            axes.plot(x, 0, ">", color="#D55E00", markersize=14, label=f"vehicle 2, {phi.item():g} m/s")
            axes.set(xlim=(-50, 50), ylim=(-50, 50), xlabel="east (m)", ylabel="north (m)")
        axes.legend(loc="upper right")
        figure.canvas.draw()
        pictures.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
        plt.close(figure)
    return pictures


def write(root):
    """Rewrite report.md and the figures under root from all runs there; returns lines that say what was written, and
    lines that say what was left out."""
    root = Path(root)
    labels, left_out = read(root)
    if not labels:
        return [f"{root}: no run with a log, so no report"], left_out
    write_atomically(root / "report.md", text(labels) + "".join(f"\n{line}.\n" for line in left_out))
    lines = [f"wrote {root / 'report.md'}"]
    try:
        import matplotlib
    except ImportError:
        remedy = "pip install matplotlib, then the same with --resume"
        return [*lines, f"no figures: matplotlib is not installed ({remedy})"], left_out
    matplotlib.use("agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $
    import matplotlib.pyplot as plt

    draw_curves(plt, labels, root / "curves.png")
    lines.append(f"wrote {root / 'curves.png'}")
    if draw_adaptation(plt, labels, root / "adaptation.png"):
        lines.append(f"wrote {root / 'adaptation.png'}")
    return lines, left_out
