"""What depends on the installed transformers, beyond tests/test_families.py.

`make test-compat` runs both on the oldest version that is promised.
"""

import pytest
import torch

import moeopt
from tests.families import FAMILIES
from tests.helpers import count_expert_calls
from tests.test_zoo import OFTEN, of, zoo  # noqa: F401  the fixture that optimises a case
from tests.test_zoo import test_zoo as check_zoo_case

transformers = pytest.importorskip("transformers")

LOADED = ("qwen3_moe", "mixtral", "gpt_oss")
SAMPLE = sorted(OFTEN - {"act_512_experts"})[::8]  # that one alone takes long


@pytest.mark.parametrize("name", LOADED)
def test_a_loaded_checkpoint_generates_the_same_tokens(name, tmp_path):
    """save_pretrained, from_pretrained, optimise: padded prompts in a batch, the key-value cache, and beams."""
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path)
    original, given = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval() for _ in range(2))
    opt = moeopt.optimize(given, family.inputs())
    assert len([b for b in opt.report.rewritten if b.kind == "moe"]) == family.moe_blocks, str(opt.report)
    ids = family.inputs(3, 7)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for beams in (1, 2):
        ask = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        with count_expert_calls() as seen:
            got = opt.generate(ids, **ask)
        assert len(seen) >= 6 * family.moe_blocks
        assert torch.equal(got, original.generate(ids, **ask))


@pytest.mark.parametrize("name", LOADED)
def test_the_optimised_model_saves_the_same_checkpoint(name, tmp_path):
    """save_pretrained of the optimised model writes what the original would: same keys, same values."""
    family = FAMILIES[name]
    original = family.build()
    moeopt.optimize(family.build(), family.inputs()).model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(original.state_dict())
    assert all(torch.equal(again.state_dict()[key], value) for key, value in original.state_dict().items())


@pytest.mark.parametrize("name", LOADED)
def test_bfloat16(name):
    """The library casts routing weights at other places in each version; what was recorded decides."""
    family = FAMILIES[name]
    model = family.build().to(torch.bfloat16)
    opt = moeopt.optimize(model, family.inputs())
    assert len([b for b in opt.report.rewritten if b.kind == "moe"]) == family.moe_blocks, str(opt.report)
    assert opt.certificate.passed is True, str(opt.certificate)


@pytest.mark.skipif(not transformers.__version__.startswith("4."), reason="tests/test_zoo.py has them here")
@of(SAMPLE)
def test_zoo_sample(zoo):  # noqa: F811  pytest's way to ask for it
    """A few home-made models: they need no transformers, so a sample says that the environment is sound."""
    check_zoo_case(zoo)
