"""Places of mixtures whose experts are parts of something that is computed whole, which a gate weighs.

    y = sum over k of gate(x)[k] * softmax(D tanh(x W)[k])     one product cut in parts, then a matrix that all share
    y = sum over k of softmax(r(x))[k] * (x W)[k]              the same without a matrix behind it: means of a mixture
    y = O (gate(x)[h] * head_h(x))                             heads of an attention, of which a router chooses

No expert has a matrix of its own to leave out. A gate without a choice on heads, as many attentions have, is no router.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from torch import fx

from moeopt.capture.op_kinds import GATES, WEIGH, is_matmul, is_pointwise, moves_rows, op_name
from moeopt.find.block_candidates import BlockCandidate
from moeopt.find.forward_walk import ForwardWalk
from moeopt.find.light_sites import leaf_of
from moeopt.find.module_lists import gate_width, made_by
from moeopt.find.unread_blocks import UnreadBlocks
from moeopt.recognise.gemm_sites import weight_and_operand

_STEPS = 64
_ROW_WISE = ("softmax", "_softmax", "_log_softmax", "native_layer_norm")


def gated_parts(unread: UnreadBlocks) -> Iterator[BlockCandidate]:
    """The mixtures of parts in the run of ``unread``."""
    memo: dict[fx.Node, bool] = {}
    for node in unread.tape.nodes:
        if op_name(node) in GATES[:2] and gate_width(node) > 1:
            yield from _parts_of_a_product(unread, node, memo)
        elif op_name(node) == "mul" and len(node.all_input_nodes) == 2:
            yield from _heads(unread, node, memo)


def _parts_of_a_product(unread: UnreadBlocks, gate: fx.Node, memo: dict[fx.Node, bool]) -> Iterator[BlockCandidate]:
    width = gate_width(gate)
    rows = math.prod(gate.meta["shape"]) // width
    for weighing, other in _weighed(gate):
        products = _products_before(other, rows * width, memo)
        first = _first_product(products, memo) if products else None
        if not products and _adds_up(weighing, other, width):
            first = _cut_product(gate, other, rows * width, memo)
        if first is None or math.prod(first.meta["shape"][:-1]) != rows or first.meta["shape"][-1] % width:
            continue
        read = weight_and_operand(products[0], memo) if products else None
        if read is not None and read[1].meta["shape"][-1] * width != first.meta["shape"][-1]:
            continue  # several results joined, as keys of an attention among them, are no parts of one
        paths = [_path(unread, p, memo) for p in (first, *products)]
        if any(path not in unread.named for path in paths):
            continue
        inside = [set(unread.tape.stack(p.meta["call"])) for p in (gate, first, *products)]
        call = unread.tape.calls[max(set.intersection(*inside))]
        place = unread.place(call, first.meta["index"], width, {id(unread.named[path]) for path in paths})
        own, *shared = (path.removeprefix(f"{call.path}.") for path in paths)
        behind = f", which all go through one matrix ({shared[0]})" if shared else ""
        reason = (
            f"its experts are {width} parts of one product ({own}){behind}, and a gate weighs their results: every "
            "part is computed for every row, so the op would leave no product out, and this block stays as it is"
        )
        yield dataclasses.replace(place, reason=reason)
        return


def _cut_product(gate: fx.Node, other: fx.Node, parts: int, memo: dict[fx.Node, bool]) -> fx.Node | None:
    """The product whose features, cut in ``parts`` of all rows, ``other`` holds, where a softmax weighs them."""
    shape: tuple[int, ...] = other.meta.get("shape") or ()
    if op_name(gate) == "sigmoid" or len(shape) < 2 or math.prod(shape[:-1]) != parts or shape[-1] < 2:
        return None
    node = other
    for _ in range(_STEPS):
        if is_matmul(node):
            whole = math.prod(node.meta["shape"]) == math.prod(shape)
            return node if whole and weight_and_operand(node, memo) is not None else None
        inputs = [a for a in node.all_input_nodes if a.op != "get_attr"]
        if not inputs or not (moves_rows(node) or is_pointwise(node)):
            return None
        node = inputs[0]
    return None


def _adds_up(weighing: fx.Node, parts: fx.Node, width: int) -> bool:
    """Whether the call that weighs ``parts``, or a sum behind it, leaves one of ``width``: else they stay side by side,
    as groups of features do."""
    size = math.prod(parts.meta["shape"])
    for node, user in (walk := ForwardWalk(weighing, _STEPS)):
        if math.prod(node.meta.get("shape") or ()) * width == size or op_name(user) in ("sum", "mean"):
            return True
        if moves_rows(user) or is_pointwise(user):
            walk.follow(user)
    return False


def _weighed(gate: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The calls that multiply by the ``gate``, moved, each with what is multiplied."""
    node = gate
    for _ in range(8):
        for user in node.users:
            if op_name(user) in WEIGH:
                yield from ((user, a) for a in user.all_input_nodes if a is not node)
        moved = next((u for u in node.users if moves_rows(u) or op_name(u) in ("div", "clamp")), None)
        if moved is None:
            return
        node = moved


def _products_before(node: fx.Node, rows: int, memo: dict[fx.Node, bool]) -> list[fx.Node]:
    """The products with weights, of so many ``rows``, on the way back from ``node``; the first one first."""
    found: list[fx.Node] = []
    for _ in range(_STEPS):
        read = weight_and_operand(node, memo) if is_matmul(node) else None
        if read is not None:
            if math.prod(node.meta["shape"][:-1]) != rows:
                return found
            found.insert(0, node)
            node = read[1]
        elif (moves_rows(node) or is_pointwise(node) or op_name(node) in _ROW_WISE) and node.all_input_nodes:
            node = max(node.all_input_nodes, key=lambda a: math.prod(a.meta.get("shape") or ()))
        else:
            return found
    return found


def _first_product(products: list[fx.Node], memo: dict[fx.Node, bool]) -> fx.Node | None:
    """The product whose result, cut in parts, the first of ``products`` reads."""
    read = weight_and_operand(products[0], memo) if products else None
    node = read[1] if read is not None else None
    for _ in range(_STEPS):
        if node is None or (is_matmul(node) and weight_and_operand(node, memo) is not None):
            return node
        inputs = [a for a in node.all_input_nodes if a.op != "get_attr"]
        node = inputs[0] if inputs and (moves_rows(node) or is_pointwise(node)) else None
    return None


def _heads(unread: UnreadBlocks, product: fx.Node, memo: dict[fx.Node, bool]) -> Iterator[BlockCandidate]:
    for gate, heads in (product.all_input_nodes, product.all_input_nodes[::-1]):
        shape, attention = _heads_of(heads)
        choice = made_by(gate, ("topk", "sort", "argmax")) if attention is not None else None
        count, rows = (*shape, 0, 0)[1], math.prod(shape[:-1])
        if attention is None or choice is None or count < 2 or math.prod(gate.meta["shape"]) != rows:
            continue
        scores = _products_before_choice(choice, memo)
        path = _path(unread, scores, memo) if scores is not None else ""
        if path not in unread.named:
            continue
        place = unread.place(
            unread.tape.call_of(product), attention.meta["index"], count, {id(unread.named[path])}
        )  # the scores' weight: the heads' are those of the whole attention
        reason = (
            f"its experts are the {count} heads of an attention, which all run on all tokens, and a router's choice "
            "weighs their results: the op would leave no product out, so this block stays as it is"
        )
        yield dataclasses.replace(place, reason=reason)


def _products_before_choice(choice: fx.Node, memo: dict[fx.Node, bool]) -> fx.Node | None:
    node = choice
    for _ in range(_STEPS):
        if is_matmul(node) and weight_and_operand(node, memo) is not None:
            return node
        inputs = [a for a in node.all_input_nodes if a.op != "get_attr"]
        if not inputs:
            return None
        node = inputs[0]
    return None


def _heads_of(node: fx.Node) -> tuple[tuple[int, ...], fx.Node | None]:
    """The last product of the attention that ``node`` was moved from, None of others, and (B, heads, length, size)."""
    shape: tuple[int, ...] = ()
    while True:
        of = node.meta.get("shape") or ()
        shape = of if len(of) == 4 else shape
        if not moves_rows(node) or not node.all_input_nodes:
            break
        node = node.all_input_nodes[0]
    by = node.all_input_nodes[0] if op_name(node) in ("bmm", "matmul") else None
    while by is not None and (moves_rows(by) or is_pointwise(by)) and by.all_input_nodes:
        by = by.all_input_nodes[0]
    asked = "scaled_dot_product_attention" in op_name(node) or (by is not None and op_name(by) in GATES[:2])
    return shape, node if asked and len(shape) == 4 else None


def _path(unread: UnreadBlocks, product: fx.Node, memo: dict[fx.Node, bool]) -> str:
    found = weight_and_operand(product, memo)
    return "" if found is None else leaf_of(unread.tape, found[0])[0]
