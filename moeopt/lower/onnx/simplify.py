"""Small nodes that an exported graph does not need are gone; what stays gives the same bits.

    Reshape(x, Concat(size of x, 4, -1))     ==  Reshape(x, [0, 4, -1])      0 keeps a size: nothing is computed for it
    Reshape(Reshape(x, a), b)                ==  Reshape(x, b)               where b fits whatever a fits
    Unsqueeze(Unsqueeze(x, a), b)            ==  Unsqueeze(x, both)
    Expand(x, its own shape)                 ==  x                           and Reshape
    Where(c, x, Expand(v, shape of x))       ==  Where(c, x, v)              Where itself repeats v
    Reshape(Rotary(Reshape(x)))^T            ==  Rotary(x^T)                 com.microsoft's takes heads apart, too

A decode step of one token costs a node's start, a few microseconds, for each of these in each layer. Sizes are compared
by the names that the export gave them: what is of one name has one value wherever the engine holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from moeopt.lower.onnx.node_edits import add_before, alike, drop, is_op, numbers_of, put, same_size, sizes_constant
from moeopt.value_types import OnnxModel, OnnxNode, OnnxValue


def simplify(model: OnnxModel) -> dict[str, int]:
    """Apply the rules to an ``onnx_ir.Model`` in place, until none fires; how often each did."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    fired = {rule.__name__: 0 for rule in RULES}
    again = True
    while again:
        again = False
        for node in list(model.graph):
            for rule in RULES:
                if node.graph is not None and rule(node):
                    fired[rule.__name__] += 1
                    again = True
        RemoveUnusedNodesPass()(model)
    return {name: count for name, count in fired.items() if count}


def constant_shape(node: OnnxNode) -> bool:
    """A Reshape whose computed sizes are those that its operand has at the same places."""
    if not is_op(node, "Reshape") or numbers_of(node.inputs[1]) is not None:
        return False
    x, y, entries = node.inputs[0], node.outputs[0], _entries(node.inputs[1])
    if x.shape is None or y.shape is None or entries is None or len(entries) != len(y.shape) or 0 in entries:
        return False  # a 0 may mean no element, or as it is
    sizes = []
    for at, entry in enumerate(entries):
        if entry is None and not (at < len(x.shape) and same_size(x.shape[at], y.shape[at])):
            return False
        sizes.append(0 if entry is None else entry)
    put(node, "Reshape", [x, sizes_constant(node, sizes)], {"allowzero": 0})
    return True


def _entries(shape: OnnxValue) -> list[int | None] | None:
    """What a Concat of sizes holds, None for each computed one; None where the shape is made otherwise."""
    node = shape.producer()
    if node is None or not is_op(node, "Concat"):
        return None
    found: list[int | None] = []
    for part in node.inputs:
        constant = numbers_of(part)
        if constant is None and (part.shape is None or list(part.shape) != [1]):
            return None
        found += [None] if constant is None else constant
    return found


def twice_reshaped(node: OnnxNode) -> bool:
    """A Reshape of a Reshape's result, to sizes that fit all that the first one's sizes fit."""
    if not is_op(node, "Reshape") or (first := node.inputs[0].producer()) is None or not is_op(first, "Reshape"):
        return False
    one, two = numbers_of(first.inputs[1]), numbers_of(node.inputs[1])
    if one is None or two is None or 0 in one or 0 in two:
        return False
    rest, own = (math.prod(n for n in sizes if n != -1) for sizes in (one, two))
    if -1 in one and -1 in two:
        fits = own % rest == 0
    else:
        fits = -1 not in two and (rest == own or (-1 in one and own % rest == 0))
    if not fits:
        return False
    put(node, "Reshape", [first.inputs[0], node.inputs[1]], {})
    return True


def twice_unsqueezed(node: OnnxNode) -> bool:
    """An Unsqueeze of an Unsqueeze's result."""
    if not is_op(node, "Unsqueeze") or (first := node.inputs[0].producer()) is None or not is_op(first, "Unsqueeze"):
        return False
    one, two, x = numbers_of(first.inputs[1]), numbers_of(node.inputs[1]), first.inputs[0]
    if one is None or two is None or x.shape is None:
        return False
    between = len(x.shape) + len(one)
    axes = [axis % (between + len(two)) for axis in two]
    old = [place for place in range(between + len(two)) if place not in axes]  # where the first result's sizes go
    axes += [old[axis % between] for axis in one]
    put(node, "Unsqueeze", [x, sizes_constant(node, sorted(axes))], {})
    return True


def idle(node: OnnxNode) -> bool:
    """An Expand or a Reshape to the shape that its operand has."""
    if not (is_op(node, "Expand") or is_op(node, "Reshape")) or node.outputs[0].is_graph_output():
        return False
    if not alike(node.inputs[0], node.outputs[0]):
        return False
    drop(node)
    return True


def expanded_for_where(node: OnnxNode) -> bool:
    """A branch of Where that is one number, repeated to the other branch's shape."""
    if not is_op(node, "Where"):
        return False
    for at, other in ((1, 2), (2, 1)):
        made = node.inputs[at].producer()
        if made is None or not is_op(made, "Expand") or not alike(node.inputs[at], node.inputs[other]):
            continue
        if made.inputs[0].shape is not None and not any(size != 1 for size in made.inputs[0].shape):
            node.replace_input_with(at, made.inputs[0])
            return True
    return False


def heads_turned_first(node: OnnxNode) -> bool:
    """A rotary embedding of (B, S, N D), between a Reshape from (B, S, N, D) and one back and a Transpose."""
    if not is_op(node, "Transpose") or list(node.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return False
    steps = [node]
    for op, domain in (("Reshape", ""), ("RotaryEmbedding", "com.microsoft"), ("Reshape", "")):
        made = steps[-1].inputs[0].producer()
        if made is None or not is_op(made, op, domain) or len(list(made.outputs[0].uses())) != 1:
            return False
        steps.append(made)
    _, back, rotary, flat = steps
    x = flat.inputs[0]
    if x.shape is None or len(x.shape) != 4 or not all(isinstance(n, int) for n in x.shape[2:]):
        return False
    heads, width = int(x.shape[2]), int(x.shape[3])
    given = {name: attribute.value for name, attribute in rotary.attributes.items()}
    if given.get("num_heads") != heads or given.get("rotary_embedding_dim"):
        return False
    if numbers_of(back.inputs[1]) != [0, 0, heads, width] or numbers_of(flat.inputs[1]) != [0, 0, -1]:
        return False
    turned = add_before(node, "Transpose", [x], {"perm": [0, 2, 1, 3]}, node.outputs[0])
    put(node, "RotaryEmbedding", [turned, *rotary.inputs[1:]], given, "com.microsoft")
    return True


RULES: tuple[Callable[[OnnxNode], bool], ...] = (
    idle, expanded_for_where, twice_reshaped, constant_shape, twice_unsqueezed, heads_turned_first,
)  # fmt: skip
