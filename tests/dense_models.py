"""Tiny dense transformers with random weights: encoders, decoders, encoder-decoders, a vision model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Case = tuple[nn.Module, dict[str, Any]]
H, I, LAYERS = 16, 24, 2

_SIZES = {"hidden_size": H, "intermediate_size": I, "num_hidden_layers": LAYERS, "num_attention_heads": 2}


def _ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(2, 50, (rows, length), generator=torch.Generator().manual_seed(1))


def bert() -> Case:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**_SIZES, vocab_size=50, max_position_embeddings=64))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return model, {"input_ids": _ids(), "attention_mask": mask}


def llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_SIZES, vocab_size=50)), {"input_ids": _ids(), "use_cache": False}


def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=H, n_inner=I, n_layer=LAYERS, n_head=2, vocab_size=50, n_positions=64)
    return GPT2LMHeadModel(config), {"input_ids": _ids(), "use_cache": False}


def _t5(form: str) -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=H, d_ff=I, d_kv=8, num_layers=1, num_heads=2, vocab_size=50, feed_forward_proj=form,
        decoder_start_token_id=0,
    )  # fmt: skip
    call = {"input_ids": _ids(), "decoder_input_ids": _ids(2, 5), "use_cache": False}
    return T5ForConditionalGeneration(config), call


def t5_plain() -> Case:
    return _t5("relu")


def t5_gated() -> Case:
    return _t5("gated-gelu")


def vit() -> Case:
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(**_SIZES, image_size=8, patch_size=4, num_channels=3))
    return model, {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


MODELS: dict[str, Callable[[], Case]] = {
    "bert": bert,
    "llama": llama,
    "gpt2": gpt2,
    "t5 plain": t5_plain,
    "t5 gated": t5_gated,
    "vit": vit,
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Case:
    """A seeded model in eval mode and a call of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, call = MODELS[name]()
    floats = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}
    return model.eval().to(dtype), floats
