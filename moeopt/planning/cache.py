"""Bytes of the key-value cache that one token takes, from the fields of a Hugging Face config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeopt.value_types import PyObject


def numbers_of_a_token(target: PyObject) -> int | None:
    """Numbers that all layers keep of one token; None where the config does not say or there is none.

    Latent attention (``kv_lora_rank``) keeps one compressed row and its rotary part; other attention keeps keys and
    values of ``num_key_value_heads`` heads. Layers with a recurrent state keep nothing of a token; those with a window
    are counted as if they kept all.
    """
    fields = _fields(target)
    layers = _attention_layers(fields)
    if not layers:
        return None
    if fields.get("kv_lora_rank"):
        return int(layers * (fields["kv_lora_rank"] + (fields.get("qk_rope_head_dim") or 0)))
    heads = fields.get("num_attention_heads")
    kept = fields.get("num_key_value_heads") or heads
    width = fields.get("head_dim") or (fields["hidden_size"] // heads if heads and fields.get("hidden_size") else None)
    return int(layers * 2 * kept * width) if kept and width else None


def _attention_layers(fields: Mapping[str, Any]) -> int:
    """How many layers keep keys and values; 0 where the config does not say how many layers there are."""
    kinds = fields.get("layer_types") or fields.get("layers_block_type")
    if isinstance(kinds, (list, tuple)) and kinds:
        return sum(str(kind) == "hybrid" or ("attention" in str(kind) and "linear" not in str(kind)) for kind in kinds)
    layers, period = fields.get("num_hidden_layers") or 0, fields.get("attn_layer_period")
    if period:  # Jamba
        return len(range(fields.get("attn_layer_offset") or 0, layers, period))
    if fields.get("attn_layer_indices"):  # Bamba
        return len(fields["attn_layer_indices"])
    return int(layers)


def _fields(target: PyObject) -> Mapping[str, Any]:
    if isinstance(target, (str, Path)):
        path = Path(target)
        path = path / "config.json" if path.is_dir() else path
        target = json.loads(path.read_text(encoding="utf-8"))
    config: PyObject = target.config if hasattr(target, "config") else target
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping):
        return {}
    if fields is not config and not fields.get("layer_types"):  # which some classes compute
        fields = {**fields, "layer_types": getattr(config, "layers_block_type", None)}
    # a field that a dict leaves out has the class's default, which only its class knows
    known = fields.get("text_config")
    return known if isinstance(known, Mapping) else fields
