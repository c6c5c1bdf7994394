"""Random numbers that the model multiplies by the number 0 (``noise * self.training``): no engine draws them."""

from __future__ import annotations

import torch
from torch import fx

from moeopt.capture.random_ops import reached_draws

aten = torch.ops.aten


def drop_idle_draws(graph: fx.Graph) -> None:
    """Put zeros where a draw is that no result depends on; draws that take a tensor of their own shape only."""
    drawn = [n for n in graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
    if not drawn:
        return
    results = next(n for n in reversed(graph.nodes) if n.op == "output").all_input_nodes
    used = set(reached_draws(list(graph.nodes), drawn, results))
    for node in drawn:
        like = node.args[0] if node.args else None
        if node in used or not isinstance(like, fx.Node) or not _same_shape(like, node):
            continue
        with graph.inserting_before(node):
            zeros = graph.call_function(aten.zeros_like.default, (like,))
        zeros.meta = dict(node.meta)
        node.replace_all_uses_with(zeros)
        graph.erase_node(node)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    one, other = a.meta.get("val"), b.meta.get("val")
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return one.shape == other.shape and one.dtype == other.dtype
