"""``moeopt::quantized_experts``: the experts op on codes and scales, entered through ``moeopt.ops.experts``.

    y = experts(x, ids, weights, dequantize(W_in), dequantize(W_out), ...)

One expert at a time becomes floats, when it is hit; the float weights of the others never exist. The op computes what
``moeopt::experts`` does on the dequantised weights, in the compute dtype of the spec.

Schema: as ``moeopt::experts``, but ``w_in`` and ``w_out`` are codes, then scales, then zero points, each one stacked
tensor or E tensors (gate's before up's where there are two), and ``formats`` is a ``BankFormat``. Gradients go to x,
the routing weights, biases and norms; codes and scales have none.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from moeopt.errors import UsageError
from moeopt.ir.bank_format import BankFormat, MatrixFormat
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import Biases
from moeopt.ops.native.call import transformed
from moeopt.ops.native.dispatch import quantized_on_cpu
from moeopt.ops.op_registration import BANK_LISTS, gradients_by_autograd, register_experts_op
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices, check_bank
from moeopt.ops.recorded import recorded
from moeopt.ops.reference import dtypes, experts_reference

decode_spec = functools.lru_cache(ExpertsSpec.decode)
decode_formats = functools.lru_cache(BankFormat.decode)


def quantized_experts(
    x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: QuantizedExpertWeights, spec: ExpertsSpec, traced: bool
) -> Tensor:
    """As :func:`moeopt.ops.experts.experts`, of which this is the part for quantised experts.

    Args:
        traced: whether a tracer looks on: then the call is one ``torch.ops.moeopt.quantized_experts``.

    Raises:
        UsageError: shapes or formats that do not fit; the message names them.
    """
    needs_grad = _needs_grad(x_TH, weights_TK, bank)
    if traced or (needs_grad and transformed()):
        op = torch.ops.moeopt.quantized_experts
        y_TH: Tensor = op(x_TH, ids_TK, weights_TK, *flatten(bank), spec.text, bank.format.text)
        return y_TH
    if needs_grad:
        now = getattr(bank, "now", None)  # a bank that is read anew by each look at a part of it
        lists = flatten(bank if now is None else now())
        gradients = functools.partial(_gradients_of, [len(part) for part in lists], (spec.text, bank.format.text))
        held = [t for part in lists for t in part]
        return recorded(
            "moeopt::quantized_experts",
            lambda: (run(x_TH, ids_TK, weights_TK, bank, spec), None),
            lambda grad, saved, needs, kept: gradients(grad, saved, needs),
            x_TH, ids_TK, weights_TK, held,
        )  # fmt: skip
    return run(x_TH, ids_TK, weights_TK, bank, spec)


def _needs_grad(x: Tensor, weights: Tensor, bank: QuantizedExpertWeights) -> bool:
    """Whether x, the routing weights, or what of the bank is floats, wants a gradient."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or weights.requires_grad or bank.wants_gradient


def run(x: Tensor, ids: Tensor, weights: Tensor, bank: QuantizedExpertWeights, spec: ExpertsSpec) -> Tensor:
    """The kernel for the device of ``x``, or the definition where there is none."""
    device = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return run(x, ids, weights, bank, spec)
    bank = in_spec(bank, spec, dtypes(x, spec)[0])
    if device == "cpu" and not transformed():
        return quantized_on_cpu(x, ids, weights, bank, spec)
    check_bank(bank, spec)
    return experts_reference(x, ids, weights, bank, spec)


def in_spec(bank: QuantizedExpertWeights, spec: ExpertsSpec, dtype: torch.dtype) -> QuantizedExpertWeights:
    """``bank``, handing out matrices as ``spec`` has them, in ``dtype``; in 32 bits at least to rounded rows."""
    wide = torch.promote_types(dtype, torch.float32) if bank.rounds else dtype
    return bank.handed_out((spec.w_in_layout, spec.w_out_layout), wide)


def flatten(bank: QuantizedExpertWeights) -> tuple[list[Tensor], ...]:
    """The bank as the op's five lists."""
    return (
        [t for matrices in bank.w_in_q for t in matrices.flat()],
        bank.w_out_q.flat(),
        _vectors([b for part in bank.b_in_l for b in (part if part is not None else [None] * bank.num_experts)]),
        _vectors(bank.b_out_l),
        _vectors(bank.norm_l),
    )


def unflatten(lists: Sequence[Sequence[Tensor]], formats: BankFormat) -> QuantizedExpertWeights:
    """The inverse of :func:`flatten`, on the same tensors; ``UsageError`` where they are not as ``formats`` says."""
    w_in, w_out, b_in, b_out, norm = (part or [] for part in lists)
    E, rest = formats.experts, list(w_in)
    ins = [_taken(rest, matrix, E) for matrix in formats.w_in]
    out_rest = list(w_out)
    w_out_q = _taken(out_rest, formats.w_out, E)
    if rest or out_rest:
        raise UsageError(f"quantised experts: {len(rest) + len(out_rest)} more tensors than their formats have")
    if len(b_in) not in (0, E * len(ins)):
        raise UsageError(f"quantised experts: {len(b_in)} first biases for {E} experts with {len(ins)} matrices each")
    ins_b = [_present(b_in[i * E : (i + 1) * E]) for i in range(len(ins))] if b_in else None
    return QuantizedExpertWeights(ins, w_out_q, ins_b, _present(b_out), _present(norm), format=formats)


def _taken(rest: list[Tensor], matrix: MatrixFormat, experts: int) -> QuantizedMatrices:
    """The tensors of one matrix of all experts, taken from the front of ``rest``."""
    each = 1 if matrix.stacked else experts
    parts = []
    for _ in matrix.parts:
        parts.append(rest[:each])
        del rest[:each]
    return QuantizedMatrices(matrix, experts, parts)


def _vectors(parts: Biases | None) -> list[Tensor]:
    """Biases as a list of tensors, of which an empty one is absent."""
    some = next((p for p in parts or () if p is not None), None)
    return [] if some is None else [some.new_empty(0) if p is None else p for p in parts or ()]


def _present(parts: Sequence[Tensor]) -> list[Tensor | None] | None:
    return [t if t.numel() else None for t in parts] or None


def _op(
    x: Tensor, ids: Tensor, weights: Tensor, w_in: list[Tensor], w_out: list[Tensor], b_in: list[Tensor],
    b_out: list[Tensor], norm: list[Tensor], spec: str, formats: str,
) -> Tensor:  # fmt: skip
    with torch.no_grad():
        bank = unflatten((w_in, w_out, b_in, b_out, norm), decode_formats(formats))
        return run(x, ids, weights, bank, decode_spec(spec))


def _fake(
    x: Tensor, ids: Tensor, weights: Tensor, w_in: list[Tensor], w_out: list[Tensor], b_in: list[Tensor],
    b_out: list[Tensor], norm: list[Tensor], spec: str, formats: str,
) -> Tensor:  # fmt: skip
    known, name = decode_formats(formats), decode_spec(spec).out_dtype
    return x.new_empty(x.shape[0], known.w_out.shape[0], dtype=getattr(torch, name) if name else x.dtype)


def _backward(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, w_in: list[Tensor], w_out: list[Tensor],
    b_in: list[Tensor], b_out: list[Tensor], norm: list[Tensor], spec: str, formats: str, needs: list[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of those of [x, weights, *b_in, *b_out, *norm] that ``needs`` indexes: the definition, recorded.

    They are those of float activations: the rounding of rows to 8 bits is passed as if it were not there.
    """
    known = decode_spec(spec)
    leaves = [t.detach() for t in (x, weights, *b_in, *b_out, *norm)]
    wanted = [leaves[i].requires_grad_() for i in needs]
    rest = iter(leaves[2:])
    floats = [[next(rest) for _ in part] for part in (b_in, b_out, norm)]
    bank = unflatten((w_in, w_out, *floats), decode_formats(formats)).reading("float")
    bank = in_spec(bank, known, dtypes(x, known)[0])
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        y = experts_reference(leaves[0], ids, leaves[1], bank, known)
        return gradients_by_autograd(y, wanted, grad)


def _backward_fake(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, w_in: list[Tensor], w_out: list[Tensor],
    b_in: list[Tensor], b_out: list[Tensor], norm: list[Tensor], spec: str, formats: str, needs: list[int],
) -> list[Tensor]:  # fmt: skip
    whole = [x, weights, *b_in, *b_out, *norm]
    return [torch.empty_like(whole[i]) for i in needs]


def _gradients_of(
    sizes: list[int], texts: Sequence[str], grad: Tensor, saved: list[Tensor], needs: list[int]
) -> list[Tensor]:
    """Gradients of those of [x, weights, *lists] that ``needs`` indexes; ``saved`` are x, ids, weights, lists."""
    x, ids, weights, *flat = saved
    rest = iter(flat)
    lists = [[next(rest) for _ in range(size)] for size in sizes]
    coded = sizes[0] + sizes[1]
    if any(1 < i < 2 + coded for i in needs):
        raise RuntimeError(
            "moeopt::quantized_experts gives codes and scales no gradient; train the float model, and quantise it then"
        )
    of_floats = [i if i < 2 else i - coded for i in needs]
    found: list[Tensor] = torch.ops.moeopt.quantized_experts_backward(grad, x, ids, weights, *lists, *texts, of_floats)
    return found


register_experts_op(
    "quantized_experts", BANK_LISTS, ["spec", "formats"],
    kernel=_op, fake=_fake, backward=_backward, backward_fake=_backward_fake, gradients=_gradients_of,
)  # fmt: skip


def in_float64(
    x: Tensor, ids: Tensor, weights: Tensor, w_in: Sequence[Tensor], w_out: Sequence[Tensor], b_in: Sequence[Tensor],
    b_out: Sequence[Tensor], norm: Sequence[Tensor], spec: ExpertsSpec, formats: str,
) -> Tensor:  # fmt: skip
    """The definition on the exact weights and activations, one expert's widened at a time; ``spec`` says float64."""
    bank = unflatten((w_in, w_out, b_in, b_out, norm), decode_formats(formats)).reading("float")
    check_bank(bank, spec)
    return experts_reference(x.double(), ids, weights.double(), in_spec(bank, spec, torch.float64), spec)
