"""Which sizes an engine of a causal language model is built for: one profile for prompts, one for single tokens.

Sizes: B rows, S new tokens, P cached tokens, N positions whose logits are wanted. From an example of (B, S) ids:

    prompt   B 1 to 4B, best B    S 1 to 4S, best S    P 0 to 4S, best 0    N 1 to 4S, best 1
    decode   B 1 to 4B, best B    S 1                  P 0 to 4S, best S    N 1

where 4S is the largest of ``tokens`` if that is larger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeopt.backends.tensorrt.profiles import MULTIPLE, Triple

_MASK, _POSITIONS, _KEPT = "attention_mask", "position_ids", "logits_to_keep"


def causal_sizes(
    ends: Mapping[str, Sequence[Any]],
    caller: Mapping[str, Any],
    example: tuple[int, int],
    tokens: Sequence[int] | None = None,
) -> list[dict[str, Triple]]:
    """Least, best and most of each free size of a graph of ``export_causal_lm``, for a prompt and for a decode.

    Args:
        ends: the graph's inputs; ``caller``: the caller's signature; ``example``: (B, S).
    """
    B, S = example
    rows, max_size = (1, B, MULTIPLE * B), max(MULTIPLE * S, *(tokens or (0,)))
    prompt = _sizes(ends, caller, rows, (1, S, max_size), (0, 0, max_size), (1, 1, max_size))
    decode = _sizes(ends, caller, rows, (1, 1, 1), (0, S, max_size), (1, 1, 1))
    return [prompt, decode]


def _sizes(
    ends: Mapping[str, Sequence[Any]], caller: Mapping[str, Any], b: Triple, s: Triple, p: Triple, n: Triple
) -> dict[str, Triple]:
    both: Triple = (s[0] + p[0], s[1] + p[1], s[2] + p[2])
    named = {"input_ids": (b, s), _MASK: (b, both), _POSITIONS: (b, s), _KEPT: (n,)}
    axes = {caller["inputs"][name]["input"]: sizes for name, sizes in named.items() if name in caller["inputs"]}
    for layer in caller["cache"]:
        for part, at in layer.items():  # what has no name there is fixed
            axes[at["input"]] = (b, b, p, p) if part in ("keys", "values") else (b,) * len(ends[at["input"]])
    return {
        dim: size
        for name, sizes in axes.items()
        for dim, size in zip(ends[name], sizes, strict=True)
        if isinstance(dim, str)
    }
