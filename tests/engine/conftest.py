"""What tests of ONNX Runtime bundles share: one engine and its bundle, made once."""

import shutil

import pytest


@pytest.fixture(scope="session")
def onnx_optimized():
    pytest.importorskip("onnxruntime")
    from tests.backends.onnxrt.toys import optimized

    return optimized()


@pytest.fixture(scope="session")
def onnx_pristine(onnx_optimized, tmp_path_factory):
    """A bundle that no test may write to."""
    return onnx_optimized.save(tmp_path_factory.mktemp("pristine") / "b")


@pytest.fixture
def onnx_bundle(onnx_pristine, tmp_path):
    """A copy of it."""
    return shutil.copytree(onnx_pristine, tmp_path / "b")
