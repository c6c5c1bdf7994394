"""Loops over experts that run a fixed number of times, and branches that are always taken, as plain nodes.

    Loop(M = 4, true, y0)      ->  body(0, y0), body(1, y1), body(2, y2), body(3, y3)
    Scan(stacked weights, y0)  ->  the same, with Gather(weights, e) for each expert
    If(true)                   ->  the nodes of its branch
    If(expert e has rows)      ->  the nodes of the branch that computes them, where the other one changes nothing

Scripted loops are exported so. Blocks are replaced in a file's main graph, so what holds experts is written out there,
on a copy of the file. Loops that hold none, run until a value says stop, or are long, stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from moeopt.onnx_in.body_experts import round_of_expert
from moeopt.onnx_in.free_names import FreeNames, names_in
from moeopt.onnx_in.idle_branches import taken_branch
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.loops import held_constants, never_stops, whole_number
from moeopt.onnx_in.order import bodies
from moeopt.onnx_in.products import PRODUCTS
from moeopt.onnx_in.read import OnnxFile
from moeopt.onnx_in.regions import candidate_regions
from moeopt.value_types import OnnxGraph, OnnxNode, OnnxValue, PyObject

BODIES = ("Loop", "Scan", "If")
MOST_NODES = 20_000
"""Of one loop, written out."""
_ROUNDS = 4
"""Of bodies within bodies."""


def unrolled(file: OnnxFile, finite: bool = False, stay: Collection[str] = ()) -> OnnxFile:
    """The file with such loops written out, on a copy; the same object where it holds none.

    Args:
        finite: write out also what computes the same only as long as the experts' results are finite,
        stay: but for branches that give one of these values.
    """
    for _ in range(_ROUNDS):
        inner = [(number, node) for number, node in enumerate(file.model.graph) if node.op_type in BODIES]
        holders = {number for number, node in inner if _holds_experts(node)}
        branches = {number: taken_branch(node) for number, node in inner if node.op_type == "If"}
        free = {number for number, node in inner if finite and not any(v.name in stay for v in node.outputs)}
        taken = {n: way.name for n, way in branches.items() if way is not None and (n in free or not way.finite)}
        if not holders and not taken:
            return file
        unroller = LoopUnroller(file, taken)
        made = unroller.run(holders | set(taken))
        if made is None:
            return file
        file = dataclasses.replace(file, proto=made, written=unroller.written, _model=None)
    return file


def _holds_experts(node: OnnxNode) -> bool:
    """Whether a body of a node has chains of experts, or products with matrices that a scan gives it one by one."""
    import onnx_ir as ir

    for attribute in node.attributes.values():
        bodies = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else []
        for body in bodies:
            given = {id(v) for v in body.inputs}
            if node.op_type == "Scan" and _products_with(body, given) > 1 or round_of_expert(node, body):
                return True
            if any(True for _ in candidate_regions(GraphIndex(body))) or any(
                inner.op_type in BODIES and _holds_experts(inner) for inner in body
            ):
                return True
    return False


def _products_with(body: OnnxGraph, values: set[int]) -> int:
    return sum(any(id(v) in values for v in node.inputs) for node in body if (node.domain, node.op_type) in PRODUCTS)


class LoopUnroller:
    """One pass over the main graph of a copy.

    Args:
        taken: branches that are written out although their condition is no constant, by the ``If``'s position.
    """

    def __init__(self, file: OnnxFile, taken: Mapping[int, str]) -> None:
        import onnx

        self.taken, self.written = taken, dict(file.written)
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(file.proto)
        graph = self.proto.graph
        self.constants = held_constants(graph)
        self.nodes: list[Any] = []
        self._unique = FreeNames(names_in(graph)).new

    def run(self, holders: set[int]) -> OnnxValue | None:
        """The copy with the nodes at ``holders`` written out; None where none of them can be."""
        changed = False
        for number, node in enumerate(list(self.proto.graph.node)):
            before = len(self.nodes)
            if number in holders and self._write(node, self.taken.get(number, "")):
                changed = True
                home = next((self.written[name] for name in node.output if name in self.written), node)
                self.written |= {name: home for made in self.nodes[before:] for name in made.output if name}
            else:
                self.nodes.append(node)
        if not changed:
            return None
        del self.proto.graph.node[:]
        self.proto.graph.node.extend(self.nodes)
        return self.proto

    def _write(self, node: OnnxNode, taken: str) -> bool:
        if node.op_type == "If":
            return self._if(node, taken)
        return self._loop(node) if node.op_type == "Loop" else self._scan(node)

    def _loop(self, node: OnnxNode) -> bool:
        body = _body(node, "body")
        if body is None or len(body.input) != len(node.input) or len(body.output) != len(node.output) + 1:
            return False
        trips = self._number(node.input[0])
        goes_on = not node.input[1] or self._number(node.input[1]) == 1
        if trips is None or not goes_on or not self._fits(trips, body) or not never_stops(body, self._number):
            return False
        state = list(node.input[2:])
        self._rounds(node, body, trips, state, 1, lambda n: [self._constant(n), self._constant(True)])
        return True

    def _scan(self, node: OnnxNode) -> bool:
        body = _body(node, "body")
        turned = [a for a in node.attribute if any(a.ints)]  # other axes than the first, or from the last on
        count = next((int(a.i) for a in node.attribute if a.name == "num_scan_inputs"), 0)
        if (
            body is None
            or turned
            or count < 1
            or [len(body.input), len(body.output)] != [len(node.input), len(node.output)]
        ):
            return False
        state, over = list(node.input[:-count]), list(node.input[-count:])
        held = [self.constants[name] for name in over if name in self.constants]
        if not held or not held[0].dims or not self._fits(int(held[0].dims[0]), body):
            return False

        def given(n: int) -> list[str]:
            return [self._add("Gather", [name, self._constant(n)], f"{node.name}.{n}.{name}", axis=0) for name in over]

        self._rounds(node, body, int(held[0].dims[0]), state, 0, given)
        return True

    def _if(self, node: OnnxNode, taken: str) -> bool:
        way = self._number(node.input[0])
        name = taken if way is None else "then_branch" if way else "else_branch"
        body = _body(node, name)
        if body is None or body.input or len(body.output) != len(node.output):
            return False
        for name, made in zip(node.output, self._inline(body, {}, node.name or "If"), strict=True):
            self._add("Identity", [made], name)
        return True

    def _rounds(
        self, node: OnnxNode, body: OnnxGraph, trips: int, state: list[str], lead: int,
        given: Callable[[int], list[str]],
    ) -> None:  # fmt: skip
        """The body ``trips`` times. ``lead``: its outputs before the state; ``given``: the other inputs of a round."""
        label = node.name or node.op_type
        parts: list[list[str]] = []
        for n in range(trips):
            values = [*given(n), *state] if lead else [*state, *given(n)]
            names = dict(zip((v.name for v in body.input), values, strict=True))
            made = self._inline(body, names, f"{label}.{n}")[lead:]
            state = made[: len(state)]
            parts.append(
                [
                    self._add("Unsqueeze", [part, self._constant([0])], f"{label}.{n}.part{k}")
                    for k, part in enumerate(made[len(state) :])
                ]
            )
        for name, value in zip(node.output, state, strict=False):
            if name:
                self._add("Identity", [value], name)
        for k, name in enumerate(node.output[len(state) :]):
            if name:
                self._add("Concat", [row[k] for row in parts], name, axis=0)

    def _inline(self, body: OnnxGraph, names: Mapping[str, str], label: str) -> list[str]:
        """Add a body's nodes under names of their own; returns those of its outputs."""
        here = dict(names)
        for tensor in body.initializer:
            here[tensor.name] = self._unique(f"{label}.{tensor.name}")
            copy = self.proto.graph.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = here[tensor.name]
            self.constants[copy.name] = copy
        for node in body.node:
            here |= {name: self._unique(f"{label}.{name}") for name in node.output if name}
        for node in body.node:
            made = type(node)()
            made.CopyFrom(node)
            made.name = self._unique(f"{label}.{node.name or node.op_type}")
            rename(made, here)
            self.nodes.append(made)
            if made.op_type == "Constant" and made.attribute and made.attribute[0].name == "value":
                self.constants[made.output[0]] = made.attribute[0].t
        return [here.get(v.name, v.name) for v in body.output]

    def _number(self, name: str) -> int | None:
        """A constant that is one whole number or flag."""
        return whole_number(self.constants.get(name))

    def _fits(self, trips: int, body: OnnxGraph) -> bool:
        return trips > 0 and trips * len(body.node) <= MOST_NODES

    def _constant(self, value: PyObject) -> str:
        import onnx

        tensor = onnx.numpy_helper.from_array(np.asarray(value), self._unique("unrolled.number"))
        self.constants[tensor.name] = self.proto.graph.initializer.add()
        self.constants[tensor.name].CopyFrom(tensor)
        return str(tensor.name)

    def _add(self, op_type: str, inputs: list[str], output: str, **attributes: int) -> str:
        import onnx

        name = output if op_type in ("Identity", "Concat") else self._unique(output)
        self.nodes.append(onnx.helper.make_node(op_type, inputs, [name], name=f"{name}.{op_type}", **attributes))
        return name


def _body(node: OnnxNode, name: str) -> OnnxGraph:
    return next((a.g for a in node.attribute if a.name == name and a.HasField("g")), None)


def rename(node: OnnxNode, names: Mapping[str, str]) -> None:
    """Give a node, and the bodies in it, the new names of values of the body that it was in."""
    for ends in (node.input, node.output):
        ends[:] = [names.get(name, name) for name in ends]
    for body in bodies(node):
        for inner in body.node:
            rename(inner, names)
        for value in body.output:
            value.name = names.get(value.name, value.name)
