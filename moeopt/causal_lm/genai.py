"""Files for ONNX Runtime GenAI: ``genai_config.json``, and a graph over the same weights that has the form it drives.

GenAI feeds ids, mask, positions and cache by name and knows no ``logits_to_keep``: its graph keeps the last position.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeopt.causal_lm.end_names import past_name, present_name

CONFIG, GRAPH = "genai_config.json", "model.genai.onnx"
_FED = {"input_ids", "attention_mask", "position_ids"}
_KEEP = "logits_to_keep"
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def why_not_genai(caller: Mapping[str, Any]) -> str:
    """Why GenAI cannot drive the engine with this signature, a sentence without its dot; "" where it can."""
    layers = caller["cache"]
    if not layers or any(set(layer) != {"keys", "values"} for layer in layers):
        return "it drives models of which each layer caches keys and values, and this one has other states"
    if len({(at["heads"], at["size"]) for layer in layers for at in layer.values()}) > 1:
        return "it takes one number of key/value heads and one head size for all layers, and this model has several"
    if extra := sorted(set(caller["inputs"]) - _FED - {_KEEP}):
        return f"it does not feed {extra[0]}"
    if caller.get("one_at_a_time"):
        return "the engine takes prompts token by token, and it feeds them whole"
    if caller.get("conditions"):
        return "the engine holds for some sizes only, which it does not check"
    text = _text(caller["config"])
    if missing := [name for name in ("hidden_size", "num_attention_heads") if not isinstance(text.get(name), int)]:
        return f"the model's config has no {missing[0]}"
    if _context_length(caller["config"]) is None:
        return f"the model's config does not say for how many tokens it is ({', '.join(_LENGTHS)})"
    return ""


def write_genai(folder: Path, graph: str, caller: Mapping[str, Any], provider: str) -> None:
    """Write both files into ``folder``, which holds ``graph``; :func:`why_not_genai` has been asked.

    Args:
        graph: the name of the engine's graph; its weights stay where they are.
        provider: "cpu" or "cuda".
    """
    import onnx_ir as ir

    model = ir.load(folder / graph)
    keep = next((value for value in model.graph.inputs if value.name == _KEEP), None)
    if keep is not None:
        model.graph.inputs.remove(keep)
        keep.const_value = ir.tensor([-1], dtype=keep.dtype, name=_KEEP)
        model.graph.initializers[_KEEP] = keep
        for value in model.graph.outputs:
            if value.name == caller["logits"]["output"]:
                value.shape = ir.Shape([value.shape[0], 1, value.shape[2]])
    ir.save(model, folder / GRAPH)
    (folder / CONFIG).write_text(json.dumps(_config(caller, provider), indent=2))


def _config(caller: Mapping[str, Any], provider: str) -> dict[str, Any]:
    config, generation, at = caller["config"], caller["generation_config"], caller["cache"][0]["keys"]
    text = _text(config)
    tokens = {
        name: next((part[name] for part in (generation, config, text) if part.get(name) is not None), None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    eos = tokens["eos_token_id"]
    if tokens["pad_token_id"] is None:
        tokens["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    length = _context_length(config)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [{provider: {}}] * (provider != "cpu")},
        "filename": GRAPH,
        "head_size": at["size"],
        "hidden_size": text["hidden_size"],
        "num_attention_heads": text["num_attention_heads"],
        "num_key_value_heads": at["heads"],
        "num_hidden_layers": len(caller["cache"]),
        "inputs": {
            **{name: caller["inputs"][name]["input"] for name in sorted(_FED & set(caller["inputs"]))},
            "past_key_names": past_name(0, "keys").replace("0", "%d", 1),
            "past_value_names": past_name(0, "values").replace("0", "%d", 1),
        },
        "outputs": {
            "logits": caller["logits"]["output"],
            "present_key_names": present_name(0, "keys").replace("0", "%d", 1),
            "present_value_names": present_name(0, "values").replace("0", "%d", 1),
        },
    }
    search = {
        "do_sample": bool(generation.get("do_sample")),
        "max_length": length,
        "past_present_share_buffer": False,
        **{k: generation[k] for k in ("temperature", "top_k", "top_p", "repetition_penalty") if generation.get(k)},
    }
    told = {name: token for name, token in tokens.items() if token is not None}
    model = {
        "type": "decoder",
        "context_length": length,
        "vocab_size": caller["vocab_size"],
        **told,
        "decoder": decoder,
    }
    return {"model": model, "search": search}


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("text_config") or config


def _context_length(config: Mapping[str, Any]) -> int | None:
    for part in (config, _text(config)):
        for name in _LENGTHS:
            if isinstance(part.get(name), int):
                return int(part[name])
    return None
