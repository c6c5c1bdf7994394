"""Experts in codes whose products read rows of 8 bits, in a model that was verified with float rows.

``QuantPlan(activations="int8")`` on the torch backend. Each kind of codes is asked first whether moeopt's kernel takes
it and computes just the rounding of ``moeopt.ops.rounded_rows``; the others keep float rows, and a note says why.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from moeopt.capture.tape import clone_inputs
from moeopt.capture.tree import ArgsKwargs
from moeopt.ir.bank_format import BankFormat
from moeopt.listed import listed
from moeopt.ops.native.call import call as run_native
from moeopt.ops.native.library import Library, library, missing
from moeopt.ops.native.rounded_check import rounded_error
from moeopt.ops.unfit import Unfit
from moeopt.quantization.quantized_model import quantized_blocks
from moeopt.rewrite.install import RewrittenForward
from moeopt.rewrite.live_codes import LiveCodes
from moeopt.verification.model import run_plain
from moeopt.verification.rounded import ALLOWED, RoundedKernels, distance_between


class _CodedOp(NamedTuple):
    """The op of that number in a rewritten block, and its codes."""

    block: str
    forward: RewrittenForward
    number: int
    codes: LiveCodes


def round_rows(twin: nn.Module, call: ArgsKwargs) -> tuple[dict[str, float], list[str]]:
    """Let the experts in codes of ``twin`` round their rows from now on, where that can be.

    Returns:
        ``certificate.activations``, {} where none does; and sentences on those that do not.
    """
    native, banks = library(), _banks(twin)
    kinds: dict[BankFormat, tuple[float, float]] = {}
    chosen, left = list[_CodedOp](), defaultdict[str, list[str]](list)
    for bank in banks:
        reason = _why_not(native, bank.codes, kinds)
        if reason:
            left[reason].append(bank.block)
        else:
            chosen.append(bank)
    notes = [f"activations stay floats in {listed(sorted(set(names)))}: {reason}" for reason, names in left.items()]
    if not chosen:
        return {}, notes or ["activations stay floats: no experts of this model are in codes"]
    before = _outputs(twin, call)
    _read(chosen, "int8")
    products = sum(bank.codes.num_experts * (len(bank.codes.format.w_in) + 1) for bank in chosen)
    error, moved = (max(figures) for figures in zip(*kinds.values(), strict=True))
    kernels = RoundedKernels(products, len(kinds), error, moved)
    return kernels.stated(distance_between(before, _outputs(twin, call))), notes


@contextlib.contextmanager
def reading_floats(model: nn.Module) -> Iterator[nn.Module]:
    """While open, ``model`` is in the form that was verified: the rows of all its experts are floats."""
    rounded = [bank for bank in _banks(model) if bank.codes.rounds]
    _read(rounded, "float")
    try:
        yield model
    finally:
        _read(rounded, "int8")


def _banks(model: nn.Module) -> list[_CodedOp]:
    return [
        _CodedOp(path or type(model).__name__, forward, number, codes)
        for path, (forward, _) in quantized_blocks(model).items()
        for number, (codes, _) in enumerate(forward.banks)
        if isinstance(codes, LiveCodes)
    ]


def _read(banks: list[_CodedOp], activations: str) -> None:
    for bank in banks:
        bank.codes.read(activations)
        bank.forward.program.block.formats[bank.number] = bank.codes.format  # which copies of the block are made of


def _why_not(native: Library | None, codes: LiveCodes, kinds: dict[BankFormat, tuple[float, float]]) -> str:
    """Why rows that meet ``codes`` stay floats; "" where the kernel rounds them. ``kinds`` gets what it was asked."""
    if native is None:
        return f"moeopt's kernel rounds them, and is not used: {missing() or 'MOEOPT_NATIVE is off'}"
    device, (_, H) = codes.tensors()["w_out_codes"].device, codes.format.w_in[0].shape
    if device.type != "cpu":
        return f"moeopt's kernel rounds them, which is for CPUs, and the model is on {device}"
    x, ids = torch.zeros(1, H, dtype=codes.float_dtype), torch.zeros(1, 1, dtype=torch.int64)
    kind = BankFormat(1, codes.format.w_in, codes.format.w_out)
    try:
        with torch.no_grad():
            run_native(native.run, x, ids, x.new_ones(1, 1), codes.reading("int8"), codes.spec, native.bit)
            found = kinds[kind] if kind in kinds else rounded_error(native.run, native.bit, kind)
    except Unfit as err:
        return str(err)
    if not found[0] <= ALLOWED:
        return f"the kernel is {found[0]:.3g} eps from what rounding {kind.w_out.format} rows to int8 gives"
    kinds[kind] = found
    return ""


def _outputs(model: nn.Module, call: ArgsKwargs) -> object:
    args, kwargs = clone_inputs(call)  # a forward may write into its arguments
    return run_plain(model, args, kwargs)
