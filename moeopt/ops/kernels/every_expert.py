"""Every token to every expert, as under a softmax over all of them: no sort, no gather, one sum that grows in place.

    y_TO = sum over e of  (f(x_TH W_in[e]) * w_T[e]) W_out[e]  +  w_T[e] * b_out[e]

The weight multiplies the neurons in the place of the outputs, which is the same function: of experts with few neurons
(low-rank adapters) the T * E rows of outputs, written, weighed and read again, would cost more than their products.

Shape legend: T tokens, E experts, H hidden, I intermediate, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.activations import apply_gate
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.kernels.few_calls import listed
from moeopt.ops.kernels.gemm import linear
from moeopt.ops.reference import dtypes, out_features


def fits(x_TH: Tensor, weights_TE: Tensor, spec: ExpertsSpec) -> bool:
    """Whether :func:`every_expert` computes the function of a call whose bank is :func:`in_float32`."""
    if spec.weight_on != "output" or spec.out_norm_eps is not None:
        return False
    return {*dtypes(x_TH, spec), x_TH.dtype, weights_TE.dtype} == {torch.float32}


def in_float32(bank: ExpertWeights) -> bool:
    """Whether every weight and bias of the bank is float32."""
    held = (t for e in range(bank.num_experts) for t in (*bank.w_in(e), bank.w_out(e), *bank.b_in(e), bank.b_out(e)))
    return all(t is None or t.dtype == torch.float32 for t in held)


def every_expert(x_TH: Tensor, weights_TE: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> Tensor:
    """(T, O): what ``experts_reference`` computes of float32 that :func:`fits`; not differentiable."""
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
