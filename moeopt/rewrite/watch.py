"""Has the code that a rewrite leaves out changed since it was verified?

A rewritten block reads its weights live and calls its router live. What it no longer runs is the
Python of the experts and of the block itself, so what that Python would have read is remembered:
classes, plain attributes (``top_k``, an activation function), children, absent biases, hooks, patched
forwards. Modules that belong to one expert are looked at only when that expert runs. Tensors whose values
that Python turned into the rewritten code are compared with what they were.

Not seen: attributes that are objects (a config), globals, and, in code compiled by ``torch.compile``,
anything changed after it was compiled.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from moeopt.rewrite.frozen import Frozen

_BOOKKEEPING = frozenset(nn.Module().__dict__)
_PLAIN = (bool, int, float, str, type(None), types.FunctionType, types.BuiltinFunctionType, type)


def hook_count(module: nn.Module) -> int:
    """How many forward and backward hooks are registered on ``module`` itself."""
    d = module.__dict__
    return (
        len(d["_forward_hooks"]) + len(d["_forward_pre_hooks"]) + len(d["_backward_hooks"])
        + len(d["_backward_pre_hooks"])
    )  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """What was verified of one module. It holds no module, so it can be copied and pickled."""

    path: str
    cls: type
    names: tuple[str, ...]
    values: tuple[Any, ...]
    children: tuple[str, ...]
    absent: tuple[str, ...]
    hooks: int
    patched: bool


def take_facts(root: nn.Module, live: Iterable[str], written: Iterable[tuple[str, str]], mode: bool) -> list[Fact]:
    """The facts of every module of ``root`` but the subtrees at the paths ``live``.

    Args:
        live: paths of submodules that are still called as modules.
        written: (path, attribute) pairs that the forward itself sets.
        mode: whether the training flags matter.
    """
    kept, own = tuple(live), set(written)
    facts = []
    for path, module in root.named_modules():
        if _inside(path, kept):
            continue
        held = {n: v for n, v in module.__dict__.items() if n not in _BOOKKEEPING or (mode and n == "training")}
        plain = {n: _frozen(v) for n, v in held.items() if _is_plain(v) and n != "forward" and (path, n) not in own}
        prefix = f"{path}." if path else ""
        facts.append(
            Fact(
                path,
                type(module),
                tuple(plain),
                tuple(plain.values()),
                tuple(n for n, c in module._modules.items() if c is not None and not _inside(prefix + n, kept)),
                tuple(n for n, p in module._parameters.items() if p is None),
                hook_count(module),
                bool(path) and "forward" in module.__dict__,
            )
        )
    return facts


def _inside(path: str, kept: tuple[str, ...]) -> bool:
    return any(path == k or path.startswith(f"{k}.") for k in kept)


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (type(value) in (list, tuple) and all(isinstance(v, _PLAIN) for v in value))


def _frozen(value: Any) -> Any:
    return list(value) if type(value) is list else value


def _getter(names: tuple[str, ...]) -> Any:
    if len(names) == 1:
        (name,) = names
        return lambda d: (d[name],)
    return operator.itemgetter(*names) if names else lambda d: ()


class _Watched:
    """One module and what it should still be."""

    __slots__ = ("children", "children_of", "fact", "forward", "get", "module")

    def __init__(self, fact: Fact, module: nn.Module) -> None:
        self.fact, self.module = fact, module
        self.get, self.children_of = _getter(fact.names), _getter(fact.children)
        self.children = tuple(module._modules.get(n) for n in fact.children)
        self.forward = fact.cls.forward  # type: ignore[attr-defined]

    def changed(self) -> str:
        """What is another than it was; "" when nothing is."""
        fact, module = self.fact, self.module
        d, name = module.__dict__, fact.path or "the block"
        if module.__class__ is not fact.cls or fact.cls.forward is not self.forward:  # type: ignore[attr-defined]
            return f"the class of {name}, or its forward, is not the one that was verified"
        if fact.path and (hook_count(module) != fact.hooks):
            return f"a hook was registered on {name}, which is no longer called for each expert"
        if fact.path and not fact.patched and "forward" in d:
            return f"forward was replaced on {name}"
        try:
            same = self.get(d) == fact.values and self.children_of(d["_modules"]) == self.children
        except KeyError as missing:
            return f"{missing} was removed from {name}"
        if not same:
            return self._which(d, name)
        for parameter in fact.absent:
            if d["_parameters"].get(parameter) is not None:
                return f"{name} has a {parameter}, and had none"
        return ""

    def _which(self, d: dict[str, Any], name: str) -> str:
        for attribute, value in zip(self.fact.names, self.fact.values, strict=True):
            if d[attribute] != value:
                return f"{attribute} of {name} is {d[attribute]!r} and was {value!r}"
        return f"a module in {name} was replaced"


class Watch:
    """The facts of one block, bound to its modules; ``shared`` and ``expert`` say what changed.

    Args:
        root: the block.
        facts: what ``take_facts`` took.
        experts: for each expert of each op, the paths of its weights.
        frozen: by path, the values of tensors that decided what the rewritten code is.
    """

    def __init__(
        self,
        root: nn.Module,
        facts: list[Fact],
        experts: dict[Any, set[str]],
        frozen: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self._frozen = [Frozen(root, path, value) for path, value in frozen.items()]
        modules = dict(root.named_modules(remove_duplicate=False))
        self.gone = next((f"{f.path} was removed" for f in facts if f.path not in modules), "")
        self._shared: list[_Watched] = []
        self._of: dict[Any, list[_Watched]] = {key: [] for key in experts}
        if self.gone:
            return
        owners: dict[str, set[Any]] = {}
        for key, paths in experts.items():
            for path in paths:
                while path:
                    path = path.rpartition(".")[0]
                    owners.setdefault(path, set()).add(key)
        for fact in facts:
            path = fact.path
            while path and path not in owners:
                path = path.rpartition(".")[0]
            keys = owners.get(path, set())
            (self._of[next(iter(keys))] if len(keys) == 1 and path else self._shared).append(
                _Watched(fact, modules[fact.path])
            )

    def shared(self) -> str:
        """What changed in the modules that every call of the original would run."""
        return self.gone or _first(self._shared) or _first(self._frozen)

    def expert(self, key: Any) -> str:
        """What changed in the modules of one expert."""
        return _first(self._of[key])

    def everything(self) -> str:
        """What changed anywhere."""
        return self.shared() or next((r for r in map(self.expert, self._of) if r), "")


def _first(watched: Sequence[_Watched | Frozen]) -> str:
    for one in watched:
        reason = one.changed()
        if reason:
            return reason
    return ""
