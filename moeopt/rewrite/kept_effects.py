"""What the submodules that a rewrite keeps write to themselves, put back where a call is refused after they ran.

    router   counts its calls, or adds up its experts' load      runs
    experts  one of them was changed since the verification      the call is refused: the block's own code runs, the
                                                                 router in it for the second time

What of an expert has changed, which ids there are and how many a token has is only known once the router ran. So before
each call of a block with such a submodule what it is known to write is noted, and put back where the call is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeopt.capture.held_contents import copied, is_container, put_back
from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import Tape
from moeopt.rewrite.id_range import IdOutOfRange
from moeopt.rewrite.stale import Stale
from moeopt.value_types import PyObject

_ABSENT = object()
_TABLES = ("_buffers", "_parameters")
WrittenAt = tuple[str, str]
"""A path and a name there."""
RunUndoing = Callable[[Callable[[Sequence[Tensor]], Any], Sequence[Tensor]], Any]


@dataclass(frozen=True)
class KeptEffects:
    """Where a call writes.

    Args:
        contents: tensors that are written in place.
        attributes: what is assigned, and containers that are written into.
    """

    contents: frozenset[WrittenAt] = frozenset()
    attributes: frozenset[WrittenAt] = frozenset()

    def inside(self, paths: Iterable[str]) -> KeptEffects:
        """Those of them in the modules at ``paths``."""
        kept = tuple(paths)

        def within(places: frozenset[WrittenAt]) -> frozenset[WrittenAt]:
            return frozenset(p for p in places if any(p[0] == k or p[0].startswith(f"{k}.") for k in kept))

        return KeptEffects(within(self.contents), within(self.attributes))

    def undoing(self, root: nn.Module) -> RunUndoing:
        """What runs a call and undoes them in ``root`` where it is refused."""
        return Undoing(root, self) if self.contents or self.attributes else just_run


def effects_of(tapes: Sequence[Tape]) -> KeptEffects:
    """What the calls wrote to the module and its submodules."""
    written = [n for t in tapes for n in (*t.mutations, *_statistics(t)) if n.op == "get_attr"]
    contents = frozenset((path, name) for path, _, name in (str(n.target).rpartition(".") for n in written))
    attributes = {place for t in tapes for place in (*t.attributes, *t.in_place)}
    return KeptEffects(contents, frozenset(attributes))


def _statistics(tape: Tape) -> Iterator[fx.Node]:
    """The running statistics of batch norms, which their op may write without saying so."""
    for node in tape.nodes:
        if "batch_norm" in op_name(node):
            yield from (n for n in node.args[3:5] if isinstance(n, fx.Node))


def just_run(run: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor]) -> PyObject:
    """What :class:`Undoing` does where there is nothing to undo."""
    return run(tensors)


class Undoing:
    """Runs a call, and puts back what it wrote where it is refused on the way."""

    def __init__(self, root: nn.Module, effects: KeptEffects) -> None:
        self._root, self._effects = root, effects

    def __call__(self, run: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor]) -> PyObject:
        """``run(tensors)``; code that is being compiled takes no second way."""
        if torch.compiler.is_compiling():
            return run(tensors)
        contents, attributes = list(self._contents()), list(self._attributes())
        try:
            return run(tensors)
        except (Stale, IdOutOfRange):
            with torch.no_grad():
                for tensor, before in contents:
                    tensor.copy_(before)
            for table, name, value, items in attributes:
                if value is _ABSENT:
                    table.pop(name, None)
                    continue
                table[name] = value
                if items is not None:
                    put_back(value, items)
            raise

    def _contents(self) -> Iterator[tuple[Tensor, Tensor]]:
        for path, name in self._effects.contents:
            table = _table_of(self._root, path, name)
            tensor = None if table is None else table.get(name)
            if isinstance(tensor, Tensor):
                yield tensor, tensor.detach().clone()

    def _attributes(self) -> Iterator[tuple[dict[str, Any], str, Any, Any]]:
        for path, name in self._effects.attributes:
            table = _table_of(self._root, path, name)
            if table is not None:
                value = table.get(name, _ABSENT)
                yield table, name, value, copied(value) if is_container(value) else None


def _table_of(root: nn.Module, path: str, name: str) -> dict[str, Any] | None:
    """The table of the module at ``path`` that holds ``name``, or would; None where that module is gone."""
    module: nn.Module | None = root
    for part in path.split(".") if path else ():
        module = module._modules.get(part) if module is not None else None
    if module is None:
        return None
    return next((module.__dict__[t] for t in _TABLES if name in module.__dict__[t]), module.__dict__)
