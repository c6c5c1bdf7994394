"""The graph of a causal language model after its export: idle nodes dropped, batches turned back, a signature."""

from __future__ import annotations

import inspect
import json
from typing import Any

from torch import nn

from moeopt.bundle.io_names import name_sizes
from moeopt.cache_names import cache_parameter, field_named
from moeopt.causal_lm.end_names import free_sizes, past_name, present_name, rename_ends
from moeopt.causal_lm.layers import ATTENTION, parts_of
from moeopt.errors import Declined
from moeopt.value_types import OnnxGraph, PyObject


def drop_idle_squeezes(graph: PyObject) -> None:
    """``squeeze(dim)`` of a size that is not 1 does nothing in PyTorch, and ONNX refuses it."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "Squeeze" or node.domain or len(node.inputs) < 2:
            continue
        x, axes = node.inputs[0], ir.convenience.get_const_tensor(node.inputs[1])
        if x.shape is None or axes is None:
            continue
        sizes = [x.shape[int(axis)] for axis in axes.numpy().reshape(-1)]
        if all(isinstance(size, int) and size != 1 for size in sizes) and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], x)
            graph.remove(node, safe=True)


def turn_batches_back(graph: PyObject) -> None:
    """``FusedMatMul`` that turns the batch of one factor only: onnxscript writes it for a factor without a batch too
    (scaled logits), and ONNX Runtime refuses that."""
    import onnx_ir as ir

    for node in [n for n in graph if n.op_type == "FusedMatMul"]:
        for at, name in enumerate(("transBatchA", "transBatchB")):
            x, other = node.inputs[at], node.inputs[1 - at]
            if not (name in node.attributes and node.attributes[name].as_int()):
                continue
            if x.shape is None or other.shape is None or len(x.shape) == len(other.shape):
                continue
            rank = len(x.shape)
            order = [*range(1, rank - 1), 0, rank - 1]
            turn = ir.node("Transpose", [x], {"perm": order}, name=f"{node.name}/{name}")
            turn.outputs[0].name, turn.outputs[0].type = turn.name, x.type
            turn.outputs[0].shape = ir.Shape([x.shape[axis] for axis in order])
            graph.insert_before(node, [turn])
            node.replace_input_with(at, turn.outputs[0])
            node.attributes[name] = ir.AttrInt64(name, 0)


def signature_of_lm(model: PyObject, graph: PyObject, past: PyObject, result: type) -> dict[str, Any]:
    """What calls of the graph need to know; ``Declined`` where the graph is not of the module's form."""
    _name_ends(graph.graph, past, (cache_parameter(model), field_named(result)))
    ends_in = {value.name: value for value in graph.graph.inputs}
    ends_out = {value.name: value for value in graph.graph.outputs}
    leaves = {past_name(n, part) for n, layer in enumerate(past.layers) for part in parts_of(layer)}
    present = {present_name(n, part) for n, layer in enumerate(past.layers) for part in parts_of(layer)}
    if unread := sorted(leaves - ends_in.keys()):
        raise Declined(f"the traced model does not read {unread[0]}")
    if missing := sorted(present - ends_out.keys()) + ["logits"] * ("logits" not in ends_out):
        raise Declined(f"the traced model does not return {missing[0]}")
    mask = ends_in.get("attention_mask")
    if mask is None or not mask.uses():
        raise Declined("it does not read attention_mask, so padded rows would go wrong in an engine with a cache")
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        if value.dtype is None or value.shape is None:
            raise Declined(f"{value.name} has no known dtype and shape in the graph")

    def described(layer: int, part: str) -> dict[str, Any]:
        value, out = ends_in[past_name(layer, part)], ends_out[present_name(layer, part)]
        about = {"input": value.name, "output": out.name, "dtype": _dtype(value)}
        sizes = [int(str(size)) for at, size in enumerate(value.shape) if at and not (part in ATTENTION and at == 2)]
        return about | ({"heads": sizes[0], "size": sizes[1]} if part in ATTENTION else {"shape": sizes})

    config = model.config
    return {
        "kind": "causal_lm",
        "architecture": type(model).__name__,
        "model_type": config.model_type,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "generation_config": json.loads(model.generation_config.to_json_string(use_diff=False)),
        "parameters": [name for name in inspect.signature(type(model).forward).parameters if name != "self"],
        "inputs": {name: {"input": v.name, "dtype": _dtype(v)} for name, v in ends_in.items() if name not in leaves},
        "logits": {"output": ends_out["logits"].name, "dtype": _dtype(ends_out["logits"])},
        "cache": [{part: described(n, part) for part in parts_of(layer)} for n, layer in enumerate(past.layers)],
        "output_class": [result.__module__, result.__qualname__],
        "own_class": not type(model).__module__.startswith("transformers."),
        "own_generation": own_generation(type(model)),
        "use_cache": bool(getattr(config.get_text_config(), "use_cache", True)),
        "vocab_size": config.get_text_config().vocab_size,
    }


def _name_ends(graph: OnnxGraph, past: PyObject, taken: tuple[str, str]) -> None:
    """From the exporter's names (``input.past_key_values.layers.0.keys``) to those that other runtimes look for.

    Args:
        taken: what the model calls its cache as an argument, and in its result.
    """
    names = {}
    both = (graph.inputs, "input.", past_name), (graph.outputs, "output.", present_name)
    for (ends, prefix, named), own in zip(both, taken, strict=True):
        cache = {
            f"{own}.layers.{n}.{part}": named(n, part) for n, at in enumerate(past.layers) for part in parts_of(at)
        }
        for value in ends:
            name = value.name.removeprefix(prefix)
            names[value.name] = cache.get(name, name)
    rename_ends(graph, names)
    parts = [(n, part) for n, layer in enumerate(past.layers) for part in parts_of(layer) if part in ATTENTION]
    name_sizes(graph, free_sizes(graph, [past_name(n, part) for n, part in parts]))


def own_generation(cls: type) -> list[str]:
    """What of ``generate`` the model's own class defines, beside what transformers' class defines that it builds on."""
    from transformers import GenerationMixin

    theirs = {name for name in dir(GenerationMixin) if not name.startswith("__")} - set(dir(nn.Module))
    own = [c for c in cls.__mro__ if c.__module__.split(".")[0] not in ("transformers", "torch", "builtins")]
    return sorted({name for c in own for name in vars(c) if name in theirs})


def _dtype(value: PyObject) -> str:
    from onnx_ir.tensor_adapters import to_torch_dtype

    return str(to_torch_dtype(value.dtype)).removeprefix("torch.")
