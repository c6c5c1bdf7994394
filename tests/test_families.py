"""Real families go through ``moeopt.optimize`` whole: every MoE block rewritten, same logits, same tokens.

The default run takes the library's own default everywhere, and each experts implementation and strict verification on
three families; ``MOEOPT_NIGHTLY=1`` takes all of them on all.
"""

import importlib.metadata
import importlib.util
import os

import pytest
import torch

import moeopt
from tests.families import FAMILIES
from tests.helpers import count_expert_calls

pytest.importorskip("transformers")

NIGHTLY = os.environ.get("MOEOPT_NIGHTLY") == "1"
EACH_IMPLEMENTATION = ("mixtral", "gpt_oss", "deepseek_v3")
ONE_MORE = set("dots1 glm4_moe granitemoe hunyuan_v1_moe jamba minimax olmoe qwen2_moe".split())
"""In transformers 5 their routers and experts are those of others here: mixtral's, gpt_oss's or deepseek_v3's. In 4
each has code of its own."""
MAY_DECLINE = {
    "nllb-moe": "its router feeds a one-hot mask where ids are expected, and its capacity follows the token count",
}
if importlib.util.find_spec("transformers") and importlib.metadata.version("transformers").startswith("4."):
    MAY_DECLINE["longcat_flash"] = (
        "in 4 its identity experts are modules of the loop, so what it adds depends on the data"
    )
ATTENTION_MIXTURES = {"jetmoe": 2}
"""Routed projections of attentions: no feed-forward, so at most a declined entry each."""


def variants():
    for name, family in sorted(FAMILIES.items()):
        names = family.implementation_names
        if NIGHTLY or name in EACH_IMPLEMENTATION:
            yield from ((name, chosen) for chosen in names)
        else:
            alike = name in ONE_MORE and names != (None,)
            chosen = None if names == (None,) else "grouped_mm"
            yield pytest.param(name, chosen, marks=pytest.mark.nightly if alike else ())


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize(("name", "implementation"), list(variants()), ids=lambda v: str(v))
def test_family(name, implementation):
    family = FAMILIES[name]
    if not family.available:
        pytest.skip(f"{name} needs transformers {'.'.join(map(str, family.min_version))}")
    original, given = family.build(implementation), family.build(implementation)
    level = "strict" if NIGHTLY or name in EACH_IMPLEMENTATION else "fast"
    opt = moeopt.optimize(given, family.inputs(), backend="torch", verify=level)

    blocks = [b for b in opt.report.blocks if b.kind == "moe"]
    rewritten = [b for b in blocks if b.status == "rewritten"]
    text = "\n".join(f"{b.name}: {b.status} {b.reason}" for b in blocks)
    if name in MAY_DECLINE:
        assert len(blocks) == family.moe_blocks, text
    else:
        assert len(rewritten) == family.moe_blocks, text
        assert len(blocks) - len(rewritten) <= ATTENTION_MIXTURES.get(name, 0), text
    assert all(b.experts == family.experts for b in rewritten), text

    for seed, (batch, length) in enumerate([(2, 9), (1, 1), (3, 14)]):
        inputs = family.inputs(batch, length if not family.seq2seq else max(length, 3), seed)
        with torch.no_grad(), count_expert_calls() as seen:
            got = opt(**inputs)
        with torch.no_grad():
            want = original(**inputs)
        if name not in MAY_DECLINE:  # where what is added depends on the data, a call may run the original code
            assert len(seen) >= len(rewritten)
        assert type(got) is type(want) and got.keys() == want.keys()
        # float32: three GEMMs and a sum over K per block, two or so blocks, norms and attention after them
        assert relative(got.logits, want.logits) <= 64 * torch.finfo(torch.float32).eps
    assert torch.equal(family.generate(opt.model), family.generate(original))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_router_logits_survive(name):
    """``output_router_logits=True`` is recorded by hooks on the router's class; they still see every router."""
    family = FAMILIES[name]
    original, given = family.build(), family.build()
    opt = moeopt.optimize(given, family.inputs(), backend="torch")
    with torch.no_grad():
        got = opt(**family.inputs(), output_router_logits=True)
        want = original(**family.inputs(), output_router_logits=True)
    assert len(got.router_logits) == len(want.router_logits) == family.moe_blocks
    for a, b in zip(got.router_logits, want.router_logits, strict=True):
        assert relative(a, b) <= 64 * torch.finfo(torch.float32).eps
    assert relative(got.aux_loss, want.aux_loss) <= 64 * torch.finfo(torch.float32).eps
