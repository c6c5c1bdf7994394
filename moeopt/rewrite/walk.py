"""Everything plain that a block's forward can reach through the names in its code, as (place, value) pairs.

From the block's modules, their classes and the globals of the functions that ran, attributes, keys, closures and
defaults are followed by name through objects of any kind. What ends a path is a plain value, spelled as text so that
copies and pickles can be compared; on the way each link becomes a term of a :class:`GuardExpression`. No code of the
objects runs: tables are read directly.
"""

from __future__ import annotations

import builtins
import collections
import functools
import importlib.util
import sys
import types
import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from moeopt.options import variables
from moeopt.rewrite.code import digest, filled, fingerprint, foreign, installed, words
from moeopt.rewrite.guard_expression import GuardExpression
from moeopt.rewrite.ran import Ran
from moeopt.rewrite.spell import INERT, Spelled, array_text, inert, is_array, key_text, plain, readable, tensor_text

MOST = 4096
"""Places that one block may read; more would make each call slow."""
_WHOLE = 64
"""Entries up to which a dict is watched as a whole; of a larger one the keys that the code names are."""
_LONG = 1024
"""Elements up to which a list or set is compared; a longer one is watched by its length."""
_SMALL = 64
"""Elements up to which a tensor on the CPU is compared by value at each call."""
_BYTES = 4096
"""Size up to which a NumPy array is compared by value at each call."""


_MODULE = frozenset(nn.Module().__dict__)
_BUILTIN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.GetSetDescriptorType,
)


class Bounds(Protocol):
    """What a walk follows: see :class:`moeopt.rewrite.reads.Reads`."""

    ran: Ran
    names: frozenset[str]
    ignored: frozenset[str]
    whole: frozenset[str]
    tables: dict[str, dict[str, Any]]


class Walk:
    """One reading of a block's surroundings.

    Args:
        root: the block.
        bounds: what its code names, and what is left out.
        probe: gets a term for each link.
        called: ids of modules that the forward called; everything plain in those outside the block counts.

    Attributes:
        entries: the spelled value at each place.
        strings: short strings among them, which may name attributes in turn.
        opaque: objects that can only be told apart by identity.
    """

    def __init__(
        self, root: nn.Module, bounds: Bounds, probe: GuardExpression, called: frozenset[int] = frozenset()
    ) -> None:
        self.ran, self.names, self.ignored = bounds.ran, bounds.names, bounds.ignored
        self.whole, self.tables, self._called = set(bounds.whole), dict(bounds.tables), called
        self.probe = probe
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
            self._own.update({id(t): f"a tensor of {path or 'the block'}" for t in held if isinstance(t, torch.Tensor)})

    # -- where it starts -----------------------------------------------------------------------------

    def module(self, path: str, module: nn.Module, written: set[str], probe: GuardExpression) -> None:
        """The attributes of a module of the block but those ``written`` by it; ``probe`` gets the links to them."""
        held = module.__dict__
        for name in self._mentioned(held):
            if name not in written and name not in _MODULE and name not in ("forward", "_old_forward", "_hf_hook"):
                self._link(probe, held, name, held[name], f"{path}.{name}" if path else name)
        if not foreign(type(module).__module__):
            probe.keys(held)

    def functions(self) -> None:
        """The globals and imports of the code that ran."""
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
        module, writable = str(table.get("__name__")), not installed(table.get("__file__"))
        self.tables.setdefault(module, table)
        if foreign(module):
            return
        for name in names:
            if name in table and (writable or not inert(table[name])):
                self._link(self.probe, table, name, table[name], f"{module}.{name}")
            elif writable and name not in table and hasattr(builtins, name):
                self.probe.lacks(table, name)

    # -- one value -----------------------------------------------------------------------------------

    def _link(self, probe: GuardExpression, table: Any, key: Any, value: Any, place: str) -> None:
        if place not in self.ignored:
            probe.item(table, key, value)
            self.visit(place, value)

    def _note(self, place: str, kind: str, text: str) -> None:
        self.entries[place] = kind, text

    def visit(self, place: str, value: Any) -> None:
        """Write ``value`` down, and what is reached through it."""
        if place in self.ignored or len(self.entries) > MOST:
            return
        leaf = plain(value)
        if leaf is not None:
            self._note(place, *leaf)
            if type(value) is str and len(value) <= _SMALL:
                self.strings.add(value)
        elif id(value) in self._own:
            self._note(place, "own", self._own[id(value)])
        elif id(value) in self._seen:
            if self._seen[id(value)] != place:
                self._note(place, "same", self._seen[id(value)])
        else:
            self._seen[id(value)] = place
            self._alive.append(value)
            self._parts(place, value)

    def _parts(self, place: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._tensor(place, value)
        elif is_array(value):
            self._array(place, value)
        elif isinstance(value, types.FunctionType):
            self._function(place, value)
        elif isinstance(value, _BUILTIN):
            self._note(place, "function", fingerprint(value))  # type: ignore[arg-type]
        elif isinstance(value, types.MethodType):
            self._note(place, "method", value.__func__.__qualname__)
            self.visit(place, value.__func__)
            self.visit(f"{place}.__self__", value.__self__)
        elif isinstance(value, functools.partial):
            self._note(place, "partial", "")
            self._object(place, value, {"func": value.func, "args": value.args, "keywords": value.keywords})
        elif isinstance(value, (staticmethod, classmethod, property, functools.cached_property)):
            parts = ("fget",) if isinstance(value, property) else ("func", "__func__")
            self._note(place, type(value).__name__, "")
            self._object(place, value, {p: getattr(value, p) for p in parts if hasattr(value, p)}, alone=True)
        elif isinstance(value, type):
            self._note(place, "class", f"{value.__module__}.{value.__qualname__}")
            self.klass(value)
        elif isinstance(value, types.ModuleType):
            self._note(place, "module", value.__name__)
            if not foreign(value.__name__):
                self._named(place, value.__dict__)
            elif value.__name__ == "os":
                self._variables()
        elif isinstance(value, weakref.ref):
            self._note(place, "reference", "")
            self.visit(f"{place}()", value())
        elif isinstance(value, (dict, types.MappingProxyType)):
            self._dict(place, value)
        elif isinstance(value, (list, tuple, collections.deque)):
            self._sequence(place, value)
        elif isinstance(value, (set, frozenset, bytearray)):
            self._set(place, value)
        else:
            self._instance(place, value)

    # -- kinds ---------------------------------------------------------------------------------------

    def _tensor(self, place: str, value: torch.Tensor) -> None:
        self._note(place, "tensor", tensor_text(value))
        if not readable(value):
            self.opaque[place] = value
        if type(value) in (torch.Tensor, nn.Parameter, nn.Buffer) and not value.is_meta:
            with _disable_current_modes(), torch.no_grad():
                self.probe.tensor(value, value.numel() <= _SMALL and value.device.type == "cpu")

    def _array(self, place: str, value: Any) -> None:
        self._note(place, "array", array_text(value))
        if value.nbytes <= _BYTES and not value.dtype.hasobject:
            self.probe.add("{0}.tobytes() == {1}", value, value.tobytes())
        else:
            self.opaque[place] = value

    def _function(self, place: str, value: types.FunctionType) -> None:
        self._note(place, "function", fingerprint(value))
        code, writable = value.__code__, not installed(value.__code__.co_filename)
        if writable:
            self.probe.attribute(value, "__code__", code)
        if digest(code) not in self.ran.codes:
            return
        where = f"of {value.__qualname__}"
        if writable:
            self.probe.attribute(value, "__defaults__", value.__defaults__)
        first = code.co_argcount - len(value.__defaults__ or ())
        for name, default in zip(code.co_varnames[first:], value.__defaults__ or (), strict=False):
            self.visit(f"the default {name} {where}", default)
        if value.__kwdefaults__:
            self.visit(f"the defaults {where}", value.__kwdefaults__)
        for name, cell in zip(code.co_freevars, value.__closure__ or (), strict=False):
            spot = f"{name} in the closure {where}"
            if name != "__class__" and filled(cell) and spot not in self.ignored:
                self.probe.attribute(cell, "cell_contents", cell.cell_contents)
                self.visit(spot, cell.cell_contents)
        self._globals(value.__globals__, words(code).globals)

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
            if not installed(getattr(sys.modules.get(owner.__module__), "__file__", "")):
                self.probe.add(f"{{0}}({{1}}) == {len(owner.__dict__)}", len, owner.__dict__)  # a base may get hidden

    def _named(self, place: str, table: Any, every: bool = False) -> None:
        """The entries of a namespace that the code names."""
        for name in list(table) if every else self._mentioned(table):
            if type(table[name]) not in (types.MemberDescriptorType, types.GetSetDescriptorType):
                self._link(self.probe, table, name, table[name], f"{place}.{name}")

    def _mentioned(self, table: Any) -> list[str]:
        return [n for n in table if n in self.names]

    def _dict(self, place: str, value: Any) -> None:
        whole = len(value) <= _WHOLE
        named = [k for k in value if k in self.names or not isinstance(k, str)][:_LONG]
        registry = bool(named) and all(callable(v) for v in value.values())
        keys = list(value) if whole and not registry else named
        self._note(place, "dict", "" if registry or not whole else ", ".join(map(key_text, keys)))
        if type(value) is not types.MappingProxyType:
            self.probe.keys(value)
        for key in keys:
            self._link(self.probe, value, key, dict.__getitem__(value, key) if isinstance(value, dict) else value[key],
                       f"{place}[{key_text(key)}]")  # fmt: skip
        if type(value) is not dict:
            self._instance(place, value, note=False)

    def _sequence(self, place: str, value: Any) -> None:
        self._note(place, type(value).__name__, str(len(value)))
        changes = not isinstance(value, tuple)
        if len(value) > _LONG:
            self.probe.add(f"{{0}}({{1}}) == {len(value)}", len, value)
        elif all(plain(v) is not None for v in value):
            for index, part in enumerate(value):
                self.visit(f"{place}[{index}]", part)
            if changes:
                self.probe.equal(value, value.copy())
        else:
            self.probe.add(f"{{0}}({{1}}) == {len(value)}", len, value)
            for index, part in enumerate(value):
                if changes:
                    self.probe.add(f"{{0}}[{index}] is {{1}}", value, part)
                self.visit(f"{place}[{index}]", part)
        if type(value) not in (list, tuple):
            self._instance(place, value, note=False)

    def _variables(self) -> None:
        table, keys = variables(self.names)
        if table:
            self.probe.keys(table)
        for name, key in keys.items():
            self._link(self.probe, table, key, table[key], f"the variable {name}")

    def _set(self, place: str, value: Any) -> None:
        short = len(value) <= _LONG or isinstance(value, bytearray)
        spelled = str(sorted(map(key_text, value))) if short else str(len(value))
        self._note(place, type(value).__name__, spelled)
        if short and not isinstance(value, frozenset):
            self.probe.equal(value, value.copy())

    def _object(self, place: str, value: Any, parts: dict[str, Any], alone: bool = False) -> None:
        for name, part in parts.items():  # none of them can be assigned to
            self.visit(f"{place}.{name}" if not alone else place, part)

    def _instance(self, place: str, value: Any, note: bool = True) -> None:
        """An object: its class, the attributes that the code names, all of a module that the forward calls."""
        cls = type(value)
        if note:
            self._note(place, "object", f"{cls.__module__}.{cls.__qualname__}")
        if not foreign(cls.__module__):
            self.klass(cls)
            self.probe.add("{0}({1}) is {2}", type, value, cls)
        try:
            held = object.__getattribute__(value, "__dict__")
        except AttributeError:
            held = None
        if isinstance(value, nn.Module) and (id(value) in self._called or place in self.whole):
            self.whole.add(place)
            self._outside(place, value)
        elif isinstance(held, dict) and cls.__module__ not in INERT:
            lookup: object = cls.__getattribute__
            if lookup is object.__getattribute__:
                self.probe.attribute(value, "__dict__", held)
            else:
                self.probe.add("{0}({1}, {2}) is {3}", object.__getattribute__, value, "__dict__", held)
            self.probe.keys(held)
            self._named(place, held, self.ran.open)
            for registry in ("_parameters", "_buffers", "_modules") if isinstance(value, nn.Module) else ():
                self._named(place, held[registry])
        slots = [n for c in cls.__mro__ for n, v in vars(c).items() if type(v) is types.MemberDescriptorType]
        user = [n for n in slots if (n in self.names or self.ran.open) and not foreign(cls.__module__)]
        for name in user:
            part = getattr(value, name, self)
            if part is not self and f"{place}.{name}" not in self.ignored:
                self.probe.attribute(value, name, part)
                self.visit(f"{place}.{name}", part)
            elif part is self:
                self.probe.add("not {0}({1}, {2})", hasattr, value, name)
        if note and not isinstance(held, dict) and not user:
            self.opaque[place] = value

    def _outside(self, place: str, module: nn.Module) -> None:
        """A module that the block does not own: what it computes is not live in the rewritten code."""
        self.probe.keys(module.__dict__)
        for name, value in module.__dict__.items():
            if name not in _MODULE or name == "training":
                self._link(self.probe, module.__dict__, name, value, f"{place}.{name}")
        for registry in (module._parameters, module._buffers, module._modules):
            self.probe.keys(registry)
            for name, value in registry.items():
                if isinstance(value, nn.Module):
                    self.whole.add(f"{place}.{name}")
                self._link(self.probe, registry, name, value, f"{place}.{name}")
