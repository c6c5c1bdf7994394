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
from moeopt.backends.onnxrt.providers import runtime
from moeopt.ir.row_function import RowFunction
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.base import Lowering
from moeopt.lower.onnx.plan import LoweringChoice, Runnable
from moeopt.ops.expert_weights import StackedExpertWeights
from moeopt.ops.measured import Way, fastest
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices
from moeopt.ops.reference import experts_reference
from moeopt.options import measuring
from moeopt.verification.distance import as_rows, finite_rows, token_distance
from moeopt.verification.judge import EPS_ALLOWANCE, FACTOR

BYTES = 64 << 20
"""Of the experts that are measured: more than a cache holds. A block of fewer bytes is measured whole."""
ALIKE = 64
"""Rounding errors between two orders of a sum, in eps of a token's length; what is further apart is looked at again."""

OpenSession = Callable[[ExpertsNode, Lowering], Runnable]


def native_choice(
    site: ExpertsNode, base: LoweringChoice, counts: tuple[int, ...], open_session: OpenSession
) -> LoweringChoice | None:
    """The native lowering on the weights that ``base`` stores, if it is the faster on this machine; else None."""
    plain = base.lowering
    if plain is None or isinstance(site.spec, RowFunction) or not measuring():
        return None
    native = Native(plain)
    if native.refuses(site, "cpu"):
        return None
    library = native_library()
    if library is None:
        return None
    shapes: list[list[object]] = [list(w.shape) for w in (*site.bank.w_in(0), site.bank.w_out(0))]
    if isinstance(site.bank, QuantizedExpertWeights):
        shapes.append([str(site.bank.w_out_q.matrix.format)])
    question = (
        f"experts of an ONNX graph: {site.spec.encode()}, E {site.bank.num_experts}, K {site.top_k}, {shapes}, "
        f"each of T {list(counts)}, {base.name} of onnxruntime {runtime().__version__}, {library.isa}"
    )

    def ways() -> Mapping[str, Way]:
        few = _few(site)
        calls = [_feeds(few, T) for T in counts]
        forms: dict[str, Lowering] = {base.name: plain, native.name: native}
        sessions = {name: open_session(few, low) for name, low in forms.items()}
        return {name: _runs(session, calls) for name, session in sessions.items()}

    if fastest(question, ways, base.name, advantage=1.03) != native.name:
        return None
    return LoweringChoice(native.name, native, f"measured faster than {base.name} here", base.seconds)


def _runs(session: Runnable, calls: list[dict[str, Tensor]]) -> Way:
    """A call for each number of tokens, which count the same: a prompt's seconds would hide the steps after it."""
    return [functools.partial(session.run, feeds) for feeds in calls]


def _few(site: ExpertsNode) -> ExpertsNode:
    """A block of the site's function and sizes, with as many experts as ``BYTES`` hold."""
    if isinstance(site.bank, QuantizedExpertWeights):
        return _few_of_codes(site, site.bank)
    one = [*site.bank.w_in(0), site.bank.w_out(0)]
    E = max(2, min(site.bank.num_experts, BYTES // max(1, sum(4 * w.numel() for w in one))))
    *w_in, w_out = (torch.full((E, *w.shape), 0.01, dtype=site.dtype) for w in one)
    bank = StackedExpertWeights(w_in, w_out)
    return dataclasses.replace(site, bank=bank, top_k=min(site.top_k, E))


def _few_of_codes(site: ExpertsNode, bank: QuantizedExpertWeights) -> ExpertsNode:
    E = min(bank.num_experts, max(2, BYTES * bank.num_experts // max(1, bank.nbytes)))
    *w_in, w_out = (QuantizedMatrices.of([m[e] for e in range(E)]) for m in (*bank.w_in_q, bank.w_out_q))
    few = QuantizedExpertWeights(w_in, w_out, layouts=bank.layouts, dtype=bank.dtype)
    return dataclasses.replace(site, bank=few, top_k=min(site.top_k, E))


def _feeds(site: ExpertsNode, T: int) -> dict[str, Tensor]:
    E, K = site.bank.num_experts, site.top_k
    ids = (torch.arange(T)[:, None] + torch.arange(K)) % E
    return {
        "x": torch.full((T, site.features), 0.5, dtype=site.dtype),
        "ids": ids,
        "weights": torch.full((T, K), 0.5, dtype=site.weights_dtype),
    }


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
