"""Weights that a quantiser holds as a class of its own (``Int8Tensor``, ``Params4bit``), or in a dtype of PyTorch's
own quantisation (``qint8``), and sparse ones: what they mean for a graph.

Exporters fail on such a tensor in many ways, deep in their own code, or in the quantiser's, and name neither the weight
nor the quantiser.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from moeopt.errors import NotSaveableError
from moeopt.rewrite.plain_tensors import is_plain, package_of


@contextlib.contextmanager
def wrapped_weights_named(model: nn.Module) -> Iterator[None]:
    """While open, a graph that cannot be written of a model with such weights is refused with their name.

    Raises:
        NotSaveableError: the message names a weight, its class and package, and the way out.
    """
    try:
        yield
    except (NotSaveableError, RuntimeError, TypeError, NotImplementedError, AssertionError, IndexError) as err:
        weights = (*model.named_parameters(), *model.named_buffers())
        if why := _sparse(model, weights):
            raise NotSaveableError(why) from err
        wrapped = [(name, held) for name, held in weights if not is_plain(held)]
        if not wrapped:
            raise
        name, held = wrapped[0]
        more = f" (and {len(wrapped) - 1} more)" if wrapped[1:] else ""
        of = f" of {package_of(held)}" if package_of(held) else ""
        what = f"tensor of {held.dtype}" if held.is_quantized else f"{type(held).__name__}{of}"
        raise NotSaveableError(
            f"{type(model).__name__} cannot become an engine: {name}{more} is a {what}, which no "
            "graph holds. Make plain tensors of them, for instance module.weight = torch.nn.Parameter("
            "module.weight.dequantize(), requires_grad=False), with the quantiser's own function where it has another, "
            "and optimise again; quantize='int8' then keeps experts as small as they are here"
        ) from err


def _sparse(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> str:
    """The error for a model with sparse weights; "" where there are none."""
    held = [(name, tensor.layout) for name, tensor in weights if tensor.layout is not torch.strided]
    if not held:
        return ""
    more = f" (and {len(held) - 1} more)" if held[1:] else ""
    return (
        f"{type(model).__name__} cannot become an engine: {held[0][0]}{more} is a tensor of {held[0][1]}, which no "
        "graph holds. Make dense tensors of them, as module.weight = torch.nn.Parameter(module.weight.to_dense(), "
        "requires_grad=False), and optimise again, or use backend='torch'"
    )
