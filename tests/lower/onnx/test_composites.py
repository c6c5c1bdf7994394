"""Composite ops, and writes to a value of one's own, come out as a trace of torch.onnx would give them, without it."""

import functools
import operator

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

from moeopt.lower.onnx.composites import composites_written_out
from moeopt.lower.onnx.written_values import writes_as_results
from moeopt.patches import no_idle_decomposition
from tests.helpers import counted_decompositions

aten = torch.ops.aten


class Written(nn.Module):
    """A program as a function; weights are none."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def program(function, *args):
    free = tuple({d: torch.export.Dim.AUTO for d in range(a.dim())} for a in args)
    return torch.export.export(Written(function).eval(), args, dynamic_shapes=(free,), strict=False)


def targets(program):
    return [n.target for n in program.graph.nodes if n.op == "call_function"]


def ops(program):
    """But for copies of what nobody writes to, which are nothing in ONNX."""
    asserted, copies = aten._assert_tensor_metadata.default, (aten.clone.default, aten._to_copy.default)
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and n.target is not asserted]
    return [n.target for n in nodes if n.target not in copies or n.meta["val"].dtype != n.args[0].meta["val"].dtype]


@pytest.fixture
def traced(monkeypatch):
    """How often a program was traced once more."""
    return counted_decompositions(monkeypatch)


@functools.cache
def registry():
    return ONNXRegistry.from_torchlib(opset_version=20)


def decomposed(program):
    return _fx_passes.decompose_with_registry(program, registry())


def written_out(program):
    return composites_written_out(writes_as_results(program))


def renormalised(x):
    values, _ = torch.topk(x.softmax(-1), 2)
    values /= values.sum(-1, keepdim=True)
    return values * 2, values


def marked(x):
    chosen = torch.zeros_like(x).scatter_(1, x.topk(2).indices, 1.0)
    chosen.mul_(x).add_(x)
    return chosen.masked_fill_(x < 0, 7.0)


def read_before_and_after(x):
    y = x + 1
    before = y.exp()
    y.sub_(x)
    return before, y.exp(), y * 2


SAME = {
    "to the same dtype": lambda x: x.to(torch.float32) + 1,
    "to another": lambda x: x.to(torch.float64) * 2,
    "to another's": lambda x: x.to((x > 0).to(torch.int64)) + 1,
    "a copy": lambda x: x.to(torch.float32, copy=True) + 1,
    "a result": lambda x: x.exp().to(torch.float32),
    "an argument as the result": lambda x: (x.to(torch.float32), x + 1),
    "contiguous": lambda x: x.transpose(0, 1).contiguous().view(-1) + 1,
    "idle dropout": lambda x: nn.functional.dropout(x + 1, 0.5, False) * 2,
    "chunks": lambda x: torch.cat([c * n for n, c in enumerate(x[:, :4].chunk(3, -1))], -1),
    "square": lambda x: (x + 1).square(),
    "and, or, xor": lambda x: torch.stack([(x > 0) & (x < 1), (x > 1) | (x < 0), (x > 1) ^ (x > 0)]),
    "and a number": lambda x: torch.stack([(x > 0).long() & 1, (x > 0).long() | 2, (x > 0).long() ^ 3]),
    "reshape": lambda x: (x + 1).reshape(x.shape[1], -1) * 2,
    "unused": lambda x: (x.sort(), x + 1)[1],
    "renormalised in place": renormalised,
    "marked in place": marked,
    "read before and after it is written": read_before_and_after,
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", SAME)
def test_it_is_the_program_that_a_trace_gives(name, traced):
    """Its ops one by one, what it computes, and the names by which the signature knows its ends."""
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    given = program(SAME[name], x)
    before = str(given.graph)
    quick = written_out(given)
    with no_idle_decomposition():
        mine = decomposed(quick)
    assert traced == []
    theirs = decomposed(given)
    assert traced == [given] and str(given.graph) == before, "the program that was given stays as it was"

    assert ops(mine) == ops(theirs)
    (end,) = (n for n in quick.graph.nodes if n.op == "output")
    assert [n.name for n in end.args[0]] == [spec.arg.name for spec in quick.graph_signature.output_specs]
    for args in (x, torch.randn(5, 6)), (x, torch.zeros(2, 6)):
        want = SAME[name](args[1].clone())
        got = mine.module()(args[1])
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def a_view_is_held(x):
    y = x + 1
    first = y[0]
    y.mul_(2)
    return first + y


def a_reshape_is_held(x):
    y = x + 1
    flat = y.reshape(-1)
    y.mul_(2)
    return flat.sum() + y


def the_same_under_another_name(x):
    y = x + 1
    same = y.to(torch.float32)
    y.mul_(2)
    return same + y


def a_view_is_written(x):
    y = x + 1
    y[0].mul_(2)
    return y


def the_argument_is_written(x):
    x.mul_(2)
    return x + 1


def a_result_is_written(x):
    y = x + 1
    z = y.mul_(2)
    return y, z + 1


def the_same_part_twice(x):
    both = x.max(-1)
    return both[0].mul_(2) + both[0]


def written_with_other_dtype(x):
    y = x + 1
    y.add_(x.double())
    return y * 2


def written_as_integers(x):
    y = (x > 0).long() + 1
    y.mul_(2)
    return y + 1


def a_composite_op_that_gives_its_argument(x):
    y = x + 1
    same = nn.functional.dropout(y, 0.5, False)
    same.mul_(2)
    return y + same


def shared_unsaid(x):
    y = x + 1
    flat = aten._unsafe_view(y, [x.numel()])
    y.mul_(2)
    return flat.sum() + y


def split_unsaid(x):
    y = x + 1
    first = torch.unsafe_split(y, 2, 0)[0]
    y.mul_(2)
    return first.sum() + y


def given_back_unsaid(x):
    y = x + 1
    same = aten.lift(y)
    y.mul_(2)
    return same + y


def another_op(x):
    y = x + 1
    y.relu_()
    return y * 2


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "function",
    [a_view_is_held, a_reshape_is_held, the_same_under_another_name, a_view_is_written, the_argument_is_written,
     shared_unsaid, split_unsaid, given_back_unsaid,
     written_with_other_dtype, written_as_integers, a_composite_op_that_gives_its_argument, another_op],
)  # fmt: skip
def test_a_write_that_others_may_see_or_of_another_kind_is_left_to_a_trace(function, traced):
    x = torch.randn(3, 6)
    given = program(function, x)
    assert any(op._schema.is_mutable for op in targets(given) if isinstance(op, torch._ops.OpOverload))
    assert written_out(given) is given
    with no_idle_decomposition():
        decomposed(given)
    assert traced == [given]


def test_what_a_graph_inside_may_write_is_left_to_a_trace():
    def function(x):
        y = x + 1
        same = y.to(torch.float32, copy=True)
        with torch.no_grad():
            y.mul_(2)
        return same + y

    given = program(function, torch.randn(3, 6).requires_grad_())
    assert any(isinstance(t, torch._ops.HigherOrderOperator) for t in targets(given))
    assert written_out(given) is given


@pytest.mark.parametrize("function", [a_result_is_written, the_same_part_twice])
def test_results_and_parts_that_are_written_are_what_the_model_gives(function):
    x = torch.randn(3, 6)
    got = written_out(program(function, x)).module()(x.clone())
    torch.testing.assert_close(got, function(x.clone()), rtol=0, atol=0)


def test_a_dropout_that_drops_and_chunks_of_a_free_size_are_left_to_a_trace(traced):
    for function in (lambda x: nn.functional.dropout(x, 0.5, True), lambda x: torch.cat(x.chunk(2, 1)[:1])):
        quick = written_out(program(function, torch.randn(3, 6)))
        with no_idle_decomposition():
            decomposed(quick)
        assert traced.pop() is quick


def test_sizes_of_zero_are_sizes():
    """ONNX reads a 0 among sizes as "the size that it has" where the op has no flag against it."""
    import onnx_ir as ir

    from moeopt.lower.onnx.export import to_onnx
    from moeopt.lower.signature import functional

    made = to_onnx(functional(program(lambda x: x.reshape(x.shape[1], x.shape[0], 2) + 1, torch.randn(3, 4, 2))))
    (node,) = (n for n in made.graph if n.op_type == "Reshape")
    assert node.attributes["allowzero"].as_int() == 1
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.to_proto(made).SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: torch.zeros(4, 0, 2).numpy()})
    assert got.shape == (0, 4, 2)


def test_a_graph_of_such_ops_is_written_without_a_trace(traced):
    from moeopt.lower.onnx.export import to_onnx
    from moeopt.lower.signature import functional

    given = functional(program(lambda x: ((x > 0) | (x < -1)).to(torch.float64).reshape(-1), torch.randn(3, 6)))
    traced.clear()
    made = to_onnx(given)
    assert traced == []
    assert [n.op_type for n in made.graph if n.op_type in ("Or", "Cast", "Reshape")] == ["Or", "Cast", "Reshape"]


def test_getitem_is_what_parts_are_read_by():
    """What the search for a second reader of one part of several leans on."""
    graph = program(renormalised, torch.randn(3, 6)).graph
    assert [n.args[1] for n in graph.nodes if n.target is operator.getitem] == [0, 1]
