"""Run what a page of the documentation shows, in the order in which it stands there.

    ```python                run, each page in one namespace
    ```python title="x.py"   written to x.py
    ```console               lines that begin with $ are run; those below must be printed, "..." left aside
    ```sh                    installation: `make test-wheel` does it
    ```js title="x.mjs"      run by a test of its page, where Node.js has the package
    ```text                  a sample for the reader

Numbers are not compared: timings, versions and rounding differ between machines.
"""

import contextlib
import inspect
import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

FENCE = re.compile(r"^```(\w+)(?: title=\"([\w.]+)\")?\n(.*?)^```", re.M | re.S)
KINDS = {"python", "console", "sh", "js", "text"}
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)*(?:e[+-]?[0-9]+)?")


def fences(page: Path) -> list[tuple[str, str, str]]:
    """(language, title, text) of each block of code."""
    return FENCE.findall(page.read_text())


def run_page(page: Path, folder: Path) -> int:
    """Run a page's code in ``folder``, the working directory; returns how many blocks were run."""
    names: dict[str, Any] = {}
    ran = 0
    for language, title, text in fences(page):
        if title:
            (folder / title).write_text(text)
        elif language == "python":
            run_python(text, names, page.name)
        elif language == "console":
            run_console(text, page.name)
        else:
            continue
        ran += 1
    return ran


def run_python(text: str, names: dict[str, Any], where: str) -> None:
    """Run a block, and each test function that it defines."""
    from moeopt.testing import assert_equivalent

    before = set(names)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(text, where, "exec"), names)
        for name in set(names) - before:
            if name.startswith("test_"):
                wanted = inspect.signature(names[name]).parameters
                names[name](**{"assert_equivalent": assert_equivalent} if "assert_equivalent" in wanted else {})


def run_console(text: str, where: str) -> None:
    """Run each command in this process, and find the lines shown below it in what it printed, in order."""
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, *shown = part.rstrip().splitlines()
        code, printed = run_command(command.split())
        assert code == 0, f"{where}: {command} ended with {code}:\n{printed}"
        lines = iter(printed.splitlines())
        for line in shown:
            if line.strip() == "...":
                continue
            assert any(_alike(line, other) for other in lines), f"{where}: {command} did not print {line!r}:\n{printed}"


def run_command(words: list[str]) -> tuple[int, str]:
    out = io.StringIO()
    program, *args = words
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        if program == "moeopt":
            from moeopt.cli import main

            with pytest.raises(SystemExit) as stop:
                main(args)
            return int(stop.value.code or 0), out.getvalue()
        if program == "pytest":
            plugins = ["-p", "moeopt.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", "."]
            return int(pytest.main([*plugins, *args])), out.getvalue()
        assert program == "cp", f"the documentation shows {program}: teach tests/doc_snippets.py to run it"
        shutil.copy(args[0], args[1])
        return 0, ""


def _alike(shown: str, printed: str) -> bool:
    """Equal but for numbers and spacing; "..." stands for any text within a line."""
    want, have = (" ".join(_NUMBER.sub("#", line).split()) for line in (shown, printed))
    return re.match(".*".join(map(re.escape, want.split("..."))) + r"( \[ *#%\])?$", have) is not None
