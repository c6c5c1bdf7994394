"""Bundles whose JSON has one value replaced by a wrong one: every leaf, a dozen values.

``python -m tests.hostile.mutants`` reads ``[[base, folder, most]]`` from stdin, and loads, verifies and describes each
mutant in one child process; a JSON line for each says what was wrong, "" for a mutant that was refused or is harmless.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import moeopt
import moeopt.api
from moeopt.cli.about import bundle_facts, print_facts
from moeopt.errors import MoeoptError
from tests.hostile.edits import GOOD, reseal

WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 1 << 62, 1 << 90, 1.5, 1e308, "", "\u001b[2Jx\u0000", "x" * 5000, [], {}, [[[]]],
)  # fmt: skip
SAME_PLACE = 2
"""How many entries of one list are mutated alike: the hundredth node of a graph is read as the first."""
SECONDS = 60
Path_ = tuple[Any, ...]


def leaves(data: Any, path: Path_ = ()) -> Iterator[Path_]:
    items: Any = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    found = False
    for key, value in items:
        found = True
        if not (isinstance(key, int) and key >= SAME_PLACE):
            yield from leaves(value, (*path, key))
    if not found and path:
        yield path


def mutants(good: Path) -> Iterator[tuple[str, Path_, Any]]:
    """(file, path, value) of each."""
    for file in sorted(good.glob("*.json")):
        for path in leaves(json.loads(file.read_text())):
            for value in WRONG:
                yield file.name, path, value


def mutate(bundle: Path, file: str, path: Path_, value: Any) -> None:
    data = json.loads((bundle / file).read_text())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = copy.deepcopy(value)
    (bundle / file).write_text(json.dumps(data))
    if file != "moeopt.json":
        reseal(bundle)


def tried(bundle: Path) -> str:
    """What is wrong with the way in which a mutant is met; "" if nothing is."""
    x = torch.linspace(-1, 1, 80).reshape(2, 5, 8)

    def call() -> None:
        moeopt.load(bundle)(x, torch.ones(2, 5))

    for what in (call, lambda: moeopt.verify(bundle), lambda: print_facts(bundle_facts(bundle))):
        signal.alarm(SECONDS)
        try:
            what()
        except MoeoptError as err:
            if "\x1b" in str(err):
                return f"escapes: {err}"
        except BaseException:
            return traceback.format_exc()[-1500:]
        signal.alarm(0)
    return ""


def attack(base: str, folder: str, most: int, write: int) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for good: what info prints is not looked at
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (4 << 30),) * 2)
    good = GOOD / base
    for n, (file, path, value) in enumerate(mutants(good)):
        if n >= most:
            break
        bundle = shutil.copytree(good, Path(folder) / "mutant")
        mutate(bundle, file, path, value)
        line = {"file": file, "path": list(path), "value": repr(value)[:40], "ended": tried(bundle)}
        os.write(write, (json.dumps(line) + "\n").encode())
        shutil.rmtree(bundle)


def main() -> None:
    warnings.filterwarnings("ignore")
    for base, folder, *most in json.load(sys.stdin):
        child = os.fork()
        if child == 0:
            attack(base, folder, int(most[0]) if most else 1 << 30, 1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status:
            print(json.dumps({"file": base, "ended": f"the process ended with status {status}"}), flush=True)


if __name__ == "__main__":
    main()
