"""A causal language model's graph as a bundle sees it: a function of flat tensors, with a caller on top.

The caller (``moeopt.backends.onnxrt.causal_runner``) takes ids and a cache as the model does. Checks, golden runs
and plain ONNX Runtime take the graph's own inputs by name; this file describes those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moeopt.engine.tree import LEAF

KEY = "causal_lm"
"""Where a bundle's signature keeps the caller's own."""


def flat_signature(graph: Any, caller: Mapping[str, Any]) -> dict[str, Any]:
    """The signature of an ``onnx_ir`` graph called with keywords, and the caller's signature inside it."""
    from onnx_ir.tensor_adapters import to_torch_dtype

    inputs = [
        {
            "name": value.name,
            "onnx": value.name,
            "dtype": str(to_torch_dtype(value.dtype)).removeprefix("torch."),
            "device": "cpu",
            "shape": [_dim(dim) for dim in value.shape],
        }
        for value in graph.inputs
    ]
    names = [value.name for value in graph.outputs]
    return {
        "parameters": [entry["name"] for entry in inputs],
        "in_tree": {
            "type": "tuple",
            "items": [
                {"type": "tuple", "items": []},
                {"type": "dict", "keys": [entry["name"] for entry in inputs], "items": [LEAF] * len(inputs)},
            ],
        },
        "out_tree": {"type": "dict", "keys": names, "items": [LEAF] * len(names)},
        "inputs": inputs,
        "sizes": {},
        "outputs": [{"tensor": number, "onnx": name} for number, name in enumerate(names)],
        KEY: dict(caller),
    }


def flat_calls(caller: Any, ids_BS: Tensor) -> list[dict[str, Tensor]]:
    """Keyword tensors of three calls: ``ids`` as a prompt, its first token alone, and padded rows on a cache."""
    prompt = caller.feeds(input_ids=ids_BS)
    alone = caller.feeds(input_ids=ids_BS[:1, :1])
    mask = torch.ones(ids_BS.shape, dtype=torch.int64)
    mask[:, 0] = 0
    padded = caller.feeds(input_ids=ids_BS, attention_mask=mask)
    return [prompt, alone, padded]


def _dim(dim: Any) -> int | str | None:
    """A number, a free size's name, or None for an expression."""
    word = str(getattr(dim, "value", dim))
    if word.isdigit():
        return int(word)
    return word if word.isidentifier() else None
