"""The experts of a bundle, whose weights are those of its file as long as it is loaded: made ready once, not each call.

The op takes its weights as lists, of which a call makes a bank and works out anew how each lies. What is here keeps
both, so that a call of few tokens costs what the kernel takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeopt.ops import quantized_experts as quantized
from moeopt.ops.expert_weights import ExpertWeights, ListExpertWeights, StackedExpertWeights, how_they_lie
from moeopt.ops.experts import decode, is_traced, run_kernel, unflatten
from moeopt.ops.native.call import transformed
from moeopt.ops.native.dispatch import quantized_on_cpu
from moeopt.ops.quantized_bank import QuantizedExpertWeights, check_bank
from moeopt.ops.reference import dtypes
from moeopt.value_types import PyObject


class _Kept:
    """Weights that lie where they lay: a kernel remembers its calls of them, as of ``LiveExpertWeights``."""

    _tensors: tuple[Tensor, ...]

    def keep(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._calls = tuple(tensors), dict[PyObject, PyObject]()
        self._lie = how_they_lie(self._tensors)

    def remembered(self, rows: int) -> tuple[dict[PyObject, PyObject], tuple[Tensor, ...]] | None:
        """What a kernel has worked out of them, for it to fill, and all of them; None where one was moved."""
        del rows
        return (self._calls, self._tensors) if how_they_lie(self._tensors) == self._lie else None


class _KeptStack(_Kept, StackedExpertWeights):
    """Stacked ones."""


class _KeptLists(_Kept, ListExpertWeights):
    """Separate ones."""


class _KeptCodes(_Kept, QuantizedExpertWeights):
    """Codes and scales."""


class FixedExperts:
    """``torch.ops.moeopt.experts`` on lists of weights that stay what they are, called with x, ids and weights alone.

    Args:
        lists: w_in, w_out, b_in, b_out and norm, as the op takes them.
        spec: the function, as the op takes it.
    """

    def __init__(self, lists: Sequence[Sequence[Tensor]], spec: str) -> None:
        self._lists, self._text, self._spec = [list(part) for part in lists], spec, decode(spec)
        bank = unflatten(self._lists, self._spec)
        kept: PyObject
        if isinstance(bank, StackedExpertWeights):
            kept = _KeptStack(bank.w_in_s, bank.w_out_s, bank.b_in_s, bank.b_out_s, bank.norm_s)
        else:
            assert isinstance(bank, ListExpertWeights)
            kept = _KeptLists(bank.w_in_l, bank.w_out_l, bank.b_in_l, bank.b_out_l, bank.norm_l)
        kept.keep([t for part in self._lists for t in part])
        self._bank: ExpertWeights = kept

    def __call__(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """(T, H_out), as the op gives it; no gradient is recorded."""
        if torch.is_grad_enabled() or is_traced(x_TH) or transformed():
            y_TH: Tensor = torch.ops.moeopt.experts(x_TH, ids_TK, weights_TK, *self._lists, self._text)
            return y_TH
        return run_kernel(x_TH, ids_TK, weights_TK, self._bank, self._spec)


class FixedQuantizedExperts:
    """:class:`FixedExperts` of ``torch.ops.moeopt.quantized_experts``.

    Args:
        lists: w_in, w_out, b_in, b_out and norm, as the op takes them.
        spec, formats: as the op takes them.
    """

    def __init__(self, lists: Sequence[Sequence[Tensor]], spec: str, formats: str) -> None:
        self._lists, self._texts = [list(part) for part in lists], (spec, formats)
        self._spec, self._bank = decode(spec), quantized.unflatten(self._lists, quantized.decode_formats(formats))
        check_bank(self._bank, self._spec)
        self._in: dict[torch.dtype, _KeptCodes] = {}

    def __call__(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """(T, H_out), as the op gives it; no gradient is recorded."""
        seen = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_traced(x_TH) or transformed()
        if seen or not x_TH.is_cpu:
            op = torch.ops.moeopt.quantized_experts
            y_TH: Tensor = op(x_TH, ids_TK, weights_TK, *self._lists, *self._texts)
            return y_TH
        dtype = dtypes(x_TH, self._spec)[0]
        bank = self._in.get(dtype)
        if bank is None:
            bank = self._in[dtype] = self._handed_out(dtype)
        return quantized_on_cpu(x_TH, ids_TK, weights_TK, bank, self._spec)

    def _handed_out(self, dtype: torch.dtype) -> _KeptCodes:
        b = quantized.in_spec(self._bank, self._spec, dtype)
        kept = _KeptCodes(b.w_in_q, b.w_out_q, b.b_in_l, b.b_out_l, b.norm_l, b.layouts, b.dtype, b.format)
        kept.keep([t for part in self._lists for t in part])
        return kept
