"""Why torch.export refused a model, in words that name the model's line and the way out."""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from moeopt.bundle.caches import cache_reason
from moeopt.errors import NotSaveableError
from moeopt.listed import listed
from moeopt.pipeline.still_saveable import still_saveable
from moeopt.report import BlockReport


@contextlib.contextmanager
def declined_blocks_named(blocks: Sequence[BlockReport]) -> Iterator[None]:
    """While open, a graph that cannot be written is refused with the MoE block among ``blocks`` that was declined.

    Such a block's own code would be in the graph, and is often what has no form there. The rewritten ones are named
    too: each has a graph of its own.

    Raises:
        NotSaveableError: with the block's name and the reason at its end.
    """
    try:
        yield
    except NotSaveableError as err:
        names = [block.name for block in blocks if block.kind == "moe" and block.status == "rewritten"]
        rewritten = f". Rewritten: {listed(names)}" if names else ""
        declined = [block for block in blocks if block.kind == "moe" and block.status == "declined"]
        if not declined and not rewritten:
            raise
        if not declined:
            raise NotSaveableError(f"{err}{rewritten}") from err
        more = f" (and {len(declined) - 1} more)" if declined[1:] else ""
        raise NotSaveableError(
            f"{err}. The MoE block {declined[0].name}{more} was declined, so the graph would hold its own code: "
            f"{declined[0].reason}{rewritten}"
        ) from err


def hidden_child(model: nn.Module, err: Exception) -> str:
    """In words, the submodule that stopped ``torch.export`` because its owner has a method of that name; or ""."""
    if "is not an instance of torch.nn.Module" not in str(err):
        return ""
    for path, module in model.named_modules():
        for name, child in module.named_children():
            if hasattr(type(module), name):  # Python looks there first
                return (
                    f"the submodule {f'{path}.{name}'.lstrip('.')} ({type(child).__name__}) has the name of an "
                    f"attribute of the class {type(module).__name__}, which self.{name} gives in its place, and "
                    "torch.export stops at it: give it another name, or use backend='torch' without saving"
                )
    return ""


def unwritable_name(model: nn.Module) -> str:
    """In words, the module or Parameter whose name the code that torch makes of a graph cannot hold; or ""."""
    names = [path for path, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers())]
    name = next((name for name in names if set(name) & {'"', "\n", "\r"}), None)
    if name is None:
        return _taken_name(model)
    return (
        f"the name {name!r:.200} holds a quotation mark or a line break, which the code that torch makes of a graph "
        "cannot hold: give the module another name, or use backend='torch' without saving"
    )


def _taken_name(model: nn.Module) -> str:
    held = {**dict.fromkeys(model._parameters, "Parameter"), **dict.fromkeys(model._buffers, "buffer")}
    held |= dict.fromkeys(model._modules, "module")
    for name, what in held.items():
        if hasattr(torch.fx.GraphModule, name) or name == "meta":
            return (
                f"its {what} {name} has the name of an attribute of torch.fx.GraphModule, which torch makes of a graph"
                ": give it another name, hold it in a child module, or use backend='torch' without saving"
            )
    return ""


def made_for_inference(model: nn.Module) -> str:
    """In words, the weight that torch cannot trace outside inference mode, for it was made inside; or ""."""
    name = next((name for name, weight in model.named_parameters() if weight.is_inference()), None)
    if name is None or torch.is_inference_mode_enabled():
        return ""
    return (
        f"{name} was made under torch.inference_mode(), and torch traces such weights there only: make the model "
        "outside it, or call moeopt inside it too"
    )


def odd_argument(bound: dict[str, Any], err: Exception) -> str:
    """In words, the argument that stopped ``torch.export`` because it is neither a tensor nor a plain value; or ""."""
    if "Unsupported input type" not in str(err) and "Unfamiliar meta val" not in str(err):
        return ""
    for path, leaf in pytree.tree_flatten_with_path(bound)[0]:
        if not isinstance(leaf, (torch.Tensor, bool, int, float, complex, str, type(None))):
            name = pytree.keystr(path).replace("'", "").lstrip("[").replace("]", "", 1)
            return (
                f"its argument {name} is a {type(leaf).__qualname__} ({leaf!r:.60}), and a graph takes tensors, "
                "numbers and text: leave it out so that its default holds, set it in the model, or use backend='torch' "
                "without saving"
            )
    return ""


def obstacle_of(err: Exception) -> str:
    """Where ``torch.export`` stopped, and the way out."""
    text = str(err).strip()
    head = text.splitlines()[0] if text else type(err).__name__
    if unknown := re.match(r"Found <class '(transformers\.cache_utils\.[^']*)'> in output", head):
        return cache_reason(unknown[1].rpartition(".")[2])
    if unknown := re.match(r"Found (<class '[^']*'>) in output", head):
        return (
            f"its result holds a {unknown[1]}, which torch.export does not know: call "
            "torch.export.register_dataclass on it, or return a tuple or a dict"
        )
    if "ata-dependent" not in head:
        if sizes := _sizes_as_numbers(err, head):
            return sizes
        if own := _raised_by_the_model(err):
            return own
        return f"torch.export stops at: {head}{_line_of(err)}. Remove what it names. {still_saveable()}"
    lines = [
        line.strip() for line in text.splitlines() if line.strip().startswith("File ") and "site-packages" not in line
    ]
    where = _line_of(err) or (f" ({lines[-1]})" if lines else "")
    return (
        f"torch.export stops at: {head}{where}. Its Python there depends on the values of tensors, which no graph "
        "repeats. In a block that moeopt declined, its reason says more; an `if` that only asks whether any row is "
        "left (mask.any()) can go, since products of no rows are no error; elsewhere (rotary "
        f"embeddings that grow with the positions) set the model to another form. {still_saveable()}"
    )


def _line_of(err: Exception) -> str:
    """The model's line that was run last, in brackets; or ""."""
    every = traceback.extract_tb(err.__traceback__)
    frames = [f for f in every if not _is_library(f.filename)] or [f for f in every if _is_models(f.filename)]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _sizes_as_numbers(err: Exception, head: str) -> str:
    """In words, code that needs a size as a plain number, which no free size is; or ""."""
    if "non-nested SymInt" in head:
        return (
            f"its code looks something up by a size{_line_of(err)}, in a dict, a set or a cache such as "
            "functools.lru_cache, and in a graph a size is no number: compute at each call what is looked up there, "
            "or hold one table as a buffer and take its first rows"
        )
    if "expected to contain only concrete integers" in head:
        return (
            f"torch has no form with free sizes of an op that its code calls{_line_of(err)} (a random draw with a "
            "generator=, for one): leave the generator out, or the draw"
        )
    return ""


def _raised_by_the_model(err: Exception) -> str:
    """In words, an error of the model's own code, which runs otherwise and not while it is traced; or ""."""
    frames = traceback.extract_tb(err.__traceback__)
    last = frames[-1] if frames else None
    if last is None or f"{os.sep}torch{os.sep}" in last.filename or f"{os.sep}moeopt{os.sep}" in last.filename:
        return ""
    return (
        f"while torch.export traced it, its own code raised {type(err).__name__}: {err} "
        f"({last.filename}:{last.lineno}: {last.line}). Code may ask whether it is traced and take another way: give "
        "the arguments that this line reads, a mask for one, as example inputs, or use backend='torch' without saving"
    )


def _is_models(path: str) -> bool:
    """Of a library of models: neither torch's nor ours."""
    return not any(f"{os.sep}{name}{os.sep}" in path for name in ("torch", "moeopt")) and not path.startswith("<")


def _is_library(path: str) -> bool:
    return "site-packages" in path or path.startswith("<") or f"{os.sep}moeopt{os.sep}" in path
