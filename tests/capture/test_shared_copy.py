"""A shared copy has its own modules and the same tensors."""

import functools
import types

import pytest
import torch
from torch import nn

from moeopt.capture.shared_copy import shared_copy
from moeopt.errors import UsageError
from tests.capture.tiny import rand
from tests.recognise.tiny import H, MoE, seeded


def test_one_set_of_weights():
    model = seeded(MoE)
    model.register_buffer("load", torch.zeros(4))
    twin = shared_copy(model)
    assert twin is not model and twin.experts[0] is not model.experts[0] and type(twin) is MoE
    for (name, a), b in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert a is b, name
    assert twin.load is model.load
    twin.note = 1
    twin.experts[0].register_forward_hook(lambda *a: None)
    assert not hasattr(model, "note") and not model.experts[0]._forward_hooks
    x = rand(5, H)
    assert torch.equal(twin(x), model(x))


class Locked(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("holds a file")


def test_what_cannot_be_copied():
    with pytest.raises(
        UsageError, match=r"Locked cannot be copied \(TypeError: holds a file\), and moeopt works on a copy that"
    ):
        shared_copy(Locked(2, 2))


def closure(model):
    inner = model.router
    return lambda x: inner(x)


@pytest.mark.parametrize(
    "patch",
    [
        closure,
        lambda m: functools.partial(lambda x, f=None: f(x), f=closure(m)),
    ],
)
def test_a_patch_that_holds_on_to_the_original(patch):
    model = seeded(MoE)
    model.experts[1].forward = patch(model)
    text = "forward of experts.1 was replaced by a function that holds on to the original module, so a copy would silently run"  # noqa: E501
    with pytest.raises(UsageError, match=text):
        shared_copy(model)


def test_a_bound_method_is_copied_with_its_module():
    model = seeded(MoE)
    model.experts[1].forward = types.MethodType(
        lambda self, x: self[0](x).relu() @ self[2].weight.t(), model.experts[1]
    )
    twin = shared_copy(model)
    assert twin.experts[1].forward.__self__ is twin.experts[1]
    bound = seeded(MoE)
    bound.experts[1].forward = functools.partial(lambda child, x: child(x), bound.router)
    twin = shared_copy(bound)
    assert twin.experts[1].forward.args[0] is twin.router
    free = seeded(MoE)
    free.experts[0].forward = lambda x: x * 2
    assert torch.equal(shared_copy(free).experts[0](rand(2, H)), rand(2, H) * 2)
