"""Models that another library has divided over processes: refused, with the way to the same end."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import moeopt
from tests.distributed.models import Stacked, tokens
from tests.toy_moe import Block, build

WAY_OUT = r"is divided over processes already .* load the model whole .* moeopt.distribute\(optimized, mesh\)"


def test_a_model_under_fsdp(alone):
    with pytest.raises(moeopt.UsageError, match=WAY_OUT):
        moeopt.optimize(fully_shard(build(Block), mesh=alone), tokens(4))


def test_a_model_whose_experts_are_dtensors(alone):
    """As transformers loads a model with an expert plan: a stack of experts, sharded along the first dimension."""
    model = Stacked()
    model.w_in = torch.nn.Parameter(distribute_tensor(model.w_in.detach(), alone, [Shard(0)]))
    for call in (moeopt.optimize, moeopt.explain, lambda m, x: moeopt.profile(m, [x])):
        with pytest.raises(moeopt.UsageError, match="w_in of Stacked " + WAY_OUT):
            call(model, tokens(4))


def test_a_language_model_under_fsdp(alone):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    fully_shard(model.model.layers[0], mesh=alone)
    with pytest.raises(moeopt.UsageError, match=WAY_OUT):
        moeopt.optimize(fully_shard(model, mesh=alone), {"input_ids": torch.ones(1, 4, dtype=torch.long)})


def test_a_stage_of_a_pipeline(alone):
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    stage = PipelineStage(build(Block), 0, 1, torch.device("cpu"), input_args=(tokens(4),))
    for given in (stage, ScheduleGPipe(stage, 1)):
        with pytest.raises(moeopt.UsageError, match=r"optimise the module of each stage .* as \.model"):
            moeopt.optimize(given, tokens(4))
    fast = moeopt.optimize(stage.submod, tokens(4), verify="off")
    again = PipelineStage(fast.model, 0, 1, torch.device("cpu"), input_args=(tokens(4),))
    assert torch.equal(ScheduleGPipe(again, 1).step(tokens(4)), fast(tokens(4)))
