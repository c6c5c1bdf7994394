"""A language model whose Python asks its own tables has an engine with a cache."""

import pytest
import torch

import moeopt

transformers = pytest.importorskip("transformers", minversion="5.15")


class AsksItsTable(transformers.MixtralForCausalLM):
    """Remote code that checks whether its tables survived loading."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("table", torch.ones(4), persistent=False)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **more):
        if self.table[0] == 0:
            raise RuntimeError("the table is empty")
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, **more
        )  # fmt: skip


def test_an_engine_with_a_cache_of_a_model_that_asks_its_table():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = AsksItsTable(config).eval()
    ids = torch.randint(3, 64, (2, 9))
    named = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    engine = moeopt.optimize(model, named, backend="onnxruntime", verify="fast")
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(engine.generate(**named, **settings), model.generate(**named, **settings))
