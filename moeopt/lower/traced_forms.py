"""Calls that ``torch.export`` cannot trace, some where data decide their size, and what computes the same in a graph.

    bincount(ids, minlength=n)      ones, or weights, added up at the ids in n places; an id of n or more is an error
    sparse_coo_tensor(...) @ rows   the rows that entries name, weighed by the entries, and added up
    x.logsumexp(dims)               with a row of -inf more: of nothing PyTorch takes another way
    local_response_norm(x, size)    the mean of ``size`` shifted squares: a pool refuses no rows
    gaussian_nll_loss(x, y, var)    an index out of range where a variance is below zero, for PyTorch's own question
    bilinear(x, y, W, b)            rows times all matrices, then times each row's y: PyTorch asks how many they are
    cov(x), corrcoef(x)             products of what is left of the rows without their means: PyTorch asks for values

A product with a sparse matrix reads no row that has no entry, so a NaN in such a row stays where it is; one with the
same matrix filled up would spread it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode

from moeopt.errors import NotSaveableError
from moeopt.value_types import FxTarget, PyObject

_LOG_SUMS = (torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp)
_LEFT_EARLY = (torch.ops.aten.logsumexp.default, torch.ops.aten.avg_pool2d.default, torch.ops.aten.avg_pool3d.default)
_BINCOUNTS = (torch.bincount, Tensor.bincount)
_PRODUCTS = (torch.sparse.mm, torch.mm, torch.matmul)


class _Entries:
    """Stands for a sparse matrix: it has its products and nothing else, so that no other use goes on with less."""

    def __init__(self, at: Tensor, values: Tensor, rows: int | torch.SymInt) -> None:
        self._at, self._values, self._rows = at, values, rows

    def __matmul__(self, rows: PyObject) -> PyObject:
        if not isinstance(rows, Tensor) or rows.dim() != 2:
            raise NotSaveableError(_NO_OTHER)
        parts = self._values[:, None] * rows.index_select(0, self._at[1])
        return parts.new_zeros(self._rows, rows.shape[1]).index_add(0, self._at[0], parts)

    @classmethod
    def __torch_function__(
        cls, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        if func in _PRODUCTS and len(args) == 2 and isinstance(args[0], cls):
            return args[0] @ args[1]
        raise NotSaveableError(_NO_OTHER)


_NO_OTHER = (
    "the model cannot be saved: of a sparse matrix whose size data decide, a graph holds the product with a dense "
    "matrix of rows, and nothing else: write the rest with index_select and index_add, or use backend='torch' without "
    "saving"
)


def traced_form(func: FxTarget, args: Sequence[PyObject], kwargs: dict[str, PyObject]) -> PyObject:
    """What the call gives, made otherwise; None where it is left as it is."""
    if func in _BINCOUNTS:
        return _counts(*args, **kwargs)
    if func is torch.sparse_coo_tensor:
        return _entries(*args, **kwargs)
    if func in _LOG_SUMS:
        return _log_sum(func, *args, **kwargs)
    if func is F.local_response_norm:
        return _responses(*args, **kwargs)
    form = _STATISTICS.get(func)
    return form(*args, **kwargs) if form else None


def _log_sum(
    func: FxTarget, input: Tensor, dim: PyObject = None, keepdim: bool = False, **kwargs: PyObject
) -> PyObject:
    dims = [d % max(1, input.dim()) for d in ([dim] if isinstance(dim, int) else dim or ())]
    chosen = next((d for d in dims if d < input.dim() and _unknown(input.shape[d])), None)
    if chosen is None or kwargs or not input.is_floating_point():
        return None
    row = input.new_full([1 if d == chosen else size for d, size in enumerate(input.shape)], -math.inf)
    return func(torch.cat((input, row), chosen), dims, keepdim)


def _responses(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor | None:
    if input.dim() < 3 or not any(map(_unknown, input.shape)):
        return None
    padded = F.pad(input * input, (0, 0) * (input.dim() - 2) + (size // 2, (size - 1) // 2))
    means = sum(padded.narrow(1, first, input.shape[1]) for first in range(size)) / size
    return input / (means * alpha + k) ** beta


def _gaussian(
    input: Tensor, target: Tensor, var: PyObject, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> PyObject:
    if not isinstance(var, Tensor) or reduction not in ("none", "mean", "sum"):
        return None
    if var.dim() < input.dim():
        var = var.unsqueeze(-1)
    below = (var < 0).any().long().reshape(1) * 2
    var = var + var.new_zeros(2).index_select(0, below)  # of one zero it would be a check of expert ids
    kept = torch.where(var < eps, var + (eps - var).detach(), var)  # the gradient passes the limit by, as PyTorch's
    loss = 0.5 * (torch.log(kept) + (input - target) ** 2 / kept) + (0.5 * math.log(2 * math.pi) if full else 0.0)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: PyObject = None) -> Tensor | None:
    if not any(map(_unknown, input1.shape)):
        return None
    out, i, j = weight.shape
    each = (input1 @ weight.permute(1, 0, 2).reshape(i, out * j)).unflatten(-1, (out, j))
    total: Tensor = (each * input2.unsqueeze(-2)).sum(-1)
    return total if bias is None else total + bias


def _covariance(input: Tensor, correction: int = 1, fweights: PyObject = None, aweights: PyObject = None) -> PyObject:
    if input.dim() != 2 or fweights is not None or aweights is not None or not input.is_floating_point():
        return None
    rest = input - input.mean(1, keepdim=True)
    return ((rest @ rest.t()) / torch.sym_max(input.shape[1] - correction, 0)).squeeze()


def _correlation(input: Tensor) -> PyObject:
    products = _covariance(input)
    if products is None:
        return None
    if products.dim() != 2:
        return products / products
    deviation = products.diagonal().sqrt()
    return (products / deviation[:, None] / deviation).clamp(-1, 1)


_STATISTICS: dict[FxTarget, Callable[..., PyObject]] = {
    F.gaussian_nll_loss: _gaussian,
    F.bilinear: _bilinear,
    torch.cov: _covariance,
    Tensor.cov: _covariance,
    torch.corrcoef: _correlation,
    Tensor.corrcoef: _correlation,
}


def _unknown(size: int | torch.SymInt) -> bool:
    """Whether data decide a size."""
    return bool(isinstance(size, torch.SymInt) and free_unbacked_symbols(size))


class WithForms(TorchFunctionMode):
    """A mode in which each call gives its traced form, where it has one."""

    def __torch_function__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        instead = traced_form(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if instead is None else instead


def refuses_none(program: torch.export.ExportedProgram) -> bool:
    """Whether the program holds a call with a form for no rows, and an assertion that there are some."""
    ops = {node.target for node in program.graph.nodes}
    asserted = [n for n in program.graph.nodes if n.target is torch.ops.aten._assert_scalar.default]
    some = any(not re.search(r"expression u\d+ >= 0 on", str(node.args[1])) for node in asserted)
    return some and not ops.isdisjoint(_LEFT_EARLY)


def _counts(ids: Tensor, weights: PyObject = None, minlength: int = 0) -> Tensor | None:
    if not minlength:
        return None
    if weights is None:
        return ids.new_zeros(minlength, dtype=torch.int64).scatter_add(0, ids.long(), torch.ones_like(ids).long())
    wide: Tensor = weights if weights.dtype == torch.float32 else weights.double()
    return wide.new_zeros(minlength).scatter_add(0, ids.long(), wide)


def _entries(at: PyObject, values: PyObject, size: PyObject = None, **kwargs: PyObject) -> _Entries | None:
    plain = isinstance(at, Tensor) and isinstance(values, Tensor) and size is not None and not kwargs
    return _Entries(at, values, size[0]) if plain and len(size) == 2 and values.dim() == 1 else None
