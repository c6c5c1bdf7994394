"""Recorded calls and block graphs as text: one line a node, with shapes and the user's source lines.

    %input_0: float32[input_0.shape[0], 64] = input
    %gate: float32[input_0.shape[0], 8] = module gate(%input_0)
    %experts: float32[input_0.shape[0], 64] = experts 0(%input_0, %getitem_1, %div)  # my_model.py:31
    return %experts

A size that follows the inputs is written in terms of their shapes, and ``?`` where it is no simple function of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import Tape
from moeopt.rewrite.block_graph import CONSTANT, EXPERTS, BlockGraph, Slot
from moeopt.rewrite.scratch import UNSET
from moeopt.value_types import PyObject


def text(block: BlockGraph) -> str:
    """``block`` as text: its graph, or the first of its recorded calls where it has none yet."""
    lines = block_lines(block) if block.captured is None else tape_lines(block.captured.tape)
    return "\n".join(lines) + "\n"


def block_lines(block: BlockGraph) -> Iterator[str]:
    """The graph of ``block``, a line a node; then what is written, stored and returned."""
    for index, (refs, spec) in enumerate(block.weights):
        router = block.routers[index] if index < len(block.routers) else None
        yield f"# experts {index}: {len(refs)} of {spec}" + (f"; router {router}" if router is not None else "")
    for node in block.graph.nodes:
        if node.op != "output" and not (node.op == "placeholder" and node.name == "block"):
            source = node.meta.get("source")
            yield f"%{node}{_type(node)} = {_call(node)}" + (f"  # {source}" if source else "")
    leaves = block.leaves
    for target, value in block.mutations:
        yield f"write {_shown(value, leaves)} into {_shown(target, leaves)}"
    for (path, name), value in block.attributes.items():
        dotted = ".".join(filter(None, (path, name)))
        yield f"unset {dotted}" if value is UNSET else f"store {_shown(value, leaves)} as {dotted}"
    yield f"return {_shown(block.output, leaves)}"


def _call(node: fx.Node) -> str:
    """The call of one node: ``mul.Tensor(%a, 2)``, ``module gate(%x)``, ``experts 0(%x, %ids, %weights)``."""
    args = node.args
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"attr {node.target}"
    if node.op == "call_module":
        name = f"module {node.target}"
    elif node.target in (EXPERTS, CONSTANT):
        name, args = f"{'experts' if node.target is EXPERTS else 'constant'} {node.args[1]}", node.args[2:]
    else:
        overload = getattr(node.target, "_overloadname", "default")
        name = op_name(node) + (f".{overload}" if overload != "default" else "")
    words = [*(_shown(a, ()) for a in args), *(f"{k}={_shown(v, ())}" for k, v in node.kwargs.items())]
    return f"{name}({', '.join(words)})"


def _type(node: fx.Node) -> str:
    shape = node.meta.get("shape")
    if shape is None:
        return ""
    sizes = ", ".join("?" if s is None else str(s) for s in shape)
    return f": {str(node.meta.get('dtype') or '').removeprefix('torch.')}[{sizes}]"


def _shown(value: PyObject, leaves: tuple[Any, ...]) -> str:
    if isinstance(value, Slot):
        value = leaves[value.index]
    if isinstance(value, fx.Node):
        return f"%{value}"
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return f"({', '.join(_shown(v, leaves) for v in value)})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_shown(v, leaves) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_shown(v, leaves)}' for k, v in value.items())}}}"
    return str(value) if not isinstance(value, torch.dtype) else str(value).removeprefix("torch.")


def tape_lines(tape: Tape) -> Iterator[str]:
    """A recorded call, op by op: shapes, the module that ran it, the user's lines."""
    path, source = None, None
    for node in tape.nodes:
        call = tape.calls[node.meta["call"]].path if "call" in node.meta else ""
        if call != path:
            path = call
            yield f"# in {path or 'the block'}"
        if node.meta.get("source", source) != source:
            source = node.meta["source"]
            yield f"# {source}"
        shape = node.meta.get("shape")
        what = "" if shape is None else f": {str(node.meta.get('dtype', '')).removeprefix('torch.')}{list(shape)}"
        args = ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])
        target = f"{node.target}" if node.op != "call_function" else f"{op_name(node)}({args})"
        yield f"{node.name}{what} = {target}"
    yield f"return {tape.output}"
