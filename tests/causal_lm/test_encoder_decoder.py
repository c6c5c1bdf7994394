"""Encoder-decoders as engines: all of their sizes free, both inputs."""

import os

import pytest
import torch

import moeopt
from moeopt.backends.onnxrt.providers import runtime
from moeopt.errors import NotSaveableError, UsageError

transformers = pytest.importorskip("transformers")
if transformers.__version__.startswith("4."):
    pytest.skip("the models of transformers 4 cannot be traced", allow_module_level=True)
try:
    runtime()
except UsageError as err:
    pytest.skip(str(err), allow_module_level=True)

SIZES = ((2, 9, 5), (1, 3, 1), (7, 1, 4))
COMMON = dict(vocab_size=60, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_layers=1, decoder_start_token_id=0)


def switch():
    config = transformers.SwitchTransformersConfig(
        **COMMON, num_decoder_layers=1, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        expert_capacity=3,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**COMMON))


def call(batch, source, target):
    g = torch.Generator().manual_seed(batch)
    ids = torch.randint(60, (batch, source), generator=g)
    out = torch.randint(60, (batch, target), generator=g)
    masks = {"attention_mask": torch.ones_like(ids), "decoder_attention_mask": torch.ones_like(out)}
    return {"input_ids": ids, "decoder_input_ids": out, "use_cache": False} | masks


MODELS = [(switch, {}, "moe")]
if os.environ.get("MOEOPT_NIGHTLY") == "1":
    MODELS.append((t5, {"dense": "split", "experts": 4}, "dense_ffn"))


@pytest.mark.parametrize(("build", "options", "kind"), MODELS)
def test_engine(build, options, kind, tmp_path):
    torch.manual_seed(0)
    model = build().eval()
    engine = moeopt.optimize(model, call(*SIZES[0]), backend="onnxruntime", verify="fast", **options)
    assert engine.certificate.passed is True, str(engine.certificate)
    blocks = [b for b in engine.report.blocks if b.kind == kind]
    assert blocks and all(b.status == "rewritten" for b in blocks), str(engine.report)
    engine.save(tmp_path / "engine")
    for runs in (engine, moeopt.load(tmp_path / "engine")):
        for size in SIZES:
            with torch.no_grad():
                torch.testing.assert_close(
                    runs(**call(*size)).logits, model(**call(*size)).logits, rtol=1e-4, atol=2e-5
                )


def test_a_mask_that_tracing_needs_is_asked_for():
    given = {k: v for k, v in call(*SIZES[0]).items() if "mask" not in k}
    with pytest.raises(NotSaveableError, match="its own code raised TypeError.*give the arguments that this line"):
        moeopt.optimize(switch().eval(), given, backend="onnxruntime", verify="off")
