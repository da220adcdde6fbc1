"""Everything that needs a GPU, checked and measured by one command: `python bench/gpu.py` writes one Markdown file.

Takes under nine minutes, from any folder; needs requirements.txt, and shows JAX beside it where jax is installed. Each
part runs in a process of its own for at most its seconds, and what it has printed by then is kept. Exits with code 1
where a check fails; the other parts run all the same.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import envs
import run
from bench.measure import Configuration, in_fresh_processes, measure, opened, opened_endless, peak_memory, time_epoch
from harness import checkpoints, report
from harness.device import WARM_UP, Recorded
from harness.sampling import DeviceSampler
from harness.settings import algorithms

REPOSITORY = Path(run.__file__).parent
TOLERANCE, FLOAT32_TOLERANCE = 1e-9, 1e-4  # of θ after a few epochs
BASE = Configuration("cartpole", "maml", S=1, M=5, K=10, H=200, hidden=64)
TINY = {"M": 2, "K": 2, "H": 8, "hidden": 4}
SIZES = (1, 16, 64, 256)
FAMILIES = list(envs.ENVS)


class Table:
    """Prints rows of a Markdown table as they come."""

    def __init__(self):
        self.columns = []

    def add(self, **cells):
        if not self.columns:
            self.columns = list(cells)
            print("| " + " | ".join(self.columns) + " |\n|" + "---|" * len(self.columns))
        print("| " + " | ".join(cells.get(column, "") for column in self.columns) + " |", flush=True)


def check(difference, tolerance, what):
    if not difference < tolerance:  # NaN is a failure too
        sys.exit(f"{what}: {difference:.1e}, expected less than {tolerance:g}")


# --- the parts: (device, small) print Markdown; they exit with a line where a check fails ---


def run_tests(device, small):
    """The tests that need CUDA."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", "cuda", "tests"]
    ended = subprocess.run([*command, "--co"] if small else command, cwd=REPOSITORY, capture_output=True, text=True)
    tail = "\n".join(ended.stdout.splitlines()[-15:])
    print(f"```\n{tail}\n```")
    if ended.returncode:
        sys.exit(f"pytest ended with {ended.returncode}: {ended.stderr[-1000:]}")


def trained(configuration, device, epochs):
    """θ after so many epochs, recorded where the device can, as one vector on the CPU."""
    env, runs = configuration.plan()
    with opened(env, runs, "cpu") as on_cpu:
        sample, epoch = on_cpu.sample, Recorded(run.train_epoch)
        if device is not None:
            sample = DeviceSampler(env, on_cpu.head, device, compiled=None)
        batch = run.Batch(runs, env, on_cpu.head, sample, device or "cpu", on_cpu.ranks, on_cpu.rows)
        for _ in range(epochs):
            batch.set_schedules()
            epoch(batch)
            for planned in runs:
                planned.state["epoch"] += 1
        return batch.position().cpu()


def check_agreement(device, small):
    """θ after warming up and two recorded epochs, in float64, on the device and by numpy rollouts on the CPU."""
    torch.set_default_dtype(torch.float64)
    table, sizes = Table(), TINY | {"S": 2} if small else {"S": 2, "M": 2, "K": 4, "H": 20, "hidden": 16}
    cases = [(name, "directed-maml") for name in FAMILIES]
    cases += [("point", algo) for algo in algorithms() if algo != "directed-maml"]
    for name, algo in cases:
        c = replace(BASE, env=name, algo=algo, **sizes)
        difference = float((trained(c, device, WARM_UP + 2) - trained(c, None, WARM_UP + 2)).abs().max())
        table.add(family=name, algorithm=algo, **{"largest difference in θ": f"{difference:.1e}"})
        check(difference, TOLERANCE, f"{name}, {algo}")


def train_here(dtype, out, *words):
    """A command of run.py in this process, without its report. Returns the state of its run, the first of several."""
    torch.set_default_dtype(dtype)
    with mock.patch.object(report, "write", lambda *args: ([], [])):
        run.main([*map(str, words), "--out", str(out), "--quiet"])
    return checkpoints.load(min(Path(out).rglob(checkpoints.CHECKPOINT)))


def largest_difference(a, b):
    return max(float((a["theta"][name] - p).abs().max()) for name, p in b["theta"].items())


def check_checkpoints(device, small):
    """Two epochs on the device, two on the CPU, two on the device again: the same as six on the CPU, in float64."""
    words = ["--env", "point", "--algo", "directed-meta-sgd", "--optimizer", "adam", "--eval-steps", 1]
    words += ["--tasks", 2, "--trajectories", 2, "--hidden", 8]
    with tempfile.TemporaryDirectory() as moved, tempfile.TemporaryDirectory() as stayed:
        for epochs, place in ((2, device), (4, "cpu"), (6, device)):
            resume = ["--resume"] if epochs > 2 else []
            state = train_here(torch.float64, moved, *words, "--device", place, "--epochs", epochs, *resume)
        expected = train_here(torch.float64, stayed, *words, "--device", "cpu", "--epochs", 6)
    difference = largest_difference(state, expected)
    print(f"largest difference in θ: {difference:.1e}")
    check(difference, TOLERANCE, "largest difference in θ")


def check_lunarlander(device, small):
    """LunarLander's gradients on the device and its environments on the CPU: the same as all on the CPU, in float32."""
    words = ["--env", "lunarlander", "--algo", "directed-maml", "--epochs", 1 if small else 5, "--eval-steps", 1]
    words += ["--tasks", 2, "--trajectories", 2, "--horizon", 5 if small else 50, "--hidden", 8]
    states = []
    for place in (device, "cpu"):
        with tempfile.TemporaryDirectory() as out:
            states.append(train_here(torch.float32, out, *words, "--workers", 1, "--device", place))
    difference = largest_difference(*states)
    print(f"largest difference in θ: {difference:.1e}")
    check(difference, FLOAT32_TOLERANCE, "largest difference in θ")


def check_repeats(device, small):
    """The largest difference in θ, in float32, after eight epochs: the same run again, resumed, and in a sweep."""
    words = ["--env", "cartpole", "--algo", "directed-maml", "--device", device, "--eval-steps", 1]
    words += ["--tasks", 2, "--trajectories", 2, "--horizon", 5, "--hidden", 8] if small else []
    ways = {"once": ("1", [8]), "again": ("1", [8]), "resumed": ("1", [4, 8]), "swept": ("1-3", [8])}
    states = {}
    for name, (seeds, stops) in ways.items():
        with tempfile.TemporaryDirectory() as out:
            for epochs in stops:
                resume = ["--resume"] if epochs != stops[0] else []
                states[name] = train_here(torch.float32, out, *words, "--seed", seeds, "--epochs", epochs, *resume)
    differences = {name: largest_difference(state, states["once"]) for name, state in states.items() if name != "once"}
    Table().add(**{name: f"{difference:.1e}" for name, difference in differences.items()})
    check(max(differences.values()), FLOAT32_TOLERANCE, "largest difference in θ")


def time_on_device(configuration, device, record, seconds):
    """(ms an epoch, the median of so many seconds; s until the first timed one; peak memory in MB)."""
    if device == "cuda":
        gc.collect()  # the recording before this one, and the memory that it holds
        torch.cuda.reset_peak_memory_stats()
    begun, times = time.perf_counter(), []
    epoch = Recorded(run.train_epoch) if record else run.train_epoch
    with opened_endless(configuration, device) as batch:
        if not record:
            batch.sample.compiled = None
        for _ in range(WARM_UP + 1):
            time_epoch(batch, epoch)
        ready = time.perf_counter() - begun
        if device == "cuda" and record and (epoch.graph is None or batch.sample.compiled is None):
            sys.exit("an epoch is not recorded, or its step not compiled; see the line above")
        while not times or sum(times) < seconds:
            times.append(time_epoch(batch, epoch)["epoch"])
    return 1000 * sorted(times)[len(times) // 2], ready, peak_memory(device)


def time_jax(configuration):
    """ms an epoch of JAX's plain design on this device, in float32; "" where it is not installed."""
    if importlib.util.find_spec("jax") is None:
        return ""
    words = ["--design", "plain", "--algo", configuration.algo, "--runs", str(configuration.S), "--seconds", "1"]
    words += ["--all-cores"]  # it compiles on them
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, str(REPOSITORY / "bench/jax_rival.py"), *words]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
        return ended.stderr.strip().splitlines()[-1][:60]
    return f"{1000 * json.loads(ended.stdout)['epoch']:.3g}"


def measure_speed(device, small):
    """CartPole, every trajectory 200 steps; ms an epoch of all runs, recorded with a compiled step, and not."""
    table, seconds = Table(), 0.0 if small else 1.5
    for algo in ("maml", "fomaml"):
        for size in SIZES[:2] if small else SIZES:
            c = replace(BASE, algo=algo, S=size, **(TINY if small else {}))
            recorded, ready, memory = time_on_device(c, device, True, seconds)
            one_by_one, *_ = time_on_device(c, device, False, seconds)
            table.add(algorithm=algo, runs=f"{size}", recorded=f"{recorded:.3g}", **{
                "one by one": f"{one_by_one:.3g}", "s until recorded": f"{ready:.1f}", "memory, MB": f"{memory:.0f}",
            })  # fmt: skip


def measure_jax(device, small):
    """The same by JAX's plain design (bench/jax_rival.py), jitted as a whole, float32 products."""
    table = Table()
    for algo in ("maml", "fomaml"):
        for size in SIZES[:1] if small else (SIZES[0], SIZES[-1]):
            table.add(algorithm=algo, runs=f"{size}", ms=time_jax(replace(BASE, algo=algo, S=size)) or "not installed")


def measure_cores(device, small):
    """ms an epoch of MAML on the CPU, the runs shared out over a process on each core, and on the device."""
    table, seconds, faster = Table(), 0.0 if small else 1.5, []
    for size in SIZES[:2] if small else SIZES:
        c = replace(BASE, S=size, **(TINY if small else {}))
        count = min(os.cpu_count(), size)
        share = replace(c, S=math.ceil(size / count))
        cores = 1000 * max(row["epoch"] for row in in_fresh_processes(measure, *[(share, "cpu", seconds)] * count))
        recorded, *_ = time_on_device(c, device, True, seconds)
        table.add(runs=f"{size}", **{f"{os.cpu_count()} cores": f"{cores:.3g}", "device": f"{recorded:.3g}"})
        faster += [size] if recorded < cores else []
    print(f"\nThe device is faster {f'from {faster[0]} runs on' if faster else 'at none of these sizes'}.")


def time_command(device, small):
    """`run.py --env cartpole --algo maml --seed 1-64 --epochs 400`, report included, twice: the second time with what
    torch compiled in the first."""
    for turn in ("first", "second"):
        with tempfile.TemporaryDirectory() as out:
            words = ["--env", "cartpole", "--algo", "maml", "--device", device, "--out", out, "--quiet"]
            words += ["--seed", "1-2", "--epochs", "2", "--horizon", "5"] if small else ["--seed", "1-64"]
            words += [] if small else ["--epochs", "400"]
            start = time.perf_counter()
            subprocess.run([sys.executable, str(REPOSITORY / "run.py"), *words], check=True)
            print(f"{turn} time: {time.perf_counter() - start:.1f} s\n", flush=True)


PARTS = {  # name: (function, seconds that it may take)
    "Tests that need CUDA": (run_tests, 120),
    "Float64 on the device and on the CPU": (check_agreement, 60),
    "A checkpoint moved there and back": (check_checkpoints, 30),
    "LunarLander sampled on the CPU": (check_lunarlander, 30),
    "The same run again": (check_repeats, 60),
    "Speed and memory": (measure_speed, 110),
    "A whole command": (time_command, 90),
    "All cores": (measure_cores, 60),
    "JAX": (measure_jax, 130),
}
LIMIT = 500  # s after which no further part begins


# --- the command ---


def describe(device):
    if device != "cuda":
        return f"torch {torch.__version__}, the CPU in place of a GPU, {os.cpu_count()} cores"
    gpu = torch.cuda.get_device_properties(0)
    return (
        f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"{os.cpu_count()} CPU cores"
    )


def run_part(name, words, seconds):
    """What a part printed, and why it failed, if it did."""
    command = [sys.executable, str(Path(__file__).resolve()), *words, "--part", name]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = subprocess.Popen(command, stdout=out, stderr=error, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = None
        out.seek(0), error.seek(0)
        why = f"not done after {seconds:.0f} s" if code is None else error.read()[-1500:]
        return out.read(), why if code != 0 else ""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = REPOSITORY / "results/benchmark/gpu.md"
    parser.add_argument("--out", type=Path, default=default, help="(default %(default)s)")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu tries this script without a GPU
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, help="print this part alone")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py: no CUDA device is available to torch, so there is nothing to check")
    if args.part:
        return PARTS[args.part][0](args.device, args.small)
    start, failed, text = time.monotonic(), [], []
    words = ["--device", args.device, *(["--small"] if args.small else [])]
    for name, (part, seconds) in PARTS.items():
        begun = time.monotonic()
        left = min(seconds, LIMIT - (begun - start))
        print(f"{name} ..", flush=True)
        body, why = run_part(name, words, left) if left > 0 else ("left out: out of time", "")
        if why:
            failed.append(name)
            body += f"\n\n**FAILED**\n\n```\n{why}\n```"
        text += [f"## {name}", f"{' '.join(part.__doc__.split())} {time.monotonic() - begun:.0f} s.", body.strip()]
        verdict = f"Failed: {', '.join(failed)}." if failed else "No check failed."
        head = f"{time.monotonic() - start:.0f} s in all. {verdict}"
        args.out.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_atomically(args.out, "\n\n".join(["# GPU", describe(args.device), head, *text]) + "\n")
    print(head, f"wrote {args.out}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
