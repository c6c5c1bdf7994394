"""A name for each call of the experts op in a model: the path of its block, numbered where a block is called again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import nn

from moeopt.ops.expert_weights import ExpertWeights
from moeopt.rewrite.install import rewritten_forward


def site_names(model: nn.Module) -> Callable[[ExpertWeights], str | None]:
    """What names the next call of each bank of ``model``'s rewritten blocks: its path, ``path#2`` at a second call."""
    paths = {
        id(bank): path or "experts"
        for path, module in model.named_modules()
        if (forward := rewritten_forward(module)) is not None
        for bank, _ in forward.banks
    }
    taken: Counter[str] = Counter()

    def name_of(bank: ExpertWeights) -> str | None:
        path = paths.get(id(bank))
        if path is None:
            return None
        taken[path] += 1
        return path if taken[path] == 1 else f"{path}#{taken[path]}"

    return name_of
