"""The shape of arguments and results (tuples, lists, dicts, named fields) as JSON; leaves are "*".

Rebuilding a class means importing it, and a bundle is data from elsewhere. So builtin containers are rebuilt as they
were, a Hugging Face ``ModelOutput`` or ``DynamicCache`` as its own class where transformers is installed, and any
other class with named fields as ``Fields``: a dict whose keys are attributes too. A named tuple is of its own class
in the process that saw it, and elsewhere of a new class with the same name and fields.
"""

from __future__ import annotations

import collections
import functools
import importlib
import keyword
import re
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree

from moeopt.bundle import caches
from moeopt.errors import BundleError, UsageError
from moeopt.value_types import PyObject
from moeopt.verification.fields import Fields, names_in

LEAF = "*"
_MODEL_OUTPUT = re.compile(r"transformers\.(modeling_outputs|models\.\w+\.modeling_\w+):\w+")


_met: dict[tuple[str, tuple[str, ...]], weakref.WeakSet[Any]] = {}
"""The named tuple classes of results that were encoded in this process, by name and fields."""


def encode_tree(spec: pytree.TreeSpec) -> PyObject:
    """JSON for a ``TreeSpec``; ``TypeError`` names the class that a bundle cannot hold."""
    if spec.is_leaf():
        return LEAF
    kind, items = spec.type, [encode_tree(child) for child in spec.children()]
    if kind in (tuple, list):
        return {"type": kind.__name__, "items": items}
    if kind in (dict, collections.OrderedDict):
        return {"type": kind.__name__, "keys": _names(list(spec.context), kind), "items": items}
    if (cls := _named_tuple_class(spec)) is not None:
        _met.setdefault((cls.__name__, cls._fields), weakref.WeakSet()).add(cls)
        return {"type": "namedtuple", "name": cls.__name__, "keys": list(cls._fields), "items": items}
    fields = names_in(spec.context, len(items))
    if fields is None:
        raise TypeError(f"a {kind.__module__}.{kind.__qualname__} (not a tuple, list, dict or class with named fields)")
    tree = {"type": "fields", "name": f"{kind.__module__}:{kind.__qualname__}", "keys": fields, "items": items}
    return tree | ({"none": absent} if (absent := _absent_of(spec.context, fields)) else {})


def field_names(spec: pytree.TreeSpec) -> list[str] | None:
    """The names of the parts of a named tuple or of a registered class with fields; None for any other structure."""
    cls = _named_tuple_class(spec)
    return list(cls._fields) if cls is not None else names_in(spec.context, len(spec.children()))


def _named_tuple_class(spec: pytree.TreeSpec) -> PyObject:
    if spec.type is collections.namedtuple:
        return spec.context
    return spec.type if pytree.is_namedtuple_class(spec.type) else None


def build(tree: PyObject, leaves: Iterator[Any]) -> PyObject:
    """``tree`` with its leaves filled in, in order."""
    if tree == LEAF:
        return next(leaves)
    kind, items = tree["type"], [build(item, leaves) for item in tree["items"]]
    if kind == "tuple":
        return tuple(items)
    if kind == "list":
        return items
    pairs = dict(zip(tree["keys"], items, strict=True))
    if kind in ("dict", "OrderedDict"):
        return pairs if kind == "dict" else collections.OrderedDict(pairs)
    if kind == "namedtuple":
        return _named_tuple(tree["name"], tuple(tree["keys"]))._make(items)
    if tree["name"] == caches.NAME and "layers" in pairs:
        return caches.rebuilt(pairs["layers"])
    cls = _model_output(tree["name"])
    return Fields.of(tree["name"].rpartition(":")[2], pairs, tree.get("none", ())) if cls is None else cls(**pairs)


def flatten(tree: PyObject, value: PyObject, where: str) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of ``value``, which must have the structure of ``tree``; ``UsageError`` says where it has not."""
    if tree == LEAF:
        yield where, value
        return
    kind, items = tree["type"], tree["items"]
    if kind in ("tuple", "list", "namedtuple"):
        if not isinstance(value, (tuple, list)) or len(value) != len(items):
            raise UsageError(f"{where} must be a {kind} of {len(items)}, not {_brief(value)}")
        parts: list[tuple[str, Any]] = [(f"{where}[{i}]", v) for i, v in enumerate(value)]
    elif kind == "fields" and not isinstance(value, dict):
        missing = [k for k in tree["keys"] if not hasattr(value, k)]
        if missing:
            raise UsageError(f"{where} must have the fields {', '.join(tree['keys'])}, and {missing[0]} is missing")
        given = [k for k in tree.get("none", []) if getattr(value, k, None) is not None]
        if given:
            raise UsageError(f"{where}.{given[0]} must be None, as in the call that the engine was exported with")
        parts = [(f"{where}.{k}", getattr(value, k)) for k in tree["keys"]]
    else:
        if not isinstance(value, dict) or set(value) != set(tree["keys"]):
            raise UsageError(f"{where} must be a dict with the keys {tree['keys']}, not {_brief(value)}")
        parts = [(f"{where}[{k!r}]", value[k]) for k in tree["keys"]]
    for item, (path, part) in zip(items, parts, strict=True):
        yield from flatten(item, part, path)


def check_tree(tree: PyObject, depth: int = 0) -> int:
    """How many leaves a tree from a file has; ``BundleError`` when ``encode_tree`` would not have written it."""
    if tree == LEAF:
        return 1
    good = isinstance(tree, dict) and isinstance(tree.get("items"), list) and depth < 64
    good = good and isinstance(tree.get("type"), str)
    kind = tree.get("type") if good else None
    if kind in ("dict", "OrderedDict", "namedtuple", "fields"):
        keys = tree.get("keys")
        good = isinstance(keys, list) and len(keys) == len(tree["items"]) == len(set(map(str, keys)))
        good = good and all(isinstance(k, (str, int)) for k in keys)
        if kind in ("namedtuple", "fields"):
            good = good and isinstance(tree.get("name"), str) and isinstance(tree.get("none", []), list)
            good = good and all(isinstance(k, str) and _is_field(k) for k in [*keys, *tree.get("none", [])])
        if good and kind == "namedtuple":
            good = tree["name"].isidentifier() and not keyword.iskeyword(tree["name"])
    elif kind not in ("tuple", "list"):
        good = False
    if not good:
        raise BundleError(f"{str(tree)[:80]!r} is not a structure that moeopt writes")
    return sum(check_tree(item, depth + 1) for item in tree["items"])


def _is_field(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("_")


def _names(keys: list[Any], kind: type) -> list[Any]:
    for key in keys:
        if not isinstance(key, (str, int)):
            raise TypeError(f"a {kind.__name__} with the key {key!r} (only strings and integers can be keys)")
    return keys


def _absent_of(context: PyObject, fields: list[str]) -> list[str]:
    """The names of fields that were None, which torch writes beside the names of those that were not."""
    if not isinstance(context, (tuple, list)) or len(context) < 2 or context[0] != fields:
        return []
    return list(context[1]) if isinstance(context[1], list) else []


def _named_tuple(name: str, fields: tuple[str, ...]) -> PyObject:
    """The class of this name and these fields that was met; a new one where there is none, or more than one."""
    known = list(_met.get((name, fields), ()))
    return known[0] if len(known) == 1 else _new_named_tuple(name, fields)


@functools.lru_cache(maxsize=256)
def _new_named_tuple(name: str, fields: tuple[str, ...]) -> PyObject:
    return collections.namedtuple(name, fields)


def _model_output(name: str) -> PyObject:
    if not _MODEL_OUTPUT.fullmatch(name):
        return None
    module, _, cls = name.partition(":")
    try:
        base = importlib.import_module("transformers.utils").ModelOutput
        found = getattr(importlib.import_module(module), cls, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and issubclass(found, base) else None


def _brief(value: PyObject) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"a dict with the keys {list(value)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")
