"""What follows for a value from "no row chose this expert": it is empty, it is zeros, or it is another value.

A condition that an ``If`` asks leads back to what must hold where it is false; from there each value is asked forward.
A rule holds for every input on which the nodes run at all: a product needs as many columns as its matrix has rows, and
a row that is picked from none is an error. Zeros are told apart by whether a factor that data make had a part in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeopt.onnx_in.counts import (
    FAR,
    FLAGS,
    SAME_NUMBERS,
    all_zero,
    is_count,
    is_flag,
    is_held,
    is_whole_slice,
    maker,
    measured,
    number,
)
from moeopt.onnx_in.tensors import tensor_of
from moeopt.value_types import OnnxNode, OnnxValue

EMPTY, ZERO = "empty", "zero"
_MOST_ASKED = 1024
"""Values that one question may look at."""
_EACH = frozenset(
    "Add Sub Mul Div Pow Min Max Mod Where PRelu Neg Abs Sqrt Exp Log Erf Sigmoid Tanh Relu Reciprocal Floor Ceil "
    "Round Sign Elu Selu Celu LeakyRelu HardSigmoid HardSwish Softplus Softsign Mish Gelu Swish Clip Sum Sin Cos "
    "LayerNormalization RMSNormalization SimplifiedLayerNormalization Softmax LogSoftmax QuickGelu FastGelu BiasGelu "
    "Expand Tile Gather GatherND GatherElements Slice Split OneHot CumSum".split()
) | SAME_NUMBERS | FLAGS  # fmt: skip
"""Operators whose result is empty where an input that is no size is."""
_SIZES_FROM = {"Reshape": 1, "Expand": 1, "Tile": 1, "Slice": 1, "Split": 1, "Squeeze": 1, "Unsqueeze": 1, "OneHot": 1}
"""From which input on there are sizes and axes."""
_STILL_ZERO = SAME_NUMBERS | {
    "Expand", "Tile", "Slice", "Split", "Gather", "GatherND", "GatherElements", "Neg", "Abs", "ReduceSum", "Relu",
    "Sign"
}  # fmt: skip


class NothingChosen:
    """Values where a condition is what it is when its expert has no rows.

    Args:
        condition: of an ``If``; ``truth``: what it is then.

    Attributes:
        learnt: whether the condition says that something is empty or zero.
        by_factor: whether zeros were made by multiplying, which holds for finite factors.
    """

    def __init__(self, condition: OnnxValue, truth: bool) -> None:
        self._known: dict[int, str | None] = {}
        self._held: list[Any] = []  # ids stay those of these values
        self.by_factor = False
        self._learn_flag(condition, truth)
        self.learnt = bool(self._known)

    # What a condition says.

    def _learn_flag(self, value: OnnxValue, truth: bool) -> None:
        node = maker(value)
        if node is None:
            return
        if node.op_type == "Not":
            self._learn_flag(node.inputs[0], not truth)
        elif node.op_type == ("And" if truth else "Or"):
            for one in node.inputs:
                self._learn_flag(one, truth)
        elif node.op_type in _COMPARED:
            self._learn_comparison(node, truth)
        elif node.op_type in SAME_NUMBERS and is_flag(node.inputs[0]):
            self._learn_flag(node.inputs[0], truth)
        elif not truth and is_count(value):
            self._learn_zero(value)

    def _learn_comparison(self, node: OnnxNode, truth: bool) -> None:
        left, right = node.inputs
        op = node.op_type
        if number(left) is not None:
            left, right, op = right, left, _TURNED.get(op, op)
        bound = number(right)
        says = _COMPARED[op].get((bound, truth))
        if says == "zero" or (says == "at most zero" and is_count(left)):
            self._learn_zero(left)

    def _learn_zero(self, value: OnnxValue) -> None:
        """A value is 0 everywhere, or empty."""
        self._hold(value, ZERO)
        node = maker(value)
        if node is None:
            return
        counted = measured(value)
        if counted is not None:
            self._learn_empty(counted)
        elif node.op_type in (*SAME_NUMBERS, "ReduceSum", "ReduceMax") and is_count(node.inputs[0]):
            self._learn_zero(node.inputs[0])

    def _learn_empty(self, value: OnnxValue) -> None:
        """A value has no elements. Widths are never 0: a matrix multiplies them."""
        self._hold(value, EMPTY)
        node = maker(value)
        if node is None:
            return
        if node.op_type == "NonZero":
            self._learn_zero(node.inputs[0])
        elif node.op_type in ("Gather", "GatherND") and not is_held(node.inputs[1]):
            self._learn_empty(node.inputs[1])
        elif node.op_type in (*SAME_NUMBERS, "Gather") or is_whole_slice(node):
            self._learn_empty(node.inputs[0])

    def _hold(self, value: OnnxValue, fact: str) -> None:
        self._held.append(value)
        if self._known.get(id(value)) != EMPTY:
            self._known[id(value)] = fact

    # What follows for others.

    def same(self, one: OnnxValue, other: OnnxValue) -> bool:
        """Whether two values are equal then."""
        left, right = self.origin(one), self.origin(other)
        return left is right or (self.of(left) is not None and self.of(right) is not None)

    def origin(self, value: OnnxValue) -> OnnxValue:
        """The value that it is equal to and that was there before."""
        for _ in range(FAR):
            node = maker(value)
            here = None if node is None else self._unchanged(node)
            if here is None:
                break
            value = here
        return value

    def _unchanged(self, node: OnnxNode) -> OnnxValue | None:
        """The input that a node gives as it is."""
        if node.op_type == "Identity":
            return node.inputs[0]
        if node.op_type in ("ScatterND", "ScatterElements"):
            adds = _text(node, "reduction") == "add"
            empty = EMPTY in (self.of(node.inputs[1]), self.of(node.inputs[2]))
            return node.inputs[0] if empty or (adds and self.of(node.inputs[2])) else None
        if node.op_type in ("Add", "Sum"):
            rest = [v for v in node.inputs if self.of(v) is None]
            return rest[0] if len(rest) == 1 else None
        if node.op_type == "Where" and self.of(node.inputs[0]) == ZERO:
            return node.inputs[2]
        return None

    def of(self, value: OnnxValue, depth: int = 0) -> str | None:
        """``EMPTY``, ``ZERO`` (which an empty value may be too), or None: not known."""
        if value is None:
            return None
        if id(value) not in self._known:
            self._known[id(value)] = None
            self._held.append(value)
            if depth < FAR and len(self._held) < _MOST_ASKED:
                self._known[id(value)] = self._follows(value, depth + 1)
        return self._known[id(value)]

    def _follows(self, value: OnnxValue, depth: int) -> str | None:
        if is_held(value):
            return ZERO if all_zero(value) else None
        node = maker(value)
        if node is None:
            return None
        op, reads = node.op_type, [v for v in node.inputs if v is not None]
        found = [self.of(v, depth) for v in reads]
        if op in _EACH and EMPTY in found[: _SIZES_FROM.get(op, len(reads))]:
            return EMPTY
        if op == "Concat" and all(fact == EMPTY for fact in found):
            return EMPTY
        if op in ("MatMul", "Gemm") and any(found[n] == EMPTY and is_held(reads[1 - n]) for n in (0, 1)):
            return EMPTY
        if op == "NonZero" and found[0]:
            return EMPTY
        return ZERO if self._is_zero(node, reads, found) else None

    def _is_zero(self, node: OnnxNode, reads: Sequence[OnnxValue], found: Sequence[str | None]) -> bool:
        op = node.op_type
        if op in _STILL_ZERO:
            return found[0] is not None
        if op in ("Mul", "MatMul", "And"):
            rest = [v for v, fact in zip(reads, found, strict=True) if not fact]
            self.by_factor |= 0 < len(rest) < len(reads) and not all(is_count(v) or is_held(v) for v in rest)
            return len(rest) < len(reads)
        if op in ("Add", "Sub", "Sum", "Or", "Max", "Min", "Concat"):
            return all(found)
        if op == "Where":
            return bool(found[2] and (found[0] or found[1]))
        if op == "ConstantOfShape":
            held = node.attributes.get("value")
            return held is None or not tensor_of(held.value, node.name).any()
        if op in ("ScatterND", "ScatterElements"):
            return bool(found[0]) and self._unchanged(node) is not None
        return False


_COMPARED: dict[str, dict[Any, str]] = {
    "Greater": {(0, False): "at most zero"},
    "GreaterOrEqual": {(1, False): "at most zero"},
    "Less": {(1, True): "at most zero"},
    "LessOrEqual": {(0, True): "at most zero"},
    "Equal": {(0, True): "zero"},
}
"""What a comparison with a number says of the other side, by the number and the outcome."""
_TURNED = {"Greater": "Less", "GreaterOrEqual": "LessOrEqual", "Less": "Greater", "LessOrEqual": "GreaterOrEqual"}


def _text(node: OnnxNode, name: str) -> str:
    held = node.attributes.get(name)
    return "" if held is None else str(held.as_string())
