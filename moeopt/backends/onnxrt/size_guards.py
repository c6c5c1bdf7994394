"""The sizes that an engine holds for, inside its graph: a call of others fails at a node that says so.

    x  ->  Reshape(x, Where(condition, [0, 0, 0], [-2, -2, -2]))        0 keeps a size; no tensor has a size of -2

What reads ``x`` reads the result. A Reshape to its own sizes moves nothing, its other input is a few integers, and no
optimiser can drop it, for it does not know the condition. The node's name is the sentence that its error shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeopt.bundle.holds import sentences, sizes_in, stated
from moeopt.bundle.io_names import KEY, inputs_of
from moeopt.bundle.shape_guards import text_of
from moeopt.errors import NotSaveableError
from moeopt.lower.onnx.build import Builder
from moeopt.value_types import FxArg, PyObject

_COMPARED = {"==": "Equal", "<": "Less", "<=": "LessOrEqual", ">": "Greater", ">=": "GreaterOrEqual"}
_ARITHMETIC = {"+": "Add", "-": "Sub", "*": "Mul", "max": "Max", "min": "Min"}
_WHOLE = {"floor": "Floor", "ceil": "Ceil", "round": "Round"}
_FLOAT, _INT = 11, 7
"""double and int64 of ``onnx.TensorProto``; a size is never rounded."""
NAMED = "this engine holds only where "
"""How the name of a node that refuses begins."""
HOLDS = "moeopt.holds"
"""The metadata of a graph that says the same to who reads it."""


def guard_sizes(model: PyObject, signature: Mapping[str, Any], doubles: bool = True) -> None:
    """Make the graph of an ``onnx_ir.Model`` refuse calls of sizes that its trace does not hold for.

    Of the inputs that a condition is about, the last carries it: of a part of a file the inputs are in the order in
    which the file makes them, and what makes the last must not wait for it.

    Args:
        signature: how it is called. The graph's inputs still have the names of its entries.
        doubles: whether the runtime computes with them. Where it does not, a condition that needs them is left to the
            caller of the engine, who checks all of them.

    Raises:
        NotSaveableError: nothing in the graph can carry a condition.
    """
    graph, by_name = model.graph, inputs_of(model.graph, signature)
    conditions, name = stated(signature)
    if conditions:
        model.metadata_props[HOLDS] = "; ".join(sentences(signature))
    if KEY in signature:
        ids = by_name[signature[KEY]["inputs"]["input_ids"]["input"]]  # what the graph does not read has their sizes
        ends = {leaf: by_name.get(name(leaf), ids) for condition in conditions for leaf, _ in sizes_in(condition)}
    else:
        ends = {n: by_name[e["name"]] for n, e in enumerate(signature["inputs"]) if e["name"] in by_name}
        conditions += _alike(signature, conditions)
    readers = {id(value): list(value.uses()) for value in by_name.values()}
    now = {id(value): value for value in by_name.values()}
    make = _Maker(ends)
    for condition in [c for c in conditions if doubles or not _inexact(c)]:
        named = [ends[leaf] for leaf in sorted({leaf for leaf, _ in sizes_in(condition)}, reverse=True)]
        held = next((v for v in (*named, *by_name.values()) if readers[id(v)] and len(v.shape or ())), None)
        if held is None:
            raise NotSaveableError(
                f"the engine holds only where {text_of(condition, name)}, and its graph reads no input that could "
                "carry this check: use backend='torch'"
            )
        now[id(held)] = make.refusal(make.boolean(condition), now[id(held)], NAMED + text_of(condition, name))
    if not make.builder.nodes:
        return
    for value in make.builder.initializers:
        graph.register_initializer(value)
    for value in by_name.values():
        if now[id(value)] is not value:
            for node, index in readers[id(value)]:
                node.replace_input_with(index, now[id(value)])
    graph.insert_before(graph[0], make.builder.nodes)


def _alike(signature: Mapping[str, Any], known: Sequence[Any]) -> list[Any]:
    """That sizes of one name are equal, and in their range: ONNX Runtime reads names of sizes as hints."""
    places: dict[str, list[Any]] = {}
    for leaf, entry in enumerate(signature["inputs"]):
        for dim, size in enumerate(entry.get("shape", [])):
            if isinstance(size, str):
                places.setdefault(size, []).append(["size", leaf, dim])
    found: list[Any] = []
    for symbol, (first, *others) in places.items():
        found += [["==", first, o] for o in others if ["==", first, o] not in known and ["==", o, first] not in known]
        low, high = signature["sizes"].get(symbol, [1, None])
        found += [[">=", first, low]] * (low > 1) + [["<=", first, high]] * (high is not None)
    return found


def _inexact(node: FxArg) -> bool:
    """Whether a condition computes with numbers that are not whole."""
    if not isinstance(node, list):
        return isinstance(node, float)
    return node[0] in ("/", "sqrt", "float") or any(_inexact(child) for child in node[1:])


class _Maker:
    """Conditions as nodes. Every value is one number in a tensor of one dimension, int64, double or bool."""

    def __init__(self, ends: Mapping[int, Any]) -> None:
        self.builder, self._ends = Builder("sizes"), ends
        self._made: dict[str, Any] = {}

    def refusal(self, holds: PyObject, value: PyObject, name: str) -> PyObject:
        """``value`` where ``holds``; else a failure at a node of this name."""
        rank = len(value.shape)
        keep, never = self.builder.const([0] * rank, "int64"), self.builder.const([-2] * rank, "int64")
        result = self.builder.op("Reshape", [value, self.builder.op("Where", [holds, keep, never])])
        result.producer().name = name
        result.type, result.shape = value.type, value.shape
        return result

    def boolean(self, node: FxArg) -> PyObject:
        name, *parts = node if isinstance(node, list) else ("", node)
        if name == "not":
            return self.builder.op("Not", [self.boolean(parts[0])])
        if name in ("and", "or"):
            result = self.boolean(parts[0])
            for part in parts[1:]:
                result = self.builder.op(name.capitalize(), [result, self.boolean(part)])
            return result
        if name == "!=":
            return self.builder.op("Not", [self.boolean(["==", *parts])])
        if name not in _COMPARED:
            raise NotSaveableError(f"the condition {text_of(node, str)} on sizes has no form in a graph")
        return self.builder.op(_COMPARED[name], self._same(parts)[0])

    def _number(self, node: FxArg) -> tuple[Any, bool]:
        """Its value, and whether it is a double."""
        if not isinstance(node, list):
            real = isinstance(node, float)
            return self.builder.const([node], "float64" if real else "int64"), real
        if str(node) not in self._made:
            self._made[str(node)] = self._computed(*node)
        found: tuple[Any, bool] = self._made[str(node)]
        return found

    def _computed(self, name: str, *parts: PyObject) -> tuple[Any, bool]:
        op = self.builder.op
        if name == "size":
            leaf, dim = parts
            return op("Shape", [self._ends[leaf]], start=dim, end=dim + 1), False
        if name in _ARITHMETIC:
            values, real = self._same(parts)
            result = values[0]
            for value in values[1:]:
                result = op(_ARITHMETIC[name], [result, value])
            return result, real
        if name in ("//", "%"):
            (a, b), real = self._same(parts)
            if real:
                whole = op("Floor", [op("Div", [a, b])])
                return (whole if name == "//" else op("Sub", [a, op("Mul", [b, whole])])), True
            rest = op("Mod", [a, b])  # of the divisor's sign, as Python's
            return (rest if name == "%" else op("Div", [op("Sub", [a, rest]), b])), False
        if name == "/":
            return op("Div", [self._double(part) for part in parts]), True
        if name in ("sqrt", "float"):
            value = self._double(parts[0])
            return (op("Sqrt", [value]) if name == "sqrt" else value), True
        value, real = self._number(parts[0])
        if name in ("abs", "neg"):
            return op({"abs": "Abs", "neg": "Neg"}[name], [value]), real
        if name == "trunc" or (name in _WHOLE and len(parts) == 1):
            if real and name != "trunc":
                value = op(_WHOLE[name], [value])
            return (op("Cast", [value], to=_INT) if real else value), False
        raise NotSaveableError(f"the condition {text_of([name, *parts], str)} on sizes has no form in a graph")

    def _double(self, node: FxArg) -> PyObject:
        value, real = self._number(node)
        return value if real else self.builder.op("Cast", [value], to=_FLOAT)

    def _same(self, parts: Sequence[Any]) -> tuple[list[Any], bool]:
        """Numbers of one dtype, and whether that is double."""
        values = [self._number(part) for part in parts]
        real = any(is_real for _, is_real in values)
        cast = [v if is_real or not real else self.builder.op("Cast", [v], to=_FLOAT) for v, is_real in values]
        return cast, real
