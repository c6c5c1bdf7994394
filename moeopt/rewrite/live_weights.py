"""The weights of a rewritten block, read from the user's own Parameters at every call.

A :class:`LiveExpertWeights` holds no tensor. It knows in which module and under which name each expert's
matrix lives and looks it up when the expert is needed, so optimizer steps, ``load_state_dict``,
``.to()`` and in-place merges show at once. When the place itself has changed (a module was replaced,
hooked or parametrised, a dtype changed) the lookup raises :class:`Stale`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.ir.weight_refs import ExpertRef, MatrixRef, VectorRef
from moeopt.ops.expert_weights import ListExpertWeights, StackedExpertWeights
from moeopt.rewrite.bank_layout import BankLayout
from moeopt.rewrite.refused_call import Stale
from moeopt.rewrite.regular_steps import flat, steps_between
from moeopt.rewrite.same_layout import FEW, Arm, Remembered, SameLayout
from moeopt.rewrite.weight_regions import IRREGULAR, from_origin, region, region_of
from moeopt.rewrite.whole_experts import WholeExperts
from moeopt.rewrite.whole_stacks import WholeStacks, detached, numbers_of
from moeopt.value_types import PyObject

_PLAIN = {Tensor, nn.Parameter}


def tensor_subclass(tensor: Tensor) -> str:
    """The name of the tensor's class where functions of PyTorch run code of that class on it; else ""."""
    cls = type(tensor)
    if cls in _PLAIN or cls.__torch_function__ is torch._C._disabled_torch_function_impl:
        return ""
    inherited = getattr(cls.__torch_function__, "__func__", None) is vars(Tensor)["__torch_function__"].__func__
    return "" if inherited else cls.__name__


class Place:
    """One Parameter or buffer of a module tree, found again at each read, which gives a tensor of ``part_shape``."""

    __slots__ = ("dtype", "key", "kind", "links", "owner", "part_shape", "path", "registry", "shape")

    def __init__(self, root: nn.Module, path: str) -> None:
        *parents, self.key = path.split(".")
        self.path = path
        self.links: list[tuple[dict[str, Any], str, nn.Module]] = []
        module = root
        for name in parents:
            child = module._modules.get(name)
            if child is None:
                raise Stale(f"the module that held {path} was removed")
            self.links.append((module._modules, name, child))
            module = child
        self.owner = module
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        self.registry = next((r for r in registries if self.key in r), module._parameters)
        tensor = self.registry.get(self.key)
        if not isinstance(tensor, Tensor):
            raise Stale(f"{path} is no longer a plain Parameter (quantised, parametrised or removed)")
        self.dtype, self.shape, self.kind = tensor.dtype, tensor.shape, type(tensor)
        self.part_shape = tensor.shape

    def read(self) -> Tensor:
        for registry, name, child in self.links:
            if registry.get(name) is not child:
                raise Stale(f"the module that holds {self.path} was replaced")
        tensor = self.registry.get(self.key)
        if tensor is None:
            raise Stale(f"{self.path} is no longer a plain Parameter (parametrised or removed)")
        if tensor.is_meta:
            raise Stale(f"{self.path} is on the meta device (offloaded?) and has no values")
        if tensor.layout is not torch.strided:
            raise Stale(f"{self.path} is {tensor.layout} now, whose numbers do not lie at one address")
        if tensor.dtype is not self.dtype or tensor.shape != self.shape:
            raise Stale(f"{self.path} changed from {self.dtype} {tuple(self.shape)} "
                        f"to {tensor.dtype} {tuple(tensor.shape)}")  # fmt: skip
        if type(tensor) is not self.kind and tensor_subclass(tensor):
            raise Stale(f"{self.path} runs code of {tensor_subclass(tensor)} and did not")
        owner = self.owner
        if self.links and (owner._forward_hooks or owner._forward_pre_hooks):  # those of the block itself still run
            raise Stale(f"a forward hook was registered on the module that holds {self.path}")
        return tensor


class LiveExpertWeights:
    """``moeopt.ops.expert_weights.ExpertWeights`` over the Parameters of ``root``.

    Args:
        root: the block.
        experts: where each expert's matrices are, in the order of their ids.
        layouts: (W_in, W_out), each ``oi`` or ``io``: how the 2-D tensors are handed out.
        check: called with the number of each expert that is read; may raise :class:`Stale`.
        place: what finds and reads each Parameter.
        arm: adds the terms that hold while ``check`` raises for no expert; None: it is asked of each.
    """

    def __init__(
        self,
        root: nn.Module,
        experts: list[ExpertRef],
        layouts: tuple[str, str],
        check: Callable[[int], None] = lambda e: None,
        place: Callable[[nn.Module, str], Place] = Place,
        arm: Arm | None = None,
    ) -> None:
        self.num_experts, self._check = len(experts), check
        self._experts, self._layouts = experts, layouts
        self._places: dict[str, Place] = {}
        for ref in experts:
            for part in (*ref.w_in, *ref.b_in, ref.w_out, ref.b_out):
                if part is not None and part.path not in self._places:
                    self._places[part.path] = place(root, part.path)
        self._regions: dict[tuple[int, str], Any] = {}
        self._picks = [None if ref.neurons is None else torch.tensor(ref.neurons) for ref in experts]
        self._steps = steps_between(experts)
        made_anew = place is not Place or any(ref.neurons is not None for ref in experts)
        self._wholes: WholeExperts | None = None
        self._all = None if made_anew else BankLayout(self._places.values())
        self._lay = None if made_anew else SameLayout(list(self._places.values()), self.num_experts, check, arm)
        self._each: dict[int, BankLayout] = {}
        self.known: PyObject = None  # what a kernel worked out of these tensors, and how they lay then
        self.entries: dict[int, Any] = {}  # the same of each expert alone
        w_out = experts[0].w_out
        self.w_out_kind = self._places[w_out.path].dtype, w_out.m * w_out.k  # a place of another dtype is stale
        # the last result of stacked(): while its views are kept nobody else gets their memory, so addresses identify it
        self._stack: tuple[Any, StackedExpertWeights, list[Any]] | None = None
        self._whole_stacks: WholeStacks | None = None
        self._backwards = any(s < 0 for part in self._steps or () for step in flat(part) for s in step)

    def w_in(self, e: int) -> tuple[Tensor, ...]:
        """Expert e's first matrices."""
        if not torch.compiler.is_compiling():
            self._check(e)
        axis = 0 if self._layouts[0] == "oi" else 1
        return tuple([self._pick(e, self._matrix(ref, self._layouts[0]), axis) for ref in self._experts[e].w_in])

    def b_in(self, e: int) -> tuple[Tensor | None, ...]:
        """Expert e's first biases."""
        return tuple([None if ref is None else self._pick(e, self._vector(ref), 0) for ref in self._experts[e].b_in])

    def w_out(self, e: int) -> Tensor:
        """Expert e's second matrix."""
        return self._pick(e, self._matrix(self._experts[e].w_out, self._layouts[1]), int(self._layouts[1] == "oi"))

    def b_out(self, e: int) -> Tensor | None:
        """Expert e's second bias."""
        ref = self._experts[e].b_out
        return None if ref is None else self._vector(ref)

    def norm(self, e: int) -> Tensor | None:
        """No norm is recognised after W_out."""
        del e
        return None

    def lies(self) -> object:
        """Where every weight lies: equal to an earlier answer while none was moved, replaced or hooked.

        None where that can't be told of all at once; then each is read by itself.
        """
        if self._all is None:
            return None
        for e in range(self.num_experts):
            self._check(e)
        return None if (tensors := self._all.tensors()) is None else self._all.lie(tensors)

    def remembered(self, rows: int) -> Remembered | None:
        """What a kernel has worked out of the weights as they lie now, for it to fill, and all of them, to be kept.

        None where that can't be told of all at once, or not sooner than of the experts that ``rows`` rows may hit.
        """
        if self._lay is None or (rows < self.num_experts and len(self._places) > FEW):
            return None
        try:
            return self._lay.look()
        except Stale:  # who reads that expert tells it
            return None

    def listed(self) -> ListExpertWeights | None:
        """The weights as lists of tensors, each expert checked; None where one is a part of its Parameter.

        What is no longer as it was verified is told where it is read by itself: then too None.
        """
        if self._all is None or not (wholes := self._whole_experts()):
            return None
        for e in range(self.num_experts):
            self._check(e)
        tensors = self._all.tensors()
        if tensors is None or [(t.dtype, t.shape, t.is_meta) for t in tensors] != self._kinds:
            return None
        return wholes.listed(tensors)

    def unchecked(self) -> Sequence[Tensor] | None:
        """Every Parameter as it is now, whether or not it is as it was verified; None as in :meth:`lies`."""
        return None if self._all is None else self._all.tensors()

    def whole(self) -> tuple[Remembered, WholeExperts] | None:
        """Every Parameter as it is now, as :meth:`remembered`, each expert checked; and which each expert's are.

        None as in :meth:`listed`, and where they can't be told to lie anywhere all at once.
        """
        if self._lay is None or not (wholes := self._whole_experts()):
            return None
        looked = self._lay.look()
        return None if looked is None else (looked, wholes)

    def _whole_experts(self) -> WholeExperts:
        if self._wholes is None:
            self._kinds = [(p.dtype, p.shape, False) for p in self._places.values()]
            self._wholes = WholeExperts(self._experts, self._layouts, {p: t.shape for p, t in self._places.items()})
        return self._wholes

    def lies_alone(self, e: int) -> tuple[object, list[Tensor]] | None:
        """As :meth:`lies`, of expert ``e`` and no other; and its tensors, for who needs them kept."""
        if self._all is None:
            return None
        self._check(e)
        places = self._each.get(e)
        if places is None:
            ref = self._experts[e]
            parts = [part for part in (*ref.w_in, *ref.b_in, ref.w_out, ref.b_out) if part is not None]
            places = self._each[e] = BankLayout([self._places[part.path] for part in parts])
        tensors = places.tensors()
        return None if tensors is None else (places.lie(tensors), tensors)

    def _pick(self, e: int, part: Tensor, axis: int) -> Tensor:
        """Expert ``e``'s neurons of ``part``, which lie along ``axis``."""
        index = self._picks[e]
        return part if index is None else part.index_select(axis, index.to(part.device))

    def _matrix(self, ref: MatrixRef, layout: str) -> Tensor:
        tensor = self._places[ref.path].read()
        index = self._regions.get((id(ref), layout))
        if index is None:
            index = self._regions[id(ref), layout] = region_of(ref, layout, tensor.shape)
        if index is not IRREGULAR:
            part = tensor if index.whole else tensor[index.at]
            return part.t() if index.transposed else part
        return region(tensor, ref) if layout == "oi" else region(tensor, ref).t()

    def _vector(self, ref: VectorRef) -> Tensor:
        tensor = self._places[ref.path].read()
        if len(ref.origin) == 1 and ref.dm == (1,):
            return tensor if ref.m == tensor.shape[0] else tensor[ref.origin[0] : ref.origin[0] + ref.m]
        step = sum(o * s for o, s in zip(ref.dm, tensor.stride(), strict=True))
        return from_origin(tensor, ref.origin).as_strided((ref.m,), (step,))

    def stacked(self) -> StackedExpertWeights | None:
        """The weights as stacked tensors where every part is a regular slice of one Parameter."""
        if self._steps is None or self._backwards:
            return None
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._check(0)  # all experts lie in the same Parameters, so what is watched of one is that of all
        tensors = [place.read() for place in self._places.values()]
        if compiling or not _PLAIN.issuperset(map(type, tensors)):
            return self._stacked()
        if torch.is_grad_enabled():
            return self._recorded(tensors)
        now = (torch.is_inference_mode_enabled(), [(id(t), t.data_ptr(), t.stride(), t.is_neg()) for t in tensors])
        if self._stack is None or self._stack[0] != now:
            bank = detached(self._stacked())
            self._stack = now, bank, [weakref.ref(t, self._let_go) for t in tensors]
        return self._stack[1]

    def _recorded(self, tensors: list[Tensor]) -> StackedExpertWeights:
        """The stacks, through which gradients reach the Parameters."""
        known = self._whole_stacks  # looked up once: another thread may replace it
        if known is None or not known.knows(tensors):
            at = numbers_of(self._experts[0], list(self._places))
            known = self._whole_stacks = WholeStacks(self._stacked(), tensors, at)
        return known.stacked(tensors) or self._stacked()

    def _let_go(self, reference: PyObject) -> None:
        """A tensor is gone, to a disk maybe: the memory that it had is not to be kept."""
        self._stack = None

    def _stacked(self) -> StackedExpertWeights:
        assert self._steps is not None
        first, count = self._experts[0], self.num_experts
        w_in_step, b_in_step, w_out_step, b_out_step = self._steps

        def stack(ref: MatrixRef | VectorRef | None, step: tuple[int, ...] | None, layout: str) -> PyObject:
            if ref is None:
                return None
            tensor = self._places[ref.path].read()
            strides = tensor.stride()
            lead = 0 if step is None else sum(a * s for a, s in zip(step, strides, strict=True))
            one = self._vector(ref) if isinstance(ref, VectorRef) else self._matrix(ref, layout)
            return from_origin(tensor, ref.origin).as_strided((count, *one.shape), (lead, *one.stride()))

        return StackedExpertWeights(
            [stack(r, s, self._layouts[0]) for r, s in zip(first.w_in, w_in_step, strict=True)],
            stack(first.w_out, w_out_step, self._layouts[1]),
            [stack(r, s, "") for r, s in zip(first.b_in, b_in_step, strict=True)],
            stack(first.b_out, b_out_step, ""),
        )
