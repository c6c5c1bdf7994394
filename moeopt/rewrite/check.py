"""The law of a :class:`BlockGraph`, as code that runs after each pass.

1. Nodes stand in the order in which they run; each argument is a node of the same graph.
2. A call_function is an op without side effects, Python arithmetic on sizes, or a function of moeopt's own.
3. Each submodule, Parameter, buffer, constant and expert weight that a node names is there.
4. The weights of each ``moeopt::experts`` node have the form that its spec says, within their Parameters.
5. Inputs are those of the guard; each slot of what is returned, written and stored is a leaf of the graph.
6. A leaf shares memory with an input, a weight or another leaf only where it did before the pass.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tree import tree_map
from moeopt.errors import MoeoptError
from moeopt.ir.row_function import RowFunction
from moeopt.ir.weight_refs import MatrixRef, PartRef, VectorRef, parts_of, tensor_at
from moeopt.rewrite.block_graph import CONSTANT, EXPERTS, BlockGraph, ExpertWeightRefs, Slot
from moeopt.value_types import PyObject

_ARITHMETIC = {operator.mul, operator.floordiv, operator.add, operator.sub, operator.truediv, operator.getitem, getattr}


class LawBroken(MoeoptError):
    """A pass left a graph that breaks the law of this representation; the message says which, and at which node."""


def check_block(block: BlockGraph, before: BlockGraph | None = None) -> None:
    """Check ``block``, and that no leaf gained an alias since ``before``.

    Raises:
        LawBroken: with the node and the fact.
    """
    if block.captured is not None:
        return  # still the user's own code
    try:
        block.graph.lint()
    except RuntimeError as err:
        raise LawBroken(f"the graph is not in order: {str(err).splitlines()[0]}") from err
    for node in block.graph.nodes:
        if reason := _broken(block, node):
            raise LawBroken(f"{node} ({op_name(node)}): {reason}")
    if missing := [number for number in block.formats if not 0 <= number < len(block.weights)]:
        raise LawBroken(f"there are no experts {missing[0]} to quantise among the block's {len(block.weights)}")
    for number, weights in enumerate(block.weights):
        for reason in _weight_faults(weights, block.root):
            raise LawBroken(f"the weights of experts {number}: {reason}")
    _check_ends(block)
    if before is not None and before.captured is None:
        gained = aliases(block) - aliases(before)
        if gained:
            a, b = sorted(gained)[0]
            raise LawBroken(f"{a} shares memory with {b}, and did not before the pass")


def _broken(block: BlockGraph, node: fx.Node) -> str:
    """What is wrong with one node; "" when nothing is."""
    if node.op == "get_attr":
        return _missing(block.root, str(node.target), torch.Tensor)
    if node.op == "call_module":
        return _missing(block.root, str(node.target), nn.Module)
    if node.op != "call_function":
        return "" if node.op in ("placeholder", "output") else f"a {node.op} is no node of a block graph"
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target} writes to its arguments, which a block graph does not" if target._schema.is_mutable else ""
    if target in (EXPERTS, CONSTANT):
        held = block.weights if target is EXPERTS else block.constants
        index = node.args[1]
        if not isinstance(index, int) or not 0 <= index < len(held):
            return f"there is no number {index} among the block's {len(held)}"
        return ""
    if target in _ARITHMETIC or str(getattr(target, "__module__", "")).split(".")[0] == "moeopt":
        return ""
    return f"{target} is neither an op, arithmetic on sizes nor a function of moeopt's own"


def _missing(root: nn.Module | None, path: str, kind: type) -> str:
    if root is None:
        return ""
    try:
        found: PyObject = root.get_submodule(path) if kind is nn.Module else tensor_at(root, path)
    except AttributeError:
        found = None
    return "" if isinstance(found, kind) else f"the module has no {kind.__name__} at {path}"


def _weight_faults(weights: ExpertWeightRefs, root: nn.Module | None) -> Iterator[str]:
    """Where the weights of one node are not what its spec says."""
    refs, spec = weights
    if isinstance(spec, RowFunction):
        yield from _slot_faults(refs, spec, root)
        return
    wide = 2 if spec.rows in ("gate|up", "up|gate", "interleaved", "interleaved_up") else 1
    tensors = 2 if spec.rows == "separate" else 1
    hidden, out = next((w.k for ref in refs for w in ref.w_in), 0), refs[0].w_out.m
    for e, ref in enumerate(refs):
        inner = ref.w_out.k
        if len(ref.w_in) != tensors:
            yield f"expert {e} has {len(ref.w_in)} first matrices, and rows {spec.rows} take {tensors}"
        elif any((w.k, w.m) != (hidden, wide * inner) for w in ref.w_in):
            yield f"expert {e} has a first matrix of {ref.w_in[0].m} by {ref.w_in[0].k}, not {wide * inner} by {hidden}"
        elif ref.w_out.m != out or any(b is not None and b.m != w.m for b, w in zip(ref.b_in, ref.w_in, strict=True)):
            yield f"expert {e} has another width or bias than its matrices say"
        elif ref.b_out is not None and ref.b_out.m != out:
            yield f"expert {e} has a bias of {ref.b_out.m} after a matrix of {out} outputs"
        if root is not None:
            parts = (*ref.w_in, *ref.b_in, ref.w_out, ref.b_out)
            yield from (fault for p in parts if p is not None and (fault := _outside(p, root)))


def _slot_faults(refs: list[Any], spec: RowFunction, root: nn.Module | None) -> Iterator[str]:
    """Where an expert's slots are not what the function takes."""
    wanted = [shape for _, shape in spec.body.slots]
    for e, ref in enumerate(refs):
        if [part.shape for part in ref.slots] != wanted:
            yield f"expert {e} has slots of {[part.shape for part in ref.slots]}, and its function takes {wanted}"
        if root is not None:
            yield from (fault for p in parts_of(ref) if (fault := _outside(p, root)))


def _outside(part: MatrixRef | VectorRef | PartRef, root: nn.Module) -> str:
    """Why ``part`` is no region of a Parameter of ``root``; "" when it is."""
    if reason := _missing(root, part.path, torch.Tensor):
        return reason
    shape = tensor_at(root, part.path).shape
    if isinstance(part, PartRef):
        steps = list(zip(part.steps, part.shape, strict=True))
    else:
        steps = [(part.dm, part.m)] + ([(part.dk, part.k)] if isinstance(part, MatrixRef) else [])
    for d, (start, size) in enumerate(zip(part.origin, shape, strict=True)):
        ends = [step[d] * (count - 1) for step, count in steps]
        low, high = start + sum(min(e, 0) for e in ends), start + sum(max(e, 0) for e in ends)
        if low < 0 or high >= size:
            return f"a region of {part.path} reaches from {low} to {high} along axis {d}, which has {size}"
    return ""


def _check_ends(block: BlockGraph) -> None:
    first = next(iter(block.graph.nodes))
    if first.op != "placeholder" or first.target != "block":
        raise LawBroken("the first input must be `block`, which runs the graph")
    if block.guard is not None and len(block.inputs) != len(block.guard.shapes):
        raise LawBroken(f"it takes {len(block.inputs)} tensors, and its guard knows {len(block.guard.shapes)}")
    taken: list[int] = []
    tree_map(Slot, lambda slot: taken.append(slot.index), [block.output, block.mutations, block.attributes])
    if any(not 0 <= index < len(block.leaves) for index in taken):
        raise LawBroken(f"it has {len(block.leaves)} leaves, and one numbered {max(taken)} is returned or written")


def aliases(block: BlockGraph) -> set[tuple[str, str]]:
    """Pairs of what may share memory: (leaf, input or weight or kept module's result), (leaf, other leaf)."""
    roots: dict[fx.Node, frozenset[str]] = {}
    for node in block.graph.nodes:
        source = viewed(node)
        if node.op == "call_module":  # it may hand on what it was given
            roots[node] = frozenset({node.name}).union(*(roots[n] for n in node.all_input_nodes))
        else:
            roots[node] = roots[source] if source is not None else frozenset({node.name})
    given = {n.name for n in block.graph.nodes if n.op in ("placeholder", "get_attr", "call_module")}
    ends = [(f"leaf {i}", roots[n]) for i, n in enumerate(block.leaves) if isinstance(n, fx.Node)]
    pairs = {(leaf, root) for leaf, found in ends for root in found & given}
    return pairs | {(a, b) for i, (a, x) in enumerate(ends) for b, y in ends[:i] if x & y}


def viewed(node: fx.Node) -> fx.Node | None:
    """The node whose memory the result of ``node`` is, or may be, a view of; None for a fresh tensor."""
    target = node.target
    if target is operator.getitem:
        held = node.all_input_nodes[0]  # one of the tensors of an op is as fresh as that op's result
        return held if held.op != "call_function" or viewed(held) is not None else None
    if not isinstance(target, torch._ops.OpOverload):
        return None
    for argument, value in zip(target._schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and isinstance(value, fx.Node):
            return value
    return None
