"""Many small comparisons as one generated function: a dozen nanoseconds each.

    guard = GuardExpression()
    guard.item(config.__dict__, "top_k", 2)
    same = guard.compiled()
    same()                                      config.__dict__["top_k"] is 2

Objects are compared by identity, which is quick, and may report an object as changed that is only another equal one:
the caller then compares values, and compiles a new guard. The text of the function is the same for blocks of one
structure, so it is compiled once; the objects to compare are its defaults.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from moeopt.value_types import PyObject

_MANY = 8
"""Entries from which on they are compared as one list."""


class GuardExpression:
    """Terms of one conjunction, each an expression over bound objects.

    Args:
        classes: whether attributes of classes count; another guard may compare them already.

    Attributes:
        cost: about how many nanoseconds it takes.
    """

    def __init__(self, classes: bool = True) -> None:
        self.cost, self._classes = 50, classes
        self._terms: dict[str, None] = {}
        self._values: list[Any] = []
        self._names: dict[int, str] = {}
        self._tables: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}

    def name(self, value: PyObject) -> str:
        """The variable of the generated function that holds ``value``."""
        known = self._names.get(id(value))
        if known is None:
            known = self._names[id(value)] = f"a{len(self._values)}"
            self._values.append(value)
            self.cost += 3
        return known

    def add(self, template: str, *values: PyObject) -> None:
        """A term such as ``"{0}[{1}] is {2}"``; the values stay alive as long as the guard."""
        term = template.format(*[self.name(v) for v in values])
        if term not in self._terms:
            self._terms[term] = None
            self.cost += 14 + 15 * template.count("(")

    def item(self, table: PyObject, key: PyObject, value: PyObject) -> None:
        """``table[key]`` is the object ``value``."""
        if isinstance(table, types.MappingProxyType) and not self._classes:
            return
        plain = type(table) is dict or isinstance(table, types.MappingProxyType)
        if plain and type(key) is str:
            self.add(f"{{0}}[{_quoted(key)}] is {{1}}", table, value)
        elif plain:
            self.add("{0}[{1}] is {2}", table, key, value)
        else:
            self.add("{0}({1}, {2}) is {3}", dict.__getitem__, table, key, value)

    def entries(self, table: dict[str, Any], ordered: bool = False) -> None:
        """The same objects in ``table`` and no others; in the same order too where that is asked for, or they are many.

        ``==`` of containers looks at identity first, and what it would then compare by value is compared alone. All
        small tables are one term, which takes half the time of a term for each entry.
        """
        if any(isinstance(v, torch.Tensor) and v.numel() == 1 for v in table.values()):
            for key, value in table.items():
                self.item(table, key, value)
            self.keys(table)
        elif len(table) > (1 if ordered else _MANY):
            self.add("{0}({1}.values()) == {2}", list, table, list(table.values()))
            self.cost += 8 * len(table)
        elif id(table) not in self._tables:
            self._tables[id(table)] = table, dict(table)
            self.cost += 10 + 8 * len(table)

    def lacks(self, table: PyObject, key: PyObject) -> None:
        """``table`` has no ``key``."""
        self.add("{0} not in {1}", key, table)

    def attribute(self, owner: PyObject, name: str, value: PyObject) -> None:
        """``owner.name`` is the object ``value``."""
        self.add(f"{{0}}.{name} is {{1}}", owner, value)

    def keys(self, table: dict[Any, Any]) -> None:
        """No key was added: a new one would be the last."""
        if table:
            self.add("{0}({1}({2})) is {3}", next, dict.__reversed__, table, next(dict.__reversed__(table)))
        else:
            self.add("not {0}", table)

    def length(self, table: dict[Any, Any]) -> None:
        """As many entries as now."""
        if table:
            self.add(f"{{0}}({{1}}) == {len(table)}", len, table)
        else:
            self.entries(table)

    def equal(self, value: PyObject, copy: PyObject) -> None:
        """A list, set or another container of plain values equals ``copy``."""
        self.add("{0} == {1}", value, copy)

    def tensor(self, tensor: torch.Tensor, small: bool) -> None:
        """Nothing was written to ``tensor``; a small one by value too, as a write to ``.data`` is not counted."""
        if not tensor.is_inference():
            self.add(f"{{0}}._version == {tensor._version}", tensor)
        if small:
            self.add("{0}({1}, {2})", torch.equal, tensor, tensor.detach().clone())
            self.cost += 600

    def lies(self, table: dict[str, Any], key: str, tensor: torch.Tensor, name: str) -> None:
        """``table[key]``, from then on ``name``, is a tensor of the same class, and lies where ``tensor`` lies.

        That is its address, shape, strides, dtype and sign; it may be another object, and hold other numbers.
        """
        same = f"type({name} := {{0}}[{_quoted(key)}]) is {{1}} and {name}.data_ptr() == {{2}}"
        run = f"{name}.is_contiguous()" if tensor.is_contiguous() else f"{name}.stride() == {{5}}"
        kind = f"{name}.dtype is {{4}} and {name}.is_cpu and not {name}.is_neg()"
        known = type(tensor), tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.stride()
        self.add(f"{same} and {name}.shape == {{3}} and {run} and {kind}", table, *known)

    def compiled(self, result: str = "") -> Callable[[], Any]:
        """The conjunction, which may also raise where something was removed; if it holds it gives ``result``."""
        if self._tables:
            now, before = zip(*self._tables.values(), strict=True)
            self.add("{0} == {1}", now, before)
        names = ", ".join(f"a{i}" for i in range(len(self._values)))
        terms = " and ".join([*self._terms, result or "True"])
        code = compiled_once(f"def same({names}):\n    return {terms}\n", "same")
        return types.FunctionType(code, {}, "same", tuple(self._values))


def holds(same: Callable[[], bool]) -> bool:
    """What a compiled guard says; False where something was removed, or is of a kind that cannot be compared."""
    try:
        return same()
    except Exception:
        return False


def _quoted(key: str) -> str:
    return repr(key).replace("{", "{{").replace("}", "}}")


@functools.lru_cache(maxsize=256)
def compiled_once(source: str, name: str) -> types.CodeType:
    """The code of the function ``name`` that ``source`` defines."""
    scope: dict[str, Any] = {}
    exec(compile(source, "<moeopt guard>", "exec"), scope)
    code: types.CodeType = scope[name].__code__
    return code
