"""Run a bundle's graph: one list of calls, each value dropped after its last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moeopt.engine import allow, sizes, values
from moeopt.engine.graph import SCHEMA
from moeopt.engine.tree import build, check_tree, flatten
from moeopt.errors import BundleError, UsageError
from moeopt.ir.specs import ExpertsSpec

NUMBERS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}


class Ref:
    """Where a literal's place is taken by a value computed earlier."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Step:
    """One call: what to call, with what, where the result goes, and what is not needed after it."""

    __slots__ = ("function", "args", "kwargs", "out", "drop")

    def __init__(self, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], out: str) -> None:
        self.function, self.args, self.kwargs, self.out = function, args, kwargs, out
        self.drop: tuple[str, ...] = ()


class Runner:
    """A graph that was read and checked, with its weights; call it as the model was called.

    ``BundleError`` at construction for a graph that :func:`moeopt.engine.graph.write_graph` would not have written;
    ``UsageError`` at a call whose arguments do not fit.
    """

    def __init__(
        self,
        graph: Mapping[str, Any],
        weight: Callable[[str], torch.Tensor],
        device: Callable[[str], torch.device] = torch.device,
    ) -> None:
        try:
            self._read(graph, weight, device)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as err:
            if isinstance(err, UsageError):
                raise BundleError(str(err)) from None
            raise BundleError(f"the graph lacks or mistypes a part ({type(err).__name__}: {err})") from None

    def _read(self, graph: Mapping[str, Any], weight: Any, device: Any) -> None:
        if graph["schema"] != SCHEMA:
            raise BundleError(f"the graph has schema {graph['schema']!r}, and this moeopt reads {SCHEMA}")
        self.parameters = [str(p) for p in graph["parameters"]]
        self.in_tree, self.out_tree = graph["in_tree"], graph["out_tree"]
        self.ranges = graph["sizes"]
        sizes.check_ranges(self.ranges)
        self.inputs = [self._input(i, device) for i in graph["inputs"]]
        if check_tree(self.in_tree) != len(self.inputs) or check_tree(self.out_tree) != len(graph["outputs"]):
            raise BundleError("the structure of the inputs or of the result does not fit the graph")
        self._positional, self._keywords = self.in_tree["items"]
        if self._positional["type"] != "tuple" or self._keywords["type"] != "dict":
            raise BundleError("the inputs are not a tuple of arguments and a dict of keywords")
        self.weights = {str(name): weight(key) for name, key in graph["weights"].items()}
        known = {i["name"] for i in self.inputs} | set(self.weights)

        def ref(name: str) -> Ref:
            if name not in known:
                raise BundleError(f"{name!r} is read before it is computed")
            return Ref(name)

        self.steps: list[Step] = []
        for node in graph["nodes"]:
            step = self._step(node, ref, device)
            if step.out in known:
                raise BundleError(f"{step.out!r} is computed twice")
            known.add(step.out)
            self.steps.append(step)
        self.outputs = [values.decode(v, ref, device) for v in graph["outputs"]]
        self.write_back = [(ref(w["from"]).name, ref(w["into"]).name) for w in graph["write_back"]]
        self._plan_drops()

    @staticmethod
    def _input(entry: Any, device: Any) -> dict[str, Any]:
        out = {"name": str(entry["name"])}
        if "dtype" in entry:
            shape = entry["shape"]
            if not all(d is None or isinstance(d, (int, str)) for d in shape):
                raise BundleError(f"the input {out['name']!r} has the shape {shape!r}")
            return out | {"dtype": values.DTYPES[entry["dtype"]], "device": device(entry["device"]), "shape": shape}
        if "number" in entry:
            return out | {"number": NUMBERS[entry["number"]]}
        return out | {"constant": values.decode(entry["constant"], _no_ref, device)}

    @staticmethod
    def _step(node: Any, ref: Any, device: Any) -> Step:
        function = allow.function_named(node["op"])
        args = values.decode(node["args"], ref, device)
        kwargs = {str(k): values.decode(v, ref, device) for k, v in node.get("kwargs", {}).items()}
        if node["op"] == "moeopt.experts.default":
            ExpertsSpec.decode(args[-1] if isinstance(args[-1], str) else kwargs["spec"])
        return Step(function, args, kwargs, str(node["out"]))

    def _plan_drops(self) -> None:
        kept = {r.name for r in _refs(self.outputs)} | {n for pair in self.write_back for n in pair} | set(self.weights)
        for step in reversed(self.steps):
            last = {r.name for r in _refs([step.args, step.kwargs])} | {step.out}
            step.drop = tuple(sorted(last - kept))
            kept |= last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        env: dict[str, Any] = dict(self.weights)
        env.update(self._bind(args, kwargs))
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            for step in self.steps:
                env[step.out] = step.function(*_fill(step.args, env), **_fill(step.kwargs, env))
                for name in step.drop:
                    del env[name]
            for source, into in self.write_back:
                env[into].copy_(env[source])
        return build(self.out_tree, iter(_fill(self.outputs, env)))

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        args, kwargs = self._as_exported(args, kwargs)
        paths = [*flatten(self._positional, args, "the arguments"), *flatten(self._keywords, kwargs, "the keywords")]
        seen: dict[str, int] = {}
        env: dict[str, Any] = {}
        for entry, (path, value) in zip(self.inputs, paths, strict=True):
            self._check_input(entry, path, value, seen)
            env[entry["name"]] = value
        return env

    def _as_exported(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move arguments between positions and keywords to where they were when the program was exported."""
        count, keys = len(self._positional["items"]), self._keywords["keys"]
        if len(args) == count and set(kwargs) == set(keys):
            return args, kwargs
        named = dict(zip(self.parameters, args, strict=False))
        if len(args) > len(self.parameters) or set(named) & set(kwargs) or len(self.parameters) != count + len(keys):
            raise UsageError(f"the bundle takes {self._takes()}; it was given {len(args)} and {sorted(kwargs)}")
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

    def _check_input(self, entry: dict[str, Any], path: str, value: Any, seen: dict[str, int]) -> None:
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
                raise UsageError(f"{name} ({path}) must be a tensor, not {_brief(value)}")
            if value.dtype != entry["dtype"]:
                raise UsageError(f"{name} is {value.dtype}, and the bundle takes {entry['dtype']}")
            if value.device.type != entry["device"].type:
                raise UsageError(f"{name} is on {value.device}, and the bundle was loaded on {entry['device']}")
            sizes.check_sizes(name, tuple(value.shape), entry["shape"], self.ranges, seen)


def _brief(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else f"{value!r:.40}"


def _no_ref(name: str) -> Any:
    raise BundleError(f"{name!r} is read where only a constant can be")


def _refs(value: Any) -> list[Ref]:
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [r for v in value for r in _refs(v)] if isinstance(value, list) else []


def _fill(value: Any, env: dict[str, Any]) -> Any:
    kind = type(value)
    if kind is Ref:
        return env[value.name]
    if kind is list:
        return [_fill(v, env) for v in value]
    if kind is dict:
        return {k: _fill(v, env) for k, v in value.items()}
    return value
