"""Real families as ONNX Runtime engines: token ids in, logits out, at batch sizes and lengths not seen at export.

The default run takes the families of ``SAMPLE``; ``MOEOPT_NIGHTLY=1`` takes all of them.
"""

import os

import pytest
import torch

import moeopt
from moeopt.backends.onnxrt.providers import runtime
from moeopt.errors import UsageError
from tests.families import FAMILIES

pytest.importorskip("transformers")
try:
    runtime()
except UsageError as err:
    pytest.skip(str(err), allow_module_level=True)

SAMPLE = ("gpt_oss",)  # test_causal_lm has DeepSeek, Llama 4, Qwen3 and Mixtral, with their caches
REFUSED = {"switch_transformers", "nllb"}
"""Encoder-decoders: Switch needs its masks, and is in test_encoder_decoder; NLLB's loop is declined."""
NIGHTLY = os.environ.get("MOEOPT_NIGHTLY") == "1"


class Logits(torch.nn.Module):
    """The model called without a cache; its logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, decoder_input_ids=None):
        more = {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
        return self.model(input_ids=input_ids, use_cache=False, **more).logits


@pytest.mark.one_isa  # a language model's engine; the zoo's are compared there
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - REFUSED) if NIGHTLY else SAMPLE)
def test_family_engine(name):
    family = FAMILIES[name]
    if not family.available:
        pytest.skip(f"{name} needs transformers {'.'.join(map(str, family.min_version))}")
    original = Logits(family.build())
    opt = moeopt.optimize(Logits(family.build()), family.inputs(), backend="onnxruntime", verify="fast")
    blocks = [b for b in opt.report.blocks if b.kind == "moe" and b.status == "rewritten"]
    assert len(blocks) == family.moe_blocks, [(b.name, b.reason) for b in blocks]
    assert opt.certificate.passed is True
    for seed, (batch, length) in enumerate([(2, 9), (1, 3), (7, 4), (1, 65)]):
        inputs = family.inputs(batch, length, seed)
        with torch.no_grad():
            want = original(**inputs)
        got = opt(**inputs)
        # float32: every op of the model is another runtime's, so a few dozen roundings
        assert (got - want).norm() <= 64 * torch.finfo(torch.float32).eps * want.norm()
