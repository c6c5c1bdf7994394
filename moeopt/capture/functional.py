"""Functional twins of in-place ATen calls, and the way back through a view.

y.index_add_(0, i, v)      ->  y' = index_add(y, 0, i, v)
torch.mm(a, b, out=y[3:5]) ->  v  = mm(a, b);  y' = slice_scatter(y, v, 0, 3, 5)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from moeopt.capture.tree import leaves_of
from moeopt.errors import CaptureError
from moeopt.value_types import FxTarget, PyObject

aten = torch.ops.aten


@cache
def _written(func: FxTarget) -> tuple[tuple[int, str], ...]:
    if isinstance(func, HigherOrderOperator):  # they have no schema
        return ()
    return tuple(
        (i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    )


def mutated_args(func: FxTarget, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that ``func`` writes to, by its schema; any that a Triton kernel is given, which has none.

    Of the other operators that run functions (flex_attention, cond, scan) none writes to what it is given.
    """
    if isinstance(func, HigherOrderOperator) and func.name().endswith("_mutation"):
        return leaves_of(torch.Tensor, [args, kwargs])
    found: list[torch.Tensor] = []
    for index, name in _written(func):
        value = kwargs[name] if name in kwargs else args[index] if index < len(args) else None
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, torch.Tensor):
                found.append(item)
    return found


_BATCH_NORMS = (aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default)


def unsaid_writes(func: FxTarget, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors that ``func`` writes to against its schema: the running mean and variance of a batch norm."""
    return [t for t in args[3:5] if isinstance(t, torch.Tensor)] if func in _BATCH_NORMS else []


@cache
def may_write(func: FxTarget) -> bool:
    """Whether some call of ``func`` writes to its arguments, as the two functions above have it."""
    return isinstance(func, HigherOrderOperator) or bool(_written(func)) or func in _BATCH_NORMS


@dataclass
class Twin:
    """``func(*args, **kwargs)`` computes what the in-place call writes; ``after`` shapes it to fit."""

    func: PyObject
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    after: Callable[[fx.Node, fx.Node], list[tuple[Any, tuple[Any, ...]]]]


def functional_twin(func: FxTarget, args: tuple[Any, ...], kwargs: dict[str, Any], target: torch.Tensor) -> Twin:
    """The call that yields the value which ``func`` writes into ``target``.

    Raises:
        CaptureError: for an in-place op with no functional form (``set_``, ``resize_``).
    """
    packet_name, overload = func._schema.name.split("::")[1], func._overloadname
    namespace = getattr(torch.ops, func.namespace)
    if any(a.is_out for a in func._schema.arguments):
        rest = {k: v for k, v in kwargs.items() if k != "out"}
        packet = getattr(namespace, packet_name)
        names = [overload.removesuffix("_out"), "default"] if overload != "out" else ["Tensor", "default", "Scalar"]
        names = [n for n in names if hasattr(packet, n)]
        for name in names:
            candidate = getattr(packet, name)
            if not _written(candidate):
                return Twin(candidate, args, rest, _cast_to(target, candidate, args, rest))
        raise CaptureError(f"{func} has no functional form that the trace can record; avoid out= there")
    if torch.Tag.nondeterministic_seeded in func.tags:
        return Twin(func, args, kwargs, lambda old, new: [])
    functional = packet_name.removesuffix("_")
    packet = getattr(namespace, functional, None)
    if not packet_name.endswith("_") or packet is None or not hasattr(packet, overload or "default"):
        raise CaptureError(f"{func} changes a tensor in a way that the trace cannot follow; use an out-of-place form")
    twin = getattr(packet, overload or "default")
    return Twin(twin, args, kwargs, _cast_to(target, twin, args, kwargs))


def _cast_to(target: torch.Tensor, func: FxTarget, args: PyObject, kwargs: PyObject) -> PyObject:
    """Steps that bring the twin's result to the dtype and shape of what was written to."""
    dtype, shape = _result(func, args, kwargs, target)

    def steps(old: fx.Node, new: fx.Node) -> list[tuple[Any, tuple[Any, ...]]]:
        if dtype == target.dtype and shape == tuple(target.shape):
            return []
        return [(aten.copy.default, (old, new))]

    return steps


def _result(
    func: FxTarget, args: PyObject, kwargs: PyObject, target: torch.Tensor
) -> tuple[torch.dtype, tuple[int, ...]]:
    tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    floats = {a.dtype for a in tensors}
    if floats == {target.dtype} and func not in (aten.copy.default,):
        if all(a.shape == target.shape or a.dim() == 0 for a in tensors):
            return target.dtype, tuple(target.shape)
    if func in _KEEPS_SELF:
        return target.dtype, tuple(target.shape)
    try:
        with torch.utils._python_dispatch._disable_current_modes():
            meta = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
            out = func(*meta[0], **meta[1])
        return out.dtype, tuple(out.shape)
    except Exception:  # no meta kernel: be safe and copy into the old value's dtype and shape
        return torch.complex128, ()


_KEEPS_SELF = {
    aten.index_add.default,
    aten.index_put.default,
    aten.index_copy.default,
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter_add.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.masked_scatter.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.zero.default,
    aten.copy.default,
    aten.index_fill.int_Scalar,
    aten.clamp.default,
}


_SPLITS = {  # the unsafe ones are what recurrent cells write through
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
}


def inverse_view(
    func: FxTarget,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    item: int | None,
    base: fx.Node,
    new: fx.Node,
    parent: torch.Tensor,
    view: torch.Tensor,
) -> tuple[Any, tuple[Any, ...]]:
    """The call that puts ``new``, a changed view of ``parent``, back into the whole ``base``."""
    del kwargs
    if func is aten.select.int:
        return aten.select_scatter.default, (base, new, *args)
    if func is aten.slice.Tensor:
        return aten.slice_scatter.default, (base, new, *args)
    if func in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        return aten.reshape.default, (new, list(parent.shape))
    if func in (aten.t.default, aten.transpose.int):
        return func, (new, *args)
    if func is aten.permute.default:
        order = [d % parent.dim() for d in args[0]]
        return aten.permute.default, (new, [order.index(i) for i in range(len(order))])
    if func in (aten.detach.default, aten.alias.default):
        return func, (new,)
    if func in (aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims):
        return aten.reshape.default, (new, list(parent.shape))
    if func is aten.unbind.int and item is not None:
        return aten.select_scatter.default, (base, new, args[0] if args else 0, item)
    if func in _SPLITS and item is not None:
        dim = args[1] if len(args) > 1 else 0
        sizes = args[0] if isinstance(args[0], (list, tuple)) else None
        start = sum(sizes[:item]) if sizes is not None else item * args[0]
        return aten.slice_scatter.default, (base, new, dim, start, start + view.shape[dim])
    if func is aten.diagonal.default:
        return aten.diagonal_scatter.default, (base, new, *args)
    raise CaptureError(f"a write through {func} cannot be followed to the tensor it views; write to that tensor itself")
