"""Further calls on which a causal language model's engine is compared: other lengths, and a sequence in chunks.

A sequence in chunks goes through the cache: a prompt, then one token, then the rest. The logits of the chunks together
must be the logits that the model computes for the whole sequence in one call.

Shape legend: B rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moeopt.errors import UsageError
from moeopt.value_types import PyObject

Checked = tuple[str, dict[str, Any], Callable[..., Any]]
"""What a call shows, its keywords, and the engine in the form to call."""


def causal_calls(engine: PyObject, kwargs: dict[str, Any], ids_BS: Tensor) -> Iterator[Checked]:
    """Calls with a single token, with four times the tokens, and the given call in chunks.

    Args:
        engine: a ``CausalLM``. Calls of sizes that it says it does not hold for are left out.
        kwargs: the given call by keywords; ids_BS: its tokens.
    """
    plain = {name: value for name, value in kwargs.items() if name in ("return_dict", "use_cache")}
    length = ids_BS.shape[1]
    most = getattr(engine.config, "max_position_embeddings", None) or 4 * length
    for number in dict.fromkeys((1, min(4 * length, most))):
        repeated = ids_BS.repeat(1, -(-number // length))[:, :number]
        call = {**plain, "input_ids": repeated}
        if number != length and _holds(engine, call):
            yield f"{number} token{'s' * (number > 1)} a row", call, engine
    whole = {**plain, "input_ids": ids_BS.repeat(1, 5)[:, : max(length, 5)]}
    chunks = _Chunks(engine)
    if _holds(chunks, whole):
        yield "through its cache", whole, chunks


def _holds(engine: Callable[..., Any], call: dict[str, Any]) -> bool:
    try:
        engine(**call)
    except UsageError:
        return False
    return True


class _Chunks:
    """Half of the tokens, one, and the rest, each on the cache of those before."""

    def __init__(self, engine: PyObject) -> None:
        self.engine = engine

    def __call__(self, input_ids: Tensor, return_dict: bool | None = None, use_cache: PyObject = None) -> PyObject:
        length = input_ids.shape[1]
        middle = length // 2
        cuts = [0, middle, middle + 1, length]
        if self.engine.signature.get("one_at_a_time"):
            cuts = [0, *range(middle, length + 1)]
        cache, found = None, []
        for begin, end in zip(cuts, cuts[1:], strict=False):
            new = input_ids[:, begin:end]
            logits, cache = self.engine(input_ids=new, past_key_values=cache, use_cache=True, return_dict=False)
            found.append(logits)
        return self.engine.result(torch.cat(found, 1), return_dict)
