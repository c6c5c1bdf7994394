"""``moeopt::row_function``: experts that are any function of a row, each on the rows of the tokens that chose it.

The rows of all pairs (token, slot) are sorted by expert once; the graph then runs once for every expert that was hit,
on its rows, with that expert's own tensors in the slots. Nothing is stacked and no weight is copied.

Eagerly the ATen calls are made one by one, so gradients are PyTorch's own. Tracers see one node: which expert has how
many rows is known only from values. Shape legend: T tokens, E experts, K chosen per token, P slots, H hidden, D width
of the result, R = T K pairs, M rows of one expert.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moeopt.errors import UsageError
from moeopt.ir.row_function import GETITEM, RowCount, RowFunction, Value
from moeopt.ops.op_registration import gradients_by_autograd, register_experts_op
from moeopt.value_types import FxTarget, PyObject


class SlotBank(Protocol):
    """The tensors of ``num_experts`` experts, live: a lookup returns them as they are now."""

    @property
    def num_experts(self) -> int:
        """How many experts the bank holds."""

    def slots(self, e: int) -> Sequence[Tensor]:
        """What expert ``e`` has in the P slots."""


class FlatSlots:
    """A :class:`SlotBank` of one list, the P tensors of expert 0 first."""

    def __init__(self, tensors: Sequence[Tensor], slots: int) -> None:
        self._tensors, self._slots = tensors, slots
        self.num_experts = len(tensors) // max(slots, 1)

    def slots(self, e: int) -> Sequence[Tensor]:
        return self._tensors[e * self._slots : (e + 1) * self._slots]


@functools.lru_cache(maxsize=256)
def function_of(graph: str, double: bool = False) -> Callable[..., Tensor]:
    """The graph as a Python function of (rows (M, H), slot 0, slot 1, ...) to (M, D); ``double``: in float64."""
    body = RowFunction(graph).body
    scope: dict[str, Any] = {"double": torch.float64}

    def word(value: PyObject) -> str:
        if isinstance(value, Value):
            return f"v{int(value)}"
        if isinstance(value, RowCount):
            return "v0.shape[0]"
        if isinstance(value, list):
            return f"[{', '.join(map(word, value))}]"
        if isinstance(value, torch.dtype):
            if double and value.is_floating_point:
                return "double"
            scope[f"dtype_{len(scope)}"] = value
            return f"dtype_{len(scope) - 1}"
        if isinstance(value, float) and value - value != 0:
            return f"float('{value}')"
        return repr(value)

    count = 1 + len(body.slots)
    lines = [f"def function({', '.join(f'v{i}' for i in range(count))}):"]
    for number, (op, args, kwargs) in enumerate(body.nodes):
        if op == GETITEM:
            lines.append(f"    v{count + number} = {word(args[0])}[{word(args[1])}]")
            continue
        scope[f"op_{number}"] = _quick(op)
        if op is torch.ops.aten.view.dtype:  # the bits of codes, whatever is computed with them
            scope[f"bits_{number}"] = args[1]
            lines.append(f"    v{count + number} = op_{number}({word(args[0])}, bits_{number})")
            continue
        given = [*map(word, args), *(f"{k}={word(v)}" for k, v in kwargs.items())]
        lines.append(f"    v{count + number} = op_{number}({', '.join(given)})")
    lines.append(f"    return v{body.out}")
    exec(compile("\n".join(lines), "<moeopt row function>", "exec"), scope)
    function: Callable[..., Tensor] = scope["function"]
    return function


def _quick(op: FxTarget) -> PyObject:
    """PyTorch's own binding of ``op`` where there is one: it takes half the time of a call through the dispatcher. A
    binding takes no places of which some are None."""
    if any("Optional[Tensor]]" in str(argument.type) for argument in op._schema.arguments):
        return op
    name = op._schema.name.split("::")[1]
    found = getattr(torch, name, None) or getattr(torch._C._nn, name, None)
    return found if isinstance(found, types.BuiltinFunctionType) else op


def row_function(
    x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: SlotBank, spec: RowFunction, traced: bool,
    skip_idle: bool = False,
) -> Tensor:  # fmt: skip
    """As :func:`moeopt.ops.experts.experts`, of which this is the part for a :class:`RowFunction`.

    Args:
        traced: whether a tracer looks on; then the call is one ``torch.ops.moeopt.row_function``.
        skip_idle: whether weights of experts that no token reaches get no gradient; else it is zeros.

    Raises:
        UsageError: shapes that have no meaning here; the message names them.
    """
    if traced:
        flat = [t for e in range(bank.num_experts) for t in bank.slots(e)]
        traced_TH: Tensor = torch.ops.moeopt.row_function(x_TH, ids_TK, weights_TK, flat, spec.text)
        return traced_TH
    if torch.is_autocast_enabled(x_TH.device.type):  # the graph names its dtypes
        with torch.autocast(x_TH.device.type, enabled=False):
            return expert_by_expert(x_TH, ids_TK, weights_TK, bank, spec, every=not skip_idle)
    return expert_by_expert(x_TH, ids_TK, weights_TK, bank, spec, every=not skip_idle)


def expert_by_expert(
    x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: SlotBank, spec: RowFunction, every: bool = False,
    double: bool = False,
) -> Tensor:  # fmt: skip
    """The definition of the op; differentiable.

    Args:
        every: while gradients are recorded, experts without rows have gradients of zeros; else none.
        double: the graph in float64, whatever it says.
    """
    body, E, K = spec.body, bank.num_experts, ids_TK.shape[-1]
    _check(x_TH, ids_TK, weights_TK, body.features)
    function = function_of(spec.graph, double)
    out = _dtype(spec.out_dtype, x_TH.dtype)
    accum = _dtype(spec.accum_dtype, out)
    sorted_R, order_R = ids_TK.reshape(-1).sort(stable=True)
    first = torch.searchsorted(sorted_R, torch.arange(E + 1, device=ids_TK.device, dtype=sorted_R.dtype)).tolist()
    end = len(order_R) if spec.out_of_range == "identity" else first[E]
    if first[0] or end < len(order_R):  # ids that name no expert and add nothing
        order_R = order_R[first[0] : end]
    token_R = order_R if K == 1 else torch.div(order_R, K, rounding_mode="floor")
    x_RH, w_R1 = x_TH.index_select(0, token_R), weights_TK.reshape(-1).index_select(0, order_R).unsqueeze(1)
    r_RH = (x_RH * w_R1 if spec.weight_on == "input" else x_RH).to(torch.float64 if double else body.dtype)
    every = every and torch.is_grad_enabled()
    parts, idle = [], []
    for e in range(E):
        begin, rows = first[e] - first[0], first[e + 1] - first[e]
        if rows:
            parts.append(function(r_RH[begin : begin + rows], *bank.slots(e)))
        elif every:
            idle += [t for t in bank.slots(e) if t.requires_grad]
    term_RD = x_TH.new_zeros(0, body.out_features, dtype=accum) if not parts else parts[0]
    term_RD = torch.cat(parts) if len(parts) > 1 else term_RD
    if spec.weight_on == "output" and parts:
        term_RD = term_RD * w_R1[: len(term_RD)]
    if spec.out_of_range == "identity":
        same_RD = (x_RH * w_R1)[len(term_RD) :]
        term_RD = torch.cat([term_RD.to(accum), same_RD.to(accum)])
    y_TD = _combine(term_RD.to(accum), order_R, token_R, ids_TK, spec).to(out)
    return _Idle.apply(y_TD, *idle) if idle else y_TD  # type: ignore[no-untyped-call]


class _Idle(torch.autograd.Function):
    """y, of which the weights of experts without rows have gradients of zeros, without a call on no rows."""

    @staticmethod
    def forward(ctx: PyObject, y: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: PyObject, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(t) for t in ctx.saved_tensors)


def _combine(term_RD: Tensor, order_R: Tensor, token_R: Tensor, ids_TK: Tensor, spec: RowFunction) -> Tensor:
    """Sum each token's terms, by slot or by ascending expert, which is the order in which they lie."""
    T, K = ids_TK.shape
    if spec.combine == "expert" or K == 1:
        return term_RD.new_zeros(T, term_RD.shape[1]).index_add(0, token_R, term_RD)
    D = term_RD.shape[1]
    return term_RD.new_zeros(T * K, D).index_copy(0, order_R, term_RD).view(T, K, D).sum(1)


def _check(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, features: int) -> None:
    if x_TH.dim() != 2 or x_TH.shape[1] != features or ids_TK.shape != weights_TK.shape or ids_TK.dim() != 2:
        raise UsageError(
            f"row_function: x is {tuple(x_TH.shape)}, ids {tuple(ids_TK.shape)}, weights {tuple(weights_TK.shape)}; "
            f"they must be (T, {features}), (T, K) and (T, K): flatten batch and sequence first"
        )


def _dtype(name: str | None, otherwise: torch.dtype) -> torch.dtype:
    return getattr(torch, name) if name else otherwise


decode = functools.lru_cache(RowFunction.decode)


def _op(x: Tensor, ids: Tensor, weights: Tensor, slots: list[Tensor], spec: str) -> Tensor:
    known = decode(spec)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return expert_by_expert(x, ids, weights, FlatSlots(slots, len(known.body.slots)), known)


def _fake(x: Tensor, ids: Tensor, weights: Tensor, slots: list[Tensor], spec: str) -> Tensor:
    known = decode(spec)
    return x.new_empty(x.shape[0], known.body.out_features, dtype=_dtype(known.out_dtype, x.dtype))


def _backward(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, slots: list[Tensor], spec: str, needs: list[int]
) -> list[Tensor]:
    """Gradients of those of [x, weights, *slots] that ``needs`` indexes: the definition again, with gradients on."""
    known = decode(spec)
    leaves = [t.detach() for t in (x, weights, *slots)]
    wanted = [leaves[i].requires_grad_() for i in needs]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        y = expert_by_expert(leaves[0], ids, leaves[1], FlatSlots(leaves[2:], len(known.body.slots)), known)
        return gradients_by_autograd(y, wanted, grad)


def _backward_fake(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, slots: list[Tensor], spec: str, needs: list[int]
) -> list[Tensor]:
    whole = [x, weights, *slots]
    return [torch.empty_like(whole[i]) for i in needs]


def _gradients(
    sizes: list[int], texts: Sequence[str], grad: Tensor, saved: list[Tensor], needs: list[int]
) -> list[Tensor]:
    x, ids, weights, *slots = saved
    found: list[Tensor] = torch.ops.moeopt.row_function_backward(grad, x, ids, weights, slots, *texts, needs)
    return found


register_experts_op(
    "row_function", "Tensor[] slots", ["spec"],
    kernel=_op, fake=_fake, backward=_backward, backward_fake=_backward_fake, gradients=_gradients,
)  # fmt: skip


def in_float64(x: Tensor, ids: Tensor, weights: Tensor, slots: Sequence[Tensor], spec: str) -> Tensor:
    """The op with every dtype float64; a weight is widened when it is used."""
    known = dataclasses.replace(decode(spec), compute_dtype="float64", accum_dtype="float64", out_dtype="float64")
    wide = [t.double() if t.is_floating_point() else t for t in slots]
    bank = FlatSlots(wide, len(known.body.slots))
    return expert_by_expert(x.double(), ids, weights.double(), bank, known, double=True)
