"""Guard on the Python code and attributes that a rewrite replaced: unchanged since verification?

A rewritten block reads its weights and calls its router live. The Python code of the experts and of the block itself no
longer runs, so the guard holds what that code would read: classes, plain attributes (``top_k``, an activation
function), children, absent biases, hooks, patched forwards. Modules of one expert are compared only when that expert
runs. Tensors whose values became part of the rewritten graph are compared by value.

What the code reads outside its modules (a configuration, globals, closures, class attributes) is in
``moeopt.rewrite.reads``. The whole guard is one generated comparison by identity
(``moeopt.rewrite.guard_expression``); where an object was replaced, values are compared, and the change is named.

Not seen: in code compiled by ``torch.compile``, anything changed after compilation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from moeopt.rewrite.frozen_values import Frozen
from moeopt.rewrite.guard_expression import GuardExpression, holds
from moeopt.rewrite.live_codes import PREFIX
from moeopt.rewrite.module_facts import Fact, hook_count, tensors_of
from moeopt.rewrite.reads import Reads
from moeopt.value_types import PyObject

_ORDERED = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Containers whose order counts, and whose users go through all that they hold."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _of_pytorch(module: nn.Module) -> bool:
    """Whether ``module`` is one of ``torch.nn``, whose code reads its own Parameters and buffers only."""
    return type(module).__module__.startswith("torch.nn.")


class _WatchedModule:
    """One module, and the facts about it that were verified.

    Args:
        weights: the names of its Parameters and buffers that are weights of experts.
    """

    __slots__ = ("children", "fact", "module", "tables", "weights")

    def __init__(self, fact: Fact, module: nn.Module, weights: Collection[str]) -> None:
        self.fact, self.module, self.weights = fact, module, weights
        self.children = tuple(module._modules.get(n) for n in fact.children)
        # where modules, weights and what is absent are looked up; of another table there nothing would be noticed
        d, looked_up = module.__dict__, {*weights, *fact.absent}
        tables = [t for t in ("_parameters", "_buffers") if not d[t].keys().isdisjoint(looked_up)]
        self.tables = [(name, d[name]) for name in (["_modules"] if d["_modules"] else []) + tables]

    def compare(self, guard: GuardExpression) -> None:
        """Add terms to ``guard`` that hold while everything that ``changed`` compares is the same object."""
        fact, module = self.fact, self.module
        d: dict[str, Any] = module.__dict__
        guard.attribute(module, "__class__", module.__class__)
        guard.attribute(module.__class__, "forward", module.__class__.forward)
        if fact.path:
            for kind in _HOOKS:
                count = len(d[kind])
                guard.add(f"{{0}}({{1}}) == {count}" if count else "not {1}", len, d[kind])
            if not fact.patched and "forward" not in d:
                guard.lacks(d, "forward")
        for name, held in self.tables:
            guard.item(d, name, held)
        for name in self.weights:  # an attribute of the instance is found before a Parameter
            if any(name in table for _, table in self.tables):
                guard.lacks(d, name)
        guard.entries(d["_modules"], ordered=isinstance(module, _ORDERED))
        for name, training in fact.modes:
            if (child := module._modules.get(name)) is not None:
                guard.item(child.__dict__, "training", training)
        tables = [(d, fact.names)]
        for table in (d["_parameters"], d["_buffers"]):
            tables.append((table, tuple(n for n in fact.absent if n in table)))
            if not _of_pytorch(module):
                guard.length(table)
        for table, names in tables:
            for name in names:
                if name not in table:
                    guard.lacks(table, name)
                    continue
                guard.item(table, name, table[name])
                if type(table[name]) is list:
                    guard.equal(table[name], table[name].copy())

    def changed(self) -> str:
        """The first difference from the verified facts, in words; "" where there is none."""
        fact, module = self.fact, self.module
        d, name = module.__dict__, fact.path or "the block"
        if not fact.has_class(module.__class__):
            return f"the class of {name}, or its forward, is not the one that was verified"
        if fact.path and (hook_count(module) != fact.hooks):
            return f"a hook was registered on {name}, which is no longer called for each expert"
        if fact.path and not fact.patched and "forward" in d:
            return f"forward was replaced on {name}"
        for table, held in self.tables:
            if d.get(table) is not held:
                return f"{table} of {name} was replaced"
        for tensor in self.weights:
            if tensor in d and any(tensor in table for _, table in self.tables):
                return f"{tensor} of {name} is an attribute of the instance, and was a Parameter or buffer alone"
        try:
            same = tuple(d[n] for n in fact.names) == fact.values
            same = same and tuple(d["_modules"][n] for n in fact.children) == self.children
        except KeyError as missing:
            return f"{missing} was removed from {name}"
        if not same:
            return self._changed_attribute(d, name)
        for tensor in fact.absent:
            if tensors_of(module).get(tensor) is not None:
                return f"{name} has a {tensor}, and had none"
        for live, training in fact.modes:
            if (child := module._modules.get(live)) is not None and child.training != training:
                return f"training of {f'{fact.path}.{live}'.lstrip('.')} is {child.training} and was {training}"
        return self._additions(name)

    def _additions(self, name: str) -> str:
        """A module, Parameter or buffer that was added, or children in another order; "" without either."""
        fact, children = self.fact, self.module._modules
        if added := children.keys() - {*fact.children, *fact.live, *fact.written}:
            return f"the module {min(added)} was added to {name}"
        added = {n for n in tensors_of(self.module) if not n.startswith(PREFIX)} - {*fact.tensors, *fact.written}
        if added and not _of_pytorch(self.module):
            return f"the Parameter or buffer {min(added)} was added to {name}"
        if tuple(n for n in children if n in fact.children) != fact.children:
            return f"the modules in {name} are in another order"
        return ""

    def _changed_attribute(self, d: dict[str, Any], name: str) -> str:
        for attribute, value in zip(self.fact.names, self.fact.values, strict=True):
            if d[attribute] != value:
                return f"{attribute} of {name} is {d[attribute]!r} and was {value!r}"
        return f"a module in {name} was replaced"


class Watch:
    """The guard of one block, bound to its modules; ``shared`` and ``expert`` say what changed.

    Args:
        root: the block.
        facts: what ``take_facts`` took.
        experts: for each expert of each op, the paths of its weights.
        frozen: by path, the values of tensors that decided what the rewritten code is.
        reads: what its code read outside its modules.

    Attributes:
        cost: about how many nanoseconds ``shared`` takes.
        misfit: which weight is not like the verified one, in a sentence.
        paused: while true nothing is compared: see ``whole_model.exported``.
    """

    paused, misfit = False, ""

    def __init__(
        self,
        root: nn.Module,
        facts: list[Fact],
        experts: dict[Any, set[str]],
        frozen: Mapping[str, Tensor] = MappingProxyType({}),
        reads: Reads | None = None,
    ) -> None:
        self._root, self._reads = root, reads
        self._frozen = [Frozen(root, path, value) for path, value in frozen.items()]
        modules = dict(root.named_modules(remove_duplicate=False))
        self.gone = next((f"{f.path} was removed" for f in facts if f.path not in modules), "")
        self._shared: list[_WatchedModule] = []
        self._by_expert: dict[Any, list[_WatchedModule]] = {key: [] for key in experts}
        self._opaque: dict[str, Any] | None = None
        self.cost = 0
        if self.gone:
            return
        self._owners: dict[str, set[Any]] = {}
        weights: dict[str, set[str]] = {}
        for key, paths in experts.items():
            for path in paths:
                owner, _, name = path.rpartition(".")
                weights.setdefault(owner, set()).add(name)
                while path:
                    path = path.rpartition(".")[0]
                    self._owners.setdefault(path, set()).add(key)
        for fact in facts:
            keys = self._expert_of(fact.path)
            expert_weights = sorted(weights.get(fact.path, ()))
            watched = _WatchedModule(fact, modules[fact.path], expert_weights)
            (self._by_expert[keys[0]] if keys else self._shared).append(watched)
        self._compare_values()

    def _expert_of(self, path: str) -> tuple[Any, ...]:
        """The key of the one expert to which the module at ``path`` belongs; () for none or several."""
        while path and path not in self._owners:
            path = path.rpartition(".")[0]
        keys = self._owners.get(path, set())
        return tuple(keys) if len(keys) == 1 and path else ()

    def _compare_values(self) -> None:
        """Compare all values, and compile the identity guards anew for the objects that are there now."""
        shared, by_expert = GuardExpression(), {key: GuardExpression() for key in self._by_expert}
        for module in self._shared:
            module.compare(shared)
        for key, watched in self._by_expert.items():
            for module in watched:
                module.compare(by_expert[key])
        self._read_reason = "" if self._reads is None else self._compare_reads(self._reads, shared, by_expert)
        self._shared_reason = _first_change(self._shared)
        self._expert_reasons = {key: _first_change(watched) for key, watched in self._by_expert.items()}
        self.cost = shared.cost
        self._unchanged = not (self._shared_reason or self._read_reason or self._frozen)
        self._shared_guard = shared.compiled()
        self._expert_guards = {key: guard.compiled() for key, guard in by_expert.items()}

    def _compare_reads(self, reads: Reads, shared: GuardExpression, by_expert: dict[Any, GuardExpression]) -> str:
        def links(path: str) -> GuardExpression:
            keys = self._expert_of(path)
            return by_expert[keys[0]] if keys else shared

        walk = reads.walk(self._root, shared, links)
        before, self._opaque = self._opaque, self._opaque or walk.opaque
        moved = (place for place, value in (before or {}).items() if walk.opaque.get(place) is not value)
        place = next(moved, "")
        return reads.difference(walk) or (f"{place}, which its code reads, was replaced" if place else "")

    def shared(self) -> str:
        """What changed in the modules that every call of the original would run, and in what its code reads."""
        if self.paused:
            return ""
        if self.gone or self.misfit:
            return self.gone or self.misfit
        try:
            if self._shared_guard() and self._unchanged:
                return ""
        except Exception:  # the same as in ``holds``, without the cost of a call
            pass
        if not holds(self._shared_guard):
            self._compare_values()
        if self._shared_reason or self._read_reason:
            return self._shared_reason or next(filter(None, self._expert_reasons.values()), "") or self._read_reason
        return _first_change(self._frozen) if self._frozen else ""

    def expert(self, key: PyObject) -> str:
        """What changed in the modules of one expert, also where another call noticed the change first."""
        if self.paused or holds(self._expert_guards[key]):
            return "" if self.paused else self._expert_reasons[key] or self._read_reason
        self._compare_values()
        return self._expert_reasons[key] or self._shared_reason or self._read_reason

    def arm(self, bank: int, guard: GuardExpression) -> None:
        """Add the terms that hold while no module of an expert of the bank number ``bank`` changes."""
        keys, unused = [key for key in self._by_expert if key[0] == bank], GuardExpression()
        own_keys = {(key,) for key in keys}
        if self.paused:  # what is there now may be an exporter's own
            guard.add("{0}.paused", self)
        for key in keys:
            for module in self._by_expert[key]:
                module.compare(guard)
        if self._reads is not None and keys:

            def guard_of(path: str) -> GuardExpression:
                return guard if self._expert_of(path)[:1] in own_keys else unused

            self._reads.walk(self._root, unused, guard_of)

    def everything(self) -> str:
        """What changed anywhere; modules first, since they decide what their code reads."""
        shared = self.shared()
        for key in self._by_expert:
            self.expert(key)
        of_an_expert = next(filter(None, self._expert_reasons.values()), "")
        return self._shared_reason or of_an_expert or self._read_reason or shared


def _first_change(watched: Sequence[_WatchedModule | Frozen]) -> str:
    for module in watched:
        reason = module.changed()
        if reason:
            return reason
    return ""
