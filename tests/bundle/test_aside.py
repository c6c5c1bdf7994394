"""What a killed save leaves beside a bundle is cleared by the next one; what a living one writes stays."""

import os
import signal
import subprocess
import sys

import pytest

from moeopt.bundle import aside
from tests.backends.torch.toys import save

HOLD = """
import sys, time
from pathlib import Path
from moeopt.bundle import aside
with aside.folder(Path(sys.argv[1])) as made:
    (made / "half").write_text("x")
    print(made, flush=True)
    time.sleep(600)
"""


def left(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.fixture
def other(tmp_path):
    """A process that is in the middle of a save."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "b")], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_killed_save_is_cleared_by_the_next(tmp_path, other):
    assert len(left(tmp_path)) == 1
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert len(left(tmp_path)) == 1
    save(tmp_path / "b")
    assert left(tmp_path) == []


def test_a_living_save_is_left_alone(tmp_path, other):
    before = left(tmp_path)
    save(tmp_path / "b")
    assert left(tmp_path) == before


def test_only_its_own_names_are_cleared(tmp_path):
    for name in (".b.abcd1234", ".b.old.abcd1234", ".c.abcd1234", ".b.notes", ".b.ABCD1234"):
        (tmp_path / name).mkdir()
    (tmp_path / ".b.file1234").write_text("mine")
    (tmp_path / ".b.link1234").symlink_to(tmp_path / ".c.abcd1234")
    save(tmp_path / "b")
    assert left(tmp_path) == [".b.ABCD1234", ".b.file1234", ".b.link1234", ".b.notes", ".c.abcd1234"]


def test_nothing_is_left_by_a_save_that_fails(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), aside.folder(tmp_path / "b"):
        raise RuntimeError("stop")
    assert left(tmp_path) == []
