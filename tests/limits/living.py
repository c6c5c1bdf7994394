"""Lines of docs/limits.md on calls and changes after which a block runs its original code."""

import contextvars
import os
import types

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import moeopt
from tests.limits import limit, tested_in, told
from tests.limits.declined import Placed
from tests.toy_moe import Block, Expert, H, X, build, close, optimized, seeded


def runs_the_original(make, change, text, call=lambda m: m(X)):
    """After ``change`` of the model and of its optimised copy, both compute the same, and the copy says why."""
    model, opt = build(make), optimized(build(make), verify="fast")
    change(model), change(opt.model)
    (want, _), (got, warned) = told(lambda: call(model)), told(lambda: call(opt))
    assert torch.equal(got, want) and len(warned) == 1 and "runs its original code" in warned[0]
    assert text in warned[0], warned


@limit("Another dtype, rank, fixed or common size or structure of arguments")
def other_calls(_):
    for x, text in (
        (X[0], "called with a 2-dimensional tensor, verified with 3"),
        (X[..., :3], "called with size 3 where only 16 was verified"),
    ):
        runs_the_original(Block, lambda m: None, text, lambda m, x=x: m(x))
    runs_the_original(Block, lambda m: m.double(), "torch.float64", lambda m: m(X.double()))

    class Pair(Block):
        def forward(self, a, b=None):
            return super().forward(a if b is None else a + b)

    opt = optimized(build(Pair))
    got, warned = told(lambda: opt(X, X))
    assert len(warned) == 1 and torch.equal(got, build(Pair)(X, X))

    opt = optimized(build(Pair), (X, X))
    got, warned = told(lambda: opt(X, X[:1]))
    assert torch.equal(got, build(Pair)(X, X[:1])) and "where one size was verified for both" in warned[0]


@limit("Training mode")
def training(_):
    opt = optimized(build(dropout=0.5))
    opt.model.train()
    _, warned = told(lambda: opt(X))
    assert "training mode, in which it computes something else" in warned[0]
    opt = optimized(build())  # without dropout both modes are the same
    opt.model.train()
    assert not told(lambda: opt(X))[1]


class Seeing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@limit("Autocast, `torch.func`, global hooks, your own modes")
def modes_of_the_call(_):
    def cast(m):
        with torch.autocast("cpu", torch.bfloat16):
            return m(X)

    def gradient(m):
        weights = dict(m.named_parameters())
        return torch.func.grad(lambda w: torch.func.functional_call(m, w, (X,)).sum())(weights)["gate.weight"]

    def hooked(m):
        hook = nn.modules.module.register_module_forward_hook(lambda m, args, out: None)
        try:
            return m(X)
        finally:
            hook.remove()

    runs_the_original(Block, lambda m: None, "autocast is on", cast)
    runs_the_original(Block, lambda m: None, "torch.func", gradient)

    def seen(m):
        with Seeing():
            return m(X)

    runs_the_original(Block, lambda m: None, "global forward hook", hooked)
    runs_the_original(Block, lambda m: None, "the mode Seeing is active", seen)


@limit("A changed attribute, child, hook or class of replaced code")
def changed_code(_):
    def child(m):
        torch.manual_seed(9)
        m.experts[2] = Expert()

    runs_the_original(Block, lambda m: setattr(m, "top_k", 1), "top_k of the block is 1 and was 2")
    runs_the_original(Block, child, "a module in experts was replaced")
    runs_the_original(
        Block, lambda m: m.experts[1].register_forward_hook(lambda e, a, y: y * 2), "hook was registered on experts.1"
    )
    runs_the_original(Block, lambda m: setattr(m.experts[1].act, "__class__", nn.ReLU), "class of experts.1.act")


@limit("Other values in a tensor that decides what is computed")
def deciding_values(_):
    runs_the_original(
        Placed, lambda m: m.place.copy_(torch.tensor([2, 0, 3, 1])), "place decides what the block computes"
    )


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.top_k = nn.Linear(H, 4), 2

    def forward(self, x):
        return self.linear(x).softmax(-1).topk(self.top_k, -1)


class Mean(Block):
    def __init__(self):
        super().__init__()
        self.router = Router()

    def forward(self, x):
        rows = x.reshape(-1, H)
        w, ids = self.router(rows)
        return self.loop(rows, ids, w).view(x.shape) / ids.shape[1]


@limit("A router that chooses another number of experts")
def more_experts(_):
    runs_the_original(
        Mean, lambda m: setattr(m.router, "top_k", 3), "its router chose 3 experts for a token, and 2 when"
    )


FACTOR = 1.25
TABLE = {"plain": lambda w: w * 1.5, "parts": [1.0, 2.0]}


def closed(by):
    return lambda w: w * by


def scaled(w, by=1.5):
    return w * by


INNER = closed(1.125)


CONTEXT = contextvars.ContextVar("CONTEXT", default=1.25)


class Reads(Block):
    gain = 1.5

    def __init__(self):
        super().__init__()
        self.cfg, self.name = types.SimpleNamespace(scale=2.0, other=3.0), "scale"

    def loop(self, x, ids, w):
        w = TABLE["plain"](scaled(INNER(w))) * FACTOR * TABLE["parts"][1] * self.gain * self.cfg.scale
        return super().loop(x, ids, w * CONTEXT.get() * float(os.environ.get("MOEOPT_TESTS_SCALE", "1")))


class Computed(Reads):
    def loop(self, x, ids, w):
        return Block.loop(self, x, ids, w * getattr(self.cfg, self.name))


READS = {
    "a configuration": (lambda m, patch: patch.setattr(m.cfg, "scale", 5.0), "cfg.scale"),
    "a list": (lambda m, patch: patch.setitem(TABLE, "parts", [1.0, 7.0]), "TABLE"),
    "a global": (lambda m, patch: patch.setitem(globals(), "FACTOR", 9.0), "FACTOR"),
    "a table of functions": (lambda m, patch: patch.setitem(TABLE, "plain", lambda w: w * 9), "TABLE"),
    "a closure": (lambda m, patch: patch.setattr(INNER.__closure__[0], "cell_contents", 9.0), "INNER"),
    "a default": (lambda m, patch: patch.setattr(scaled, "__defaults__", (9.0,)), "scaled"),
    "a class attribute": (lambda m, patch: patch.setattr(Reads, "gain", 9.0), "gain"),
    "the environment": (lambda m, patch: patch.setenv("MOEOPT_TESTS_SCALE", "9"), "MOEOPT_TESTS_SCALE"),
    "a context": (lambda m, patch: CONTEXT.set(9.0), "CONTEXT"),
}


@limit("Other values that the code reads")
def read_values(_):
    for change, text in READS.values():
        with pytest.MonkeyPatch.context() as patch:
            own_context = contextvars.copy_context()
            own_context.run(runs_the_original, Reads, lambda m, change=change, patch=patch: change(m, patch), text)


@limit("Attributes with computed names")
def computed_names(_):
    opt = optimized(build(Computed))
    before, _ = told(lambda: opt(X))
    opt.model.cfg.other = 9.0  # changes nothing, and counts
    after, warned = told(lambda: opt(X))
    assert "cfg.other" in warned[0]
    close(after, before)


@limit("The old values back")
def back_again(_):
    opt = optimized(build(Reads))
    opt.model.cfg.scale = 5.0
    assert told(lambda: opt(X))[1]
    opt.model.cfg.scale = 2.0
    fallbacks = opt.model.forward.fallbacks
    assert not told(lambda: opt(X))[1] and opt.model.forward.fallbacks == fallbacks == 1


class NoGradInEval(Block):
    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            return super().forward(x)


class Auxiliary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, loss):
        ctx.save_for_backward(loss)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones_like(ctx.saved_tensors[0]) * 10


class BackwardLoss(Block):
    def route(self, x):
        ids, w = super().route(x)
        if self.training:
            w = Auxiliary.apply(w, self.gate(x).softmax(-1).square().mean())
        return ids, w


class Reentrant(Block):
    def loop(self, x, ids, w):
        return checkpoint(super().loop, x, ids, w, use_reentrant=True)


class GradValue(Block):
    def forward(self, x):
        y = super().forward(x)
        return y + 1 if torch.is_grad_enabled() else y


@limit("A gradient that is not the original's")
def other_gradients(_):
    for make in (NoGradInEval, BackwardLoss, Reentrant, GradValue):
        model, opt = build(make), optimized(build(make), verify="fast")
        assert not told(lambda opt=opt: opt(X))[1], "without gradients the rewritten code runs"
        with pytest.warns(moeopt.errors.StaleModelWarning, match="gradient"):
            got = opt.model.train()(X.clone())
        assert torch.equal(got, model.train()(X.clone()))


@limit("Second derivatives")
def second_derivatives(_):
    opt, x = optimized(build()), X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"no second derivative \(create_graph=True\); take it of the original"):
        torch.autograd.grad(opt(x).square().sum(), x, create_graph=True)


tested_in(
    "Expert ids beyond the verified",
    "test_the_warning_names_the_id_and_the_range_and_the_block_stays_rewritten",
)


class Limited(Block):
    most = 9000

    def forward(self, x):
        y = super().forward(x)
        return y[:, : self.most] * 2 if x.shape[1] > self.most else y


class Wider(Block):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if x.shape[0] > x.shape[1] > 9 else y


@limit("Sizes that its Python tells from the verified")
def untried_numbers(_):
    runs_the_original(
        Limited, lambda m: None, "its code holds the number 9000", lambda m: m(seeded(1, 9001, H, seed=3))
    )
    opt, x = optimized(build(Limited)), seeded(1, 9000, H)
    got, warned = told(lambda: opt(x))
    assert not warned and torch.allclose(got, build(Limited)(x), atol=1e-5)
    runs_the_original(
        Wider, lambda m: None, "its code computes with sizes (x.shape[0] > x.shape[1] > 9)",
        lambda m: m(seeded(40, 11, H, seed=3)),
    )  # fmt: skip
