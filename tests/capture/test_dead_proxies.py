"""A model that holds a weak proxy whose object is gone, as of the trainer that trained it."""

import weakref

import pytest
import torch

import moeopt
from moeopt.capture.dead_proxies import Gone, set_aside
from tests.toy_moe import Block, H, build


class Owner:
    name = "owner"


def left(how):
    owner, model = Owner(), build(Block)
    proxy = weakref.proxy(owner)
    if how == "attribute":
        model.owner = proxy
    else:
        model.known = {"owners": [1, proxy]}
    return model


@pytest.mark.sample(3)
@pytest.mark.parametrize("how", ["attribute", "container"])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_model_is_optimised_as_if_it_held_none(how, inplace):
    model, x = left(how), torch.randn(6, H)
    opt = moeopt.optimize(model, x, verify="fast", inplace=inplace)
    assert opt.report.rewritten and opt.certificate.passed
    with torch.no_grad():
        assert torch.equal(opt(x), build(Block)(x)) or torch.allclose(opt(x), build(Block)(x), atol=1e-6)
    assert moeopt.inspect(left(how)).kinds


def test_a_proxy_that_dies_later_does_not_stop_a_call():
    owner, model, x = Owner(), build(Block), torch.randn(6, H)
    model.owner = weakref.proxy(owner)
    opt = moeopt.optimize(model, x, verify="fast")
    del owner
    model.unlike = 1  # the source is looked at again
    assert opt(x).isfinite().all()


def test_afterwards_the_model_holds_it_again_and_use_raises():
    model = left("attribute")
    dead = model.__dict__["owner"]
    with set_aside(model):
        stands_in = model.__dict__["owner"]
        assert isinstance(stands_in, Gone) and not hasattr(stands_in, "__len__")
        with pytest.raises(ReferenceError, match="no longer exists"):
            _ = stands_in.name
    assert type(model.__dict__["owner"]) is type(dead)
