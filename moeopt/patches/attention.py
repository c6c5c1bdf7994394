"""The patch of transformers' attention function "sdpa"."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from moeopt.patches.patch import Mine, Patch, Undo, nothing
from moeopt.value_types import PyObject

_attention = Mine()


def _ask_for_attention() -> Undo:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as theirs
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not theirs:  # the user put another function there
        return nothing

    def attend(*args: PyObject, **options: PyObject) -> PyObject:
        return theirs(*args, **options) if _attention.top is None else _attention.top(theirs, *args, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend

    def undo() -> None:
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is attend:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]

    return undo


_asked = Patch(_ask_for_attention)


@contextlib.contextmanager
def sdpa_of(attend: Callable[..., Any]) -> Iterator[None]:
    """While open, transformers' attention "sdpa" is ``attend(their function, ...)`` in this thread.

    A function that the user registered under that name stays.
    """
    with _asked(), _attention.holding(attend):
        yield
