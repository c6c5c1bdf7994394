"""Places of experts that share every matrix, or have none, and hold vectors of their own.

    y[rows_e] += W2 (f(W1 x[rows_e] * d_e) * b_e)      adapters of vectors alone (IA3, VeRA with shared A and B)
    y[rows_e] += x[rows_e] * d_e + b_e                 no matrix: scales, biases, norms
    y = sum over e of gate(x)[e] * f(x * d_e)          all run, and a gate weighs them

Told by the rows that an index picked for each: values computed of the rows of one index meet vectors that values
computed of another's do not. Where all run, by the gate, which is as wide as there are vectors.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import fx

from moeopt.capture.op_kinds import CHOICES_AMONG, GATES, WEIGH, is_factory, is_pointwise, moves_rows, op_name
from moeopt.capture.replay import ancestors, descendants
from moeopt.capture.tape import Call, Tape
from moeopt.find.block_candidates import BlockCandidate, numbered_tensors
from moeopt.find.module_lists import gate_width
from moeopt.find.unread_blocks import UnreadBlocks, calls_of_blocks
from moeopt.listed import listed

_PICKS = ("index", "index_select", "masked_select")
_PARTS = ("split", "split_with_sizes", "chunk")
_WRITES = ("index_add", "index_put", "index_copy", "scatter", "scatter_add", "scatter_reduce", "masked_scatter",
           "slice_scatter", "select_scatter", "cat", "stack", "copy", "index_reduce")  # fmt: skip
"""What puts the rows of one expert beside those of others."""
_NEAR = 32
"""Calls that are looked at between a weight and its gate."""
_CONSTANT = (
    "its experts are vectors ({}), and a token's result is the weighed sum of those that its router chose: no expert "
    "reads the token's row, so there is nothing to group; this block stays as it is"
)


class _Use(NamedTuple):
    """A call that reads a part of the tensor at ``path``, with rows that ``pick`` picked, if any."""

    node: fx.Node
    pick: fx.Node | None
    path: str
    part: tuple[Any, ...]


def own_vectors(unread: UnreadBlocks, places: list[BlockCandidate]) -> Iterator[BlockCandidate]:
    """The mixtures of such experts in the run of ``unread``, outside the calls of ``places``. Around these, in modules
    that hold blocks too, only rows that are picked tell them: a gate may be as wide as there are layers by chance."""
    around_blocks, blocks = calls_of_blocks(places), {p.call.index for p in places if p.kind == "moe"}
    uses = _uses(unread, [p.call for p in places if p.kind == "moe"])
    homes: dict[int, list[list[_Use]]] = {}
    for own in _alike(unread, uses):
        around = _around(unread.tape, own)
        if around in blocks or own[0].node in ancestors([own[-1].node]):
            continue
        if _are_apart(own) or (around not in around_blocks and _are_weighed(unread.tape, own)):
            homes.setdefault(around, []).append(own)
    for index, groups in homes.items():
        own = [use for group in groups for use in group]
        read, call = {u.path for u in own}, unread.tape.calls[index]
        within = Counter(u.path for u in uses if call.first <= u.node.meta["index"] < call.last)
        shared = {path for path, times in within.items() if times > 1}
        first = min(u.node.meta["index"] for u in own)
        count = max(_held(unread, group) for group in groups)
        place = unread.place(call, first, count, {id(unread.named[path]) for path in read | shared})
        if all(map(_reads_no_row, own)):
            names = listed(dict.fromkeys(re.sub(r"\d+", "#", path.removeprefix(f"{call.path}.")) for path in read))
            place = dataclasses.replace(place, reason=_CONSTANT.format(names))
        yield place


def _uses(unread: UnreadBlocks, blocks: list[Call]) -> list[_Use]:
    """Every call on values computed from the input with a named tensor of several elements, outside of ``blocks``."""
    known = bytearray(len(unread.tape.nodes) + 1)
    for block in blocks:
        known[block.first : block.last] = b"\1" * (min(block.last, len(known)) - block.first)
    found: list[_Use] = []
    of_input, picked = set[fx.Node](), dict[fx.Node, fx.Node]()
    for node in unread.tape.nodes:
        inputs = node.all_input_nodes
        if node.op != "placeholder" and of_input.isdisjoint(inputs):
            continue
        of_input.add(node)
        if known[node.meta["index"]]:
            continue
        rows = next((a for a in inputs if a in picked), None)
        if op_name(node) in _PICKS and len(inputs) > 1 and inputs[0] in of_input and inputs[-1] in of_input:
            picked[node] = _origin(inputs[-1])
        elif rows is not None and op_name(node) not in _WRITES:
            picked[node] = node if op_name(node) == "getitem" and op_name(rows) in _PARTS else picked[rows]
        for weight in (a for a in inputs if a not in of_input and not is_factory(a)):
            path, part = _part_of(weight)
            if path in unread.named and max(weight.meta.get("shape") or (1,)) > 1:
                found.append(_Use(node, picked.get(node), path, part))
    return found


def _origin(ids: fx.Node) -> fx.Node:
    """What the ids of rows were read from: two of its columns pick the same rows."""
    while moves_rows(ids) and ids.all_input_nodes:
        ids = ids.all_input_nodes[0]
    return ids


def _part_of(weight: fx.Node) -> tuple[str, tuple[Any, ...]]:
    """The name of the tensor that a weight was moved from, and what was taken of it."""
    taken: list[Any] = []
    while weight.op == "call_function" and weight.all_input_nodes:
        if op_name(weight) in ("select", "slice", "getitem"):
            taken.append((op_name(weight), *(a for a in weight.args if isinstance(a, int))))
        weight = weight.all_input_nodes[0]
    return (str(weight.target) if weight.op == "get_attr" else ""), tuple(taken)


def _alike(unread: UnreadBlocks, uses: list[_Use]) -> Iterator[list[_Use]]:
    """Uses of parts of one tensor, and of tensors whose names differ by one number, in calls of one op; the last number
    first."""
    groups: dict[tuple[int, str, str], list[_Use]] = {}
    for use in uses:
        op = op_name(use.node)
        keys = [(-at, name, op) for at, name, _ in numbered_tensors(use.path, unread.named[use.path])]
        for key in [(-len(use.path), use.path, "")] if use.part else keys:
            groups.setdefault(key, []).append(use)
    claimed = set[fx.Node]()
    for _, own in sorted(groups.items(), key=lambda group: group[0][0]):
        free = [u for u in own if u.node not in claimed]
        if len({(u.path, u.part) for u in free}) > 1:
            claimed.update(u.node for u in free)
            yield free


def _are_apart(own: list[_Use]) -> bool:
    """Whether each tensor, or part of one, meets rows of picks of its own."""
    by_part: dict[tuple[str, Any], set[fx.Node | None]] = {}
    for use in own:
        by_part.setdefault((use.path, use.part), set()).add(use.pick)
    picks = set().union(*by_part.values())
    return None not in picks and len(picks) == sum(map(len, by_part.values()))


def _are_weighed(tape: Tape, own: list[_Use]) -> bool:
    """Whether a gate as wide as there are vectors weighs the result of each, or all of them joined."""
    reach = {use.node: 1 << at for at, use in enumerate(own)}
    width, every, weighed = len({(u.path, u.part) for u in own}), (1 << len(own)) - 1, 0
    later = descendants(tape, [*reach])
    behind = {*reach, *later}
    for node in (*reach, *later):
        parts = [reach[a] for a in node.all_input_nodes if reach.get(a)]
        here = reach.get(node, 0)
        for part in parts:
            here |= part
        others = [a for a in node.all_input_nodes if not reach.get(a)]
        weighs = op_name(node) in (*WEIGH, "where") and any(_made_by_gate(a, width, behind) for a in others)
        if weighs and here == every:
            return _share_matrices(tape, own)
        joined = here.bit_count() > 1
        weighed |= here if weighs and not joined else 0
        keeps = not joined or (here == every and (op_name(node) in ("cat", "stack") or moves_rows(node)))
        reach[node] = here if keeps and not weighs else 0
    return weighed == every and _share_matrices(tape, own)


def _share_matrices(tape: Tape, own: list[_Use]) -> bool:
    """Whether the same matrices stand before each use: norms and biases of layers, heads and branches that have their
    own are vectors of these, and a softmax as wide as they are many by chance weighs places or layers."""
    scales = {use.path for use in own if is_pointwise(use.node)}

    def matrices(nodes: Collection[fx.Node]) -> set[str]:
        read = (n for n in nodes if n.op == "get_attr" and sum(s > 1 for s in n.meta.get("shape") or ()) > 1)
        return {str(n.target) for n in read} - scales

    ends = [(nodes, matrices(nodes)) for nodes in (ancestors([own[0].node]), ancestors([own[-1].node]))]
    (first, known), (_, last) = ends
    return known == last and all(matrices(ancestors([use.node], first)) <= known for use in own[1:-1])


def _made_by_gate(weight: fx.Node, width: int, behind: Collection[fx.Node]) -> bool:
    """Whether ``weight`` is moved from a softmax over, or a choice among, ``width`` things, that was computed from the
    input and from nothing ``behind`` the vectors: scores of their own results are an attention among them."""
    queue = [weight]
    for node in queue:  # it grows
        if op_name(node) in (*GATES, *CHOICES_AMONG) and gate_width(node) == width:
            return node not in behind and any(n.op == "placeholder" for n in ancestors([node]))
        moved = moves_rows(node) or is_pointwise(node) or op_name(node) in ("sum", "any", *CHOICES_AMONG)
        if moved and len(queue) < _NEAR:
            queue.extend(a for a in node.all_input_nodes if a not in queue)
    return False


def _around(tape: Tape, own: list[_Use]) -> int:
    """The innermost call around all of them."""
    stacks = [tape.stack(u.node.meta["call"]) for u in own]
    common: list[int] = [level[0] for level in zip(*stacks, strict=False) if len(set(level)) == 1]
    return common[-1]


def _held(unread: UnreadBlocks, own: list[_Use]) -> int:
    """How many experts there are by the rows of a table, or by what ran."""
    ran = len({(u.path, u.part) for u in own})
    return max(ran, len(unread.named[own[0].path])) if own[0].part else ran


def _reads_no_row(use: _Use) -> bool:
    """Whether all that meets the vector is one number a row: the routing weight."""
    sizes = [a.meta["shape"][-1:] for a in use.node.all_input_nodes if a.meta.get("shape")]
    return op_name(use.node) == "mul" and any(size == (1,) for size in sizes)
