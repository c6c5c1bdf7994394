"""Run a bundle's graph: one list of calls, each value dropped after its last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moeopt.engine import allow, values
from moeopt.engine.binding import Binding
from moeopt.engine.graph import SCHEMA
from moeopt.engine.tree import build, check_tree
from moeopt.errors import BundleError, UsageError
from moeopt.ir.specs import ExpertsSpec


class Ref:
    """Where a literal's place is taken by a value computed earlier."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Step:
    """One call: what to call, with what, where the result goes, and what is not needed after it."""

    __slots__ = ("function", "args", "kwargs", "out", "drop", "fixed")

    def __init__(self, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], out: str) -> None:
        self.function, self.args, self.kwargs, self.out = function, args, kwargs, out
        self.drop: tuple[str, ...] = ()
        self.fixed = not _refs(kwargs)


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
        self.binding, self.out_tree = Binding(graph, device), graph["out_tree"]
        if check_tree(self.out_tree) != len(graph["outputs"]):
            raise BundleError("the structure of the result does not fit the graph")
        self.weights = {str(name): weight(key) for name, key in graph["weights"].items()}
        known = {i["name"] for i in self.binding.inputs} | set(self.weights)

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
    def _step(node: Any, ref: Any, device: Any) -> Step:
        function = allow.function_named(node["op"])
        if function is torch.ops.aten.view.default:  # a caller's tensor may be laid out otherwise than the traced one
            function = torch.ops.aten.reshape.default
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
        env.update(self.binding.bind(args, kwargs))
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            for step in self.steps:
                args_now = [
                    env[a.name] if type(a) is Ref else _fill(a, env) if type(a) is list else a for a in step.args
                ]
                kwargs_now = step.kwargs if step.fixed else _fill(step.kwargs, env)
                env[step.out] = step.function(*args_now, **kwargs_now)
                for name in step.drop:
                    del env[name]
            for source, into in self.write_back:
                env[into].copy_(env[source])
        return build(self.out_tree, iter(_fill(self.outputs, env)))


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
