"""Everything that needs a GPU, checked and measured by one command: `python bench/gpu.py` writes one Markdown file.

Takes under nine minutes with torch 2.11; needs requirements.txt and pytest. Exits with code 1 where a check fails; the
other parts run all the same.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import envs
import policies
import report
import run
from bench.measure import (
    Configuration,
    in_fresh_processes,
    measure,
    opened,
    opened_endless,
    peak_memory,
    repeat,
    time_epoch,
)
from harness import checkpoints

REPOSITORY = Path(__file__).parent.parent
LIMIT = 480  # s after which no further part or row begins
TOLERANCE, FLOAT32_TOLERANCE = 1e-9, 1e-4  # of θ after a few epochs
BASE = Configuration("cartpole", "maml", S=1, M=5, K=10, H=200, hidden=64)
SIZES = (1, 16, 64, 256)
FAMILIES = list(envs.ENVS)


# A GPU draws other numbers than a CPU: what is compared takes the CPU's on both.
same_noise = partial(mock.patch.object, envs, "on_device", lambda generators, device: generators)


class CheckError(Exception):
    """A check failed; the message is Markdown."""


# --- the parts: (device, small, time left in s) -> Markdown; they raise CheckError ---


def run_tests(device, small, left):
    """The tests that need CUDA."""
    if small:
        return "left out with --small"
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", "cuda or captured", "tests"]
    try:
        ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=min(150, left))
    except subprocess.TimeoutExpired as error:
        raise CheckError(f"not done after {error.timeout:.0f} s") from error
    text = "\n".join(ended.stdout.splitlines()[-15:])
    if ended.returncode:
        raise CheckError(f"```\n{text}\n{ended.stderr[-1000:]}\n```")
    return f"```\n{text}\n```"


def trained(configuration, device, epochs=3):
    """θ after so many epochs in float64, as one vector on the CPU."""
    torch.set_default_dtype(torch.float64)
    try:
        env, runs = configuration.plan()
        with same_noise(), opened(env, runs, device) as batch:
            for _ in range(epochs):
                run.train_epoch(batch)
            return torch.cat([p.detach().cpu().flatten() for p in batch.theta.values()])
    finally:
        torch.set_default_dtype(torch.float32)


def check_agreement(device, small, left):
    """θ after three epochs in float64, on the device and on the CPU."""
    rows = []
    for name in FAMILIES:
        for algo in ("directed-maml",) if small else ("directed-maml", "meta-sgd"):
            sizes = {"S": 2, "M": 2, "K": 2, "H": 8, "hidden": 4} if small else {"S": 2, "H": None}
            c = replace(BASE, env=name, algo=algo, **sizes)
            ours, expected = trained(c, device), trained(c, "cpu")
            difference = float((ours - expected).abs().max())
            rows.append({"family": name, "algorithm": algo, "largest difference in θ": f"{difference:.1e}"})
    text = report.markdown(rows)
    if not all(float(row["largest difference in θ"]) < TOLERANCE for row in rows):  # NaN is a failure too
        raise CheckError(text)
    return text


def sample_eagerly(env, head, device, params, phi, noise):
    """As the captured rollout, without a CUDA graph."""
    with torch.no_grad():
        act = policies.actor({key: p.detach() for key, p in params.items()}, head, torch)
        return envs.rollout(env, act, phi.to(device), {key: x.to(device) for key, x in noise.items()}, torch)


def time_on_device(configuration, device, seconds, eager):
    """Seconds an epoch, and peak memory in MB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with opened_endless(configuration, device) as batch:
        if eager:
            batch.sample = partial(sample_eagerly, batch.env, batch.head, device)
        timed = repeat(partial(time_epoch, batch), seconds)
    return timed["epoch"], peak_memory(device)


def time_on_cores(configuration, seconds):
    """Seconds an epoch of the whole sweep on the CPU, its runs shared out over a process on each core."""
    count = min(os.cpu_count(), configuration.S)
    share = replace(configuration, S=math.ceil(configuration.S / count))
    return max(row["epoch"] for row in in_fresh_processes(measure, *[(share, "cpu", seconds)] * count))


def measure_speed(device, small, left):
    """Epochs a second for sweeps of several sizes, with and without a CUDA graph, and on all cores of the CPU."""
    rows, faster, deadline = [], [], time.monotonic() + left
    base, seconds = (replace(BASE, M=2, K=2, H=8, hidden=4), 0.0) if small else (BASE, 2.0)
    for size in SIZES[:2] if small else SIZES:
        if time.monotonic() > deadline:
            rows.append({**dict.fromkeys(rows[0], "out of time"), "runs": f"{size}"})
            continue
        c = replace(base, S=size)
        captured, memory = time_on_device(c, device, seconds, eager=False)
        eager, _ = time_on_device(c, device, seconds, eager=True)
        on_cpu = time_on_device(c, "cpu", seconds, eager=False)[0] if small else time_on_cores(c, seconds)
        faster += [size] * (captured < on_cpu)
        shown = [f"{1 / x:.3g}" for x in (captured, eager, on_cpu)]
        names = ["captured, epochs/s", "eager, epochs/s", "CPU, all cores, epochs/s"]
        rows.append({"runs": f"{size}", **dict(zip(names, shown, strict=True)), "peak memory, MB": f"{memory:.0f}"})
    crossover = f"from {faster[0]} runs on" if faster else "at none of these sizes"
    return (
        f"CartPole, MAML, every trajectory 200 steps.\n\n{report.markdown(rows)}\n\nThe device is faster {crossover}."
    )


def train_here(dtype, out, *words):
    """A command of run.py in this process, without its report. Returns the state of its one run."""
    torch.set_default_dtype(dtype)
    try:
        with same_noise(), mock.patch.object(report, "write", lambda root: ([], [])):
            run.main([*map(str, words), "--out", str(out), "--quiet"])
    finally:
        torch.set_default_dtype(torch.float32)
    [path] = Path(out).rglob(checkpoints.CHECKPOINT)
    return checkpoints.load(path)


def largest_difference(a, b):
    return max(float((a["theta"][name] - p).abs().max()) for name, p in b["theta"].items())


def check_checkpoints(device, small, left):
    """Two epochs on the device, two on the CPU, two on the device again: the same as six on the CPU."""
    words = ["--env", "point", "--algo", "directed-meta-sgd", "--optimizer", "adam", "--eval-steps", 1]
    words += ["--tasks", 2, "--trajectories", 2, "--hidden", 8]
    with tempfile.TemporaryDirectory() as moved, tempfile.TemporaryDirectory() as stayed:
        for epochs, place in ((2, device), (4, "cpu"), (6, device)):
            state = train_here(
                torch.float64, moved, *words, "--device", place, "--epochs", epochs, *["--resume"] * (epochs > 2)
            )
        difference = largest_difference(
            state, train_here(torch.float64, stayed, *words, "--device", "cpu", "--epochs", 6)
        )
    text = f"largest difference in θ: {difference:.1e}"
    if not difference < TOLERANCE:
        raise CheckError(text)
    return text


def check_lunarlander(device, small, left):
    """LunarLander's gradients on the device and its environments on the CPU: the same as all on the CPU, in float32."""
    words = ["--env", "lunarlander", "--algo", "directed-maml", "--epochs", 1 if small else 3, "--eval-steps", 1]
    words += [
        "--tasks",
        2,
        "--trajectories",
        2,
        "--horizon",
        5 if small else 50,
        "--hidden",
        8,
        "--workers",
        1 if small else 4,
    ]
    states = []
    for place in (device, "cpu"):
        with tempfile.TemporaryDirectory() as out:
            states.append(train_here(torch.float32, out, *words, "--device", place))
    difference = largest_difference(*states)
    text = f"largest difference in θ: {difference:.1e}"
    if not difference < FLOAT32_TOLERANCE:
        raise CheckError(text)
    return text


PARTS = {
    "Tests that need CUDA": run_tests,
    "Float64 on the device and on the CPU": check_agreement,
    "Speed and memory": measure_speed,
    "A checkpoint moved there and back": check_checkpoints,
    "LunarLander sampled on the CPU": check_lunarlander,
}


# --- the command ---


def describe(device):
    if device != "cuda":
        return f"torch {torch.__version__}, the CPU in place of a GPU, {os.cpu_count()} cores"
    gpu = torch.cuda.get_device_properties(0)
    return (
        f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"{os.cpu_count()} CPU cores"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark/gpu.md"), help="(default %(default)s)")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu tries this script without a GPU
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py: no CUDA device is available to torch, so there is nothing to check")
    start, failed, text = time.monotonic(), [], ["# GPU", describe(args.device)]
    for title, part in PARTS.items():
        begun, left = time.monotonic(), LIMIT - (time.monotonic() - start)
        print(f"{title} ..", flush=True)
        try:
            body = part(args.device, args.small, left) if left > 0 else "left out: out of time"
        except CheckError as error:
            failed.append(title)
            body = f"**FAILED**\n\n{error}"
        except (Exception, SystemExit):
            failed.append(title)
            body = f"**FAILED**\n\n```\n{traceback.format_exc()[-2000:]}\n```"
        text += [f"## {title}", f"{part.__doc__} {time.monotonic() - begun:.0f} s.", body]
    text.insert(
        2,
        f"{time.monotonic() - start:.0f} s in all. {'Failed: ' + ', '.join(failed) if failed else 'No check failed'}.",
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_atomically(args.out, "\n\n".join(text) + "\n")
    print(text[2], f"wrote {args.out}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
