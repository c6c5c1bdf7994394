"""A model that keeps a state in whatever place is refused by what exports it: verification undoes each call."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.lower.second_call import differs_at_second_call
from tests.toy_moe import Block, H, build


class Held:
    def __init__(self):
        self.step, self.log = 0, []


STATES = {
    "an attribute": lambda self: setattr(self, "step", self.step + 1) or self.step,
    "a list": lambda self: self.log.append(1) or len(self.log),
    "an object": lambda self: setattr(self.held, "step", self.held.step + 1) or self.held.step,
    "a list in an object": lambda self: self.held.log.append(1) or len(self.held.log),
}


class Keeps(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.moe, self.state = Block(), state
        self.step, self.log, self.held = 0, [], Held()

    def forward(self, x):
        return x * self.state(self) + self.moe(x)


@pytest.mark.sample(2)
@pytest.mark.parametrize("state", STATES)
def test_a_state_that_the_result_depends_on_is_refused(state, tmp_path):
    pytest.importorskip("onnxruntime")
    model, x = build(Keeps, state=STATES[state]), torch.randn(3, H)
    with pytest.raises(moeopt.MoeoptError, match="changes at each call, and an engine keeps no state|not equivalent"):
        moeopt.optimize(model, x, verify="fast").save(tmp_path / "bundle")
    with pytest.raises(moeopt.MoeoptError, match="changes at each call, and an engine keeps no state|not equivalent"):
        moeopt.optimize(model, x, backend="onnxruntime", verify="fast")
    assert (model.step, model.log, model.held.step, model.held.log) == (0, [], 0, [])


def test_random_numbers_nan_and_counters_aside_are_no_state():
    class Same(nn.Module):
        calls = 0

        def forward(self, x, out):
            self.calls += 1
            out.add_(1)  # the argument's, which each call gets anew
            return torch.rand(3) + x, x / 0 * 0, {"n": 2}, out

    model = Same()
    assert not differs_at_second_call(model, (torch.ones(3), torch.zeros(2)), {}) and model.calls == 0


def test_another_number_or_shape_is_told():
    class Grows(nn.Module):
        def __init__(self, what):
            super().__init__()
            self.seen, self.what = [], what

        def forward(self, x):
            self.seen.append(x)
            return self.what(self.seen)

    for what in (torch.cat, len, lambda seen: torch.tensor(len(seen)), lambda seen: torch.tensor([0.0, len(seen)])):
        assert differs_at_second_call(Grows(what), (torch.ones(2),), {})
