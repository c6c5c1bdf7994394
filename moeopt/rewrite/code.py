"""What a function is, as a string: equal for equal code, also after a pickle, a reload or a notebook cell run twice."""

from __future__ import annotations

import dis
import hashlib
import math
import re
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from moeopt.value_types import PyObject

_WORD = re.compile(r"[^\n]{1,64}\Z")
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_COMPUTES = ("BINARY_", "FORMAT_", "BUILD_STRING")
_IDLE = ("CACHE", "PRECALL", "NOP", "RESUME", "PUSH_NULL", "EXTENDED_ARG")
"""Steps that leave the last value on the stack."""
_OPEN = {"vars", "__dict__", "attrgetter", "asdict", "astuple", "globals"}
"""Names whose use means that attributes are read which no name in the code tells."""


@dataclass(frozen=True)
class CodeNames:
    """What one code object names.

    Attributes:
        globals: the names that it reads as globals.
        imports: (level, module) of each import statement in it.
        names: every attribute, global, method and short string in it.
        open: whether it reads attributes whose names are computed.
        numbers: the whole numbers in it.
        sequences: of such numbers, two or more after each other.
        reads: (name of what is asked, attribute) of each attribute that it reads; "" where no name tells what is asked.
    """

    globals: tuple[str, ...]
    imports: tuple[tuple[int, str], ...]
    names: frozenset[str]
    open: bool
    numbers: frozenset[int]
    sequences: frozenset[tuple[int, ...]]
    reads: frozenset[tuple[str, str]]


_WORDS: weakref.WeakKeyDictionary[types.CodeType, CodeNames] = weakref.WeakKeyDictionary()
_DIGESTS: weakref.WeakKeyDictionary[types.CodeType, str] = weakref.WeakKeyDictionary()


def words(code: types.CodeType) -> CodeNames:
    """The names in ``code``, without those of functions inside it."""
    found = _WORDS.get(code)
    if found is None:
        found = _WORDS[code] = _read(code)
    return found


def _read(code: types.CodeType) -> CodeNames:
    reads: dict[str, None] = {}
    imports: list[tuple[int, str]] = []
    level, open_ = 0, bool(_OPEN & {*code.co_names})
    asked, constant, computed = False, False, False
    for step in dis.get_instructions(code):
        name = step.opname
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            reads[step.argval] = None
        elif name == "IMPORT_NAME":
            imports.append((level, str(step.argval)))
        if isinstance(step.argval, int) and name.startswith("LOAD_"):
            level = step.argval  # what IMPORT_NAME takes from the stack
        if name.startswith("LOAD_") and step.argval == "getattr" and "CONST" not in name:
            asked, constant, computed = True, False, False
        elif asked and name.startswith("CALL"):
            open_, asked = open_ or computed or not constant, False
        elif asked:
            constant = constant or ("CONST" in name and isinstance(step.argval, str))
            computed = computed or name.startswith(_COMPUTES)
    strings = {s for s in _strings(code.co_consts) if _WORD.match(s)}
    named = frozenset({*code.co_names, code.co_name, *strings})
    numbers, lists = frozenset(_numbers(code.co_consts)), frozenset(_sequences(code.co_consts))
    attributes = frozenset((*_attributes(code), *(("", s) for s in strings)))  # getattr(logger, "level")
    return CodeNames(tuple(reads), tuple(imports), named, open_, numbers, lists, attributes)


def _attributes(code: types.CodeType) -> Iterator[tuple[str, str]]:
    """Each attribute with the name of what it is read from: of ``self.config.level`` it is ``config``."""
    given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    assigned = {name: {""} for name in given}  # by local variable, the names of what it was set to
    found: list[tuple[str, str, bool]] = []
    last, local = "", False  # what the step before loaded; "" where no name tells
    for step in dis.get_instructions(code):
        name, value = step.opname, step.argval
        if step.is_jump_target:  # ``a or b``, ``a if there else b``: the last value may be another one
            last, local = "", False
        if name in ("LOAD_ATTR", "LOAD_METHOD"):
            found.append((last, value, local))
        elif name == "STORE_FAST":
            assigned.setdefault(value, set()).add("" if local else last)
        if name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME"):
            last, local = value, False
        elif name.startswith("LOAD_") and isinstance(value, (str, tuple)) and "CONST" not in name:
            last, local = value if isinstance(value, str) else value[-1], True
        elif name not in _IDLE:
            last, local = "", False
    for holder, attribute, local in found:
        sources = assigned.get(holder, {""}) if local and holder != "self" else {holder}
        yield from ((source, attribute) for source in sources)


def _numbers(value: PyObject) -> Iterator[int]:
    if isinstance(value, (int, float)) and math.isfinite(value):
        yield int(value)
    elif isinstance(value, (tuple, frozenset)):
        for part in value:
            yield from _numbers(part)


def _sequences(constants: Iterable[PyObject]) -> Iterator[tuple[int, ...]]:
    for value in constants:
        if isinstance(value, tuple) and len(value) > 1:
            if all(type(n) is int for n in value):
                yield value
            elif all(isinstance(part, tuple) for part in value):
                yield tuple(_numbers(value))
                yield from _sequences(value)


def _strings(value: PyObject) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (tuple, frozenset)):
        for part in value:
            yield from _strings(part)


def digest(code: types.CodeType) -> str:
    """Equal for code objects that do the same, wherever they were compiled."""
    found = _DIGESTS.get(code)
    if found is None:
        parts = (code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_argcount,
                 code.co_kwonlyargcount, code.co_flags, [_constant(c) for c in code.co_consts])  # fmt: skip
        found = _DIGESTS[code] = hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
    return found


def _constant(value: PyObject) -> PyObject:
    if isinstance(value, types.CodeType):
        return digest(value)
    if isinstance(value, tuple):
        return [_constant(v) for v in value]
    return sorted(map(repr, value)) if isinstance(value, frozenset) else (type(value).__name__, value)


def fingerprint(function: Callable[..., Any], depth: int = 4) -> str:
    """A function with the plain values and the functions that its defaults and its closure hold."""
    if not isinstance(function, types.FunctionType):
        inner = getattr(function, "__func__", None)
        if inner is not None and depth:
            return fingerprint(inner, depth - 1)
        return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    held += [cell.cell_contents for cell in function.__closure__ or () if filled(cell)]
    parts = [_held(value, depth) for value in held]
    return f"{function.__module__}.{function.__qualname__}:{digest(function.__code__)}:{'|'.join(parts)}"


def _held(value: PyObject, depth: int) -> str:
    if type(value) in _PLAIN:
        return repr(value)
    if isinstance(value, types.FunctionType) and depth:
        return f"({fingerprint(value, depth - 1)})"
    return type(value).__qualname__


def filled(cell: PyObject) -> bool:
    """Whether a closure's cell has a value."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def installed(filename: object) -> bool:
    """Whether a file is an installed package's: its functions may be replaced, but nobody writes into them."""
    return "site-packages" in str(filename)
