"""Temporary folders beside a bundle: those of a killed process go, those of living ones stay."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moeopt.bundle.temp_folder import TemporaryFolder, folders_in

ROOT = Path(__file__).parents[2]
CHILD = """
import os, signal, sys
from pathlib import Path
from moeopt.bundle.temp_folder import TemporaryFolder, folders_in

with folders_in(Path(sys.argv[1])):
    held = TemporaryFolder()
    (Path(held.name) / "weights").write_bytes(b"x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is locked there")
def test_what_a_killed_process_left_goes_with_the_next_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert (left / "weights").read_bytes() == b"x"
    (tmp_path / ".moeopt-engine-notes").mkdir()  # of somebody else's making
    with folders_in(tmp_path):
        mine = TemporaryFolder()
        with folders_in(tmp_path):
            other = TemporaryFolder()
        assert not left.exists() and Path(mine.name).is_dir() and Path(other.name).is_dir()
    del other
    assert {path.name for path in tmp_path.iterdir()} == {Path(mine.name).name, ".moeopt-engine-notes"}
    del mine
    assert {path.name for path in tmp_path.iterdir()} == {".moeopt-engine-notes"}
