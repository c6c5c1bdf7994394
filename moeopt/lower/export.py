"""A model as one graph, every size of its tensor inputs free unless the model fixes it."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental import _config as shape_config
from torch.utils import _pytree as pytree

from moeopt.bundle.caches import opened
from moeopt.errors import MoeoptError, NotSaveableError
from moeopt.find.packed_weights import packed_weights
from moeopt.lower.asked_lengths import asks_lengths
from moeopt.lower.constant_reads import ConstantReads
from moeopt.lower.export_errors import hidden_child, made_for_inference, obstacle_of, odd_argument, unwritable_name
from moeopt.lower.layer_calls import replaced_forward
from moeopt.lower.plain_call import free_sizes, plain_call
from moeopt.lower.second_call import differs_at_second_call
from moeopt.lower.settled_reads import settled_reads
from moeopt.lower.specialization_guards import collect_specialization_guards, keeps_ones
from moeopt.lower.stamps import Stamps
from moeopt.lower.traced_forms import WithForms, refuses_none
from moeopt.lower.written_state import refuse_read_state, written_by
from moeopt.patches import free_lengths, general_ways, idle_moves, no_export_dump, one_trace, quicker_decomposition
from moeopt.rewrite.whole_model import tried
from moeopt.value_types import PyObject
from moeopt.verification.state import RestoreState

ALL = sys.maxsize
"""Of dimensions: every one."""


def export_program(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    frozen: bool = True,
    stamps: Stamps | None = None,
) -> torch.export.ExportedProgram:
    """``torch.export`` of ``model`` on a real call.

    Args:
        frozen: whether weights and buffers stay what they are in what is made of the graph, so that the model's Python
            may branch on them.
        stamps: the alike layers of ``model``, of which one is traced; the program then holds marks and stamps.

    Raises:
        NotSaveableError: the model cannot be exported; the message names what is in the way.
    """

    given, model = model, _by_its_forward(model)
    if why := unwritable_name(model):
        raise NotSaveableError(f"{type(model).__name__} cannot be saved: {why}")
    args, kwargs = plain_call(args, kwargs)
    before = _python_state(model)
    reads = None
    with RestoreState(model):  # torch.export leaves copies of the lists and dicts that modules hold
        try:
            try:
                program = _traced(model, args, kwargs, None, stamps)
                if refuses_none(program):
                    _begin_again(model, before, stamps)
                    with WithForms():
                        program = _traced(model, args, kwargs, None, None)
            except Exception as err:
                if not frozen or not asks_values(err):
                    raise
                _begin_again(model, before, stamps)
                reads = ConstantReads(model, settled_reads(model, args, kwargs))
                program = _traced(model, args, kwargs, reads, None)
        except MoeoptError:
            raise
        except Exception as err:
            raise NotSaveableError(f"{type(model).__name__} cannot be saved: {_why(model, err, args, kwargs)}") from err
        finally:
            counted = _restore(model, before)
    if not counted and differs_at_second_call(given, args, kwargs):
        with quicker_decomposition():
            refuse_read_state(program.run_decompositions({}))  # which has in-place writes as outputs
        counted = "what it returns for the same inputs"
    if counted:
        raise NotSaveableError(
            f"{type(model).__name__} cannot be saved: {counted} changes at each call, and an engine keeps no state: "
            "make it an argument, or use backend='torch' without saving"
        )
    if reads is not None:
        reads.refuse(written_by(program))
    return program


def _begin_again(model: nn.Module, before: PyObject, stamps: Stamps | None) -> None:
    """Before a second trace, of every layer."""
    _restore(model, before)
    if stamps is not None:
        stamps.forget()


def _why(model: nn.Module, err: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """In words, what stopped ``torch.export``."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    why = packed_weights(model) or hidden_child(model, err) or made_for_inference(model)
    return why or odd_argument(bound, err) or obstacle_of(err)


def asks_values(err: Exception) -> bool:
    """Whether ``torch.export`` stopped because Python asked for the values of tensors."""
    return "ata-dependent" in str(err) or isinstance(err, (DataDependentOutputException, DynamicOutputShapeException))


def _by_its_forward(model: nn.Module) -> nn.Module:
    """``model``, or a plain module around the same parts where torch.export would read a graph that does not run.

    Of a GraphModule it reads the graph, and calls no ``forward`` that was put on the instance.
    """
    if not isinstance(model, torch.fx.GraphModule) or "forward" not in model.__dict__:
        return model
    plain: nn.Module = type("GraphModule", (nn.Module,), {})()  # so that messages name it so
    plain.__dict__.update(model.__dict__)
    return plain


def _traced(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reads: ConstantReads | None,
    stamps: Stamps | None,
) -> torch.export.ExportedProgram:
    """The trace with every size free.

    Sizes of 1 are as they are, but in the first dimension, or in all, where torch cannot broadcast a free size of 1,
    where it would not squeeze one away, or where a rewritten block holds for that size alone and would run its original
    code.
    """
    has_ones = any(1 in t.shape for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
    for ones in (ALL, 1) if has_ones else ():
        with tried(model) as refused:
            try:
                program = _export(model, args, kwargs, reads, stamps, ones)
            except RuntimeError as err:
                if "must match the size of tensor" not in str(err):
                    raise
            else:
                if not refused() and not keeps_ones(program):
                    return program
    return _export(model, args, kwargs, reads, stamps, 0)


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reads: ConstantReads | None,
    stamps: Stamps | None,
    ones: int,
) -> torch.export.ExportedProgram:
    """``torch.export`` once; sizes of 1 are free in the first ``ones`` dimensions."""
    with (
        one_trace,
        torch.no_grad(),
        idle_moves(),
        general_ways(),
        free_lengths(asks_lengths(model)),
        shape_config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
        collect_specialization_guards(),
        no_export_dump(),
        _without_gradients(model),
        _named(model, kwargs),
        _opened_caches(model),
        answered(model, reads),
        contextlib.nullcontext() if stamps is None else stamps.during(),
    ):
        shapes = free_sizes((args, kwargs), ones)
        bound = dict(inspect.signature(model.forward).bind(*shapes[0], **shapes[1]).arguments)
        return torch.export.export(model, args, kwargs, dynamic_shapes=bound, strict=False)


@contextlib.contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """A ``DistributedDataParallel`` calls its module alone: its own code is for gradients, and cannot be traced."""
    with contextlib.ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                undo.enter_context(_calling(module, module.module, inspect.signature(module.module.forward)))
        yield


@contextlib.contextmanager
def _named(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """Keywords that ``forward`` takes as ``**kwargs`` are parameters of their own: torch.export counts them twice."""
    signature = inspect.signature(model.forward)
    known = signature.parameters
    extra = [name for name in kwargs if name not in known]
    if not extra or not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        yield
        return
    own = [p for p in known.values() if p.kind is not p.VAR_KEYWORD]
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    forward = model.forward
    with _calling(model, lambda *args, **kwargs: forward(*args, **kwargs), signature.replace(parameters=[*own, *more])):
        yield


@contextlib.contextmanager
def _opened_caches(model: nn.Module) -> Iterator[None]:
    """The caches of keys and values that ``forward`` returns are structures of tensors."""
    forward = model.forward
    with _calling(model, lambda *args, **kwargs: opened(forward(*args, **kwargs)), inspect.signature(forward)):
        yield


@contextlib.contextmanager
def answered(model: nn.Module, reads: ConstantReads | None) -> Iterator[None]:
    """What ``forward`` asks of weights and buffers is answered; it is not with ``reads`` None."""
    if reads is None:
        yield
        return
    forward = model.forward
    with _calling(model, lambda *args, **kwargs: reads.run(forward, args, kwargs), inspect.signature(forward)):
        yield


@contextlib.contextmanager
def _calling(model: nn.Module, forward: Callable[..., Any], signature: inspect.Signature) -> Iterator[None]:
    """While open, ``forward``, with ``signature``, is what a call of ``model`` runs."""

    def instead(*args: PyObject, **kwargs: PyObject) -> PyObject:
        return forward(*args, **kwargs)

    instead.__signature__ = signature  # type: ignore[attr-defined]
    with replaced_forward(model, instead):
        yield


def _python_state(model: nn.Module) -> dict[tuple[str, str], Any]:
    """The plain Python values that modules hold in their own attributes."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if type(value) in (int, float, bool, str) and name != "training"
    }


def _restore(model: nn.Module, before: dict[tuple[str, str], Any]) -> str:
    """Put ``before`` back; the name of a number that a call has changed, or ""."""
    counted = ""
    modules = dict(model.named_modules())
    for (path, name), value in before.items():
        module = modules[path]
        now = module.__dict__.get(name, value)
        if now is value or now == value:
            continue
        module.__dict__[name] = value
        if type(now) in (int, float):
            counted = counted or f"self.{name} of {path or type(model).__name__}"
    for path, module in modules.items():
        for name in [n for n, v in module.__dict__.items() if type(v) in (int, float) and (path, n) not in before]:
            if type(getattr(type(module), name, None)) in (int, float):  # self.calls += 1 hid the class's own value
                del module.__dict__[name]
                counted = counted or f"self.{name} of {path or type(model).__name__}"
    return counted
