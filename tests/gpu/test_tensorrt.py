"""TensorRT engines on a CUDA GPU: built for it, run, compared with the original, saved, verified.

An engine that a machine without a GPU wrote is executed by verifying its bundle here: its golden runs decide.
"""

import pytest
import torch

import moeopt
from moeopt.backends.tensorrt.product import product
from moeopt.backends.tensorrt.target import RTX_BUILDS, local_target
from moeopt.errors import UsageError
from tests.gpu.blocks import language_model, mixture, tokens


def why_not():
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, and a torch that sees it"
    try:
        target = local_target()
        product(target.product)
    except UsageError as err:
        return str(err)
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def skip_refused(dtype):
    if dtype != torch.float16 and local_target().sm < 80:
        pytest.skip(f"TensorRT for RTX multiplies in float16 only on {local_target()}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_runs_is_saved_and_verifies(dtype, tmp_path):
    skip_refused(dtype)
    model, x = mixture(dtype), tokens(24, dtype)
    done = moeopt.optimize(model, x, backend="tensorrt")
    print(done.report, done.certificate, sep="\n")
    assert done.certificate.passed and done.certificate.executed
    assert done.certificate.device == f"{local_target().product} {local_target()}"
    assert done(x).device.type == "cuda" and done(x.cuda()).dtype == dtype
    bundle = done.save(tmp_path / "b")
    certificate = moeopt.verify(bundle)
    assert certificate.passed and certificate.executed, str(certificate)
    certificate = moeopt.verify(bundle, original=mixture(dtype).cuda(), inputs=tokens(7, dtype, seed=5).cuda())
    assert certificate.passed and certificate.executed, str(certificate)
    assert moeopt.verify(bundle, provider="cpu").executed is False


def test_a_bundle_built_without_a_gpu_runs_on_one(tmp_path, monkeypatch):
    target = local_target()
    if target.sm not in RTX_BUILDS:
        pytest.skip(f"TensorRT for RTX does not build for {target}")
    dtype = torch.float16
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: False)
        built = moeopt.optimize(mixture(dtype), tokens(24, dtype), backend="tensorrt", target=target.name)
        assert not built.certificate.executed
        bundle = built.save(tmp_path / "b")
    certificate = moeopt.verify(bundle)
    assert certificate.passed and certificate.executed, str(certificate)


def test_streams_sizes_and_empty_inputs():
    dtype = torch.float16
    model, x = mixture(dtype), tokens(24, dtype)
    done = moeopt.optimize(model, x, backend="tensorrt", verify="fast")
    want = mixture(dtype).cuda()
    side = torch.cuda.Stream()
    for count in (1, 24, 96):
        some = tokens(count, dtype, seed=count).cuda()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            got = done(some)
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad():
            far = (got.double() - want(some).double()).norm() / want(some).double().norm()
        assert far < 64 * torch.finfo(dtype).eps  # two layers of half-precision products in another order
    with pytest.raises(UsageError, match="and the engine was built for 1 to 96: optimise the model again with"):
        done(tokens(97, dtype))


def test_a_language_model_generates():
    pytest.importorskip("transformers")
    ids = torch.arange(12).reshape(2, 6)
    done = moeopt.optimize(language_model(torch.float16), {"input_ids": ids}, backend="tensorrt")
    assert done.certificate.passed and done.certificate.executed
    made = done.generate(ids.cuda(), max_new_tokens=4, do_sample=False)
    assert made.shape == (ids.shape[0], ids.shape[1] + 4)
