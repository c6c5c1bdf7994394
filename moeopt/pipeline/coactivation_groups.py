"""Neurons that are active on the same tokens, put into one group; groups of equal size.

    f_I = |a_I| of each token, as a unit vector over the tokens        a = what W_out reads
    a neuron goes to the group whose mean vector is nearest and that has room left; means anew; a few rounds

Groups made so are the ones that a router could leave out together. Which groups they are does not change the
function: all of them run. The idea is that of MoEfication (Zhang et al. 2022, arXiv:2110.01786), which clusters
weights or activations into balanced groups.

Shape legend: T tokens, E groups, I neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.ops.activations import apply_gate
from moeopt.passes.split_dense_ffn import neighbours
from moeopt.recognise.dense_ffn import DenseFFN
from moeopt.rewrite.live_weights import LiveExpertWeights

ROUNDS = 5
MOST_TOKENS = 4096
"""Tokens that are looked at, at most."""


def activity(ffn: DenseFFN, bank: LiveExpertWeights, x: Tensor) -> Tensor:
    """(T, I) float32: how strongly each neuron of ``ffn`` answers each token of ``x``; ``bank`` holds it whole."""
    x_TH = x.movedim(ffn.axis_in, -1).flatten(0, -2)[:MOST_TOKENS]
    spec = ffn.spec
    h = []
    for w, b in zip(bank.w_in(0), bank.b_in(0), strict=True):
        w_OI = w if spec.w_in_layout == "oi" else w.t()
        h.append(torch.nn.functional.linear(x_TH.to(w.dtype), w_OI, b).float())
    return apply_gate(tuple(h), spec).abs()


def coactive(activity_TI: Tensor, groups: int) -> list[tuple[int, ...]]:
    """``groups`` groups of neurons by ``activity_TI``; sizes differ by one at most, each group in ascending order."""
    f_IT = torch.nn.functional.normalize(activity_TI.nan_to_num(0, 0, 0).t(), dim=1)
    means_ET, sizes = f_IT[_far_apart(f_IT, groups)], [len(g) for g in neighbours(len(f_IT), groups)]
    found: list[list[int]] = []
    for _ in range(ROUNDS):
        last, found = found, _assign(f_IT @ means_ET.t(), sizes)
        if found == last:
            break
        means_ET = torch.nn.functional.normalize(torch.stack([f_IT[g].mean(0) for g in found]), dim=1)
    return sorted(tuple(sorted(g)) for g in found)


def _far_apart(f_IT: Tensor, groups: int) -> list[int]:
    """The first neurons of the groups: each the one least like those before."""
    chosen = [int(f_IT.sum(1).argmax())]
    nearest_I = f_IT @ f_IT[chosen[0]]
    while len(chosen) < groups:
        nearest_I[chosen[-1]] = torch.inf
        chosen.append(int(nearest_I.argmin()))
        nearest_I = torch.maximum(nearest_I, f_IT @ f_IT[chosen[-1]])
    return chosen


def _assign(likeness_IE: Tensor, sizes: list[int]) -> list[list[int]]:
    """Each neuron to the group it is most like, the closest pairs first, as long as the group has room."""
    neurons, groups = likeness_IE.shape
    found: list[list[int]] = [[] for _ in range(groups)]
    free = [True] * neurons
    for pair in likeness_IE.flatten().argsort(descending=True, stable=True).tolist():
        neuron, group = divmod(pair, groups)
        if free[neuron] and len(found[group]) < sizes[group]:
            found[group].append(neuron)
            free[neuron] = False
    return found
