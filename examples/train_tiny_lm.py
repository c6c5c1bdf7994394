"""Two tiny language models, dense and MoE, trained on the docstrings of Python's standard library.

python examples/train_tiny_lm.py            # trains both for a few steps and says what they reach
python examples/train_tiny_lm.py --save tests/fixtures/tiny_lm --steps 900

One token is one ASCII character. The text needs no download: it is read from the source files of the Python
that runs this, so another Python trains on slightly other text. The suite keeps what --save wrote (float16) as
models with real weights and real routing.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import os
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

HELD_OUT = ("argparse", "calendar", "decimal", "fractions", "heapq", "pathlib", "statistics", "textwrap")
"""Modules that no model is trained on."""

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LENGTH, BATCH = 96, 24


def docstrings(held_out: bool) -> Iterator[str]:
    """The docstrings of the standard library's top-level modules and packages, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/__init__.py")]):
        name = path.stem if path.stem != "__init__" else path.parent.name
        if (name in HELD_OUT) != held_out or name in ("site-packages", "test", "idlelib"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                yield inspect.cleandoc(text)


def encode(text: str) -> Tensor:
    """(length,) int64: one token for each character, those beyond ASCII as "?"."""
    return torch.tensor(list(text.encode("ascii", "replace")))


def decode(ids: Tensor) -> str:
    """The inverse of :func:`encode`."""
    return bytes(ids.tolist()).decode("ascii")


def make(kind: str) -> Any:
    """An untrained model: ``dense`` is a Llama, ``moe`` a Mixtral with 8 experts of which each token gets 2."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    if kind == "dense":
        return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=192))
    config = MixtralConfig(
        **SIZES, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.01,
        output_router_logits=True, sliding_window=None,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def loss_on(model: Any, text_N: Tensor) -> float:
    """Nats per character over whole windows of ``text_N``."""
    rows = text_N[: len(text_N) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        logits = model(rows, use_cache=False).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


def train(kind: str, text_N: Tensor, steps: int, say: bool = True) -> Any:
    """A model trained on ``steps`` batches of windows of ``text_N``, in evaluation mode."""
    torch.manual_seed(0)
    model = make(kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05, betas=(0.9, 0.98))
    began = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:  # a short warm-up, then down to a tenth
            group["lr"] = 4e-3 * min(1.0, (step + 1) / min(50, steps / 4)) * (1 - 0.9 * step / steps)
        starts = torch.randint(len(text_N) - LENGTH, (BATCH,))
        rows = torch.stack([text_N[s : s + LENGTH] for s in starts])
        loss = model(rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if say and (step % 100 == 99 or step == steps - 1):
            print(f"{kind} step {step + 1}: loss {loss:.3f}, {time.process_time() - began:.0f} s CPU", flush=True)
    model.eval().config.output_router_logits = False
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save", type=Path, help="write dense/ and moe/ there, in float16")
    given = parser.parse_args()
    text_N = encode("\n\n".join(docstrings(held_out=False)))
    unseen_N = encode("\n\n".join(docstrings(held_out=True)))[: 128 * LENGTH]
    for kind in ("dense", "moe"):
        model = train(kind, text_N, given.steps)
        reached, count = math.exp(loss_on(model, unseen_N)), sum(p.numel() for p in model.parameters())
        print(f"{kind}: {count} parameters, perplexity {reached:.2f} per character on modules it has not seen")
        prompt = encode("Return the ")[None]
        print(decode(model.generate(prompt, max_new_tokens=60, do_sample=False)[0]), "\n")
        if given.save:
            model.half().save_pretrained(given.save / kind)


if __name__ == "__main__":
    main()
