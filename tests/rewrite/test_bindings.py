"""Each function calls the overload that it stands for: the same kernels, whatever its arguments look like."""

import pytest
import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.rewrite.bindings import FACTORIES, FUNCTIONS, METHODS, bound, code_of

aten = torch.ops.aten
x, y = torch.randn(3, 4), torch.randn(3, 4)
ids = torch.tensor([[0, 1], [2, 3], [1, 0]])
ARGUMENTS = {
    "_softmax.default": [(x, -1, False)], "_log_softmax.default": [(x, -1, False)],
    "topk.default": [(x, 2), (x, 2, 1), (x, 2, -1, True, False)], "argmax.default": [(x, 1), (x, -1, True)],
    "argmin.default": [(x, 1)], "sort.default": [(x, -1, True), (x,)], "cumsum.default": [(x, 0)],
    "sum.default": [(x,)], "sum.dim_IntList": [(x, [1], True), (x, [0, 1])], "mean.default": [(x,)],
    "mean.dim": [(x, [0]), (x, [1], True)], "max.dim": [(x, 1, True), (x, -1)], "amax.default": [(x, [1], True)],
    "logsumexp.default": [(x, [-1])], "clamp.default": [(x, 0.1), (x, None, 0.2), (x, -1.0, 1.0)],
    "clamp_min.default": [(x, 0.5)], "where.self": [(x > 0, x, y)], "masked_fill.Scalar": [(x, x > 0, -1.0)],
    "scatter.src": [(x, 1, ids, y)], "scatter.value": [(x, 1, ids, 1)], "gather.default": [(x, 1, ids)],
    "index_select.default": [(x, 0, torch.tensor([2, 0]))], "zeros_like.default": [(x,)], "ones_like.default": [(x,)],
    "full_like.default": [(x, float("-inf"))], "clone.default": [(x.t(),)], "mm.default": [(x, y.t())],
    "bmm.default": [(x[None], y.t()[None])], "addmm.default": [(x[:, :3], x, y.t())], "cat.default": [([x, y], 1)],
    "stack.default": [([x, y], -1)], "reshape.default": [(x, [-1, 2]), (x.t(), [12])], "unsqueeze.default": [(x, 1)],
    "squeeze.dim": [(x[None], 0)], "permute.default": [(x, [1, 0])], "transpose.int": [(x, 0, 1)],
    "movedim.int": [(x, 0, -1)], "select.int": [(x, 0, 1)], "unbind.int": [(x, 1)],
    "index_add.default": [(x, 0, torch.tensor([2, 0, 1]), y)], "expand.default": [(x[:, None], [3, 5, 4])],
    "view.default": [(x, [4, 3])], "sym_size.int": [(x, 1), (x, -1)], "bitwise_not.default": [(ids,), (x > 0,)],
    "zeros.default": [([2, 3],)], "ones.default": [([2],)], "full.default": [([2, 3], 1.5)],
}  # fmt: skip
_PAIRS = ("add", "sub", "mul", "div", "ge", "gt", "le", "lt", "eq", "ne")
_NUMBERS = {"add", "sub", "mul", "div"}


def arguments(overload):
    """Argument lists of every kind that a recorded call of ``overload`` has."""
    name = overload.name().removeprefix("aten::")
    name = name if "." in name else f"{name}.default"
    kind, _, which = name.partition(".")
    if kind in _PAIRS:
        number = [(x, 2), (x, 0.5), (ids, 3)]
        tensors = [(x, y), (x, y[0]), (x, torch.tensor(2.0)), *(number if kind in _NUMBERS else [])]
        return tensors if which == "Tensor" else number
    return ARGUMENTS.get(name, [(x.abs(),)])


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def told(call, args, how):
    with Recorded() as recorded:
        result = call(*args, **how)
    return result, recorded.calls


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    return a == b if not isinstance(a, (tuple, list)) else all(map(same, a, b))


@pytest.mark.parametrize("overload", [*FUNCTIONS, *FACTORIES, *METHODS], ids=lambda o: o.name())
def test_a_function_calls_its_overload(overload):
    how = {"device": "cpu"} if overload in FACTORIES else {}
    for args in arguments(overload):
        graph = fx.Graph()
        first = [graph.placeholder("first")] if isinstance(args[0], torch.Tensor) else []
        rest = args[1:] if first else args
        graph.output(graph.call_function(overload, (*first, *rest), how))
        made = bound(graph)
        node = next(n for n in made.nodes if n.op in ("call_function", "call_method"))
        assert node.target is not overload
        function = getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target
        (want, wanted), (got, calls) = told(overload, args, how), told(function, args, how)
        assert same(want, got)
        assert calls == wanted, f"{overload}{args}"


def test_what_has_no_function_of_that_meaning_stays():
    graph = fx.Graph()
    first = graph.placeholder("first")
    free = graph.call_function(aten.zeros.default, ([2],))  # an overload knows no default device
    kept = graph.call_function(aten.slice.Tensor, (first, 0, 1, 2))
    graph.output((free, kept))
    assert [n.target for n in bound(graph).nodes if n.op == "call_function"] == [free.target, kept.target]
    assert [n.target for n in graph.nodes][1] is aten.zeros.default


def test_who_replaces_a_function_of_torch_changes_no_block(monkeypatch):
    graph = fx.Graph()
    first = graph.placeholder("first")
    graph.output(
        (graph.call_function(aten.sigmoid.default, (first,)), graph.call_function(aten.silu.default, (first,)))
    )
    source, scope = code_of(graph)
    exec(source, scope)
    monkeypatch.setattr(torch, "sigmoid", torch.tanh)
    got = scope["forward"](None, x)
    assert torch.equal(got[0], x.sigmoid()) and torch.equal(got[1], torch.nn.functional.silu(x))
    assert "torch_sigmoid(first)" in source and "torch.sigmoid" not in source
