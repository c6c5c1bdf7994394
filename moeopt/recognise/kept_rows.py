"""Movement within each row: what takes, joins or writes parts of the features leaves the rows in their places."""

from __future__ import annotations

from typing import Any

from torch import fx

from moeopt.capture.op_kinds import op_name

_ALONG = {
    **dict.fromkeys(
        ("slice", "select", "unbind", "unfold", "cat", "stack", "gather", "scatter", "scatter_add", "flip"), 1
    ),
    **dict.fromkeys(("slice_scatter", "select_scatter", "roll", "split", "split_with_sizes", "chunk"), 2),
}
"""Movement along a dimension, by the place of this among the arguments; the first one where none is told."""


def keeps_rows(node: fx.Node) -> bool:
    """Whether ``node`` takes, joins or writes parts along another dimension than its operand's first, or pads another,
    or joins several tensors before their rows: all rows are kept."""
    if op_name(node) == "getitem" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    name, source = op_name(node), node.all_input_nodes[0] if node.all_input_nodes else None
    rank = len((source.meta.get("shape") if source is not None else None) or ()) + (name == "stack")
    if rank < 2:
        return False
    if rank > 2 and (name == "stack" or (name == "cat" and source is not None and source.meta["shape"][0] == 1)):
        return True
    if name == "constant_pad_nd":
        return len(list[Any](node.args[1])) < 2 * rank  # type: ignore[arg-type]
    if name == "copy":
        return True
    if name in ("index", "index_put"):
        return list[Any](node.args[1])[0] is None  # type: ignore[arg-type]
    at = _ALONG.get(name)
    if at is None:
        return False
    along = node.args[at] if len(node.args) > at else node.kwargs.get("dim", node.kwargs.get("dims", 0))
    dims: list[Any] = along if isinstance(along, (list, tuple)) else [along]  # type: ignore[assignment]
    return bool(dims) and all(d % rank for d in dims)
