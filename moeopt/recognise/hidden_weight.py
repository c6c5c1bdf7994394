"""A routing weight between an expert's two matmuls is a weight on its output, where the second has no bias.

    W_out (a * w)  ==  (W_out a) * w          a (R, I) the activated rows, w (R, 1) a number for each

So such a factor is taken out of the function that is fitted, and each row's is read by value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.capture.replay import ancestors, replay
from moeopt.capture.tape import Tape
from moeopt.recognise.ffn_candidates import FFNCandidate
from moeopt.recognise.gemm_sites import GemmSite

_EXACT = 1e-12
"""Relative, in float64."""


def row_factors(tape: Tape, candidate: FFNCandidate, out: GemmSite) -> dict[fx.Node, torch.Tensor]:
    """Tensors of one number a row by which the rows between the matmuls are multiplied, each with ones for it."""
    if any(b is not None for b in out.biases):
        return {}
    tracked = {s.node for s in candidate.ins}
    found: dict[fx.Node, torch.Tensor] = {}
    for node in candidate.mid:
        inputs = node.all_input_nodes
        if not any(a in tracked for a in inputs):
            continue
        tracked.add(node)
        if op_name(node) != "mul" or len(inputs) != 2:
            continue
        for factor in (a for a in inputs if a not in tracked):
            shape = factor.meta.get("shape") or ()
            if shape[-1:] == (1,) and node.meta["shape"][-1] > 1 and factor.meta["dtype"].is_floating_point:
                if any(a.op == "placeholder" for a in ancestors([factor])):
                    found[factor] = torch.ones(shape, dtype=torch.float64)
    return found


def row_weights(
    tape: Tape, candidate: FFNCandidate, out: GemmSite, factors: dict[fx.Node, torch.Tensor]
) -> torch.Tensor | None:
    """(R,) by what each operand row of ``out`` is multiplied; None where that is 1 for all, or no plain factor."""
    generator = torch.Generator().manual_seed(0)
    given: dict[fx.Node, Any] = {}
    for site in candidate.ins:
        rows = torch.randn(site.matrix.numel(), site.matrices[0].m, generator=generator, dtype=torch.float64)
        given[site.node] = site.from_rows(rows, tape.value(site.node))
    own = {f: tape.value(f).double() for f in factors}
    weighed, plain = (
        out.rows_in(replay(tape, candidate.mid, {**given, **values}, torch.float64)[out.operand])
        for values in (own, factors)
    )
    at = plain.abs().argmax(-1, keepdim=True)
    weights = (weighed.gather(1, at) / plain.gather(1, at)).nan_to_num()
    linear = (weighed - weights * plain).abs() <= _EXACT * weighed.abs().amax(-1, keepdim=True)
    if not bool(linear.all()) or bool((weights == 1).all()):
        return None
    return weights[:, 0]
