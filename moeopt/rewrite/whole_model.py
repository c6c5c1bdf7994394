"""The rewritten blocks of one model: while an exporter traces the model, and beside the original of a copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from moeopt.errors import NotSaveableError
from moeopt.rewrite.install import RewrittenForward, rewritten_forward
from moeopt.rewrite.source import Source


@contextlib.contextmanager
def tried(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """While open, rewritten blocks of ``model`` refuse calls without a warning, and afterwards as if never called.

    Yields:
        A function: whether one of them refused a call, and ran its original code.
    """
    blocks = [f for m in model.modules() if (f := rewritten_forward(m)) is not None]
    before = [(f.calls, f.fallbacks, f.last_refusal, f.silent) for f in blocks]
    for forward in blocks:
        forward.silent = True
    try:
        yield lambda: any(f.fallbacks != count for f, (_, count, *_) in zip(blocks, before, strict=True))
    finally:
        for forward, held in zip(blocks, before, strict=True):
            forward.calls, forward.fallbacks, forward.last_refusal, forward.silent = held


def check_as_verified(model: nn.Module, what: str) -> dict[str, RewrittenForward]:
    """The rewritten blocks of ``model`` by path, where each is what was verified.

    A trace of a changed block holds the code that was verified (or the original's, which may have no graph), and
    neither is what the model computes now. ``what`` is to be made of the trace.

    Raises:
        NotSaveableError: a block has changed; the message has the reason.
    """
    blocks = {p: f for p, m in model.named_modules() if (f := rewritten_forward(m)) is not None}
    for path, forward in blocks.items():
        if reason := forward.watch.everything():
            raise NotSaveableError(
                f"{path or type(model).__name__} is no longer what was verified ({reason}), and {what} would hold the "
                "old code: optimise the model again"
            )
    return blocks


@contextlib.contextmanager
def called_as_verified(model: nn.Module, what: str) -> Iterator[None]:
    """While open, ``model`` is called as it was verified, and none of its rewritten blocks runs its original code.

    Only a call tells of weights in another dtype, or on another device.

    Raises:
        NotSaveableError: one did; ``what`` is to be made of the model.
    """
    blocks = {p: f for p, m in model.named_modules() if (f := rewritten_forward(m)) is not None}
    before = {path: forward.fallbacks for path, forward in blocks.items()}
    yield
    for path, forward in blocks.items():
        if forward.fallbacks != before[path]:
            raise NotSaveableError(
                f"{path or type(model).__name__} is no longer what was verified ({forward.last_refusal}), and {what} "
                "would hold its original code: optimise the model again"
            )


@contextlib.contextmanager
def exported(model: nn.Module) -> Iterator[None]:
    """While open, an exporter traces ``model``: its rewritten blocks are what they were when this was entered.

    An exporter may set a configuration for its own trace (transformers' takes ``batched_mm`` experts). A rewritten
    block computes what was verified whatever is set, and must not give way to the original code, whose experts the
    graph would then hold in an unverified form.

    Raises:
        NotSaveableError: a block had changed before, or refused the exporter's call; the message has the reason.
    """
    blocks = check_as_verified(model, "an engine")
    before = {path: forward.fallbacks for path, forward in blocks.items()}
    for forward in blocks.values():
        forward.watch.paused = True
    try:
        yield
    finally:
        for forward in blocks.values():
            forward.watch.paused = False
    for path, forward in blocks.items():
        if forward.fallbacks != before[path]:
            raise NotSaveableError(
                f"while it was exported, {path or type(model).__name__} ran its original code instead of what was "
                f"verified: {forward.last_refusal}"
            )


def without_original_calls(model: nn.Module) -> None:
    """Let the rewritten blocks of ``model`` run their rewritten code at every number of tokens."""
    for module in model.modules():
        if (forward := rewritten_forward(module)) is not None:
            forward.original_calls = None


def watch_source(model: nn.Module, twin: nn.Module, values: bool) -> None:
    """Let the rewritten blocks of ``twin`` tell what changes in ``model``, of which it is a copy.

    Args:
        values: whether the twin has tensors of its own, so that writes to the model's do not show in it.
    """
    forwards = {p: f for p, m in twin.named_modules() if (f := rewritten_forward(m)) is not None}
    blocks = {path: f.program.reads for path, f in forwards.items() if f.program.reads is not None}
    if forwards:
        source = Source(model, twin, blocks, values, max(f.watch.cost for f in forwards.values()))
        for forward in forwards.values():
            forward.source = source
