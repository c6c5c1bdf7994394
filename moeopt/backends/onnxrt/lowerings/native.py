"""moeopt's own CPU kernel as one node, ``moeopt::Experts``, on the very weights that another lowering stores.

    Nodes      1; its inputs are x, ids, weights and constants: E of W_in and E of W_out, or one stack of each, and
               a table for each of b_in, b_out and norm
    Numerics   float32; each row and each sum is the reference's, product sums in the kernel's order

The node reads what the other lowering lays down, in its orientation, so a graph of plain ONNX Runtime and one with
this node share a file of weights, and nothing is stored or packed twice. Shape legend: E experts, O columns of W_in,
H hidden, I intermediate, D output width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import DOMAIN, OP, ExpertsNode
from moeopt.lower.onnx.lowerings import weights as banks
from moeopt.lower.onnx.lowerings.base import Cost, Lowering
from moeopt.lower.onnx.lowerings.types import types_of
from moeopt.lower.onnx.lowerings.weight_reads import experts_hit, weights_cost
from moeopt.ops.native.call import NATIVE_ACTIVATIONS
from moeopt.value_types import OnnxValue

Look = Callable[[str], Any]
"""The graph's value for the constant of a name that follows the block's."""


@dataclass(frozen=True)
class Storage:
    """How a lowering lays the weights down: names after the block's, "{e}" for an expert's number where not stacked."""

    w_in: str
    w_out: str
    b_in: str
    b_out: str
    layout: str
    stacked: bool
    interleaved: bool = False


_KERNEL = Storage("fc1.weight", "fc2.weight", "fc1.bias", "fc2.bias", "oi", stacked=True, interleaved=True)
STORAGES = {
    "unrolled": Storage(
        "expert.{e}/gate_up.weight", "expert.{e}/down.weight", "gate_up.bias", "down.bias", "io", stacked=False
    ),
    "moe-masked-log": _KERNEL,
    "moe-expand": _KERNEL,
    "dense": Storage("gate_up.weight", "down.weight", "gate_up.bias", "down.bias", "io", stacked=True),
}
_NORM = "norm.weight"


class Native:
    """The lowering ``"native"``, on the weights of ``base``.

    Args:
        base: what stores the weights. look: finds them in a graph that has them; None: ``base`` writes them anew.
    """

    name = "native"

    def __init__(self, base: Lowering, look: Look | None = None) -> None:
        self.base, self._look = base, look

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        types, spec = types_of(site), site.spec
        if provider != "cpu":
            return f"the native kernel runs on a CPU, not on {provider}"
        if self.base.name not in STORAGES:
            return f"the native kernel does not read weights as {self.base.name} stores them"
        if spec.activation not in NATIVE_ACTIVATIONS:
            return f"the native kernel has no activation {spec.activation}"
        wide = sorted({str(d).removeprefix("torch.") for d in vars(types).values() if d != torch.float32})
        if wide:
            return f"the native kernel computes an ONNX graph in float32, and here is {wide[0]}"
        if sizes := banks.refuses_sizes(site):
            return sizes
        size = banks.sizes_of(site)
        if spec.out_of_range == "identity" and size.D != size.H:
            return f"ids beyond the experts add the token itself, and {size.H} is not the output's width {size.D}"
        return self.base.refuses(site, provider)

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        return weights_cost(site, experts_hit(site, tokens), tokens * site.top_k, kernels=1)

    def emit(self, graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
        spec, E, stored = site.spec, site.bank.num_experts, STORAGES[self.base.name]
        look = self._look or _written(graph, site, self.base, x, ids, weights)

        def each(name: str) -> list[Any]:
            return [look(name)] if stored.stacked else [look(name.format(e=e)) for e in range(E)]

        tables = {
            "b_in": stored.b_in if banks.has_b_in(site.bank) else "",
            "b_out": stored.b_out if banks.has_b_out(site.bank) else "",
            "norm": _NORM if spec.out_norm_eps is not None and _has_norm(site) else "",
        }
        constants = [*each(stored.w_in), *each(stored.w_out), *(look(name) for name in tables.values() if name)]
        attributes = {
            "experts": E, "w_in": stored.layout, "w_out": stored.layout, **_function(site, stored),
            **({"stacked": 1} if stored.stacked else {}), **{which: 1 for which, name in tables.items() if name},
        }  # fmt: skip
        return graph.op(OP, [x, ids, weights, *constants], domain=DOMAIN, **attributes)


def _function(site: ExpertsNode, stored: Storage) -> dict[str, Any]:
    """The spec as attributes; what is not there has no effect."""
    spec = site.spec
    rows = "plain" if not spec.gated else "interleaved" if stored.interleaved else "gate|up"
    limits = ("gate_min", "gate_max", "up_min", "up_max", "act_min", "act_max")
    found: dict[str, Any] = {"rows": rows, "activation": spec.activation}
    found |= {name: float(limit) for name in limits if (limit := getattr(spec, name)) is not None}
    numbers = {"alpha": spec.alpha, "norm_eps": spec.out_norm_eps, "up_offset": spec.up_offset or None}
    found |= {name: float(number) for name, number in numbers.items() if number is not None}
    flags = {
        "weight_on_input": spec.weight_on == "input",
        "identity_beyond": spec.out_of_range == "identity",
        "by_expert": spec.combine == "expert",
    }
    return found | {name: 1 for name, on in flags.items() if on}


def _written(
    graph: Builder, site: ExpertsNode, base: Lowering, x: OnnxValue, ids: OnnxValue, weights: OnnxValue
) -> Look:
    """The constants that ``base`` would write, each put into ``graph`` when it is looked for."""
    scratch = Builder(site.name)
    base.emit(scratch, site, x, ids, weights)
    there: Mapping[str, Any] = {value.name: value for value in scratch.initializers}

    def look(name: str) -> OnnxValue:
        value = there[f"{site.name}/{name}"]
        graph.initializers.append(value)
        return value

    return look


def _has_norm(site: ExpertsNode) -> bool:
    return any(site.bank.norm(e) is not None for e in range(site.bank.num_experts))
