"""Published shapes: the fields that set a size, as each model's config.json gives them, and its published counts.

``total`` and ``active`` are billions as their makers round them, with the convention that reproduces them.
"""

from dataclasses import dataclass
from typing import Any

Fields = dict[str, Any]

_MIXTRAL: Fields = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "num_key_value_heads": 8,
    "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN3: Fields = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": 128,
    "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
_DEEPSEEK_V3: Fields = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168,
    "num_hidden_layers": 61, "moe_intermediate_size": 2048, "intermediate_size": 18432, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_experts_per_tok": 8,
    "n_shared_experts": 1, "norm_topk_prob": True, "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip
_GPT_OSS: Fields = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 2880, "intermediate_size": 2880,
    "vocab_size": 201088, "head_dim": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "num_experts_per_tok": 4,
    "tie_word_embeddings": False, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
_LLAMA4_TEXT: Fields = {
    "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 202048,
    "num_experts_per_tok": 1, "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA4: Fields = {
    "model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "llama4_vision_model", "hidden_size": 1408, "intermediate_size": 5632, "num_hidden_layers": 34,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "vision_output_dim": 4096,
        "projector_input_dim": 4096, "projector_output_dim": 4096, "pixel_shuffle_ratio": 0.5,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """``layers`` is (all, with experts); ``exact`` is (total, active, by which convention), counted, in billions."""

    fields: Fields
    layers: tuple[int, int]
    experts: int
    top_k: int
    shared: int
    router: str
    exact: tuple[float, float, str]
    total: str
    active: str


SHAPES: dict[str, Published] = {
    "Mixtral 8x7B": Published(
        _MIXTRAL | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                    "num_attention_heads": 32},
        (32, 32), 8, 2, 0, "softmax, top-2 of 8, renormalised", (46.703, 12.880, "all"), "46.7", "12.9",
    ),
    "Mixtral 8x22B": Published(
        _MIXTRAL | {"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56,
                    "num_attention_heads": 48},
        (56, 56), 8, 2, 0, "softmax, top-2 of 8, renormalised", (140.621, 39.152, "all"), "141", "39",
    ),
    "Qwen3-30B-A3B": Published(
        _QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
                  "num_attention_heads": 32},
        (48, 48), 128, 8, 0, "softmax, top-8 of 128, renormalised", (30.532, 3.353, "all"), "30.5", "3.3|3.4",
    ),
    "Qwen3-235B-A22B": Published(
        _QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
                  "num_hidden_layers": 94, "num_attention_heads": 64},
        (94, 94), 128, 8, 0, "softmax, top-8 of 128, renormalised", (235.094, 22.191, "all"), "235", "22",
    ),
    "DeepSeek-V3": Published(
        _DEEPSEEK_V3 | {"vocab_size": 129280, "n_routed_experts": 256, "n_group": 8, "topk_group": 4,
                        "first_k_dense_replace": 3, "num_attention_heads": 128, "num_key_value_heads": 128},
        (61, 58), 256, 8, 1, "sigmoid, top-8 of 256, renormalised, in 8 groups",
        (671.026, 36.626, "no_input_embedding"), "671", "37",
    ),
    # model_type and auto_map are the release's own; its config names the class that it shares
    "Kimi K2": Published(
        _DEEPSEEK_V3 | {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
                        "vocab_size": 163840, "n_routed_experts": 384, "n_group": 1, "topk_group": 1,
                        "first_k_dense_replace": 1, "num_attention_heads": 64, "num_key_value_heads": 64},
        (61, 60), 384, 8, 1, "sigmoid, top-8 of 384, renormalised",
        (1026.408, 31.687, "no_input_embedding"), "1026", "32",
    ),
    "gpt-oss-20b": Published(
        _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
        (24, 24), 32, 4, 0, "top-4 of 32, softmax", (20.915, 3.608, "no_input_embedding"), "20.9", "3.6",
    ),
    "gpt-oss-120b": Published(
        _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
        (36, 36), 128, 4, 0, "top-4 of 128, softmax", (116.829, 5.133, "no_input_embedding"), "117", "5.1",
    ),
    "Llama 4 Scout": Published(
        _LLAMA4 | {"text_config": _LLAMA4_TEXT | {"num_local_experts": 16, "interleave_moe_layer_step": 1}},
        (48, 48), 16, 1, 1, "top-1 of 16, sigmoid", (108.642, 17.173, "all"), "109", "17",
    ),
    "Llama 4 Maverick": Published(
        _LLAMA4 | {"text_config": _LLAMA4_TEXT | {"num_local_experts": 128, "interleave_moe_layer_step": 2}},
        (48, 24), 128, 1, 1, "top-1 of 128, sigmoid", (401.584, 17.185, "all"), "402", "17",
    ),
}  # fmt: skip
