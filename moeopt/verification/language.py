"""What a language model's owner asks: are the next-token distributions the same?

Shape legend: B batch, S sequence, V vocabulary. Divergences are in nats, computed in float64:
``KL(original || optimised)`` of the next-token distribution at each of the B*S positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeopt.value_types import PyObject
from moeopt.verification.state import RestoreState


def find_ids(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The token ids (B, S) of a call: ``input_ids``, else its first 2-D integer tensor."""
    named = kwargs.get("input_ids")
    for value in (named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() == 2 and value.dtype in (torch.int32, torch.int64):
            return value
    return None


def find_logits(outputs: PyObject, ids_BS: Tensor) -> Tensor | None:
    """The logits (B, S, V): ``outputs.logits``, ``outputs["logits"]``, or a floating (B, S, V) output."""
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    others = outputs if isinstance(outputs, tuple | list) else (outputs,)
    for value in (named, *others):
        if isinstance(value, Tensor) and value.dim() == 3 and value.dtype.is_floating_point:
            if value.shape[:2] == ids_BS.shape and value.shape[-1] > int(ids_BS.max()):
                return value
    return None


def language_metrics(logits_BSV: Tensor, new_BSV: Tensor, ids_BS: Tensor) -> dict[str, float]:
    """Divergence, agreement and perplexity of optimised logits against the original's.

    The perplexity ratio (optimised / original) is over the given ids: next token from the ones before.
    """
    old = torch.log_softmax(logits_BSV.detach().double(), -1)
    new = torch.log_softmax(new_BSV.detach().double(), -1)
    gap = torch.where(old == -torch.inf, 0.0, old.exp() * (old - new))  # p log(p/q), and 0 log 0 = 0
    kl = gap.sum(-1).flatten().clamp_min(0.0)  # rounding can leave -1e-17
    metrics = {
        "KL divergence, mean": float(kl.mean()),
        "KL divergence, 99.9th percentile": float(kl.quantile(0.999)) if kl.numel() < 1 << 24 else float(kl.max()),
        "KL divergence, max": float(kl.max()),
        "top-1 agreement": float((old.argmax(-1) == new.argmax(-1)).double().mean()),
    }
    if ids_BS.shape[1] > 1:
        target = ids_BS[:, 1:, None].long().to(old.device)
        loss = [-float(logp[:, :-1].gather(-1, target).mean()) for logp in (old, new)]
        metrics["perplexity ratio"] = float(torch.tensor(loss[1] - loss[0], dtype=torch.float64).exp())
    return metrics


def greedy_agreement(original: PyObject, optimized: PyObject, ids_BS: Tensor, steps: int) -> float:
    """Share of ``steps`` greedily generated tokens per row that are equal, counted up to the first difference."""
    generated = []
    for model in (original, optimized):
        with torch.no_grad(), RestoreState(model):
            tokens = model.generate(ids_BS.clone(), max_new_tokens=steps, do_sample=False)
        generated.append(tokens[:, -steps:])
    old, new = generated
    if old.shape != new.shape:
        return 0.0
    return float((old == new).long().cumprod(-1).double().mean())
