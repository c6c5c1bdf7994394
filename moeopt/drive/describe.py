"""A block in the words of a report."""

from __future__ import annotations

from typing import Any

from torch import nn

from moeopt.drive.discover import Place
from moeopt.passes.recognize_experts import Recognition


def dense_reason(place: Place) -> str:
    """Why a dense FFN was left as it is."""
    del place
    return (
        "one expert that sees every token: its products are already single matrix products, so a grouped op "
        "would not pay"
    )


def describe_router(model: nn.Module, path: str, found: Recognition, rewrite: Any) -> str:
    """How the tokens are routed, as far as the frontier says."""
    del model, path, rewrite
    experts, k = len(found.experts), found.frontier.top_k
    words = {
        "ids and weights": f"top-{k} of {experts}",
        "ids, constant weight": f"top-{k} of {experts}, equal weights",
        "one-hot mask": f"one-hot, {k} of {experts}",
        "one-hot mask, constant weight": f"one-hot, {k} of {experts}, equal weights",
        "dense": f"all {experts} experts, weighted",
        "table": f"sparse table over {experts} experts",
    }[found.frontier.kind]
    return words + (", weight on input" if found.spec.weight_on == "input" else "")
