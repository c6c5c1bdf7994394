"""ONNX Runtime's own options reach the session, when an engine is made and when a bundle is loaded."""

import copy
from pathlib import Path

import pytest
import torch

import moeopt
from examples.quickstart import TwoOfEight
from moeopt.backends.onnxrt.session import FLOAT_ROWS
from moeopt.errors import UsageError

pytestmark = pytest.mark.one_isa  # options of sessions

ort = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TwoOfEight(16, 32, 4).eval()


def two_threads():
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    return options


def test_options_reach_the_session(model, tmp_path):
    x = torch.randn(2, 5, 16)
    opt = moeopt.optimize(model, x, backend="onnxruntime", verify="fast", session_options=two_threads())
    assert opt.model.session.session.get_session_options().intra_op_num_threads == 2
    loaded = moeopt.load(opt.save(tmp_path / "bundle"), session_options=two_threads())
    assert loaded.session.session.get_session_options().intra_op_num_threads == 2
    assert torch.equal(loaded(x), opt(x))


def test_a_torch_bundle_has_no_session(model, tmp_path):
    opt = moeopt.optimize(model, torch.randn(2, 5, 16), verify="fast")
    with pytest.raises(UsageError, match="session_options are ONNX Runtime's, and .* is a bundle for PyTorch"):
        moeopt.load(opt.save(tmp_path / "bundle"), session_options=two_threads())


def test_what_moeopt_adds_to_the_options_of_the_user_s_is_what_the_docs_say(model, tmp_path):
    """They cannot be copied: an entry that is set stays, and the one that keeps rows floats is added."""
    opt = moeopt.optimize(model, torch.randn(2, 5, 16), backend="onnxruntime", verify="fast")
    bundle, options = opt.save(tmp_path / "bundle"), ort.SessionOptions()
    with pytest.raises(TypeError):
        copy.copy(options)
    moeopt.load(bundle, session_options=options)
    assert options.get_session_config_entry(FLOAT_ROWS) == "1"
    own = ort.SessionOptions()
    own.add_session_config_entry(FLOAT_ROWS, "4")
    moeopt.load(bundle, session_options=own)
    assert own.get_session_config_entry(FLOAT_ROWS) == "4"
    said = (Path(__file__).parents[3] / "docs" / "backends.md").read_text()
    assert f'`{FLOAT_ROWS}` = "1"' in said and "are used, not copied" in said


def test_a_model_that_returns_no_tensor_is_refused(model):
    class Nothing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            self.inner(x)

    with pytest.raises(
        moeopt.BundleError, match=r"Nothing returns no tensor, and an engine gives nothing else: return"
    ):
        moeopt.optimize(Nothing().eval(), torch.randn(2, 5, 16), backend="onnxruntime", verify="off")
