"""Every zoo model runs on its own calls and gives the same answer twice."""

import os

import pytest
import torch

from tests.helpers import run, tensors
from tests.zoo import CASES

FRESH = 4 if os.environ.get("MOEOPT_NIGHTLY") == "1" else 1


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
