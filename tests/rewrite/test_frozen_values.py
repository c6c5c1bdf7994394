"""Tensors that decided what the rewritten code is: a change of them is seen, and so is the way back."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import StaleModelWarning
from moeopt.rewrite import legality as obstacles
from moeopt.rewrite.frozen_values import Frozen
from tests.capture.tiny import rand
from tests.recognise.tiny import H, I, MoE, seeded

X = rand(24, H, seed=7)


class Stacked(MoE):
    """Experts stacked in two Parameters; its buffer ``own`` is what the test is about."""

    start: torch.Tensor | None = None

    def __init__(self):
        super().__init__(lambda: nn.Identity())
        del self.experts
        self.w1, self.w2 = nn.Parameter(rand(4, I, H)), nn.Parameter(rand(4, H, I))
        if self.start is not None:
            self.register_buffer("own", self.start.clone())

    def expert(self, e, x):
        return nn.functional.linear(nn.functional.linear(x, self.w1[e]).relu(), self.w2[e])

    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for e in range(4):
            t, k = torch.where(ids == e)
            y.index_add_(0, t, self.expert(e, x[t]) * w[t, k, None])
        return y


class Masked(Stacked):
    start = torch.ones(4, I, dtype=torch.bool)

    def expert(self, e, x):
        return nn.functional.linear(nn.functional.linear(x, self.w1[e]).relu() * self.own[e], self.w2[e])


class Placed(Stacked):
    start = torch.tensor([2, 0, 3, 1])

    def expert(self, e, x):
        return super().expert(self.own[e], x)


class Skipped(Stacked):
    start = torch.tensor(False)

    def forward(self, x):
        return x if self.own else super().forward(x)


class Tempered(Stacked):
    start = torch.tensor(2.0)

    def route(self, x):
        return (self.router(x) / self.own.item()).softmax(-1).topk(2)


class Scaled(Stacked):
    """A trained scale that Python reads."""

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.tensor(2.5))

    def forward(self, x):
        return super().forward(x) * float(self.own.detach())


class Benign(Stacked):
    """The numbers of the experts, compared with the choices: they decide, and never change."""

    start = torch.arange(4)

    def mix(self, x, w, ids):
        gates = ((ids[..., None] == self.own) * w[..., None]).sum(1)
        return sum(gates[:, e, None] * self.expert(e, x) for e in range(4))


def optimized(make):
    model = seeded(make)
    opt = moeopt.optimize(model, (X,))
    assert [b.status for b in opt.report.blocks] == ["rewritten"], opt.report
    return model, opt.model


def same(a, b):
    with torch.no_grad():
        torch.testing.assert_close(a(X), b(X), rtol=1e-4, atol=1e-5)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("make", "new"),
    [
        (Masked, torch.arange(4 * I).view(4, I) % 3 > 0),
        (Placed, torch.arange(4)),
        (Skipped, torch.tensor(True)),
        (Tempered, torch.tensor(0.9)),
        (Scaled, torch.tensor(0.9)),
    ],
)
def test_a_change_runs_the_original_and_the_way_back_the_rewritten_code(make, new):
    original, model = optimized(make)
    before = model.own.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(original, model)
    for m in (original, model):
        m.load_state_dict(m.state_dict() | {"own": new})
    text = "own decides what the block computes and is not what was verified"
    with pytest.warns(StaleModelWarning, match=text):
        same(original, model)
    assert model.forward.fallbacks == 1
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(StaleModelWarning, match=text):
            same(original, copied)
    for m in (original, model):
        m.own.data.copy_(before)  # leaves no version behind
    same(original, model)
    assert model.forward.fallbacks == 1


def test_a_harmless_one_costs_nothing_but_the_comparison():
    original, model = optimized(Benign)
    assert list(model.forward.program.frozen) == ["own"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")  # of torch.compile
        same(original, model)
        same(original, torch.compile(model, backend="eager"))
        same(original, torch.export.export(model, (X,)).module())
        same(original, pickle.loads(pickle.dumps(model)))
        twice = moeopt.optimize(nn.Sequential(model), (X,)).model  # recorded with the comparison in it
        same(original, twice)


def test_what_is_too_large_to_watch_is_declined_by_name(monkeypatch):
    monkeypatch.setattr(obstacles, "MOST_FROZEN", 3)
    (block,) = moeopt.optimize(seeded(Placed), (X,)).report.blocks
    assert block.status == "declined"
    assert block.reason == (
        "own decides what it computes without being read by the op, and has 4 elements, too many to watch for changes; "
        "multiply it into the weights, or leave it out"
    )


class Counting(Stacked):
    start = torch.tensor(0)

    def forward(self, x):
        self.own += 1
        return super().forward(x) * (2.0 if int(self.own) > 99 else 1.0)


def test_what_the_forward_writes_and_reads_is_declined():
    (block,) = moeopt.optimize(seeded(Counting), (X,)).report.blocks
    assert "own decides what it computes, and its forward writes to it; pass it as an argument" in block.reason


def test_a_large_one_is_compared_when_it_was_written_to(monkeypatch):
    module = nn.Module()
    module.register_buffer("own", torch.arange(100))
    frozen = Frozen(module, "own", module.own.clone())
    compared = []
    monkeypatch.setattr(torch, "equal", lambda a, b, equal=torch.equal: compared.append(1) or equal(a, b))
    assert frozen.changed() == frozen.changed() == "" and len(compared) == 1
    module.own[3] = 3
    assert frozen.changed() == frozen.changed() == "" and len(compared) == 2
    module.own[3] = 4
    assert "own decides what the block computes and is not what was verified" in frozen.changed() == frozen.changed()
    module.own = torch.arange(100)
    assert frozen.changed() == ""
    with torch.inference_mode():
        module.own = torch.arange(100)
        assert frozen.changed() == ""
        module.own[3] = 4
        assert "not what was verified" in frozen.changed()
    module.own = module.own.to("meta")
    assert frozen.changed() == ""
    module.own = torch.arange(99)
    assert "not what was verified" in frozen.changed()
    del module.own
    assert frozen.changed() == "own decides what the block computes and was removed"
