"""Models as their owners have wrapped or packed them: taken, or the report says why nothing is found."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import moeopt
from moeopt.errors import NotSaveableError, UsageError
from moeopt.find.packed_weights import packed_weights
from tests.toy_moe import X, build

PARALLEL = nn.parallel.DistributedDataParallel


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Around(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = PARALLEL(model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 2


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize(
    ("wrap", "backend"),
    [
        *[(PARALLEL, "onnxruntime"), (nn.DataParallel, "torch"), (Around, "onnxruntime")],
        *[
            pytest.param(wrap, backend, marks=pytest.mark.nightly)
            for wrap, backend in ((PARALLEL, "torch"), (nn.DataParallel, "onnxruntime"), (Around, "torch"))
        ],
    ],
)
def test_a_model_in_a_wrapper_of_data_parallelism_is_taken(group, tmp_path, wrap, backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model = wrap(build())
    want = model(X)
    made = moeopt.optimize(model, X, backend=backend, verify="fast")
    assert made.certificate.passed and len(made.report.rewritten) == 1
    engine = moeopt.load(made.save(tmp_path / "b"))
    torch.testing.assert_close(engine(X), want, rtol=1e-5, atol=1e-6)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_a_language_model_in_a_wrapper_generates_as_an_engine(group):
    """It was an engine without a cache, and nothing said so."""
    pytest.importorskip("onnxruntime")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_local_experts=4)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**words, **heads)).eval()
    ids = torch.arange(3, 11).view(1, 8)
    want = model.generate(ids, max_new_tokens=4, do_sample=False)
    made = moeopt.optimize(PARALLEL(model), {"input_ids": ids}, backend="onnxruntime", verify="fast")
    assert torch.equal(made.model.generate(ids, max_new_tokens=4, do_sample=False), want)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_gradients_still_go_through_the_wrapper(group):
    model = PARALLEL(build())
    model(X).square().sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    made = moeopt.optimize(model, X, verify="fast")
    assert isinstance(made.model, PARALLEL)
    for p in model.parameters():
        p.grad = None
    made(X).square().sum().backward()
    for name, p in made.model.named_parameters():
        if name in want:
            torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-5)


def packed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(build(), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.skipif(not torch.backends.quantized.supported_engines, reason="this torch has no quantised kernels")
def test_weights_that_pytorch_packed_are_told():
    told = r"modules hold their weights as packed objects of torch.ao.quantization \(.*quantize='int8'\)"
    for report in (moeopt.explain(packed(), X), moeopt.optimize(packed(), X, verify="fast").report):
        assert not report.blocks and any("packed objects of torch.ao" in note for note in report.notes)
    with pytest.raises(UsageError, match="so there is nothing to inspect: .* " + told):
        moeopt.inspect(packed())
    with pytest.raises(NotSaveableError, match="cannot be saved: .* " + told):
        moeopt.optimize(packed(), X, backend="onnxruntime")
    assert packed_weights(build()) == "" and not moeopt.explain(build(), X).notes
