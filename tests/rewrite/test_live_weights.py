"""Weights are read where they live; a place that is no longer what was verified says what changed."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import moeopt
from moeopt.ir.weight_refs import ExpertRef, MatrixRef, VectorRef, expert_paths, tensor_at
from moeopt.rewrite.install import rewritten_forward
from moeopt.rewrite.live_weights import LiveExpertWeights
from moeopt.rewrite.refused_call import Stale
from tests.capture.tiny import Run, rand

E, H, I = 3, 4, 5


def listed():
    """E pairs of Linear layers: weights (I, H) and (H, I), in nn layout."""
    root = nn.Module()
    root.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, I), nn.ReLU(), nn.Linear(I, H)) for _ in range(E))
    refs = [
        ExpertRef(
            (MatrixRef(f"experts.{e}.0.weight", (0, 0), (0, 1), (1, 0), H, I),),
            (VectorRef(f"experts.{e}.0.bias", (0,), (1,), I),),
            MatrixRef(f"experts.{e}.2.weight", (0, 0), (0, 1), (1, 0), I, H),
            VectorRef(f"experts.{e}.2.bias", (0,), (1,), H),
        )
        for e in range(E)
    ]
    return root, refs


def stacked(order=range(E)):
    """Two (E, ., .) Parameters, gate and up interleaved in the first, no bias in, a bias out."""
    root = Run(None, w_in=rand(E, H, 2 * I), w_out=rand(E, I, H, seed=1), b=rand(E, H, seed=2))
    refs = [
        ExpertRef(
            tuple(MatrixRef("w_in", (e, 0, i), (0, 1, 0), (0, 0, 2), H, I) for i in (0, 1)),
            (None, None),
            MatrixRef("w_out", (e, 0, 0), (0, 1, 0), (0, 0, 1), I, H),
            VectorRef("b", (e, 0), (0, 1), H),
        )
        for e in order
    ]
    return root, refs


def test_matrices_in_both_layouts_are_views():
    root, refs = listed()
    linear = root.experts[1]
    bank = LiveExpertWeights(root, refs, ("oi", "io"))
    assert torch.equal(bank.w_in(1)[0], linear[0].weight) and torch.equal(bank.w_out(1), linear[2].weight.t())
    assert torch.equal(bank.b_in(1)[0], linear[0].bias) and torch.equal(bank.b_out(1), linear[2].bias)
    assert bank.num_experts == E and bank.norm(0) is None and bank.stacked() is None
    assert bank.w_in(1)[0].data_ptr() == linear[0].weight.data_ptr()


def test_weights_follow_every_update():
    root, refs = listed()
    bank = LiveExpertWeights(root, refs, ("oi", "oi"))
    with torch.no_grad():
        root.experts[0][0].weight.fill_(7)
    assert bank.w_in(0)[0].eq(7).all()
    root.load_state_dict({k: torch.ones_like(v) for k, v in root.state_dict().items()})
    assert bank.w_out(2).eq(1).all()
    root.experts[0][0].weight = nn.Parameter(torch.full((I, H), 3.0))
    assert bank.w_in(0)[0].eq(3).all()
    bank.w_out(1).sum().backward()
    assert root.experts[1][2].weight.grad.eq(1).all()


def test_slices_of_a_stack_are_handed_out_whole():
    root, refs = stacked()
    bank = LiveExpertWeights(root, refs, ("io", "oi"))
    whole = bank.stacked()
    for e in range(E):
        assert torch.equal(whole.w_in(e)[0], root.w_in[e, :, ::2]) and torch.equal(whole.w_in(e)[1], bank.w_in(e)[1])
        assert torch.equal(whole.w_out(e), root.w_out[e].t()) and torch.equal(whole.b_out(e), root.b[e])
        assert whole.b_in(e) == (None, None)
    assert whole.w_out_s.data_ptr() == root.w_out.data_ptr()


@pytest.mark.parametrize("order", [[2, 1, 0], [0, 2, 1], [1, 1, 2]])
def test_experts_in_another_order_are_no_stack(order):
    root, refs = stacked(order)
    bank = LiveExpertWeights(root, refs, ("io", "io"))
    assert bank.stacked() is None
    assert [torch.equal(bank.w_out(i), root.w_out[e]) for i, e in enumerate(order)] == [True] * E


def test_every_second_expert_is_a_stack_with_gaps():
    root = Run(None, w_in=rand(6, H, I), w_out=rand(6, I, H, seed=1))
    refs = [
        ExpertRef((MatrixRef("w_in", (e, 0, 0), (0, 1, 0), (0, 0, 1), H, I),), (None,),
                  MatrixRef("w_out", (e, 0, 0), (0, 1, 0), (0, 0, 1), I, H), None)
        for e in (1, 3, 5)
    ]  # fmt: skip
    whole = LiveExpertWeights(root, refs, ("io", "io")).stacked()
    assert torch.equal(whole.w_in_s[0], root.w_in[1::2]) and torch.equal(whole.w_out_s, root.w_out[1::2])
    one = LiveExpertWeights(root, refs[:1], ("io", "io")).stacked()
    assert torch.equal(one.w_in_s[0], root.w_in[1:2])


def test_hooks_of_the_block_itself_do_not_matter():
    root, refs = stacked()
    bank = LiveExpertWeights(root, refs, ("oi", "oi"))
    before = bank.w_in(0)[0].data_ptr(), bank.lies()
    root.register_forward_hook(lambda *_: None)
    root.register_forward_pre_hook(lambda *_: None)
    assert (bank.w_in(0)[0].data_ptr(), bank.lies()) == before


def test_paths():
    root, refs = stacked()
    assert expert_paths(refs) == {"w_in", "w_out", "b"} and tensor_at(root, "b") is root.b
    inner, _ = listed()
    assert tensor_at(inner, "experts.2.0.bias") is inner.experts[2][0].bias


class Double(nn.Module):
    def forward(self, w):
        return w * 2


def parametrise(root):
    parametrize.register_parametrization(root.experts[0][0], "weight", Double())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: r.experts.__setitem__(0, nn.Sequential(nn.Linear(H, I), nn.ReLU(), nn.Linear(I, H))),
         "the module that holds experts.0.0.weight was replaced"),
        (lambda r: r.experts[0].__setitem__(0, nn.Linear(H, I)), "the module that holds experts.0.0.weight was replaced"),  # noqa: E501
        (lambda r: delattr(r.experts[0], "0"), "the module that holds experts.0.0.weight was replaced"),
        (parametrise, "experts.0.0.weight is no longer a plain Parameter (parametrised or removed)"),
        (lambda r: delattr(r.experts[0][0], "weight"), "experts.0.0.weight is no longer a plain Parameter"),
        (lambda r: r.double(), "experts.0.0.weight changed from torch.float32 (5, 4) to torch.float64 (5, 4)"),
        (lambda r: setattr(r.experts[0][0], "weight", nn.Parameter(torch.ones(2, H))),
         "experts.0.0.weight changed from torch.float32 (5, 4) to torch.float32 (2, 4)"),
        (lambda r: r.experts[0][0].register_forward_hook(lambda *a: None),
         "a forward hook was registered on the module that holds experts.0.0.weight"),
        (lambda r: r.experts[0][0].register_forward_pre_hook(lambda *a: None),
         "a forward hook was registered on the module that holds experts.0.0.weight"),
    ],
)  # fmt: skip
def test_a_changed_place_is_stale(change, text):
    root, refs = listed()
    bank = LiveExpertWeights(root, refs, ("oi", "oi"))
    bank.w_in(0)
    change(root)
    with pytest.raises(Stale) as caught:
        bank.w_in(0)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: delattr(r.experts, "1"), "the module that held experts.1.0.weight was removed"),
        (lambda r: delattr(r.experts[1][0], "weight"), "experts.1.0.weight is no longer a plain Parameter (quantised,"),
    ],
)
def test_a_bank_is_not_built_on_what_is_gone(change, text):
    root, refs = listed()
    change(root)
    with pytest.raises(Stale) as caught:
        LiveExpertWeights(root, refs, ("oi", "oi"))
    assert text in str(caught.value)


def test_weights_that_were_offloaded_are_stale():
    root, refs = listed()
    bank = LiveExpertWeights(root, refs, ("oi", "oi"))
    root.to("meta")
    with pytest.raises(Stale, match=r"experts.0.0.weight is on the meta device \(offloaded\?\) and has no values"):
        bank.w_in(0)


def test_a_stack_is_watched_as_its_experts_are():
    def changed(e):
        raise Stale(f"expert {e} was patched")

    root, refs = stacked()
    with pytest.raises(Stale, match="expert 0 was patched"):
        LiveExpertWeights(root, refs, ("io", "io"), changed).stacked()


def test_stacked_weights_that_are_looked_up_again_are_the_weights_of_now():
    """They are remembered between calls; whatever replaces a tensor or its memory is seen."""
    torch.manual_seed(0)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = torch.nn.Parameter(torch.randn(4, 6, 5)), torch.nn.Parameter(torch.randn(4, 5, 3))
            self.gate = torch.nn.Linear(5, 4, bias=False)

        def forward(self, x):
            w, ids = self.gate(x).softmax(-1).topk(2, -1)
            g, u = torch.einsum("tkoh,th->tko", self.w1[ids], x).chunk(2, -1)
            return torch.einsum("tkhi,tki,tk->th", self.w2[ids], torch.nn.functional.silu(g) * u, w)

    block, x = Block().eval(), torch.randn(7, 5)
    made = moeopt.optimize(block, x, verify="off", inplace=True).model
    forward = rewritten_forward(made)

    def same():
        want = type(made).forward(made, x)
        before = forward.fallbacks
        torch.testing.assert_close(made(x), want, rtol=1e-5, atol=1e-6)
        assert forward.fallbacks == before

    def replaced():
        made.w1 = torch.nn.Parameter(torch.randn(4, 6, 5))

    def other_memory():
        made.w2.data = torch.randn(4, 5, 3)

    def other_strides():
        made.w1.data = torch.randn(4, 5, 6).transpose(1, 2)

    def freed_and_made_again():
        for _ in range(20):
            made.w1 = None
            made.w1 = torch.nn.Parameter(torch.randn(4, 6, 5))

    changes = [lambda: made.w1.mul_(2), replaced, other_memory, other_strides, freed_and_made_again,
               lambda: made.load_state_dict(Block().state_dict()),
               lambda: made.w2.set_(torch.randn(4, 5, 3))]  # fmt: skip
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for change in changes:
            with torch.no_grad():
                same()
                change()
            with mode():
                same()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_that_are_gone_are_not_kept(mode):
    """Offloading takes a block's weights away after each call; what was remembered of them must not hold them."""
    root = nn.Module()
    root.w1, root.w2 = nn.Parameter(torch.randn(E, I, H)), nn.Parameter(torch.randn(E, H, I))
    refs = [
        ExpertRef(
            (MatrixRef("w1", (e, 0, 0), (0, 0, 1), (0, 1, 0), H, I),), (None,),
            MatrixRef("w2", (e, 0, 0), (0, 0, 1), (0, 1, 0), I, H), None,
        )
        for e in range(E)
    ]  # fmt: skip
    bank = LiveExpertWeights(root, refs, ("oi", "oi"))
    with mode():
        first = bank.stacked()
        assert first is not None and bank.stacked() is first
        assert first.w_in_s[0].data_ptr() == root.w1.data_ptr()
    storage, gone = weakref.ref(first.w_in_s[0]), weakref.ref(root.w1)
    del first
    root.w1 = nn.Parameter(torch.randn(E, I, H))
    gc.collect()
    assert gone() is None and storage() is None
    with mode():
        assert bank.stacked().w_in_s[0].data_ptr() == root.w1.data_ptr()


class AskedAtOnce(LiveExpertWeights):
    """Another thread lists the weights as soon as it sees that where they lie is worked out."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "_wholes" and value is not None:
            self.answers = []
            thread = threading.Thread(target=lambda: self.answers.append(self.listed()))
            thread.start()
            thread.join()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_two_threads_list_the_weights_for_the_first_time():
    bank = AskedAtOnce(*listed(), ("oi", "io"))
    assert bank.listed().num_experts == bank.answers[0].num_experts == 3


def test_whole_parameters_are_listed_as_they_are_now():
    root, refs = listed()
    bank = LiveExpertWeights(root, refs, ("oi", "io"))
    with torch.no_grad():
        first = bank.listed().w_in(1)[0].clone()
        root.experts[1][0].weight.data = root.experts[1][0].weight.data * 3
        now = bank.listed()
    for e in range(3):
        for one, other in ((now.w_in(e)[0], bank.w_in(e)[0]), (now.w_out(e), bank.w_out(e))):
            assert one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    assert torch.equal(now.w_in(1)[0], first * 3)
    root.experts[1][0].double()
    assert bank.listed() is None  # read by itself, it says what changed
    with pytest.raises(Stale, match=r"experts\.1\.0\.weight changed from torch\.float32"):
        bank.w_in(1)
