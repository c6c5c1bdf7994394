"""A call's arguments as the graph's inputs: moved to where they were at export, and checked one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moeopt.bundle import symbols as sizes
from moeopt.bundle import values
from moeopt.bundle.shape_guards import check_conditions, read_conditions
from moeopt.bundle.tree import check_tree, flatten
from moeopt.errors import BundleError, UsageError
from moeopt.listed import arguments
from moeopt.value_types import JsonValue, PyObject

NUMBERS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}


class Binding:
    """The inputs that a graph takes; :meth:`bind` gives each its value, or a ``UsageError`` that names it."""

    def __init__(self, graph: Mapping[str, Any], device: Callable[[str], torch.device]) -> None:
        self.parameters = [str(p) for p in graph["parameters"]]
        self.tree, self.ranges = graph["in_tree"], graph["sizes"]
        sizes.check_ranges(self.ranges)
        self.inputs = [_read_input(i, device) for i in graph["inputs"]]
        if check_tree(self.tree) != len(self.inputs) or len({i["name"] for i in self.inputs}) != len(self.inputs):
            raise BundleError("the structure of the inputs does not fit the graph")
        self.conditions = read_conditions(graph.get("conditions", []), self._rank)
        kinds = [isinstance(t, dict) and t["type"] for t in self.tree["items"]] if isinstance(self.tree, dict) else []
        if kinds != ["tuple", "dict"]:
            raise BundleError("the inputs are not a tuple of arguments and a dict of keywords")
        self._positional, self._keywords = self.tree["items"]

    def _rank(self, leaf: int) -> int:
        return len(self.inputs[leaf].get("shape", ())) if leaf < len(self.inputs) else 0

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        args, kwargs = self._as_exported(args, kwargs)
        paths = [*flatten(self._positional, args, "the arguments"), *flatten(self._keywords, kwargs, "the keywords")]
        seen: dict[str, int] = {}
        env: dict[str, Any] = {}
        for entry, (path, value) in zip(self.inputs, paths, strict=True):
            self._check_input(entry, path, value, seen)
            env[entry["name"]] = value
        if self.conditions:
            check_conditions(self.conditions, lambda n: paths[n][1].shape, lambda n: self.inputs[n]["name"])
        return env

    def _as_exported(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move arguments between positions and keywords to where they were when the program was exported."""
        count, keys = len(self._positional["items"]), self._keywords["keys"]
        if len(args) == count and set(kwargs) == set(keys):
            return args, kwargs
        named = dict(zip(self.parameters, args, strict=False))
        if len(args) > len(self.parameters) or set(named) & set(kwargs) or len(self.parameters) != count + len(keys):
            raise UsageError(f"the bundle takes {self._takes()}; it was given {arguments(args, kwargs)}")
        named |= kwargs
        leaves = dict(zip(self.parameters, self._one_leaf_each(), strict=True))
        for name, entry in leaves.items():
            if name not in named and entry is not None and "constant" in entry:
                named[name] = entry["constant"]
        if set(named) != set(self.parameters):
            wrong = sorted(set(named) ^ set(self.parameters))
            raise UsageError(
                f"the bundle takes {self._takes()}; {wrong[0]!r} is {'extra' if wrong[0] in named else 'missing'}"
            )
        ordered = [named[p] for p in self.parameters]
        return tuple(ordered[:count]), dict(zip(self.parameters[count:], ordered[count:], strict=True))

    def _one_leaf_each(self) -> list[dict[str, Any] | None]:
        """For each parameter its input entry, or None when it is a structure of several."""
        out: list[dict[str, Any] | None] = []
        rest = iter(self.inputs)
        for tree in [*self._positional["items"], *self._keywords["items"]]:
            entries = [next(rest) for _ in range(check_tree(tree))]
            out.append(entries[0] if tree == "*" else None)
        return out

    def _takes(self) -> str:
        return ", ".join(self.parameters) or f"{len(self._positional['items'])} arguments"

    def _check_input(self, entry: dict[str, Any], path: str, value: PyObject, seen: dict[str, int]) -> None:
        name = entry["name"]
        if "constant" in entry:
            same = type(value) is type(entry["constant"]) and (value == entry["constant"] or value != value)
            if not same:
                raise UsageError(
                    f"{name} is {_brief(value)}, and the bundle was exported for {entry['constant']!r} only"
                )
        elif "number" in entry:
            if not isinstance(value, entry["number"]):
                raise UsageError(f"{name} must be a number, not {_brief(value)}")
        else:
            if not isinstance(value, torch.Tensor):
                array = f": give torch.as_tensor({name})" if hasattr(value, "__array__") else ""
                raise UsageError(f"{name} ({path}) must be a tensor, not {_brief(value)}{array}")
            if value.dtype != entry["dtype"]:
                raise UsageError(f"{name} is {value.dtype}, and the bundle takes {entry['dtype']}")
            if value.device.type != entry["device"].type:
                raise UsageError(f"{name} is on {value.device}, and the bundle was loaded on {entry['device']}")
            sizes.check_sizes(name, tuple(value.shape), entry["shape"], self.ranges, seen)


def _read_input(entry: JsonValue, device: Callable[[str], torch.device]) -> dict[str, Any]:
    out = {"name": str(entry["name"])}
    if "dtype" in entry:
        shape = entry["shape"]
        if not isinstance(shape, list) or not all(d is None or type(d) in (int, str) for d in shape):
            raise BundleError(f"the input {out['name']!r} has the shape {shape!r:.80}")
        if not isinstance(entry["dtype"], str) or not isinstance(entry["device"], str):
            raise BundleError(f"the input {out['name']!r} has a dtype or a device that is no word")
        return out | {"dtype": values.DTYPES[entry["dtype"]], "device": device(entry["device"]), "shape": shape}
    if "number" in entry:
        return out | {"number": NUMBERS[entry["number"]]}
    return out | {"constant": values.decode(entry["constant"], _no_node, device)}


def _no_node(name: str) -> PyObject:
    raise BundleError(f"{name!r} is read where only a constant can be")


def _brief(value: PyObject) -> str:
    plain = value is None or isinstance(value, (bool, int, float, str))
    return f"{value!r:.40}" if plain else f"a {type(value).__name__}"
