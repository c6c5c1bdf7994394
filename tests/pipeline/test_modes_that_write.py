"""A ``train()`` of the user's may write the weights, which the copy that is optimised shares with the model."""

import copy

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import Declined
from moeopt.pipeline import quicker_original
from moeopt.rewrite.install import rewritten_forward
from moeopt.verification.state import in_mode
from tests.capture.tiny import rand
from tests.recognise.tiny import E, H, MoE, seeded


class Merging(nn.Linear):
    """A low-rank adapter that evaluation mode merges into the weight, and training mode takes out again."""

    merged = False

    def __init__(self, how):
        super().__init__(H, E)
        self.how = how
        self.a, self.b = nn.Parameter(torch.randn(2, H)), nn.Parameter(torch.randn(E, 2))

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            delta = (self.b @ self.a).detach() * (-1 if mode else 1)
            if self.how == "in place":
                self.weight.data += delta
            elif self.how == "new memory":
                self.weight.data = self.weight.data + delta
            else:
                self.weight = nn.Parameter(self.weight + delta)
            self.merged = not mode
        return self

    def forward(self, x):
        y = super().forward(x)
        return y if self.merged else y + x @ self.a.t() @ self.b.t()


def model(how):
    return seeded(lambda: MoE(router=Merging(how)))


def held(module):
    return {name: (t, t.data_ptr(), t.detach().clone()) for name, t in module.named_parameters()}


def same(module, before):
    now = dict(module.named_parameters())
    return all(
        now[name] is t and t.data_ptr() == at and torch.equal(t, value) for name, (t, at, value) in before.items()
    )


WAYS = pytest.mark.parametrize("how", ("in place", "new memory", "new parameter"))


@WAYS
@pytest.mark.parametrize("training", (False, True))
def test_a_mode_is_left_as_it_was_found(how, training):
    module = model(how).train(training)
    before, x = held(module), rand(9, H)
    want = module(x)
    with in_mode(module, not training):
        assert module.training is not training and module.router.merged is training
        assert torch.allclose(module(x), want, atol=1e-5) and not same(module, before)
    assert module.training is training and module.router.merged is not training and same(module, before)
    with in_mode(module, training):
        assert same(module, before)


@WAYS
def test_optimising_writes_no_weight(how, monkeypatch):
    def both_run(question, ways, default, advantage, device):
        for way in ways().values():
            way()
        return default

    monkeypatch.setattr(quicker_original, "measuring", lambda: True)
    monkeypatch.setattr(quicker_original, "fastest", both_run)
    module = model(how)
    twin, before, x = copy.deepcopy(module), held(module), rand(24, H)
    opt = moeopt.optimize(module, x)
    assert [b.status for b in opt.report.blocks] == ["rewritten"]
    assert same(module, before) and same(opt.model, before) and module.router.merged and opt.model.router.merged
    for mode in (False, True):
        assert torch.allclose(opt.model.train(mode)(x), twin.train(mode)(x), atol=1e-5)


@WAYS
def test_inspecting_writes_no_weight(how):
    module = model(how).train()
    before = held(module)
    assert moeopt.inspect(module, device="H100").main.top_k == MoE.top_k
    assert same(module, before) and not module.router.merged


class OfOneMode(nn.Linear):
    """Refuses to be put in the other mode, as graphs do that were exported for one."""

    def __init__(self):
        super().__init__(H, E)
        self.eval()
        self.made = True

    def train(self, mode=True):
        if mode and hasattr(self, "made"):
            raise NotImplementedError("calling train() is not supported")
        return super().train(mode)


def test_what_refuses_the_other_mode_is_verified_in_its_own():
    module, x = seeded(lambda: MoE(router=OfOneMode())), rand(24, H)
    opt = moeopt.optimize(module, x)
    assert [b.status for b in opt.report.blocks] == ["rewritten"]
    assert rewritten_forward(opt.model).program.guard.training is False
    assert torch.allclose(opt.model(x), module(x), atol=1e-5)
    said = r"train\(True\) of MoE raises NotImplementedError: calling train\(\) is not supported"
    with pytest.raises(Declined, match=said), in_mode(module, True):
        pass
    assert not any(m.training for m in module.modules())
