"""A small call again: nothing but addresses differs from one that the kernel has done, and its words are still there.

What took the time of a call of one token was not the kernel but what is asked of its arguments, most of which has the
same answer as the last time. The answers hold for a key of dtypes, sizes and threads; what no key holds (whether a
tensor is a plain one, in one run, on the CPU) is asked again at each call.

Shape legend: T tokens, E experts, K chosen per token, H hidden, D out.
"""

from __future__ import annotations

import ctypes
from array import array
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ExpertWeights, StackedExpertWeights
from moeopt.ops.native.call import ADDRESSES, INTEGERS, NativeRun, Prepared, prepared_call, transformed

SMALL = 64
"""Rows up to which a call is remembered; with more, the products take so long that the rest does not count."""
MOST = 64
"""Keys that one bank remembers."""

_PLAIN = (Tensor, nn.Parameter)


class CallDone(NamedTuple):
    """A call that was done: for which function and kernel, and its words with all that they point to."""

    spec: ExpertsSpec
    run: NativeRun
    prepared: Prepared
    dtype: torch.dtype


def call(
    run: NativeRun, x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertWeights, spec: ExpertsSpec, isa: int
) -> Tensor:
    """As ``native.call.call``; stacked weights that a live bank gives out remember it, if it is small.

    Not where a token may name every expert: other kernels take a call in which each does, and that hangs on the ids.
    """
    y, prepared = prepared_call(run, x, ids, weights, bank, spec, isa)
    if ids.numel() > SMALL or ids.dtype not in INTEGERS or not isinstance(bank, StackedExpertWeights):
        return y  # ids of another dtype were converted
    if bank.again is None:
        return y
    every = ids.shape[1] == bank.num_experts and (ids.shape[0] > 1 or x.dtype is not torch.float32)
    if not every and _in_one_run(x) and _in_one_run(ids) and _in_one_run(weights):
        if len(bank.again) >= MOST:
            bank.again.clear()
        bank.again[_key(x, ids, weights)] = CallDone(spec, run, prepared, y.dtype)
    return y


def again(
    bank: StackedExpertWeights, run: NativeRun, x: Tensor, ids: Tensor, weights: Tensor, spec: ExpertsSpec
) -> Tensor | None:
    """The answer (T, D) to a call that was remembered; None where it is another.

    Args:
        bank: whose tensors lie where they lay when the call was remembered, as a live bank knows of those it gives out.
    """
    known = None if bank.again is None else bank.again.get(_key(x, ids, weights))
    if known is None or known.spec is not spec or known.run is not run or transformed():
        return None
    if not (_in_one_run(x) and _in_one_run(ids) and _in_one_run(weights)):
        return None
    words = array("q", known.prepared.words)
    y = x.new_empty(words[2], words[6], dtype=known.dtype)
    for at, t in zip(ADDRESSES, (x, ids, weights, y), strict=True):
        words[at] = t.data_ptr()
    return None if run(ctypes.c_void_p(words.buffer_info()[0])) else y


def _key(x: Tensor, ids: Tensor, weights: Tensor) -> tuple[object, ...]:
    return x.dtype, x.shape, ids.dtype, ids.shape, weights.dtype, weights.shape, torch.get_num_threads()


def _in_one_run(t: Tensor) -> bool:
    """Whether the numbers of a tensor lie at its address one after the other."""
    return type(t) in _PLAIN and t.is_cpu and t.layout is torch.strided and t.is_contiguous() and not t.is_neg()
