"""Tries to break run.py, each way a row of KINDS: kills training at random moments, runs it long, gives it random
command lines, compares the bits of a run alone with those of the same run in a sweep, and damages files.

    python bench/torture.py --kind truncations files --limit 500

Needs Linux. The suite does a little of it; this takes from minutes to an hour.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import envs
import run
from bench import damage, fuzz
from bench.compare import differences
from harness.settings import algorithms

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = ["--tasks", "2", "--trajectories", "3", "--hidden", "8", "--eval-every", "4", "--quiet"]

# name: (what comes before the command's words, the words)
CASES = {
    "cartpole": ([], ["--env", "cartpole", "--algo", "directed-maml", "--horizon", "30", "--epochs", "200"]),
    "sweep": ([], [
        *("--env", "cartpole", "--algo", "fomaml", "directed-meta-sgd", "--seed", "1", "2", "3", "--delta", "0.001"),
        *("0.005", "--optimizer", "adam", "--horizon", "20", "--epochs", "60"),
    ]),
    "lunarlander": ([], [
        *("--env", "lunarlander", "--algo", "directed-fomaml", "--workers", "2", "--horizon", "25", "--epochs", "120"),
    ]),
    "ranks": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable], [
        *("--env", "cartpole", "--algo", "directed-maml", "--seed", "1", "2", "--horizon", "20", "--epochs", "120"),
    ]),
}  # fmt: skip


def command(case, out, checkpoint_seconds):
    """The case's command. Checkpoints come much more often than by default, so that kills hit their writing."""
    before, words = CASES[case]
    words = [*words, *SMALL, "--out", str(out), "--resume"]
    no_figures = "import sys; sys.modules['matplotlib'] = None"
    code = f"{no_figures}; import run; run.CHECKPOINT_SECONDS = {checkpoint_seconds}; run.main({words!r})"
    return [sys.executable, *before, "-c", code]


def start(case, out, checkpoint_seconds=0.0):
    """The case's process, in a session of its own, so that orphans are found."""
    return subprocess.Popen(
        command(case, out, checkpoint_seconds), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1", "TORTURED": str(out)},
    )  # fmt: skip


def finish(case, out, **options):
    process = start(case, out, **options)
    error = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"{case}: exit code {process.returncode}\n{error}")


def members(session, out=None):
    """Processes alive in a session, or (torchrun's ranks have their own) tortured in the folder `out`: list of ids."""
    alive = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, _, _, owner = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()[:4]
            variables = Path(f"/proc/{name}/environ").read_bytes().split(b"\0") if out is not None else []
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended, or another user's
            continue
        if state != "Z" and (int(owner) == session or f"TORTURED={out}".encode() in variables):
            alive.append(int(name))
    return alive


def wait_for_the_end(session, out=None, patience=60):
    """Raises SystemExit where a process of the session still lives after so many seconds."""
    deadline = time.time() + patience
    while orphans := members(session, out):
        if time.time() > deadline:
            raise SystemExit(f"orphans after {patience} s: {orphans}")
        time.sleep(0.05)


def kill(process, out):
    """kill -9 the main process alone; its workers must end by themselves."""
    process.kill()
    process.communicate()
    wait_for_the_end(process.pid, out)


def progress(out):
    """What the logs of all runs hold, in bytes; one may be replaced meanwhile."""
    sizes = []
    for path in out.rglob("log.csv"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return sum(sizes)


def torture(case, out, kills, rng, checkpoint_seconds=0.0):
    """Start the case and kill it, `kills` times, each a random while after it began to log anew, or before; then let it
    finish. Returns how many kills hit it alive, and how many of them hit the writing of checkpoints."""
    hit = {"kills": 0, "while checkpoints were written": 0}
    for _ in range(kills):
        process = start(case, out, checkpoint_seconds)
        before = progress(out)
        early = rng.random() < 0.1  # also before any training
        deadline = time.time() + (rng.uniform(0, 6) if early else 300)
        while process.poll() is None and time.time() < deadline and (early or progress(out) <= before):
            time.sleep(0.001)
        time.sleep(0 if early else rng.expovariate(1 / 0.05))
        if process.poll() is not None and process.returncode != 0:
            raise SystemExit(f"{case}: exit code {process.returncode}\n{process.communicate()[1]}")
        hit["kills"] += process.poll() is None
        kill(process, out)
        hit["while checkpoints were written"] += any(out.rglob("checkpoint.pt.tmp"))
    finish(case, out, checkpoint_seconds=checkpoint_seconds)
    return hit


def kills(limit, seed, case):
    """A training of the case that is killed so many times is to equal one that is not."""
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        finish(case, whole, checkpoint_seconds=1e9)
        hit = torture(case, killed, limit, random.Random(seed))
        print(f"{case}:", ", ".join(f"{count} {what}" for what, count in hit.items()), flush=True)
        return hit["kills"], differences(whole, killed)


def status(pid):
    """(resident memory in MB, file descriptors, processes of the session) of a running process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(f"/proc/{pid}/fd")), len(members(pid))


LONG = {  # epochs between lines, words
    "cartpole": (500, ["--env", "cartpole", "--algo", "directed-maml"]),
    "lunarlander": (20, ["--env", "lunarlander", "--algo", "directed-fomaml", "--workers", "2"]),
}


def long(limit, seed, case):
    """So many epochs in one command, and a line on it now and then: speed, memory, descriptors and processes should
    stay as they are."""
    every, words = LONG[case]
    with tempfile.TemporaryDirectory() as out:
        words = [*words, "--horizon", "50", *SMALL, "--eval-every", "100", "--epochs", str(limit), "--out", out]
        process = subprocess.Popen([sys.executable, "run.py", *words], cwd=REPOSITORY, start_new_session=True)
        print(f"{case}: epoch, s per 1000 epochs, MB, file descriptors, processes", flush=True)
        reached, since = 0, None
        while process.poll() is None:
            time.sleep(0.02)
            logs = list(Path(out).rglob("log.csv"))
            lines = logs[0].read_bytes().count(b"\n") - 1 if logs else 0
            if lines >= reached + every:
                speed = 1000 * (time.time() - since) / (lines - reached) if reached else float("nan")
                memory, descriptors, processes = status(process.pid)
                print(f"  {lines}, {speed:.1f}, {memory:.0f}, {descriptors}, {processes}", flush=True)
                reached, since = lines, time.time()
        size = {path.name: path.stat().st_size for path in Path(out).rglob("*.csv")}
        print(f"  bytes: {size}")
        return 1, [f"exit code {process.returncode}"] if process.returncode else []


def random_sizes(rng):
    """A small command of random settings and, above all, of uneven sizes."""
    env, algo = rng.choice(list(envs.ENVS)), rng.choice(algorithms())
    words = ["--env", env, "--algo", algo, "--rl", rng.choice(("pg", "ac")), "--tasks", rng.choice("12357")]
    words += ["--trajectories", rng.choice(("2", "3", "5", "10")), "--horizon", str(rng.randint(3, 60))]
    words += ["--hidden", *rng.choice((["64", "64"], ["20", "12"], ["8", "8"], ["64"], ["5"]))]
    words += rng.choice(([], ["--baseline", "step"], ["--baseline", "linear"], ["--advantages", "raw"]))
    return words + rng.choice(([], ["--estimator", "dice"], ["--optimizer", "adam"]))


def bits(limit, seed):
    """Random commands: what seed 2 writes alone and in a sweep of some seeds is to be equal to the last bit."""
    rng, failures = random.Random(seed), []
    for _ in range(limit):
        words, last = random_sizes(rng), rng.choice("235")
        with tempfile.TemporaryDirectory() as folder:
            for name, seeds in (("alone", "2"), ("sweep", f"1-{last}")):
                out = os.path.join(folder, name)
                run.main([*words, "--seed", seeds, "--epochs", "2", "--workers", "1", "--quiet", "--out", out])
            if differences(Path(folder, "alone"), Path(folder, "sweep"), "seed2"):
                failures.append(f"other bits alone than with seeds 1 to {last}: {' '.join(words)}")
    return limit, failures


# {name: (function of the limit and the seed -> how many it tried, a line for each that failed; the limit by default)}
KINDS = {f"kill-{case}": (partial(kills, case=case), 40) for case in CASES}
KINDS |= {f"long-{case}": (partial(long, case=case), 10 * every) for case, (every, _) in LONG.items()}
KINDS |= {
    "fuzz": (fuzz.lines, 3000),
    "bits": (bits, 3000),
    "truncations": (damage.truncations, 500),
    "operations": (damage.operations, 500),
    "files": (damage.files, 500),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", required=True, choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--limit", type=int, help="of kills, epochs, command lines or damages")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, lines or damages (default 0)")
    args = parser.parse_args()
    found = []
    for kind in args.kind:
        function, limit = KINDS[kind]
        count, failures = function(args.limit or limit, args.seed)
        print(*failures, f"{kind}: {count} tried, {len(failures)} failed", sep="\n", flush=True)
        found += failures
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
