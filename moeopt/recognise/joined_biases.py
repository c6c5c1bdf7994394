"""A bias that is added to the products of all experts at once, after these were joined, is each product's own again.

``cat([x_e @ W_e for e]) + b[ids]`` is, row by row and to the bit, ``cat([x_e @ W_e + b[ids][rows of e] for e])``. A
linear site takes its bias from the sum that follows its product, so the tape is rewritten into the second form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import is_matmul, op_name
from moeopt.capture.recorded import Tape
from moeopt.capture.tree import leaves_of
from moeopt.recognise.gemm_site import is_weight
from moeopt.value_types import FxTarget


def split_joined_biases(tape: Tape) -> None:
    """Write each sum of joined products and rows of weights as the join of the products' own sums, in place."""
    if not any(_joins_products(node) for node in tape.nodes):
        return
    memo: dict[fx.Node, bool] = {}
    fresh: dict[fx.Node, list[fx.Node]] = {}
    seen = set(leaves_of(fx.Node, [tape.results(), [[c.args, c.kwargs, c.output] for c in tape.calls]]))
    for node in tape.nodes:
        if op_name(node) != "add" or len(node.all_input_nodes) != 2 or node.kwargs.get("alpha", 1) != 1:
            continue
        for joined, rows in (node.all_input_nodes, node.all_input_nodes[::-1]):
            alone = joined not in seen and _readers(joined) == [node]
            same = _kind(joined) == _kind(rows) == _kind(node)
            if alone and same and _joins_products(joined) and is_weight(rows, memo):
                fresh[node] = _split(node, joined, rows)
                fresh[joined] = []
                break
    if fresh:
        _enter(tape, fresh)


def _readers(node: fx.Node) -> list[fx.Node]:
    return [u for u in node.users if "index" in u.meta]


def _joins_products(joined: fx.Node) -> bool:
    """Whether a value is matrix products one under another."""
    if op_name(joined) != "cat":
        return False
    axis = joined.args[1] if len(joined.args) > 1 else joined.kwargs.get("dim", 0)
    parts = joined.args[0]
    if axis != 0 or not isinstance(parts, (list, tuple)) or len(parts) < 2:
        return False
    return all(isinstance(p, fx.Node) and is_matmul(p) and len(p.meta["shape"]) == 2 for p in parts)


def _kind(node: fx.Node) -> tuple[object, object]:
    return node.meta.get("shape"), node.meta.get("dtype")


def _split(node: fx.Node, joined: fx.Node, rows: fx.Node) -> list[fx.Node]:
    """Make ``node`` the join of sums; the new nodes before it."""
    made: list[fx.Node] = []
    sums: list[fx.Node] = []
    start = 0
    for part in joined.args[0]:  # type: ignore[union-attr]
        size = part.meta["shape"][0]  # type: ignore[union-attr]
        own = _called(node, len(made), torch.ops.aten.slice.Tensor, (rows, 0, start, start + size), size)
        total = _called(node, len(made) + 1, torch.ops.aten.add.Tensor, (part, own), size)
        made += [own, total]
        sums.append(total)
        start += size
    node.target, node.args, node.kwargs = torch.ops.aten.cat.default, (sums, 0), {}
    joined.args = ()  # it would go on reading the products, and nothing reads it
    return made


def _called(node: fx.Node, number: int, target: FxTarget, args: tuple[Any, ...], size: int) -> fx.Node:
    """A node of ``node``'s place, of so many rows."""
    made = fx.Node(node.graph, f"{node.name}_own_{number}", "call_function", target, args, {})
    made.meta = {**node.meta, "shape": (size, *node.meta["shape"][1:])}
    return made


def _enter(tape: Tape, fresh: dict[fx.Node, list[fx.Node]]) -> None:
    """Put new nodes before those that read them, and leave the joins of before out; positions are counted again."""
    nodes: list[fx.Node] = []
    moved: list[int] = []
    for node in tape.nodes:
        moved.append(len(nodes))
        new = fresh.get(node)
        nodes += [node] if new is None else [*new, node] if new else []
    moved.append(len(nodes))
    for number, node in enumerate(nodes):
        node.meta["index"] = number
    for call in tape.calls:
        call.first, call.last = moved[call.first], moved[call.last]
    tape.nodes[:] = nodes
