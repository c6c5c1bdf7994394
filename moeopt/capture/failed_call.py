"""Why a model may have refused the inputs that it was called with, in words that name the way out.

The model's own error comes first; what is looked at here are facts about the call: what is no tensor, a keyword that
``forward`` does not know, a device, a dtype or a token id that the weights do not have.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from moeopt.ir.row_function import dtype_name
from moeopt.value_types import PyObject

_LONGEST = 400
"""Characters of the model's own error; torch lists every kernel that it has after the first sentence."""


def in_short(err: BaseException) -> str:
    """``TypeError: ...`` of an error, without what follows an empty line, in at most some lines of text."""
    said = str(err).strip().split("\n\n")[0]
    text = said if len(said) <= _LONGEST else said[:_LONGEST].rsplit(" ", 1)[0] + " ..."
    return f"{type(err).__name__}: {text}"


def inputs_hint(given: PyObject) -> str:
    """How example inputs of another kind become a call's, led in by ": "; "" where nothing is known of the kind."""
    if hasattr(given, "convert_tokens_to_ids"):
        return ": a tokenizer makes inputs from text: give tokenizer(text, return_tensors='pt')"
    if hint := _not_a_tensor("example_inputs", given):
        return f": {hint}"
    if hasattr(given, "__iter__") or hasattr(given, "__getitem__"):
        return ": give one batch of it, as the model takes it: next(iter(...)) of a DataLoader"
    return ""


def call_hint(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What is odd about the call, led in by ": ", or "" where nothing is."""
    parameters = _parameters(module)
    try:
        for name, value in (*_positional(parameters, args), *kwargs.items()):
            if hint := _not_a_tensor(name, value) or _unlike_the_weights(name, value, module):
                return f": {hint}"
        return _keywords(parameters, args, kwargs)
    except Exception:  # of the module's own methods, or of a device: no hint stands in for the model's own error
        return ""


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # of no Python code
        return {}


def _positional(parameters: Mapping[str, inspect.Parameter], args: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    names = list(parameters)
    for n, value in enumerate(args):
        yield names[n] if n < len(names) else f"argument {n + 1}", value


def _not_a_tensor(name: str, value: PyObject) -> str:
    kind = type(value).__name__
    if type(value).__module__.split(".")[0] == "numpy" and hasattr(value, "dtype"):
        return f"{name} is a numpy {kind}: give torch.as_tensor({name})"
    first = value
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    if isinstance(first, str):
        return f"{name} is text: give what a tokenizer makes of it, tokenizer(text, return_tensors='pt')"
    if isinstance(first, Mapping):
        return f"{name} is a {kind}: of several calls' inputs, give one call's, inputs[0], which are its keywords"
    if isinstance(value, list) and isinstance(first, (int, float)):
        return f"{name} is a list of numbers: give torch.tensor({name}), or return_tensors='pt' to a tokenizer"
    if isinstance(value, int) and name.endswith("ids"):
        return f"{name} is a number: a list is read as positional arguments, so give torch.tensor([[...]]), rows of ids"
    return ""


def _unlike_the_weights(name: str, value: PyObject, module: nn.Module) -> str:
    """Where a tensor's layout, device, dtype or ids are not what the model's weights take."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if not isinstance(value, torch.Tensor) or weight is None:
        return ""
    if value.is_nested:
        return f"{name} is a nested tensor: give its rows padded, torch.nested.to_padded_tensor({name}, 0.0)"
    if value.layout is not torch.strided:
        return f"{name} is a sparse tensor ({value.layout}): give {name}.to_dense()"
    if value.device != weight.device:
        return f"{name} is on {value.device} and the weights on {weight.device}: give {name}.to({str(weight.device)!r})"
    if value.is_floating_point() and name.endswith("ids"):
        return f"{name} holds {dtype_name(value.dtype)} numbers, and ids are whole: give {name}.long()"
    if value.is_floating_point() and value.dtype not in {p.dtype for p in module.parameters()}:
        other = dtype_name(value.dtype)
        return (
            f"{name} is {other} and the weights are {dtype_name(weight.dtype)}: give {name}.to({weight.dtype}), "
            f"or dtype={other!r}, which casts the model"
        )
    if value.dtype in (torch.int64, torch.int32) and not name.endswith("ids") and not _looks_up(module):
        return f"{name} holds whole numbers, {dtype_name(value.dtype)}, and the weights are floats: give {name}.float()"
    if name == "input_ids" and value.dim() == 1:
        return f"{name} has one axis: give {name}[None], a batch of one row"
    return _too_large(name, value, module)


def _looks_up(module: nn.Module) -> bool:
    """Whether some part of the model may take ids."""
    return any(isinstance(part, (nn.Embedding, nn.EmbeddingBag)) for part in module.modules())


def _too_large(name: str, value: torch.Tensor, module: nn.Module) -> str:
    """Where an id is beyond the table of the model's tokens."""
    table = getattr(module, "get_input_embeddings", lambda: None)() if name == "input_ids" else None
    size = getattr(table, "num_embeddings", None)
    if not isinstance(size, int) or value.is_meta or not value.numel() or int(value.max()) < size:
        return ""
    return f"{name} holds {int(value.max())}, and the model knows the ids 0 to {size - 1}: is the tokenizer another's?"


def _keywords(parameters: Mapping[str, inspect.Parameter], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What ``forward`` takes, where a keyword is none of its own or a required one is missing."""
    open_kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = [name for name, p in parameters.items() if p.kind not in open_kinds]
    if not named:
        return ""
    unknown = [name for name in kwargs if name not in named]
    absent = [n for n in named[len(args) :] if n not in kwargs and parameters[n].default is inspect.Parameter.empty]
    if not unknown and not absent and (args or kwargs):
        return ""
    near = difflib.get_close_matches(unknown[0], named, n=1) if unknown else []
    meant = f"did you mean {near[0]!r} by {unknown[0]!r}? " if near else ""
    listed = ", ".join(named[:8]) + (", ..." if len(named) > 8 else "")
    return f": {meant}its forward takes {listed}"
