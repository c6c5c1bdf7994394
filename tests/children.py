"""Python programs in processes of their own that need not import torch: that takes three seconds of a CPU.

``run([sys.executable, "-c", code])`` gives what ``subprocess.run(capture_output=True, text=True)`` does. The process
is forked from one that has imported torch, moeopt and ONNX Runtime, and has done nothing with them. It is not for tests
of what a program imports, of options of Python, and of how an interpreter ends.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
WATCHES_MEMORY = """
import ctypes, threading, time

LARGE, OWN_MAPPING = 128 << 10, -3  # M_MMAP_THRESHOLD
if hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(OWN_MAPPING, LARGE)

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

peak = [0]

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
"""
"""The beginning of a script: bytes that are its process's own, and their peak while ``watch`` runs in a thread.

glibc lets what has a mapping of its own, and goes back to the system when it is freed, grow to 32 MB as a process frees
some: smaller arrays stay in the heap then, up to 90 MB of them here, as the order of threads has it. At a fixed size
what is counted is what is held.
"""


def run(words, *, cwd=None, env=None, timeout=300, check=False) -> subprocess.CompletedProcess:
    """Run ``python -c code``, ``python -m module`` or ``python file.py``, with its words.

    Args:
        words: the first one is the interpreter, which has to be this one.
        timeout: seconds after which the process is ended by SIGALRM.
    """
    assert words[0] == sys.executable
    with tempfile.TemporaryDirectory() as folder:
        out, said = Path(folder) / "out", Path(folder) / "err"
        job = {
            "words": [str(word) for word in words[1:]],
            "cwd": str(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
            "timeout": timeout,
            "out": str(out),
            "err": str(said),
        }
        parent = _parent()
        parent.stdin.write(json.dumps(job) + "\n")
        parent.stdin.flush()
        done = subprocess.CompletedProcess(words, int(parent.stdout.readline()), out.read_text(), said.read_text())
    if check and done.returncode:
        raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
    return done


@functools.cache
def _parent() -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.children"]
    started = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(started.communicate)  # its input ends, and so does it
    return started


def _become(job) -> None:
    os.setsid()
    for path, descriptor in ((os.devnull, 0), (job["out"], 1), (job["err"], 2)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    signal.alarm(job["timeout"])


def _run(words) -> None:
    first, *rest = words
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def _code_of(words) -> int:
    try:
        _run(words)
    except SystemExit as done:
        if done.code is None or isinstance(done.code, int):
            return done.code or 0
        print(done.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _in_a_child(job) -> int:
    child = os.fork()
    if child == 0:
        _become(job)
        code = _code_of(job["words"])
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    for name in ("torch", "onnxruntime", "moeopt.api", "moeopt.cli.commands"):
        with contextlib.suppress(ImportError):
            __import__(name)
    for line in sys.stdin:
        print(_in_a_child(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
