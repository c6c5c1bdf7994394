"""``TRT_MoE``, which the parser reads as an ``IMoELayer``: gated experts for sm_100, sm_103 and sm_110.

    y_BSH = TRT_MoE(x_BSH, ids_BSK int32, scores_BSK, gate_EHI, up_EHI, down_EIH, (b_gate_EI, b_up_EI, b_down_EH)?)
          = sum over K of score * down(act(gate(x)) * up(x))         activation_type 1: SiLU, 0: none

Where a softmax top-k chose the ids, so each is within 0..E-1, the K experts of a token go in together. Else each
pair of token and expert is a row with K = 1 and score 1: an id that names no expert is sent to expert 0 and its row
is replaced after the layer, so that nothing leaks; weights on the input, norms and wide accumulators work as well.
Shape legend: B = 1 batch, S = T tokens or N = T K pairs, E experts, K chosen, H hidden, I intermediate.

    Nodes      one TRT_MoE and about 5, or about 15 by pairs, for any E
    Numerics   known from NVIDIA's guide only: it was parsed and not run
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.backends.tensorrt.capability import MOE_TARGETS
from moeopt.backends.tensorrt.cost import GEMM_ROOM, routed_flops, sizes_for
from moeopt.backends.tensorrt.lowerings import pairs
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import middle
from moeopt.lower.onnx.lowerings import weights as banks
from moeopt.lower.onnx.lowerings.base import Cost
from moeopt.lower.onnx.lowerings.types import cast, scalar, types_of, wide
from moeopt.lower.onnx.lowerings.weight_reads import experts_hit
from moeopt.value_types import OnnxValue

DOMAIN, OP = "trt", "TRT_MoE"
ACTIVATIONS = {"identity": 0, "silu": 1}
"""``activation_type`` of the activations that the layer has."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TrtMoE:
    """The lowering ``"trt-moe"``."""

    name = "trt-moe"

    def refuses(self, site: ExpertsNode, provider: str) -> str:
        spec, types = site.spec, types_of(site)
        if provider not in {f"sm_{sm}" for sm in MOE_TARGETS}:
            return f"IMoELayer is for {', '.join(f'sm_{sm}' for sm in MOE_TARGETS)}, not {provider}"
        if not spec.gated:
            return "IMoELayer has gated experts only (gate and up); these have one input weight"
        if spec.activation not in ACTIVATIONS:
            return f"IMoELayer has the activations silu and none, not {spec.activation}"
        limits = ("gate_min", "gate_max", "up_min", "up_max", "act_min", "act_max")
        clamped = [name for name in limits if getattr(spec, name) is not None]
        if clamped or spec.up_offset:
            what = ", ".join([*clamped, *(["up_offset"] if spec.up_offset else [])])
            return f"the experts have {what}; NVIDIA's page on MoE says its swiglu parameters are not supported yet"
        if types.compute not in _DTYPES:
            return f"IMoELayer computes in float32, float16 or bfloat16, not {types.compute}"
        if types.act not in (types.compute, wide(types.compute)):
            return f"the activation runs in {types.act}, and IMoELayer's in the dtype of its matmuls"
        if why := banks.refuses_sizes(site):
            return why
        size = banks.sizes_of(site)
        if size.D != size.H:
            return f"IMoELayer's output is as wide as its input, {size.H}; these experts give {size.D}"
        return ""

    def cost(self, site: ExpertsNode, tokens: int, provider: str) -> Cost:
        s = sizes_for(site, tokens)
        moved = experts_hit(site, s.T) * s.expert + 2 * s.N * s.row
        return Cost(moved, routed_flops(s), kernels=6, memory=s.N * s.row + GEMM_ROOM)

    def emit(self, graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
        return _together(graph, site, x, ids, weights) if together(site) else _by_pairs(graph, site, x, ids, weights)


def together(site: ExpertsNode) -> bool:
    """Whether the layer may weigh and sum a token's K experts itself."""
    spec, types = site.spec, types_of(site)
    plain = spec.weight_on == "output" and spec.out_norm_eps is None and spec.out_of_range == "nothing"
    same = types.weights == types.compute and types.accum in (types.compute, wide(types.compute))
    within = site.router is not None and site.router.num_experts == site.bank.num_experts
    return within and plain and same


def _together(graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
    types = types_of(site)
    ends = [cast(graph, x, types.x, types.compute), ids, weights]
    y_TH = _layer(graph, site, *[graph.op("Unsqueeze", [end, graph.const([0], "int64")]) for end in ends])
    return cast(graph, y_TH, types.compute, types.out)


def _by_pairs(graph: Builder, site: ExpertsNode, x: OnnxValue, ids: OnnxValue, weights: OnnxValue) -> OnnxValue:
    types, size, K = types_of(site), banks.sizes_of(site), site.top_k

    def reshaped(value: OnnxValue, *shape: int) -> OnnxValue:
        return graph.op("Reshape", [value, graph.const(shape, "int64")])

    named_TK = pairs.named(graph, site, ids)
    index_TK = graph.op("Where", [named_TK, ids, graph.const(0, "int64")], name="expert_or_first")
    x_TKH = pairs.rows(graph, site, x, weights)
    index_1N1 = reshaped(index_TK, 1, -1, 1)
    one = graph.op("Expand", [scalar(graph, 1.0, types.compute), graph.op("Shape", [index_1N1])])
    o_NH = _layer(graph, site, reshaped(x_TKH, 1, -1, size.H), index_1N1, one)
    o_TKH = reshaped(o_NH, -1, K, size.D)
    if site.spec.out_norm_eps is not None:
        table = banks.norm_table(graph, site, wide(types.compute))
        norm = None if table is None else graph.op("Gather", [table, index_TK], axis=0)
        o_TKH = middle.rms_norm(graph, site, o_TKH, norm, axis=2)
    return pairs.combine(graph, site, named_TK, ids, o_TKH, x, weights)


def _layer(graph: Builder, site: ExpertsNode, x_1SH: OnnxValue, ids_1SK: OnnxValue, scores_1SK: OnnxValue) -> OnnxValue:
    """The node on rank-3 inputs, and its output as (S, H)."""
    import onnx_ir as ir

    ids_1SK = graph.op("Cast", [ids_1SK], to=int(ir.DataType.INT32))
    bank, spec, size, compute = site.bank, site.spec, banks.sizes_of(site), types_of(site).compute

    def whole(name: str, read: OnnxValue, *shape: int) -> OnnxValue:
        def stacked() -> Tensor:
            return torch.stack([read(e).detach().to(compute).cpu() for e in range(size.E)])

        return graph.weight(name, stacked, compute, (size.E, *shape))

    def half(read: OnnxValue, which: int) -> OnnxValue:
        return lambda e: read(e).chunk(2, dim=-1)[which]

    def w_in(e: int) -> Tensor:
        return banks.w_in_HO(bank, e, spec)

    def b_in(e: int) -> Tensor:
        return banks.b_in_O(bank, e, spec, size.O, compute)

    inputs = [x_1SH, ids_1SK, scores_1SK]
    inputs += [whole(f"{name}.weight", half(w_in, n), size.H, size.I) for n, name in enumerate(("gate", "up"))]
    inputs.append(whole("down.weight", lambda e: banks.w_out_ID(bank, e, spec), size.I, size.D))
    if banks.has_b_in(bank) or banks.has_b_out(bank):  # all three or none
        inputs += [whole(f"{name}.bias", half(b_in, n), size.I) for n, name in enumerate(("gate", "up"))]
        inputs.append(whole("down.bias", lambda e: _or_zeros(bank.b_out(e), size.D), size.D))
    y_1SH = graph.op(
        OP, inputs, domain=DOMAIN, name="experts", activation_type=ACTIVATIONS[spec.activation], quantization_mode=0
    )
    return graph.op("Squeeze", [y_1SH, graph.const([0], "int64")])


def _or_zeros(b: Tensor | None, width: int) -> Tensor:
    return torch.zeros(width) if b is None else b
