"""Does a rewritten block have the original's gradients? A trace without gradients cannot tell.

``torch.no_grad()``, ``detach()`` and ``.data`` inside a block leave no mark on its values, so a rewrite
may be right in every output and let a gradient through that the original stops; ``is_grad_enabled()`` and an
``autograd.Function`` with a gradient of its own do not show either. Both are differentiated once, on a real
call, against the same random cotangent.

No gradient and a gradient of zeros are two things: weight decay moves a Parameter that has the second. A
loop over the experts that are hit leaves the others without; a loop over all gives them zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.capture.module_state import ModuleState
from moeopt.capture.tape import clone_inputs
from moeopt.capture.tree import leaves_of
from moeopt.value_types import PyObject

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Relative L2 per gradient: sums of many rounded terms in two orders. A stopped gradient is off by 1."""

LARGE = 20_000_000
"""Elements of one block's Parameters above which only the small ones (a router's, biases) are compared."""


STOPPED = "no gradient flows through the original, and one does through the rewritten code"


def gradients_differ(
    module: nn.Module, original: Callable[..., Any], rewritten: Callable[..., Any], args: PyObject, kwargs: PyObject,
    kept: Iterable[nn.Module] = (),
) -> str:  # fmt: skip
    """Why the two are not the same where gradients are asked for, ``STOPPED`` where the original has none; or "".

    Their outputs are compared as well: a forward may ask whether gradients are enabled.

    Args:
        module: the block; its Parameters are differentiated too, whether they ask for it or not.
        original, rewritten: its two forwards.
        args, kwargs: one real call.
        kept: modules that both call. Their hooks on gradients do not run, as those on Parameters do not.
    """
    named = every = [(n, p) for n, p in module.named_parameters() if p.is_floating_point()]
    if sum(p.numel() for _, p in named) > LARGE:
        named = [(n, p) for n, p in named if p.numel() <= LARGE // 64]
    ran = []
    with _asked_for([p for _, p in named], [p for _, p in every], kept):
        state = ModuleState(module)  # each run ends as it began: without hooks
        for whose, fn in (("the original's", original), ("its", rewritten)):
            try:
                ran.append(_run(fn, args, kwargs, [p for _, p in named], state))
            except Exception as err:
                return f"{whose} gradient raises {type(err).__name__}: {(str(err).splitlines() or [''])[0][:200]}"
    (outs, want), (outs_got, got) = ran
    if len(outs) != len(outs_got) or not all(map(_close, outs, outs_got)):
        return "its outputs are not the original's where gradients are enabled (is_grad_enabled() in its forward?)"
    if want is None or got is None:
        if want is None:
            return STOPPED if got is not None else ""
        return "no gradient flows through the rewritten code, and one does through the original"
    names = [f"input {i}" for i in range(len(want) - len(named))] + [n for n, _ in named]
    for name, a, b in zip(names, want, got, strict=True):
        if not _alike(a, b):
            return f"the gradient of {name} is not the original's (no_grad, detach or .data in its forward?)"
    return ""


def hooks_of(module: nn.Module) -> tuple[PyObject, PyObject]:
    """The tables of a module's hooks on gradients."""
    return module._backward_hooks, module._backward_pre_hooks


@contextlib.contextmanager
def _asked_for(named: Iterable[Tensor], every: Iterable[Tensor], kept: Iterable[nn.Module]) -> Iterator[None]:
    """Gradients of ``named`` are asked for and of the others of ``every`` not; no hook on a gradient runs."""
    flags = [(p, p.requires_grad) for p in every]
    tables = [p._backward_hooks for p, _ in flags] + [t for k in kept for m in k.modules() for t in hooks_of(m)]
    hooks = [(table, table.copy()) for table in tables if table]
    try:
        for table, _ in hooks:
            table.clear()  # autograd looks into the table itself
        for parameter, _ in flags:
            parameter.requires_grad_(False)  # no gradient of a large one is ever held
        for parameter in named:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for table, held in hooks:
            table.update(held)


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    """As :func:`_close`, where no gradient counts as zeros."""
    held = b if a is None else a
    if held is None:  # weights whose codes are read: no zeros of their size are made
        return True
    return _close(*(torch.zeros_like(held) if t is None else t for t in (a, b)))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    far, size = float((a.double() - b.double()).norm()), float(a.double().norm())
    return far <= TOLERANCE.get(a.dtype, 0.2) * size + 1e-12 or size != size


def _run(
    fn: Callable[..., Any], args: PyObject, kwargs: PyObject, parameters: list[Tensor], state: ModuleState
) -> tuple[list[Tensor], list[Tensor | None] | None]:
    """Float outputs; gradients of the float inputs, then of ``parameters``; None if nothing has one."""
    call = clone_inputs((args, kwargs))
    leaves = [t for t in leaves_of(Tensor, call) if t.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_(True)
    with torch.enable_grad(), _put_back(state):
        floats = [t for t in leaves_of(Tensor, fn(*call[0], **call[1])) if t.is_floating_point()]
        results = [t.detach().clone() for t in floats]
        outs = [t for t in floats if t.requires_grad]
        if not outs:
            return results, None
        generator = torch.Generator().manual_seed(0)
        total = [torch.randn(t.shape, generator=generator).to(t) for t in outs]
        found = torch.autograd.grad(outs, [*leaves, *parameters], total, allow_unused=True)
    return results, list(found)


@contextlib.contextmanager
def _put_back(state: ModuleState) -> Iterator[None]:
    """Attributes, buffers and the random state are afterwards what they were."""
    buffers = [(b, b.detach().clone()) for _, b in state.buffers]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        state.restore()
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def skips_idle(
    module: nn.Module,
    original: Callable[..., Any],
    rewritten: Callable[[bool], Callable[..., Any]],
    calls: Iterable[tuple[Any, Any]],
) -> bool | None:
    """Whether the original leaves experts that no token reaches without a gradient.

    Nothing is differentiated: a Parameter has a gradient if the outputs' autograd graph reaches it.

    Args:
        module: the block.
        original: its forward. rewritten: its forward that skips idle experts (True), or gives them zeros (False).
        calls: (args, kwargs) that leave experts idle; one that the original does not take tells nothing.

    Returns:
        True or False as ``rewritten`` takes it; False too where it makes no difference; None where the original
        does neither, so that its own code is needed where it is trained.
    """
    flags = [(p, p.requires_grad) for p in module.parameters()]
    state, fits = ModuleState(module), {False: True, True: True}
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        for args, kwargs in calls:
            try:
                want = _reached(original, args, kwargs, state)
            except Exception:  # noqa: S112 - verification has told that the original refuses this call
                continue
            for skip in fits:
                fits[skip] &= _reached(rewritten(skip), args, kwargs, state) == want
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return next((skip for skip, fit in fits.items() if fit), None)


def _reached(fn: Callable[..., Any], args: PyObject, kwargs: PyObject, state: ModuleState) -> set[int]:
    """Ids of the leaves that the autograd graph of ``fn``'s outputs ends in."""
    call = clone_inputs((args, kwargs))
    with torch.enable_grad(), _put_back(state):
        out = fn(*call[0], **call[1])
    found: set[int] = set()
    pending = [t.grad_fn for t in leaves_of(Tensor, out) if t.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return found
