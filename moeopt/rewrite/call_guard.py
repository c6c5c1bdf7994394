"""Is this call like the ones that were verified? Asked before each call of a rewritten block.

A call's arguments are bound to the signature and spelled out as a flat list: tensors, plain values, and,
so that no two calls that differ look alike, the keys, lengths and types of the containers they came in.
An object whose contents cannot be compared refuses the call.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from moeopt.capture.tree import tree_leaves
from moeopt.capture.user_modes import active_user_mode
from moeopt.listed import arguments
from moeopt.rewrite.known_sizes import KnownSizes
from moeopt.value_types import PyObject

Tie = tuple[tuple[int, int], tuple[tuple[int, int], ...]]
"""A size (tensor, dimension), and those whose product it is."""

_FEW = 16
"""Integers up to which Python finds the least and the greatest sooner than PyTorch."""
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class BoundArguments:
    """A block's inputs in the order of its signature: parameter names and what was passed, spelled out."""

    names: tuple[str, ...]
    values: tuple[Any, ...]

    def leaves(self) -> Sequence[Any]:
        """The values, taken out of the lists that spell containers."""
        if list in map(type, self.values):
            return list(tree_leaves(list(self.values)))
        return self.values

    def tensors(self) -> list[torch.Tensor]:
        """The tensor leaves, in order."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, torch.Tensor)]


def by_position(signature: inspect.Signature) -> tuple[str, ...]:
    """The parameters' names, where a call that gives each of them by its position needs no binding; else ()."""
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = signature.parameters.values()
    return tuple(signature.parameters) if all(p.kind in plain for p in parameters) else ()


def bind(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...] = ()
) -> BoundArguments:
    """Positional, keyword and defaulted arguments in one canonical order; ``names``: of :func:`by_position`."""
    if names and not kwargs and len(args) == len(names):
        return BoundArguments(names, tuple([v if type(v) is torch.Tensor else spell(v) for v in args]))
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as err:  # Python's own words name what is missing, and not what was given for it
        raise TypeError(f"{err}: forward takes {signature}, and was given {arguments(args, kwargs)}") from None
    bound.apply_defaults()
    return BoundArguments(tuple(bound.arguments), tuple([spell(v) for v in bound.arguments.values()]))


def spell(value: PyObject, depth: int = 6) -> PyObject:
    """``value`` as tensors and plain values in lists; equal spellings mean equal arguments."""
    if isinstance(value, (torch.Tensor, *_PLAIN)) or depth == 0:
        return value
    name = type(value).__qualname__
    if isinstance(value, (list, tuple)):
        return [name, len(value), *(spell(v, depth - 1) for v in value)]
    if isinstance(value, Mapping):
        return [name, len(value), *(p for k, v in value.items() for p in (spell(k, 1), spell(v, depth - 1)))]
    if isinstance(value, slice):
        return [name, *(spell(v, 1) for v in (value.start, value.stop, value.step))]
    if isinstance(value, enum.Enum):
        return [name, value.name]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [name, *(spell(getattr(value, f.name, None), depth - 1) for f in dataclasses.fields(value))]
    held = getattr(value, "__dict__", None)
    if type(held) is dict and all(isinstance(v, _PLAIN) for v in held.values()) and not callable(value):
        return [name, *(p for item in sorted(held.items()) for p in item)]
    return value


class _Mark:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> str:
        return self.name

    def __deepcopy__(self, memo: PyObject) -> _Mark:
        return self


TENSOR, OPAQUE = _Mark("TENSOR"), _Mark("OPAQUE")


@dataclass
class CallGuard:
    """What a call must look like for the program to hold.

    Args:
        template: the leaves of a spelled call, ``TENSOR`` for each tensor, ``OPAQUE`` for an object that
            cannot be compared.
        shapes: of each tensor, None for a size that is free.
        dtypes: of each tensor.
        training: the mode it was verified in; None where both modes compute the same.
        autocast: always False: nothing is verified under autocast.
        gradients: why the original runs where a gradient is needed; "" where gradients were found equal.
        no_grad: whether it runs without gradients, as the original lets none through in any mode.
        kept: of each tensor, between which values its integers lie as the model around the block makes them; None where
            the program does not rely on that. () where it relies on none.
        skip_idle: whether experts that no token reaches get no gradient, as in the original, or zeros.
        fewest, most: tokens of a call; ``most`` is a number in the block's code, or as many tokens as
            that many elements are, past which nothing was verified.
        sizes: which were verified, of a block whose Python computes with them; None where it does not.
        tied: sizes (tensor, dimension) that were a product of others in every verified call: the program reads either.
    """

    template: list[Any]
    shapes: list[tuple[int | None, ...]]
    dtypes: list[torch.dtype]
    training: bool | None
    autocast: bool
    gradients: str = ""
    skip_idle: bool = False
    no_grad: bool = False
    kept: tuple[tuple[int, int] | None, ...] = ()
    tied: tuple[Tie, ...] = ()
    fewest: int = 0
    most: int | None = None
    sizes: KnownSizes | None = None
    changes = 0  # no field

    def __setattr__(self, name: str, value: PyObject) -> None:
        """Set it, and count in ``changes`` how often that was done: code made of a guard holds for one count."""
        self.__dict__["changes"] = self.changes + 1
        super().__setattr__(name, value)

    def refuses(self, module: torch.nn.Module, bound: BoundArguments) -> str:
        """Why this call is unlike the verified ones; "" when it is like them."""
        return self._mode(module) or self._arguments(bound)

    def _mode(self, module: torch.nn.Module) -> str:
        if self.training is not None and module.training != self.training:
            mode = "training" if module.training else "evaluation"
            return f"the block is in {mode} mode, in which it computes something else"
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return "autocast is on, which changes the dtypes that were verified"
        if torch.compiler.is_compiling():
            return ""
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return "a global forward hook is registered, which would no longer fire for each expert"
        if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            return "it is called under a torch.func transform or forward-mode differentiation"
        if torch._C._get_tracing_state() is not None:
            return "it is being traced by torch.jit"
        if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
            if mode := active_user_mode():
                return f"the mode {mode} is active, and would see other ops than those of the block's own code"
        return ""

    def _arguments(self, bound: BoundArguments) -> str:
        tensors: list[torch.Tensor] = []
        leaves = bound.leaves()
        if len(leaves) != len(self.template):
            return "it was called with another structure of arguments than the verified one"
        for leaf, known in zip(leaves, self.template, strict=True):
            if known is TENSOR:
                if type(leaf) is not torch.Tensor:
                    if not isinstance(leaf, torch.Tensor):
                        return "it was called with a non-tensor where a tensor was verified"
                    if _has_functions_of_its_own(leaf):
                        return f"it was called with a {type(leaf).__name__}, which has PyTorch functions of its own"
                index, sizes = len(tensors), leaf.shape
                shape = self.shapes[index]
                if leaf.dtype is not self.dtypes[index]:
                    return f"it was called with {leaf.dtype} where {self.dtypes[index]} was verified"
                if len(sizes) != len(shape):
                    return f"it was called with a {len(sizes)}-dimensional tensor, verified with {len(shape)}"
                for size, fixed in zip(sizes, shape, strict=True):
                    if fixed is not None and size != fixed:
                        return f"it was called with size {size} where only {fixed} was verified"
                if self.kept and (told := outside(leaf, self.kept[index])):
                    return told
                tensors.append(leaf)
            elif known is OPAQUE:
                return f"an argument is a {type(leaf).__name__}, whose contents are not compared"
            elif isinstance(leaf, torch.Tensor) or type(leaf) is not type(known) or leaf != known:
                return f"it was called with {leaf!r} where {known!r} was verified"
        if (self.fewest or self.most is not None) and (told := self._tokens(tensors)):
            return told
        if self.sizes is not None and not self.sizes.holds(shapes := [t.shape for t in tensors]):
            return self.sizes.refusal(shapes)
        return self._sizes(tensors) if self.tied else ""

    def _tokens(self, tensors: list[torch.Tensor]) -> str:
        """Why so many tokens were not verified; "" where they were.

        They are the free sizes of the tensor that has most of them: another may have one number for each sequence.
        """
        counts = []
        for tensor, shape in zip(tensors, self.shapes, strict=True):
            free = [size for size, fixed in zip(tensor.shape, shape, strict=True) if fixed is None]
            counts += [math.prod(free)] if free else []
        few = [count for count in counts or (1,) if count < self.fewest]  # torch.compile has no min of free sizes
        if few:
            return (
                "it was called without a token, for which its code does something else or was not verified (kernels of "
                "another library)"
            )
        many = [count for count in counts if self.most is not None and count > self.most]
        if many:
            return (
                f"it was called with {many[0]} tokens, and its code holds the number {self.most}, which may limit "
                "what it does in one way: calls of more tokens were too large to verify (a number of elements counts "
                "as that of their tokens)"
            )
        return ""

    def _sizes(self, tensors: list[torch.Tensor]) -> str:
        """Why sizes of several arguments do not fit together as in the verified calls; "" where they do."""
        for (tensor, dim), others in self.tied:
            size, product = tensors[tensor].shape[dim], 1
            for i, d in others:
                product *= tensors[i].shape[d]
            if size != product:
                if len(others) == 1:
                    return f"two of its arguments have sizes {size} and {product} where one size was verified for both"
                return f"one of its arguments has size {size} where a product of others, here {product}, was verified"
        return ""


def _has_functions_of_its_own(tensor: torch.Tensor) -> bool:
    """Whether a tensor's class replaces functions of PyTorch, which then see other ops than the original's."""
    if torch.compiler.is_compiling():
        return False
    own = getattr(type(tensor).__torch_function__, "__func__", None)  # None: it is told nothing, as a Parameter
    return own is not None and own is not torch.Tensor.__torch_function__.__func__  # type: ignore[attr-defined]


def outside(ids: torch.Tensor, kept: tuple[int, int] | None) -> str:
    """Why integers are none that the model around a block gives it; "" where they are, or cannot be looked at.

    On a GPU a look would wait for it at each call; an index out of bounds stops the original there.
    """
    if kept is None or type(ids) is not torch.Tensor or ids.device.type != "cpu" or torch.compiler.is_compiling():
        return ""
    if not (numel := ids.numel()):
        return ""
    if numel <= _FEW:
        listed = [i for row in ids.tolist() for i in row] if ids.dim() == 2 else ids.flatten().tolist()
        least, greatest = min(listed), max(listed)
    else:
        least, greatest = (int(v) for v in torch.aminmax(ids))
    if least >= kept[0] and greatest <= kept[1]:
        return ""
    return (
        f"it was called with ids from {least} to {greatest}, and the model around it gives it {kept[0]} to {kept[1]} "
        "only: what its own code does with others is not in the rewritten code"
    )


def overlap(tensors: list[torch.Tensor]) -> bool:
    """True where two of the tensors share memory."""
    storages = [t.untyped_storage()._cdata for t in tensors if t.layout == torch.strided]
    return len(set(storages)) < len(storages)
