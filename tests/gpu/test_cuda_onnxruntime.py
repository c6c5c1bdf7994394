"""ONNX Runtime engines on a CUDA GPU: exported, run, compared with the original, saved, verified, and timed."""

import time

import pytest
import torch

pytest.importorskip("onnxruntime")

import moeopt
from tests.gpu.blocks import language_model, mixture, tokens
from tests.gpu.marks import ON_CUDA_PROVIDER

pytestmark = ON_CUDA_PROVIDER
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def skip_old(dtype):
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("needs a CUDA GPU of compute capability 8.0 for bfloat16")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_runs_is_saved_and_verifies(dtype, tmp_path):
    skip_old(dtype)
    model, x = mixture(dtype), tokens(24, dtype)
    done = moeopt.optimize(model, x, backend="onnxruntime", target="cuda")
    print(done.report, done.certificate, sep="\n")
    assert done.certificate.passed and done.certificate.executed
    assert done.certificate.device == "onnxruntime cuda" and done.model.provider == "cuda"
    assert done(x).device.type == "cuda" and done(x.cuda()).dtype == dtype
    bundle = done.save(tmp_path / "b")
    certificate = moeopt.verify(bundle, provider="cuda")
    assert certificate.passed and certificate.executed, str(certificate)
    original = mixture(dtype).cuda()
    certificate = moeopt.verify(bundle, original=original, inputs=tokens(7, dtype, seed=5).cuda(), provider="cuda")
    assert certificate.passed, str(certificate)


def test_a_bundle_built_without_a_gpu_runs_on_one(tmp_path, monkeypatch):
    """What a machine without a GPU writes, this one executes: its self-test and golden runs decide."""
    from moeopt.backends.onnxrt import build as onnx_build

    x = tokens(24, torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr(onnx_build, "available", lambda: ["cpu"])
        built = moeopt.optimize(mixture(torch.float32), x, backend="onnxruntime", target="cuda")
    assert not built.certificate.executed
    bundle = built.save(tmp_path / "b")
    assert moeopt.load(bundle).provider == "cuda"
    certificate = moeopt.verify(bundle)
    assert certificate.passed and certificate.executed and certificate.device == "onnxruntime cuda"
    replayed = moeopt.verify(bundle, provider="cpu")
    assert replayed.passed and not replayed.executed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_language_model_generates(dtype, tmp_path):
    skip_old(dtype)
    pytest.importorskip("transformers.exporters")
    model = language_model(dtype).cuda()
    ids = torch.arange(1, 13, device="cuda").reshape(2, 6)
    done = moeopt.optimize(model, {"input_ids": ids}, backend="onnxruntime", device="cuda", verify="fast")
    print(done.certificate)
    assert done.certificate.passed and done.certificate.executed
    with torch.no_grad():
        want = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    got = done.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    assert got.shape == want.shape
    if dtype == torch.float32:  # in 16 bits a near tie of two tokens may fall either way
        assert torch.equal(got.cpu(), want.cpu())
    assert moeopt.verify(done.save(tmp_path / "b"), provider="cuda").passed


def milliseconds(call, *args):
    """The median of 20 calls, after 5."""
    times = []
    with torch.no_grad():
        for number in range(25):
            torch.cuda.synchronize()
            started = time.perf_counter()
            call(*args)
            torch.cuda.synchronize()
            times += [1e3 * (time.perf_counter() - started)] * (number >= 5)
    return sorted(times)[len(times) // 2]


def test_times(capsys):
    """A table of one Qwen3-MoE block as transformers runs it, under torch.compile, and as an engine; nothing is
    asserted of it but that all three run."""
    pytest.importorskip("transformers.exporters")
    from tests.gpu.blocks import H

    dtype = torch.float16
    block = language_model(dtype).model.layers[0].mlp.cuda()
    hidden = block.gate.weight.shape[1]
    assert hidden <= H
    x = tokens(512, dtype)[..., :hidden].contiguous().cuda()
    engine = moeopt.optimize(block, x, backend="onnxruntime", device="cuda", verify="fast")
    compiled = torch.compile(block, dynamic=True)
    rows = [("tokens", "transformers", "torch.compile", "engine (ms)")]
    for count in (1, 16, 128, 512):
        part = x[:, :count].contiguous()
        rows.append((count, *[f"{milliseconds(call, part):.3f}" for call in (block, compiled, engine)]))
    with capsys.disabled():
        print("", torch.cuda.get_device_name(), *("  ".join(f"{cell:>14}" for cell in row) for row in rows), sep="\n")
    assert len(rows) == 5
