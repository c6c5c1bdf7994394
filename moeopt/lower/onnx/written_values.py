"""Ops that write to a value of their own, as ops that give a new one: no trace is needed to see that they may be.

    y = topk(x)[0]              y = topk(x)[0]
    y.div_(y.sum(-1))     ->    z = y.div(y.sum(-1))
    ... y ...                   ... z ...                  whoever read y after the write

The value has to be the result of an op that gives memory of its own, of which nobody holds a view, and the op has to be
one of those below: its result has then the shape and dtype of what it wrote to. (Routers that renormalise the weights
of the chosen experts in place, or mark the chosen groups in a tensor of zeros.)
"""

from __future__ import annotations

import copy
import operator

import torch
from torch import Tensor, fx

from moeopt.value_types import PyObject

aten = torch.ops.aten
_NEW = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.scatter_.value: aten.scatter.value,
    aten.scatter_.src: aten.scatter.src,
}
_SHARING = {"_unsafe_view", "unsafe_split", "unsafe_split_with_sizes", "lift"}
"""Ops that may give the memory of their argument, or parts of it, though their schemas do not say so."""


def writes_as_results(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with no op that writes; itself where it has none, or one that may write to what others hold."""
    writes = [n for n in program.graph.nodes if _writes(n)]
    if not writes or not all(n.target in _NEW for n in writes):
        return program
    graph = copy.deepcopy(program.graph)
    for node, own in zip(program.graph.nodes, graph.nodes, strict=True):
        own.name = node.name  # the signature knows inputs and outputs by name, "input" among them
    place = {node: number for number, node in enumerate(graph.nodes)}
    for node in [n for n in graph.nodes if _writes(n)]:
        written = node.args[0]
        if not (isinstance(written, fx.Node) and _is_own(written) and _keeps_its_form(node, written)):
            return program
        node.target = _NEW[node.target]
        for user in [u for u in written.users if place[u] > place[node]]:
            user.replace_input_with(written, node)
    program = copy.copy(program)
    program._graph_module = fx.GraphModule(program.graph_module, graph)
    return program


def _writes(node: PyObject) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_own(value: PyObject) -> bool:
    """Whether no other value can be the memory of this one: neither what it was made of, nor what is made of it."""
    made_by = value
    if value.target is operator.getitem:
        made_by, number = value.args
        if any(user is not value and user.args[1:] == (number,) for user in made_by.users):
            return False
    return _gives_memory(made_by.target) and all(
        user.target in _NEW and user.args[0] is value or _gives_memory(user.target) for user in value.users
    )


def _gives_memory(op: PyObject) -> bool:
    """Whether an op's results are never its arguments; a composite op's may be, whatever its schema says."""
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten" or op._schema.is_mutable:
        return False
    if op.overloadpacket.__name__ in _SHARING:
        return False
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    said = [*op._schema.arguments, *op._schema.returns]
    return not op.has_kernel_for_dispatch_key(composite) and all(one.alias_info is None for one in said)


def _keeps_its_form(node: PyObject, written: PyObject) -> bool:
    """Whether the op that gives a new value gives one of the old one's dtype: it would be cast as it is written."""
    dtype = written.meta["val"].dtype
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args[1:]]
    floats = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return dtype.is_floating_point and all(v.dtype == dtype for v in floats)
