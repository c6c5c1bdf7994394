"""``QuantPlan.search``: the plan keeps its budget, spends bytes where they save most, and optimize takes it."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import UsageError
from tests.toy_moe import build
from tests.trained_lm import load, text

X = torch.randn(40, 16, generator=torch.Generator().manual_seed(3))


class Uneven(nn.Module):
    """The second block's result is scaled down: what its experts lose hardly matters."""

    def __init__(self):
        super().__init__()
        self.a, self.b = build(), build()

    def forward(self, x):
        return self.a(x) + 1e-3 * self.b(x)


def search(**fields):
    return moeopt.QuantPlan.search(Uneven().eval(), X, **fields)


def test_bytes_go_where_they_save_most():
    # a block is 3 * 4 * 16 * 16 weights: 3840 bytes as int8 with its scales, 1920 as int4
    plan = search(budget={"bytes": 6000})
    assert plan.blocks == {"a": "int8", "b": "int4"} and plan.default == "float"
    assert set(plan.costs) == {"a", "b"} and plan.costs["a"]["int4"] > 10 * plan.costs["b"]["int4"]
    assert search(budget={"bytes": 3840}).blocks == {"a": "int4", "b": "int4"}
    assert search(budget={"bytes": 1e9}).blocks == {"a": "float", "b": "float"}


def test_a_limit_is_kept_with_few_bytes():
    model, plan = Uneven().eval(), search(budget={"error_mean": 0.02})
    assert plan.blocks == {"a": "int8", "b": "int4"}
    opt = moeopt.optimize(model, X, quantize=plan, limit={"error_mean": 0.02})
    assert opt.certificate.passed is True and opt.certificate.loss["error_mean"] <= 0.02
    assert search(budget={"error_mean": 1.0}).blocks == {"a": "int4", "b": "int4"}
    assert search(budget={"error_mean": 0.0}).blocks == {"a": "float", "b": "float"}


def test_other_formats():
    assert set(search(budget={"bytes": 3500}, formats=("mxfp4",)).blocks.values()) == {"mxfp4"}


def test_a_trained_model():
    """Layer 0 is the sensitive one: 8 bits there, 4 in layer 1, lose a fifth of what 4 bits lose everywhere."""
    pytest.importorskip("transformers")
    model, data = load("moe"), {"input_ids": text()}
    plan = moeopt.QuantPlan.search(model, data, budget={"kl_mean": 0.003})
    assert plan.blocks == {"model.layers.0.mlp.experts": "int8", "model.layers.1.mlp.experts": "int4"}
    assert plan == moeopt.QuantPlan.search(model, data, budget={"bytes": 170e3})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"budget": {}}, "budget={}: it must be one limit, like {'kl_mean': 0.01} or {'bytes': 2e9}"),
        ({"budget": {"kl_mean": 1, "bytes": 1}}, "it must be one limit"),
        ({"budget": {"klmean": 1}}, "budget names 'klmean', which is no figure: did you mean"),
        ({"budget": {"kl_mean": 1}}, "limit names kl_mean, and the model returns no next-token logits"),
        ({"budget": {"bytes": -1}}, "budget['bytes']=-1: it must be a number of bytes above 0"),
        ({"budget": {"bytes": 10}}, "budget['bytes']=10: the experts take 3840 bytes in the smallest of these formats"),
        ({"budget": {"bytes": 10}, "formats": ("int3",)}, "formats='int3' is no format"),
    ],
)
def test_refusals(fields, words):
    with pytest.raises(UsageError) as err:
        search(**fields)
    assert words in str(err.value), err.value


def test_a_model_without_experts():
    with pytest.raises(UsageError, match="no block of the model can be quantised"):
        moeopt.QuantPlan.search(nn.Linear(16, 16).eval(), X, budget={"bytes": 10})
