"""Steps in loops over tokens, run by ONNX Runtime, against the step itself called token by token in float64."""

import copy
import functools

import pytest
import torch

from moeopt.backends.onnxrt.providers import runtime
from moeopt.backends.onnxrt.session import Session
from moeopt.errors import Declined, UsageError

try:
    runtime()
except UsageError as err:
    pytest.skip(str(err), allow_module_level=True)

import onnx_ir as ir

from moeopt.lower.onnx.export import own_outputs
from moeopt.lower.onnx.scan import scan_tokens
from tests.lower.onnx.steps import STEPS, step_of

ROUNDING = 1e-5
"""Values are below 10 and go through at most 7 steps of a few float32 sums, each of at most 32 terms."""


def looped(step, count):
    """A step of ``count`` token inputs in loops, as a model of its own: tokens (B, S, ...) and states to results
    (B, S, ...) and states."""
    ends = list(step.graph.inputs)
    given = [ir.Value(name=f"in.{n}", type=end.type, shape=end.shape) for n, end in enumerate(ends)]
    for value, end in zip(given[:count], ends, strict=False):
        value.shape = ir.Shape([end.shape[0], "S", *end.shape[2:]])
    nodes, values = scan_tokens(step, "mixer", given[:count], given[count:])
    graph = ir.Graph(given, values, nodes=nodes, name="looped", opset_imports=step.graph.opset_imports)
    for weight in list(step.graph.initializers.values()):
        step.graph.initializers.pop(weight.name)
        graph.register_initializer(weight)
    own_outputs(graph)
    return ir.Model(graph, ir_version=step.ir_version)


@functools.cache
def session_of(name):
    """The step, its model, and the model loaded."""
    module, step = step_of(STEPS[name])
    model = looped(step, len(module.tokens))
    return module, model, Session(ir.to_proto(model).SerializeToString())


def run(session, tokens, states):
    return session.run(dict(zip(session.inputs, (*tokens, *states), strict=True)))


@torch.no_grad()
def token_by_token(module, tokens, states):
    """What the step gives in float64, as one call of the loops gives it."""
    module = copy.deepcopy(module).double()
    tokens, states = [[t.double() if t.is_floating_point() else t for t in part] for part in (tokens, states)]
    rows = []
    for at in range(tokens[0].shape[1]):
        ends = module(*(t[:, at : at + 1] for t in tokens), *states)
        rows.append(ends[: module.results])
        states = ends[module.results :]
    return [*(torch.cat(parts, 1) for parts in zip(*rows, strict=True)), *states]


def apart(module, session, rows, length):
    given = module.begin(rows, length)
    got, want = run(session, *given), token_by_token(module, *given)
    assert [tuple(t.shape) for t in got] == [tuple(t.shape) for t in want]
    assert [t.dtype for t in got[module.results :]] == [t.dtype for t in given[1]]
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", STEPS)
def test_loops_give_what_the_step_gives_token_by_token(name):
    module, _, session = session_of(name)
    for rows in (1, 3):
        for length in (1, 2, 7):
            assert apart(module, session, rows, length) < ROUNDING, (rows, length)


@pytest.mark.parametrize(("name", "loops"), [("Small", 12), ("Crossed", 3), ("ConvDelta", 2), ("Heads", 1)])
def test_as_many_loops_as_states_that_do_not_read_each_other(name, loops):
    _, model, _ = session_of(name)
    assert [node.op_type for node in model.graph].count("Scan") == loops


def test_the_order_of_the_states_is_free():
    module, step = step_of(STEPS["ConvDelta"])
    graph = step.graph
    for ends in (graph.inputs, graph.outputs):
        one, two = ends[1:]
        ends[1:] = [two, one]
    session = Session(ir.to_proto(looped(step, 1)).SerializeToString())
    tokens, (window, memory) = module.begin(3, 7)
    y, memory_after, window_after = run(session, tokens, [memory, window])
    want = token_by_token(module, tokens, [window, memory])
    for a, b in zip((y, window_after, memory_after), want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=ROUNDING)


def test_names_begin_with_the_name_given_and_no_two_are_one():
    _, model, _ = session_of("ConvDelta")
    values = [v for node in model.graph.all_nodes() for v in node.outputs]
    names = [v.name for v in (*values, *model.graph.initializers.values())]
    assert len(set(names)) == len(names)
    assert all(name.startswith("mixer/") for name in names if not name.startswith("val_"))


def test_a_call_goes_on_from_the_states_of_another():
    module, model, session = session_of("Mamba")
    tokens, states = module.begin(3, 5)
    first = run(session, tokens, states)
    again = run(session, tokens, first[1:])
    whole = run(session, [torch.cat([tokens[0]] * 2, 1)], states)
    torch.testing.assert_close(torch.cat([first[0], again[0]], 1), whole[0], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(again[1], whole[1], rtol=0, atol=ROUNDING)


def _backwards(scan):
    scan.attributes["scan_input_directions"] = ir.AttrInt64s(
        "scan_input_directions", [1] * scan.attributes["num_scan_inputs"].as_int()
    )


def _forgetful(scan):
    body = scan.attributes["body"].as_graph()
    body.outputs[0].producer().replace_input_with(0, body.inputs[0])


@pytest.mark.parametrize("harm", [_backwards, _forgetful])
@pytest.mark.parametrize("name", ["Crossed", "ConvDelta", "Mamba"])
def test_the_comparison_sees_a_loop_gone_wrong(name, harm):
    module, model, _ = session_of(name)
    model = model.clone()
    harm(next(node for node in model.graph if node.op_type == "Scan"))
    session = Session(ir.to_proto(model).SerializeToString())
    assert apart(module, session, 3, 7) > 100 * ROUNDING


def test_a_step_with_a_branch_of_its_own_is_declined():
    def value(name, *shape, dtype=ir.DataType.FLOAT):
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    x, h = value("x", "B", 1, 4), value("h", "B", 4)
    flag = ir.node("Constant", [], {"value": ir.tensor(True)})
    sides = [ir.node(op, [h]) for op in ("Sin", "Cos")]
    then, other = (ir.Graph([], list(side.outputs), nodes=[side], name=side.op_type) for side in sides)
    chosen = ir.node("If", list(flag.outputs), {"then_branch": then, "else_branch": other})
    added = ir.node("Add", [h, h])
    for node in (flag, *sides, chosen, added):
        node.outputs[0].type, node.outputs[0].shape = h.type, h.shape
    graph = ir.Graph([x, h], [chosen.outputs[0], added.outputs[0]], nodes=[flag, chosen, added], opset_imports={"": 20})
    with pytest.raises(Declined, match="mixer: a step that holds If of its own has no form that goes by tokens"):
        looped(ir.Model(graph, ir_version=10), 1)
