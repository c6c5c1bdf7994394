"""One step of a recurrent module as ONNX ``Scan`` loops over tokens, with all else outside them.

:mod:`~.stages` says which nodes run where. Outside the loops a step's nodes stand as they are, with B S rows in the
place of B: products read their weights once for all tokens, and norms and activations are one call.

Shape legend: B rows, S tokens. A step's token inputs and results are (B, 1, ...), its states (B, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeopt.lower.onnx.names import prefixed
from moeopt.lower.onnx.region import LoopRegion, OutsideRegion
from moeopt.lower.onnx.stages import CONSTANT, ROWS, SIZES, Stages, plan_stages
from moeopt.value_types import OnnxGraph, OnnxValue


def scan_tokens(
    step: OnnxValue, name: str, tokens: Sequence[Any], states: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Nodes that run ``step`` for each token of ``tokens`` in turn, and their values.

    Args:
        step: an ``onnx_ir.Model`` from the tokens' inputs, then the states, to results, then new states. Its nodes
            are copied; its initializers are read where they are.
        name: begins the name of every node, value and weight.
        tokens: values (B, S, ...) that take the place of the step's token inputs; states (B, ...): of the others.

    Returns:
        the nodes in order, and as many values as the step has outputs: results (B, S, ...), then states.
    """
    graph = step.graph
    prefixed(name, [], graph.initializers.values())
    first, held = list(graph.inputs)[: len(tokens)], list(graph.inputs)[len(tokens) :]
    results, nexts = list(graph.outputs)[: -len(held)], list(graph.outputs)[-len(held) :]
    stages = plan_stages(graph, first, held, results)
    outside = OutsideRegion(name, stages, first, tokens, states[0])
    ends: dict[int, Any] = {}
    for k in range(-1, len(stages.loops)):
        if k >= 0:
            members = stages.loops[k]
            loop = LoopRegion(outside, k, [held[n] for n in members])
            for node in graph:
                if stages.places[id(node)] == loop.place:
                    loop.copy(node)
            after = loop.close(
                [states[n] for n in members], [nexts[n] for n in members], _away(graph, stages, k, results)
            )
            ends.update(zip(members, after, strict=True))
        for node in graph:
            if stages.places[id(node)] == (ROWS, k) or (k < 0 and stages.places[id(node)] == CONSTANT):
                outside.copy(node)
    finals = [outside.result(value) for value in results]
    return outside.nodes, [*finals, *(ends[n] for n in range(len(held)))]


def _away(graph: OnnxGraph, stages: Stages, k: int, results: Sequence[Any]) -> list[Any]:
    """The values of loop ``k`` that are read elsewhere."""
    inside, wanted = ("loop", k), {id(value) for value in results}
    values = [value for node in graph for value in node.outputs]
    return [
        value
        for value in (*graph.inputs, *values)
        if stages.homes[id(value)] == inside
        and (id(value) in wanted or any(stages.places[id(user)] not in (inside, SIZES) for user, _ in value.uses()))
    ]
