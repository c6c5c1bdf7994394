"""Branches that spare an expert without rows its products: ``If(it has rows) then: compute, else: leave the sum``.

    If(size(rows) > 0)  then y + scatter(rows, expert(x[rows]) * w)     else y      ->  the nodes of the first branch
    If(any(mask))       then expert(x) * sum(mask * w)                  else zeros  ->  the same

Where no row chose the expert, the first branch gives what the other gives: that is shown by the nodes of both, from
what the condition says where it is false (``nothing_chosen``). The branch always taken computes the same, then.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.nothing_chosen import NothingChosen
from moeopt.onnx_in.products import weight_products
from moeopt.value_types import OnnxGraph, OnnxNode, OnnxValue

BRANCHES = ("then_branch", "else_branch")


@dataclass(frozen=True)
class TakenBranch:
    """A branch that may always be taken.

    Attributes:
        name: of the attribute that it is.
        finite: whether that holds for finite results of its products alone: they are multiplied with zeros.
    """

    name: str
    finite: bool


def taken_branch(node: OnnxNode) -> TakenBranch | None:
    """The branch of an ``If`` that computes what the other one gives where that is taken; None where none is seen to.

    Only branches with products of constant weights are looked for: others cost nothing to leave as they are.
    """
    for way, facts in _ways(node):
        if facts.learnt and _agree(node, facts) and weight_products(GraphIndex(_branch(node, way))):
            return TakenBranch(way, facts.by_factor)
    return None


def why_not_taken(node: OnnxNode) -> str:
    """Why no branch of an ``If`` may always be taken, by the node's name and what decides."""
    name, condition = repr(node.name), _made(node.inputs[0])
    learnt = [facts for _, facts in _ways(node) if facts.learnt]
    if not learnt:
        return f"what the node {name} (If) decides by, {condition}, is not seen to say that no row chose the expert"
    for facts in learnt:
        for pair in _results(node):
            if not (_as_wide(*pair) and facts.same(*pair)):
                return (
                    f"where the condition of the node {name} (If), {condition}, says that no row chose the expert, its "
                    f"branches are not seen to give the same, but {_made(pair[0])} and {_made(pair[1])}"
                )
    return (
        f"the branches of the node {name} (If) give the same where {condition} says that no row chose the expert, but "
        "only as long as the expert's results are finite"
    )


def _ways(node: OnnxNode) -> list[tuple[str, NothingChosen]]:
    """Each branch, with what holds where the other one is taken."""
    return [(name, NothingChosen(node.inputs[0], name == "else_branch")) for name in BRANCHES]


def _agree(node: OnnxNode, facts: NothingChosen) -> bool:
    results = _results(node)
    return bool(results) and all(_as_wide(*pair) and facts.same(*pair) for pair in results)


def _as_wide(one: OnnxValue, other: OnnxValue) -> bool:
    """Whether two shapes may be the same, as far as the file tells them: zeros of one size are no zeros of another."""
    if one.shape is None or other.shape is None:
        return True
    sizes = zip(one.shape, other.shape, strict=False)
    return len(one.shape) == len(other.shape) and all(
        a == b for a, b in sizes if isinstance(a, int) and isinstance(b, int)
    )


def _results(node: OnnxNode) -> list[tuple[OnnxValue, OnnxValue]]:
    return list(zip(*(_branch(node, name).outputs for name in BRANCHES), strict=False))


def _branch(node: OnnxNode, name: str) -> OnnxGraph:
    return node.attributes[name].as_graph()


def _made(value: OnnxValue) -> str:
    """A value by the node that makes it."""
    node = value.producer()
    return f"{value.name!r}" if node is None else f"the node {(node.name or value.name)!r} ({node.op_type})"
