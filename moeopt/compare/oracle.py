"""The float64 oracle: a model's own code, run again in double precision, choosing as it chose before.

``record_selections`` runs a callable as it is and writes down its choices (see ``selections``).
``run_oracle`` runs the same Python code under a dispatch mode that computes each ATen op in float64:

    view ops          run on the tensor as it is: ``W[e]`` of a stacked bank does not copy the bank
    moves, factories  run as they are, then the result is widened
    random ops        draw at their own dtype (the same stream), then widened
    in-place, out=    computed in float64; a target of lower precision is copied back to
    choices           not computed: the recorded integers, and values gathered from the float64 input
    all others        floating arguments widened, floating dtype arguments become float64

Python code that looks at ``x.dtype`` may see float64 and branch on it; a branch that makes other
choices is an ``OracleError``. Values parked in the model's own low-precision buffers are rounded there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.compare.selections import (
    Event,
    OracleError,
    Selections,
    argument,
    chosen,
    floats_and_shapes,
    fresh,
    make_event,
    regather,
)
from moeopt.compare.standins import STAND_INS
from moeopt.compare.state import Guard, clone_inputs

F64 = torch.float64
LOW = frozenset({torch.float32, torch.bfloat16, torch.float16})

_MOVES = frozenset(
    f"aten::{name}"
    for name in (
        "index index_select gather embedding clone _unsafe_view cat stack repeat repeat_interleave flip roll "
        "constant_pad_nd take take_along_dim masked_select contiguous unfold_copy tril triu diag_embed "
        "zeros_like ones_like empty_like new_zeros new_ones new_empty new_empty_strided zeros ones empty "
        "empty_strided full arange eye linspace logspace scalar_tensor lift_fresh_copy _pin_memory"
    ).split()
)
"""Ops that move values or make constants: run as they are, the result is then exact when widened."""

_LIKES = frozenset(
    f"aten::{name}"
    for name in "zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_empty_strided new_full".split()
)
"""Ops that read only the shape of a floating tensor: their integer results are not choices."""

_REWIRES = frozenset({"aten::set_", "aten::resize_", "aten::resize_as_", "aten::_resize_output_"})


def record_selections(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Selections]:
    """Run ``fn(*args, **kwargs)`` at its own dtype; return its outputs and the choices it made.

    Inputs, parameters, buffers, attributes and the RNG are as before afterwards. Whatever ``fn``
    raises is raised.
    """
    with torch.inference_mode(False), torch.no_grad(), Guard(fn) as guard:
        mode = _Recorder(guard)
        own_args, own_kwargs = clone_inputs(args), clone_inputs(dict(kwargs))
        with mode:
            outputs = fn(*own_args, **own_kwargs)
        mode.selections.state = guard.after()
        leaves = torch.utils._pytree.tree_leaves((own_args, own_kwargs))
        mode.selections.inputs = {
            n: leaf.clone() for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf._version
        }
        return outputs, mode.selections


def run_oracle(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], selections: Selections
) -> Any:
    """Run ``fn(*args, **kwargs)`` in float64 with its choices pinned to ``selections``.

    Returns the outputs of ``fn``; floating tensors in them are float64.
    Raises ``OracleError``, naming the op, when the run is impossible or parts ways with the recording.
    """
    return _pinned(fn, args, kwargs, _Oracle(selections))


def run_pinned(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], selections: Selections
) -> Any:
    """Run ``fn(*args, **kwargs)`` at its own dtype with its choices pinned to ``selections``."""
    return _pinned(fn, args, kwargs, _Pinned(selections))


def _pinned(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mode: _Pinned) -> Any:
    with torch.inference_mode(False), torch.no_grad(), Guard(fn) as guard:
        own_args, own_kwargs = clone_inputs(args), clone_inputs(dict(kwargs))
        mode.guard = guard
        try:
            with mode:
                outputs = fn(*own_args, **own_kwargs)
        except OracleError:
            raise
        except Exception as err:
            raise OracleError(f"the float64 oracle stopped in the block's own code: {_short(err)}") from err
        mode.finish()
        return mode.widened(outputs)


class _Recorder(TorchDispatchMode):
    """Runs ops as they are; keeps what was chosen."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self.guard = guard
        self.selections = Selections()

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plan = _PLANS.get(func) or _plan(func)
        if plan.written:
            for tensor in plan.targets(args, kwargs):
                self.guard.before_write(tensor)
        out = func(*args, **kwargs)
        if plan.may_choose and chosen(out):
            event = make_event(func, args, kwargs, out)
            if event is not None:
                self.selections.events.append(event)
        return out


class _Pinned(TorchDispatchMode):
    """Runs ops as they are, but for the choices, which are taken from a recording in order."""

    def __init__(self, selections: Selections) -> None:
        super().__init__()
        self.guard: Guard
        self._events = selections.events
        self._cursor = 0
        self._ops = {event.op for event in selections.events}

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plan = _PLANS.get(func) or _plan(func)
        if plan.may_choose and func in self._ops and _chooses(func, args, kwargs):
            floating, shapes = floats_and_shapes(args, kwargs)
            if floating:
                return self.choose(plan, func, args, kwargs, shapes)
        return self.compute(plan, func, args, kwargs)

    def compute(self, plan: _Plan, func: OpOverload, args: Any, kwargs: Any) -> Any:
        if plan.written:
            for tensor in plan.targets(args, kwargs):
                self.guard.before_write(tensor)
        return func(*args, **kwargs)

    def choose(self, plan: _Plan, func: OpOverload, args: Any, kwargs: Any, shapes: Any) -> Any:
        event = self._next(func, shapes)
        pinned = regather(func, args, kwargs, event.outputs)
        if plan.written:
            out = self.compute(plan, func, args, kwargs)
            for tensor, value in zip(out if isinstance(out, tuple) else (out,), event.outputs, strict=True):
                if value is not None:
                    tensor.copy_(value)
            return out
        if pinned is not None:
            return pinned
        if None not in event.outputs:
            outs = tuple(fresh(o) for o in event.outputs)
            kind = func._schema.returns
            if len(kind) == 1:
                return list(outs) if str(kind[0].type) == "List[Tensor]" else outs[0]
            return outs
        outs = self.compute(plan, func, args, kwargs)
        for out, value in zip(outs, event.outputs, strict=True):
            if value is not None and not torch.equal(out, value):
                raise OracleError(f"the float64 oracle cannot pin the choice of {func}: it has no gathered form")
        return outs

    def _next(self, func: OpOverload, shapes: Any) -> Event:
        for position in range(self._cursor, len(self._events)):
            event = self._events[position]
            if event.op is func and event.shapes == shapes:
                self._cursor = position + 1
                return event
        raise OracleError(
            f"the float64 oracle parted ways with the original run: {func} on shapes {_shapes(shapes)} was not "
            f"recorded after choice {self._cursor} of {len(self._events)}; does the code branch on a dtype?"
        )

    def finish(self) -> None:
        """Demand that every routing choice of the recording was met."""
        left = [event for event in self._events[self._cursor :] if event.is_routing]
        if left:
            raise OracleError(
                f"the float64 oracle parted ways with the original run: {left[0].op} on shapes "
                f"{_shapes(left[0].shapes)} was recorded and never met; does the code branch on a dtype?"
            )

    def widened(self, outputs: Any) -> Any:
        return outputs


class _Oracle(_Pinned):
    """Runs ops in float64, choices pinned."""

    def compute(self, plan: _Plan, func: OpOverload, args: Any, kwargs: Any) -> Any:
        try:
            return plan.run(self, func, args, kwargs)
        except OracleError:
            raise
        except Exception as err:
            raise OracleError(f"the float64 oracle cannot run {func}: {_short(err)}") from err

    def widened(self, outputs: Any) -> Any:
        return torch.utils._pytree.tree_map_only(Tensor, _widen, outputs)


class _Plan:
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
        self.may_choose = not func.is_view and name not in _LIKES and not random
        self.run: Callable[..., Any]
        if func.is_view:
            self.run = self._view
        elif self.written and not (random or name in _REWIRES):
            self.run = self._write
        elif self.written:
            self.run = self._as_it_is
        elif random:
            self.run = self._random
        elif name in _MOVES or name in _LIKES:
            self.run = self._move
        elif self.stand_in is not None:
            self.run = self._stand_in
        else:
            self.run = self._compute

    def targets(self, args: Any, kwargs: Any) -> list[Tensor]:
        """The tensors that the call writes."""
        found: list[Tensor] = []
        for position, name, kwarg_only in self.written:
            value = kwargs.get(name) if kwarg_only or position >= len(args) else args[position]
            found += value if isinstance(value, list | tuple) else [value] if isinstance(value, Tensor) else []
        return found

    def _view(self, mode: _Oracle, func: OpOverload, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.aten.view.dtype and args[0].dtype.is_floating_point:
            raise OracleError("the float64 oracle cannot reinterpret the bits of a floating tensor (Tensor.view(dtype))")
        return func(*args, **kwargs)

    def _as_it_is(self, mode: _Oracle, func: OpOverload, args: Any, kwargs: Any) -> Any:
        for tensor in self.targets(args, kwargs):
            mode.guard.before_write(tensor)
        return func(*args, **kwargs)

    def _random(self, mode: _Oracle, func: OpOverload, args: Any, kwargs: Any) -> Any:
        return _widen_tree(func(*args, **kwargs))

    def _move(self, mode: _Oracle, func: OpOverload, args: Any, kwargs: Any) -> Any:
        if "dtype" in kwargs:
            kwargs = {**kwargs, "dtype": _up(kwargs["dtype"])}
        return _widen_tree(func(*args, **kwargs))

    def _stand_in(self, mode: _Oracle, func: OpOverload, args: Any, kwargs: Any) -> Any:
        assert self.stand_in is not None
        return self.stand_in(*args, **kwargs)

    def _compute(self, mode: _Oracle, func: OpOverload, args: Any, kwargs: Any) -> Any:
        out = func(*map(_up, args), **{name: _up(value) for name, value in kwargs.items()})
        if type(out) is Tensor:
            if out.dtype is F64:
                return out
            if not out.dtype.is_floating_point and _chooses(func, args, kwargs) and floats_and_shapes(args, kwargs)[0]:
                raise OracleError(
                    f"the float64 oracle parted ways with the original run: {func} chose here and not there; "
                    "does the code branch on a dtype?"
                )
        return _widen_tree(out)

    def _write(self, mode: _Oracle, func: OpOverload, args: Any, kwargs: Any) -> Any:
        targets = self.targets(args, kwargs)
        for tensor in targets:
            mode.guard.before_write(tensor)
        twins = {id(t): t.to(F64) for t in targets if t.dtype in LOW}
        if not twins:
            return func(*map(_up, args), **{name: _up(value) for name, value in kwargs.items()})

        def twin(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [twin(item) for item in value]
            return twins[id(value)] if id(value) in twins else _up(value)

        out = func(*map(twin, args), **{name: twin(value) for name, value in kwargs.items()})
        for tensor in targets:
            if id(tensor) in twins:
                if tensor.shape != twins[id(tensor)].shape:  # out= resizes its target
                    tensor.resize_(twins[id(tensor)].shape)
                tensor.copy_(twins[id(tensor)])
        back = {id(t): target for target in targets if (t := twins.get(id(target))) is not None}
        if isinstance(out, list | tuple):
            return type(out)(back.get(id(o), o) for o in out)
        return back.get(id(out), out)


_PLANS: dict[OpOverload, _Plan] = {}


def _plan(func: OpOverload) -> _Plan:
    return _PLANS.setdefault(func, _Plan(func))


def _chooses(func: OpOverload, args: Any, kwargs: Any) -> bool:
    """Whether a call of an op that may return integers does: a floating dtype argument says no."""
    dtype = kwargs["dtype"] if "dtype" in kwargs else argument(func, "dtype", args, kwargs)
    if dtype is None:
        return func is not torch.ops.aten._to_copy.default or not args[0].dtype.is_floating_point
    return not dtype.is_floating_point


def _up(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(F64) if value.dtype in LOW else value
    if isinstance(value, list | tuple):
        return [_up(item) for item in value]
    if isinstance(value, torch.dtype):
        return F64 if value.is_floating_point else value
    return value


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(F64) if tensor.dtype in LOW else tensor


def _widen_tree(out: Any) -> Any:
    if isinstance(out, Tensor):
        return _widen(out)
    if isinstance(out, list | tuple):
        return type(out)(_widen_tree(item) for item in out) if type(out) in (list, tuple) else tuple(map(_widen_tree, out))
    return out


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join("x".join(map(str, shape)) or "scalar" for shape in shapes)


def _short(err: Exception) -> str:
    return f"{type(err).__name__}: {str(err).strip().splitlines()[0] if str(err).strip() else ''}"
