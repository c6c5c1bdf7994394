"""Results of classes with named fields, where an engine knows no more of the class than its name.

Rebuilding a class means importing it, and a bundle is data from elsewhere: so an engine returns ``Fields`` in the place
of a data class that it does not import.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch.utils._pytree as pytree

from moeopt.value_types import PyObject


class Fields(dict[str, Any]):
    """A result whose class the bundle does not import: read its fields as keys or as attributes.

    ``_of`` is the name of that class. Its fields in ``_none`` are None: attributes, and no keys, as in a Hugging Face
    ``ModelOutput``.
    """

    _of = ""
    _none: tuple[str, ...] = ()

    def __getattribute__(self, name: str) -> PyObject:
        if name in self:
            return self[name]  # a field may be called "values"
        return None if name in super().__getattribute__("_none") else super().__getattribute__(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Fields.of, (self._of, dict(self), self._none)

    def __getattr__(self, name: str) -> PyObject:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"the result has no field {name!r}; it has {', '.join((*self, *self._none))}"
            ) from None

    @classmethod
    def of(cls, name: str, fields: PyObject, none: Iterable[str] = ()) -> Fields:
        """The fields of a result of the class ``name``, and the names of those that are None."""
        made = cls(fields)
        made._of, made._none = name, (*none,)
        return made


def _context(fields: Fields) -> PyObject:
    """The names in the order of torch's context of a data class."""
    return list(fields), list(fields._none), fields._of


pytree.register_pytree_node(
    Fields,
    lambda fields: ([*dict.values(fields)], _context(fields)),
    lambda items, context: Fields.of(context[2], zip(context[0], items, strict=True), context[1]),
    serialized_type_name=f"{Fields.__module__}:{Fields.__qualname__}",
    flatten_with_keys_fn=lambda fields: (
        [(pytree.MappingKey(name), value) for name, value in dict.items(fields)],
        _context(fields),
    ),
)


def names_in(context: PyObject, count: int) -> list[str] | None:
    """The names of the ``count`` children of a registered class, read off its pytree context."""
    candidates = [context, *(context if isinstance(context, (tuple, list)) else ())]
    for names in candidates:
        if isinstance(names, (tuple, list)) and len(names) == count and all(isinstance(n, str) for n in names):
            return list(names)
    return None


def is_result_class(value: PyObject) -> bool:
    """Whether ``value`` is of a registered data class, or stands for one."""
    return isinstance(value, Fields) or (dataclasses.is_dataclass(value) and type(value) in pytree.SUPPORTED_NODES)


def by_name(value: PyObject) -> tuple[str, dict[str, Any]] | None:
    """The class and the fields of what :func:`is_result_class`; None where the fields have no names."""
    if isinstance(value, Fields):
        return value._of, dict(value)
    children, context = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
    names = names_in(context, len(children))
    return None if names is None else (type(value).__qualname__, dict(zip(names, children, strict=True)))
