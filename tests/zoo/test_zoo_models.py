"""Every zoo model runs on its own calls and gives the same answer twice."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.zoo import CASES

FRESH = 4


def run(model, call, seed=0):
    args, kwargs = copy.deepcopy(call)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return model(*args, **kwargs)


def tensors(out):
    """All tensors of an output, dataclasses included, in a fixed order."""
    if hasattr(out, "__dataclass_fields__") and not isinstance(out, dict):
        out = {name: getattr(out, name) for name in out.__dataclass_fields__}
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", sorted(CASES))
def test_model_runs_and_is_deterministic(name):
    case = CASES[name]
    if name == "declined_meta_parameters":
        pytest.skip("meta tensors hold no values, so there is nothing to run")
    first, second = case.build(), case.build()
    for i in range(FRESH + 1):
        a, b = tensors(run(first, case.fresh(i))), tensors(run(second, case.fresh(i)))
        assert a and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)
            assert x.isfinite().all() and (i > 0 or x.float().abs().max() > 0)


@pytest.mark.parametrize("name", sorted(n for n in CASES if CASES[n].expect == "rewritten"))
def test_parameters_matter(name):
    """Guards the zoo itself: a case whose output ignores its weights would prove nothing."""
    case = CASES[name]
    model = case.build()
    before = [tensors(run(model, case.fresh(i))) for i in range(FRESH + 1)]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    after = [tensors(run(model, case.fresh(i))) for i in range(FRESH + 1)]
    assert any(not torch.equal(x, y) for b, a in zip(before, after, strict=True) for x, y in zip(b, a, strict=True))
