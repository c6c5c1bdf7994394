"""``QuantPlan(activations="int8")`` on the torch backend: verified with float rows, then rounded, told and measured."""

import copy
import json
import pickle

import pytest
import torch

import moeopt
from moeopt import QuantPlan
from moeopt.errors import NotEquivalentError
from moeopt.ops.native.library import library
from moeopt.quantization import rounded_rows
from moeopt.rewrite.store_codes import codes_of
from moeopt.verification.certificate import Certificate
from tests.toy_moe import Block

X = torch.randn(30, 16, generator=torch.Generator().manual_seed(3))
PLAN = QuantPlan(default="int4", activations="int8")


@pytest.fixture(scope="module", autouse=True)
def _kernel():
    if library() is None:
        pytest.skip("there is no native kernel here")


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return Block().eval().to(dtype)


def optimized(plan, source=None, **fields):
    source = model() if source is None else source
    x = X.to(next(source.parameters()).dtype)
    return moeopt.optimize(source, x, quantize=plan, **{"verify": "fast", **fields})


def rounds(module):
    return [bank.rounds for part in module.modules() for bank in codes_of(part)]


@pytest.fixture(scope="module")
def rounding():
    return optimized(PLAN)


@pytest.fixture(scope="module")
def floats():
    return optimized("int4")


def test_rows_are_rounded_after_the_model_was_verified_and_the_loss_counts_it(rounding, floats):
    certificate, before = rounding.certificate, floats.certificate
    assert certificate.passed is True and certificate.equivalent is False and before.activations == {}
    assert certificate.end_to_end.distance <= certificate.end_to_end.budget  # of the form with float rows
    with torch.no_grad():
        got, near, want = rounding(X), floats(X), model()(X)
    told, off = certificate.activations, (got - near).norm(dim=-1) / near.norm(dim=-1)
    assert rounds(rounding.model) == [True] and rounds(floats.model) == [False]
    assert 1e-4 < off.max() < 0.05 and told["outputs"] == pytest.approx(float(off.max()), rel=1e-4)
    assert told["kinds"] == 1 and told["products"] == 3 * len(model().experts)
    assert told["error_eps"] < 64 and 1e-3 < told["product"] < 0.05
    assert certificate.loss["error_mean"] != before.loss["error_mean"]
    lost = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert certificate.loss["error_mean"] == pytest.approx(float(lost.mean()), rel=1e-3)
    assert "products of codes round what they read to int8" in " ".join(str(certificate).split())
    assert Certificate.from_json(certificate.to_json()).activations == told


def test_copies_round_too(rounding):
    want = rounding(X)
    for other in (copy.deepcopy(rounding.model), pickle.loads(pickle.dumps(rounding.model))):
        assert rounds(other) == [True] and torch.equal(other(X), want)
    source = model()
    inside = optimized(PLAN, source, inplace=True)
    assert inside.model is source and rounds(source) == [True] and torch.equal(source(X), want)


def test_a_bundle_rounds_too(rounding, tmp_path):
    folder = rounding.save(tmp_path / "b")
    assert torch.equal(moeopt.load(folder)(X), rounding(X))
    again = moeopt.verify(folder)
    assert again.passed is True and again.activations == rounding.certificate.activations
    golden = json.loads((folder / "moeopt.json").read_text())["golden"]
    told, end = again.activations, rounding.certificate.end_to_end
    assert golden["distance"] == max(end.budget, min(told["outputs"], told["product"]))


def test_it_is_verified_again_with_float_rows(rounding):
    assert moeopt.verify(rounding, original=model()).passed is True
    assert rounds(rounding.model) == [True]  # as it was before
    with pytest.raises(RuntimeError, match="in the middle"), rounded_rows.reading_floats(rounding.model) as form:
        assert form is rounding.model and rounds(form) == [False]
        raise RuntimeError("in the middle")
    assert rounds(rounding.model) == [True]


def test_a_limit_judges_rounded_rows(floats):
    mean = floats.certificate.loss["error_mean"]
    opt = optimized(PLAN, limit={"error_mean": mean / 2})
    assert opt.certificate.passed is False and opt.certificate.activations


def test_rows_of_16_bits_are_rounded_in_float32():
    opt = optimized(QuantPlan(default="int8", activations="int8"), model(torch.bfloat16))
    assert opt.certificate.passed is True and opt.certificate.activations["error_eps"] < 64
    assert rounds(opt.model) == [True]


def test_a_gradient_is_that_of_float_rows(rounding, floats):
    found = []
    for one in (rounding, floats):
        x = X.clone().requires_grad_()
        one(x).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=0.1, atol=0.05)  # the router's share is of rounded outputs
    assert found[0].abs().max() > 0


def _left(opt, words, plan):
    plain = optimized(plan)
    assert opt.certificate.activations == {} and opt.certificate.passed is True
    assert torch.equal(opt(X), plain(X)) and not any(rounds(opt.model))
    for notes in (opt.report.notes, opt.certificate.notes):
        assert sum(words in note for note in notes) == 1, notes


def test_a_format_that_the_kernel_does_not_read_keeps_float_rows():
    opt = optimized(QuantPlan(default="fp8", activations="int8"))
    _left(opt, "activations stay floats in Block: the kernel reads int8, 8-bit codes about 128 and int4 with", "fp8")


def test_without_a_kernel_rows_stay_floats(monkeypatch):
    monkeypatch.setattr(rounded_rows, "library", lambda: None)
    monkeypatch.setattr(rounded_rows, "missing", lambda: "no C++ compiler was found; install one (apt install g++)")
    opt = optimized(PLAN)
    _left(opt, "Block: moeopt's kernel rounds them, and is not used: no C++ compiler was found", "int4")


def test_a_kernel_that_rounds_otherwise_is_not_used(monkeypatch):
    monkeypatch.setattr(rounded_rows, "rounded_error", lambda run, isa, format: (900.0, 0.1))
    opt = optimized(PLAN)
    _left(opt, "activations stay floats in Block: the kernel is 900 eps from what rounding", "int4")


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_an_engine_of_a_float64_model_has_no_codes(activations):
    pytest.importorskip("onnxruntime")
    plan = QuantPlan(default="int8", activations=activations)
    with pytest.raises(NotEquivalentError, match="Block is of float64, and an engine's codes have scales and products"):
        moeopt.optimize(model(torch.float64), X.double(), backend="onnxruntime", quantize=plan, verify="fast")


def test_a_float64_model_keeps_float_rows():
    opt = optimized(PLAN, model(torch.float64))
    assert opt.certificate.activations == {} and not any(rounds(opt.model))
    assert any("activations stay floats in Block" in note for note in opt.report.notes)


def test_where_nothing_is_in_codes_a_note_says_so():
    opt = optimized(QuantPlan(activations="int8"))
    assert opt.certificate.activations == {} and opt.certificate.equivalent is True
    assert "activations stay floats: no experts of this model are in codes" in opt.report.notes
