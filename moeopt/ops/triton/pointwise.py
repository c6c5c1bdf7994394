"""Activations, clamps and roundings inside a tile, as ``moeopt.ops.activations`` has them.

All arithmetic is float32; ``rounded`` stands wherever eager PyTorch would have stored a 16-bit tensor. Functions of
``exp`` near zero (tanh, expm1, log1p) are sums of a series there, since the plain formulas cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(v, DTYPE: tl.constexpr):
    """``v`` as a tensor of ``DTYPE`` would hold it, in float32."""
    if DTYPE == tl.float32:  # noqa: SIM300  Triton compares a constant with its own
        return v
    else:
        return v.to(DTYPE).to(tl.float32)


@triton.jit
def clamp(v, LOW: tl.constexpr, HIGH: tl.constexpr):
    """``torch.clamp``: NaN stays NaN, which ``tl.maximum`` would replace."""
    if LOW is not None:
        v = tl.where(v < LOW, LOW, v)
    if HIGH is not None:
        v = tl.where(v > HIGH, HIGH, v)
    return v


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def tanh(v):
    # below 0.5 the odd series of tanh to v^13 (relative error 6e-8); above, no digits cancel in 1 - 2/(e^2v + 1)
    z = v * v
    tail = 1382.0 / 155925.0 - z * (21844.0 / 6081075.0 - z * (929569.0 / 638512875.0))
    series = v * (1.0 - z * (1.0 / 3.0 - z * (2.0 / 15.0 - z * (17.0 / 315.0 - z * (62.0 / 2835.0 - z * tail)))))
    size = tl.abs(v)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.5, series, tl.where(v < 0.0, -far, far))


@triton.jit
def expm1(v):
    # below 0.5 the series of exp without its 1, to v^9 (relative error 3e-9); above, e^v - 1 loses under 2 bits
    tail = 1.0 / 720.0 + v * (1.0 / 5040.0 + v * (1.0 / 40320.0 + v / 362880.0))
    series = v * (1.0 + v * (0.5 + v * (1.0 / 6.0 + v * (1.0 / 24.0 + v * (1.0 / 120.0 + v * tail)))))
    return tl.where(tl.abs(v) < 0.5, series, tl.exp(v) - 1.0)


@triton.jit
def softplus(v):
    # log1p(y) = 2 atanh(y / (2 + y)) for y = exp(-|v|) in (0, 1]: a series in s^2 <= 1/9 (relative error 1e-8)
    y = tl.exp(-tl.abs(v))
    s = y / (2.0 + y)
    z = s * s
    tail = 1.0 / 9.0 + z * (1.0 / 11.0 + z * (1.0 / 13.0 + z * (1.0 / 15.0)))
    log1p = 2.0 * s * (1.0 + z * (1.0 / 3.0 + z * (1.0 / 5.0 + z * (1.0 / 7.0 + z * tail))))
    return tl.where(v > 0.0, v, 0.0 * v) + log1p


@triton.jit
def activate(g, NAME: tl.constexpr, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    """The activation ``NAME`` of float32 values that ``DTYPE`` can hold, rounded after each of its operations."""
    if NAME == "silu":
        return rounded(g / (1.0 + tl.exp(-g)), DTYPE)
    elif NAME == "gelu":
        return rounded(0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476)), DTYPE)
    elif NAME == "gelu_tanh":
        return rounded(0.5 * g * (1.0 + tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))), DTYPE)
    elif NAME == "relu":
        return tl.where(g < 0.0, 0.0, g)
    elif NAME == "relu2":
        r = tl.where(g < 0.0, 0.0, g)
        return rounded(r * r, DTYPE)
    elif NAME == "sigmoid":
        return rounded(sigmoid(g), DTYPE)
    elif NAME == "tanh":
        return rounded(tanh(g), DTYPE)
    elif NAME == "mish":
        return rounded(g * tanh(softplus(g)), DTYPE)
    elif NAME == "softplus":
        return rounded(softplus(g), DTYPE)
    elif NAME == "swish":
        return rounded(g * rounded(sigmoid(rounded(g * ALPHA, DTYPE)), DTYPE), DTYPE)
    elif NAME == "softcap":
        return rounded(ALPHA * rounded(tanh(rounded(g / ALPHA, DTYPE)), DTYPE), DTYPE)
    elif NAME == "leaky_relu":
        return rounded(tl.where(g > 0.0, g, g * ALPHA), DTYPE)
    elif NAME == "elu":
        return rounded(tl.where(g > 0.0, g, expm1(g) * ALPHA), DTYPE)
    else:
        tl.static_assert(NAME == "identity", "an activation that this file does not have")
        return g


@triton.jit
def middle(g, u, F: tl.constexpr):
    """What stands between the two matmuls: float32 ``g`` and ``u`` (with their biases) to float32 values of COMPUTE.

    ``F`` is the function's constants, see ``launch.constants``; a plain expert has no ``u`` and passes ``g`` twice.
    """
    a = rounded(rounded(g, F.compute), F.act)
    a = clamp(a, F.gate_min, F.gate_max)
    a = clamp(activate(a, F.activation, F.alpha, F.act), F.act_min, F.act_max)
    if F.gated:
        b = clamp(rounded(rounded(u, F.compute), F.act), F.up_min, F.up_max)
        if F.up_offset != 0.0:
            b = rounded(b + F.up_offset, F.act)
        a = rounded(a * b, F.act)
    return rounded(a, F.compute)
