"""The plan of a step, node by node: what is in a loop, and what goes through its doors."""

import pytest

from moeopt.backends.onnxrt.providers import runtime
from moeopt.errors import UsageError

try:
    runtime()
except UsageError as err:
    pytest.skip(str(err), allow_module_level=True)

from moeopt.lower.onnx.stages import ROWS, SIZES, WIDEST, one_loop, plan_stages, width
from tests.lower.onnx.steps import STEPS, step_of


def planned(name):
    module, model = step_of(STEPS[name])
    graph = model.graph
    count = len(module.tokens)
    tokens, states = list(graph.inputs)[:count], list(graph.inputs)[count:]
    results = list(graph.outputs)[: module.results]
    return model, tokens, states, results, plan_stages(graph, tokens, states, results)


def through_doors(graph, stages, results):
    """The values that are made in one place and read in another, one of the two a loop."""
    for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
        home = stages.homes[id(value)]
        places = {stages.places[id(user)] for user, _ in value.uses()} - {SIZES}
        if any(value is result for result in results):
            places.add((ROWS, len(stages.loops)))
        if home[0] in (ROWS, "loop") and any(place != home and "loop" in (place[0], home[0]) for place in places):
            yield value


def test_a_window_and_a_delta_rule_are_two_loops_with_the_products_outside():
    model, _, states, _, stages = planned("ConvDelta")
    assert stages.loops == [[0], [1]]
    products = [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    assert len(products) == 3
    assert [stages.places[id(node)] for node in products] == [(ROWS, -1), (ROWS, -1), (ROWS, 1)]
    assert [stages.homes[id(state)] for state in states] == [("loop", 0), ("loop", 1)]
    assert [stages.homes[id(state)] for state in list(model.graph.outputs)[1:]] == [("loop", 0), ("loop", 1)]
    weights = [node for node in model.graph if node.op_type in ("Sigmoid", "Sqrt", "Div")]
    assert weights and all(stages.places[id(node)][0] == ROWS for node in weights)


def test_what_is_as_wide_as_a_state_goes_through_no_door():
    model, tokens, states, results, stages = planned("ConvDelta")
    products = [node.outputs[0] for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    widest = max(width(value) for value in (*tokens, *results, *products))
    assert width(states[1]) > WIDEST * widest >= width(states[0])  # else the test says nothing
    carried = list(through_doors(model.graph, stages, results))
    assert carried and max(map(width, carried)) <= WIDEST * widest
    wide = [n for n in model.graph if n.outputs[0].shape is not None and width(n.outputs[0]) == width(states[1])]
    assert len(wide) > 3 and {stages.places[id(node)] for node in wide if node.op_type != "Constant"} == {("loop", 1)}


def test_a_decay_as_wide_as_the_state_is_made_inside():
    model, tokens, states, results, stages = planned("Mamba")
    wide = width(states[0])
    (decay,) = (n for n in model.graph if n.op_type == "Exp" and n.outputs[0].shape[0] == states[0].shape[0])
    assert width(decay.outputs[0]) == wide and stages.places[id(decay)] == ("loop", 0)
    assert wide not in {width(value) for value in through_doors(model.graph, stages, results)}
    products = {stages.places[id(node)][0] for node in model.graph if node.op_type in ("MatMul", "Gemm")}
    assert products == {ROWS}


def test_states_that_read_each_other_share_a_loop_wherever_they_stand():
    *_, stages = planned("Crossed")  # h c | h k c d
    assert sorted(stages.loops) == [[0, 1], [2, 4], [3, 5]]


def test_rows_and_heads_in_one_size_leave_everything_in_one_loop():
    model, tokens, states, _, stages = planned("Heads")
    alone = one_loop(model.graph, tokens, states)
    assert stages.loops == alone.loops == [[0, 1]] and stages.places == alone.places
    assert set(stages.places.values()) == {("loop", 0)}


def test_a_loop_reads_only_what_is_made_before_it():
    for name in STEPS:
        model, _, _, _, stages = planned(name)
        order = {("loop", k): 2 * k + 1 for k in range(len(stages.loops))}
        order |= {(ROWS, k): 2 * k + 2 for k in range(-1, len(stages.loops))}
        for node in model.graph:
            place = stages.places[id(node)]
            homes = [stages.homes[id(v)] for v in node.inputs if v is not None and id(v) in stages.homes]
            if place in order:
                assert all(order[home] <= order[place] for home in homes if home in order), (name, node)
