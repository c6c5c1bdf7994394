"""The dtypes that an emitted expert computes in, and the casts between them; what the reference rounds, nodes round."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeopt.ir.activations import activation_of
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.value_types import OnnxValue

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Types:
    """The dtypes of one site, as :func:`moeopt.ops.reference.experts_reference` uses them.

    Args:
        x: of the tokens.
        compute: of both GEMMs.
        act: of activation and gate product.
        weights: of the routing weights.
        term: of one expert's output times its weight.
        input_term: of ``x`` times a weight.
        accum: of the sum over a token's K terms.
        out: of the result.
    """

    x: torch.dtype
    compute: torch.dtype
    act: torch.dtype
    weights: torch.dtype
    term: torch.dtype
    input_term: torch.dtype
    accum: torch.dtype
    out: torch.dtype


def types_of(site: ExpertsNode) -> Types:
    """What ``site.spec`` means for ``site.dtype``."""
    spec = site.spec
    compute = _named(spec.compute_dtype, site.dtype)
    out = _named(spec.out_dtype, site.dtype)
    term = torch.promote_types(compute, site.weights_dtype) if spec.weight_on == "output" else compute
    return Types(
        x=site.dtype,
        compute=compute,
        act=_named(spec.act_dtype, compute),
        weights=site.weights_dtype,
        term=term,
        input_term=torch.promote_types(site.dtype, site.weights_dtype),
        accum=_named(spec.accum_dtype, out),
        out=out,
    )


def refuses_types(site: ExpertsNode, provider: str) -> str:
    """Why the dtypes of ``site`` have no kernels on ``provider``, or ""."""
    types = types_of(site)
    used = {types.compute, types.act, types.term, types.accum}
    if site.spec.weight_on == "input" or site.spec.out_of_range == "identity":
        used.add(types.input_term)
    if provider == "cpu" and torch.bfloat16 in used:
        return (
            "ONNX Runtime's CPU provider has no bfloat16 MatMul, Mul or Add (NOT_IMPLEMENTED); "
            "export a float32 copy of the model, or run on CUDA"
        )
    if types.act == torch.float64 and not activation_of(site.spec.activation).onnx_float64:
        return f"ONNX Runtime has no float64 kernel for {site.spec.activation}; export a float32 copy of the model"
    return ""


def cast(graph: Builder, value: OnnxValue, have: torch.dtype, want: torch.dtype) -> OnnxValue:
    """``value`` in dtype ``want``; no node when it has it."""
    if have == want:
        return value
    from onnx_ir.tensor_adapters import from_torch_dtype

    return graph.op("Cast", [value], to=int(from_torch_dtype(want)))


def scalar(graph: Builder, value: float, dtype: torch.dtype) -> OnnxValue:
    """A rank-0 constant in ``dtype``; bfloat16 ones are cast from float32."""
    if dtype == torch.bfloat16:
        return cast(graph, graph.const(value, "float32"), torch.float32, dtype)
    return graph.const(value, str(dtype).removeprefix("torch."))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which PyTorch works inside one elementwise operation: float32 for the half types."""
    return torch.float32 if dtype in _HALF else dtype


def _named(name: str | None, default: torch.dtype) -> torch.dtype:
    return getattr(torch, name) if name else default
