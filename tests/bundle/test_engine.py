"""What is asked of an engine as of a model, and an engine has not: the way out is said."""

import copy
import pickle

import pytest
import torch

import moeopt
from moeopt.errors import UsageError
from tests.toy_moe import X

ASKED = {
    "to": r"moeopt.load\(directory, device=...\) says where an engine runs",
    "half": r"moeopt.optimize\(model, inputs, dtype=...\) makes another",
    "train": "an engine only infers: train the model, and optimise it again",
    "eval": "an engine is in that mode always: leave it out",
    "parameters": "an engine has no modules: ask the model that it was made of",
    "generate": r"it was made of a model without a generate\(\) of its own, or without its cache",
}


@pytest.mark.parametrize("bundle", ["toy_bundle", "onnx_pristine"])
def test_what_an_engine_has_not(request, bundle):
    engine = moeopt.load(request.getfixturevalue(bundle))
    for name, way in ASKED.items():
        with pytest.raises(AttributeError, match=f"the engine has no attribute '{name}': {way}"):
            getattr(engine, name)
    with pytest.raises(AttributeError, match="the engine has no attribute 'no_such_thing'$"):
        engine.no_such_thing  # noqa: B018


@pytest.mark.parametrize("bundle", ["toy_bundle", "onnx_pristine"])
def test_a_copy_is_the_engine_and_a_pickle_its_bundle(request, bundle):
    engine = moeopt.load(request.getfixturevalue(bundle), "cpu", limits=moeopt.LoadLimits(seconds=70))
    assert copy.copy(engine) is engine and copy.deepcopy([engine])[0] is engine
    pickled = pickle.dumps(engine)
    again = pickle.loads(pickled)
    assert again.device == engine.device and len(pickled) < 1000
    if bundle == "toy_bundle":
        assert torch.equal(again(X), engine(X)) and again._runner.limits.seconds == 70


@pytest.mark.parametrize("bundle", ["toy_bundle", "onnx_pristine"])
def test_what_a_call_is_given_too_much_and_in_another_kind(request, bundle):
    engine = moeopt.load(request.getfixturevalue(bundle))
    with pytest.raises(UsageError, match="it was given 4 by position, extra$"):
        engine(*[X] * 4, extra=X)
    rest = [torch.ones(3, 5)] * (bundle != "toy_bundle")
    with pytest.raises(UsageError, match=r"must be a tensor, not a ndarray: give torch.as_tensor\(x\)$"):
        engine(X.numpy(), *rest)
    with pytest.raises(UsageError, match="must be a tensor, not a list$"):
        engine(X.tolist(), *rest)
