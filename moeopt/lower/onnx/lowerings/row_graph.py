"""The graph of a row function as ONNX nodes: converted once, then written for each expert with its own weights.

The conversion is that of the whole model's graph (the exporter's, with this package's own rules and accurate forms),
so an op means the same inside an expert as around it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.errors import Declined, NotSaveableError
from moeopt.ir.row_function import RowFunction
from moeopt.lower.onnx.accurate import accurate_graph
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.gemm_bias import join_biases
from moeopt.ops.row_function import SlotBank, function_of
from moeopt.value_types import OnnxValue, PyObject

ROWS = 7
"""Rows of the call that is traced; their number is free."""


class RowGraph:
    """The function of ``site``, ready to be written into ``graph`` for any of its experts.

    Raises:
        Declined: the function has no ONNX form; the text names the op.
    """

    def __init__(self, graph: Builder, site: ExpertsNode) -> None:
        self.graph, self.site = graph, site
        self._model = _converted(site.spec)
        self._constants: dict[int, Any] = {}
        for value in self._model.graph.initializers.values():
            self._constants[id(value)] = graph.initializer(f"function/{value.name}", value.const_value)

    def expert(self, e: int, rows: OnnxValue) -> OnnxValue:
        """The value (M, D) of expert ``e`` on ``rows`` (M, H), which have the function's own dtype."""
        slots = list(self.site.bank.slots(e))
        named = [
            self.graph.weight(
                f"expert.{e}/slot.{p}", functools.partial(_slot, self.site.bank, e, p), t.dtype, tuple(t.shape)
            )
            for p, t in enumerate(slots)
        ]
        return self.on(f"expert.{e}", rows, named)

    def on(self, name: str, rows: OnnxValue, slots: Sequence[OnnxValue]) -> OnnxValue:
        """The value (M, D) of the function on ``rows`` (M, H) and the tensors in its slots; ``name`` begins its
        nodes' names and is used once."""
        import onnx_ir as ir

        inside = dict(self._constants)
        for value, given in zip(self._model.graph.inputs, [rows, *slots], strict=True):
            inside[id(value)] = given
        for number, node in enumerate(self._model.graph):
            again = ir.Node(
                node.domain,
                node.op_type,
                [None if v is None else inside[id(v)] for v in node.inputs],
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
                name=f"{self.graph.prefix}/{name}/{node.op_type}.{number}",
            )
            for new, old in zip(again.outputs, node.outputs, strict=True):
                new.name, new.type, new.shape = f"{again.name}/{old.name}", old.type, _unnamed(old.shape)
                inside[id(old)] = new
            self.graph.nodes.append(again)
        return inside[id(self._model.graph.outputs[0])]


def _slot(bank: SlotBank, e: int, p: int) -> Tensor:
    return bank.slots(e)[p]


def _unnamed(shape: OnnxValue) -> OnnxValue:
    """``shape`` with no name for the number of rows: each expert has its own, and one name would promise the same."""
    import onnx_ir as ir

    return None if shape is None else ir.Shape([d if isinstance(d, int) else None for d in shape])


class WideSlots:
    """A bank whose 16-bit tensors are handed out in float32, each converted when it is read."""

    def __init__(self, bank: SlotBank) -> None:
        self._bank, self.num_experts = bank, bank.num_experts

    def slots(self, e: int) -> list[Tensor]:
        """What expert ``e`` has in the slots, widened."""
        return [t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in self._bank.slots(e)]


def widened(site: ExpertsNode) -> ExpertsNode:
    """``site`` with every 16-bit dtype as float32; itself when it has none."""
    text = re.sub(r'"(bfloat16|float16)"', '"float32"', site.spec.encode().replace('\\"', '"'))
    if text == site.spec.encode().replace('\\"', '"') and site.weights_dtype.itemsize > 2 and site.dtype.itemsize > 2:
        return site
    narrow = ("bfloat16", "float16")
    fields = ("compute_dtype", "accum_dtype", "out_dtype")
    spec = dataclasses.replace(
        site.spec,
        graph=re.sub(r'"(bfloat16|float16)"', '"float32"', site.spec.graph),
        **{f: "float32" for f in fields if getattr(site.spec, f) in narrow},
    )
    wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
    return dataclasses.replace(
        site,
        bank=WideSlots(site.bank),
        spec=spec,
        dtype=wide.get(site.dtype, site.dtype),
        weights_dtype=wide.get(site.weights_dtype, site.weights_dtype),
    )


def refuses(site: ExpertsNode) -> str:
    """Why the function of ``site`` has no ONNX form; "" where it has one."""
    if not isinstance(site.spec, RowFunction):
        return "experts of two matmuls have forms of their own"
    try:
        _converted(site.spec)
    except Declined as err:
        return err.reason
    return ""


_KNOWN: dict[str, Any] = {}


def _converted(spec: RowFunction) -> OnnxValue:
    """An ``onnx_ir.Model`` with the inputs rows, slot 0, slot 1, ... and one output; converted once."""
    from torch.fx.experimental.symbolic_shapes import free_symbols

    from moeopt.lower.onnx.export import to_onnx
    from moeopt.lower.onnx.no_rows import around_no_rows

    if spec.graph in _KNOWN:
        return _KNOWN[spec.graph]
    body = spec.body
    rows = torch.zeros(ROWS, body.features, dtype=body.dtype)
    slots = [torch.zeros(shape, dtype=dtype) for dtype, shape in body.slots]
    shapes: PyObject = [{0: torch.export.Dim("rows", min=0)}, *[None for _ in slots]]
    try:
        with torch.no_grad():
            program = torch.export.export(_Function(spec.graph), (rows, *slots), dynamic_shapes=(tuple(shapes),))
        around_no_rows(program.graph, free_symbols)
        model = to_onnx(program)
    except (NotSaveableError, RuntimeError, ValueError) as err:
        raise Declined(f"its experts are a function of a row with no ONNX form: {str(err).splitlines()[0]}") from err
    accurate_graph(model)
    join_biases(model)
    if any(node.graph is not model.graph for node in model.graph.all_nodes()):
        raise Declined("its experts are a function of a row whose ONNX form has branches or loops of its own")
    if len(_KNOWN) >= 64:
        _KNOWN.clear()
    _KNOWN[spec.graph] = model
    return model


class _Function(nn.Module):
    def __init__(self, graph: str) -> None:
        super().__init__()
        self._function = function_of(graph)

    def forward(self, *values: Tensor) -> Tensor:
        return self._function(*values)
