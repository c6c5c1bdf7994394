"""Loops whose condition data decide: they are run, and stopped after so many rounds."""

import numpy as np
import onnx
import pytest
import torch

import moeopt
from moeopt.backends.onnxrt.onnx_file.original import session_on
from moeopt.errors import UsageError
from moeopt.onnx_in import counted_loops
from moeopt.onnx_in.counted_loops import with_counted_rounds
from tests.onnx_in.bodies import LOOP
from tests.onnx_in.test_hostile_parts import with_body

INNER = """
    b = Loop ({trips}, yes, a) <body = inner (int64 e2, bool go2, float[t, 8] a2) => (bool again2, float[t, 8] b2) {{
        b2 = Relu(a2)
        again2 = {again}(go2)
    }}>
"""


def by_data(most=0.0, trips="", inner="b = Add(a, step)"):
    """A loop that adds 1 to each number as long as their sum is below ``most``; it begins at x."""
    held = {"most": np.array(most, "float32"), "step": np.array(1, "float32")}
    held |= {"few": np.array(4)} if "few" in trips + inner else {"many": np.array(1 << 60)}
    return with_body(
        f"""y = Loop ({trips}, yes, x) <body = b (int64 e, bool go, float[t, 8] a) => (bool again, float[t, 8] b) {{
            sum = ReduceSum <keepdims = 0> (a)
            again = Less(sum, most)
            {inner}
        }}>""",
        **held,
    )


def ran(made, **inputs):
    return session_on(made, None, "m.onnx").run(inputs)[0]


@pytest.mark.parametrize("trips", ["", "many"])
def test_a_loop_that_ends_gives_what_it_gave(trips):
    _, guards = with_counted_rounds(by_data(100.0, trips))
    assert list(guards.values()) == [("loop_0", counted_loops.ROUNDS)]
    x = torch.zeros(2, 8)
    assert torch.equal(ran(by_data(100.0, trips), x=x), torch.full((2, 8), 8.0))


def test_a_loop_that_does_not_end_is_stopped_and_told(monkeypatch):
    monkeypatch.setattr(counted_loops, "ROUNDS", 100)
    said = (
        r"m.onnx: the node 'loop_0' \(Loop\) ran its body 100 times and went on, and moeopt tries no more rounds of a"
    )
    with pytest.raises(UsageError, match=said + " loop whose condition data decide; give example inputs on which it"):
        ran(by_data(1e30), x=torch.zeros(1, 8))
    assert ran(by_data(791.0), x=torch.zeros(1, 8)).eq(100).all()  # the last that may go on does not
    with pytest.raises(UsageError, match="ran its body 100 times and went on"):
        moeopt.optimize(by_data(1e30))


@pytest.mark.parametrize(
    ("inner", "rounds"),
    [
        (INNER.format(trips="few", again="Identity"), [1 << 18]),  # 4 times in each round
        (INNER.format(trips="", again="Not"), [1 << 11, 1 << 11]),
    ],
)
def test_the_rounds_of_a_nest_are_counted_together(inner, rounds):
    made, guards = with_counted_rounds(by_data(inner=inner))
    assert [found for _, found in guards.values()] == rounds
    onnx.checker.check_model(made)


def test_loops_that_end_by_their_number_of_rounds_stay_as_they_are():
    for made in (with_body(LOOP), by_data(trips="few")):
        found, guards = with_counted_rounds(made)
        assert found is made and not guards
