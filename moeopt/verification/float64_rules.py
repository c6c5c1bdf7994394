"""How each ATen op is run in float64, decided once per op.

view ops          run on the tensor as it is: ``W[e]`` of a stacked bank does not copy the bank
moves, factories  run as they are, then the result is widened
random ops        draw at their own dtype (the same stream), then widened
in-place, out=    computed in float64; a target of lower precision is copied back to
all others        floating arguments widened, floating dtype arguments become float64
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from moeopt.value_types import FxTarget, PyObject
from moeopt.verification.float64_decompositions import STAND_INS
from moeopt.verification.selections import WINDOWED, OracleError, argument, chosen, floats_and_shapes

F64 = torch.float64
_FIRST_FLOAT = 5
"""The code of the first dtype of floats, where a schema has codes."""
LOW = frozenset({torch.float32, torch.bfloat16, torch.float16})

_MOVES = """
    index index_select gather embedding clone _unsafe_view cat stack repeat repeat_interleave flip roll
    constant_pad_nd take take_along_dim masked_select contiguous unfold_copy tril triu diag_embed
    zeros ones empty empty_strided full arange eye linspace logspace scalar_tensor lift_fresh_copy
"""
_LIKES = "zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_empty_strided new_full"
_REWIRES = frozenset({"aten::set_", "aten::resize_", "aten::resize_as_", "aten::_resize_output_"})

LIKES = frozenset(f"aten::{name}" for name in _LIKES.split())
"""Ops that read only the shape of a floating tensor: their integer results are not choices."""

MOVES = frozenset(f"aten::{name}" for name in _MOVES.split()) | LIKES
"""Ops that move values or make constants: run as they are, the result is then exact when widened."""


class Float64Rule:
    """How one op is run, decided once per OpOverload."""

    def __init__(self, func: OpOverload) -> None:
        schema = func._schema
        name = schema.name
        arguments = schema.arguments
        self.written = [
            (position, arg.name, arg.kwarg_only)
            for position, arg in enumerate(arguments)
            if arg.alias_info is not None and arg.alias_info.is_write
        ]
        self.stand_in = STAND_INS.get(name)
        random = torch.Tag.nondeterministic_seeded in func.tags
        self.may_choose = not func.is_view and name not in LIKES
        self.run: Callable[..., Any]
        if func.is_view:
            self.run = self._view
        elif self.written and not (random or name in _REWIRES):
            self.run = self._write
        elif self.written:
            self.run = self._as_it_is
        elif self.stand_in is not None:
            self.run = self._stand_in
        elif random:
            self.run = self._random
        elif name in MOVES:
            self.run = self._move
        else:
            self.run = self._compute

    def targets(self, args: PyObject, kwargs: PyObject) -> list[Tensor]:
        """The tensors that the call writes."""
        found: list[Tensor] = []
        for position, name, kwarg_only in self.written:
            value = kwargs.get(name) if kwarg_only or position >= len(args) else args[position]
            found += value if isinstance(value, list | tuple) else [value] if isinstance(value, Tensor) else []
        return found

    def _view(self, mode: PyObject, func: OpOverload, args: PyObject, kwargs: PyObject) -> PyObject:
        if func is torch.ops.aten.view.dtype and args[0].dtype.is_floating_point:
            raise OracleError("the float64 oracle cannot reinterpret the bits of a float (Tensor.view(dtype))")
        return func(*args, **kwargs)

    def _as_it_is(self, mode: PyObject, func: OpOverload, args: PyObject, kwargs: PyObject) -> PyObject:
        for tensor in self.targets(args, kwargs):
            mode.guard.before_write(tensor)
        return func(*args, **kwargs)

    def _random(self, mode: PyObject, func: OpOverload, args: PyObject, kwargs: PyObject) -> PyObject:
        return widen(func(*args, **kwargs))

    def _move(self, mode: PyObject, func: OpOverload, args: PyObject, kwargs: PyObject) -> PyObject:
        if "dtype" in kwargs:
            kwargs = {**kwargs, "dtype": up(kwargs["dtype"])}
        return widen(func(*args, **kwargs))

    def _stand_in(self, mode: PyObject, func: OpOverload, args: PyObject, kwargs: PyObject) -> PyObject:
        assert self.stand_in is not None
        return self.stand_in(*args, **kwargs)

    def unpinned(self, mode: PyObject, func: OpOverload, args: PyObject, kwargs: PyObject) -> PyObject:
        """As ``run``, of a call whose integers the caller compares with the recorded ones."""
        return self._wide(func, args, kwargs) if self.run == self._compute else self.run(mode, func, args, kwargs)

    def _wide(self, func: OpOverload, args: PyObject, kwargs: PyObject) -> PyObject:
        return widen(func(*map(up, args), **{name: up(value) for name, value in kwargs.items()}))

    def _compute(self, mode: PyObject, func: OpOverload, args: PyObject, kwargs: PyObject) -> PyObject:
        out = self._wide(func, args, kwargs)
        if type(out) is Tensor and out.dtype is F64:
            return out
        if chosen(out) and chooses(func, args, kwargs) and floats_and_shapes(args, kwargs)[0]:
            raise OracleError(
                f"the float64 oracle parted ways with the original run: {func} chose here and not there; "
                "does the code branch on a dtype?"
            )
        return out

    def _write(self, mode: PyObject, func: OpOverload, args: PyObject, kwargs: PyObject) -> PyObject:
        targets = self.targets(args, kwargs)
        for tensor in targets:
            mode.guard.before_write(tensor)
        twins = {id(t): t.to(F64) for t in targets if t.dtype in LOW}
        if not twins:
            return func(*map(up, args), **{name: up(value) for name, value in kwargs.items()})

        def twin(value: PyObject) -> PyObject:
            if isinstance(value, list | tuple):
                return [twin(item) for item in value]
            return twins[id(value)] if id(value) in twins else up(value)

        out = func(*map(twin, args), **{name: twin(value) for name, value in kwargs.items()})
        mode.rounded = True
        for tensor in targets:
            if id(tensor) in twins:
                if tensor.shape != twins[id(tensor)].shape:  # out= resizes its target
                    tensor.resize_(twins[id(tensor)].shape)
                tensor.copy_(twins[id(tensor)])
        back = {id(t): target for target in targets if (t := twins.get(id(target))) is not None}
        if isinstance(out, list | tuple):
            return type(out)(back.get(id(o), o) for o in out)
        return back.get(id(out), out)


class UpcastArguments(TorchFunctionMode):
    """Widens the arguments of functions that refuse mixed dtypes before any op is dispatched.

    Args:
        epsilons: what each ``rms_norm`` without an epsilon takes, in order: that of the dtype it ran in before.
    """

    _picky = frozenset(
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d prelu lstm gru rnn_tanh rnn_relu "
        "batch_norm instance_norm bilinear lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell scaled_dot_product_attention "
        "tensordot inner multi_dot linalg_multi_dot chain_matmul linalg_vecdot meshgrid cartesian_prod".split()
    )

    def __init__(self, epsilons: Iterable[float] = ()) -> None:
        super().__init__()
        self._epsilons = iter(epsilons)

    def __torch_function__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        if lacks_epsilon(func, args, kwargs) and (eps := next(self._epsilons, None)) is not None:
            return func(*args[:3], **{**(kwargs or {}), "eps": eps})
        if getattr(func, "__name__", "") in self._picky:
            return func(*map(up, args), **{name: up(value) for name, value in (kwargs or {}).items()})
        return func(*args, **(kwargs or {}))


class NoteEpsilons(TorchFunctionMode):
    """Notes the epsilon of each ``rms_norm`` that is given none: PyTorch takes that of the dtype it computes in."""

    def __init__(self, epsilons: list[float]) -> None:
        super().__init__()
        self._epsilons = epsilons

    def __torch_function__(
        self, func: FxTarget, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        if lacks_epsilon(func, args, kwargs):
            x = args[0] if args else (kwargs or {})["input"]
            self._epsilons.append(torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps)
        return func(*args, **(kwargs or {}))


def lacks_epsilon(func: FxTarget, args: PyObject, kwargs: PyObject) -> bool:
    """Whether a call is one of ``rms_norm`` whose epsilon is that of a dtype."""
    if func not in (torch.rms_norm, torch.nn.functional.rms_norm):
        return False
    return (args[3] if len(args) > 3 else (kwargs or {}).get("eps")) is None


FLOAT64_RULES: dict[OpOverload, Float64Rule] = {}


def float64_rule_of(func: OpOverload) -> Float64Rule:
    """The plan of an op, made on first use."""
    return FLOAT64_RULES.setdefault(func, Float64Rule(func))


def chooses(func: OpOverload, args: PyObject, kwargs: PyObject) -> bool:
    """Whether a call of an op that may return integers does: an op with a dtype argument does if it asks for them, and
    of bags of rows the one that takes each feature's largest: the others count their rows."""
    if func._schema.name in WINDOWED:
        return False
    if func._schema.name in ("aten::_embedding_bag", "aten::_embedding_bag_forward_only"):
        return bool(argument(func, "mode", args, kwargs) == 2)
    if not any(arg.name == "dtype" for arg in func._schema.arguments):
        return True
    dtype = argument(func, "dtype", args, kwargs)
    if isinstance(dtype, int):  # a default of the schema is the code of a dtype: 4 is int64, as of triu_indices
        return dtype < _FIRST_FLOAT
    return dtype is not None and not dtype.is_floating_point and not dtype.is_complex


def up(value: PyObject) -> PyObject:
    """An argument with its floating tensors and dtypes in float64."""
    if isinstance(value, Tensor):
        return value.to(F64) if value.dtype in LOW else value
    if isinstance(value, list | tuple):
        return [up(item) for item in value]
    if isinstance(value, torch.dtype):
        return F64 if value.is_floating_point else value
    return value


def widen(out: PyObject) -> PyObject:
    """An op's result with its floating tensors in float64."""
    if isinstance(out, Tensor):
        return out.to(F64) if out.dtype in LOW else out
    if isinstance(out, list | tuple):
        return type(out)(widen(item) for item in out) if type(out) in (list, tuple) else tuple(map(widen, out))
    return out
