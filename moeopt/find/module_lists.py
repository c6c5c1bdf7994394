"""Children of a module that are alike, and lists of feed-forward networks."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Collection
from functools import reduce

from torch import fx, nn

from moeopt.capture.op_kinds import is_factory, is_matmul, is_pointwise, moves_rows, op_name
from moeopt.capture.replay import descendants
from moeopt.capture.tape import Tape


def alike_lists(module: nn.Module, *, same_sizes: bool = True) -> list[set[nn.Module]]:
    """Of each list of the module its children, if they hold matrices of the same shapes, or only as many of as many
    dimensions. Experts may lie in several lists: one of first layers, one of second layers."""
    found: list[set[nn.Module]] = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and len(child) > 1:
            shapes = [
                sorted(str(t.shape if same_sizes else t.dim()) for t in (*m.parameters(), *m.buffers()) if t.dim() > 1)
                for m in child.children()
            ]
            if shapes[0] and all(s == shapes[0] for s in shapes):
                found.append(set(child.children()))
    return found


def feed_forward_lists(module: nn.Module) -> set[nn.Module]:
    """Children of the module's lists that look alike and hold a pair of matrices (a, b) and (b, a)."""
    found: set[nn.Module] = set()
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and len(child) > 1:
            shapes = [sorted(tuple(p.shape) for p in m.parameters() if p.dim() == 2) for m in child.children()]
            pair = shapes and any(s[::-1] in shapes[0] for s in shapes[0])
            if pair and 2 <= len(shapes[0]) <= 3 and all(s == shapes[0] for s in shapes):
                found.update(child.children())
    return found


def gate_width(node: fx.Node) -> int:
    """Over how many things a softmax, sigmoid or top-k is: along its own axis, the last where it has none."""
    shape = node.args[0].meta.get("shape") if isinstance(node.args[0], fx.Node) else None
    at = {"softmax": 1, "_softmax": 1, "topk": 2}.get(op_name(node), len(node.args))
    axis = node.args[at] if at < len(node.args) else node.kwargs.get("dim", -1)
    return int(shape[axis if isinstance(axis, int) else -1]) if shape else 0


def made_by(node: fx.Node, names: Collection[str], steps: int = 64) -> fx.Node | None:
    """The nearest call of one of the ops ``names`` among what ``node`` is made of, by no matmul, in a few steps."""
    queue, seen = deque([node]), {node}
    while queue and len(seen) < steps:
        node = queue.popleft()
        if op_name(node) in names:
            return node
        fresh = [a for a in node.all_input_nodes if a not in seen and not is_matmul(node)]
        seen.update(fresh)
        queue.extend(fresh)
    return None


def results_meet(tape: Tape, results: list[fx.Node]) -> bool:
    """Whether two of the ``results`` enter one value, and not only lie side by side in a tensor that joins them."""
    reach = {node: 1 << i for i, node in enumerate(results)}
    for node in descendants(tape, results):
        parts = {reach[a] for a in node.all_input_nodes if reach.get(a)}
        reach[node] = reduce(operator.or_, parts, reach.get(node, 0))
        if op_name(node) in ("cat", "stack") or node.target is operator.getitem:
            continue
        reduces = not (moves_rows(node) or is_pointwise(node)) and reach[node].bit_count() > 1
        if len(parts) > 1 or reduces:
            return True
    return False


def row_sources(start: fx.Node, steps: int = 40, *, through_sums: bool = True) -> set[fx.Node]:
    """Tensors that the rows of ``start`` were moved from, through movement and a few other ops.

    Args:
        through_sums: also through ops that add up rows, or features (a product of two matrices of activations).
    """
    seen: set[fx.Node] = set()
    stack = [(start, 3)]
    while stack and len(seen) < steps:
        node, budget = stack.pop()
        if node in seen or node.op == "get_attr" or is_factory(node):
            continue
        seen.add(node)
        if node.op == "placeholder":
            continue
        spent = 0 if moves_rows(node) else 1
        if budget - spent < 0 or (spent and not through_sums and not is_pointwise(node)):
            continue
        inputs = node.all_input_nodes if is_pointwise(node) or spent else node.all_input_nodes[:1]
        stack.extend((a, budget - spent) for a in inputs)
    return seen
