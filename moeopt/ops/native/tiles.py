"""Whether the tiles of AMX compute what the reference does on this machine: asked in a process of its own, once.

Nobody has run them on every CPU, hypervisor and kernel that says it has them. A fault there ends a child and not the
user's process, which then has the instruction set below, and says why.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

from moeopt.ops.measured import cpu_model
from moeopt.options import cache_directory

SECONDS = 120
"""After which the child is given up."""
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from pathlib import Path
from moeopt.ops.native.library import NoLibrary, checked, opened
try:
    checked(opened(Path(sys.argv[2]), sys.argv[3]))
except NoLibrary as err:
    sys.exit(str(err))
print("good")
"""
_asked: dict[tuple[Path, str], str] = {}


def wrong_in_a_child(path: Path, isa: str) -> str:
    """Why ``isa`` of the library ``path`` is not used here, in words; "" where a child process found nothing wrong.

    What was good is remembered: for this file, CPU, system and torch.
    """
    key = path, isa
    if key not in _asked:
        mark = _mark(path, isa)
        if mark is not None and mark.is_file():
            _asked[key] = ""
        else:
            _asked[key] = ask_child(path, isa)
            if mark is not None and not _asked[key]:
                _leave(mark)
    return _asked[key]


def ask_child(path: Path, isa: str) -> str:
    """As :func:`wrong_in_a_child`, and nothing is remembered."""
    words = [sys.executable, "-c", _CHILD, json.dumps([str(folder) for folder in sys.path]), str(path), isa]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as err:
        return f"it could not be tried in a process of its own ({type(err).__name__})"
    if done.returncode < 0:
        return f"it ends the process that runs it (signal {-done.returncode})"
    if done.returncode == 0 and done.stdout.split()[-1:] == ["good"]:
        return ""
    said = done.stderr.strip().splitlines() or ["it says nothing"]
    return f"in a process of its own, {said[-1][:300]}"


def _mark(path: Path, isa: str) -> Path | None:
    """The empty file that says that a child found nothing wrong; its name has all that this depends on."""
    folder = cache_directory()
    if folder is None:
        return None
    about = path.stat()
    facts = [str(path), about.st_size, about.st_mtime_ns, isa, cpu_model(), platform.release(), torch.__version__]
    return folder / "native" / f"tried-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}"


def _leave(mark: Path) -> None:
    try:
        mark.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        mark.touch()
    except OSError:
        pass  # a folder that cannot be written to: each process asks a child of its own
