"""A quantised block's call is done again by its words as long as its codes lie where they lay."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import UsageError
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_refs import ExpertRef, MatrixRef, VectorRef
from moeopt.ops import experts
from moeopt.ops.native import again
from moeopt.ops.native.library import library
from moeopt.rewrite.install import rewritten_forward
from moeopt.rewrite.live_codes import LiveCodes
from tests.ops.test_quantized_experts import INT8_CHANNEL
from tests.toy_moe import Block, H

pytestmark = pytest.mark.skipif(library() is None, reason="no native kernel here")


@pytest.fixture(params=(torch.float32, torch.bfloat16), ids=str)
def model(request):
    torch.manual_seed(0)
    block = Block().to(request.param).eval()
    x = torch.randn(1, 24, H).to(request.param)
    made = moeopt.optimize(block, x, quantize="int8", verify="off").model
    return made, x


def bank_of(model):
    ((bank, _),) = rewritten_forward(model).banks
    return bank


def codes(model):
    return [bank_of(model).held[name] for name in bank_of(model).names]


@pytest.mark.parametrize("recorded", (False, True))
def test_the_second_call_prepares_nothing(model, recorded, monkeypatch):
    model, x = model
    with torch.set_grad_enabled(recorded):
        want = model(x)
        monkeypatch.setattr(again, "prepared_call", lambda *args: pytest.fail("prepared anew"))
        assert torch.equal(model(x), want) and want.requires_grad == recorded


def in_place(bank, codes):
    for t in codes:
        t.copy_(t.flip(0))


def moved(bank, codes):
    for t in codes:
        t.data = t.flip(0)


def replaced(bank, codes):
    for name, t in zip(bank.names, codes, strict=True):
        bank.held[name] = t.flip(0)


def other_strides(bank, codes):
    for name, t in zip(bank.names, codes, strict=True):
        bank.held[name] = t.flip(0).transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("change", (in_place, moved, replaced, other_strides))
def test_codes_that_change_are_followed(model, change):
    model, x = model
    with torch.no_grad():
        before = model(x)
        model(x)
        change(bank_of(model), codes(model))
        got = model(x)
        fresh = copy.deepcopy(model)  # knows no call
        assert torch.equal(got, fresh(x)) and not torch.equal(got, before)


def test_codes_that_were_cast_are_told(model):
    model, x = model
    with torch.no_grad():
        model(x)
        bank = bank_of(model)
        scales = next(name for name in bank.names if name.endswith("scales"))
        bank.held[scales] = bank.held[scales].to(torch.int32)
        with pytest.raises(UsageError, match="are no longer what they were"):
            model(x)


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 32), nn.GELU(), nn.Linear(32, H)) for _ in range(4))

    def forward(self, x):
        logits, ids = self.router(x).topk(2)
        weights = logits.softmax(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel():
                y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y


def test_a_bias_that_changes_is_followed_and_copies_run():
    torch.manual_seed(0)
    x = torch.randn(24, H)
    model = moeopt.optimize(Biased().eval(), x, quantize="int8", verify="off").model
    with torch.no_grad():
        before = model(x)
        for copied in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):  # whose floats were gone before
            assert torch.equal(copied(x), before)
        for expert in model.experts:
            expert[2].bias = nn.Parameter(expert[2].bias + 1)
        assert torch.allclose(model(x), before + 1, atol=1e-5)


@pytest.fixture
def neurons():
    """A dense network, and codes of experts that are every fourth of its neurons each, biases among them."""
    torch.manual_seed(0)
    module, wide = nn.Sequential(nn.Linear(H, 32), nn.ReLU(), nn.Linear(32, H)), (1,)
    refs = [
        ExpertRef(
            (MatrixRef("0.weight", (0, 0), (0, 1), (1, 0), H, 32),), (VectorRef("0.bias", (0,), wide, 32),),
            MatrixRef("2.weight", (0, 0), (0, 1), (1, 0), 32, H), VectorRef("2.bias", (0,), wide, H),
            neurons=tuple(range(e, 32, 4)),
        )
        for e in range(4)
    ]  # fmt: skip
    spec = ExpertsSpec(rows="plain", activation="relu")
    return module, lambda: LiveCodes(module, 0, refs, spec, INT8_CHANNEL), spec


@pytest.mark.parametrize("recorded", (False, True))
def test_biases_that_are_copied_are_read_at_each_call(neurons, recorded):
    module, made, spec = neurons
    bank, ids = made(), torch.tensor([[0, 1], [2, 3]])
    x, weights = torch.randn(2, H).requires_grad_(recorded), torch.rand(2, 2)
    with torch.set_grad_enabled(recorded):
        for change in (0.0, 0.0, 1.0, 1.0):
            with torch.no_grad():
                module[0].bias.add_(change)
            want = experts(x, ids, weights, made(), spec)
            gc.collect()
            taken = [torch.full((8,), 1e20) for _ in range(200)]  # memory that a copy had may be one of these
            assert torch.equal(experts(x, ids, weights, bank, spec), want) and taken


def test_codes_that_were_replaced_are_let_go_by_the_next_call(model):
    model, x = model
    with torch.no_grad():
        model(x)
        bank = bank_of(model)
        for dtype in (torch.float32, torch.float64):  # handed out in others too, which nobody calls again
            bank.handed_out(("oi", "io"), dtype).now()
        before = [weakref.ref(bank.held[name]) for name in bank.names]
        for name in bank.names:
            bank.held[name] = bank.held[name].clone()
        model(x)
        assert bank.remembered(1) is not None
        gc.collect()
        assert [one() for one in before] == [None] * len(before)
