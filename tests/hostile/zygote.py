"""Try bundles, each command in a child of one process that has everything imported; a JSON line for each.

``python -m tests.hostile.zygote`` reads ``[[name, directory, command], ...]`` from stdin. ``code`` is the exit code of
the command, -1 for a traceback, -2 for one that was ended by a signal or its time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

import moeopt
import moeopt.api
from moeopt.cli import main as command
from moeopt.errors import MoeoptError
from tests.hostile.edits import GOOD

MEMORY = 3 << 30
"""Bytes beyond what is mapped already: no bundle here may take more than two."""
SECONDS = 60
CPU_SECONDS = 25


def load(directory: str) -> None:
    """Load it, and call it as it says that it may be called."""
    x = torch.linspace(-1, 1, 80).reshape(2, 5, 8)
    moeopt.load(directory)(x=x, mask=torch.ones(2, 5))


def run(directory: str, what: str) -> int:
    try:
        if what == "load":
            load(directory)
            return 0
        command([what, directory])
    except SystemExit as done:
        return int(done.code or 0)
    except MoeoptError as err:
        print(f"moeopt: {err}", file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return -1
    return 0


def in_a_child(name: str, directory: str, what: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out, said = Path(folder) / "out", Path(folder) / "err"
        child = os.fork()
        if child == 0:
            _become(out, said)
            code = run(directory, what)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code & 0xFF)
        status = _waited(child)
        code = -2 if status is None or os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        texts = [path.read_text(errors="replace") if path.exists() else "" for path in (out, said)]
    ended = "time" if status is None else signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else ""
    code = -1 if code == 255 else code
    return {"name": name, "what": what, "code": code, "ended": ended, "out": texts[0][-2000:], "err": texts[1][-2000:]}


def _become(out: Path, said: Path) -> None:
    for path, descriptor in ((out, 1), (said, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _waited(child: int) -> int | None:
    """How a child ended; None where it had to be ended."""
    start = time.monotonic()
    while time.monotonic() - start < SECONDS:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def import_what_they_import(whats: set[str]) -> None:
    """The modules that a command imports for a sound bundle, so that no child pays for them again."""
    for base, what in itertools.product(("torch", "onnxruntime"), sorted(whats)):
        with tempfile.TemporaryDirectory() as folder:
            said = Path(folder) / "modules"
            child = os.fork()
            if child == 0:
                _become(Path(folder) / "out", Path(folder) / "err")
                run(str(GOOD / base), what)
                said.write_text(json.dumps(list(sys.modules)))
                os._exit(0)
            os.waitpid(child, 0)
            names = json.loads(said.read_text())
        for name in names:
            with contextlib.suppress(Exception):
                __import__(name)


def main() -> None:
    warnings.filterwarnings("ignore")
    jobs = json.load(sys.stdin)
    import_what_they_import({what for _, _, what in jobs})
    for name, directory, what in jobs:
        print(json.dumps(in_a_child(name, directory, what)), flush=True)


if __name__ == "__main__":
    main()
