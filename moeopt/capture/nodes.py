"""fx nodes for a tape, kept in the tape's own list.

A tape has a node for each ATen call of a run, tens of thousands, and is read; who writes a part of it in another way
(``moeopt.recognise.joined_biases``) keeps the list. An editable
``fx.Graph`` walks every argument through pytree and keeps tables of names for each node it makes, which
was a fifth of a trace's time. What a reader needs is in ``fx.Node`` itself: arguments, users, meta.
"""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from moeopt.value_types import FxTarget


class NodeFactory:
    """Makes nodes with readable, distinct names; all belong to one graph that lists none of them."""

    def __init__(self) -> None:
        self._graph = fx.Graph()
        self._words: dict[Any, str] = {}
        self._count: dict[str, int] = {}

    def placeholder(self, name: str) -> fx.Node:
        """An input."""
        return fx.Node(self._graph, name, "placeholder", name, (), {})

    def attribute(self, path: str) -> fx.Node:
        """A Parameter, buffer or constant of the module."""
        return fx.Node(self._graph, self._name(path), "get_attr", path, (), {})

    def call(self, target: FxTarget, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        """A call of ``target``; nodes in ``args`` and ``kwargs`` get it as a user."""
        return fx.Node(self._graph, self._name(target), "call_function", target, args, kwargs or {})

    def _name(self, target: FxTarget) -> str:
        word = self._words.get(target)
        if word is None:
            text = target if isinstance(target, str) else getattr(target, "__name__", str(target))
            word = self._words[target] = re.sub(r"\W+", "_", text).lower()
        count = self._count[word] = self._count.get(word, -1) + 1
        return f"{word}_{count}" if count else word
