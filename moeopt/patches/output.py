"""Patches of standard output, warnings and loggers."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator

from moeopt.patches.patch import Mine, Patch, Undo
from moeopt.value_types import PyObject

_LOUD = (
    "torch.onnx",
    "torch.onnx._internal.exporter",
    "torch.fx.experimental.symbolic_shapes",
    "torch.fx.experimental.proxy_tensor",
    "torch.export",
    "onnxscript",
    "onnx_ir",
    "transformers",
)
_hushed, _unwarned = Mine(), Mine()
_NOTHING = "(?!)"
"""A pattern that no text matches."""


class _IfInside:
    """Stands for a pattern of ``warnings.filters``: matches any text in threads that hold a value of ``threads``."""

    def __init__(self, threads: Mine) -> None:
        self._threads = threads

    def match(self, text: str) -> bool:
        return self._threads.top is not None


class _Output:
    """Standard output, without what threads inside ``quiet`` write."""

    def __init__(self, stream: PyObject) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return len(text) if _hushed.top is not None else self._stream.write(text)

    def __getattr__(self, name: str) -> PyObject:
        return getattr(self._stream, name)


def _set_levels(names: tuple[str, ...], level: int) -> Undo:
    held = [(logger, logger.level) for logger in map(logging.getLogger, names)]
    for logger, _ in held:
        logger.setLevel(level)

    def undo() -> None:
        for logger, before in held:
            if logger.level == level:  # else somebody has set another level meanwhile
                logger.setLevel(before)

    return undo


no_fake_tensor_errors = Patch(lambda: _set_levels(("torch._subclasses.fake_tensor",), logging.CRITICAL + 1))
"""A size that does not fit is expected where shapes are probed; PyTorch would log each as an error."""


def _hush() -> Undo:
    levels_back = _set_levels(_LOUD, logging.ERROR)
    stream, output = sys.stdout, _Output(sys.stdout)
    sys.stdout = output
    filter_back = _ignore(_hushed)

    def undo() -> None:
        levels_back()
        if sys.stdout is output:
            sys.stdout = stream
        filter_back()

    return undo


def _ignore(threads: Mine) -> Undo:
    entry: PyObject = ("ignore", _IfInside(threads), Warning, None, 0)
    warnings.filters.insert(0, entry)  # type: ignore[attr-defined]
    _filters_changed()

    def undo() -> None:
        with contextlib.suppress(ValueError):  # gone with a ``catch_warnings`` that was left meanwhile
            warnings.filters.remove(entry)  # type: ignore[attr-defined]
        _filters_changed()

    return undo


def _filters_changed() -> None:
    """Python keeps what was decided for each line until the filters are said to have changed."""
    warnings.filterwarnings("ignore", message=_NOTHING)  # the public way to say so
    with contextlib.suppress(ValueError):  # gone with another thread's, or a ``catch_warnings`` that was left meanwhile
        warnings.filters.remove(("ignore", re.compile(_NOTHING, re.I), Warning, None, 0))  # type: ignore[attr-defined]


_quieted, _ignoring = Patch(_hush), Patch(lambda: _ignore(_unwarned))


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Ignore the caller's warnings: ``warnings.catch_warnings`` leaves filters behind where threads overlap."""
    with _ignoring(), _unwarned.holding(True):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters print progress, log what is not installed and warn about their own code; none of it is the user's."""
    with _quieted(), _hushed.holding(True):
        yield
