"""Everything plain that a block's forward can reach through the names in its code, as (place, value) pairs.

From the block's modules, their classes and the globals of the functions that ran, attributes, keys, closures and
defaults are followed by name through objects of any kind. What ends a path is a plain value, spelled as text so that
copies and pickles can be compared; on the way each link becomes a term of a :class:`GuardExpression`. No code of the
objects runs: tables are read directly.
"""

from __future__ import annotations

import builtins
import collections
import contextvars
import functools
import importlib.util
import logging
import sys
import types
import weakref
from typing import Any, Protocol

import torch
from torch import nn

from moeopt.capture.held_contents import foreign
from moeopt.options import ASKED_WITH
from moeopt.patches import stands_for_builtin
from moeopt.rewrite.bytecode import digest, fingerprint, has_contents, in_installed_package, names_in
from moeopt.rewrite.executed_code import ExecutedCode
from moeopt.rewrite.guard_expression import GuardExpression
from moeopt.rewrite.value_text import Spelled, inert, is_array, plain, tells_nothing
from moeopt.rewrite.walk_ambient import bare_lookup, read_ambient, read_library, read_modes
from moeopt.rewrite.walk_containers import SMALL, read_array, read_dict, read_sequence, read_set, read_tensor
from moeopt.value_types import PyObject

MOST = 4096
"""Places that one block may read; more would make each call slow."""
_MODULE = frozenset(nn.Module().__dict__)
_BUILTIN = (
    types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType,
)  # fmt: skip


class Bounds(Protocol):
    """What a walk follows: see :class:`moeopt.rewrite.reads.Reads`."""

    ran: ExecutedCode
    names: frozenset[str]
    ignored: frozenset[str]
    whole: frozenset[str]
    tables: dict[str, dict[str, Any]]


class Walk:
    """One reading of a block's surroundings.

    Args:
        root: the block.
        bounds: what its code names, and what is left out.
        guard: gets a term for each link.
        called: ids of modules that the forward called; everything plain in those outside the block counts.

    Attributes:
        entries: the spelled value at each place.
        strings: short strings among them, which may name attributes in turn.
        opaque: objects that can only be told apart by identity.
    """

    def __init__(
        self, root: nn.Module, bounds: Bounds, guard: GuardExpression, called: frozenset[int] = frozenset()
    ) -> None:
        self.ran, self.names, self.ignored = bounds.ran, bounds.names, bounds.ignored
        self.whole, self.tables, self._called = set(bounds.whole), dict(bounds.tables), called
        self.guard = guard
        self.entries: dict[str, Spelled] = {}
        self.opaque: dict[str, Any] = {}
        self.strings: set[str] = set()
        self._classes: dict[str, type] = {}
        self._seen: dict[int, str] = {}
        self._alive: list[Any] = []
        self._own: dict[int, str] = {}
        for path, module in root.named_modules():
            self._own[id(module)] = path or "the block"
            held = (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values())
            tensors = [t for t in held if issubclass(type(t), torch.Tensor)]  # isinstance asks a proxy's dead object
            self._own.update({id(t): f"a tensor of {path or 'the block'}" for t in tensors})

    def module(self, path: str, module: nn.Module, written: set[str], guard: GuardExpression) -> None:
        """The attributes of a module of the block but those ``written`` by it; ``guard`` gets the links to them."""
        held = module.__dict__
        for name in self.mentioned(held):
            if name not in written and name not in _MODULE and name not in ("forward", "_old_forward", "_hf_hook"):
                self.link(guard, held, name, held[name], f"{path}.{name}" if path else name)
        if not foreign(type(module).__module__):
            guard.keys(held)

    def functions(self) -> None:
        """The globals and imports of the code that ran, and the modes of PyTorch under which it ran."""
        read_modes(self)
        for module, names in self.ran.globals:
            table = self.tables.get(module) or getattr(sys.modules.get(module), "__dict__", None)
            if table is not None:
                self._globals(table, names)
        for importer, level, name in self.ran.imports:
            package = (self.tables.get(importer) or {}).get("__package__")
            with_dots = importlib.util.resolve_name("." * level + name, package) if level and package else name
            held = sys.modules.get(with_dots)
            if held is not None:
                self.visit(with_dots, held)

    def _globals(self, table: dict[str, Any], names: tuple[str, ...]) -> None:
        module, writable = str(table.get("__name__")), not in_installed_package(table.get("__file__"))
        self.tables.setdefault(module, table)
        for name in () if foreign(module) else names:
            there = name in table and not stands_for_builtin(table[name])
            if there and (writable or not inert(table[name])):
                self.link(self.guard, table, name, table[name], f"{module}.{name}")
            elif not there and writable and hasattr(builtins, name):
                self.guard.lacks(table, name)

    def link(self, guard: GuardExpression, table: PyObject, key: PyObject, value: PyObject, place: str) -> None:
        """Visit ``value``, and give ``guard`` a term that notices another value under ``key``."""
        if place not in self.ignored:
            guard.item(table, key, value)
            self.visit(place, value)

    def note(self, place: str, kind: str, text: str) -> None:
        """Write down what stands at ``place``."""
        self.entries[place] = kind, text

    def visit(self, place: str, value: PyObject) -> None:
        """Write ``value`` down, and what is reached through it."""
        if place in self.ignored or len(self.entries) > MOST:
            return
        leaf = plain(value)
        if leaf is not None:
            self.note(place, *leaf)
            if type(value) is str and len(value) <= SMALL:
                self.strings.add(value)
        elif id(value) in self._own:
            self.note(place, "own", self._own[id(value)])
        elif id(value) in self._seen and not isinstance(value, logging.Logger):  # by which name is it asked?
            if self._seen[id(value)] != place:
                self.note(place, "same", self._seen[id(value)])
        else:
            self._seen[id(value)] = place
            self._alive.append(value)
            self._parts(place, value)

    def _parts(self, place: str, value: PyObject) -> None:
        if isinstance(value, torch.Tensor):
            read_tensor(self, place, value)
        elif is_array(value):
            read_array(self, place, value)
        elif isinstance(value, types.FunctionType):
            self._function(place, value)
        elif isinstance(value, _BUILTIN):
            self.note(place, "function", fingerprint(value))  # type: ignore[arg-type]
        elif isinstance(value, types.MethodType):
            self.note(place, "method", value.__func__.__qualname__)
            self.visit(place, value.__func__)
            self.visit(f"{place}.__self__", value.__self__)
        elif isinstance(value, functools.partial):
            self.note(place, "partial", "")
            self._object(place, value, {"func": value.func, "args": value.args, "keywords": value.keywords})
        elif isinstance(value, (staticmethod, classmethod, property, functools.cached_property)):
            parts = ("fget",) if isinstance(value, property) else ("func", "__func__")
            self.note(place, type(value).__name__, "")
            self._object(place, value, {p: getattr(value, p) for p in parts if hasattr(value, p)}, alone=True)
        elif isinstance(value, type):
            self.note(place, "class", f"{value.__module__}.{value.__qualname__}")
            self.klass(value)
        elif isinstance(value, types.ModuleType):
            self.note(place, "module", value.__name__)
            if not foreign(value.__name__):
                self._named(place, value.__dict__)
            else:
                read_library(self, value)
        elif isinstance(value, (contextvars.ContextVar, logging.Logger)):
            read_ambient(self, place, value)
        elif isinstance(value, weakref.ref):
            self.note(place, "reference", "")
            self.visit(f"{place}()", value())
        elif isinstance(value, (dict, types.MappingProxyType)):
            read_dict(self, place, value)
        elif isinstance(value, (list, tuple, collections.deque)):
            read_sequence(self, place, value)
        elif isinstance(value, (set, frozenset, bytearray)):
            read_set(self, place, value)
        else:
            self.instance(place, value)

    def _function(self, place: str, value: types.FunctionType) -> None:
        self.note(place, "function", fingerprint(value))
        code, writable = value.__code__, not in_installed_package(value.__code__.co_filename)
        if writable:
            self.guard.attribute(value, "__code__", code)
        if digest(code) not in self.ran.codes:
            if names_in(code).names & ASKED_WITH:  # a variable that it looks up is called by a name in it
                self.strings |= names_in(code).names
            return
        self._named(place, value.__dict__)
        where = f"of {value.__qualname__}"
        if writable:
            self.guard.attribute(value, "__defaults__", value.__defaults__)
        first = code.co_argcount - len(value.__defaults__ or ())
        for name, default in zip(code.co_varnames[first:], value.__defaults__ or (), strict=False):
            self.visit(f"the default {name} {where}", default)
        if value.__kwdefaults__:
            self.visit(f"the defaults {where}", value.__kwdefaults__)
        for name, cell in zip(code.co_freevars, value.__closure__ or (), strict=False):
            spot = f"{name} in the closure {where}"
            if name != "__class__" and has_contents(cell) and spot not in self.ignored:
                self.guard.attribute(cell, "cell_contents", cell.cell_contents)
                self.visit(spot, cell.cell_contents)
        self._globals(value.__globals__, names_in(code).globals)

    def klass(self, cls: type) -> None:
        """The attributes of a class and its bases that the code names; Python's and PyTorch's stay as they are."""
        for owner in cls.__mro__:
            place = owner.__qualname__
            while self._classes.get(place, owner) is not owner:  # two classes of one name
                place += "'"
            if place in self._classes or foreign(owner.__module__):
                continue
            self._classes[place] = owner
            self._named(place, owner.__dict__)
            if not in_installed_package(getattr(sys.modules.get(owner.__module__), "__file__", "")):
                # a new attribute may hide one of a base class
                self.guard.add(f"{{0}}({{1}}) == {len(owner.__dict__)}", len, owner.__dict__)

    def _named(self, place: str, table: PyObject, every: bool = False) -> None:
        """The entries of a namespace that the code names."""
        for name in list(table) if every else self.mentioned(table):
            if type(table[name]) not in (types.MemberDescriptorType, types.GetSetDescriptorType):
                self.link(self.guard, table, name, table[name], f"{place}.{name}")

    def mentioned(self, table: PyObject) -> list[str]:
        return [n for n in table if n in self.names]

    def _object(self, place: str, value: PyObject, parts: dict[str, Any], alone: bool = False) -> None:
        for name, part in parts.items():  # only the parts are watched: the table itself cannot be replaced
            self.visit(f"{place}.{name}" if not alone else place, part)

    def instance(self, place: str, value: PyObject, note: bool = True) -> None:
        """An object: its class, the attributes that the code names, all of a module that the forward calls."""
        cls = type(value)
        if note:
            self.note(place, "object", f"{cls.__module__}.{cls.__qualname__}")
        if not foreign(cls.__module__):
            self.klass(cls)
            self.guard.add("{0}({1}) is {2}", type, value, cls)
        bare = bare_lookup(cls)
        try:
            held = bare(value, "__dict__")
        except AttributeError:
            held = None
        if isinstance(value, nn.Module) and (id(value) in self._called or place in self.whole):
            self.whole.add(place)
            self._outside(place, value)
        elif isinstance(held, dict) and not tells_nothing(cls):
            lookup: object = cls.__getattribute__
            if lookup is object.__getattribute__:
                self.guard.attribute(value, "__dict__", held)
            else:
                self.guard.add("{0}({1}, {2}) is {3}", bare, value, "__dict__", held)
            self.guard.keys(held)
            self._named(place, held, self.ran.computes_names)
            for registry in ("_parameters", "_buffers", "_modules") if isinstance(value, nn.Module) else ():
                self._named(place, held[registry])
        user = self._slots(place, value)
        if note and not isinstance(held, dict) and not user:
            self.opaque[place] = value

    def _slots(self, place: str, value: PyObject) -> list[str]:
        """The slots of an object of the user's that the code names, each visited."""
        cls = type(value)
        slots = [n for c in cls.__mro__ for n, v in vars(c).items() if type(v) is types.MemberDescriptorType]
        user = [n for n in slots if (n in self.names or self.ran.computes_names) and not foreign(cls.__module__)]
        for name in user:
            part = getattr(value, name, self)
            if part is not self and f"{place}.{name}" not in self.ignored:
                self.guard.attribute(value, name, part)
                self.visit(f"{place}.{name}", part)
            elif part is self:
                self.guard.add("not {0}({1}, {2})", hasattr, value, name)
        return user

    def _outside(self, place: str, module: nn.Module) -> None:
        """A module that the block does not own: what it computes is not live in the rewritten code."""
        self.guard.keys(module.__dict__)
        for name, value in module.__dict__.items():
            if name not in _MODULE or name == "training":
                self.link(self.guard, module.__dict__, name, value, f"{place}.{name}")
        for registry in (module._parameters, module._buffers, module._modules):
            self.guard.keys(registry)
            for name, value in registry.items():
                if isinstance(value, nn.Module):
                    self.whole.add(f"{place}.{name}")
                self.link(self.guard, registry, name, value, f"{place}.{name}")
