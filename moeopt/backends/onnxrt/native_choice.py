"""Whether a block's experts run in moeopt's own operator: where it is measured to be faster, and the answers agree.

Shape legend: T tokens, K chosen per token, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moeopt.backends.onnxrt.custom_op import native_library
from moeopt.backends.onnxrt.lowerings.native import Native
from moeopt.backends.onnxrt.lowerings.quantized import UnrolledBytes, UnrolledCodes
from moeopt.backends.onnxrt.measured_sites import MeasuredRun, measured_calls
from moeopt.backends.onnxrt.providers import runtime
from moeopt.ir.row_function import RowFunction
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.base import Lowering
from moeopt.lower.onnx.plan import LoweringChoice, Runnable
from moeopt.ops.measured import Way, fastest
from moeopt.ops.quantized_bank import QuantizedExpertWeights
from moeopt.ops.reference import experts_reference
from moeopt.ops.rounded_rows import ROW_BLOCK
from moeopt.options import measuring
from moeopt.verification.distance import as_rows, finite_rows, token_distance
from moeopt.verification.judge import EPS_ALLOWANCE, FACTOR

ALIKE = 64
"""Rounding errors between two orders of a sum, in eps of a token's length; what is further apart is looked at again."""

OpenSession = Callable[[ExpertsNode, Lowering], Runnable]


def native_choice(
    site: ExpertsNode, base: LoweringChoice, counts: tuple[int, ...], open_session: OpenSession, rounds: bool = False
) -> LoweringChoice | None:
    """The native lowering on the weights that ``base`` stores, unless that is the faster on this machine; else None.

    Where both are as fast the native one is taken: its weights stay where the file is mapped, and ONNX Runtime's own
    products keep a second, packed copy of each.

    Args:
        rounds: whether products of codes round what they read, and do so in the sessions that are opened.
    """
    plain = base.lowering
    if plain is None or isinstance(site.spec, RowFunction) or not measuring():
        return None
    native = Native(plain)
    if native.refuses(site, "cpu") or (rounds and not _rounds_alike(site, plain)):
        return None
    library = native_library()
    if library is None:
        return None
    shapes: list[list[object]] = [list(w.shape) for w in (*site.bank.w_in(0), site.bank.w_out(0))]
    if isinstance(site.bank, QuantizedExpertWeights):
        shapes.append([str(site.bank.w_out_q.matrix.format)])
    question = (
        f"experts of an ONNX graph: {site.spec.encode()}, E {site.bank.num_experts}, K {site.top_k}, {shapes}, "
        f"whole blocks of T {list(counts)}, {base.name} of onnxruntime {runtime().__version__}, {library.isa}"
        + ", rows of 8 bits"
        * rounds
    )

    def ways() -> Mapping[str, Way]:
        calls = measured_calls(site, counts)
        blocks = list({id(run.block): run.block for call in calls for run in call}.values())
        forms: dict[str, Lowering] = {base.name: plain, native.name: native}
        return {name: _runs(calls, {id(b): open_session(b, low) for b in blocks}) for name, low in forms.items()}

    if fastest(question, ways, native.name, advantage=1.03) != native.name:
        return None
    return LoweringChoice(native.name, native, f"measured no slower than {base.name} here", base.seconds)


def _rounds_alike(site: ExpertsNode, plain: Lowering) -> bool:
    """Whether both forms of a block read rows of 8 bits where products of codes do, or both read floats."""
    if not isinstance(site.bank, QuantizedExpertWeights):
        return True
    blocks = [(m.matrix.format.block[1], m.matrix.shape[1]) for m in (*site.bank.w_in_q, site.bank.w_out_q)]
    whole = all(block is None or block >= columns or block % ROW_BLOCK == 0 for block, columns in blocks)
    return plain.name in (UnrolledCodes.name, UnrolledBytes.name) and whole


def _runs(calls: list[list[MeasuredRun]], sessions: Mapping[int, Runnable]) -> Way:
    """A call for each number of tokens, which count the same: a prompt's seconds would hide the steps after it.

    ``sessions``: by the identity of the block that each runs.
    """

    def whole(call: list[MeasuredRun]) -> None:
        for run in call:
            for _ in range(run.times):
                sessions[id(run.block)].run(run.feeds)

    return [functools.partial(whole, call) for call in calls]


class BothForms:
    """A block in its native form and in the form that plain ONNX Runtime runs, each call answered by both.

    The first one's answer is given, unless the two differ by more than rounding: ``differ`` is then told why, and the
    second answers from there on. So a block that is verified is verified in both forms.
    """

    def __init__(self, site: ExpertsNode, native: Runnable, plain: Runnable, differ: Callable[[str], None]) -> None:
        self._site, self._native, self._plain, self._differ = site, native, plain, differ
        self._given_up = False

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        plain = self._plain.run(inputs)
        if self._given_up:
            return plain
        native = self._native.run(inputs)
        if reason := _difference(self._site, inputs, native[0], plain[0]):
            self._given_up = True
            self._differ(reason)
            return plain
        return native


def _difference(site: ExpertsNode, inputs: Mapping[str, Tensor], native: Tensor, plain: Tensor) -> str:
    """How the two forms differ, in words; "" where both are as near to the truth as a block may be."""
    if native.shape != plain.shape or native.dtype != plain.dtype:
        return f"its result is {native.dtype} {tuple(native.shape)}, and the plain form's {tuple(plain.shape)}"
    one, two = finite_rows(as_rows(native)), finite_rows(as_rows(plain))
    if not torch.equal(one, two):
        return "its result is finite for other tokens than the plain form's"
    if not one.any():
        return ""
    eps = torch.finfo(plain.dtype).eps
    if float(token_distance(native, plain.double())[one].max()) <= ALIKE * eps:
        return ""
    x, ids, weights = (inputs[name] for name in ("x", "ids", "weights"))
    with torch.no_grad():
        own = experts_reference(x, ids, weights, site.bank, site.spec)
        spec = dataclasses.replace(site.spec, compute_dtype=None, act_dtype=None, accum_dtype=None, out_dtype=None)
        true = experts_reference(x.double(), ids, weights.double(), site.bank, spec)
    budget = FACTOR * float(token_distance(own, true)[one].nan_to_num().max()) + EPS_ALLOWANCE * eps
    far = [float(token_distance(y, true)[one].nan_to_num(nan=float("inf")).max()) for y in (native, plain)]
    if max(far) <= budget:
        return ""
    return f"it is {far[0]:.2e} from the float64 result, the plain form {far[1]:.2e}, and {budget:.2e} is allowed"
