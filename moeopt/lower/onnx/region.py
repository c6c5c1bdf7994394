"""Copies of a recurrent step's nodes, outside its loops or in one of them, with values carried between the two.

Shape legend: B rows, S tokens. A value of the step is (B, ...); outside it is (B S, ...), and at a loop's door
(B, S, ...), of which the loop takes one token at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeopt.errors import Declined
from moeopt.lower.onnx.stages import ROWS, SIZES, StagePosition, Stages
from moeopt.value_types import OnnxAttribute, OnnxNode, OnnxValue


class Region:
    """Nodes of one graph. ``rows`` is a value whose first size is the number of rows here."""

    rows: OnnxValue

    def __init__(self, name: str, stages: Stages, place: StagePosition) -> None:
        self.name, self.stages, self.place = name, stages, place
        self.nodes: list[Any] = []
        self.values: dict[int, Any] = {}

    def copy(self, node: OnnxNode) -> None:
        """The same node, reading what its inputs are here."""
        import onnx_ir as ir

        if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            raise Declined(f"{self.name}: a step that holds {node.op_type} of its own has no form that goes by tokens")
        again = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else self.here(value) for value in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=f"{self.name}/{node.name or node.op_type}",
        )
        for new, old in zip(again.outputs, node.outputs, strict=True):
            new.name, new.type, new.shape = f"{self.name}/{old.name}", old.type, self.shaped(old)
            self.values[id(old)] = new
        self.nodes.append(again)

    def here(self, value: OnnxValue) -> OnnxValue:
        """What ``value`` of the step is here."""
        home = self.stages.homes.get(id(value))
        if home is None:
            return value  # a weight
        if id(value) not in self.values:
            if home == SIZES:
                self._say_sizes(value.producer())
            else:
                self.values[id(value)] = self.fetch(value, home)
        return self.values[id(value)]

    def fetch(self, value: OnnxValue, home: StagePosition) -> OnnxValue:
        """A value that is made elsewhere, at ``home``."""
        raise NotImplementedError

    def shaped(self, value: OnnxValue) -> OnnxValue:
        """The shape here of a value of the step."""
        return value.shape

    def op(
        self,
        op_type: str,
        inputs: list[Any],
        like: OnnxValue = None,
        shape: OnnxValue = None,
        **attributes: OnnxAttribute,
    ) -> OnnxValue:
        """The value of a node that the step has not; int64 unless it is ``like`` another."""
        import onnx_ir as ir

        node = ir.node(op_type, inputs, attributes, name=f"{self.name}/{op_type}.{len(self.nodes)}")
        self.nodes.append(node)
        value = node.outputs[0]
        value.name, value.shape = node.name, None if shape is None else ir.Shape(shape)
        value.type = ir.TensorType(ir.DataType.INT64) if like is None else like.type
        return value

    def _say_sizes(self, node: OnnxNode) -> None:
        if node.op_type != "Shape":  # computed from sizes
            self.copy(node)
            return
        shape = list(node.inputs[0].shape)
        begin, end = [node.attributes[k].as_int() if k in node.attributes else None for k in ("start", "end")]
        parts = [
            self.op("Constant", [], value_ints=[shape[at]]) if at else self.op("Shape", [self.rows], start=0, end=1)
            for at in range(len(shape))[begin:end]
        ]
        self.values[id(node.outputs[0])] = self.op("Concat", parts, axis=0)


class OutsideRegion(Region):
    """All tokens at once. ``tokens`` are the step's, ``given`` (B, S, ...) what stands for them, ``state`` (B, ...)."""

    def __init__(
        self, name: str, stages: Stages, tokens: Sequence[Any], given: Sequence[Any], state: OnnxValue
    ) -> None:
        super().__init__(name, stages, (ROWS, -1))
        self.scanned: dict[int, Any] = {}
        self.first = tokens[0]
        sizes = [self.op("Shape", [state], start=0, end=1), self.op("Shape", [given[0]], start=1, end=2)]
        self._size = self.op("Concat", sizes, axis=0)
        for token, value in zip(tokens, given, strict=True):
            self.values[id(token)] = self._reshaped(value, token, [-1])
        self.rows = self.values[id(tokens[0])]

    def fetch(self, value: OnnxValue, home: StagePosition) -> OnnxValue:
        return self._reshaped(self.scanned[id(value)], value, [-1])

    def shaped(self, value: OnnxValue) -> OnnxValue:
        import onnx_ir as ir

        return value.shape if value.shape is None or not len(value.shape) else ir.Shape([None, *value.shape[1:]])

    def stacked(self, value: OnnxValue) -> OnnxValue:
        """(B, S, ...) of a value (B, ...) of the step, as loops take it and give it."""
        if id(value) not in self.scanned:
            self.scanned[id(value)] = self._reshaped(self.here(value), value, None)
        return self.scanned[id(value)]

    def result(self, value: OnnxValue) -> OnnxValue:
        """(B, S, ...) of a result (B, 1, ...) of the step."""
        found = self.scanned.get(id(value))
        return self._reshaped(self.here(value) if found is None else found, value, None, skip=2)

    def _reshaped(self, value: OnnxValue, like: OnnxValue, leading: list[int] | None, skip: int = 1) -> OnnxValue:
        """``value`` with the sizes of ``like`` after ``leading``, or after (B, S)."""
        rest = list(like.shape[skip:])
        if leading is not None:
            target = self.op("Constant", [], value_ints=[*leading, *rest])
            return self.op("Reshape", [value, target], like, [None, *rest])
        target = self._size
        if rest:
            target = self.op("Concat", [target, self.op("Constant", [], value_ints=rest)], axis=0)
        return self.op("Reshape", [value, target], like, [None, None, *rest])


class LoopRegion(Region):
    """One token at a time. ``states`` are those of the step that this loop carries."""

    def __init__(self, outside: OutsideRegion, k: int, states: Sequence[Any]) -> None:
        super().__init__(f"{outside.name}/loop.{k}", outside.stages, ("loop", k))
        self._outside = outside
        self._doors: list[tuple[Any, Any]] = []
        self._held = [self._input(state, "held") for state in states]
        self.values.update(zip(map(id, states), self._held, strict=True))
        self.rows = self._held[0]

    def fetch(self, value: OnnxValue, home: StagePosition) -> OnnxValue:
        if home[0] not in (ROWS, "loop"):
            return self._outside.here(value)  # a constant: loops see what is outside them
        door = self._input(value, "token")
        self._doors.append((door, self._outside.stacked(value)))
        return door

    def close(self, states: Sequence[Any], nexts: Sequence[Any], away: Sequence[Any]) -> list[Any]:
        """Write the loop: from ``states`` to what it returns, through ``nexts``; ``away`` are read outside."""
        import onnx_ir as ir

        ends = [self.op("Identity", [self.here(value)], value, value.shape) for value in (*nexts, *away)]
        if not self._doors:
            self.here(self._outside.first)  # a Scan goes on for as long as it is given something
        body = ir.Graph([*self._held, *(door for door, _ in self._doors)], ends, nodes=self.nodes, name=self.name)
        scan = ir.node(
            "Scan",
            [*states, *(outer for _, outer in self._doors)],
            {
                "body": body,
                "num_scan_inputs": len(self._doors),
                "scan_input_axes": [1] * len(self._doors),
                "scan_output_axes": [1] * len(away),
            },
            num_outputs=len(ends),
            name=f"{self.name}/Scan",
        )
        self._outside.nodes.append(scan)
        for number, (new, old) in enumerate(zip(scan.outputs, (*nexts, *away), strict=True)):
            new.name, new.type, new.shape = f"{scan.name}.{number}", old.type, old.shape
            if number >= len(nexts):
                new.shape = ir.Shape([old.shape[0], None, *old.shape[1:]])
                self._outside.scanned[id(old)] = new
        return list(scan.outputs[: len(nexts)])

    def _input(self, value: OnnxValue, word: str) -> OnnxValue:
        import onnx_ir as ir

        return ir.Value(name=f"{self.name}/{word}.{value.name}", type=value.type, shape=value.shape)
