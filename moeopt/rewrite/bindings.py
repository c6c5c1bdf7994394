"""A graph with PyTorch's own Python functions in the place of the overloads that they call: the same kernels, sooner.

    torch.ops.aten.reshape.default(x, [-1, 64])   ->   torch.reshape(x, [-1, 64])
    torch.ops.aten.sym_size.int(x, 0)             ->   x.size(0)

An overload is called through a general path that boxes its arguments, which costs two to four microseconds; the
function that PyTorch generates for it takes half of that or less. A block of twenty small calls on one token is made of
that time.
Only overloads that the function is known to call for such arguments are replaced; the others stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import _get_qualified_name

from moeopt.value_types import PyObject

_FUNCTIONS = """
    _softmax.default _log_softmax.default topk.default argmax.default argmin.default sort.default cumsum.default
    sum.default sum.dim_IntList mean.default mean.dim max.dim amax.default logsumexp.default
    add.Tensor sub.Tensor mul.Tensor div.Tensor ge.Scalar ge.Tensor gt.Scalar gt.Tensor le.Scalar le.Tensor lt.Scalar
    lt.Tensor eq.Scalar eq.Tensor ne.Scalar ne.Tensor where.self clamp.default clamp_min.default reciprocal.default
    sigmoid.default exp.default log.default tanh.default relu.default neg.default rsqrt.default bitwise_not.default
    logical_not.default masked_fill.Scalar scatter.src scatter.value gather.default index_select.default
    zeros_like.default ones_like.default full_like.default clone.default detach.default mm.default bmm.default
    addmm.default cat.default stack.default reshape.default unsqueeze.default squeeze.dim permute.default transpose.int
    movedim.int t.default select.int unbind.int nonzero.default index_add.default
"""
_FACTORIES = ("zeros.default", "ones.default", "full.default")
"""Functions for which a default device counts, which an overload does not know: only where a device is given."""
_METHODS = {"sym_size.int": "size", "expand.default": "expand", "view.default": "view"}


def _overload(name: str) -> PyObject:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def _functions(names: list[str] | tuple[str, ...]) -> dict[PyObject, Callable[..., PyObject]]:
    return {_overload(name): getattr(torch, name.partition(".")[0]) for name in names}


FUNCTIONS = _functions(_FUNCTIONS.split())
"""By overload, the function that calls it."""
FUNCTIONS |= {_overload("silu.default"): torch._C._nn.silu, _overload("gelu.default"): torch._C._nn.gelu}
FACTORIES = _functions(_FACTORIES)
"""The same of those that make a tensor."""
METHODS = {_overload(name): method for name, method in _METHODS.items()}
"""By overload, the method of its first argument that calls it."""


def bound(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` that calls functions and methods where those are known; it computes the same bits."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in copy.nodes:
        if node.op != "call_function" or not node.args:
            continue
        if node.target in FUNCTIONS:
            node.target = FUNCTIONS[node.target]
        elif node.target in FACTORIES and node.kwargs.get("device") is not None:
            node.target = FACTORIES[node.target]
        elif node.target in METHODS and isinstance(node.args[0], fx.Node) and not node.kwargs:
            node.op, node.target = "call_method", METHODS[node.target]
    return copy


def code_of(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    """The source of :func:`bound` ``graph`` as a function ``forward`` of (self, *placeholders), and its globals.

    The functions are globals of their own and not looked up in ``torch``: who replaces one there changes no block.
    """
    made = bound(graph).python_code("self")
    scope = dict(made.globals)

    def own(call: re.Match[str]) -> str:
        name = call[1].replace(".", "_")
        scope[name] = _BY_NAME[call[1]]
        return f" = {name}("

    return re.sub(rf" = ({'|'.join(map(re.escape, _BY_NAME))})\(", own, made.src), scope


_BY_NAME = {_get_qualified_name(f): f for f in (*FUNCTIONS.values(), *FACTORIES.values())}
"""By the name that fx writes, each function as it was when moeopt was imported."""
