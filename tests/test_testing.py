"""assert_equivalent: what it accepts, and what its text says of what differs."""

import copy
import warnings

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import UsageError
from moeopt.testing import assert_equivalent, check_bundle, compare, facts, providers
from tests.toy_moe import X, build, optimized, seeded
from tests.verification.tiny import TinyMoE, Twin


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def fast(model):
    return optimized(model, verify="fast")


def wrong(factor=1.01):
    """The same classes, one weight of one expert 1 % off."""
    model = build()
    with torch.no_grad():
        model.experts[1].w1.weight.mul_(factor)
    return model


class Layered(nn.Module):
    """A plain layer around a block that may be exchanged."""

    def __init__(self, block):
        super().__init__()
        self.before, self.mlp = nn.Linear(16, 16), block

    def forward(self, x):
        return self.mlp(self.before(x))


def layered(damage=None):
    torch.manual_seed(0)
    moe = TinyMoE()
    return Layered(moe if damage is None else Twin(moe, damage)).eval()


def test_an_optimized_model_block_by_block_and_end_to_end(model, fast):
    certificate = assert_equivalent(model, fast, seeded(3, 5, 16))
    (block,) = certificate.blocks
    assert {c.name for c in block.cases} > {"every expert", "exact ties", "the given inputs"}
    assert block.experts_seen == 4 and certificate.end_to_end.tokens == 15
    assert [c.name for c in compare(model, fast, X, verify="fast").blocks[0].cases][3:] == ["the given inputs"]
    assert compare(model, fast.model, X).passed and compare(model, fast, X, blocks=()).blocks == []


def test_an_optimized_model_whose_weights_changed(fast):
    with pytest.raises(AssertionError) as failure:
        assert_equivalent(wrong(), fast, X)
    text = str(failure.value)
    assert text.startswith("not equivalent\n  block Block: case 'every expert': the output of token")
    for words in ("  end to end: output 0 moves by 0.011", "  tolerance required: 0.011", " is allowed)", "in Block"):
        assert words in text


def test_a_bundle_and_a_loaded_engine(model, toy_bundle):
    for engine in (toy_bundle, str(toy_bundle), moeopt.load(toy_bundle)):
        assert assert_equivalent(model, engine, X).passed
        with pytest.raises(AssertionError, match="tolerance required: 0.011"):
            assert_equivalent(wrong(), engine, X)


def test_two_plain_modules_are_compared_where_their_classes_differ():
    certificate = assert_equivalent(layered(), layered(""), seeded(2, 5, 16))
    assert [b.name for b in certificate.blocks] == ["mlp"] and certificate.blocks[0].ids_compared > 100
    with pytest.raises(AssertionError, match="block mlp: case 'every expert': .* a factor .* would be needed"):
        assert_equivalent(layered(), layered("swap gate and up"), seeded(2, 5, 16))


def test_damage_below_the_end_to_end_budget_is_found_in_its_block():
    """A small epsilon in the renormalisation: in bfloat16 only the float64 run of the block shows it."""
    original, damaged = (m.to(torch.bfloat16) for m in (layered(), layered("epsilon")))
    certificate = compare(original, damaged, seeded(2, 5, 16).bfloat16())
    assert certificate.end_to_end.passed and not certificate.blocks[0].passed
    assert "it is another function, and rounding hides it" in certificate.blocks[0].reason


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.01), (torch.bfloat16, 1.05)])
def test_of_one_class_the_modules_with_other_weights_are_compared(model, dtype, factor):
    """In bfloat16, 5 % of one weight are within the budget end to end: its block's float64 run shows them."""
    certificate = compare(copy.deepcopy(model).to(dtype), wrong(factor).to(dtype), X.to(dtype))
    (block,) = certificate.blocks
    assert block.name == "experts.1.w1" and block.passed is False
    assert certificate.end_to_end.passed is (dtype is torch.bfloat16)
    assert compare(model, build(), X).passed


def test_of_one_class_and_one_set_of_weights_the_first_submodule_that_parts_is_named():
    one, other = layered(), layered()
    other.mlp.route = Twin(other.mlp, "drop renormalise").route
    certificate = compare(one, other, seeded(2, 5, 16))
    assert certificate.blocks == [] and certificate.passed is False
    (note,) = certificate.notes
    assert "the first submodule that gets the same and gives another result: mlp (" in note


def test_a_block_that_is_never_called_is_not_verified():
    class Idle(Layered):
        def forward(self, x):
            return self.before(x)

    torch.manual_seed(0)
    model = Idle(TinyMoE()).eval()
    with pytest.raises(AssertionError, match="^not verified"):
        assert_equivalent(model, copy.deepcopy(model), X, blocks=["mlp"])


def test_a_refused_call_is_not_a_comparison(model, fast):
    """The rewritten block falls back to its original code in float64: equal, and nothing was compared."""
    double = copy.deepcopy(fast)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", moeopt.errors.StaleModelWarning)
        certificate = compare(copy.deepcopy(model).double(), double.model.double(), X.double())
    assert certificate.blocks[0].passed is False
    assert "refused a case and ran the original code instead" in certificate.blocks[0].reason


def test_wrong_use(model, fast):
    inplace = build()
    moeopt.optimize(inplace, X, inplace=True, verify="fast")
    for args, text in [
        ((inplace, fast, X), "the original was itself optimised"),
        ((fast, fast, X), "original is a Optimized; give the nn.Module"),
        ((model, lambda x: x, X), "optimized is a function; give what moeopt returned"),
    ]:
        with pytest.raises(UsageError, match=text):
            assert_equivalent(*args)
    with pytest.raises(UsageError, match="blocks='nowhere': the original has none"):
        assert_equivalent(model, fast, X, blocks=["nowhere"])


def test_checking_a_bundle(toy_bundle, tmp_path):
    check = check_bundle(toy_bundle, "cpu", toy_bundle / "certificate.json")
    assert check.failure() == "" and check.certificate.passed
    assert facts(check.certificate)["tolerance_required"] == "0.000e+00"
    assert facts(check.certificate)["version.torch"] == torch.__version__
    assert {type(value) for value in facts(check.certificate).values()} == {str}, "pytest-xdist sends no other class"
    assert providers(toy_bundle)["cpu"] == ""
    stored = tmp_path / "stored.json"
    text = (toy_bundle / "certificate.json").read_text()
    assert '"name": "Block"' in text
    stored.write_text(text.replace('"name": "Block"', '"name": "layers.7"'))
    assert check_bundle(toy_bundle, against=stored).failure() == (
        "worse than the stored certificate:\n"
        "  layers.7: the block: was rewritten and verified, is not in the certificate"
    )
