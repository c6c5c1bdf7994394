"""How much memory a call of an op takes, told before it is made, and how much a graph holds while it runs.

A graph from elsewhere can ask for any size in one line: ``full([2**31])``, a column times a row, ``repeat``. So the
first time that a graph runs at some sizes, each op is asked before it is run: views take nothing, pointwise ops what
their arguments broadcast to, products what their sizes say, and everything else is run on the "meta" device, which
computes sizes only, and there each op inside a composite one counts. Where sizes hang on values (``nonzero``) the most
that can come of them counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.errors import LimitError
from moeopt.value_types import FxTarget, PyObject

_WAY_OUT = (
    "if you trust the bundle, give it more: moeopt.load(directory, limits=moeopt.LoadLimits(bytes=...)) or "
    "`moeopt verify --bytes`, or a smaller input"
)
MAX_PARTS = 1 << 16
_META = torch.device("meta")
_PRODUCTS = {
    "aten.mm.default": lambda a: [*a[0].shape[:-1], a[1].shape[-1]],
    "aten.bmm.default": lambda a: [*a[0].shape[:-1], a[1].shape[-1]],
    "aten.addmm.default": lambda a: [*a[1].shape[:-1], a[2].shape[-1]],
    "aten.baddbmm.default": lambda a: [*a[1].shape[:-1], a[2].shape[-1]],
    "aten.linear.default": lambda a: [*a[0].shape[:-1], a[1].shape[0] if a[1].dim() > 1 else 1],
}
"""The shape of a product's result."""
_NO_LARGER = frozenset(
    "softmax _softmax log_softmax _log_softmax sum mean amax amin clone contiguous reshape cumsum zeros_like ones_like"
    " full_like empty_like to _to_copy layer_norm rms_norm topk sort".split()
)
"""Ops whose results have no more elements than their first argument; the last two give indices too."""
_FILLED = {
    **dict.fromkeys(("zeros", "ones", "full", "empty"), 0),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), 1),
}
"""Ops that are told their result's shape, and in which argument."""
_ATTENTION = ("aten.scaled_dot_product_attention.default", "aten._scaled_dot_product_flash_attention_for_cpu.default")


def _coordinates(args: Sequence[Any]) -> int:
    return int(args[0].numel() * max(args[0].dim(), 1) * 8)


def _thrice(args: Sequence[Any]) -> int:
    return 3 * sum(t.numel() * max(t.element_size(), 8) for t in tensors_of(args))


def _repeated(args: Sequence[Any]) -> int:
    repeats = args[0] if len(args) < 2 or not isinstance(args[1], torch.Tensor) else args[1]
    rows = int(repeats.clamp(min=0).double().sum()) if repeats.numel() else 0
    if len(args) < 2 or not isinstance(args[1], torch.Tensor):
        return rows * 8
    own: int = args[0].numel() * args[0].element_size()
    if repeats.numel() == 1:
        return own * rows
    at = args[2] if len(args) > 2 and args[2] is not None else None
    share = own // max(args[0].shape[at] if at is not None else args[0].numel(), 1)
    return int(rows * share + own)


DYNAMIC: dict[str, Callable[[Sequence[Any]], int]] = {
    **dict.fromkeys(("aten.nonzero.default", "aten.nonzero_numpy.default", "aten.argwhere.default"), _coordinates),
    "aten.where.default": _coordinates,
    "aten.masked_select.default": lambda a: 2 * _broadcast(a) * a[0].element_size() + _coordinates(a),
    "aten._unique2.default": _thrice,
    "aten.unique_consecutive.default": _thrice,
    "aten.repeat_interleave.Tensor": _repeated,
    "aten.repeat_interleave.self_Tensor": _repeated,
    "aten.item.default": lambda a: 0,
    "aten._local_scalar_dense.default": lambda a: 0,
    "aten.equal.default": _thrice,
    "aten.is_nonzero.default": lambda a: 0,
    "aten.bincount.default": lambda a: 8 * (int(a[0].max()) + 1 + max(_numbers(a), default=0)) if a[0].numel() else 64,
    "aten.one_hot.default": lambda a: 8 * a[0].numel() * _classes(a),
    "aten.allclose.default": _thrice,
}
"""Ops whose results have sizes, or are numbers, that hang on values: the bytes that they take at most."""


def _numbers(args: Sequence[Any]) -> list[int]:
    return [a for a in args if type(a) is int]


def _classes(args: Sequence[Any]) -> int:
    stated = max(_numbers(args), default=-1)
    return stated if stated >= 0 or not args[0].numel() else int(args[0].max()) + 1


def tensors_of(value: PyObject) -> Iterator[torch.Tensor]:
    """The tensors in nested lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from tensors_of(child)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


def hangs_on_values(op: FxTarget, args: Sequence[Any]) -> bool:
    """Whether the sizes that an op's result has, or the number that it is, can differ between calls of equal sizes."""
    if str(op) in DYNAMIC:
        return True
    return str(op) in _INDEXED  # a mask among the indices


_INDEXED = ("aten.index.Tensor", "aten._unsafe_index.Tensor")


def needed(op: FxTarget, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Bytes that a call takes at most, its result among them."""
    name = str(op)
    if name in DYNAMIC:
        return DYNAMIC[name](args)
    if name in _INDEXED:
        return _indexed(args[0], args[1])
    given = list(tensors_of([list(args), kwargs]))
    if name in _PRODUCTS:
        return int(math.prod(_PRODUCTS[name](args)) * args[0].element_size()) if _ranked(name, args) else 0
    if name in _ATTENTION:
        return 2 * sum(t.numel() * t.element_size() for t in given[:3])
    if name == "moeopt.quantized_experts.default":
        return _dequantized(args)
    if name.startswith("moeopt."):
        return int(16 * args[0].numel() * max(args[0].element_size(), 4))
    if _is_view(op):
        _check_parts(op, args)
        return 0
    base, returns = op._schema.name.split("::")[1], op._schema.returns
    if not any("Tensor" in str(r.type) for r in returns):  # sizes and other numbers
        return 0
    if base in _FILLED and len(args) > _FILLED[base] and isinstance(args[_FILLED[base]], list):
        kind = kwargs.get("dtype")
        width = kind.itemsize if isinstance(kind, torch.dtype) else max((t.element_size() for t in given), default=8)
        return int(math.prod(args[_FILLED[base]]) * width)
    if base in _NO_LARGER and isinstance(args[0], torch.Tensor):
        return args[0].numel() * (max(args[0].element_size(), 8) + 8 * (len(returns) - 1))
    if torch.Tag.pointwise in op.tags and given:
        return _broadcast(given) * max(4, max(t.element_size() for t in given))
    return _on_meta(op, args, kwargs)


def _dequantized(args: Sequence[Any]) -> int:
    """Of quantised experts: rows as wide as the matrices, and the float weights of one expert in two dtypes."""
    sizes = [t.numel() // max(t.shape[0], 1) if t.dim() == 3 else t.numel() for t in tensors_of(list(args[3:5]))]
    return int(16 * (2 * args[0].numel() + 2 * sum(sorted(sizes)[-3:])))


def check_call(op: FxTarget, args: Sequence[Any], kwargs: dict[str, Any], budget: float) -> None:
    """``LimitError`` when a call takes more than ``budget`` bytes."""
    size = needed(op, args, kwargs)
    if size > budget:
        raise LimitError(f"{op} asks for {size:.2g} bytes, and {budget:.2g} are left to it: {_WAY_OUT}")


class Meter:
    """What a graph's values hold while it runs, each storage once, and what is left of ``budget`` bytes."""

    def __init__(self, budget: float, free: Sequence[Any]) -> None:
        """``free``: the weights and the call's inputs, which count nothing."""
        self.budget, self.held = budget, 0
        self._free = {t.untyped_storage()._cdata for t in tensors_of(list(free))}
        self._users: dict[int, int] = {}

    def check(self, op: FxTarget, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """``LimitError`` when a call takes more than is left."""
        check_call(op, args, kwargs, self.budget - self.held)

    def add(self, value: PyObject) -> None:
        for storage in self._storages(value):
            if self._users.setdefault(storage._cdata, 0) == 0:
                self.held += storage.nbytes()
            self._users[storage._cdata] += 1

    def drop(self, value: PyObject) -> None:
        for storage in self._storages(value):
            self._users[storage._cdata] -= 1
            if self._users[storage._cdata] == 0:
                self.held -= storage.nbytes()

    def _storages(self, value: PyObject) -> list[Any]:
        found = (t.untyped_storage() for t in tensors_of(value))
        return [s for s in found if s._cdata not in self._free]


class _Counting(TorchDispatchMode):
    """Counts the bytes of what each op inside returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.bytes = 0

    def __torch_dispatch__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        result = func(*args, **(kwargs or {}))
        if not _is_view(func):
            self.bytes += sum(t.numel() * t.element_size() for t in tensors_of(result))
        return result


def _on_meta(op: FxTarget, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    with torch.no_grad(), _Counting() as counted:
        result = op(*_meta(list(args)), **{**_meta(kwargs), **_placed(op)})
    returned = sum(t.numel() * t.element_size() for t in tensors_of(result) if not _is_view(op))
    return int(max(counted.bytes, returned))


def _placed(op: FxTarget) -> dict[str, Any]:
    return {"device": _META} if any(a.name == "device" and a.kwarg_only for a in op._schema.arguments) else {}


def _meta(value: PyObject) -> PyObject:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
    if isinstance(value, torch.device):
        return _META
    if isinstance(value, (list, tuple)):
        return [_meta(v) for v in value]
    if isinstance(value, dict):
        return {k: _meta(v) for k, v in value.items()}
    return value


def _check_parts(op: FxTarget, args: Sequence[Any]) -> None:
    """``LimitError`` where a tensor, which may be a view of any size, is cut into more parts than memory can name."""
    if not str(op._schema.returns[0].type).startswith("List[") or not isinstance(args[0], torch.Tensor):
        return
    base, asked = op._schema.name.split("::")[1], args[1] if len(args) > 1 and type(args[1]) is int else 1
    parts = asked if base in ("chunk", "tensor_split", "hsplit", "vsplit", "dsplit") else max(args[0].shape, default=1)
    if base == "split":
        parts = parts // max(asked, 1)
    if parts > MAX_PARTS:
        raise LimitError(f"{op} asks for {parts} parts of a tensor, and {MAX_PARTS} is the most that a bundle may have")


def _is_view(op: FxTarget) -> bool:
    """Whether what an op returns is its argument's memory, whatever it is given."""
    maybe = ("reshape", "contiguous", "to", "flatten", "ravel", "resolve_conj", "resolve_neg", "type_as", "matrix_H")
    base = op._schema.name.split("::")[1]
    returns = op._schema.returns
    return base not in maybe and bool(returns) and all(r.alias_info is not None for r in returns)


def _broadcast(given: Sequence[Any]) -> int:
    """How many elements tensors broadcast to, at most."""
    sizes: list[int] = []
    for tensor in tensors_of(list(given)):
        shape = tensor.shape[::-1]
        sizes += [1] * (len(shape) - len(sizes))
        for at, size in enumerate(shape):
            if size != 1 and (sizes[at] == 1 or size > sizes[at]):
                sizes[at] = size
    return math.prod(sizes)


def _indexed(source: torch.Tensor, indices: Sequence[Any]) -> int:
    """Of advanced indexing: the dimensions that are not indexed, times what the indices broadcast to."""
    taken, rest, count = 0, list(source.shape), []
    for index in indices:
        if index is None:
            taken += 1
        elif index.dtype in (torch.bool, torch.uint8):
            count.append(torch.empty(index.numel(), device=_META))
            rest[taken : taken + index.dim()] = [1] * index.dim()
            taken += index.dim()
        else:
            count.append(torch.empty(index.shape, device=_META))
            rest[taken : taken + 1] = [1]
            taken += 1
    return math.prod(rest) * _broadcast(count) * source.element_size() + _thrice([i for i in indices if i is not None])


def _ranked(name: str, args: Sequence[Any]) -> bool:
    """Whether a product's factors have the dimensions that it takes; an op that gets others refuses them itself."""
    first, second = args[-2:] if name in ("aten.mm.default", "aten.bmm.default") else args[:2]
    if name in ("aten.addmm.default", "aten.baddbmm.default"):
        first, second = args[1:3]
    return bool(first.dim() >= 1 and second.dim() >= 1)
