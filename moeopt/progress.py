"""What is being done, seen while it is done: a bar on a terminal or in a notebook, and the logger ``moeopt``.

``progress=None`` shows the bar where somebody looks (never in CI), ``False`` never, ``True`` always, and a callable
gets each line instead. The logger has each line too, at INFO.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterator

from moeopt.options import in_ci
from moeopt.value_types import PyObject

LOG = logging.getLogger("moeopt")
_BLOCK = re.compile(r"block (\d+) of (\d+)")
_by_itself = True


@contextlib.contextmanager
def shown(progress: PyObject) -> Iterator[Callable[[str], None]]:
    """What takes each line of progress while the work lasts; ``progress`` is the option's value."""
    if callable(progress):
        yield _logged(progress)
        return
    wanted = progress is True or (progress is None and _by_itself and somebody_looks())
    with _bar() if wanted else contextlib.nullcontext(_nothing) as show:
        yield _logged(show)


@contextlib.contextmanager
def never_by_itself() -> Iterator[None]:
    """While open, ``progress=None`` shows nothing: a command was told to be quiet."""
    global _by_itself
    before, _by_itself = _by_itself, False
    try:
        yield
    finally:
        _by_itself = before


def somebody_looks() -> bool:
    """Whether standard error is a terminal, or this is a notebook; False in CI."""
    return not in_ci() and (_notebook() or bool(getattr(sys.stderr, "isatty", bool)()))


def _notebook() -> bool:
    shell = sys.modules.get("IPython")
    found = None if shell is None else shell.get_ipython()
    return found is not None and type(found).__name__ == "ZMQInteractiveShell"


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str], None]]:
    """A line that says what is done and for how long, with a bar while blocks are counted; gone at the end."""
    from rich.console import Console
    from rich.errors import LiveError
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("moeopt: {task.description}", markup=False)
    columns = (SpinnerColumn(), text, BarColumn(bar_width=20), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    try:
        bar.start()
    except LiveError:  # the caller shows a bar of their own
        yield _nothing
        return
    task = bar.add_task("", total=None)

    def show(line: str) -> None:
        found = _BLOCK.match(line)
        if found is None:
            bar.update(task, description=line, total=None)
        else:
            bar.update(task, description=line, completed=int(found[1]) - 1, total=int(found[2]))

    try:
        yield show
    finally:
        bar.stop()


def _logged(show: Callable[[str], None]) -> Callable[[str], None]:
    def say(line: str) -> None:
        LOG.info(line)
        show(line)

    return say


def _nothing(line: str) -> None:
    del line
