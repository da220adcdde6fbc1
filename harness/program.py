"""What comes before numpy and torch are imported, which takes seconds and reads what is set here."""

import os
import signal
import sys

# Read when numpy loads. Rollouts are small products, the cores have runs or workers of their own,
# and --threads is torch's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Read by torch's MKL: its products have the same bits wherever in memory, so in whatever batch, a
# matrix is.
os.environ.setdefault("MKL_CBWR", "AUTO")


def prepare():
    """Make standard streams that can be written to, and Ctrl-C while modules are imported one line."""
    # A closed stream's number would be a file's, into which a library then writes its warnings.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, open to the end
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal or a log file may have no δ
    sys.excepthook = show


def show(kind, error, place):
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, error, place)
    print("run.py: stopped before it began", file=sys.stderr)
    raise SystemExit(128 + signal.SIGINT)
