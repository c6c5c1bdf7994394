"""Which Python functions run in a block's forward, and what they name: the bounds of what a forward can read.

A few plain runs under a profile hook give the code objects; their bytecode gives names of attributes, globals and
string constants. Whatever the forward reads is reached through such a name (``moeopt.rewrite.walk`` follows them), so
a field of a configuration that no code names is nobody's business.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from moeopt.capture.held_contents import foreign
from moeopt.rewrite.asked_outside import AskedOutside
from moeopt.rewrite.code import digest, words
from moeopt.value_types import FxArg, PyObject

_CALLS = {nn.Module._wrapped_call_impl.__code__, nn.Module._call_impl.__code__}


@dataclass(frozen=True)
class Ran:
    """What the code that ran names.

    Attributes:
        names: of attributes, methods, globals, and short strings.
        codes: digests of the code objects.
        globals: (name of the module, globals that are read there).
        imports: (importing module, level, imported module) of import statements inside functions.
        open: whether attributes are read whose names are computed.
        numbers: the whole numbers in it.
        sequences: of such numbers, two or more after each other.
        reads: (name of what is asked, attribute), see :class:`moeopt.rewrite.code.CodeNames`.
        variables: of the process, that it looks up.
        outside: what else it asks of the world outside of the process, with the line.
        threads: where it gives work to another thread, or waits for it, with the line.
    """

    names: frozenset[str] = frozenset()
    codes: frozenset[str] = frozenset()
    globals: tuple[tuple[str, tuple[str, ...]], ...] = ()
    imports: tuple[tuple[str, int, str], ...] = ()
    open: bool = False
    numbers: frozenset[int] = frozenset()
    sequences: frozenset[tuple[int, ...]] = frozenset()
    reads: frozenset[tuple[str, str]] = frozenset()
    variables: frozenset[str] = frozenset()
    outside: tuple[str, ...] = ()
    threads: tuple[str, ...] = ()


class Observed:
    """The code that ran, but for that of submodules that are kept as they are and called.

    Attributes:
        called: ids of the modules that were called.
    """

    def __init__(self, kept: set[int]) -> None:
        self._kept = kept
        self._inside: types.FrameType | None = None
        self._codes: dict[types.CodeType, dict[str, Any]] = {}
        self.called: set[int] = set()
        self._outside = AskedOutside()

    def __call__(self, frame: PyObject, event: str, arg: FxArg) -> None:
        """The profile hook."""
        if event == "return" and frame is self._inside:
            self._inside = None
        if event == "c_call" and self._inside is None:
            self._outside.builtin(frame, arg)
        if event != "call":
            return
        code = frame.f_code
        if code in _CALLS:
            module = id(frame.f_locals.get("self"))
            self.called.add(module)
            if self._inside is None and module in self._kept:
                self._inside = frame
        if self._inside is None:
            self._codes.setdefault(code, frame.f_globals)
            self._outside.call(frame)

    def ran(self) -> Ran:
        """What the code names."""
        return _ran(self._codes, self._outside)

    def modules(self) -> dict[str, dict[str, Any]]:
        """The globals of what ran, by the module's name."""
        return {str(table.get("__name__")): table for table in self._codes.values()}


def _ran(codes: dict[types.CodeType, dict[str, Any]], outside: AskedOutside) -> Ran:
    names: set[str] = set()
    numbers: set[int] = set()
    sequences: set[tuple[int, ...]] = set()
    reads: dict[str, dict[str, None]] = {}
    attributes: set[tuple[str, str]] = set()
    imports: dict[tuple[str, int, str], None] = {}
    open_ = False
    called = {code.co_name for code, table in codes.items() if not foreign(str(table.get("__name__")))}
    for code, table in codes.items():
        module = str(table.get("__name__"))
        if foreign(module) and not module.startswith("collections"):
            continue
        found = words(code)
        names |= found.names
        # what a property gives, or ``__getattr__``, has another name where it is held
        computed = "__getattr__" in called or "__getattribute__" in called
        attributes |= {("" if computed or holder in called else holder, asked) for holder, asked in found.reads}
        open_ = open_ or found.open
        if not foreign(module):
            numbers |= found.numbers
            sequences |= found.sequences
            reads.setdefault(module, {}).update(dict.fromkeys(found.globals))
            imports.update({(module, *one): None for one in found.imports})
    return Ran(
        frozenset(names),
        frozenset(digest(code) for code in codes),
        tuple((module, tuple(found)) for module, found in reads.items()),
        tuple(imports),
        open_,
        frozenset(numbers),
        frozenset(sequences),
        frozenset(attributes),
        frozenset(outside.variables),
        tuple(outside.places),
        tuple(outside.threads),
    )


@contextlib.contextmanager
def observing(kept: list[nn.Module]) -> Iterator[Observed]:
    """While open, what this thread runs is observed; a profiler that was on is set aside and goes on afterwards."""
    observed, before = Observed({id(m) for m in kept}), sys.getprofile()
    collecting = gc.isenabled()
    gc.disable()  # what a collection calls back is not the block's code
    sys.setprofile(observed)
    try:
        yield observed
    finally:
        sys.setprofile(None)
        if collecting:
            gc.enable()
        if callable(before):
            sys.setprofile(before)
        elif before is not None:  # the profiler object of cProfile, which switches itself on
            before.enable()
