"""A torch bundle of experts that are a function of a row: written out, with no op and no graph of its own in it."""

import json

import pytest
import torch

import moeopt
from tests.helpers import assert_same, run
from tests.zoo import CASES

NAMES = [
    "row_adapters",
    pytest.param("row_stacked_bank_with_norm", marks=pytest.mark.one_isa),
    "row_norm_inside_bfloat16",
]


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name, tmp_path):
    case = CASES[name]
    opt = moeopt.optimize(case.build(), case.inputs()[0])
    assert [b.status for b in opt.report.blocks if b.kind == "moe"] == ["rewritten"]
    opt.save(tmp_path / "b")
    loaded = moeopt.load(tmp_path / "b")
    for i in range(4):
        assert_same(run(loaded, case.fresh(i)), run(case.build(), case.fresh(i)))
    assert moeopt.verify(tmp_path / "b").passed is True
    ops = {node["op"] for node in json.loads((tmp_path / "b" / "graph.json").read_text())["nodes"]}
    assert not any(op.startswith("moeopt.") for op in ops) and "aten.nonzero.default" in ops


def test_training_goes_on_through_the_rewritten_experts():
    """Two steps of SGD on the rewritten model and on its twin give the same weights, compiled or not."""
    case = CASES["row_adapters"]
    (x,), _ = case.inputs()
    original, given = case.build(), case.build()
    opt = moeopt.optimize(given, x, inplace=True)
    for model in (original, opt.model):
        step = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            step.zero_grad()
            model(x).square().mean().backward()
            step.step()
    for (name, a), b in zip(original.named_parameters(), opt.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=name)
