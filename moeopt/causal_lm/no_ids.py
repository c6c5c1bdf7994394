"""What an engine says of what is given to it in the place of token ids."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moeopt.errors import UsageError
from moeopt.value_types import PyObject

_WANTED = "input_ids must be a tensor (rows, tokens) with at least one token"


def checked_ids(value: PyObject) -> Tensor:
    """``value``, where it is a tensor of rows of tokens; ``UsageError`` with the way out elsewhere."""
    if not isinstance(value, Tensor):
        raise UsageError(f"{_WANTED}{_instead(value)}")
    if value.dim() != 2 or not value.numel():
        instead = ": give input_ids[None], one row" if value.dim() == 1 and value.numel() else ""
        raise UsageError(f"{_WANTED}, not {tuple(value.shape)}{instead}")
    return value


def check_prompt(args: tuple[PyObject, ...], kwargs: Mapping[str, PyObject]) -> None:
    """The same of what ``generate`` is given to begin with; it may be given nothing."""
    for value in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")):
        if value is not None and not (isinstance(value, Tensor) and value.dim() == 2):
            checked_ids(value)


def _instead(value: PyObject) -> str:
    kind, first = type(value).__name__, value
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    if isinstance(first, str):
        return ", not text: give what a tokenizer makes of it, **tokenizer(text, return_tensors='pt')"
    if isinstance(value, Mapping):
        return f", not a {kind}: give what is in it by name, with two asterisks before it"
    if value is None:
        return ""
    return f", not a {kind}: give torch.tensor(...) of it, or return_tensors='pt' to a tokenizer"
