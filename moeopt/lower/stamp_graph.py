"""The graph of a model whose alike layers were stamped: each stamp becomes a copy of its kind's nodes.

Between the two marks of a kind are the nodes of its one traced layer. A copy reads the arguments of its own stamp and
the weights of its own layer. Nodes that compute sizes are shared and not copied: alike calls have the same sizes.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from moeopt.lower.alike_layers import weights_by_name
from moeopt.lower.layer_calls import NotStampable
from moeopt.lower.stamps import Kind, Stamps

MARK, STAMP = torch.ops.moeopt.mark.default, torch.ops.moeopt.stamp.default
OnCopy = Callable[[fx.Node, fx.Node, str, str], None]


@dataclasses.dataclass
class _Body:
    """The nodes of a kind's traced layer.

    ``given``: for each node that is an input of the body, the number of the argument.
    """

    kind: Kind
    nodes: list[fx.Node]
    given: dict[fx.Node, int]
    results: list[fx.Node]


def write_out(
    program: torch.export.ExportedProgram, stamps: Stamps, on_copy: OnCopy = lambda node, copy, first, path: None
) -> None:
    """Put the nodes of the layers in the place of marks and stamps.

    Args:
        on_copy: told of each copied node: (node, copy, path of the traced layer, path of the stamped one).

    Raises:
        NotStampable: a value inside a traced layer is read outside of it.
    """
    graph = program.graph_module.graph
    bodies = {kind.number: _body(graph, kind) for kind in stamps.kinds.values()}
    weights = _weight_nodes(program, stamps)
    kept = {spec.arg.name for spec in program.graph_signature.output_specs if hasattr(spec.arg, "name")}
    for node in [n for n in graph.nodes if n.target is STAMP]:
        inputs, number, layer = node.args
        body, path = bodies[number], stamps.layers[layer]
        to = {a: weights[b] for a, b in _pairs(stamps, body.kind.path, path, weights)}
        to |= {n: inputs[i] for n, i in body.given.items()}
        with graph.inserting_before(node):
            for inner in body.nodes:
                if inner in to:
                    continue
                copy = graph.node_copy(inner, lambda n, to=to: to.get(n, n))
                to[inner] = copy
                on_copy(inner, copy, body.kind.path, path)
        _take_place(graph, node, [to.get(r, r) for r in body.results], kept)
    for node in [n for n in graph.nodes if n.target is MARK]:
        _take_place(graph, node, list(node.args[0]), kept)
    program.graph_module.recompile()


def _body(graph: fx.Graph, kind: Kind) -> _Body:
    *begins, end = [n for n in graph.nodes if n.target is MARK and n.args[1] == kind.number]
    nodes: list[fx.Node] = []
    given: dict[fx.Node, int] = {}
    count = 0
    for begin in begins:  # of the arguments, and of the tensors in its slot of a cache
        given |= {user: count + user.args[1] for user in begin.users}
        count += len(begin.args[0])
    node = begins[0].next
    while node is not end:
        if not _is_size(node) and node not in begins:
            nodes.append(node)
        node = node.next
    inside = {*nodes, *given, end}
    leak = next((n for n in nodes if not inside.issuperset(n.users)), None)
    if leak is not None:
        raise NotStampable(kind.cls, f"{leak.name} is read outside of it")
    return _Body(kind, nodes, given, list(end.args[0]))


def _is_size(node: fx.Node) -> bool:
    """Whether a node computes a number, of sizes."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def _weight_nodes(program: torch.export.ExportedProgram, stamps: Stamps) -> dict[int, fx.Node]:
    """The placeholder of each weight, by the ``id`` of the model's own tensor."""
    named = weights_by_name(stamps.model)
    placeholders = [n for n in program.graph_module.graph.nodes if n.op == "placeholder"]
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    pairs = zip(placeholders, program.graph_signature.input_specs, strict=True)
    return {id(named[s.target]): n for n, s in pairs if s.kind in kinds and s.target in named}


def _pairs(stamps: Stamps, first: str, path: str, weights: dict[int, fx.Node]) -> list[tuple[fx.Node, int]]:
    """Of each weight of a traced layer: its node, and the ``id`` of the same weight of the layer at ``path``."""
    ours, theirs = (weights_by_name(stamps.model.get_submodule(p)) for p in (first, path))
    return [(weights[id(t)], id(theirs[name])) for name, t in ours.items() if id(t) in weights]


def _take_place(graph: fx.Graph, node: fx.Node, values: list[Any], kept: set[str]) -> None:
    """``values`` instead of the results of ``node``; one that the signature knows by name has the old one's name."""
    for user in list(node.users):
        assert user.target is operator.getitem
        value, name = values[user.args[1]], user.name  # type: ignore[index]
        user.replace_all_uses_with(value)
        graph.erase_node(user)
        if name in kept:
            value.name = name
    graph.erase_node(node)
