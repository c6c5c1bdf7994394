"""A model as one graph, every size of its tensor inputs free unless the model fixes it."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.export.graph_signature import OutputKind
from torch.fx.experimental import _config as shape_config
from torch.utils import _pytree as pytree

from moeopt.bundle.caches import opened
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import MoeoptError, NotSaveableError
from moeopt.lower.constant_reads import ConstantReads
from moeopt.lower.plain import free_sizes, plain_call
from moeopt.lower.specialization_guards import collect_specialization_guards
from moeopt.patches import idle_moves, no_export_dump, one_trace
from moeopt.verification.model import run_plain


def avoid_size_one(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ArgsKwargs:
    """The same call with two rows where it has one, if the model takes it.

    ``torch.export`` holds a size of 1 to be fixed, so a call with a batch or a sequence of 1 would give an engine
    for exactly that.
    """
    call: ArgsKwargs = (tuple(args), dict(kwargs))
    for axis in (0, 1):
        for along in (True, False):
            wider = _doubled(call, axis, along)
            if wider is None:
                continue
            try:
                run_plain(model, *wider)
            except Exception:  # whatever stands in the way, the given call is what is exported
                continue
            call = wider
            break
    return call


def _doubled(call: ArgsKwargs, axis: int, along: bool) -> ArgsKwargs | None:
    """``call`` with two rows along an axis on which all of its tensors have one; None where they do not.

    Args:
        along: tensors without that axis that have an entry for each row of the first one go along: an id or a mark
            for each token of (1, S, H), or of (1, H).
    """
    leaves = [t for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor)]
    first = next((t for t in leaves if t.dim() > max(axis, 1)), None)
    if first is None:
        return None
    count = math.prod(first.shape[:-1])

    def has(t: torch.Tensor) -> bool:
        return t.dim() > max(axis, 1) and not goes(t)

    def goes(t: torch.Tensor) -> bool:
        own = t.dim() > max(axis, 1) and t.shape[axis] == 1
        return along and t.dim() > 0 and t.shape[0] == count and not own

    if any(has(t) and t.shape[axis] != 1 for t in leaves) or not any(map(has, leaves)):
        return None
    if along and not any(map(goes, leaves)):
        return None
    doubled: ArgsKwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: torch.cat([t, t], axis if has(t) else 0) if has(t) or goes(t) else t, call
    )
    return doubled


def export_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, frozen: bool = True
) -> torch.export.ExportedProgram:
    """``torch.export`` of ``model`` on a real call.

    Args:
        frozen: whether weights and buffers stay what they are in what is made of the graph, so that the model's Python
            may branch on them.

    Raises:
        NotSaveableError: the model cannot be exported; the message names what is in the way.
    """

    model = _by_its_forward(model)
    args, kwargs = plain_call(args, kwargs)
    before = _python_state(model)
    reads = None
    try:
        try:
            program = _traced(model, args, kwargs, None)
        except Exception as err:
            if not frozen or not asks_values(err):
                raise
            _restore(model, before)
            reads = ConstantReads(model)
            program = _traced(model, args, kwargs, reads)
    except MoeoptError:
        raise
    except Exception as err:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        raise NotSaveableError(
            f"{type(model).__name__} cannot be saved: "
            f"{_hidden_child(model, err) or _made_for_inference(model) or _odd_argument(bound, err) or _obstacle(err)}"
        ) from err
    finally:
        counted = _restore(model, before)
    if counted:
        raise NotSaveableError(
            f"{type(model).__name__} cannot be saved: {counted} changes at each call, and an engine keeps no state: "
            "make it an argument, or use backend='torch'"
        )
    if reads is not None:
        reads.refuse(written_by(program))
    return program


def asks_values(err: Exception) -> bool:
    """Whether ``torch.export`` stopped because Python asked for the values of tensors."""
    return "ata-dependent" in str(err) or isinstance(err, (DataDependentOutputException, DynamicOutputShapeException))


def written_by(program: torch.export.ExportedProgram) -> set[str]:
    """The paths of the weights and buffers that a call of ``program`` writes."""
    kinds = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
    return {s.target for s in program.graph_signature.output_specs if s.kind in kinds and s.target}


def _by_its_forward(model: nn.Module) -> nn.Module:
    """``model``, or a plain module around the same parts where torch.export would read a graph that does not run.

    Of a GraphModule it reads the graph, and calls no ``forward`` that was put on the instance.
    """
    if not isinstance(model, torch.fx.GraphModule) or "forward" not in model.__dict__:
        return model
    plain = type("GraphModule", (nn.Module,), {})()  # so that messages name it so
    plain.__dict__.update(model.__dict__)
    return plain


def _traced(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], reads: ConstantReads | None
) -> torch.export.ExportedProgram:
    """The trace with every size free; where torch cannot broadcast a free size of 1, with sizes of 1 as they are."""
    ones = any(1 in t.shape for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
    for free in (True, False) if ones else (True,):
        try:
            with (
                one_trace,
                torch.no_grad(),
                idle_moves(),
                shape_config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
                collect_specialization_guards(),
                no_export_dump(),
                _named(model, kwargs),
                _opened_caches(model),
                answered(model, reads),
            ):
                shapes = free_sizes((args, kwargs), ones=free)
                bound = dict(inspect.signature(model.forward).bind(*shapes[0], **shapes[1]).arguments)
                return torch.export.export(model, args, kwargs, dynamic_shapes=bound, strict=False)
        except RuntimeError as err:
            if not ones or not free or "must match the size of tensor" not in str(err):
                raise
    raise AssertionError("the last try returns or raises")


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

    def instead(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    held = model.__dict__.get("forward")
    instead.__signature__ = signature  # type: ignore[attr-defined]
    model.__dict__["forward"] = instead
    try:
        yield
    finally:
        if held is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = held


def _hidden_child(model: nn.Module, err: Exception) -> str:
    """In words, the submodule that stopped ``torch.export`` because its owner has a method of that name; or ""."""
    if "is not an instance of torch.nn.Module" not in str(err):
        return ""
    for path, module in model.named_modules():
        for name, child in module.named_children():
            if hasattr(type(module), name):  # Python looks there first
                return (
                    f"the submodule {f'{path}.{name}'.lstrip('.')} ({type(child).__name__}) has the name of an "
                    f"attribute of the class {type(module).__name__}, which self.{name} gives in its place, and "
                    "torch.export stops at it: give it another name, or use backend='torch'"
                )
    return ""


def _made_for_inference(model: nn.Module) -> str:
    """In words, the weight that torch cannot trace outside inference mode, for it was made inside; or ""."""
    name = next((name for name, weight in model.named_parameters() if weight.is_inference()), None)
    if name is None or torch.is_inference_mode_enabled():
        return ""
    return (
        f"{name} was made under torch.inference_mode(), and torch traces such weights there only: make the model "
        "outside it, or call moeopt inside it too"
    )


def _odd_argument(bound: dict[str, Any], err: Exception) -> str:
    """In words, the argument that stopped ``torch.export`` because it is neither a tensor nor a plain value; or ""."""
    if "Unsupported input type" not in str(err) and "Unfamiliar meta val" not in str(err):
        return ""
    for path, leaf in pytree.tree_flatten_with_path(bound)[0]:
        if not isinstance(leaf, (torch.Tensor, bool, int, float, complex, str, type(None))):
            name = pytree.keystr(path).replace("'", "").lstrip("[").replace("]", "", 1)
            return (
                f"its argument {name} is a {type(leaf).__qualname__} ({leaf!r:.60}), and a graph takes tensors, "
                "numbers and text: leave it out so that its default holds, set it in the model, or use backend='torch'"
            )
    return ""


def _obstacle(err: Exception) -> str:
    """Where ``torch.export`` stopped, and the way out."""
    text = str(err).strip()
    head = text.splitlines()[0] if text else type(err).__name__
    if unknown := re.match(r"Found <class '(transformers\.cache_utils\.[^']*)'> in output", head):
        return (
            f"its result holds a {unknown[1].rpartition('.')[2]}, and an engine returns caches of plain keys and "
            "values only: add use_cache=False to the example inputs, and to the calls of the engine"
        )
    if unknown := re.match(r"Found (<class '[^']*'>) in output", head):
        return (
            f"its result holds a {unknown[1]}, which torch.export does not know: call "
            "torch.export.register_dataclass on it, or return a tuple or a dict"
        )
    if "ata-dependent" not in head:
        if own := _raised_by_the_model(err):
            return own
        return f"torch.export stops at: {head}. Remove what it names, or save a rewritten block alone"
    lines = [
        line.strip() for line in text.splitlines() if line.strip().startswith("File ") and "site-packages" not in line
    ]
    every = traceback.extract_tb(err.__traceback__)
    frames = [f for f in every if not _is_library(f.filename)] or [f for f in every if _is_models(f.filename)]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else f" ({lines[-1]})" if lines else ""
    return (
        f"torch.export stops at: {head}{where}. Its Python there depends on the values of tensors, which no graph "
        "repeats. In a block that moeopt declined, the report of backend='torch' says why; elsewhere (rotary "
        "embeddings that grow with the positions) set the model to another form. What can be saved: a "
        "rewritten block alone, moeopt.optimize(model.get_submodule(name), its inputs).save(folder), or the whole "
        "model with its code, torch.save(optimized.model, file)"
    )


def _raised_by_the_model(err: Exception) -> str:
    """In words, an error of the model's own code, which runs otherwise and not while it is traced; or ""."""
    frames = traceback.extract_tb(err.__traceback__)
    last = frames[-1] if frames else None
    if last is None or f"{os.sep}torch{os.sep}" in last.filename or f"{os.sep}moeopt{os.sep}" in last.filename:
        return ""
    return (
        f"while torch.export traced it, its own code raised {type(err).__name__}: {err} "
        f"({last.filename}:{last.lineno}: {last.line}). Code may ask whether it is traced and take another way: give "
        "the arguments that this line reads, a mask for one, as example inputs, or use backend='torch'"
    )


def _is_models(path: str) -> bool:
    """Of a library of models: neither torch's nor ours."""
    return not any(f"{os.sep}{name}{os.sep}" in path for name in ("torch", "moeopt")) and not path.startswith("<")


def _is_library(path: str) -> bool:
    return "site-packages" in path or path.startswith("<") or f"{os.sep}moeopt{os.sep}" in path


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
