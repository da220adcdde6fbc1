"""Some of bench/torture.py: random command lines, and bits. tests/test_checkpoints.py kills training."""

from pathlib import Path

import run
from bench import fuzz
from harness.settings import ALL_SETTINGS


def test_a_traceback_a_second_line_and_a_refused_right_line_are_found():
    assert fuzz.wrong_with(0, "", "", right=True) == ""
    assert fuzz.wrong_with(2, "run.py: no\n", "", right=False) == ""
    assert fuzz.wrong_with(1, "run.py: seed 1: a loss is not finite\n" * 2, "", right=True) == ""
    for outcome in (
        (0, "", "Traceback", False),
        (0, "UserWarning: ..\n", "", False),
        (2, "run.py: no\nrun.py: no\n", "", False),
        (2, "", "", False),
        (3, "run.py: no\n", "", False),
        (2, "run.py: no\n", "", True),
    ):
        assert fuzz.wrong_with(*outcome)


def test_a_usage_error_that_changes_files_is_found(monkeypatch):
    def main(argv):
        with run.one_clear_line():
            Path(argv[argv.index("--out") + 1]).mkdir()
            raise run.RunError("no", 2)

    monkeypatch.setattr(run, "main", main)
    findings = fuzz.fuzz(count=5, seed=0).findings
    assert len(findings) == 5 and all(finding.startswith("a usage error changed files") for finding in findings)


def test_processes_of_several_threads_train_networks_large_enough_to_use_them(tmp_path, start):
    words = ["--env", "point", "--algo", "maml", "fomaml", "--hidden", "200", "200", "--threads", "2", "--workers", "2"]
    words += [word for name, value in fuzz.SMALL.items() if name not in ("hidden", "workers")
              for word in (ALL_SETTINGS[name].flag, value)]  # fmt: skip
    assert start(*words, out=tmp_path).wait() == (0, [])
