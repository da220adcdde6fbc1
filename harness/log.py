"""The rows of log.csv and eval.csv on their way to the disk."""

import time
from collections import defaultdict

import checkpoints

SECONDS = 1  # between two writes: opening the files of 256 runs takes longer than their epoch


class Rows:
    """Keeps the rows of runs and appends them to their files when SECONDS have passed, when asked, and at the end.

    What a kill -9 loses is in the checkpoint, or is trained again, and --resume writes the files anew.
    """

    def __init__(self, writes=True):
        self.writes, self.kept, self.written = writes, defaultdict(list), time.monotonic()

    def add(self, run, table, rows):
        run.state[table] += rows
        self.kept[run, table] += rows
        if time.monotonic() - self.written > SECONDS:
            self.append()

    def append(self):
        kept, self.kept = self.kept, defaultdict(list)
        for (run, table), rows in kept.items():
            if self.writes:
                checkpoints.append_rows(run, table, rows)
        self.written = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.append()
