"""Calls that ``torch.export`` cannot trace where data decide their size, and what computes the same in a graph.

    bincount(ids, minlength=n)      ones added up at the ids in n places; an id of n or more is an error there
    sparse_coo_tensor(...) @ rows   the rows that entries name, weighed by the entries, and added up

A product with a sparse matrix reads no row that has no entry, so a NaN in such a row stays where it is; one with the
same matrix filled up would spread it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeopt.errors import NotSaveableError
from moeopt.value_types import FxTarget, PyObject

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
    return None


def _counts(ids: Tensor, weights: PyObject = None, minlength: int = 0) -> Tensor | None:
    if weights is not None or not minlength:
        return None
    return ids.new_zeros(minlength, dtype=torch.int64).scatter_add(0, ids.long(), torch.ones_like(ids).long())


def _entries(at: PyObject, values: PyObject, size: PyObject = None, **kwargs: PyObject) -> _Entries | None:
    plain = isinstance(at, Tensor) and isinstance(values, Tensor) and size is not None and not kwargs
    return _Entries(at, values, size[0]) if plain and len(size) == 2 and values.dim() == 1 else None
