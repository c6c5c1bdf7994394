"""A small call again: nothing but addresses differs from one that the kernel has done, and its words are still there.

What took the time of a call of one token was not the kernel but what is asked of its arguments, most of which has the
same answer as the last time. The answers hold for a key of dtypes, sizes and threads; what no key holds (whether a
tensor is a plain one, in one run, on the CPU) is asked again at each call, and a live bank tells whether its weights
lie as they lay.

Shape legend: T tokens, E experts, K chosen per token, H hidden, D out.
"""

from __future__ import annotations

import ctypes
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.every_ids import is_kept, names_every
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.native.call import ADDRESSES, INTEGERS, NativeRun, Prepared, prepared_call, transformed
from moeopt.ops.native.hidden import KEPT, Hidden

SMALL = 64
"""Rows up to which a call is remembered; with more, the products take so long that the rest does not count."""
MOST = 64
"""Keys that one bank remembers."""

_PLAIN = (Tensor, nn.Parameter)
KnownCalls = dict[Any, Any]
"""What a live bank keeps for the kernel as long as its weights lie as they lay: calls by their keys, and entries."""


class CallDone(NamedTuple):
    """A call that was done: for which function and kernel, and its words with all that they point to."""

    spec: ExpertsSpec
    run: NativeRun
    prepared: Prepared
    dtype: torch.dtype


def call(
    run: NativeRun, x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertWeights, spec: ExpertsSpec, isa: int,
    known: KnownCalls | None = None, hidden: Hidden | None = None,
) -> Tensor:  # fmt: skip
    """As ``native.call.call``; it is kept among what is ``known`` of the bank's weights, if it is small."""
    y, prepared = prepared_call(run, x, ids, weights, bank, spec, isa, known, hidden)
    if known is None or ids.numel() > SMALL or ids.dtype not in INTEGERS or not prepared.whole:
        return y  # ids of another dtype were converted
    if _in_one_run(x) and _in_one_run(weights) and (is_kept(ids) or _in_one_run(ids)):
        if len(known) >= MOST:
            known.clear()
        known[_key(x, ids, weights, bank.num_experts)] = CallDone(spec, run, prepared, y.dtype)
    return y


def again(
    known: KnownCalls, run: NativeRun, x: Tensor, ids: Tensor, weights: Tensor, spec: ExpertsSpec, experts: int,
    hidden: Hidden | None = None,
) -> Tensor | None:  # fmt: skip
    """The answer (T, D) to a call that was remembered; None where it is another.

    Args:
        known: calls on the weights as they lie now; who calls keeps those alive.
        experts: E.
        hidden: as for ``native.call.prepared_call``.
    """
    if ids.numel() > SMALL or ids.dim() != 2:
        return None
    done: CallDone | None = known.get(_key(x, ids, weights, experts))
    if done is None or done.spec is not spec or done.run is not run or transformed():
        return None
    if not (_in_one_run(x) and _in_one_run(weights) and (is_kept(ids) or _in_one_run(ids))):
        return None
    words = array("q", done.prepared.words)
    y = x.new_empty(words[2], words[6], dtype=done.dtype)
    for at, t in zip(ADDRESSES, (x, ids, weights, y), strict=True):
        words[at] = t.data_ptr()
    words[KEPT] = words[KEPT + 1] = 0
    rows = None if hidden is None else hidden.place(words, x, spec, done.prepared.held[1])
    if run(ctypes.c_void_p(words.buffer_info()[0])):
        return None
    if hidden is not None:
        hidden.rows = rows
    return y


def _key(x: Tensor, ids: Tensor, weights: Tensor, experts: int) -> tuple[object, ...]:
    """With whether each row of the ids is kept in the same memory, and whether each names every expert.

    Other kernels than this one may be the quicker where every expert takes every row.
    """
    every = ids.shape[1] == experts and names_every(ids, experts)
    sizes = x.dtype, x.shape, ids.dtype, ids.shape, weights.dtype, weights.shape
    return *sizes, torch.get_num_threads(), every, every and is_kept(ids)


def _in_one_run(t: Tensor) -> bool:
    """Whether the numbers of a tensor lie at its address one after the other."""
    return type(t) in _PLAIN and t.is_cpu and t.layout is torch.strided and t.is_contiguous() and not t.is_neg()
