"""A traced model as an ONNX graph in which each grouped-expert op is still one ``moeopt::Experts`` node.

The experts' weights never enter the trace: the node names its :class:`~.experts_node.ExpertsNode`, which reads them
from the model when a lowering is written. So exporting costs no copy of them, and no node per expert.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from moeopt.errors import NotSaveableError
from moeopt.lower.functional import export_functional
from moeopt.lower.onnx.complex import through_real_views
from moeopt.lower.onnx.composites import composites_written_out
from moeopt.lower.onnx.exact import exact_rules
from moeopt.lower.onnx.exporter_gaps import around_gaps
from moeopt.lower.onnx.float64 import attributes_written_out
from moeopt.lower.onnx.kept_free import kept_free
from moeopt.lower.onnx.means_of_nothing import means_of_nothing
from moeopt.lower.onnx.negative_indices import refuse_negative_indices
from moeopt.lower.onnx.no_such_op import without_form
from moeopt.lower.onnx.placed_values import write_at_places
from moeopt.lower.onnx.scalars import numbers_as_read
from moeopt.lower.onnx.sites import Sites
from moeopt.lower.onnx.top_of_sort import choose_the_top
from moeopt.lower.signature import functional
from moeopt.ops.override import override_experts_impl
from moeopt.patches import one_trace, quicker_export, quiet
from moeopt.rewrite.whole_model import exported
from moeopt.value_types import OnnxGraph, OnnxValue

OPSET = 20


@contextlib.contextmanager
def emitting(model: nn.Module) -> Iterator[Sites]:
    """While open, ``experts`` calls of ``model``'s rewritten blocks trace as nodes; the list collects their sites."""
    sites = Sites(model)
    with exported(model), override_experts_impl(sites.emit):
        yield sites


def export_with_sites(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], sites: Sites
) -> torch.export.ExportedProgram:
    """A model that is :func:`emitting` as a functional program, its ``sites`` in the order of their nodes.

    Raises:
        NotSaveableError: torch.export cannot hold the model, or it draws random numbers.
    """
    program = export_functional(
        model, args, kwargs, functional=functional, on_copy=sites.copied, fresh=sites.start, runs=False
    )
    sites.in_order(program.graph)
    return program


def to_onnx(program: torch.export.ExportedProgram) -> OnnxValue:
    """The graph of an exported program as an ``onnx_ir.Model``, with ``input_0...`` and ``output_0...`` at its ends.

    Raises:
        NotSaveableError: an op that ONNX has no form for; the message names it.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from moeopt.lower.onnx.translate import table

    program = attributes_written_out(numbers_as_read(through_real_views(_tensors_only(program))))
    around_gaps(program.graph)
    choose_the_top(program.graph)
    write_at_places(program.graph)
    refuse_negative_indices(program.graph)
    program = composites_written_out(program)
    with one_trace, quiet(), quicker_export(), exact_rules() as exact:
        try:
            with kept_free():
                exported = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=OPSET,
                    optimize=False,
                    verbose=False,
                    custom_translation_table=table(),
                )
            assert exported is not None  # torch gives None only where it wrote a file itself
            _own_names(exported.model.graph)
            means_of_nothing(exported.model.graph)
            if exact:
                exported.optimize()
        except NotSaveableError:
            raise
        except Exception as err:
            raise NotSaveableError(f"the graph has no ONNX form: {_why(program, err)}") from err
    RemoveUnusedNodesPass()(exported.model)
    _cast_before_transpose(exported.model.graph)
    _own_dtypes(exported.model.graph, program)
    return exported.model


def _own_names(graph: OnnxGraph) -> None:
    """Results under other names than Parameters: ``self.t`` beside ``x.t()``, where that is folded into a constant."""
    for node in graph:
        for value in node.outputs:
            if value.name in graph.initializers:
                value.name = f"{value.name}/result"


def _own_dtypes(graph: OnnxGraph, program: torch.export.ExportedProgram) -> None:
    """Results of the dtype that the model gives them, where a translation says another: ``any`` of uint8 is uint8."""
    import onnx_ir as ir

    (node,) = (n for n in program.graph.nodes if n.op == "output")
    for number, (value, source) in enumerate(zip(list(graph.outputs), node.args[0], strict=True)):
        wanted = _ONNX.get(source.meta["val"].dtype)
        if wanted is None or value.dtype is None or value.dtype.name == wanted:
            continue
        cast = ir.node("Cast", [value], {"to": ir.DataType[wanted]})
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType[wanted]), value.shape
        cast.outputs[0].name, value.name = value.name, f"{value.name}/translated"
        graph.append(cast)
        graph.outputs[number] = cast.outputs[0]


_ONNX = {
    torch.bool: "BOOL", torch.uint8: "UINT8", torch.int8: "INT8", torch.int16: "INT16", torch.int32: "INT32",
    torch.int64: "INT64", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
}  # fmt: skip


def _tensors_only(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without results that are plain values, and without writes to buffers: neither is ONNX."""
    (node,) = (n for n in program.graph.nodes if n.op == "output")
    specs = program.graph_signature.output_specs
    kept = [
        (value, spec)
        for value, spec in zip(node.args[0], specs, strict=True)
        if isinstance(value, torch.fx.Node) and spec.kind == OutputKind.USER_OUTPUT
    ]
    if len(kept) == len(specs):
        return program
    program = copy.copy(program)
    module = torch.fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
    by_name = {n.name: n for n in module.graph.nodes}
    (end,) = (n for n in module.graph.nodes if n.op == "output")
    end.args = (tuple(by_name[value.name] for value, _ in kept),)
    entry = program.module_call_graph[0]
    assert entry.signature is not None
    flat = pytree.tree_structure(tuple(range(len(kept))))
    signature = dataclasses.replace(entry.signature, outputs=[spec.arg for _, spec in kept], out_spec=flat)
    program._module_call_graph = [dataclasses.replace(entry, signature=signature), *program.module_call_graph[1:]]
    program._graph_module = module
    program._graph_signature = dataclasses.replace(program.graph_signature, output_specs=[spec for _, spec in kept])
    return program


def _cast_before_transpose(graph: OnnxGraph) -> None:
    """MatMul(Cast(Transpose(x))) becomes MatMul(Transpose(Cast(x))).

    ONNX Runtime 1.31 fuses the first form (MatmulTransposeFusion) and reads a null pointer where x is boolean.
    """
    import onnx_ir as ir

    for node in list(graph):
        turn = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs[0] is not None else None
        if turn is None or turn.op_type != "Transpose" or node.domain or node.outputs[0].is_graph_output():
            continue
        if not any(user.op_type == "MatMul" for user, _ in node.outputs[0].uses()):
            continue
        old, source = node.outputs[0], turn.inputs[0]
        cast = ir.node("Cast", [source], {"to": node.attributes["to"].as_int()})
        turned = ir.node("Transpose", [cast.outputs[0]], {"perm": list(turn.attributes["perm"].as_ints())})
        cast.outputs[0].type, cast.outputs[0].shape = old.type, source.shape
        turned.outputs[0].type, turned.outputs[0].shape, name = old.type, old.shape, old.name
        graph.insert_before(node, [cast, turned])
        ir.convenience.replace_all_uses_with(old, turned.outputs[0])
        graph.remove(node, safe=True)
        turned.outputs[0].name = name


def _why(program: torch.export.ExportedProgram, err: BaseException) -> str:
    """The call that an exporter's error speaks of, the model's line, and the way out."""
    named = re.findall(r"translating node %(\w+)|%(\w+) :", "\n".join(str(e) for e in _chain(err)))
    names = {part for match in named for part in match if part}
    node = next((n for n in program.graph.nodes if n.name in names and n.op == "call_function"), None)
    where = ""
    if node is not None:
        lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
        if why := without_form(node, lines[-1] if lines else "its code"):
            return why
        where = f" ({node.target}{', ' + lines[-1] if lines else ''})"
    return f"{_first_line(err)}{where}; use backend='torch', or write that line with other ops"


def _chain(err: BaseException | None) -> Iterator[BaseException]:
    while err is not None:
        yield err
        err = err.__cause__


def own_outputs(graph: OnnxGraph) -> None:
    """Give each output a value of its own: one that is an input, a weight or another output goes through Identity."""
    import onnx_ir as ir

    seen: set[int] = set()
    for number, value in enumerate(graph.outputs):
        if value.is_graph_input() or value.is_initializer() or id(value) in seen:
            node = ir.node("Identity", [value])
            copy = node.outputs[0]
            copy.type, copy.shape = value.type, value.shape
            graph.append(node)
            graph.outputs[number] = copy
        seen.add(id(graph.outputs[number]))


def _first_line(err: BaseException) -> str:
    *_, root = _chain(err)
    lines = [line for line in str(root).splitlines() if line.strip()]
    return f"{type(root).__name__}: {lines[0].strip()}" if lines else type(root).__name__
