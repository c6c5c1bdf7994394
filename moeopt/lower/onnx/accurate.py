"""Operators whose kernels lose the digits of small results, in an exported graph, replaced by forms that keep them.

    Sigmoid, Elu, Selu, Celu, Mish, HardSigmoid, HardSwish     forms of :mod:`moeopt.ir.stable_nodes`
    a * Sigmoid(a), a * Sigmoid(c a)                           a / (1 + exp(-c a)): silu as PyTorch computes it
    Clip with one bound                                        Max or Min: Clip takes infinity for the largest number
    Sign                                                       0 for NaN, as in PyTorch
    MaxPool                                                    NaN where its window holds one; the kernel passes over it
    c + Tanh, Gelu with approximate="tanh"                     digits are lost where the sum is near 0, unless it goes
                                                               into products of matrices, whose sums lose as many

The exporter writes these for a dozen ATen ops (silu, glu, swish, gates), so they are replaced where they stand and not
where they come from. :mod:`moeopt.backends.onnxrt.accuracy` measures which operators need it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moeopt.ir import stable_nodes as stable
from moeopt.value_types import OnnxAttribute, OnnxGraph, OnnxModel, OnnxNode, OnnxValue, PyObject

_HALVES = ("FLOAT16", "BFLOAT16")
_FLOATS = ("FLOAT", "DOUBLE", *_HALVES)
AccurateForm = tuple[Sequence[Any], Callable[..., Any]]
"""Values that a form reads, and what writes it: called with ``op``, ``const`` and those values."""


def accurate_graph(model: OnnxModel) -> int:
    """Replace such operators in an ``onnx_ir.Model`` in place, subgraphs included; returns how many were."""
    write, count = _Writer(model.graph), 0
    for node in list(model.graph.all_nodes()):
        if node.domain or node.op_type not in FORMS or _dtype(node.inputs[0]) not in _FLOATS:
            continue
        if node.op_type == "Sigmoid":
            for product, form in _products(node):
                write.instead_of(product, *form)
            if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
                node.graph.remove(node, safe=True)
                count += 1
                continue
        if (found := FORMS[node.op_type](node)) is not None:
            write.instead_of(node, *found)
            count += 1
    return count


class _Writer:
    """Writes forms into ``graph``; equal constants are one initializer."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self._constants: dict[tuple[float, Any], Any] = {}

    def instead_of(self, node: OnnxNode, inputs: Sequence[Any], form: Callable[..., Any]) -> None:
        """``form`` of ``inputs`` in the place of ``node``; 16-bit values are float32 inside."""
        import onnx_ir as ir

        old = node.outputs[0]
        nodes: list[Any] = []
        half = _dtype(inputs[0]) in _HALVES
        dtype = ir.DataType.FLOAT if half else inputs[0].dtype

        def op(op_type: str, *values: OnnxValue, **attributes: OnnxAttribute) -> OnnxValue:
            made = ir.node(op_type, values, attributes, name=f"{node.name or old.name}/{op_type}.{len(nodes)}")
            made.outputs[0].name = made.name
            made.metadata_props.update(node.metadata_props)
            nodes.append(made)
            return made.outputs[0]

        values = [op("Cast", value, to=int(dtype)) for value in inputs] if half else inputs
        new = form(op, lambda number: self._constant(number, dtype), *values)
        new = op("Cast", new, to=int(old.dtype or inputs[0].dtype)) if half else new
        new.type, new.shape = old.type, old.shape
        node.graph.insert_before(node, nodes)
        if old.is_graph_output():
            old.name, new.name = f"{old.name}.before", old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        node.graph.remove(node, safe=True)

    def _constant(self, number: float, dtype: PyObject) -> OnnxValue:
        import onnx_ir as ir

        key = (number, dtype)
        if key not in self._constants:
            name = f"accurate.{dtype.name}.{number}"
            tensor = ir.tensor(number, dtype=dtype, name=name)
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]


def _products(node: OnnxNode) -> list[tuple[Any, AccurateForm]]:
    """Each product of an activation with ``node``, its sigmoid, and the quotient that it is."""
    t = node.inputs[0]
    found: list[tuple[Any, AccurateForm]] = []
    scaled = t.producer()
    bases = [t]
    if scaled is not None and scaled.op_type == "Mul" and any(v.const_value is not None for v in scaled.inputs):
        bases += [v for v in scaled.inputs if v.const_value is None]
    for user, at in list(node.outputs[0].uses()):
        if user.op_type == "Mul" and not user.domain and any(user.inputs[1 - at] is base for base in bases):
            found.append((user, ([t, user.inputs[1 - at]], _quotient)))
    return found


def _quotient(op: stable.Op, const: stable.Const, t: OnnxValue, a: OnnxValue) -> OnnxValue:
    return op("Div", a, stable.one_plus_exp_of_minus(op, const, t))


def _float(node: OnnxNode, name: str, default: float) -> float:
    return float(node.attributes[name].value) if name in node.attributes else default


def _of_x(form: Callable[..., Any], **numbers: float) -> Callable[[Any], AccurateForm]:
    return lambda node: (node.inputs[:1], lambda op, const, x: form(op, const, x, **numbers))


def _elu(node: OnnxNode) -> AccurateForm:
    return _of_x(stable.elu, alpha=_float(node, "alpha", 1.0))(node)


def _celu(node: OnnxNode) -> AccurateForm:
    alpha = _float(node, "alpha", 1.0)
    return _of_x(stable.elu, alpha=alpha, per=alpha)(node)


def _selu(node: OnnxNode) -> AccurateForm:
    alpha, gamma = _float(node, "alpha", stable.SELU_ALPHA), _float(node, "gamma", stable.SELU_SCALE)
    return _of_x(stable.elu, alpha=alpha, scale=gamma)(node)


def _hardsigmoid(node: OnnxNode) -> AccurateForm | None:
    pytorchs = abs(_float(node, "alpha", 0.2) - 1 / 6) < 1e-7 and _float(node, "beta", 0.5) == 0.5
    return _of_x(stable.hardsigmoid)(node) if pytorchs else None


def _clip(node: OnnxNode) -> AccurateForm | None:
    x, low, high = [*node.inputs, None, None][:3]
    if (low is None) == (high is None):
        return None
    name, bound = ("Max", low) if high is None else ("Min", high)
    return [x, bound], lambda op, const, x, bound: op(name, x, bound)


def _tanh(node: OnnxNode) -> AccurateForm | None:
    return _of_x(stable.tanh)(node) if any(_cancels(user) for user, _ in node.outputs[0].uses()) else None


def _cancels(user: OnnxValue, depth: int = 3) -> bool:
    """Whether ``user`` or what only scales its result adds a constant, and the sum's small values matter."""
    constant = any(v is not None and v.const_value is not None for v in user.inputs)
    if user.op_type in ("Add", "Sub") and constant:
        return not _into_products(user.outputs[0])
    scales = user.op_type == "Neg" or (user.op_type in ("Mul", "Div", "Cast") and (constant or len(user.inputs) == 1))
    return scales and depth > 0 and any(_cancels(next_, depth - 1) for next_, _ in user.outputs[0].uses())


def _gelu(node: OnnxNode) -> AccurateForm | None:
    approximate = node.attributes.get_string("approximate", "none")
    if approximate != "tanh" or _into_products(node.outputs[0]):
        return None
    return _of_x(stable.gelu_tanh)(node)


def _max_pool(node: OnnxNode) -> AccurateForm | None:
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return None  # which place won is asked: the engine's notes say what becomes of a NaN
    attributes = {name: attribute.value for name, attribute in node.attributes.items() if name != "storage_order"}
    return _of_x(lambda op, const, x: stable.max_pool(op, const, x, attributes))(node)


def _into_products(value: OnnxValue, depth: int = 6) -> bool:
    """Whether ``value``, perhaps multiplied and moved about, is only ever summed in products of matrices."""
    users = [user for user, _ in value.uses()]
    if value.is_graph_output() or not users or depth == 0:
        return False
    return all(
        user.op_type in ("MatMul", "Gemm") or (user.op_type in _KEEPING and _into_products(user.outputs[0], depth - 1))
        for user in users
    )


_KEEPING = ("Mul", "Cast", "Reshape", "Transpose", "Identity", "Unsqueeze", "Squeeze", "Gather")

FORMS: dict[str, Callable[[Any], AccurateForm | None]] = {
    "Sigmoid": _of_x(stable.sigmoid),
    "Elu": _elu,
    "Selu": _selu,
    "Celu": _celu,
    "Mish": _of_x(stable.mish),
    "HardSigmoid": _hardsigmoid,
    "HardSwish": _of_x(stable.hardswish),
    "Clip": _clip,
    "Sign": _of_x(stable.sign),
    "Tanh": _tanh,
    "Gelu": _gelu,
    "MaxPool": _max_pool,
}
"""The form of a node of each operator; None where the node is right as it stands."""


def _dtype(value: OnnxValue) -> str:
    return "" if value is None or value.dtype is None else str(value.dtype.name)
