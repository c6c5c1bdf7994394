"""A forked program is a program: its words, its environment, its folder, its ways to end."""

import os
import signal
import subprocess
import sys

import pytest

from tests import children


def test_what_a_program_is_given_and_what_it_says(tmp_path):
    code = "import os, sys; print(sys.argv, os.getcwd(), os.environ['MINE']); print(__name__, file=sys.stderr)"
    done = children.run([sys.executable, "-c", code, "a", "b"], cwd=tmp_path, env={**os.environ, "MINE": "x"})
    assert (done.returncode, done.stderr) == (0, "__main__\n")
    assert done.stdout == f"['-c', 'a', 'b'] {tmp_path} x\n"
    assert "MINE" not in children.run([sys.executable, "-c", "import os; print(list(os.environ))"]).stdout


def test_a_module_and_a_file(tmp_path):
    (tmp_path / "other.py").write_text("WORD = 'found'")
    (tmp_path / "mine.py").write_text("import sys, other; print(other.WORD, sys.argv[1:], __name__)")
    said = "found ['x'] __main__\n"
    assert children.run([sys.executable, "-m", "mine", "x"], cwd=tmp_path).stdout == said
    assert children.run([sys.executable, tmp_path / "mine.py", "x"]).stdout == said


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('why')", 1, "why\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import time; time.sleep(50)", -signal.SIGALRM, ""),
    ],
)
def test_how_a_program_ends(code, status, said):
    done = children.run([sys.executable, "-c", code], timeout=1)
    assert (done.returncode, done.stderr) == (status, said)


def test_an_error_is_told_and_the_next_program_knows_nothing_of_it():
    with pytest.raises(subprocess.CalledProcessError) as failed:
        children.run([sys.executable, "-c", "import torch; torch.made_here = 1; raise ValueError('no')"], check=True)
    assert failed.value.stderr.splitlines()[-1] == "ValueError: no"
    assert children.run([sys.executable, "-c", "import torch; print(hasattr(torch, 'made_here'))"]).stdout == "False\n"


def test_what_is_registered_for_the_end_runs():
    code = "import atexit; atexit.register(print, 'the end')"
    assert children.run([sys.executable, "-c", code]).stdout == "the end\n"
