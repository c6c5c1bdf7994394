"""com.microsoft::MoE, whose router takes logits: two ways to make it compute with given ids and weights.

    masked log   logits[t, e] = log(w / max w) where e is chosen, -1000 elsewhere;  y = MoE(x) * sum of w
    expand       T K rows with K = 1 and one-hot logits: the kernel's weight is exactly 1;  y = sum_k w * MoE(x)

The masked log needs w >= 0. Dividing by the largest weight first keeps the log's rounding small: a ratio r
is off by r |log r| <= 0.37 eps, whatever the weights' size. A chosen weight below exp(-200) of the largest
counts as zero, and the kernel skips an expert whose softmax is zero, so nothing leaks out of experts that
only fill up K. Shape legend: T tokens, K chosen per token, E experts, H hidden, O columns of W_in, I intermediate.

    Nodes      one MoE and about 20 (masked log) or 15 (expand) small ones, for any E
    Layout     fc1 (E, O, H), gate and up rows interleaved; fc2 (E, H, I)
    Numerics   each expert's row is rounded in the kernel's order; the sum over K runs in float32
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeopt.backends.onnxrt.capability import DOMAIN, capability
from moeopt.ir.specs import ExpertsSpec
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import middle, table
from moeopt.lower.onnx.lowerings import weights as banks
from moeopt.lower.onnx.lowerings.base import Cost
from moeopt.lower.onnx.lowerings.types import cast, refuses_types, scalar, types_of, wide
from moeopt.lower.onnx.lowerings.weight_reads import experts_hit, weights_cost
from moeopt.value_types import OnnxValue

NOT_CHOSEN, FAINTEST = -1000.0, -200.0
"""Logits of experts that are not chosen, and the lowest of chosen ones: both give a softmax of exactly 0."""

_KIND = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.float64: "DOUBLE"}


class MaskedLog:
    """The lowering ``"moe-masked-log"``: K experts at once, for routers whose weights cannot be negative."""

    name = "moe-masked-log"

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        spec, types = site.spec, types_of(site)
        if site.router is None:
            return "no softmax router was recognised, so weights may be negative; moe-expand carries those"
        if spec.weight_on == "input":
            return "weights multiply the input, and the kernel multiplies the output; moe-expand carries this"
        if spec.out_of_range == "identity":
            return "ids beyond the experts add the token itself; moe-expand carries this"
        if spec.out_norm_eps is not None:
            return "a norm follows each expert before the sum; moe-expand carries this"
        if wide(types.accum) != wide(types.compute) or wide(types.term) != wide(types.compute):
            return f"the sum runs in {types.accum} and the kernel's in float32; moe-expand carries this"
        return refuses_kernel(site, provider)

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        return kernel_cost(site, tokens, provider)

    def emit(self, graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
        types = types_of(site)
        inner = wide(types.weights)
        experts = graph.const([1], "int64")  # not -1: over no tokens, ONNX Runtime 1.31 reduces nothing along axis -1
        chosen = table.chosen_TKE(graph, site, ids)
        w_TE = cast(graph, table.weights_TE(graph, site, chosen, weights), types.weights, inner)
        zero = scalar(graph, 0.0, inner)
        top_T1 = graph.op("ReduceMax", [w_TE, experts], keepdims=1)
        size_T1 = graph.op("Where", [graph.op("Greater", [top_T1, zero]), top_T1, scalar(graph, 1.0, inner)])
        part_TE = graph.op("Div", [w_TE, size_T1], name="share_of_largest")
        floor = scalar(graph, FAINTEST, inner)
        # a NaN weight stays out of the logits (it would scramble the top-k) and comes back through the sum
        log_TE = graph.op("Log", [part_TE])
        log_TE = graph.op("Where", [graph.op("Greater", [log_TE, floor]), log_TE, floor])
        nobody = scalar(graph, NOT_CHOSEN, inner)
        any_TE = table.any_slot_TE(graph, chosen)
        logits_TE = graph.op("Where", [any_TE, log_TE, nobody], name="masked_log")
        y_TH = kernel(graph, site, cast(graph, x, types.x, types.compute), cast(graph, logits_TE, inner, types.compute))
        y_TH = cast(graph, y_TH, types.compute, inner)
        y_TH = graph.op("Mul", [y_TH, graph.op("ReduceSum", [part_TE, experts], keepdims=1)])
        y_TH = graph.op("Mul", [y_TH, size_T1])
        # a token that names no expert gets K arbitrary ones from the kernel, which may overflow
        names_T1 = graph.op("Greater", [graph.op("ReduceMax", [logits_TE, experts], keepdims=1), nobody])
        return cast(graph, graph.op("Where", [names_T1, y_TH, zero], name="expert_or_none"), inner, types.out)


class Expand:
    """The lowering ``"moe-expand"``: one row for each token and slot, any weights, on the output or the input."""

    name = "moe-expand"

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        return refuses_kernel(site, provider)

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        return kernel_cost(site, tokens, provider)

    def emit(self, graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
        spec, types, size = site.spec, types_of(site), banks.sizes_of(site)

        def int64(value: OnnxValue) -> OnnxValue:
            return graph.const(value, "int64")

        w_TK1 = graph.op("Unsqueeze", [weights, int64([-1])])
        x_T1H = graph.op("Unsqueeze", [x, int64([1])])
        if spec.weight_on == "input" or spec.out_of_range == "identity":
            scaled_TKH = graph.op(
                "Mul",
                [
                    cast(graph, x_T1H, types.x, types.input_term),
                    cast(graph, w_TK1, types.weights, types.input_term),
                ],
                name="weighted_input",
            )
        if spec.weight_on == "input":
            x_TKH = cast(graph, scaled_TKH, types.input_term, types.compute)
        else:
            x_TKH = graph.op("Expand", [cast(graph, x_T1H, types.x, types.compute), int64([1, site.top_k, 1])])
        chosen = table.chosen_TKE(graph, site, ids)
        off, on = scalar(graph, NOT_CHOSEN, types.compute), scalar(graph, 0.0, types.compute)
        logits_TKE = graph.op("Where", [chosen, on, off], name="one_hot_logits")
        x_NH = graph.op("Reshape", [x_TKH, int64([-1, size.H])])
        o_NH = kernel(graph, site, x_NH, graph.op("Reshape", [logits_TKE, int64([-1, size.E])]), k=1)
        o_TKH = graph.op("Reshape", [o_NH, int64([-1, site.top_k, size.D])])
        if spec.out_norm_eps is not None:
            norm = banks.norm_table(graph, site, wide(types.compute))
            row = None if norm is None else graph.op("Gather", [norm, _row_of(graph, site, ids)], axis=0)
            o_TKH = middle.rms_norm(graph, site, o_TKH, row, axis=2)
        if spec.weight_on == "output":
            w_term = cast(graph, w_TK1, types.weights, types.term)
            o_TKH = graph.op("Mul", [cast(graph, o_TKH, types.compute, types.term), w_term], name="weighted")
        o_TKH = cast(graph, o_TKH, types.term, types.accum)
        if spec.out_of_range == "identity":
            rest = cast(graph, scaled_TKH, types.input_term, types.accum)
            beyond = graph.op("GreaterOrEqual", [ids, int64(size.E)])
            rest = graph.op("Where", [_last(graph, beyond), rest, scalar(graph, 0.0, types.accum)])
        else:
            rest = scalar(graph, 0.0, types.accum)
        o_TKH = graph.op("Where", [_last(graph, _named(graph, site, ids)), o_TKH, rest], name="expert_or_none")
        y_TH = graph.op("ReduceSum", [o_TKH, int64([1])], keepdims=0, name="sum_over_chosen")
        return cast(graph, y_TH, types.accum, types.out)


def kernel(graph: Builder, site: ExpertsNode, x: OnnxValue, logits: OnnxValue, k: int | None = None) -> OnnxValue:
    """The MoE node with its weights; ``x`` and ``logits`` in the compute dtype."""
    inputs = [x, logits, *_weights(graph, site)]
    while inputs[-1] is None:
        inputs.pop()
    attributes = {"k": k or site.top_k, "normalize_routing_weights": 1, **(kernel_activation(site.spec) or {})}
    return graph.op("MoE", inputs, domain=DOMAIN, **attributes)


def kernel_activation(spec: ExpertsSpec) -> dict[str, Any] | None:
    """The attributes with which the kernel computes the middle of ``spec``; None when none do."""
    if spec.act_min is not None or spec.act_max is not None:
        return None
    limits = (spec.gate_min, spec.gate_max, spec.up_min, spec.up_max)
    if not spec.gated:
        # the kernel's "gelu" is the tanh form
        names = {"silu": "silu", "gelu_tanh": "gelu", "relu": "relu", "identity": "identity"}
        fits = spec.activation in names and limits == (None,) * 4
        return {"activation_type": names[spec.activation]} if fits else None
    if spec.activation not in ("silu", "swish"):
        return None
    alpha = 1.0 if spec.alpha is None or spec.activation == "silu" else float(spec.alpha)
    found = {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": alpha,
        "activation_beta": float(spec.up_offset),
    }
    if limits == (None,) * 4:
        return found
    high = spec.gate_max
    if high is None or high <= 0 or limits != (None, high, -high, high):
        return None
    return {**found, "swiglu_limit": float(high)}


def kernel_cost(site: ExpertsNode, tokens: int, provider: str) -> Cost:
    """What the MoE kernel and the small nodes around the kernel do."""
    hit, rows = experts_hit(site, tokens), float(tokens * site.top_k)
    # on CPU the kernel lays weights out anew at each call, once an expert has more than one row
    slowdown = 1.5 if rows > hit and provider == "cpu" else 1.0
    return weights_cost(site, hit, rows, kernels=30, slowdown=slowdown)


def refuses_kernel(site: ExpertsNode, provider: str) -> str:
    """Why the MoE kernel of ``provider`` cannot carry the experts of ``site``, whatever the router; "" when it can."""
    row = capability(provider, "MoE")
    if row is None or not row.dtypes:
        return f"{provider} has no com.microsoft::MoE kernel" + (f" ({row.evidence})" if row else "")
    spec, types, attributes = site.spec, types_of(site), kernel_activation(site.spec)
    kind = _KIND[types.compute]
    if kind not in row.dtypes:
        return f"the MoE kernel of {provider} computes in {', '.join(row.dtypes)}, not {kind}"
    if types.act not in (types.compute, wide(types.compute)):
        return f"activations run in {types.act} and the MoE kernel's in {types.compute}"
    if attributes is None:
        return f"the MoE kernel has no such activation and clamps: {spec}"
    name = attributes["activation_type"]
    if name in row.wrong:
        return f"activation {name}: {row.wrong[name]}"
    sizes = banks.refuses_sizes(site)
    if sizes:
        return sizes
    size = banks.sizes_of(site)
    if size.D != size.H:
        return f"the MoE kernel's output is as wide as its input; here {size.H} becomes {size.D}"
    for width in (size.H, size.I):
        if why := row.refuses_width(width, kind):
            return why
    if site.top_k > size.E:
        return f"the MoE kernel picks k <= E experts; here k is {site.top_k} of {size.E}"
    return refuses_types(site, provider)


def _weights(graph: Builder, site: ExpertsNode) -> list[Any]:
    """fc1, its bias, fc2, its bias."""
    bank, spec, size, compute = site.bank, site.spec, banks.sizes_of(site), types_of(site).compute

    def fc1() -> Tensor:
        return torch.stack([_rows(banks.w_in_HO(bank, e, spec), spec).t().to(compute) for e in range(size.E)])

    def fc1_bias() -> Tensor:
        rows = [_rows(banks.b_in_O(bank, e, spec, size.O, compute), spec) for e in range(size.E)]
        return torch.stack([row.to(compute) for row in rows])

    def fc2() -> Tensor:
        return torch.stack([banks.w_out_ID(bank, e, spec).t().to(compute) for e in range(size.E)])

    def fc2_bias() -> Tensor:
        rows = [bank.b_out(e) for e in range(size.E)]
        return torch.stack([torch.zeros(size.D, dtype=compute) if b is None else b.to(compute) for b in rows])

    return [
        graph.weight("fc1.weight", fc1, compute, (size.E, size.O, size.H)),
        graph.weight("fc1.bias", fc1_bias, compute, (size.E, size.O)) if banks.has_b_in(bank) else None,
        graph.weight("fc2.weight", fc2, compute, (size.E, size.D, size.I)),
        graph.weight("fc2.bias", fc2_bias, compute, (size.E, size.D)) if banks.has_b_out(bank) else None,
    ]


def _rows(columns: Tensor, spec: ExpertsSpec) -> Tensor:
    """Gate columns then up columns, interleaved: g0, u0, g1, u1, ..."""
    if not spec.gated:
        return columns
    g, u = columns.chunk(2, dim=-1)
    return torch.stack([g, u], dim=-1).flatten(-2)


def _named(graph: Builder, site: ExpertsNode, ids: OnnxValue) -> OnnxValue:
    """True where an id names an expert."""
    E = site.bank.num_experts
    above = graph.op("GreaterOrEqual", [ids, graph.const(0, "int64")])
    return graph.op("And", [above, graph.op("Less", [ids, graph.const(E, "int64")])])


def _row_of(graph: Builder, site: ExpertsNode, ids: OnnxValue) -> OnnxValue:
    """The id where it names an expert, else E: the last row of a table of E + 1."""
    return graph.op("Where", [_named(graph, site, ids), ids, graph.const(site.bank.num_experts, "int64")])


def _last(graph: Builder, value: OnnxValue) -> OnnxValue:
    return graph.op("Unsqueeze", [value, graph.const([-1], "int64")])
