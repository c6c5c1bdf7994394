"""What a kernel is compiled for: an ``ExpertsSpec`` and the dtypes of one call, as one constant argument."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.unfit import Unfit
from moeopt.value_types import TritonDtype

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

TRITON_ACTIVATIONS = (
    "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "mish", "softplus", "swish", "softcap",
    "leaky_relu", "elu", "identity",
)  # fmt: skip
"""The activations that ``pointwise.activate`` has, in the order of its branches."""


class Function(NamedTuple):
    """The constants of the kernels. Dtypes are Triton's; ``x_weight`` is the dtype of x times a routing weight."""

    gated: bool
    activation: str
    alpha: float | None
    gate_min: float | None
    gate_max: float | None
    up_min: float | None
    up_max: float | None
    act_min: float | None
    act_max: float | None
    up_offset: float
    norm_eps: float | None
    norm_weight: bool
    bias_in: bool
    bias_out: bool
    weight_on_input: bool
    identity: bool
    by_expert: bool
    compute: TritonDtype
    act: TritonDtype
    accum: TritonDtype
    x_weight: TritonDtype
    out_weight: TritonDtype
    w_dtype: TritonDtype
    bias_dtype: TritonDtype
    aligned: bool
    precision: str
    widen: bool


class WeightTypes(NamedTuple):
    """What the kernels need to know of the weights beside their addresses."""

    dtype: torch.dtype
    bias_dtype: torch.dtype
    bias_in: bool
    bias_out: bool
    norm_weight: bool
    aligned: bool


@functools.lru_cache(maxsize=1024)
def function(
    spec: ExpertsSpec, x: torch.dtype, weights: torch.dtype, held: WeightTypes, tf32: bool, interpreted: bool
) -> Function:
    """The constants for inputs of these dtypes.

    Args:
        interpreted: whether Triton's interpreter runs the kernels: it takes plain values. The compiler takes constants,
            one for each field: before 3.7 a string of a constant tuple that is handed on is a value.

    Raises:
        Unfit: an activation or a dtype that the kernels do not have.
    """
    if spec.activation not in TRITON_ACTIVATIONS:
        raise Unfit(f"the kernels have no activation {spec.activation}; they have {', '.join(TRITON_ACTIVATIONS)}")
    from triton import language as tl

    known = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    compute, out = (getattr(torch, d) if d else x for d in (spec.compute_dtype, spec.out_dtype))
    act = getattr(torch, spec.act_dtype) if spec.act_dtype else compute
    accum = getattr(torch, spec.accum_dtype) if spec.accum_dtype else out
    for name, dtype in (
        ("x", x), ("routing weights", weights), ("expert weights", held.dtype), ("biases", held.bias_dtype),
        ("compute", compute), ("activation", act), ("accumulator", accum), ("output", out),
    ):  # fmt: skip
        if dtype not in known:
            raise Unfit(f"the {name} dtype is {str(dtype).removeprefix('torch.')}; the kernels have 16 and 32 bits")

    def limit(value: float | None) -> float | None:  # torch converts a limit to the dtype that it clamps in
        return None if value is None else torch.tensor(value, dtype=act, device="cpu").item()

    fields = Function(
        gated=spec.gated,
        activation=spec.activation,
        alpha=spec.alpha,
        gate_min=limit(spec.gate_min),
        gate_max=limit(spec.gate_max),
        up_min=limit(spec.up_min),
        up_max=limit(spec.up_max),
        act_min=limit(spec.act_min),
        act_max=limit(spec.act_max),
        up_offset=spec.up_offset,
        norm_eps=spec.out_norm_eps,
        norm_weight=held.norm_weight,
        bias_in=held.bias_in,
        bias_out=held.bias_out,
        weight_on_input=spec.weight_on == "input",
        identity=spec.out_of_range == "identity",
        by_expert=spec.combine == "expert",
        compute=known[compute],
        act=known[act],
        accum=known[accum],
        x_weight=known[torch.promote_types(x, weights)],
        out_weight=known[torch.promote_types(compute, weights)],
        w_dtype=known[held.dtype],
        bias_dtype=known[held.bias_dtype],
        aligned=held.aligned,
        precision="tf32" if tf32 and compute == torch.float32 else "ieee",
        widen=interpreted and compute == torch.bfloat16,
    )
    return fields if interpreted else Function(*map(tl.constexpr, fields))
