"""A causal language model's graph as a bundle sees it: a function of flat tensors, with a caller on top.

The caller (``moeopt.causal_lm.runner``) takes ids and a cache as the model does. Checks, golden runs
and plain ONNX Runtime take the graph's own inputs by name; this file describes those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from moeopt.bundle.io_names import KEY
from moeopt.bundle.shape_guards import check_conditions, holds, read_conditions, text_of
from moeopt.bundle.tree import LEAF
from moeopt.cache_names import parameter_named
from moeopt.errors import Declined, NotSaveableError
from moeopt.lower.signature import numbered, size_conditions
from moeopt.value_types import PyObject

SAMPLES = [
    (1, 0),
    (1, 1),
    (1, 7),
    (1, 5000),
    (2, 0),
    (3, 5),
    (40, 0),
    (40, 40),
    (700, 0),
    (700, 9),
    (5000, 0),
    (5000, 5000),
]
"""Numbers of new and of cached tokens at which a condition of the trace is asked for."""


def flat_signature(graph: PyObject, caller: Mapping[str, Any]) -> dict[str, Any]:
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
        "sizes": {"rows": [1, None], "tokens": [1, None], "cached tokens": [0, None]},
        "outputs": [{"tensor": number, "onnx": name} for number, name in enumerate(names)],
        KEY: dict(caller),
    }


def add_conditions(program: PyObject, caller: dict[str, Any]) -> None:
    """Write into ``caller`` what the trace took for granted of sizes and some call would not meet.

    Raises:
        Declined: no prompt, or no single token after others, would meet it.
    """
    leaves = numbered(program)
    asked = [name for name in ("input_ids", "attention_mask", "position_ids", "logits_to_keep") if name in leaves]
    kinds: dict[str, str] = {caller["inputs"].get(name, {"input": name})["input"]: name for name in asked}
    names = dict(zip([leaves[name] for name in asked], kinds, strict=True))
    cached = [at for layer in caller["cache"] for at in layer.values()]
    names |= {leaf: at["input"] for leaf, at in zip(tree_leaves(leaves[parameter_named(leaves)]), cached, strict=True)}
    by_input = {at["input"]: at for at in cached}
    kept: list[Any] = []
    held = set(SAMPLES)
    try:
        conditions = size_conditions(program)
    except NotSaveableError as err:
        raise Declined(str(err)) from err
    for condition in conditions:
        broken = set()
        for new, past in SAMPLES:
            for rows in (1, 2, 7):
                shape_of = functools.partial(_shape, names, kinds, by_input, rows, new, past)
                if not holds([condition], shape_of):
                    broken.add((new, past))
        if broken:
            kept.append(condition)
            held -= broken
    if not {(n, p) for n, p in held if not p} or not {(n, p) for n, p in held if n == 1 and p}:
        all_kept = "; ".join(text_of(c, lambda leaf: names[leaf]) for c in kept)
        raise Declined(f"its trace holds only where {all_kept}, which excludes every prompt, or every token after one")
    if kept:
        caller["conditions"] = kept
        caller["condition_leaves"] = {str(leaf): name for leaf, name in names.items()}


def checker(caller: Mapping[str, Any]) -> Callable[[Mapping[str, Tensor]], None]:
    """What refuses feeds of the graph that do not meet the conditions in a caller's signature.

    Raises:
        BundleError: conditions that :func:`add_conditions` would not have written.
    """
    conditions = read_conditions(caller.get("conditions", []))
    names = {int(leaf): str(name) for leaf, name in caller.get("condition_leaves", {}).items()}

    def check(feeds: Mapping[str, Tensor]) -> None:
        if conditions:
            way_out = "because the model's code branches on it: run longer or other ones with the original model"
            ids = feeds[caller["inputs"]["input_ids"]["input"]]  # what the graph does not read has their sizes
            check_conditions(
                conditions, lambda leaf: feeds.get(names[leaf], ids).shape, lambda leaf: names[leaf], way_out
            )

    return check


def _shape(
    names: Mapping[int, str],
    kinds: Mapping[str, str],
    cached: Mapping[str, dict[str, Any]],
    rows: int,
    new: int,
    past: int,
    leaf: int,
) -> list[int]:
    """Of an input: a number of its own in the call; only the inputs of a condition are asked for."""
    name = names[leaf]
    kind = kinds.get(name)
    if kind is not None:
        return {"attention_mask": [rows, past + new], "logits_to_keep": [1]}.get(kind, [rows, new])
    at = cached[name]
    return [rows, *at["shape"]] if "shape" in at else [rows, at["heads"], past, at["size"]]


def flat_calls(caller: PyObject, ids_BS: Tensor) -> list[dict[str, Tensor]]:
    """Keyword tensors of three calls: ``ids`` as a prompt, its first token alone, and padded rows on a cache."""
    prompt = caller.feeds(input_ids=ids_BS)
    alone = caller.feeds(input_ids=ids_BS[:1, :1])
    mask = torch.ones(ids_BS.shape, dtype=torch.int64)
    mask[:, 0] = 0
    padded = caller.feeds(input_ids=ids_BS, attention_mask=mask)
    return [prompt, alone, padded]


def state_results(signature: Mapping[str, Any]) -> list[int]:
    """Which results, in a language model's flat signature, are recurrent states, and no keys or values."""
    states = {at["output"] for layer in signature[KEY]["cache"] for at in layer.values() if "shape" in at}
    return [number for number, output in enumerate(signature["outputs"]) if output.get("onnx") in states]


def _dim(dim: PyObject) -> int | str | None:
    """A number, a free size's name, or None for an expression."""
    word = str(getattr(dim, "value", dim))
    if word.isdigit():
        return int(word)
    return word if word.isidentifier() else None
