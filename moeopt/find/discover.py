"""Block candidates of a whole model: module calls that may hold parallel experts or a dense FFN.

The model runs once on a tape without values. Several FFN candidates (matmul, element-wise function, matmul)
on the same rows are taken for experts. An FFN candidate whose weight is a slice of a stack, or that has unused
siblings, is taken for an expert whose siblings were not hit; a single one for a dense FFN. A block candidate is only
a hint: its probe calls decide what the block computes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moeopt.capture.replay import ancestors
from moeopt.capture.tape import record
from moeopt.capture.unregistered import is_registered, registered, unregistered
from moeopt.find.block_candidates import BlockCandidate
from moeopt.find.block_finder import Finder
from moeopt.find.light_sites import light_sites
from moeopt.recognise.ffn_candidates import find_candidates


def discover(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[BlockCandidate]:
    """Every MoE candidate and dense FFN of one run, in execution order.

    Raises:
        CaptureError: the model does not run on these inputs.
    """
    held = unregistered(model, objects=True)
    with registered(model, held):
        tape = record(model, args, kwargs, keep_values=False, lenient=True)
        sites, leaves = light_sites(tape)
        candidates = find_candidates(tape, sites, loose=True)
        places = Finder(tape, candidates, leaves).run()
    for one in held:
        hidden = {id(t) for t in one.tensors}
        for place in (q for p in places for q in (p, *p.alone) if q.weights & hidden and not q.reason):
            place.levels = [level for level in place.levels if is_registered(level.path)]
            place.call, place.reason = place.levels[0], one.reason
    return _without_parts(places)


def _without_parts(places: list[BlockCandidate]) -> list[BlockCandidate]:
    """``places`` in which those that are parts of the same declined experts are one.

    A place declined for the same reason in the same call, which reads the outputs of another place's experts, belongs
    to those experts: it holds adapters of their last matrix, after the adapters of the first matrices.
    """
    kept: list[BlockCandidate] = []
    for place in places:
        reads = ancestors(s.operand for c in place.candidates for s in c.ins) if place.reason else set()
        before = (p for p in kept if p.reason == place.reason and p.call is place.call)
        whole = next((p for p in before if any(out.node in reads for c in p.candidates for out in c.outs)), None)
        if whole is None:
            kept.append(place)
        else:
            whole.experts = min(filter(None, (whole.experts, place.experts)), default=None)
            whole.weights |= place.weights
    return kept
