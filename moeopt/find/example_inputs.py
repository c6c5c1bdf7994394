"""Example inputs: read in the forms that users give them, or made up where the model says what it takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moeopt.cache_names import NAMES
from moeopt.capture.failed_call import inputs_hint
from moeopt.capture.tape import record
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import CaptureError, UsageError
from moeopt.value_types import PyObject


def as_call(example_inputs: PyObject) -> ArgsKwargs:
    """(args, kwargs) of a tensor, a tuple of positional arguments, or a Mapping of keyword arguments."""
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        two = len(example_inputs) == 2 and isinstance(example_inputs[0], tuple)
        if two and type(example_inputs[1]) is dict:
            return tuple(example_inputs[0]), dict(example_inputs[1])
        return tuple(example_inputs), {}
    raise UsageError(
        f"example_inputs is a {type(example_inputs).__name__}; give a tensor, a tuple of positional arguments, "
        f"or a dict of keyword arguments{inputs_hint(example_inputs)}"
    )


def in_order(model: nn.Module, call: ArgsKwargs) -> ArgsKwargs:
    """The call with its keywords as ``forward`` orders them: the order that they are given in says nothing."""
    args, kwargs = call
    known = [name for name in inspect.signature(model.forward).parameters if name in kwargs]
    return args, {name: kwargs[name] for name in [*known, *(n for n in kwargs if n not in known)]}


def without_cache(model: nn.Module, call: ArgsKwargs) -> ArgsKwargs:
    """The call with ``use_cache=False``, where a transformers model that generates would return a key/value cache.

    What such a model returns is no cache that a bundle could go on with, and comparing it says nothing beyond the
    logits. A call that gives ``use_cache`` or a cache stays as it is, and so does that of a model that generates
    nothing (a classifier): its cache is a result as others are.
    """
    args, kwargs = call
    unwrap: PyObject = getattr(model, "get_base_model", None)  # of peft, whose own forward hands **kwargs on
    wrapped = model if unwrap is None else unwrap()
    if not hasattr(model, "main_input_name") or not _takes_use_cache(wrapped):
        return call
    generates = getattr(wrapped, "can_generate", None)
    if generates is not None and not generates():
        return call
    given = {*list(inspect.signature(model.forward).parameters)[: len(args)], *kwargs}
    if given & {"use_cache", *NAMES}:
        return call
    return args, {**kwargs, "use_cache": False}


def _takes_use_cache(model: nn.Module) -> bool:
    """Whether ``forward`` of a transformers model takes ``use_cache``.

    Some (Granite MoE, Switch, Qwen3-VL MoE) take it among ``**kwargs``. A model that generates is always called with
    it, by transformers' ``generate``; of others nobody knows what they do with a keyword that they do not name.
    """
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        return True
    generates: PyObject = getattr(model, "can_generate", None)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return open_ended and generates is not None and bool(generates())


NO_CACHE = (
    "the example call has use_cache=False: what is verified and saved takes whole sequences and returns no key/value "
    "cache; the live model of backend='torch' still generates with its cache"
)
"""Said where :func:`without_cache` matters: a result that was compared and is saved without the model's cache."""


def made_up(model: nn.Module, seed: int) -> ArgsKwargs:
    """Inputs for a model that was given without any.

    A Hugging Face model gets token ids; a block with one required argument gets rows whose width is
    one of the sizes of its own matrices, if exactly such rows run.

    Raises:
        UsageError: nothing could be inferred; pass ``example_inputs``.
    """
    generator = torch.Generator().manual_seed(seed)
    config = getattr(model, "config", None)
    if config is not None and hasattr(model, "main_input_name"):
        if model.main_input_name == "pixel_values":
            return _pixels(model, config, generator)
        return _token_ids(model, config, generator)
    required = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) == 1:
        call = _rows(model, generator)
        if call is not None:
            return call
    raise UsageError(
        f"{type(model).__name__} was given without example_inputs, and what it takes could not be inferred from its "
        "weights; pass a tensor, a tuple or a dict that the model can be called with"
    )


def _token_ids(model: nn.Module, config: PyObject, generator: torch.Generator) -> ArgsKwargs:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None)
    if not vocabulary:
        raise UsageError(f"{type(model).__name__} has no vocab_size in its config; pass example_inputs")
    device = next(model.parameters()).device
    reserved = {getattr(text, k, None) for k in ("pad_token_id",)}
    ids = torch.randint(0, int(vocabulary), (2, 16), generator=generator)
    for bad in (r for r in reserved if isinstance(r, int)):
        ids[ids == bad] = (bad + 1) % int(vocabulary)
    ids = ids.to(device)
    kwargs: dict[str, Any] = {"input_ids": ids}
    if model.main_input_name != "input_ids":
        raise UsageError(f"{type(model).__name__} takes {model.main_input_name}; pass example_inputs")
    if getattr(text, "pad_token_id", None) is None and getattr(model, "num_labels", None) is not None:
        kwargs["input_ids"] = ids = _rows_that_run(model, ids)
    if getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = ids[:, :8].clone()
    if _takes_use_cache(model):
        kwargs["use_cache"] = False
    return (), kwargs


def _rows_that_run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Both rows, or one: a classifier that knows no padding token refuses several, since it takes the last token."""
    try:
        with torch.no_grad():
            model(input_ids=ids)
    except ValueError:
        return ids[:1]
    return ids


def _pixels(model: nn.Module, config: PyObject, generator: torch.Generator) -> ArgsKwargs:
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    sizes = (size, size) if isinstance(size, int) else size
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or not isinstance(channels, int):
        raise UsageError(
            f"{type(model).__name__} has no image_size and num_channels in its config; pass example_inputs"
        )
    first = next(model.parameters())
    return (), {"pixel_values": torch.randn((2, channels, *sizes), generator=generator).to(first)}


def _rows(model: nn.Module, generator: torch.Generator) -> ArgsKwargs | None:
    first = next(model.parameters(), None)
    if first is None or not first.is_floating_point():
        return None
    widths = sorted({s for p in model.parameters() if p.dim() >= 2 for s in p.shape[-2:]})
    running = []
    for width in widths:
        for shape in ((2, 8, width), (16, width)):
            call: ArgsKwargs = ((torch.randn(shape, generator=generator).to(first),), {})
            try:
                record(model, *call, keep_values=False)
            except CaptureError:
                continue
            running.append(call)
            break
    return running[0] if len(running) == 1 else None
