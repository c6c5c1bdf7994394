"""Two small language models with trained weights and real routing, and text that they were not trained on."""

import functools
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.train_tiny_lm import decode, docstrings, encode, loss_on

FOLDER = Path(__file__).parent / "fixtures" / "tiny_lm"
KINDS = ("dense", "moe")
__all__ = ["KINDS", "decode", "encode", "load", "perplexity", "text"]


def load(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The ``dense`` (Llama) or ``moe`` (Mixtral, 8 experts, top-2) model in eval mode; needs transformers."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(FOLDER / kind, dtype=torch.float32)
    return model.eval().to(dtype)


@functools.cache
def text(rows: int = 16, length: int = 96) -> Tensor:
    """(rows, length) int64 ids of docstrings that no training saw."""
    ids = encode("\n\n".join(docstrings(held_out=True)))
    return ids[: rows * length].view(rows, length)


def perplexity(model: object) -> float:
    """Per character, on :func:`text`."""
    return math.exp(loss_on(model, text().flatten()))
