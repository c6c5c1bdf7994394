"""What the ends of a causal language model's graph are called: as ONNX Runtime GenAI, Optimum and transformers.js do.

    input_ids, attention_mask, position_ids, past_key_values.N.key, past_key_values.N.value
    -> logits, present.N.key, present.N.value

N counts the layers of the cache, those without keys too. Other states keep their own word:
``past_key_values.N.conv_states.0``. Free sizes are ``batch``, ``sequence``, ``past_sequence``,
``total_sequence`` and, of the logits, ``kept``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moeopt.value_types import OnnxGraph

_WORDS = {"keys": "key", "values": "value"}


def past_name(layer: int, part: str) -> str:
    """The input that holds a part of a layer of the cache."""
    return f"past_key_values.{layer}.{_WORDS.get(part, part)}"


def present_name(layer: int, part: str) -> str:
    """The output that holds a part of a layer of the cache, grown by the new tokens."""
    return f"present.{layer}.{_WORDS.get(part, part)}"


def rename_ends(graph: OnnxGraph, names: Mapping[str, str]) -> None:
    """Rename inputs and outputs of ``graph``; another value that has such a name gets a number behind it.

    Args:
        names: present name -> new name; no two new names are equal.
    """
    ends = {id(value): value for value in (*graph.inputs, *graph.outputs)}
    inner = [v for node in graph.all_nodes() for v in node.outputs if id(v) not in ends]
    inner += [v for v in graph.initializers.values() if id(v) not in ends]
    wanted = set(names.values())
    used = wanted | {value.name for value in (*inner, *ends.values())}
    for value in inner:
        if value.name in wanted:
            number = next(n for n in range(1, len(used) + 2) if f"{value.name}_{n}" not in used)
            value.name = f"{value.name}_{number}"
            used.add(value.name)
    for value in ends.values():
        value.name = names.get(value.name, value.name)


def free_sizes(graph: OnnxGraph, past: Iterable[str]) -> dict[str, str]:
    """Free size -> its name, read off the inputs; the exporter may have two sizes for one, as the mask's rows."""
    ends = {value.name: value for value in graph.inputs}
    told: dict[str, tuple[str, ...]] = {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "total_sequence"),
        "logits_to_keep": ("kept",),
    }
    told |= {name: ("batch", "", "past_sequence", "") for name in past}
    found: dict[str, str] = {}
    for name, words in told.items():
        for dim, word in zip(ends[name].shape if name in ends else (), words, strict=False):
            size = getattr(dim, "value", None)
            if word and isinstance(size, str) and size.isidentifier():
                found.setdefault(size, word)
    return found
