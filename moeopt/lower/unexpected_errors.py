"""What a library raises where nobody expects it, as a reason for the model's owner.

Exporters and runtimes raise errors of many classes, from lines that the user never wrote.
:func:`unexpected_errors_as` turns each into one sentence: what was being done, what the library said, which line of the
model it speaks of, the way out.
"""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from collections.abc import Iterator

from moeopt.errors import MoeoptError
from moeopt.pipeline.still_saveable import still_saveable

_ASKS_VALUES = ("Cannot cast FakeTensor", "data-dependent expression")
_LINE = re.compile(r'File "([^"]+)", line (\d+)(?:, in (\w+))?')
_NODE = re.compile(r"While executing %\w+ : .*?call_(?:function|method|module)\[target=([^\]]+)\]")


@contextlib.contextmanager
def unexpected_errors_as(doing: str, way_out: str, error: type[MoeoptError]) -> Iterator[None]:
    """While open, what is raised and is none of moeopt's errors becomes an ``error``.

    A full disk and a lack of memory stay what they are: their owners handle them by class.

    Args:
        doing: who does what, like "torch.export, which traces the model,".
        way_out: what the user may do, a clause.
        error: the class to raise.
    """
    try:
        yield
    except (MoeoptError, OSError, MemoryError):
        raise
    except Exception as err:
        if any(text in format_error(err) for text in _ASKS_VALUES):
            way_out = f"its Python there depends on the values of tensors, which no graph repeats. {still_saveable()}"
        raise error(f"{doing} stops at {format_error(err)}{format_location(err)}; {way_out}") from err


def format_error(err: BaseException) -> str:
    """The class and the first line of what came first."""
    while err.__cause__ is not None:
        err = err.__cause__
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {lines[0][:300]}" if lines else type(err).__name__


def format_location(err: BaseException) -> str:
    """`` (op, file:line, in f)`` of the model's code that an error speaks of or was raised in; or ""."""
    found: list[str] = []
    link: BaseException | None = err
    while link is not None:
        text = str(link)
        if op := _NODE.search(text):
            found.append(op[1])
        lines = [(m[1], int(m[2]), m[3]) for m in _LINE.finditer(text)]
        lines += [(f.filename, f.lineno or 0, f.name) for f in traceback.extract_tb(link.__traceback__)]
        if own := [line for line in lines if not is_library(line[0])]:
            file, number, name = own[-1]
            found.append(f"{file}:{number}" + (f", in {name}" if name else ""))
        link = link.__cause__
    return f" ({', '.join(dict.fromkeys(found))})" if found else ""


def is_library(path: str) -> bool:
    """Whether a file is an installed package's, or ours, and no model's."""
    return "site-packages" in path or path.startswith("<") or f"{os.sep}moeopt{os.sep}" in path
