"""What stops the tape in one block is that block's reason, and a block that is changed around its calls is declined."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import moeopt
from tests.toy_moe import Block, E, Expert, H, X, build, close


class Bank(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(E, H, H) * 0.3) for _ in range(2))

    def forward(self, x, ids, w):
        y = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            y.index_add_(
                0, token, F.linear(F.silu(F.linear(x[token], self.up[e])), self.down[e]) * w[token, slot, None]
            )
        return y


class Delta(nn.Module):
    def __init__(self, delta):
        super().__init__()
        self.delta = delta

    def forward(self, weight):
        return weight + self.delta


class Adapter(nn.Module):
    """Puts a low-rank change on one Parameter of ``inner`` for each call, and takes it off again."""

    def __init__(self, inner, module, name):
        super().__init__()
        self.inner, self.on, self.name = inner, module, name
        *stack, out, width = getattr(module, name).shape
        self.a, self.b = nn.Parameter(torch.randn(*stack, 2, width) * 0.3), nn.Parameter(torch.randn(*stack, out, 2))

    def forward(self, *args):
        parametrize.register_parametrization(self.on, self.name, Delta(self.b @ self.a))
        try:
            with parametrize.cached():
                return self.inner(*args)
        finally:
            parametrize.remove_parametrizations(self.on, self.name, leave_parametrized=False)


class Adapted(Block):
    def __init__(self):
        super().__init__()
        bank = Bank()
        self.experts = Adapter(bank, bank, "up")

    def loop(self, x, ids, w):
        return self.experts(x, ids, w)


def test_an_adapter_on_a_stacked_parameter_declines_its_block_alone():
    model = nn.Sequential(build(Adapted), build()).eval()
    fast = moeopt.optimize(model, X, verify="fast")
    adapted, plain = [b for b in fast.report.blocks if b.kind == "moe"]
    assert plain.status == "rewritten" and adapted.name == "0.experts.inner"
    assert adapted.reason.startswith(
        "code around it changes its weights or its class before each call and back afterwards (it holds a "
        "ParametrizedBank), as adapters on stacked Parameters do"
    )
    assert "merge the adapters into the weights" in adapted.reason
    assert any("weights are computed at each call" in o.reason for o in adapted.obstacles)
    with torch.no_grad():
        close(fast(X), model(X))


def test_an_adapter_on_a_dense_ffn_leaves_it_as_it_is():
    inner = Expert()
    model = nn.Sequential(Adapter(inner, inner.w1, "weight"), nn.Linear(H, H)).eval()
    for how in ({"dense": "leave"}, {"dense": "split", "experts": 2}):
        (block,) = moeopt.explain(model, X, verify="fast", **how).blocks
        assert (block.kind, block.status) == ("dense_ffn", "declined") and "changes its weights" in block.reason


class OutArguments(Block):
    def route(self, x):
        w, ids = torch.empty(len(x), 2), torch.empty(len(x), 2, dtype=torch.int64)
        torch.topk(self.gate(x).softmax(-1), 2, out=(w, ids))
        return ids, w


class ShapeInPlace(Block):
    def route(self, x):
        score = self.gate(x)
        turned = score[:].transpose_(0, 1)
        w, ids = turned.t().softmax(-1).topk(2)
        return ids, w


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (OutArguments, "writes to 2 tensors at once, which is not carried"),
        (ShapeInPlace, "changes a tensor's shape in place; use its out-of-place form"),
    ],
)
def test_what_the_tape_cannot_carry_is_the_reason_of_that_block(cls, reason):
    model = nn.Sequential(build(cls), build(), nn.Linear(H, H)).eval()
    fast = moeopt.optimize(model, X, verify="fast")
    odd, plain = [b for b in fast.report.blocks if b.kind == "moe"]
    assert (odd.name, plain.name, plain.status) == ("0", "1", "rewritten")
    assert odd.status == "declined" and reason in odd.reason and "test_real_calls.py:" in odd.source
    with torch.no_grad():
        close(fast(X), model(X))
