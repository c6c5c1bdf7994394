"""What a golden run of a saved model may come back with: what verification measured that rounding moves it by."""

import json

from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moeopt
from tests.backends.onnxrt.toys import call, net, reseal

EPS = 2.0**-23


def _shifted(bundle, factor):
    """The bundle with another golden result, and the verdict on it."""
    path = bundle / "golden.safetensors"
    tensors, plain = load_file(path), safe_open(path, "pt").metadata()
    tensors["0.out.0"] *= factor
    save_file(tensors, path, plain)
    return moeopt.verify(reseal(bundle))


def test_the_budget_is_that_of_the_verification(tmp_path):
    made = moeopt.optimize(net(), call(), verify="fast")
    bundle, budget = made.save(tmp_path / "b"), made.certificate.end_to_end.budget
    assert json.loads((bundle / "moeopt.json").read_text())["golden"]["distance"] == budget > 8 * EPS
    assert _shifted(bundle, 1 + (budget + 8 * EPS) / 2).end_to_end.passed  # another form of a graph may round so
    wrong = _shifted(bundle, 1.001).end_to_end
    assert wrong.passed is False and f"where {budget:.2e} is allowed" in wrong.reason


def test_without_a_verification_it_is_8_eps(tmp_path):
    bundle = moeopt.optimize(net(), call(), verify="off").save(tmp_path / "b")
    assert json.loads((bundle / "moeopt.json").read_text())["golden"]["distance"] is None
    assert moeopt.verify(bundle).end_to_end.budget == 8 * EPS
