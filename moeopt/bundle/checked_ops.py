"""Checks before the ops that models need and that believe what they are told.

Each stands for one op or one family, and is called in its place: ``check(op, *args, **kwargs)`` raises
``BundleError`` for arguments with which the op would read or write memory that is not its own, or end the process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeopt.errors import BundleError
from moeopt.value_types import FxTarget, PyObject

aten = torch.ops.aten
CHECKED: dict[str, Callable[..., Any]] = {}


def _refuse(op: FxTarget, why: str) -> None:
    raise BundleError(f"{op} is called with {why}")


def _before(*names: str) -> Callable[[Any], Any]:
    """Register a check before the ops of these names."""

    def register(check: PyObject) -> PyObject:
        for name in names:
            base, _, overload = name.partition(".")
            op = getattr(getattr(aten, base), overload or "default")

            def call(*args: PyObject, _op: PyObject = op, **kwargs: PyObject) -> PyObject:
                check(_op, *args, **kwargs)
                return _op(*args, **kwargs)

            call.check = functools.partial(check, op)  # type: ignore[attr-defined]
            CHECKED[str(op)] = call
        return check

    return register


def _instead(name: str, call: Callable[..., Any]) -> None:
    """Call another op in the place of this one."""
    base, _, overload = name.partition(".")
    CHECKED[str(getattr(getattr(aten, base), overload or "default"))] = call


# a caller's tensor may be laid out otherwise than the traced one; the last two do not check
_instead("view", aten.reshape.default)
_instead("_unsafe_view", aten.reshape.default)
_instead("_unsafe_index.Tensor", aten.index.Tensor)
_instead("_unsafe_index_put", aten.index_put.default)


# torch's own read beyond a tensor of stride 0
_instead("median.dim", lambda x, *rest, **named: aten.median.dim(x.contiguous(), *rest, **named))
_instead("nanmedian.dim", lambda x, *rest, **named: aten.nanmedian.dim(x.contiguous(), *rest, **named))


def _zeroed(op: FxTarget) -> Callable[..., Any]:
    """An op that gives memory as it finds it; what the process left there is nobody else's to read."""

    def call(*args: PyObject, **kwargs: PyObject) -> Tensor:
        y: Tensor = op(*args, **kwargs)
        return y.zero_()

    return call


for _name in ("empty.memory_format", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"):
    _instead(_name, _zeroed(getattr(getattr(aten, _name.split(".")[0]), (_name.split(".") + ["default"])[1])))


@_before("as_strided", "as_strided_copy")
def _within(op: FxTarget, x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> None:
    """Only elements between the first and the last of ``x`` itself, not of the storage that it lies in."""
    first = x.storage_offset()
    last = first + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else first - 1
    start = first if offset is None else offset
    if len(size) != len(stride) or any(n < 0 for n in [*size, *stride]):
        _refuse(op, f"sizes {list(size)} and strides {list(stride)}")
    stop = start + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else start - 1
    if start < first or stop > last:
        _refuse(op, "elements beyond its tensor's")


@_before("native_batch_norm", "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training")
def _batch_norm(
    op: FxTarget, x: Tensor, weight: PyObject, bias: PyObject, mean: PyObject, var: PyObject, *rest: PyObject
) -> None:
    """One statistic for each channel, of a floating-point dtype."""
    if x.dim() < 2 or not x.is_floating_point():
        _refuse(op, f"an input of {x.dim()} dimensions and {x.dtype}")
    for name, value in (("weight", weight), ("bias", bias), ("mean", mean), ("variance", var)):
        if value is not None and (value.shape != x.shape[1:2] or not value.is_floating_point()):
            _refuse(op, f"a {name} of shape {tuple(value.shape)} for {x.shape[1]} channels")


@_before(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_attention_math",
    "scaled_dot_product_attention",
)
def _attention(op: FxTarget, q: Tensor, k: Tensor, v: Tensor, *rest: PyObject, **named: PyObject) -> None:
    """Queries, keys and values of one head size, as many keys as values, and a mask that broadcasts to the scores."""
    bias = {"_scaled_dot_product_efficient_attention": "attn_bias"}.get(op._schema.name.split("::")[1], "attn_mask")
    names = [a.name for a in op._schema.arguments][3 : 3 + len(rest)]
    mask = {**dict(zip(names, rest, strict=True)), **named}.get(bias)
    if not (q.dim() == k.dim() == v.dim() >= 2) or 0 in (*q.shape[-2:], *k.shape[-2:], *v.shape[-2:]):
        _refuse(op, f"shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    fits = k.shape[-2] == v.shape[-2] and q.shape[-1] == k.shape[-1] and q.dtype == k.dtype == v.dtype
    if "flash" in str(op) or "efficient" in str(op):
        fits = fits and q.dim() == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[-1] == v.shape[-1]
    if not fits or not q.is_floating_point():
        _refuse(op, f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} that do not fit")
    if isinstance(mask, Tensor):
        want = (*q.shape[:-1], k.shape[-2])
        sizes = zip(mask.shape[::-1], want[::-1], strict=False)
        if mask.dim() > len(want) or any(have not in (1, need) for have, need in sizes):
            _refuse(op, f"a mask of shape {tuple(mask.shape)} for scores of {want}")


@_before("div.Tensor_mode", "divide.Tensor_mode", "floor_divide", "remainder.Tensor", "fmod.Tensor")
@_before("div.Scalar_mode", "divide.Scalar_mode", "floor_divide.Scalar", "remainder.Scalar", "fmod.Scalar")
def _quotient(op: FxTarget, x: Tensor, by: PyObject, *rest: PyObject, **named: PyObject) -> None:
    """The least integer divided by -1 has no result, and processors stop at it."""
    divisor = by if isinstance(by, Tensor) else torch.tensor(by)
    kinds = (x.dtype, divisor.dtype)
    if any(k.is_floating_point or k.is_complex for k in kinds):
        return
    least = [k for k in kinds if k.is_signed]
    if bool((divisor == -1).any()) and any(bool((x == torch.iinfo(k).min).any()) for k in least):
        _refuse(op, "the least integer and -1")


@_before("_fft_r2c", "_fft_c2c", "_fft_c2r")
def _fourier(op: FxTarget, x: Tensor, dims: Sequence[int], mode: int, last: PyObject) -> None:
    """Different dimensions that are there, none of them empty."""
    at = [d % x.dim() for d in dims if -x.dim() <= d < x.dim()]
    if len(set(at)) != len(dims) or not dims or 0 in x.shape or mode not in (0, 1, 2):
        _refuse(op, f"dimensions {list(dims)} of shape {tuple(x.shape)}")
    if x.is_complex() == (op is aten._fft_r2c.default):
        _refuse(op, f"{x.dtype}")
    if op is aten._fft_c2r.default and not x.shape[at[-1]] == last // 2 + 1 > 0:
        _refuse(op, f"size {last} of a result for {x.shape[at[-1]]} frequencies")


_instead("_reshape_alias", lambda x, size, stride: CHECKED["aten.as_strided.default"](x, size, stride))


@_before("_grouped_mm")
def _grouped(op: FxTarget, x: Tensor, w: Tensor, offs: PyObject = None, *rest: PyObject, **named: PyObject) -> None:
    """Ends of groups that do not fall, and lie within the rows that are grouped."""
    if not 2 <= x.dim() <= 3 or not 2 <= w.dim() <= 3 or 0 in (*x.shape, *w.shape):
        _refuse(op, f"shapes {tuple(x.shape)} and {tuple(w.shape)}")
    if x.shape[-1] != w.shape[-2] or x.dtype != w.dtype or (x.dim() == w.dim() == 3 and len(x) != len(w)):
        _refuse(op, f"shapes {tuple(x.shape)} and {tuple(w.shape)} that do not fit, or two dtypes")
    if (offs is None) != (x.dim() == w.dim() == 3):
        _refuse(op, "groups where there are none, or none where there are")
    if offs is None:
        return
    rows = x.shape[1] if x.dim() == w.dim() == 2 else x.shape[0] if x.dim() == 2 else w.shape[-1]
    groups = len(w) if w.dim() == 3 else len(x) if x.dim() == 3 else offs.numel()
    if offs.dim() != 1 or offs.dtype != torch.int32 or offs.numel() != groups or not offs.numel():
        _refuse(op, f"ends of groups of shape {tuple(offs.shape)} and {offs.dtype} for {groups} groups")
    steps = torch.diff(offs, prepend=offs.new_zeros(1))
    if bool((steps < 0).any()) or int(offs[-1]) > rows:
        _refuse(op, f"ends of groups that fall, or lie beyond {rows} rows")


@_before("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
def _recurrent(
    op: FxTarget, x: Tensor, hx: PyObject, params: Sequence[Tensor], biases: bool, layers: int, dropout: float,
    train: bool, both: bool, first: bool,
) -> None:  # fmt: skip
    """States and weights of every layer and direction, each of the size that the states say."""
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    gates, ways = {"lstm": 4, "gru": 3}.get(op._schema.name.split("::")[1], 1), 1 + bool(both)
    places = x.shape[1:] if first else (x.shape[0], *x.shape[2:])  # of no rows PyTorch makes none
    if x.dim() != 3 or 0 in places or not 1 <= layers <= 1 << 10 or len(states) != (2 if gates == 4 else 1):
        _refuse(op, f"an input of shape {tuple(x.shape)} for {layers} layers")
    rows, width = x.shape[0 if first else 1], states[0].shape[-1] if states[0].dim() == 3 else 0
    if not width or any(s.shape != (layers * ways, rows, width) for s in states):
        _refuse(op, f"states of shapes {[tuple(s.shape) for s in states]}")
    want: list[tuple[int, ...]] = []
    for layer in range(layers):
        taken = x.shape[-1] if layer == 0 else width * ways
        want += ([(gates * width, taken), (gates * width, width)] + [(gates * width,)] * 2 * bool(biases)) * ways
    if [tuple(p.shape) for p in params] != want or any(t.dtype != x.dtype for t in [*params, *states]):
        _refuse(op, f"{len(params)} weights that do not fit its states")


@_before("_weight_norm")
def _weight_norm(op: FxTarget, v: Tensor, g: Tensor, dim: int = 0) -> None:
    """A norm for each slice of a weight that has elements."""
    if not -v.dim() <= dim < v.dim() or 0 in v.shape or v.dtype != g.dtype or not v.is_floating_point():
        _refuse(op, f"dimension {dim} of shape {tuple(v.shape)}")
    if g.numel() != v.shape[dim]:
        _refuse(op, f"{g.numel()} norms for {v.shape[dim]} slices")
