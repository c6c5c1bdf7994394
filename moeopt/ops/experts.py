"""``moeopt::experts``: the grouped-expert op, as a Python entry for eager code and one node for tracers.

Shape legend: T tokens, E experts, K chosen per token, H hidden.

A custom op takes no bank and no dataclass, so the op's schema holds lists and a string. Each list of
weights is one stacked tensor (3-D weights, 2-D vectors), or E tensors; ``rows == "separate"`` doubles
``w_in`` and ``b_in``: gate then up, or E gates then E ups. An empty list is an absent weight; a tensor
of no elements is an absent one among present ones.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from moeopt.ir.row_function import RowFunction
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import override
from moeopt.ops.expert_weights import ExpertWeights, ListExpertWeights, StackedExpertWeights
from moeopt.ops.gradients import fits, lists_gradients
from moeopt.ops.kernels.cuda import experts_cuda
from moeopt.ops.native.call import transformed
from moeopt.ops.native.dispatch import experts_on_cpu
from moeopt.ops.native.hidden import Hidden
from moeopt.ops.quantized_bank import QuantizedExpertWeights
from moeopt.ops.quantized_experts import quantized_experts
from moeopt.ops.recorded import gradients_of, recorded, separate_experts
from moeopt.ops.reference import experts_reference
from moeopt.ops.row_function import row_function
from moeopt.ops.unfit import Unfit
from moeopt.value_types import PyObject

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
"""w_in, w_out, b_in, b_out, norm."""

_KERNELS = {"cpu": experts_on_cpu, "cuda": experts_cuda}

decode = functools.lru_cache(ExpertsSpec.decode)


def experts(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    bank: PyObject,
    spec: ExpertsSpec | RowFunction,
    skip_idle: bool = False,
) -> Tensor:
    """Run the experts that ``ids_TK`` names on each token and sum their weighted outputs.

    Eagerly the device's kernel reads the bank directly, recorded by one node where a gradient is needed. Under
    ``torch.compile``, ``torch.export``, fx tracing, fake tensors, a dispatch mode or a functional transform
    the call is one ``torch.ops.moeopt.experts``. Autocast has no say: ``spec`` names the dtypes.

    Args:
        x_TH: tokens (T, H), any float dtype; T may be 0.
        ids_TK: chosen experts (T, K), integers; < 0 adds nothing, >= E is ``spec.out_of_range``.
        weights_TK: routing weights (T, K), any float dtype.
        bank: the E experts' weights: a ``ExpertWeights`` (of floats, or of codes and scales), or a ``SlotBank`` where
            ``spec`` is a ``RowFunction``. One that has a ``run(x, ids, weights, spec, skip_idle)`` answers itself:
            experts that lie on several machines.
        spec: the function, with the dtypes and the order of the sum.
        skip_idle: whether separate weights of experts that no token reaches get no gradient (``grad`` stays None,
            and optimizers leave them alone), as in a loop over the experts that are hit; else it is zeros, as in a
            loop over all. Tracers cannot look at ids: there it is zeros.

    Returns:
        (T, H_out), a new tensor, in ``spec.out_dtype`` or the dtype of x.

    Raises:
        UsageError: shapes or dtypes that have no meaning here; the message names them.
    """
    if not torch.compiler.is_dynamo_compiling() and (impl := override.current()) is not None:
        y_TH = impl(x_TH, ids_TK, weights_TK, bank, spec)  # type: ignore[arg-type]
        if y_TH is not None:
            return y_TH
    if (run := getattr(bank, "run", None)) is not None:  # its experts are not all here
        elsewhere_TH: Tensor = run(x_TH, ids_TK, weights_TK, spec, skip_idle)
        return elsewhere_TH
    traced = is_traced(x_TH)
    if isinstance(spec, RowFunction):
        return row_function(x_TH, ids_TK, weights_TK, bank, spec, traced, skip_idle)
    if isinstance(bank, QuantizedExpertWeights):
        return quantized_experts(x_TH, ids_TK, weights_TK, bank, spec, traced)
    if not traced and not _needs_grad(x_TH, weights_TK, bank):
        return run_kernel(x_TH, ids_TK, weights_TK, bank, spec)
    if traced or transformed():
        traced_TH: Tensor = torch.ops.moeopt.experts(x_TH, ids_TK, weights_TK, *flatten(bank, spec), spec.text)
        return traced_TH
    return _recorded(x_TH, ids_TK, weights_TK, bank, spec, skip_idle)


def flatten(bank: ExpertWeights, spec: ExpertsSpec) -> Lists:
    """The bank as the op's five lists: stacked tensors if the bank is stored so, else E tensors each."""
    pairs = 2 if spec.rows == "separate" else 1
    stacked = bank.stacked()
    if stacked is not None:
        b_out = [] if stacked.b_out_s is None else [stacked.b_out_s]
        norm = [] if stacked.norm_s is None else [stacked.norm_s]
        return list(stacked.w_in_s), [stacked.w_out_s], _present(stacked.b_in_s), b_out, norm
    all_e = range(bank.num_experts)
    return (
        [bank.w_in(e)[i] for i in range(pairs) for e in all_e],
        [bank.w_out(e) for e in all_e],
        _present([bank.b_in(e)[i] for i in range(pairs) for e in all_e]),
        _present([bank.b_out(e) for e in all_e]),
        _present([bank.norm(e) for e in all_e]),
    )


def unflatten(lists: Sequence[Sequence[Tensor]], spec: ExpertsSpec) -> ExpertWeights:
    """The inverse of :func:`flatten`, on the same tensors."""
    w_in, w_out, b_in, b_out, norm = ([t if t.dim() > 1 or t.numel() else None for t in part or ()] for part in lists)
    if lists[1][0].dim() == 3:
        return StackedExpertWeights(lists[0], lists[1][0], b_in, b_out[0] if b_out else None, norm[0] if norm else None)
    E, pairs = len(w_out), 2 if spec.rows == "separate" else 1
    ins = [lists[0][i * E : (i + 1) * E] for i in range(pairs)]
    ins_b = [b_in[i * E : (i + 1) * E] for i in range(pairs)] if b_in else None
    return ListExpertWeights(ins, list(lists[1]), ins_b, b_out or None, norm or None)


def _recorded(
    x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertWeights, spec: ExpertsSpec, skip_idle: bool
) -> Tensor:
    """The kernel on the bank as it is, and its gradient."""
    hidden = Hidden() if fits(x, spec) else None

    def run() -> tuple[Tensor, Tensor | None]:
        y = run_kernel(x, ids, weights, bank, spec, hidden)
        return y, None if hidden is None else hidden.rows

    stacked = bank.stacked()
    if stacked is None:
        held, rebuild, bank = separate_experts(bank, ids, weights, skip_idle)
        return recorded("moeopt::experts", run, gradients_of(rebuild, spec), x, ids, weights, held)
    lists = flatten(stacked, spec)
    gradients = functools.partial(_gradients_of_stacks, [len(part) for part in lists], spec)
    return recorded("moeopt::experts", run, gradients, x, ids, weights, [t for part in lists for t in part])


def _gradients_of_stacks(
    sizes: list[int], spec: ExpertsSpec, grad: Tensor, saved: list[Tensor], needs: list[int], kept: Tensor | None
) -> list[Tensor]:
    x, ids, weights, *flat = saved
    if fits(x, spec):
        with contextlib.suppress(Unfit):
            return lists_gradients(grad, x, ids, weights, _in_lists(flat, sizes), spec, needs, kept)
    return gradients_of_lists(sizes, spec.text, grad, saved, needs)


def _in_lists(flat: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    rest = iter(flat)
    return [[next(rest) for _ in range(size)] for size in sizes]


def gradients_of_lists(
    sizes: list[int], spec: str, grad: Tensor, saved: list[Tensor], needs: list[int]
) -> list[Tensor]:
    """Gradients of those of [x, weights, *lists] that ``needs`` indexes; ``saved`` are x, ids, weights, lists."""
    x, ids, weights, *flat = saved
    lists = _in_lists(flat, sizes)
    found: list[Tensor] = torch.ops.moeopt.experts_backward(grad, x, ids, weights, *lists, spec, needs)
    return found


def _present(parts: Sequence[Tensor | None]) -> list[Tensor]:
    some = next((p for p in parts if p is not None), None)
    return [] if some is None else [some.new_empty(0) if p is None else p for p in parts]


def is_traced(x: Tensor) -> bool:
    """Whether somebody looks on who has to see one op."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _needs_grad(x: Tensor, weights: Tensor, bank: ExpertWeights) -> bool:
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad or weights.requires_grad:
        return True
    stacked = bank.stacked()
    if stacked is not None:
        held = (*stacked.w_in_s, stacked.w_out_s, *stacked.b_in_s, stacked.b_out_s, stacked.norm_s)
        return any(t is not None and t.requires_grad for t in held)
    unchecked = getattr(bank, "unchecked", None)  # a frozen model would have every expert looked up for nothing
    if unchecked is not None and (every := unchecked()) is not None:
        return any([t.requires_grad for t in every])
    for e in range(bank.num_experts):
        held = (*bank.w_in(e), bank.w_out(e), *bank.b_in(e), bank.b_out(e), bank.norm(e))
        if any(t is not None and t.requires_grad for t in held):
            return True
    return False


def run_kernel(
    x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertWeights, spec: ExpertsSpec, hidden: Hidden | None = None
) -> Tensor:
    """The kernel of the device; nothing is recorded. ``hidden``: as for ``experts_on_cpu``."""
    device = "cpu" if x.is_cpu else x.device.type
    kernel = _KERNELS.get(device, experts_reference)
    if hidden is not None:
        kernel = functools.partial(experts_on_cpu, hidden=hidden)
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return kernel(x, ids, weights, bank, spec)
    return kernel(x, ids, weights, bank, spec)
