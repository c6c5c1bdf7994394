"""Places of trees of single neurons: the row that is looked up next is told by the product with the one before.

    s = x . W1[n];  y += f(s) W2[n];  n = 2 n + 1 + (s > 0)        a fast feed-forward, from the root to a leaf

No router chooses: comparisons of such products do. Text that is generated looks up rows by a choice among scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.capture.replay import ancestors
from moeopt.find.block_candidates import BlockCandidate
from moeopt.find.light_sites import leaf_of
from moeopt.find.mixed_vectors import scales
from moeopt.find.unread_blocks import UnreadBlocks

_COMPARES = {"gt", "ge", "lt", "le", "sign", "heaviside"}
_CHOICES = {"topk", "sort", "argsort", "argmax", "argmin", "max", "min", "multinomial"}


def walked_neurons(unread: UnreadBlocks) -> Iterator[BlockCandidate]:
    """The trees of neurons in the run of ``unread``, one in each call."""
    lookups: dict[str, list[fx.Node]] = {}
    for node in unread.tape.nodes:
        if op_name(node) in ("index", "index_select", "embedding") and len(node.all_input_nodes) == 2:
            path = leaf_of(unread.tape, node.all_input_nodes[0])[0]
            if path in unread.named and unread.named[path].dim() == 2:
                lookups.setdefault(path, []).append(node)
    seen = set[int]()
    for path, rows in lookups.items():
        walked = next((n for n in rows if len(rows) > 1 and _is_walked(n, rows) and scales(n, scores=True)), None)
        if walked is None or walked.meta["call"] in seen:
            continue
        seen.add(walked.meta["call"])
        ids = walked.all_input_nodes[1]
        tables = [p for p, others in lookups.items() if any(o.all_input_nodes[1] is ids for o in others)]
        call = unread.tape.calls[walked.meta["call"]]
        weights = {id(unread.named[p]) for p in tables}
        place = unread.place(call, rows[0].meta["index"], len(unread.named[path]), weights)
        reason = (
            f"its experts are single neurons of a tree: each is one row of {path.removeprefix(f'{call.path}.')}, and "
            "its product with the token tells which is next; the op groups experts of two matrices, so this block "
            "stays as it is"
        )
        yield dataclasses.replace(place, reason=reason)


def _is_walked(lookup: fx.Node, rows: list[fx.Node]) -> bool:
    """Whether the ids of ``lookup`` are made of comparisons with other ``rows`` of its table, and of no choice."""
    before = ancestors([lookup.all_input_nodes[1]])
    names = {op_name(n) for n in before}
    return not before.isdisjoint(rows) and bool(names & _COMPARES) and not names & _CHOICES
