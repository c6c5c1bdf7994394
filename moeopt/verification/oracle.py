"""The float64 oracle: a model's own code, run again in double precision, choosing as it chose before.

``record_selections`` runs a callable as it is and writes down its choices (see ``selections``).
``run_oracle`` runs the same Python code under a dispatch mode that computes each ATen op in float64:

    choices     are not computed: the recorded integers, and values gathered from the float64 input
    other ops   in float64, as ``plans`` has it

Python code that looks at ``x.dtype`` may see float64 and branch on it; a branch that makes other
choices is an ``OracleError``. Values parked in the model's own low-precision buffers are rounded there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.capture.isolated_run import WatchWrites
from moeopt.ops.override import default_impl
from moeopt.patches import recurrent_inputs_of_any_dtype
from moeopt.value_types import PyObject
from moeopt.verification.float64_rules import (
    FLOAT64_RULES,
    Float64Rule,
    NoteEpsilons,
    UpcastArguments,
    chooses,
    float64_rule_of,
    widen,
)
from moeopt.verification.selections import (
    Event,
    OracleError,
    Selections,
    chosen,
    floats_and_shapes,
    fresh,
    make_event,
    regather,
)
from moeopt.verification.state import RestoreState, clone_inputs_and_objects


def record_selections(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Selections]:
    """Run ``fn(*args, **kwargs)`` at its own dtype; return its outputs and the choices it made.

    Inputs, parameters, buffers, attributes and the RNG are as before afterwards. Whatever ``fn``
    raises is raised.
    """
    with torch.inference_mode(False), torch.no_grad(), RestoreState(fn) as guard:
        mode = _ChoiceRecorder(guard)
        own_args, own_kwargs = clone_inputs_and_objects(args), clone_inputs_and_objects(dict(kwargs))
        with mode, NoteEpsilons(mode.selections.epsilons):
            outputs = fn(*own_args, **own_kwargs)
        mode.selections.state, mode.selections.changed = guard.after(), guard.changed()
        leaves = pytree.tree_leaves((own_args, own_kwargs))
        mode.selections.inputs = {
            n: leaf.clone() for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf._version
        }
        return outputs, mode.selections


class Restored:
    """``fn`` for many runs at its own dtype, each from the state of now; that is read once for all of them."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self._guard = RestoreState(fn).__enter__()
        self._mode = WatchWrites(self._guard.before_write)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PyObject:
        """The outputs of ``fn(*args, **kwargs)``, which leaves no trace; whatever it raises is raised."""
        own_args, own_kwargs = clone_inputs_and_objects(args), clone_inputs_and_objects(dict(kwargs))
        try:
            with torch.inference_mode(False), torch.no_grad(), self._mode:
                return self._fn(*own_args, **own_kwargs)
        finally:
            self._guard.restore()


def run_oracle(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], selections: Selections
) -> PyObject:
    """Run ``fn(*args, **kwargs)`` in float64 with its choices pinned to ``selections``.

    Returns the outputs of ``fn``; floating tensors in them are float64.
    Raises ``OracleError``, naming the op, when the run is impossible or parts ways with the recording.
    """
    return oracle_run(fn, args, kwargs, selections)[0]


def oracle_run(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], selections: Selections
) -> tuple[Any, bool]:
    """:func:`run_oracle`, and whether all of it ran in float64 (no value parked in a low-precision tensor)."""
    mode = _Oracle(selections)
    with default_impl():  # another runtime has no float64 form of its lowering: the op's own definition answers
        outputs = run_in(fn, args, kwargs, mode)
    return outputs, not mode.rounded


def run_pinned(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], selections: Selections
) -> PyObject:
    """Run ``fn(*args, **kwargs)`` at its own dtype with its choices pinned to ``selections``."""
    return run_in(fn, args, kwargs, Pinned(selections))


def run_in(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mode: Pinned) -> PyObject:
    """Run ``fn(*args, **kwargs)`` under ``mode``, leaving no trace; ``OracleError`` if it stops."""
    with torch.inference_mode(False), torch.no_grad(), RestoreState(fn) as guard:
        own_args, own_kwargs = clone_inputs_and_objects(args), clone_inputs_and_objects(dict(kwargs))
        mode.guard = guard
        try:
            with mode, mode.around():
                outputs = fn(*own_args, **own_kwargs)
        except OracleError:
            raise
        except Exception as err:
            raise OracleError(f"the float64 oracle stopped in the block's own code: {_short(err)}") from err
        mode.finish()
        return mode.widened(outputs)


class _ChoiceRecorder(TorchDispatchMode):
    """Runs ops as they are; keeps what was chosen."""

    def __init__(self, guard: RestoreState) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.guard = guard
        self.selections = Selections()

    def __torch_dispatch__(
        self, func: OpOverload, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        kwargs = kwargs or {}
        plan = FLOAT64_RULES.get(func) or float64_rule_of(func)
        if plan.written:
            for tensor in plan.targets(args, kwargs):
                self.guard.before_write(tensor)
        out = func(*args, **kwargs)
        if plan.may_choose and chosen(out):
            event = make_event(func, args, kwargs, out)
            if event is not None:
                self.selections.events.append(event)
        return out


class Pinned(TorchDispatchMode):
    """Runs ops as they are, but for the choices, which are taken from a recording in order."""

    def __init__(self, selections: Selections) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.guard: RestoreState
        self.rounded = False  # some result was written to a tensor of lower precision
        self._events = selections.events
        self._cursor = 0
        self._ops = {event.op for event in selections.events}
        self._epsilons = selections.epsilons

    def __torch_dispatch__(
        self, func: OpOverload, types: PyObject, args: PyObject = (), kwargs: PyObject = None
    ) -> PyObject:
        kwargs = kwargs or {}
        plan = FLOAT64_RULES.get(func) or float64_rule_of(func)
        if plan.may_choose and func in self._ops and chooses(func, args, kwargs):
            floating, shapes = floats_and_shapes(args, kwargs)
            if floating:
                return self.choose(plan, func, args, kwargs, shapes)
        return self.compute(plan, func, args, kwargs)

    def compute(self, plan: Float64Rule, func: OpOverload, args: PyObject, kwargs: PyObject) -> PyObject:
        if plan.written:
            for tensor in plan.targets(args, kwargs):
                self.guard.before_write(tensor)
        return func(*args, **kwargs)

    def choose(
        self, plan: Float64Rule, func: OpOverload, args: PyObject, kwargs: PyObject, shapes: PyObject
    ) -> PyObject:
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
        outs = self.unpinned(plan, func, args, kwargs)
        for out, value in zip(outs, event.outputs, strict=True):
            if value is not None and not torch.equal(out, value):
                raise OracleError(f"the float64 oracle cannot pin the choice of {func}: it has no gathered form")
        return outs

    def unpinned(self, plan: Float64Rule, func: OpOverload, args: PyObject, kwargs: PyObject) -> PyObject:
        """The result of a call that chooses beside what it computes (pivots of a matrix), to be compared."""
        return self.compute(plan, func, args, kwargs)

    def _next(self, func: OpOverload, shapes: PyObject) -> Event:
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

    def around(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def widened(self, outputs: PyObject) -> PyObject:
        return outputs


class _Oracle(Pinned):
    """Runs ops in float64, choices pinned."""

    def compute(self, plan: Float64Rule, func: OpOverload, args: PyObject, kwargs: PyObject) -> PyObject:
        try:
            return plan.run(self, func, args, kwargs)
        except OracleError:
            raise
        except Exception as err:
            raise OracleError(f"the float64 oracle cannot run {func}: {_short(err)}") from err

    def unpinned(self, plan: Float64Rule, func: OpOverload, args: PyObject, kwargs: PyObject) -> PyObject:
        return plan.unpinned(self, func, args, kwargs)

    @contextmanager
    def around(self) -> Iterator[None]:
        with UpcastArguments(self._epsilons), recurrent_inputs_of_any_dtype():
            yield

    def widened(self, outputs: PyObject) -> PyObject:
        return pytree.tree_map_only(Tensor, widen, outputs)


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join("x".join(map(str, shape)) or "scalar" for shape in shapes)


def _short(err: Exception) -> str:
    return f"{type(err).__name__}: {str(err).strip().splitlines()[0] if str(err).strip() else ''}"
