"""What was given in place of a model, and how its owner gets a model from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from moeopt.value_types import PyObject

_ELSEWHERE = {
    "keras": "Keras", "tensorflow": "TensorFlow", "jax": "JAX", "flax": "Flax", "haiku": "Haiku", "mlx": "MLX",
    "paddle": "Paddle",
}  # fmt: skip
"""The first word of a class's module, and the framework whose models are of such classes."""


def model_hint(given: PyObject) -> str:
    """How to get a model from ``given``, led in by ": "; "" where nothing is known of its kind."""
    hint = _class_hint(given) if isinstance(given, type) else _value_hint(given)
    return f": {hint}" if hint else ""


def _class_hint(given: type) -> str:
    if hasattr(given, "from_pretrained"):
        return f"{given.__name__} is a class: give {given.__name__}.from_pretrained(...)"
    return f"{given.__name__} is a class: give an instance of it, {given.__name__}(...).eval()"


def _value_hint(given: PyObject) -> str:
    kind = type(given)
    for base in kind.__mro__:
        if framework := _ELSEWHERE.get(base.__module__.split(".")[0]):
            return f"it is of {framework}, and moeopt reads PyTorch: load it in PyTorch, or export it to an .onnx file"
    if isinstance(given, Mapping):
        if any(isinstance(value, torch.Tensor) for value in given.values()):
            return "a state dict has weights and no code: make the model, and model.load_state_dict(...)"
        return ""
    if isinstance(given, torch.Tensor):
        return "the model comes first, then its example inputs"
    owner = getattr(given, "__self__", None)
    if isinstance(owner, nn.Module):
        return f"it is a method: give the {type(owner).__name__} itself"
    if any(base.__module__.startswith("torch.distributed.pipelining") for base in kind.__mro__):
        return (
            "it is of a pipeline whose stages are modules already: optimise the module of each stage on what arrives "
            "there, moeopt.optimize(module, arriving), and make the PipelineStage of what that gives as .model"
        )
    inner = getattr(given, "model", None)
    if isinstance(inner, nn.Module):
        return f"give its .model, the {type(inner).__name__} in it"
    if hasattr(given, "to_json_string") and hasattr(given, "model_type"):
        return "a config has no weights: AutoModelForCausalLM.from_config(config) makes a model with random ones"
    if isinstance(given, (list, tuple)):
        return "give one model at a time"
    if kind.__module__.startswith("moeopt."):
        return "it is made by moeopt from a model, and holds none: give the model that it was made of"
    if callable(given):
        return "a function holds no weights that could be found: put it into the forward of an nn.Module"
    return ""
