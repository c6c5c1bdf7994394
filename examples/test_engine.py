"""An equivalence test for a user's own CI: a saved bundle against the model it came from.

    pytest examples/test_engine.py

``BUNDLE`` names a bundle that exists; without it, one is made first, as a release job would.
"""

import os
from pathlib import Path

import pytest
import torch

import moeopt
from examples.quickstart import TwoOfEight


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TwoOfEight().eval()


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    if "BUNDLE" in os.environ:
        return Path(os.environ["BUNDLE"])
    folder = tmp_path_factory.mktemp("release") / "bundle"
    return moeopt.optimize(model, torch.randn(2, 16, 64), backend="onnxruntime").save(folder)


def test_the_bundle_still_computes_what_it_did(bundle):
    certificate = moeopt.verify(bundle)
    assert certificate.passed and certificate.executed, str(certificate)


@pytest.mark.parametrize("shape", [(1, 1), (3, 40)])
def test_the_bundle_computes_what_the_model_does(bundle, model, shape):
    certificate = moeopt.verify(bundle, original=model, inputs=torch.randn(*shape, 64))
    assert certificate.passed, str(certificate)
