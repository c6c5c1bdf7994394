"""The Python functions that run in a block's forward, and the names in their bytecode: all that a forward can read.

A few runs under a profile hook give the code objects; their bytecode gives the names of attributes, globals and string
constants. A forward reads state through such a name only (``moeopt.rewrite.walk`` follows the names), so a field of a
configuration that no executed code names cannot change the result, and is not watched.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from moeopt.capture.held_contents import foreign
from moeopt.patches import no_collections
from moeopt.rewrite.asked_outside import AskedOutside
from moeopt.rewrite.bytecode import digest, names_in
from moeopt.value_types import FxArg, PyObject

_CALLS = {nn.Module._wrapped_call_impl.__code__, nn.Module._call_impl.__code__}


@dataclass(frozen=True)
class ExecutedCode:
    """The names and constants in the code that ran.

    Attributes:
        names: of attributes, methods, globals, and short strings.
        codes: digests of the code objects.
        globals: (name of the module, globals that are read there).
        imports: (importing module, level, imported module) of import statements inside functions.
        computes_names: whether attributes are read whose names are computed.
        numbers: the integer constants.
        sequences: tuples of two or more integer constants.
        reads: (name of the holder, attribute), see :class:`moeopt.rewrite.bytecode.CodeNames`.
        variables: variables of the process that are looked up.
        outside: other reads from outside the process (clocks, files), with the line.
        threads: where work is given to another thread or awaited, with the line.
    """

    names: frozenset[str] = frozenset()
    codes: frozenset[str] = frozenset()
    globals: tuple[tuple[str, tuple[str, ...]], ...] = ()
    imports: tuple[tuple[str, int, str], ...] = ()
    computes_names: bool = False
    numbers: frozenset[int] = frozenset()
    sequences: frozenset[tuple[int, ...]] = frozenset()
    reads: frozenset[tuple[str, str]] = frozenset()
    variables: frozenset[str] = frozenset()
    outside: tuple[str, ...] = ()
    threads: tuple[str, ...] = ()


class CodeObserver:
    """A profile hook that collects the code that runs, except inside submodules that the rewrite keeps and calls.

    Attributes:
        called: ids of the modules that were called.
    """

    def __init__(self, kept: set[int]) -> None:
        self._kept = kept
        self._kept_frame: types.FrameType | None = None
        self._codes: dict[types.CodeType, dict[str, Any]] = {}
        self.called: set[int] = set()
        self._outside = AskedOutside()

    def __call__(self, frame: PyObject, event: str, arg: FxArg) -> None:
        """The profile hook."""
        if event == "return" and frame is self._kept_frame:
            self._kept_frame = None
        if event == "c_call" and self._kept_frame is None:
            self._outside.builtin(frame, arg)
        if event != "call":
            return
        code = frame.f_code
        if code in _CALLS:
            module = id(frame.f_locals.get("self"))
            self.called.add(module)
            if self._kept_frame is None and module in self._kept:
                self._kept_frame = frame
        if self._kept_frame is None:
            self._codes.setdefault(code, frame.f_globals)
            self._outside.call(frame)

    def ran(self) -> ExecutedCode:
        """The names in all collected code."""
        return _names_of_all(self._codes, self._outside)

    def modules(self) -> dict[str, dict[str, Any]]:
        """The globals of the code that ran, by the name of their module."""
        return {str(table.get("__name__")): table for table in self._codes.values()}


def _names_of_all(codes: dict[types.CodeType, dict[str, Any]], outside: AskedOutside) -> ExecutedCode:
    names: set[str] = set()
    numbers: set[int] = set()
    sequences: set[tuple[int, ...]] = set()
    reads: dict[str, dict[str, None]] = {}
    attributes: set[tuple[str, str]] = set()
    imports: dict[tuple[str, int, str], None] = {}
    computes_names = False
    called = {code.co_name for code, table in codes.items() if not foreign(str(table.get("__name__")))}
    for code, table in codes.items():
        module = str(table.get("__name__"))
        if foreign(module) and not module.startswith("collections"):
            continue
        named = names_in(code)
        names |= named.names
        # the result of a property or of ``__getattr__`` is stored under another name
        computed_holders = "__getattr__" in called or "__getattribute__" in called
        attributes |= {
            ("" if computed_holders or holder in called else holder, attribute) for holder, attribute in named.reads
        }
        computes_names = computes_names or named.computes_names
        if not foreign(module):
            numbers |= named.numbers
            sequences |= named.sequences
            reads.setdefault(module, {}).update(dict.fromkeys(named.globals))
            imports.update({(module, *statement): None for statement in named.imports})
    return ExecutedCode(
        frozenset(names),
        frozenset(digest(code) for code in codes),
        tuple((module, tuple(names)) for module, names in reads.items()),
        tuple(imports),
        computes_names,
        frozenset(numbers),
        frozenset(sequences),
        frozenset(attributes),
        frozenset(outside.variables),
        tuple(outside.places),
        tuple(outside.threads),
    )


@contextlib.contextmanager
def observing(kept: list[nn.Module]) -> Iterator[CodeObserver]:
    """Collect the code that this thread runs; an active profiler is suspended meanwhile."""
    observer, before = CodeObserver({id(m) for m in kept}), sys.getprofile()
    with no_collections():  # finalizers that a collection runs are not the block's code
        sys.setprofile(observer)
        try:
            yield observer
        finally:
            sys.setprofile(None)
            if callable(before):
                sys.setprofile(before)
            elif before is not None:  # the profiler object of cProfile, which switches itself on
                before.enable()
