"""What stands in the way of a rewrite is said before it is tried."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from moeopt.capture.random_ops import random_reason
from moeopt.capture.tape import record
from moeopt.errors import Declined
from moeopt.recognise.experts import recognize
from moeopt.rewrite.legality import check_experts, check_module
from tests.capture.tiny import rand
from tests.recognise.tiny import H, I, MoE, ffn, seeded


class Subclass(torch.Tensor):
    pass


def test_a_plain_module_passes():
    check_module(seeded(MoE))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: torch.jit.trace(ffn(), rand(2, H)), "it is a TorchScript module, whose code cannot be traced; pass the Python"),  # noqa: E501
        (lambda: MoE().to("meta"), "router.weight is on the meta device and has no values; load the weights first"),
        (lambda: _with_buffer(rand(2).as_subclass(Subclass)),
         "table is a Subclass, which the op cannot read; convert it to a plain tensor"),
        (lambda: _with_parameter(rand(2, 2).to_sparse()),
         "table is a Parameter of torch.sparse_coo, whose numbers neither the op nor an engine reads; give the dense"),
    ],
)  # fmt: skip
def test_parameters_that_cannot_be_probed(make, text):
    with pytest.raises(Declined) as caught:
        check_module(make())
    assert text in caught.value.reason


def _with_buffer(tensor):
    module = ffn()
    module.register_buffer("table", tensor)
    return module


def _with_parameter(tensor):
    module = ffn()
    module.table = nn.Parameter(tensor)
    return module


class Double(nn.Module):
    def forward(self, w):
        return w * 1


def checked(prepare):
    module = seeded(MoE)
    prepare(module)
    tape = record(module, (rand(24, H, seed=7),))
    found = recognize(tape)
    check_experts(module, tape, found)


def wrapped(forward):
    """As a library wraps a layer's code: its module says torch, its code is elsewhere."""
    return functools.wraps(forward)(lambda x: forward(x))


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda m: m.experts[1][1].register_forward_hook(lambda *a: None), "experts.1.1 has a forward or backward hook, which "  # noqa: E501
         "would no longer fire for each expert; remove the hook or leave this block as it is"),
        (lambda m: m.experts[1].register_forward_hook(lambda *a: None), "experts.1 has a forward or backward hook"),
        (lambda m: m.experts[1][0].register_forward_pre_hook(lambda *a: None), "experts.1.0 has a forward or backward hook"),  # noqa: E501
        (lambda m: m.experts[3][2].register_full_backward_hook(lambda *a: None), "experts.3.2 has a forward or backward hook"),  # noqa: E501
        (lambda m: setattr(m.experts[2][0], "forward", m.experts[2][0].forward),
         "forward was replaced on the instance experts.2.0; undo the patch and optimise again"),
        (lambda m: setattr(m.experts[2], "forward", m.experts[2].forward),
         "forward was replaced on the instance experts.2; undo the patch"),
        (lambda m: setattr(m.experts[2][0], "forward", wrapped(m.experts[2][0].forward)),
         "experts.2.0; undo the patch and optimise again (it is one of tests: if that is a quantiser, load the model"),
        (lambda m: m.experts.__setitem__(2, torch.compile(m.experts[2], backend="eager")),
         "experts.2 is compiled by torch.compile, one expert alone; optimise first and compile the result"),
    ],
)  # fmt: skip
def test_what_would_be_skipped_is_declined(prepare, text):
    with pytest.raises(Declined) as caught:
        checked(prepare)
    assert text in caught.value.reason


def test_hooks_elsewhere_are_no_obstacle():
    checked(lambda m: m.router.register_forward_hook(lambda *a: None))
    checked(lambda m: m.register_forward_hook(lambda *a: None))


class Raw(nn.Module):
    """Parametrised by hand: the plain Parameter beneath is what the product reads."""

    def forward(self, w):
        return w.t().contiguous().t()


def test_a_parametrised_expert_is_declined():
    def prepare(module):
        for e in module.experts:
            parametrize.register_parametrization(e[0], "weight", Raw())

    with pytest.raises(Declined) as caught:
        checked(prepare)
    text = caught.value.reason
    assert "is parametrised; remove it with torch.nn.utils.parametrize.remove_parametrizations" in text


def test_weights_in_an_odd_dtype_are_named():
    module = seeded(MoE)
    tape = record(module, (rand(24, H, seed=7),))
    found = recognize(tape)
    module.experts[0][0].weight = nn.Parameter(torch.zeros(I, H, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        Declined, match="experts.0.0.weight is torch.int8; only float32, float64, bfloat16 and float16 are"
    ):
        check_experts(module, tape, found)


class Noisy(MoE):
    def route(self, x):
        w, ids = (self.router(x) + torch.randn(len(x), 4)).softmax(-1).topk(2)
        return w, ids


class UnusedNoise(MoE):
    def forward(self, x):
        torch.rand(3)
        return super().forward(x)


def test_random_numbers_are_told_with_their_line():
    x = rand(24, H, seed=7)
    text = random_reason(record(seeded(Noisy), (x,)), training=False)
    assert text.startswith("its forward is random at inference (randn at ") and "test_legality.py:" in text
    assert text.endswith("so no two runs agree; switch the noise off for inference and optimise again")
    text = random_reason(record(seeded(Noisy).train(), (x,)), training=True)
    assert text.startswith("its forward is random in training mode (randn at ") and text.endswith(
        "model.eval() before optimising"
    )
    assert random_reason(record(seeded(UnusedNoise), (x,)), training=False) == ""
    assert random_reason(record(seeded(MoE), (x,)), training=False) == ""
