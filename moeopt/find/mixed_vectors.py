"""Places of mixtures whose experts are vectors, weighed for each token: IA3 vectors, scales, prompts.

    v = softmax(r(x)) @ V       or sum over k of w_k V[ids_k]: one mixture of the rows of V for each token
    v = V[argmax(r(x))]         or one row (the vectors of a BatchEnsemble: several tables, by one choice)
    y = f(x) * v

    h = cat(V[topk(r(x))], x)   rows of several vectors, put before the tokens: a pool of prompts
    h = cat(r(x) @ V, x)        or their weighed sum

No expert is a product. Told from the values of a memory, which are added, by what they are multiplied with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from torch import fx

from moeopt.capture.op_kinds import is_matmul, is_pointwise, moves_rows, op_name
from moeopt.capture.replay import ancestors
from moeopt.find.block_candidates import BlockCandidate
from moeopt.find.forward_walk import ForwardWalk
from moeopt.find.light_sites import leaf_of
from moeopt.find.module_lists import gate_width
from moeopt.find.unread_blocks import UnreadBlocks
from moeopt.listed import listed
from moeopt.recognise.gemm_sites import weight_and_operand

_TOPS = ("topk", "sort", "argmax", "argmin", "max", "min")
_STEPS = 32
"""Calls that are looked at between a table and what its rows are multiplied with."""


def mixed_vectors(unread: UnreadBlocks) -> Iterator[BlockCandidate]:
    """The mixtures of a table's rows in the run of ``unread`` that scale something."""
    memo: dict[fx.Node, bool] = {}
    mixtures: dict[tuple[int, fx.Node], dict[str, fx.Node]] = {}
    for node in unread.tape.nodes:
        path, choice = _weighed_table(unread, node, memo), node
        if not path:
            path, choice = _looked_up_table(unread, node)
        prompts = bool(path) and unread.named[path].dim() > 2
        if path and (_is_put_before(node) if prompts else scales(node)):
            home = unread.tape.call_of(node)
            if op_name(node) == "embedding" and home.parent is not None:  # a table in a module of its own
                home = unread.tape.calls[home.parent]
            mixtures.setdefault((home.index, choice), {}).setdefault(path, node)
    for (index, choice), tables in mixtures.items():
        if all(unread.named[path].dim() == 2 for path in tables) and _picks_matrices(unread, choice):
            continue  # scales of their codes, biases: what the router picks is matrices
        call, first = unread.tape.calls[index], next(iter(tables.values()))
        count = len(unread.named[next(iter(tables))])
        place = unread.place(call, first.meta["index"], count, {id(unread.named[path]) for path in tables})
        own = listed(path.removeprefix(f"{call.path}.") for path in tables)  # the same in every model
        what = f"vectors, the rows of {own}, which a gate mixes for each token or of which it takes one"
        if unread.named[next(iter(tables))].dim() > 2:
            does = (
                "weighs for each sample and puts" if is_matmul(first) else "chooses some for each sample and puts them"
            )
            which = "which" if is_matmul(first) else "of which"
            what = f"prompts, the rows of {own}, {which} it {does} before its tokens"
        reason = (
            f"its experts are {what}: no expert is a product, so there is nothing to group; this block stays as it is"
        )
        yield dataclasses.replace(place, reason=reason)


def _weighed_table(unread: UnreadBlocks, node: fx.Node, memo: dict[fx.Node, bool]) -> str:
    """The name of the table that a product multiplies by a softmax over its rows, or by what a top-k left of one."""
    found = weight_and_operand(node, memo) if is_matmul(node) and op_name(node) != "convolution" else None
    if found is None or found[2]:
        return ""
    path = leaf_of(unread.tape, found[0])[0]
    table = unread.named.get(path)
    if table is None or table.dim() < 2 or found[1].meta["shape"][-1] != len(table):
        return ""
    if table.dim() > 2:  # prompts, weighed by any score
        return path
    gate = found[1]
    for _ in range(8):
        if op_name(gate) in ("softmax", "_softmax"):
            return path if gate_width(gate) == len(table) else ""
        if not (moves_rows(gate) or is_pointwise(gate)) or not gate.all_input_nodes:
            return ""
        last = op_name(gate) == "scatter" and len(gate.all_input_nodes) > 2
        gate = gate.all_input_nodes[-1 if last else 0]
        if gate.all_input_nodes and op_name(gate.all_input_nodes[0]) in _TOPS:
            return path if gate_width(gate.all_input_nodes[0]) == len(table) else ""
    return ""


def _looked_up_table(unread: UnreadBlocks, node: fx.Node) -> tuple[str, fx.Node]:
    """The name of the table of which ``node`` is the rows that a choice among all of them took, and this choice."""
    if op_name(node) not in ("index", "index_select", "embedding") or len(node.all_input_nodes) != 2:
        return "", node
    path = leaf_of(unread.tape, node.all_input_nodes[0])[0]
    table = unread.named.get(path)
    if table is None or table.dim() < 2 or len(node.meta["shape"]) < 2:
        return "", node
    ids = _choice_of(node.all_input_nodes[1])
    if op_name(ids) not in _TOPS or _among(ids) != len(table):
        return "", node
    if table.dim() > 2 and op_name(ids) != "topk":
        return "", node
    chosen_by = {leaf_of(unread.tape, n)[0] for n in ancestors([ids]) if not n.all_input_nodes}
    return ("", node) if path in chosen_by else (path, ids)  # nearest codes, tied embeddings: rows chosen by themselves


def _choice_of(ids: fx.Node) -> fx.Node:
    while moves_rows(ids) and ids.all_input_nodes and op_name(ids) not in _TOPS:
        ids = ids.all_input_nodes[0]
    return ids


def _picks_matrices(unread: UnreadBlocks, choice: fx.Node) -> bool:
    """Whether the same choice picks matrices too, of what is stored or is made of it (codes that become floats)."""
    return any(
        op_name(n) in ("index", "index_select")
        and len(n.all_input_nodes) == 2
        and len(n.all_input_nodes[0].meta.get("shape", ())) > 2
        and _choice_of(n.all_input_nodes[1]) is choice
        and not _of_input(n.all_input_nodes[0])
        for n in unread.tape.nodes
    )


def _among(choice: fx.Node) -> int:
    """Among how many things a top-k, or a largest of one row, chooses."""
    if op_name(choice) in ("topk", "sort"):
        return gate_width(choice)
    axis = choice.args[1] if len(choice.args) > 1 else choice.kwargs.get("dim", -1)
    shape = choice.all_input_nodes[0].meta.get("shape") or ()
    return int(shape[axis]) if isinstance(axis, int) and shape else 0


def scales(mixed: fx.Node, scores: bool = False) -> bool:
    """Whether what ``mixed`` holds, weighed, summed and moved, is multiplied with something computed from the input
    that is as large, and through no product before; by ``scores`` also where only the sum of the features is read, as
    of a token's product with the chosen centroid."""
    for node, user in (walk := ForwardWalk(mixed, _STEPS)):
        others = [a for a in user.all_input_nodes if a is not node]
        if op_name(user) == "mul" and any(_as_large(a, node) for a in others):
            if any(map(_of_input, others)) and (scores or not _is_score(user)):
                return True
        elif op_name(user) in ("add", "sub") and any(_of_input(a) for a in others if _as_large(a, node)):
            continue  # a bias of experts, looked up for each row
        elif moves_rows(user) or is_pointwise(user) or op_name(user) == "sum" or _weighs(user, node):
            walk.follow(user)
    return False


def _is_put_before(picked: fx.Node) -> bool:
    """Whether what ``picked`` holds, moved, is joined with something computed from the input."""
    for node, user in (walk := ForwardWalk(picked, _STEPS)):
        if op_name(user) == "cat" and any(_of_input(a) for a in user.all_input_nodes if a is not node):
            return True
        if moves_rows(user):
            walk.follow(user)
    return False


def _weighs(product: fx.Node, mixed: fx.Node) -> bool:
    """Whether a product adds up what ``mixed`` holds with weights computed from the input; no layer of its own."""
    return op_name(product) in ("bmm", "mm") and all(_of_input(a) for a in product.all_input_nodes if a is not mixed)


def _is_score(product: fx.Node) -> bool:
    """Whether all that reads an element-wise product adds up its features."""
    size = product.meta["shape"][-1]
    sums = (
        op_name(u) == "sum" and math.prod(u.meta["shape"]) * size == math.prod(product.meta["shape"])
        for u in product.users
    )
    return bool(product.users) and all(sums)


def _as_large(a: fx.Node, b: fx.Node) -> bool:
    return bool(a.meta.get("shape")) and a.meta["shape"][-1] == b.meta["shape"][-1] > 1


def _of_input(node: fx.Node) -> bool:
    """Whether ``node`` is computed from the input of the run."""
    return any(n.op == "placeholder" for n in ancestors([node]))
