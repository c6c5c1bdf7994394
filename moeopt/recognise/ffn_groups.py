"""Groups of FFN candidates that may be the experts of one block."""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from moeopt.capture.tape import Tape
from moeopt.recognise.ffn_candidates import FFNCandidate


def group_candidates(tape: Tape, candidates: list[FFNCandidate]) -> list[list[FFNCandidate]]:
    """Sets of candidates that may be the experts of one block, likeliest first.

    A merged candidate is a set of its own; the others are set together when their matrices have the same
    sizes, none reads another's output, and their in-sites are not one and the same. Experts may differ in their
    number of neurons: then candidates are set together whose Parameters are named alike but for a number.
    """
    groups: list[list[FFNCandidate]] = [[c] for c in candidates if c.merged]
    named: dict[Any, list[FFNCandidate]] = {}
    for candidate in candidates:
        if not candidate.merged:
            ends = (candidate.ins[0].matrices[0], candidate.out.matrices[0])
            paths = tuple(re.sub(r"\d+", "#", r.path) for r in ends if re.search(r"\d", r.path))
            if len(paths) == 2:
                named.setdefault((len(candidate.ins), paths, ends[0].k, ends[1].m), []).append(candidate)
    for members in named.values():
        if len({c.shape for c in members}) > 1:
            groups.extend(g for g in _parallel(tape, members) if len({c.shape for c in g}) > 1)
    by_shape: dict[Any, list[FFNCandidate]] = {}
    for candidate in candidates:
        if not candidate.merged:
            by_shape.setdefault(candidate.shape, []).append(candidate)
    for members in by_shape.values():
        groups.extend(_parallel(tape, members))
    if all(len(g) == 1 for g in groups):  # experts of different sizes: found, so that they can be declined
        alike: dict[Any, list[FFNCandidate]] = {}
        for candidate in candidates:
            if not candidate.merged:
                alike.setdefault(
                    (len(candidate.ins), candidate.ins[0].matrices[0].k, candidate.out.matrices[0].m), []
                ).append(candidate)
        for members in alike.values():
            groups.extend(g for g in _parallel(tape, members) if len(g) > 1)
    return sorted(groups, key=lambda g: (-(len(g) + 10**6 * g[0].merged), g[0].out.node.meta["index"]))


def _parallel(tape: Tape, members: list[FFNCandidate]) -> list[list[FFNCandidate]]:
    """Split candidates that depend on one another (layers) into runs that do not."""
    out_of = {c.out.node: i for i, c in enumerate(members)}
    level: dict[fx.Node, int] = {}
    depth = []
    nodes = [c.out.node for c in members]
    graph_order = sorted(nodes, key=lambda n: n.meta["index"])
    if len(graph_order) == 1:
        return [members]
    for node in tape.nodes[graph_order[0].meta["index"] : graph_order[-1].meta["index"] + 1]:
        here = max((level.get(a, 0) for a in node.all_input_nodes), default=0)
        if node in out_of:
            depth.append((out_of[node], here))
            here += 1
        if here:
            level[node] = here
    runs: dict[int, list[FFNCandidate]] = {}
    known = dict(depth)
    for i, candidate in enumerate(members):
        runs.setdefault(known.get(i, 0), []).append(candidate)
    return list(runs.values())


def source_of(candidate: FFNCandidate) -> str:
    """The user's line of the first matmul."""
    return str(candidate.ins[0].matmul.meta.get("source") or "")
