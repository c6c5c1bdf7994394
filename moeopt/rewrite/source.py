"""What becomes of the model that was optimised, told by its optimised twin.

The twin shares the source's Parameters, so values written to them show in both. What is done to the source's structure
(another Parameter, ``load_state_dict(assign=True)``, hooks, parametrisations, replaced modules, another configuration)
does not show in the twin. Each call of a rewritten block compares a part of the source with what it was, all of it in a
few calls, and a :class:`StaleModelWarning` says once what changed. The source is held weakly: when it is gone, so is
this.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from moeopt.errors import StaleModelWarning
from moeopt.rewrite.guard_expression import GuardExpression, holds
from moeopt.rewrite.module_facts import hook_count
from moeopt.rewrite.reads import Reads
from moeopt.value_types import PyObject

_CALL, _PART, _LEAST, _CODE = 2400, 650, 300, 60
"""Nanoseconds that all comparisons of one call may take; those of a part of a source that does not fit beside a block's
own, and at least; and those of the code of one module."""


_TABLES = ("_modules", "_parameters", "_buffers")


def _registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._modules, module._parameters, module._buffers


def _items(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    for registry in _registries(module):
        for name, value in registry.items():
            yield registry, name, value


class _ModuleFacts:
    """The structure of one module of the source: children, Parameters, buffers, hooks.

    Args:
        twin: the same module of the twin; a change that both have is none.
        values: whether writes to its tensors count too, because the twin has copies of them.
    """

    def __init__(self, path: str, module: nn.Module, twin: nn.Module, values: bool) -> None:
        self.path, self.twin, self.values, self._module = path, twin, values, weakref.ref(module)
        self._before = dict(self._facts())

    def _facts(self) -> Iterator[tuple[str, Any]]:
        module = self._module()
        if module is None:
            return
        yield "the number of hooks", hook_count(module)  # a model's own code may set hooks at its first call
        for _, name, value in _items(module):
            yield name, value
            if self.values and name not in module._modules and value is not None and not value.is_inference():
                yield f"the values of {name}", value._version

    def hooked(self) -> bool:
        """Whether the number of hooks is another than it was."""
        module = self._module()
        return module is not None and hook_count(module) != self._before.get("the number of hooks")

    def arm(self, guard: GuardExpression) -> None:
        """Terms for all of it but hooks, which PyTorch counts."""
        module = self._module()
        if module is None:
            return
        for registry in filter(None, _registries(module)):
            guard.entries(registry)
        if self.values:
            for _, name, value in _items(module):
                if name not in module._modules and value is not None:
                    guard.tensor(value, False)

    def changed(self) -> str:
        """What is another than it was; from now on that is how it should be."""
        now, before = dict(self._facts()), self._before
        self._before = now
        also: dict[str, Any] = {name: value for _, name, value in _items(self.twin)}
        also["the number of hooks"] = hook_count(self.twin)
        for what in (*before, *(w for w in now if w not in before)):
            a, b, c = before.get(what, self), now.get(what, self), also.get(what)
            if a is not b and not (type(a) is int and b in (a, c)) and b is not c:
                where = self.path or "the model itself"
                return f"{what} of {where}" if what in before else f"{what}, new in the contents of {where}"
        return ""


class _Code:
    """The class of one module of the source, a forward of its own, and its tables of modules and tensors: which they
    are, and how many they hold."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self._module = path, weakref.ref(module)
        self._before = self._facts()

    def _facts(self) -> tuple[Any, ...]:
        module = self._module()
        if module is None:
            return ()
        tables = _registries(module)
        return type(module), id(module.__dict__.get("forward")), *map(len, tables), *tables

    def arm(self, guard: GuardExpression) -> None:
        """A term each; none that would hold the root."""
        module = self._module()
        if module is None:
            return
        if self.path:
            guard.attribute(module, "__class__", type(module))
        if "forward" not in module.__dict__:
            guard.lacks(module.__dict__, "forward")
        for name, registry in zip(_TABLES, _registries(module), strict=True):
            guard.item(module.__dict__, name, registry)
            guard.add(f"{{0}}({{1}}) == {len(registry)}" if registry else "not {1}", len, registry)

    def changed(self) -> str:
        """As that of ``_ModuleFacts``."""
        before, self._before = self._before, self._facts()
        pairs = zip(before, self._before, strict=False)  # a module that is gone has no facts
        same = len(before) == len(self._before) and all(a is b or (type(a) is int and a == b) for a, b in pairs)
        return "" if same else f"the code or the contents of {self.path or 'the model itself'}"


class _Block:
    """What the code of one block of the source reads in its own modules."""

    def __init__(self, path: str, block: nn.Module, reads: Reads) -> None:
        self.path, self.reads, self._block = path, reads, weakref.ref(block)
        self._before: dict[str, Any] = {}
        self.changed()

    def arm(self, guard: GuardExpression) -> None:
        """A term for each link."""
        block = self._block()
        if block is not None:
            self.reads.walk(block, guard, lambda path: guard, code=False)

    def changed(self) -> str:
        """As that of ``_ModuleFacts``."""
        block, unused = self._block(), GuardExpression()
        if block is None:
            return ""
        now = self.reads.walk(block, unused, lambda path: unused, code=False).entries
        before, self._before = self._before, now
        place = next((p for p in (*before, *now) if before.get(p) != now.get(p)), "")
        return f"{place} of {self.path or 'the model itself'}" if place and before else ""


_Thing = _ModuleFacts | _Code | _Block


def _armed(things: list[_Thing]) -> GuardExpression:
    guard = GuardExpression(classes=False)  # the twin's classes are the source's, and each block compares its own
    for thing in things:
        thing.arm(guard)
    return guard


class _Turns:
    """Things to compare, in parts of about ``max_nanoseconds`` nanoseconds, one part at a call.

    Attributes:
        next: gives the comparison of the part whose turn it is.
    """

    def __init__(self, things: list[_Thing], max_nanoseconds: int) -> None:
        self.parts: list[list[_Thing]] = []
        some: list[_Thing] = []
        guard = _armed(some)
        for thing in things:
            thing.arm(guard)
            if some and guard.cost > max_nanoseconds:
                self.parts.append(some)
                some, guard = [], _armed([thing])
            some.append(thing)
        self.parts += [some] if some else []
        self.sames = [_armed(part).compiled() for part in self.parts]
        self.next: Callable[[], Callable[[], bool]] = itertools.cycle(self.sames).__next__

    def differing(self) -> list[str]:
        """What is another than before in any part; from now on that is how it should be."""
        return self.told([turn for turn, same in enumerate(self.sames) if not holds(same)])

    def told(self, turns: list[int]) -> list[str]:
        """The changes in some parts; from now on that is how it should be."""
        found = [reason for turn in turns for thing in self.parts[turn] if (reason := thing.changed())]
        for turn in turns:
            self.sames[turn] = _armed(self.parts[turn]).compiled()
        self.next = itertools.cycle(self.sames).__next__
        return found


_NOTHING = _Turns([], 0)
_NOTHING.next = itertools.repeat(lambda: True).__next__
"""Of a source that is gone."""


def _hooked(thing: _Thing) -> bool:
    return isinstance(thing, _ModuleFacts) and thing.hooked()


class Source:
    """The model that was optimised, seen from its twin.

    Args:
        model: the source.
        twin: its optimised copy.
        blocks: by path, what the code of each rewritten block reads.
        values: whether the twin has copies of the source's tensors.
        cost: nanoseconds that a block's comparisons of itself take.
    """

    def __init__(self, model: nn.Module, twin: nn.Module, blocks: Mapping[str, Reads], values: bool, cost: int) -> None:
        modules = list(model.named_modules())
        others = dict(twin.named_modules())
        things: list[_Thing] = [_Block(path, model.get_submodule(path), reads) for path, reads in blocks.items()]
        things += [_ModuleFacts(path, module, others[path], values) for path, module in modules]
        whole = _armed(things).cost
        max_nanoseconds = whole if cost + whole <= _CALL else max(_LEAST, min(_PART, _CALL - cost))
        self._structure, self._code = (
            _Turns(things, max_nanoseconds),
            _Turns([_Code(*named) for named in modules], _CODE),
        )
        self._name, self._told, self._hooks = type(model).__name__, set[str](), RemovableHandle.next_id
        self._alive = weakref.ref(model, self._gone)

    def _gone(self, reference: PyObject) -> None:
        self._structure = self._code = _NOTHING

    def look(self) -> None:
        """Compare the next part of the source; warn once of each change found there."""
        if self._hooks != RemovableHandle.next_id:  # somewhere in this process a hook was registered
            self._hooks = RemovableHandle.next_id
            one = self._structure
            self._tell(one.told([turn for turn, things in enumerate(one.parts) if any(map(_hooked, things))]))
        try:
            if self._structure.next()() and self._code.next()():
                return
        except Exception:  # the same as in ``holds``, without the cost of a call
            pass
        self._tell([*self._structure.differing(), *self._code.differing()])

    def _tell(self, found: list[str]) -> None:
        reasons = [reason for reason in found if reason not in self._told]
        self._told.update(reasons)
        if reasons:
            more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
            warnings.warn(
                f"the {self._name} that was optimised has changed since ({reasons[0]}{more}), and this optimised copy "
                "of it has not: make the change on the optimised model's .model, or run moeopt.optimize again.",
                StaleModelWarning,
                stacklevel=5,
            )
