"""What is done before numpy is imported: here it is a module that looks at what was done."""

import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest

from harness.text import quoted
from tests.commands import REPOSITORY

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="POSIX signals and shells")


def run_with(numpy, tmp_path, redirected=""):
    """`python run.py` by a shell, with this code in numpy's place."""
    (tmp_path / "numpy.py").write_text(numpy)
    return subprocess.run(
        ["sh", "-c", f'exec "{sys.executable}" run.py {redirected}'],
        cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )  # fmt: skip


def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path):
    done = run_with("import os, signal; os.kill(os.getpid(), signal.SIGINT)", tmp_path)
    assert (done.returncode, done.stderr) == (130, "run.py: stopped before it began\n")


def test_another_error_while_modules_are_imported_has_its_traceback(tmp_path):
    done = run_with("raise ImportError('no numpy')", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_written_to_and_no_file_gets_their_numbers(tmp_path, closed):
    look = "import os, sys; print('δ'); print('δ', file=sys.stderr); sys.exit(os.open('.', 0) <= 2)"
    assert run_with(look, tmp_path, closed).returncode == 0


@pytest.mark.parametrize("word", ["a b", "it's δ", "two\nlines", "tab\t'", "not \udcff UTF-8", "\x1b[31m"])
def test_a_word_of_a_command_that_is_shown_is_that_word_to_a_shell(word):
    shown = quoted(word)
    assert shown.isprintable()
    done = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True)
    assert done.stdout == os.fsencode(word)
