"""Names of a graph's parts, made unlike those of any other part; nodes by the module that they come of.

    model.layers.0.self_attn.q_proj/MatMul     the module's path, a slash, and the operator; the second has "_1"
    layers.0.mlp/expert.3/gate_up              a node of a rewritten block: the block's name comes first
    layers.0.mlp.forward/TopK                  what the code of a rewritten block's own module computes beside that
    Transpose_2                                of the model's own code, or of no module alone

Only nodes of a block's experts begin with its name and a slash, so whoever looks for a block's nodes finds no others.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from moeopt.value_types import OnnxModel, OnnxNode

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter keeps the paths of the modules around a node, and last a name of its own."""
_OF_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
_MADE = "node_"
"""What the exporter and ``onnx_ir`` begin the names that they make up with."""


def prefixed(name: str, nodes: Sequence[Any], values: Iterable[Any]) -> None:
    """Begin the names of ``onnx_ir`` nodes, of what they give, and of ``values`` with ``name`` and a slash."""
    for node in nodes:
        node.name = f"{name}/{node.name or node.op_type}"
    for value in (*values, *(v for node in nodes for v in node.outputs)):
        value.name = f"{name}/{value.name}"


def name_by_module(model: OnnxModel, blocks: Collection[str]) -> None:
    """Name the nodes of an ``onnx_ir.Model`` that have a made-up name, or none, by their modules; all names differ.

    A node that a pass made has no module: it gets the path that those that read it share, else those that it reads.

    Args:
        blocks: the names of the rewritten blocks.
    """
    nodes = list(model.graph.all_nodes())
    made_up = [n for n in nodes if not n.name or (n.name.startswith(_MADE) and "/" not in n.name)]
    paths = _paths(nodes, made_up)
    outside = {id(n) for n in made_up}
    taken = {n.name for n in nodes if id(n) not in outside}
    seen: set[str] = set()
    uses: Counter[str] = Counter()
    for node in nodes:
        name = node.name
        if id(node) in outside:
            path = paths[id(node)]
            path += ".forward" if path in blocks else ""
            name = f"{path}/{node.op_type}" if path else node.op_type
        elif name not in seen:
            seen.add(name)
            continue
        while (free := f"{name}_{uses[name]}" if uses[name] else name) in taken:
            uses[name] += 1
        node.name = free
        taken.add(free)


def _paths(nodes: Sequence[OnnxNode], wanted: Sequence[OnnxNode]) -> dict[int, str]:
    """The path of each of ``wanted``, by its identity."""
    paths = {id(n): path for n in nodes if (path := _own_path(n)) is not None}
    for node in reversed(wanted):
        users = {id(user): user for value in node.outputs for user, _ in value.uses()}
        _share(paths, node, users)
    for node in wanted:
        made = [value.producer() for value in node.inputs if value is not None]
        _share(paths, node, {id(n) for n in made if n is not None})
    return {id(n): paths.get(id(n), "") for n in wanted}


def _share(paths: dict[int, str], node: OnnxNode, others: Collection[int]) -> None:
    known = [paths[other].split(".") for other in others if other in paths]
    if id(node) in paths or not known:
        return
    length = next((at for at, words in enumerate(zip(*known, strict=False)) if len(set(words)) > 1), None)
    paths[id(node)] = ".".join(min(known, key=len)[:length])


def _own_path(node: OnnxNode) -> str | None:
    """The path of the module that a node comes of; None where neither the exporter nor its name says it."""
    if text := node.metadata_props.get(SCOPES):
        scopes = ast.literal_eval(text)[:-1]
        return str(scopes[-1]).replace("/", "_") if scopes and scopes[-1] != _OF_NO_MODULE else None
    path, slash, _ = (node.name or "").partition("/")
    return path if slash else None
