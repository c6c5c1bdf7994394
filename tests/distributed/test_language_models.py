"""A transformers language model whose experts lie on two ranks: logits, and generation with ranks that end apart."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import moeopt
import moeopt.distributed
from tests.distributed.ranks import run_ranks
from tests.distributed.test_distribute import TIMEOUT, differs

pytest.importorskip("transformers")


def generated(rank, size):
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    opt, mesh = moeopt.optimize(model, {"input_ids": ids}, verify="off"), DeviceMesh("cpu", list(range(size)))
    assert len(opt.report.rewritten) == 2, str(opt.report)
    seen = {}
    with torch.no_grad():
        want, tokens = model(input_ids=ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
        dist.barrier()
        alike = moeopt.distribute(opt, mesh, tokens="replicated", timeout=TIMEOUT)
        out = alike(input_ids=ids)
        seen["type"] = type(out).__name__
        seen["logits"] = differs(out.logits, want)
        seen["tokens"] = torch.equal(alike.generate(ids, max_new_tokens=5, do_sample=False), tokens)
        dist.barrier()
        apart = moeopt.distribute(opt, mesh, timeout=TIMEOUT)
        own = ids[rank : rank + 1, : 7 - rank]  # prompts of other lengths, and one rank generates longer
        count = 3 + 2 * rank
        want = model.generate(own, max_new_tokens=count, do_sample=False)
        seen["apart"] = torch.equal(apart.generate(own, max_new_tokens=count, do_sample=False, synced_gpus=True), want)
        seen["keys"] = sorted(apart.model.state_dict()) == sorted(model.state_dict())
        seen["held"] = sum(p.numel() for n, p in apart.model.named_parameters() if "experts" in n)
        local = [p.to_local().numel() for n, p in apart.model.named_parameters() if "experts" in n]
        seen["local"] = sum(local) * size == seen["held"]
    return seen


def test_a_language_model_generates_on_two_ranks():
    for seen in run_ranks(generated, 2):
        assert seen["type"] == "MoeCausalLMOutputWithPast"
        assert seen["logits"] == "" and seen["tokens"] and seen["apart"]
        assert seen["keys"] and seen["local"]
