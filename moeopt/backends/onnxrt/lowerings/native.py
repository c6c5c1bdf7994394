"""moeopt's own CPU kernel as one node, ``moeopt::Experts``, on the very weights that another lowering stores.

    Nodes      1; its inputs are x, ids, weights and constants: E of W_in and E of W_out, or one stack of each, and
               a table for each of b_in, b_out and norm. Of quantised experts ``moeopt::ExpertsOnCodes``, with codes and
               scales in the place of each matrix
    Numerics   float32; each row and each sum is the reference's, product sums in the kernel's order

The node reads what the other lowering lays down, in its orientation, so a graph of plain ONNX Runtime and one with
this node share a file of weights, and nothing is stored or packed twice. Shape legend: E experts, O columns of W_in,
H hidden, I intermediate, D output width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import DOMAIN, ON_CODES, OP, ExpertsNode
from moeopt.lower.onnx.lowerings import weights as banks
from moeopt.lower.onnx.lowerings.base import Cost, Lowering
from moeopt.lower.onnx.lowerings.codes import is_quantized
from moeopt.lower.onnx.lowerings.types import types_of
from moeopt.lower.onnx.lowerings.weight_reads import experts_hit, weights_cost
from moeopt.ops.native.call import NATIVE_ACTIVATIONS
from moeopt.ops.native.matrices import CODES
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
CODED = ("unrolled-codes", "unrolled-bytes", "unrolled-floats")
"""Lowerings that store codes as the kernel reads them."""
_SCALES = ("float32", "float16", "bfloat16")
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
        quantized = is_quantized(site)
        if self.base.name not in (CODED if quantized else STORAGES):
            return f"the native kernel does not read weights as {self.base.name} stores them"
        if quantized and (reason := _refuses_codes(site, self.base.name)):
            return reason
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
        cost = weights_cost(site, experts_hit(site, tokens), tokens * site.top_k, kernels=1)
        if not is_quantized(site):
            return cost
        return dataclasses.replace(cost, moved=cost.moved * (site.bank.w_out_q.matrix.format.bits + 0.5) / 32)

    def emit(self, graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
        spec, E = site.spec, site.bank.num_experts
        coded = is_quantized(site)
        stored = STORAGES["unrolled" if coded else self.base.name]
        look = self._look or _written(graph, site, self.base, x, ids, weights)

        def each(name: str) -> list[Any]:
            return [look(name)] if stored.stacked else [look(name.format(e=e)) for e in range(E)]

        tables = {
            "b_in": stored.b_in if banks.has_b_in(site.bank) else "",
            "b_out": stored.b_out if banks.has_b_out(site.bank) else "",
            "norm": _NORM if spec.out_norm_eps is not None and _has_norm(site) else "",
        }
        attributes = {"experts": E, **{which: 1 for which, name in tables.items() if name}}
        if coded:
            weights_of = [look(name) for name in _coded_names(site)]
            attributes |= _function(site, _coded_rows(site, self.base.name)) | _storage_of_codes(site)
        else:
            weights_of = [*each(stored.w_in), *each(stored.w_out)]
            rows = "plain" if not spec.gated else "interleaved" if stored.interleaved else "gate|up"
            attributes |= {"w_in": stored.layout, "w_out": stored.layout, **_function(site, rows)}
            attributes |= {"stacked": 1} if stored.stacked else {}
        constants = [*weights_of, *(look(name) for name in tables.values() if name)]
        return graph.op(ON_CODES if coded else OP, [x, ids, weights, *constants], domain=DOMAIN, **attributes)


def _refuses_codes(site: ExpertsNode, base: str) -> str:
    """Why the kernel does not read the codes of ``site`` as the lowering ``base`` stores them; "" where it does."""
    bank = site.bank
    formats = {m.matrix.format for m in (*bank.w_in_q, bank.w_out_q)}
    if len(formats) > 1:
        return "the experts' two matrices are in different formats"
    (format,) = formats
    if (format.codes, format.symmetric, format.packing) not in CODES or format.scale not in _SCALES:
        return f"the native kernel does not read {format} in a graph"
    if format.block[0] != 1:
        return "the native kernel reads scales of single rows"
    if (base, format.bits) in (("unrolled-codes", 8), ("unrolled-bytes", 4)):
        return f"{base} does not store {format}"
    if _coded_rows(site, base) is None:
        return "rows of gate and up lie in another order than their scales or biases"
    return ""


def _coded_rows(site: ExpertsNode, base: str) -> str | None:
    """How gate and up lie in the codes that ``base`` stores; None where codes and scales lie in different orders."""
    spec = site.spec
    if not spec.gated:
        return "plain"
    as_they_lie = base == "unrolled-floats" and not banks.has_b_in(site.bank)  # biases are put in the order gate, up
    return spec.rows if as_they_lie or spec.rows in ("separate", "gate|up") else None


def _coded_names(site: ExpertsNode) -> list[str]:
    """Codes and scales of each matrix, W_in of all experts first, by the names that follow the block's."""
    parts = len(site.bank.w_in_q)
    E = site.bank.num_experts
    firsts = [f"expert.{e}/gate_up" + (f".{n}" if n else "") for e in range(E) for n in range(parts)]
    matrices = [*firsts, *(f"expert.{e}/down" for e in range(E))]
    return [f"{matrix}.{what}" for matrix in matrices for what in ("codes", "scales")]


def _storage_of_codes(site: ExpertsNode) -> dict[str, int]:
    size, format = banks.sizes_of(site), site.bank.w_out_q.matrix.format
    return {"codes": format.bits, "block": format.block[1] or 0, "hidden": size.H, "inner": size.I}


def _function(site: ExpertsNode, rows: str | None) -> dict[str, Any]:
    """The spec as attributes; what is not there has no effect."""
    spec = site.spec
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
