"""Bytecode of a user's functions: the names that a code object holds, and a fingerprint that equal code shares.

A fingerprint is the same after a pickle, a reload, or a second run of a notebook cell.
"""

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
"""Instructions that leave the top of the stack as it is."""
_OPEN = {"vars", "__dict__", "attrgetter", "asdict", "astuple", "globals"}
"""Names whose use means that the code may read attributes that it does not name."""


@dataclass(frozen=True)
class CodeNames:
    """The names and constants of one code object.

    Attributes:
        globals: names that are read as globals.
        imports: (level, module) of each import statement.
        names: every attribute, global, method and short string constant.
        computes_names: whether attributes are read whose names are computed.
        numbers: the integer constants.
        sequences: tuples of two or more integer constants.
        reads: (name of the holder, attribute) of each attribute read; the holder is "" where the code does not name it.
    """

    globals: tuple[str, ...]
    imports: tuple[tuple[int, str], ...]
    names: frozenset[str]
    computes_names: bool
    numbers: frozenset[int]
    sequences: frozenset[tuple[int, ...]]
    reads: frozenset[tuple[str, str]]


_NAMES: weakref.WeakKeyDictionary[types.CodeType, CodeNames] = weakref.WeakKeyDictionary()
_DIGESTS: weakref.WeakKeyDictionary[types.CodeType, str] = weakref.WeakKeyDictionary()


def names_in(code: types.CodeType) -> CodeNames:
    """The names in ``code``; functions defined inside have code objects of their own."""
    found = _NAMES.get(code)
    if found is None:
        found = _NAMES[code] = _names_of(code)
    return found


def _names_of(code: types.CodeType) -> CodeNames:
    global_reads: dict[str, None] = {}
    imports: list[tuple[int, str]] = []
    level, computes_names = 0, bool(_OPEN & {*code.co_names})
    in_getattr, constant_name, computed_name = False, False, False
    for step in dis.get_instructions(code):
        name = step.opname
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            global_reads[step.argval] = None
        elif name == "IMPORT_NAME":
            imports.append((level, str(step.argval)))
        if isinstance(step.argval, int) and name.startswith("LOAD_"):
            level = step.argval  # the import level, which IMPORT_NAME pops
        if name.startswith("LOAD_") and step.argval == "getattr" and "CONST" not in name:
            in_getattr, constant_name, computed_name = True, False, False
        elif in_getattr and name.startswith("CALL"):
            computes_names, in_getattr = computes_names or computed_name or not constant_name, False
        elif in_getattr:
            constant_name = constant_name or ("CONST" in name and isinstance(step.argval, str))
            computed_name = computed_name or name.startswith(_COMPUTES)
    strings = {s for s in _strings(code.co_consts) if _WORD.match(s)}
    named = frozenset({*code.co_names, code.co_name, *strings})
    numbers, lists = frozenset(_numbers(code.co_consts)), frozenset(_sequences(code.co_consts))
    attributes = frozenset((*_attributes(code), *(("", s) for s in strings)))  # getattr(logger, "level")
    return CodeNames(tuple(global_reads), tuple(imports), named, computes_names, numbers, lists, attributes)


def _attributes(code: types.CodeType) -> Iterator[tuple[str, str]]:
    """(holder, attribute) of each attribute read: ("config", "level") for ``self.config.level``."""
    parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    assigned = {name: {""} for name in parameters}  # by local variable, the names of what it was set to
    loads: list[tuple[str, str, bool]] = []
    loaded, is_local = "", False  # the name that the previous instruction loaded; "" for an unnamed value
    for step in dis.get_instructions(code):
        name, value = step.opname, step.argval
        if step.is_jump_target:  # ``a or b``, ``a if c else b``: the value may come from either branch
            loaded, is_local = "", False
        if name in ("LOAD_ATTR", "LOAD_METHOD"):
            loads.append((loaded, value, is_local))
        elif name == "STORE_FAST":
            assigned.setdefault(value, set()).add("" if is_local else loaded)
        if name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME"):
            loaded, is_local = value, False
        elif name.startswith("LOAD_") and isinstance(value, (str, tuple)) and "CONST" not in name:
            loaded, is_local = value if isinstance(value, str) else value[-1], True
        elif name not in _IDLE:
            loaded, is_local = "", False
    for holder, attribute, is_local in loads:
        sources = assigned.get(holder, {""}) if is_local and holder != "self" else {holder}
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
    """A hash that equal code objects share, wherever they were compiled."""
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
    """The fingerprint of a function, with the plain values and functions in its defaults and its closure."""
    if not isinstance(function, types.FunctionType):
        inner = getattr(function, "__func__", None)
        if inner is not None and depth:
            return fingerprint(inner, depth - 1)
        return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    values += [cell.cell_contents for cell in function.__closure__ or () if has_contents(cell)]
    parts = [_value_text(value, depth) for value in values]
    return f"{function.__module__}.{function.__qualname__}:{digest(function.__code__)}:{'|'.join(parts)}"


def _value_text(value: PyObject, depth: int) -> str:
    if type(value) in _PLAIN:
        return repr(value)
    if isinstance(value, types.FunctionType) and depth:
        return f"({fingerprint(value, depth - 1)})"
    return type(value).__qualname__


def has_contents(cell: PyObject) -> bool:
    """Whether the cell of a closure holds a value."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def in_installed_package(filename: object) -> bool:
    """Whether a source file belongs to an installed package, whose functions may be replaced but are not edited."""
    return "site-packages" in str(filename)
