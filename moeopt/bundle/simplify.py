"""Leave out of a saved graph what computes nothing: checks that hold by construction, and ops that return their input.

    _assert_tensor_metadata(x, dtype=...)   x has that dtype: inputs and weights are checked, ops are what they are
    slice(x, dim, 0, 2**63 - 1)             x
    alias(x), detach(x)                     x: the graph is functional, so sharing memory cannot be seen
    a view of a weight                      taken when the graph is saved; the file holds the weight's bytes once

The last is more than tidiness: ``as_strided`` names an offset into a storage, and loading makes new storages.
In a Mixtral of 4 small layers (batched_mm) that is 54 of 435 nodes; a call costs microseconds whatever it computes.
"""

from __future__ import annotations

import torch

aten = torch.ops.aten
_END = 2**63 - 1


def computes_nothing(node: torch.fx.Node) -> bool:
    """Whether ``node`` only asserts what is known, and nothing reads it."""
    return node.target is aten._assert_tensor_metadata.default and not node.users


def same_as(node: torch.fx.Node) -> torch.fx.Node | None:
    """The node whose value ``node`` returns unchanged, or None."""
    if node.kwargs or not node.args or not isinstance(node.args[0], torch.fx.Node):
        return None
    source, rest = node.args[0], node.args[1:]
    if node.target in (aten.alias.default, aten.detach.default) and not rest:
        return source
    if node.target is aten.slice.Tensor and rest[1:] in ((0, _END), (None, None), (0,), (0, None)):
        return source
    return None


def view_of_weight(node: torch.fx.Node, weights: dict[torch.fx.Node, torch.Tensor]) -> torch.Tensor | None:
    """The view that ``node`` takes of one of ``weights``, or None when it does anything else."""
    if not isinstance(node.target, torch._ops.OpOverload) or not any(n in weights for n in node.all_input_nodes):
        return None
    returns = node.target._schema.returns
    alias = returns[0].alias_info if len(returns) == 1 else None
    if alias is None or alias.is_write or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if not all(n in weights for n in node.all_input_nodes):
        return None
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: weights[n])
    with torch.no_grad():
        view: torch.Tensor = node.target(*args, **kwargs)
    storage = weights[node.all_input_nodes[0]].untyped_storage().data_ptr()
    return view if view.untyped_storage().data_ptr() == storage else None  # reshape and contiguous may copy
