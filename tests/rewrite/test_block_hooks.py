"""Hooks of a rewritten block itself run around its rewritten code, as around its own."""

import pytest
import torch
from torch import nn

import moeopt
from tests.toy_moe import Block, E, H, K, X, build, close, optimized

SEEN: list[int] = []


class Stacked(nn.Module):
    """The block holds the stacked weights of its experts itself."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E)
        self.w_in = nn.Parameter(torch.randn(E, H, 2 * H) / 4)
        self.w_out = nn.Parameter(torch.randn(E, 2 * H, H) / 4)

    def forward(self, x):
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        h = torch.einsum("bth,btkhi->btki", x, self.w_in[ids]).relu()
        return torch.einsum("btki,btkih,btk->bth", h, self.w_out[ids], w)


def collecting(module):
    """Hooks that write to a global, one before and one after each call."""
    module.register_forward_pre_hook(lambda *_: SEEN.append(1))
    module.register_forward_hook(lambda *_: SEEN.append(2))


@pytest.mark.parametrize("cls", (Block, Stacked))
def test_a_block_that_is_looked_at_is_rewritten(cls):
    model = build(cls)
    collecting(model)
    fast = optimized(model)
    SEEN.clear()
    close(fast(X), model(X))
    assert SEEN == [1, 2, 1, 2] and not fast.model.forward.fallbacks


@pytest.mark.parametrize("cls", (Block, Stacked))
def test_one_that_is_looked_at_later_stays_rewritten(cls):
    model = build(cls)
    fast = optimized(model)
    fast(X)
    collecting(fast.model)
    SEEN.clear()
    for _ in range(2):  # the second is done again by its words, or not
        close(fast(X), model(X))
    assert SEEN == [1, 2, 1, 2] and not fast.model.forward.fallbacks


def test_an_engine_of_one_is_compared_with_its_own_choices(recwarn):
    pytest.importorskip("onnxruntime")
    engine = optimized(build(Stacked), X, backend="onnxruntime", verify="strict")
    assert engine.certificate.passed
    assert not [w for w in recwarn if "runs its original code" in str(w.message)]


class Scaled(Block):
    """Its factor is stored by a hook."""

    def forward(self, x):
        return super().forward(x) * self.factor


def stores_factor(module, args):
    module.factor = args[0].mean()


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_hooks_that_change_arguments_and_results_run_around_the_rewritten_code(backend):
    pytest.importorskip("onnxruntime")
    model = build(Block)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, out: out + 1)
    fast = optimized(model, backend=backend, verify="fast")
    with torch.no_grad():
        close(fast(X), model(X))
        assert len(fast.model._forward_hooks) == 1 if backend == "torch" else fast.certificate.passed
    assert backend != "torch" or not fast.model.forward.fallbacks


def test_a_forward_that_reads_what_its_own_hook_stores_is_told_so():
    model = build(Scaled)
    model.register_forward_pre_hook(stores_factor)
    (block,) = [b for b in moeopt.explain(model, X, verify="fast").blocks if b.kind == "moe"]
    assert block.reason.startswith(
        "its forward reads what its own hook stores_factor stores before each call, and does"
    )
    assert "'Scaled' object has no attribute 'factor'" in block.reason and len(model._forward_pre_hooks) == 1


@pytest.mark.parametrize("part", ["", ".w2"])
def test_a_hook_that_makes_one_expert_another_function_is_told_as_a_hook(part):
    """Read by values it would be a constant, or tokens that no expert serves."""
    model = build(Block)
    hooked = model.get_submodule(f"experts.1{part}")
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    (block,) = [b for b in moeopt.explain(model, X, verify="fast").blocks if b.kind == "moe"]
    assert (
        block.reason.startswith(f"experts.1{part} has a forward or backward hook") and len(hooked._forward_hooks) == 1
    )
