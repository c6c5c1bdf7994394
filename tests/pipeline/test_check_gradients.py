"""Where the original's gradient is not what its values say, the rewritten code leaves it to the original."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moeopt
from moeopt.errors import StaleModelWarning
from tests.capture.tiny import rand
from tests.recognise.tiny import H, MoE, ffn, seeded

X = rand(24, H, seed=7)


class Scaler(torch.autograd.Function):
    """Attaches an auxiliary loss that only the backward pass shows."""

    @staticmethod
    def forward(ctx, out, loss):
        ctx.save_for_backward(loss)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones_like(ctx.saved_tensors[0]) * 10


class AuxInTraining(MoE):
    def route(self, x):
        w, ids = super().route(x)
        if self.training and torch.is_grad_enabled():
            w = Scaler.apply(w, self.router(x).softmax(-1).square().mean())
        return w, ids


class NoGradInEval(MoE):
    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            return super().forward(x)


class NeverGrad(MoE):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class GradModeValue(MoE):
    def forward(self, x):
        y = super().forward(x)
        return y + 1 if torch.is_grad_enabled() else y


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.relu()


class Kernel(nn.Module):
    def forward(self, x):
        return NoBackward.apply(x)


class Reentrant(MoE):
    def mix(self, x, w, ids):
        return checkpoint(super().mix, x, w, ids, use_reentrant=True)


class Momentum(MoE):
    """A kept module that writes to its buffers in training mode."""

    def __init__(self):
        super().__init__(norm=nn.BatchNorm1d(H))
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        return self.norm(super().forward(x))


def optimized(make):
    model = seeded(make)
    opt = moeopt.optimize(model, (X,))
    assert [b.status for b in opt.report.blocks] == ["rewritten"], opt.report
    return model, opt.model


def grads(model, mode):
    model.train(mode).zero_grad(set_to_none=True)
    out = model(X.clone())
    if out.requires_grad:
        (out * torch.arange(H)).sum().backward()
    return out.detach(), out.requires_grad, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (AuxInTraining, "the gradient of input 0 is not the original's"),
        (NoGradInEval, "in one of its modes no gradient flows through the original, and one does through"),
        (GradModeValue, r"its outputs are not the original's where gradients are enabled \(is_grad_enabled\(\) in its"),
    ],
)
def test_both_modes_train_as_the_original(make, reason):
    original, model = optimized(make)
    for mode in (True, False):
        want = grads(original, mode)
        with pytest.warns(StaleModelWarning, match=reason):
            model.forward.last_refusal = ""
            got = grads(model, mode)
        assert got[1] == want[1]
        torch.testing.assert_close([got[0], got[2]], [want[0], want[2]], rtol=0, atol=0)  # the original's own code ran


def test_an_original_without_gradients_runs_rewritten_without_them():
    original, model = optimized(NeverGrad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in (True, False):
            want, got = grads(original, mode), grads(model, mode)
            assert not got[1] and all(g is None for g in got[2].values())
            torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    assert model.forward.program.guard.no_grad and model.forward.fallbacks == 0


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: MoE(lambda: ffn(Kernel)), "the original's gradient raises NotImplementedError: You must implement"),
        (Reentrant, "the original's gradient raises RuntimeError: When use_reentrant=True, "),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_an_original_that_cannot_be_differentiated_is_still_optimised(make, reason):
    original, model = optimized(make)
    with torch.no_grad():
        torch.testing.assert_close(model(X), original(X), rtol=1e-4, atol=1e-5)
    assert model.forward.fallbacks == 0 and model.forward.program.guard.gradients.startswith(reason)
    assert "\n" not in model.forward.program.guard.gradients


def test_asking_leaves_modes_and_buffers_as_they_were():
    original = seeded(Momentum)
    original.router.train()
    before = {n: t.clone() for n, t in original.state_dict().items()}
    opt = moeopt.optimize(original, (X,))
    assert [b.status for b in opt.report.blocks] == ["rewritten"], opt.report
    model = opt.model
    for m in (original, model):
        assert (m.router.training, m.training, m.norm.training) == (True, False, False)
        assert all(torch.equal(t, before[n]) for n, t in m.state_dict().items())


class ScaledSequences(MoE):
    """A number for each sequence, and how many there are."""

    def forward(self, x, scale):
        return super().forward(x.reshape(-1, H)).view_as(x) * scale[:, None, None] / len(scale)


def test_a_batch_that_the_original_broadcasts_runs_the_original():
    """It ran with the number of one argument's rows in the place of the other's: wrong by that factor."""
    block, x, scale = seeded(ScaledSequences), rand(4, 6, H, seed=3), rand(4, seed=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = moeopt.optimize(block, (x, scale))
        assert opt.report.blocks[0].status == "rewritten"
        torch.testing.assert_close(opt(x[:2], scale[:2]), block(x[:2], scale[:2]))
    with pytest.warns(StaleModelWarning, match="sizes 4 and 1 where one size was verified for both"):
        assert torch.equal(opt(x[:1], scale), block(x[:1], scale))


class MaskedWeights(MoE):
    """Routing weights by the lengths of the sequences: one token beside two lengths broadcasts before the experts."""

    def forward(self, x, lengths):
        within = torch.arange(x.shape[1]) < lengths[:, None]
        t = x.reshape(-1, H)
        w, ids = self.route(t)
        return self.mix(t, w * within.reshape(-1, 1), ids).view_as(x)


def test_gradients_are_looked_at_on_calls_that_fit_together():
    block, x, lengths = seeded(MaskedWeights), rand(2, 6, H, seed=3), torch.tensor([4, 6])
    opt = moeopt.optimize(block, (x, lengths))
    assert [b.status for b in opt.report.blocks] == ["rewritten"]
    torch.testing.assert_close(opt(x, lengths), block(x, lengths))


def test_hooks_on_gradients_run_for_the_user_alone():
    """They are those of Parameters, and of modules that the rewritten code calls; afterwards they are there again."""
    model, ran = seeded(MoE).eval(), []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: ran.append(name))
    model.router.register_full_backward_hook(lambda *_: ran.append("after"))
    model.router.register_full_backward_pre_hook(lambda *_: ran.append("before"))
    fast = moeopt.optimize(model, X)
    assert fast.report.blocks[0].status == "rewritten" and ran == []
    found = []
    for one in (model, fast):
        x = X.clone().requires_grad_()
        one(x).sum().backward()
        found.append(sorted(ran))
        ran.clear()
    assert found[0] == found[1] and {"after", "before", "router.weight"} <= {*found[0]}
