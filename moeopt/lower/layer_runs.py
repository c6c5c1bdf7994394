"""What alike layers run, op by op, in one call of the model: a stamped layer must run as the traced one does.

In a trace with stamps no code of a stamped layer runs, and the layer may know of itself by ways that nothing watches:
an iterator that each layer advances, a table that its caller changes. A number that the example call does not show (a
bound that no value reaches, one of two equal masks) would then be the traced layer's own in every layer, and a
comparison of results on the example would pass. So the model runs once more, with values, and of each call of a layer
is written down which ops it calls, with which numbers, on which tensors::

    (aten.clamp.default, [("of", 7, 0), (float, "20.0")])     the result of the layer's op 7, and a plain number

Alike layers write the same words. A tensor that is no argument, no weight and no result of the layer's own is told by
its bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from moeopt.ir.element_bytes import element_bytes
from moeopt.lower.alike_layers import weights_by_name
from moeopt.lower.carried_state import Carrier, one_carried
from moeopt.lower.layer_calls import PLAIN, Same, replaced_forward
from moeopt.ops.override import default_impl
from moeopt.value_types import FxTarget, PyObject

OpWords = list[Any]
"""The ops of one call of a layer, as values: two lists are equal if the calls ran the same code."""


def layer_runs(
    layers: dict[str, nn.Module], carrier: Carrier | None, run: Callable[[], PyObject]
) -> list[tuple[str, OpWords]]:
    """The calls of ``layers`` in one run of their model, in order, as (path, words).

    Args:
        layers: by path; none is inside another.
        carrier: knows the caches that layers are given, as in :mod:`.carried`.
        run: calls the model with values, and undoes what the model changes.
    """
    found: list[tuple[str, OpWords]] = []
    thread = threading.get_ident()
    inside = False

    def instead(path: str, layer: nn.Module) -> Callable[..., Any]:
        forward = layer.forward

        def call(*args: PyObject, **kwargs: PyObject) -> PyObject:
            nonlocal inside
            if inside or thread != threading.get_ident():
                return forward(*args, **kwargs)
            inside = True
            try:
                with _OpRecorder(_known(layer, (args, kwargs), carrier)) as ops:
                    result = forward(*args, **kwargs)
            finally:
                inside = False
            found.append((path, ops.words))
            return result

        return call

    with contextlib.ExitStack() as undo:
        for path, layer in layers.items():
            undo.enter_context(replaced_forward(layer, instead(path, layer)))
        with default_impl():
            run()
    return found


def _known(layer: nn.Module, call: PyObject, carrier: Carrier | None) -> list[tuple[Any, Tensor]]:
    """The tensors that a call of a layer has from the start, each with its word."""
    plain, cache = one_carried(call, carrier)
    leaves = pytree.tree_leaves(plain)
    known: list[tuple[Any, Tensor]] = [(("argument", n), t) for n, t in enumerate(leaves) if isinstance(t, Tensor)]
    known += [(("weight", name), t) for name, t in weights_by_name(layer).items()]
    if cache is not None and carrier is not None:  # which slot is a layer's own is looked at as the layer is traced
        slots = range(len(carrier.contents(cache)))
        known += [(("slot", n), t) for slot in slots for n, t in enumerate(carrier.parts(cache, slot))]
    return known


class _OpRecorder(TorchDispatchMode):
    """Writes down each op that runs while the mode is open."""

    supports_higher_order_operators = True

    def __init__(self, known: Sequence[tuple[Any, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.words: OpWords = []
        self._of: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._alive = known  # the address of a memory is its own only while it lives
        self._memory: dict[int, tuple[Any, Tensor]] = {}
        for word, tensor in known:
            self._of.setdefault(tensor, word)
            if _is_plain(tensor):
                self._memory.setdefault(tensor.untyped_storage()._cdata, (word, tensor))

    def __torch_dispatch__(
        self, func: FxTarget, types: PyObject, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> PyObject:
        number = len(self.words)
        self.words.append((func, pytree.tree_map(self._word, (args, kwargs or {}))))
        result = func(*args, **(kwargs or {}))
        for n, leaf in enumerate(pytree.tree_leaves(result)):
            if isinstance(leaf, Tensor):
                self._of.setdefault(leaf, ("of", number, n))
        return result

    def _word(self, leaf: PyObject) -> PyObject:
        if isinstance(leaf, Tensor):
            if leaf not in self._of:
                self._of[leaf] = self._alias(leaf) or _outside(leaf)
            return self._of[leaf]
        return (type(leaf), repr(leaf)) if isinstance(leaf, PLAIN) else Same(leaf)

    def _alias(self, t: Tensor) -> PyObject:
        """The word of a tensor that lies in the memory of a known one and that no op made (``weight.data``)."""
        found = self._memory.get(t.untyped_storage()._cdata) if _is_plain(t) else None
        if found is None:
            return None
        word, known = found
        return "alias", word, t.dtype, tuple(t.shape), t.stride(), t.storage_offset() - known.storage_offset()


def _is_plain(t: Tensor) -> bool:
    """Whether a tensor is a window on one memory that can be read."""
    known_type = type(t) in (Tensor, nn.Parameter, nn.Buffer)
    return known_type and t.layout == torch.strided and not t.is_meta and not is_fake(t)


def _outside(t: Tensor) -> PyObject:
    """The word of a tensor that came from elsewhere: the object where its bits cannot be read."""
    if not _is_plain(t):
        return "outside", Same(t)
    with torch.no_grad():
        return ("outside", t.dtype, tuple(t.shape), hashlib.sha256(element_bytes(t.cpu()).numpy().data).digest())
