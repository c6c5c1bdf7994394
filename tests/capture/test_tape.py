"""A tape says what was computed, by whom, from what; and the module does not notice."""

import numpy as np
import pytest
import torch
from torch import nn

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import clone_inputs, record
from moeopt.errors import CaptureError
from tests.capture.tiny import Run, again, assert_equal, rand, recorded


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.register_buffer("load", torch.zeros(3))
        self.calls, self.aux = 0, None

    def forward(self, x, *, scale=1.0):
        logits = self.gate(x)
        self.load += logits.sum(0)
        self.calls += 1
        self.aux = logits.softmax(-1)
        return {"y": self.inner(x) * scale, "ids": logits.argmax(-1)}


def test_values_calls_and_inputs():
    block, x = Block(), rand(5, 4)
    tape = record(block, (x,), {"scale": 2.0})
    want = block.inner(x).detach() * 2
    assert torch.equal(tape.value(tape.output["y"]), want)
    assert (
        tape.args[0].op == "placeholder" and torch.equal(tape.value(tape.args[0]), x) and tape.kwargs == {"scale": 2.0}
    )
    assert [c.path for c in tape.calls] == ["", "gate", "inner", "inner.0", "inner.1"]
    assert [c.parent for c in tape.calls] == [None, 0, 0, 2, 2]
    relu = next(n for n in tape.nodes if op_name(n) == "relu")
    assert tape.call_of(relu).path == "inner.1" and tape.stack(relu.meta["call"]) == [0, 2, 4]
    gate = tape.calls[1]
    assert gate.args == (tape.args[0],) and gate.first <= gate.output.meta["index"] < gate.last
    assert [n.meta["index"] for n in tape.nodes] == list(range(len(tape.nodes)))
    weight = next(n for n in tape.nodes if n.op == "get_attr" and n.target == "gate.weight")
    assert tape.value(weight) is block.gate.weight


def test_what_outlives_the_call():
    block = Block()
    tape = record(block, (rand(5, 4),))
    (load,) = tape.mutations
    assert load.target == "load" and torch.equal(tape.value(load), torch.zeros(3))
    assert set(tape.attributes) == {("", "calls"), ("", "aux")} and tape.attributes["", "calls"] == 1
    assert tape.results()[:2] == [tape.output["y"], tape.output["ids"]]
    assert tape.mutations[load] in tape.results() and tape.attributes["", "aux"] in tape.results()


def test_the_module_the_inputs_and_the_generator_are_left_as_they_were():
    block, x = Block(), rand(5, 4)
    block.fn = None
    before, state, kept = x.clone(), {k: v.clone() for k, v in block.state_dict().items()}, torch.get_rng_state()

    def noisy(module, args, kwargs=None):
        args[0].mul_(3)
        torch.rand(3)

    block.register_forward_pre_hook(noisy)
    record(block, (x,))
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), kept)
    assert block.calls == 0 and block.aux is None and nn.Module.__call__.__name__ != "recorded_call"
    for key, value in block.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_write_to_an_input_is_a_mutation():
    tape = recorded(lambda _, x: x[1:].mul_(2) + 1, rand(3, 2))
    (x,) = tape.mutations
    assert x is tape.args[0]
    got, (after,) = again(tape, rand(3, 2, seed=9))
    want = rand(3, 2, seed=9)
    want[1:] *= 2
    assert_equal((got, after), (want[1:] + 1, want))


def test_a_result_of_an_in_place_call_names_whose_memory_it_wrote():
    def fn(_, x):
        y = torch.zeros(4, 2)
        y[1:3].add_(x)
        return y, x * 1

    tape = recorded(fn, rand(2, 2))
    written = next(n for n in tape.nodes if op_name(n) == "add")
    assert op_name(tape.write_origin(written)) == "zeros" and tape.write_origin(tape.output[1]) is None


def test_reads_into_python_are_noted_with_their_lines():
    def fn(_, x):
        if x.sum().item() > 0 or bool(x[0, 0] > 1):
            x = x + 1
        return x * len(x[0].tolist()) * int(np.asarray(x).shape[0]) * float(x.numpy().shape[0]) * x.max()

    tape = recorded(fn, rand(3, 2))
    assert len(tape.reads) >= 5
    assert all("test_tape.py:" in r.line for r in tape.reads)
    assert {op_name(r.node) for r in tape.reads} >= {"sum", "select"}
    assert recorded(lambda _, x: x * x.max(), rand(3)).reads == []


def test_random_numbers_are_noted():
    tape = recorded(lambda _, x: x + torch.rand_like(x) + torch.zeros(2).uniform_(), rand(2))
    assert [op_name(n) for n in tape.random_nodes()] == ["rand_like", "uniform_"]
    assert recorded(lambda _, x: nn.functional.dropout(x, 0.5, training=False), rand(2)).random_nodes() == []


def test_lines_are_the_users():
    def fn(_, x):
        y = x * 2
        return nn.functional.silu(y)

    tape = recorded(fn, rand(2))
    first = fn.__code__.co_firstlineno
    lines = [n.meta["source"] for n in tape.nodes if n.op == "call_function"]
    assert [line.rsplit("/", 1)[1] for line in lines] == [f"test_tape.py:{first + 1}", f"test_tape.py:{first + 2}"]


def test_constants_views_and_data_of_parameters():
    outside = torch.tensor([1.0, 2.0])

    def fn(m, x):
        return x @ m.w.data.t() + outside, m.plain * 1, m.w.detach()[0] * 1

    module = Run(fn, w=rand(2, 3, seed=1))
    module.plain = rand(2, seed=2)
    tape = record(module, (rand(4, 3),))
    leaves = {str(n.target): n for n in tape.nodes if n.op == "get_attr"}
    assert {"w", "plain"} < set(leaves) and len(leaves) == 3
    constant = next(n for name, n in leaves.items() if name.startswith("_constant"))
    assert torch.equal(constant.meta["constant"], outside) and "constant" not in leaves["plain"].meta
    x = rand(4, 3, seed=5)
    with torch.no_grad():
        assert_equal(again(tape, x)[0], module(x))


def test_a_tied_parameter_is_one_leaf():
    shared = nn.Linear(3, 3)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = shared, nn.Linear(3, 3)
            self.b.weight = shared.weight

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    tape = record(Tied(), (rand(2, 3),))
    assert [str(n.target) for n in tape.nodes if n.op == "get_attr"] == ["a.weight", "a.bias", "b.bias"]
    assert [c.path for c in tape.calls] == ["", "a", "a", "b"]


def test_a_graph_without_values_computes_them_when_asked():
    x = rand(3, 4)

    def fn(m, x):
        y = (x @ m.w).relu()
        y[0] = 0
        return y.sum(-1)

    module = Run(fn, w=rand(4, 4, seed=1))
    light = record(module, (x,), keep_values=False)
    assert [n.meta.get("shape") for n in light.nodes] == [n.meta.get("shape") for n in record(module, (x,)).nodes]
    assert not light._values


def test_a_detached_tensor_that_numpy_changed_is_a_constant():
    def fn(_, x):
        y = torch.zeros(3)
        return x + torch.from_numpy(np.ones(3, dtype=np.float32)) + y

    tape = recorded(fn, rand(3))
    assert_equal(again(tape, rand(3, seed=4))[0], rand(3, seed=4) + 1)


def test_what_vmap_does_inside_is_carried_or_refused():
    w = rand(4, 4)
    try:
        tape = recorded(lambda m, x: torch.func.vmap(lambda row: row @ m.w)(x), rand(3, 4), w=w)
    except CaptureError:
        return
    assert_equal(again(tape, rand(3, 4, seed=3))[0], torch.func.vmap(lambda row: row @ w)(rand(3, 4, seed=3)))


# -- refusals ----------------------------------------------------------------------------------------


def test_inputs_that_share_memory_are_cloned_apart():
    x = rand(4, 3)
    tape = recorded(lambda _, a, b: a.add_(1).sum() + b.sum(), x, x)
    assert len([n for n in tape.nodes if n.op == "placeholder"]) == 2
    a, (first, second) = again(tape, x, x)
    assert torch.equal(first, x + 1) and torch.equal(second, x)


def test_an_error_of_the_model_says_which_and_what_to_do():
    def fn(_, x):
        raise KeyError("hidden")

    with pytest.raises(
        CaptureError, match="Run raised KeyError: 'hidden'; check that it runs on these inputs in eager"
    ) as e:
        recorded(fn, rand(2))
    assert isinstance(e.value.__cause__, KeyError)


def conditional(_, x):
    return torch.ops.higher_order.cond(x.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (x,))


def test_an_operator_that_runs_functions_inside_is_one_node_of_a_whole_model_and_an_obstacle_in_a_block():
    x = rand(3, 2)
    tape = record(Run(conditional), (x,), lenient=True, keep_values=False)
    assert [str(n.target) for n in tape.nodes if n.op == "call_function"][2] == "cond"
    with pytest.raises(CaptureError, match="calls cond, which runs functions of its own inside; where it stands"):
        record(Run(conditional), (x,))


def test_code_that_insists_on_being_compiled_is_named():
    def fn(_, x):
        return torch.compile(torch.sin, backend="eager", fullgraph=True)(x)

    with pytest.raises(CaptureError, match=r"under torch.compile\(fullgraph=True\), as flex_attention does, .*'sdpa'"):
        recorded(fn, rand(2))


def test_a_failed_run_leaves_no_trace():
    def fn(m, x):
        m.w.data.zero_()
        m.extra = 1
        raise ValueError("late")

    module = Run(fn, w=torch.ones(2))
    with pytest.raises(CaptureError, match="late"):
        record(module, (rand(2),))
    assert torch.equal(module.w, torch.ones(2)) and not hasattr(module, "extra")
    assert nn.Module.__call__.__name__ != "recorded_call"


def test_a_call_that_writes_to_two_tensors_is_refused_with_its_line():
    def fn(_, x):
        values, ids = torch.empty(2), torch.empty(2, dtype=torch.long)
        torch.topk(x, 2, out=(values, ids))
        return values

    with pytest.raises(CaptureError, match="topk.values writes to 2 tensors at once, which is not carried") as e:
        recorded(fn, rand(5))
    assert "test_tape.py:" in e.value.where


def test_cloned_inputs_keep_their_containers():
    x = rand(2)
    tree = clone_inputs(({"a": [x]}, 3))
    assert torch.equal(tree[0]["a"][0], x) and tree[0]["a"][0] is not x and tree[1] == 3


@pytest.mark.parametrize(("given", "name"), [((), "cross"), ((-1,), "linalg_cross")])
def test_a_cross_product_without_a_dimension_is_recorded_as_one(given, name):
    """It runs along the first dimension of size 3, which is that of the rows where there are 3."""

    def crossed(_, x):
        return torch.cross(x, x.flip(1), *given) + x.cross(x + 1, *given)

    tape, x = recorded(crossed, rand(5, 3)), rand(3, 3)
    assert [op_name(n) for n in tape.nodes if "cross" in op_name(n)] == [name, name]
    assert_equal(again(tape, x)[0], crossed(None, x))
