"""An existing transformers script, with the engine in the model's place: one line more, the same tokens."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moeopt


def small_model() -> torch.nn.Module:
    """A random Qwen3-MoE; put ``AutoModelForCausalLM.from_pretrained(...)`` here."""
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2,
        num_experts=8, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def main() -> None:
    model = small_model()
    prompts = torch.randint(0, 512, (2, 12), generator=torch.Generator().manual_seed(1))
    want = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=16, do_sample=False)

    model = moeopt.optimize(model, {"input_ids": prompts}, backend="onnxruntime")  # the one line more

    tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=16, do_sample=False)
    print(model.report, model.certificate, sep="\n\n", end="\n\n")
    print(f"tokens: {'the same' if torch.equal(tokens, want) else 'NOT the same'}")


if __name__ == "__main__":
    main()
