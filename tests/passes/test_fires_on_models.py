"""Passes that tidy a block up fire on models of the zoo, as their authors wrote them, and are verified there."""

import pytest

from moeopt.passes.drop_copies import DropCopies
from moeopt.passes.fold_expert_scale import FoldExpertScale
from tests.recognise.tiny import through
from tests.zoo import CASES


@pytest.mark.parametrize(
    ("model", "one"), [("capacity_nano_moe_ample", DropCopies()), ("around_no_grad_forward", FoldExpertScale())]
)
def test_it_fires_on_a_model(model, one):
    (x,), kwargs = CASES[model].inputs()
    _, records = through(CASES[model].build, one, x=x)
    record = records[one.name]
    assert not kwargs and (record.fired, record.verified, record.reason) == (1, True, "")
