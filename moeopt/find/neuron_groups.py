"""Places of dense FFNs whose hidden neurons a router switches on and off by groups (MoEfication).

    h = f(x W1)                      all neurons
    y = (h * mask(topk(r(x)))) W2    mask: one number for each neuron, or group of them, of each row

Both products are computed whole, so it reads as a dense FFN; its experts are groups of the rows of one matrix. A mask
that is made of h itself (the k largest neurons) is part of the function, and no router's.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator

from torch import fx, nn

from moeopt.capture.op_kinds import CHOICES_AMONG, is_matmul, is_pointwise, moves_rows, op_name
from moeopt.capture.replay import ancestors
from moeopt.find.block_candidates import BlockCandidate
from moeopt.find.light_sites import leaf_of
from moeopt.find.module_lists import gate_width
from moeopt.find.unread_blocks import UnreadBlocks
from moeopt.recognise.gemm_sites import weight_and_operand

_SWITCHES = ("mul", "where", "masked_fill")
_STEPS = 64
"""Calls that are looked at on the way back from a mask to the choice that it is made of."""


def neuron_groups(unread: UnreadBlocks) -> Iterator[BlockCandidate]:
    """The FFNs in the run of ``unread`` between whose two products a choice masks neurons."""
    memo: dict[fx.Node, bool] = {}
    for last in unread.tape.nodes:
        found = weight_and_operand(last, memo) if is_matmul(last) else None
        switch = _switch(found[1]) if found is not None else None
        for hidden in switch.all_input_nodes if switch is not None else ():
            first = _product_before(hidden, memo)
            width = 0 if first is None else int(first.meta["shape"][-1])
            if first is None or found is None or switch is None or found[1].meta["shape"][-1] != width:
                continue
            rows = math.prod(first.meta["shape"]) // width
            masks = [a for a in switch.all_input_nodes if a is not hidden and math.prod(a.meta["shape"]) > rows]
            choices = (_choice(unread, mask, first, memo) for mask in masks)  # one number for each row is a weight
            choice = next((c for c in choices if c is not None and 1 < gate_width(c) < width), None)
            if choice is not None:
                yield _place(unread, (first, last), gate_width(choice), memo)
                break


def _place(
    unread: UnreadBlocks, products: tuple[fx.Node, fx.Node], groups: int, memo: dict[fx.Node, bool]
) -> BlockCandidate:
    first, last = products
    paths = [leaf_of(unread.tape, found[0])[0] for p in products if (found := weight_and_operand(p, memo)) is not None]
    weights = {id(unread.named[path]) for path in paths if path in unread.named}
    inside = [set(unread.tape.stack(p.meta["call"])) for p in products]
    call = unread.tape.calls[max(set.intersection(*inside))]
    place = unread.place(call, first.meta["index"], groups, weights)
    reason = (
        f"its experts are groups of the {first.meta['shape'][-1]} hidden neurons of one FFN ({paths[0]}), which a "
        "router's mask switches on and off for each token, while both products are computed whole; to compute the "
        f"chosen groups alone, give each of the {groups} groups its neurons' rows of the first matrix and columns of "
        "the second as an expert of its own, and loop over the experts with the rows that chose them"
    )
    return dataclasses.replace(place, reason=reason, source=first.meta.get("source", "") or place.source)


def _switch(operand: fx.Node) -> fx.Node | None:
    """The last element-wise call on what a product takes that has two operands of its own."""
    for _ in range(8):
        if op_name(operand) in _SWITCHES and len(operand.all_input_nodes) > 1:
            return operand
        if not (moves_rows(operand) or is_pointwise(operand)) or not operand.all_input_nodes:
            return None
        operand = operand.all_input_nodes[0]
    return None


def _product_before(node: fx.Node, memo: dict[fx.Node, bool]) -> fx.Node | None:
    """The product with a weight that ``node`` is made of, element by element."""
    for _ in range(16):
        if is_matmul(node) and weight_and_operand(node, memo) is not None:
            return node
        inputs = [a for a in node.all_input_nodes if a.op != "get_attr"]  # a bias may come first
        if not (moves_rows(node) or is_pointwise(node)) or not inputs:
            return None
        node = inputs[0]
    return None


def _choice(unread: UnreadBlocks, mask: fx.Node, first: fx.Node, memo: dict[fx.Node, bool]) -> fx.Node | None:
    """The choice that ``mask`` is made of, by no product with a Parameter on the way; None where it, or what it chooses
    by, is made of the neurons that ``first`` gives, or of a Parameter's numbers.

    Nor may as many neurons of another product be a part of it: rows that a router picked, gate and up, are no mask.
    """
    queue, seen = deque([mask]), {mask}
    choice, neurons = None, list[fx.Node]()
    while queue and len(seen) < _STEPS:
        node = queue.popleft()
        learned = node.op == "get_attr" and isinstance(unread.named.get(str(node.target)), nn.Parameter)
        if node is first or learned:
            return None  # the largest neurons, or learned vectors
        if choice is None and op_name(node) in CHOICES_AMONG:
            choice = node
        found = weight_and_operand(node, memo) if is_matmul(node) else None
        held = unread.named.get(leaf_of(unread.tape, found[0])[0]) if found is not None else None
        if isinstance(held, nn.Parameter) and node.meta["shape"][-1] == first.meta["shape"][-1]:
            neurons.append(node)
        fresh = [a for a in node.all_input_nodes if a not in seen and not isinstance(held, nn.Parameter)]
        seen.update(fresh)
        queue.extend(fresh)
    return None if choice is None or set(neurons) - ancestors([choice]) else choice
