"""Under a user's mode of PyTorch a block runs its own code, and says so; under other modes it stays rewritten."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import moeopt
from moeopt.capture.user_modes import active_user_mode
from moeopt.errors import StaleModelWarning
from tests.toy_moe import Block, H, X, build, close, far, optimized, seeded


class SiluIsZero(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 0 if func is F.silu else out


class SmallSilu(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out / 2 if func is torch.ops.aten.silu.default else out


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [SiluIsZero, SmallSilu])
def test_a_mode_that_changes_numbers_gets_the_originals(mode):
    ref, opt = build(), optimized(build())
    with torch.no_grad():
        plain = opt(X)
        with mode():
            want = ref(X)
            with pytest.warns(StaleModelWarning, match=f"the mode {mode.__name__} is active, and would see other ops"):
                got = opt(X)
        assert torch.equal(got, want) and far(got, plain)
        with warnings.catch_warnings():
            warnings.simplefilter("error", StaleModelWarning)
            assert torch.equal(opt(X), plain)


@pytest.mark.filterwarnings("ignore::moeopt.errors.StaleModelWarning")
def test_a_mode_that_counts_counts_the_originals_ops():
    ref, opt = build(), optimized(build())
    with torch.no_grad(), Count() as want:
        ref(X)
    with torch.no_grad(), Count() as got:
        opt(X)
    assert got.seen == want.seen and "aten.silu.default" in got.seen


def test_the_innermost_users_mode_is_named():
    assert active_user_mode() == ""
    with SiluIsZero(), torch.device("cpu"):
        assert active_user_mode() == "SiluIsZero"
        with Count():
            assert active_user_mode() == "Count"
    with torch.device("meta"), FakeTensorMode():
        assert active_user_mode() == ""


def test_modes_that_change_no_number_keep_the_rewritten_code():
    opt, x = optimized(build()), X.clone().requires_grad_()
    keep_products = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaleModelWarning)
        with torch.device("cpu"):
            close(opt(X), build()(X))
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert opt(fake.from_tensor(X)).shape == X.shape
        close(make_fx(opt.model)(X)(X), build()(X))
        checkpoint(opt.model, x, use_reentrant=False, context_fn=keep_products).sum().backward()
    again = X.clone().requires_grad_()
    build()(again).sum().backward()
    close(x.grad, again.grad)
    assert opt.model.forward.fallbacks == 0


class Around(nn.Module):
    """The model itself calls its first block under a mode."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x):
        with SmallSilu():
            y = self.first(x)
        return self.second(x + y)


def test_a_block_that_the_model_calls_under_a_mode_is_declined():
    opt = moeopt.optimize(build(Around), X, verify="fast")
    first, second = (b for b in opt.report.blocks if b.kind == "moe")
    assert (first.status, second.status) == ("declined", "rewritten")
    assert first.reason.startswith("the model calls it under SmallSilu, a mode of PyTorch that sees or changes every")
    assert "leave the mode, or begin it in the block's own forward" in first.reason
    x = seeded(3, 5, H)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", StaleModelWarning)
        close(opt(x), build(Around)(x))


class NegativeProducts(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return -out if func is torch.ops.aten.mm.default else out


class Inside(Block):
    """The mode is begun in the block's own forward: a part of what the block computes."""

    def route(self, x):
        with NegativeProducts():
            return super().route(x)


def test_a_mode_of_the_blocks_own_forward_is_part_of_what_it_computes():
    opt, x = moeopt.optimize(build(Inside), X, verify="fast"), seeded(3, 5, H)
    assert [b.status for b in opt.report.blocks] == ["rewritten"]
    with torch.no_grad():
        close(opt(x), build(Inside)(x))
        assert far(opt(x), build()(x))


def test_a_mode_around_optimize_is_told_as_the_users_own():
    with Count():
        opt = moeopt.optimize(build(), X, verify="fast")
    assert [b.status for b in opt.report.blocks] == ["declined"]
    assert opt.report.blocks[0].reason.startswith("moeopt.optimize is called under Count, a mode of PyTorch")
