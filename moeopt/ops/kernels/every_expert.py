"""Every token to every expert, as under a softmax over all of them: no sort, no gather, one sum that grows in place.

    y_TO = sum over e of  (f(x_TH W_in[e]) * w_T[e]) W_out[e]  +  w_T[e] * b_out[e]

The weight multiplies the neurons in the place of the outputs, which is the same function: of experts with few neurons
(low-rank adapters) the T * E rows of outputs, written, weighed and read again, would cost more than their products.

Shape legend: T tokens, E experts, H hidden, I intermediate, O out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.activations import apply_gate
from moeopt.ops.expert_weights import ExpertWeights, StackedExpertWeights
from moeopt.ops.kernels.few_calls import all_experts, listed
from moeopt.ops.kernels.gemm import linear, power_of_two
from moeopt.ops.measured import Way, fastest
from moeopt.ops.reference import dtypes, out_features

GroupedKernel = Callable[[Tensor, Tensor, Tensor, ExpertWeights, ExpertsSpec], Tensor]
"""Arguments and result as ``experts_reference``."""

WIDEST = 512
"""Features and neurons beyond which the answer does not change any more, and more would take long to measure."""


def takes(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> bool:
    """Whether :func:`every_expert` computes this call: each row of ids is 0, 1 ... E-1, and all is float32."""
    return is_every(x_TH, ids_TK, weights_TK, bank, spec) and in_float32(bank)


def is_every(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> bool:
    """:func:`takes`, but for the weights, which take longest to look at."""
    T, K = ids_TK.shape
    if T < 2 or K < 2 or bank.num_experts != K or spec.weight_on != "output" or spec.out_norm_eps is not None:
        return False
    if {*dtypes(x_TH, spec), x_TH.dtype, weights_TK.dtype} != {torch.float32}:
        return False
    if ids_TK.stride(0) == 0:  # one row for all
        return all_experts(ids_TK, K)
    return bool((ids_TK == torch.arange(K, device=ids_TK.device)).all())


def in_float32(bank: ExpertWeights) -> bool:
    """Whether every weight and bias of the bank is float32."""
    held = (t for e in range(bank.num_experts) for t in (*bank.w_in(e), bank.w_out(e), *bank.b_in(e), bank.b_out(e)))
    return all(t is None or t.dtype == torch.float32 for t in held)


def every_expert(x_TH: Tensor, weights_TE: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> Tensor:
    """(T, O): what ``experts_reference`` computes of a call that :func:`takes` accepts; not differentiable."""
    bank = listed(bank)
    y_TO = x_TH.new_zeros(x_TH.shape[0], out_features(bank, spec))
    for e in range(bank.num_experts):
        pairs = zip(bank.w_in(e), bank.b_in(e), strict=True)
        h = tuple([linear(x_TH, w if spec.w_in_layout == "oi" else w.t(), b) for w, b in pairs])
        w_out, b_out = bank.w_out(e), bank.b_out(e)
        y_TO.addmm_(apply_gate(h, spec) * weights_TE[:, e : e + 1], w_out.t() if spec.w_out_layout == "oi" else w_out)
        if b_out is not None:
            y_TO.addr_(weights_TE[:, e], b_out)
    return y_TO


def is_faster(grouped: GroupedKernel, x_TH: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> bool:
    """Whether a call on as many rows of experts as large is quicker so than by ``grouped``, on this machine."""
    w_out = bank.w_out(0)
    O, I = w_out.shape if spec.w_out_layout == "oi" else w_out.shape[::-1]
    sizes = tuple([min(1 << (size - 1).bit_length(), WIDEST) for size in (x_TH.shape[1], I, O)])
    return _faster(grouped, power_of_two(x_TH.shape[0]), sizes, spec, torch.get_num_threads())


@functools.cache
def _faster(grouped: GroupedKernel, rows: int, sizes: tuple[int, ...], spec: ExpertsSpec, threads: int) -> bool:
    del threads  # a part of the machine that the answer is for
    widths = " x ".join(map(str, sizes))
    question = (
        f"{rows} rows to every expert of {widths}, {spec.activation}, W {spec.w_in_layout} {spec.w_out_layout}, "
        f"{'gated' if spec.gated else 'plain'}"
    )
    return fastest(question, lambda: _ways(grouped, rows, sizes, spec), "grouped", advantage=1.05) == "every"


def _ways(grouped: GroupedKernel, rows: int, sizes: tuple[int, ...], spec: ExpertsSpec) -> dict[str, Way]:
    """Four experts of the spec's function on ``rows`` rows."""
    H, I, O = sizes
    E = 4

    def matrix(out: int, into: int, layout: str) -> Tensor:
        return torch.full((E, out, into) if layout == "oi" else (E, into, out), 0.01)

    widths = {"plain": [I], "separate": [I, I]}.get(spec.rows, [2 * I])
    bank = StackedExpertWeights([matrix(n, H, spec.w_in_layout) for n in widths], matrix(O, I, spec.w_out_layout))
    x_TH, weights_TE = torch.full((rows, H), 0.5), torch.full((rows, E), 0.25)
    ids_TE = torch.arange(E).repeat(rows, 1)
    return {
        "grouped": lambda: grouped(x_TH, ids_TE, weights_TE, bank, spec),
        "every": lambda: every_expert(x_TH, weights_TE, bank, spec),
    }
