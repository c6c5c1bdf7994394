"""Run a model's own code without leaving a trace: inputs, parameters, buffers, attributes, RNG.

A verification run is many runs of somebody's code, some of them in another precision. Inputs are
cloned before each run. What a forward keeps on itself (a counter buffer, ``self.last_logits = ...``,
a classifier swapped for its cast copy, what it appends to a list of its own) is put back after each run,
and so is the RNG state, so that every run of a case starts from the same place.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeopt.capture.held_state import HeldState
from moeopt.capture.isolated_run import WatchWrites
from moeopt.errors import Declined
from moeopt.value_types import PyObject

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, nn.Module, type)


def clone_inputs_and_objects(tree: PyObject) -> PyObject:
    """``tree`` with every tensor cloned; dataclasses and other containers are copied, modules are not."""
    return pytree.tree_map(_clone_leaf, tree)


def _clone_leaf(leaf: PyObject) -> PyObject:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    if isinstance(leaf, _PLAIN) or callable(leaf):
        return leaf
    if dataclasses.is_dataclass(leaf):
        twin = copy.copy(leaf)
        for field in dataclasses.fields(leaf):
            object.__setattr__(twin, field.name, clone_inputs_and_objects(getattr(leaf, field.name)))
        return twin
    return copy.deepcopy(leaf)


def modules_of(fn: Callable[..., Any]) -> list[nn.Module]:
    """The modules a callable can reach: itself, its ``self``, bound arguments, closure, attributes."""
    modules: list[nn.Module] = []
    seen: set[int] = set()
    pending: list[Any] = [fn]
    while pending:
        thing = pending.pop(0)
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            modules.append(thing)
        elif isinstance(thing, functools.partial):
            pending += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, types.MethodType):
            pending += [thing.__self__, thing.__func__]
        elif isinstance(thing, types.FunctionType):
            pending += [cell.cell_contents for cell in thing.__closure__ or () if _filled(cell)]
        elif thing is fn:
            pending += list(getattr(thing, "__dict__", {}).values())
    return modules


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


class RestoreState:
    """Context manager: snapshot of what ``fn`` may change on itself, restored on exit.

    Between runs from one snapshot, :meth:`restore` does what the exit does. Tensors are saved lazily: a dispatch mode
    calls :meth:`before_write` with each tensor that an op is about to write, and only a storage that belongs to the
    model is cloned. ``written`` names them: Parameters, buffers, and tensors in attributes of any kind.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._roots = modules_of(fn)
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.written: list[str] = []

    def __enter__(self) -> RestoreState:
        self._modules = list(_unique_modules(self._roots))
        self._held = HeldState(self._modules)
        self._owners: dict[int, list[tuple[str, Tensor, Tensor]]] = {}
        for path, module in self._modules:
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        self._own(f"{path}.{name}" if path else name, tensor)
        for place, tensor in self._held.tensors.items():
            self._own(place, tensor)
        self._rng = torch.get_rng_state()
        self._cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        return self

    def _own(self, name: str, tensor: Tensor) -> None:
        if tensor.layout == torch.strided and tensor.device.type != "meta" and type(data := tensor.data) is Tensor:
            self._owners.setdefault(data.untyped_storage().data_ptr(), []).append((name, tensor, data))

    def before_write(self, tensor: Tensor) -> None:
        """Save ``tensor``'s storage where it is the model's, once and whole: tensors may be parts of it, or overlap."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key and key in self._owners and key not in self._saved:
            self._saved[key] = storage, storage.clone()
            self.written += [name for name, _, _ in self._owners[key]]

    def after(self) -> dict[str, Tensor]:
        """Name -> value now, of every tensor of the model that the run has written."""
        entries = (entry for key in self._saved for entry in self._owners[key])
        return {name: owner.detach().clone() for name, owner, _ in entries}

    def changed(self) -> frozenset[str]:
        """The names in ``after`` whose values are others than before."""
        entries = ((held, entry) for key, (_, held) in self._saved.items() for entry in self._owners[key])
        return frozenset(name for held, (name, owner, data) in entries if not _same_bits(owner.data, _in(held, data)))

    def __exit__(self, *exc: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Put everything back as it was."""
        self._held.restore()
        for storage, held in self._saved.values():
            storage.copy_(held)
        for entries in self._owners.values():
            for _, owner, data in entries:
                if owner.data_ptr() != data.data_ptr() or owner.dtype != data.dtype:
                    owner.data = data
        torch.set_rng_state(self._rng)
        if self._cuda_rng is not None:
            torch.cuda.set_rng_state_all(self._cuda_rng)


@contextlib.contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """With ``module`` in training or evaluation mode, as its own ``train()`` makes it; afterwards all is as before.

    A ``train()`` of the user's may do more than set flags: one that merges an adapter into a weight writes that weight,
    which a copy of the model shares with the model. A module in that mode already is left as it is.

    Raises:
        Declined: its ``train()`` raises, as that of a graph does which was exported for one mode.
    """
    if module.training == training:
        yield
        return
    with RestoreState(module) as state:
        try:
            with WatchWrites(state.before_write):
                module.train(training)
        except Exception as err:
            raise Declined(f"train({training}) of {type(module).__name__} raises {type(err).__name__}: {err}") from err
        yield


def _in(held: torch.UntypedStorage, data: Tensor) -> Tensor:
    """What ``data`` was when its storage was copied to ``held``."""
    before = torch.empty(0, dtype=data.dtype, device=data.device)
    return before.set_(held, data.storage_offset(), data.shape, data.stride())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal values, NaN being equal to NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _unique_modules(roots: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    for root in roots:
        for path, module in root.named_modules(remove_duplicate=True):
            if id(module) not in seen:
                seen.add(id(module))
                yield path, module
