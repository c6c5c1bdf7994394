"""Which node holds the current value of a tensor, through views of one memory and writes to it.

Each memory has an owner: the node whose value fills it now. A view is written as its op on the owner; a write to a view
goes back through the inverse of each op up to the memory's first tensor, whose new value is the new owner. A tensor
that was read before the write is read again from the new owner, which is how an in-place program becomes a functional
one.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.capture.functional import inverse_view
from moeopt.capture.module_state import ModuleState
from moeopt.capture.nodes import NodeFactory
from moeopt.errors import CaptureError
from moeopt.value_types import FxArg, PyObject

aten = torch.ops.aten


@dataclass
class _Storage:
    owner: fx.Node
    origin: fx.Node
    version: int = 0


@dataclass
class _Entry:
    ref: Callable[[], torch.Tensor | None]
    node: fx.Node
    version: int
    parent: torch.Tensor | None = None
    view: tuple[Any, tuple[Any, ...], dict[str, Any], int | None] | None = None


def unusual_layout(t: torch.Tensor) -> str:
    """What a tensor is that is no grid of numbers in one block of memory (sparse_coo, nested); "" of a grid."""
    if t.is_nested:
        return "nested"
    return "" if t.layout == torch.strided else str(t.layout).removeprefix("torch.")


def storage_key(t: torch.Tensor) -> int:
    """The identity of the memory that ``t`` lies in; one that lies in no one block as a grid (sparse) has its own."""
    return -id(t) if unusual_layout(t) else int(t.untyped_storage()._cdata)


class MemoryNodes(TorchDispatchMode):
    """The nodes of a run, and for each live tensor the node that holds its value.

    Attributes:
        nodes: in the order in which they were made.
        values: what each held, where ``keep_values``; a value that a write destroys is copied before.
        current: the index of the module call that new nodes belong to.
        mutations: the node of an input, parameter or buffer that was written to -> the node of its last value.
    """

    def __init__(self, state: ModuleState, keep_values: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.keep_values = keep_values
        self.make = NodeFactory()
        self.nodes: list[fx.Node] = []
        self.values: dict[fx.Node, Any] = {}
        self.current: int | None = None
        self.mutations: dict[fx.Node, fx.Node] = {}
        self._pause = 0
        self._entries: dict[int, _Entry] = {}
        self._storages: dict[int, _Storage] = {}
        self._views: dict[int, list[_Entry]] = {}
        self._alive: list[torch.Tensor] = []
        self._attributes: dict[int, str] = {}
        for name, tensor in (*state.parameters, *state.buffers):
            self._attributes.setdefault(id(tensor), name)
        for path, module in state.modules:
            for name, value in module.__dict__.items():
                if isinstance(value, torch.Tensor):
                    self._attributes.setdefault(id(value), f"{path}.{name}" if path else name)
        self._by_storage: dict[int, torch.Tensor] = {}
        for _, tensor in (*state.parameters, *state.buffers):
            if not unusual_layout(tensor) and tensor.device.type != "meta":
                self._by_storage.setdefault(storage_key(tensor), tensor)

    def _finish(self, node: fx.Node, value: PyObject) -> fx.Node:
        node.meta["call"] = self.current if self.current is not None else 0
        node.meta["index"] = len(self.nodes)
        if isinstance(value, torch.Tensor):
            layout = unusual_layout(value)
            ragged = layout == "nested" and value.layout == torch.strided  # such a tensor has no shape
            node.meta["shape"] = (value.numel(),) if ragged else tuple(value.shape)
            node.meta["dtype"] = value.dtype
            if layout:
                node.meta["layout"] = layout
        self.nodes.append(node)
        if self.keep_values:
            self.values[node] = value
        return node

    def _enter(self, t: torch.Tensor, node: fx.Node, **extra: PyObject) -> fx.Node:
        key = storage_key(t)
        if extra.get("view") is None:
            storage = self._storages[key] = _Storage(node, node)
        else:
            storage = self._storages[key]
        ref: Callable[[], torch.Tensor | None] = weakref.ref(t)
        entry = self._entries[id(t)] = _Entry(ref, node, storage.version, **extra)
        if extra.get("view") is None:
            self._views[key] = [entry]
        else:
            self._views[key].append(entry)
        if self.keep_values:
            self._alive.append(t)
        return node

    def add_input(self, t: torch.Tensor, name: str) -> fx.Node:
        """A placeholder for a tensor that the caller passed in."""
        node = self.make.placeholder(name)
        known = self._storages.get(storage_key(t))
        self._finish(node, t)
        if known is not None:
            raise CaptureError(f"two inputs share memory ({known.owner} and {name}); pass a copy of one of them")
        return self._enter(t, node)

    def node_of(self, t: torch.Tensor) -> fx.Node:
        """The node that holds the current value of ``t``."""
        entry = self._entries.get(id(t))
        if entry is None or entry.ref() is not t:
            return self._new_leaf(t)
        storage = self._storages[storage_key(t)]
        if entry.version == storage.version:
            return entry.node
        if entry.view is None:
            entry.node = storage.owner
        else:
            func, args, kwargs, item = entry.view
            assert entry.parent is not None
            base = self.node_of(entry.parent)
            node = self._finish(self.make.call(func, (base, *args), kwargs), None)
            self.values.pop(node, None)
            if item is not None:
                node = self._finish(self.make.call(operator.getitem, (node, item)), None)
                self.values.pop(node, None)
            node.meta.update(shape=tuple(t.shape), dtype=t.dtype)
            entry.node = node
        entry.version = storage.version
        return entry.node

    def _new_leaf(self, t: torch.Tensor) -> fx.Node:
        name = self._attributes.get(id(t))
        if name is not None:
            node = self.make.attribute(name)
            return self._enter(t, self._finish(node, t))
        base = None if unusual_layout(t) else self._by_storage.get(storage_key(t))
        if base is not None and base is not t:  # a .data or detached alias of a parameter
            parent = self.node_of(base)
            geometry = (list(t.shape), list(t.stride()), t.storage_offset())
            node = self._finish(self.make.call(aten.as_strided.default, (parent, *geometry)), t)
            return self._enter(t, node, parent=base, view=(aten.as_strided.default, geometry, {}, None))
        node = self.make.attribute(f"_constant_{len(self.nodes)}")
        node.meta["constant"] = t.detach().clone()
        self._finish(node, t)
        known = self._storages.get(storage_key(t))
        if known is not None:  # an unseen alias of a recorded tensor: only its value is known
            entry = self._entries[id(t)] = _Entry(weakref.ref(t), node, known.version)
            self._views[storage_key(t)].append(entry)
            self._alive.append(t)
            return node
        return self._enter(t, node)

    def _as_nodes_dict(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {k: self._as_nodes(v) for k, v in kwargs.items()}

    def _as_nodes(self, arg: FxArg) -> PyObject:
        if isinstance(arg, torch.Tensor):
            return self.node_of(arg)
        if isinstance(arg, (list, tuple)):
            return type(arg)(self._as_nodes(a) for a in arg) if type(arg) in (list, tuple) else list(arg)
        return arg

    def _preserve(self, key: int, storage: _Storage) -> None:
        """Before a write: keep the old value of the storage's owner; views are recomputed from it."""
        if not self.keep_values:
            return
        self._views[key] = [e for e in self._views[key] if e.ref() is not None]
        for entry in self._views[key]:
            t = entry.ref()
            if t is not None:
                if entry.node is storage.owner and entry.view is None and entry.version == storage.version:
                    self._pause += 1
                    self.values[entry.node] = t.detach().clone(memory_format=torch.preserve_format)
                    self._pause -= 1
                else:
                    self.values.pop(entry.node, None)
                    if entry.node.target is operator.getitem:  # its tuple holds live views as well
                        self.values.pop(entry.node.args[0], None)  # type: ignore[arg-type]

    def _write_back(self, target: torch.Tensor, node: fx.Node, storage: _Storage) -> None:
        entry = self._entries[id(target)]
        owner = node
        current, current_entry = target, entry
        while current_entry.view is not None:
            assert current_entry.parent is not None
            parent = current_entry.parent
            base = self.node_of(parent)
            func, args, kwargs, item = current_entry.view
            inverse, inverse_args = inverse_view(func, args, kwargs, item, base, owner, parent, current)
            owner = self._finish(self.make.call(inverse, inverse_args), None)
            self.values.pop(owner, None)
            owner.meta.update(shape=tuple(parent.shape), dtype=parent.dtype)
            current, current_entry = parent, self._entries[id(parent)]
        if storage.owner.op in ("placeholder", "get_attr") or storage.owner in self.mutations.values():
            source = next((k for k, v in self.mutations.items() if v is storage.owner), storage.owner)
            self.mutations[source] = owner
        storage.owner = owner
        storage.version += 1
        current_entry.node, current_entry.version = owner, storage.version
        entry.node, entry.version = node, storage.version
