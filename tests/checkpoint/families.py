"""Tiny checkpoints of the families that users have, written by the tests."""

import json
from pathlib import Path

import torch
import transformers

COMMON = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=1, max_position_embeddings=64,
)  # fmt: skip
SMALL_MLA = dict(
    num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    head_dim=8, n_group=1, topk_group=1,
)  # fmt: skip
FAMILIES = {
    "dense": ("Llama", {}),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3": ("Qwen3Moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)),
    "qwen2": (
        "Qwen2Moe",
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24),
    ),
    "deepseek": (
        "DeepseekV3",
        dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1,
             first_k_dense_replace=1, **SMALL_MLA),
    ),
    "gpt_oss": (
        "GptOss",
        dict(num_local_experts=4, num_experts_per_tok=2, layer_types=["sliding_attention", "full_attention"]),
    ),
}  # fmt: skip


def model_of(family: str, **other):
    """A model with random weights that are neither zeros nor ones."""
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **sizes, **other})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def write(family: str, path: Path, shards: int = 1, dtype=None, **other) -> Path:
    """The model's checkpoint as transformers writes it: experts apart where the family's files have them so."""
    model = model_of(family, **other)
    if dtype is not None:
        model = model.to(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(path, max_shard_size=size // shards + 1 if shards > 1 else "5GB")
    return path


REMOTE = """
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class HomeConfig(PretrainedConfig):
    model_type = "home_moe"

    def __init__(self, vocab_size=64, hidden_size=16, experts=3, layers=2, **rest):
        super().__init__(**rest)
        self.vocab_size, self.hidden_size, self.experts, self.layers = vocab_size, hidden_size, experts, layers


class Expert(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


class Mixture(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.experts, bias=False)
        self.experts = nn.ModuleList(Expert(config.hidden_size) for _ in range(config.experts))

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        weight, chosen = self.gate(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            if token.numel():
                out.index_add_(0, token, expert(rows[token]) * weight[token, slot, None])
        return out.reshape(x.shape)


class HomeModel(PreTrainedModel):
    config_class = HomeConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Mixture(config) for _ in range(config.layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return CausalLMOutput(logits=self.head(x))
"""


def write_remote(path: Path) -> Path:
    """A model of code of its own, as a directory that brings the code."""
    path.mkdir(parents=True)
    (path / "home.py").write_text(REMOTE)
    scope: dict = {}
    exec(compile(REMOTE, "home.py", "exec"), scope)
    torch.manual_seed(0)
    scope["HomeModel"](scope["HomeConfig"]()).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "home.HomeConfig", "AutoModelForCausalLM": "home.HomeModel"}
    config["architectures"] = ["HomeModel"]
    (path / "config.json").write_text(json.dumps(config))
    return path
