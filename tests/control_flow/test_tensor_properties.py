"""A block that asks of its input what no graph can ask is left alone where the answer changes its numbers."""

import pytest
import torch
from torch import nn

import moeopt
from tests.toy_moe import Block, X, build, optimized

QUESTIONS = {
    "storage_offset": lambda x: x.storage_offset(),
    "data_ptr": lambda x: x.data_ptr() % 64,
    "untyped_storage or nbytes": lambda x: x.untyped_storage().nbytes() > x.numel() * x.element_size(),
    "Parameter": lambda x: isinstance(x, nn.Parameter),
    "type": lambda x: type(x) is not torch.Tensor,
    "_version": lambda x: x._version,
    "is_inference": lambda x: x.is_inference(),
    "is_shared": lambda x: x.is_shared(),
    "grad_fn": lambda x: x.grad_fn is not None,
    "is_leaf": lambda x: not x.is_leaf,
    "requires_grad": lambda x: x.requires_grad,
    "retains_grad": lambda x: x.retains_grad,
    "_backward_hooks": lambda x: bool(x._backward_hooks),
    "grad": lambda x: x.grad is not None,
    "stride": lambda x: x.stride(0) == 0,
}


class Asks(Block):
    def __init__(self, ask, by=2.0):
        super().__init__()
        self.ask, self.by = ask, by

    def forward(self, x):
        return super().forward(x) * (self.by ** bool(self.ask(x)))


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_block_that_asks_is_left_alone(name):
    model = build(Asks, ask=QUESTIONS[name])
    (block,) = moeopt.explain(model, X).blocks
    assert block.status == "declined"
    assert f"asks more of its input than values and shape ({name})" in block.reason, block.reason
    assert "leave that out" in block.reason


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", QUESTIONS)
def test_one_that_asks_in_vain_is_rewritten(name):
    optimized(build(Asks, ask=QUESTIONS[name], by=1.0))


def test_what_the_trial_writes_is_undone():
    class Counts(Asks):
        def __init__(self):
            super().__init__(QUESTIONS["storage_offset"], 1.0)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = build(Counts)
    assert optimized(model) and model.calls == 0
