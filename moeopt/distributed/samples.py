"""What each op got when the whole model ran once on its example, with what one process makes of that.

Taken on every rank while all experts are still here; the proof across ranks compares with it. Shape legend: T tokens, H
hidden, K chosen per token, E experts, D width of the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeopt.bundle.mapped_file import give_back
from moeopt.capture.failed_call import call_hint, in_short
from moeopt.capture.tape import clone_inputs
from moeopt.capture.tree import ArgsKwargs
from moeopt.distributed.agreement import digest_of_expert
from moeopt.distributed.install import ExpertOp
from moeopt.errors import UsageError
from moeopt.ops.experts import experts
from moeopt.ops.override import override_experts_impl
from moeopt.ops.reference import dtypes
from moeopt.rewrite.install import RewrittenForward
from moeopt.rewrite.silent_refusals import silent_refusals
from moeopt.value_types import PyObject

MOST = 32
"""Tokens of the example that are compared."""


@dataclass
class SampledCase:
    """Tokens, routes, and the op's result on all experts in one process."""

    name: str
    x_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    y_TD: Tensor


@dataclass
class Sample:
    """Of one op: cases, a digest of each expert's weights, and the ids that the router gave.

    ``ids_TK`` and ``weights_TK`` are of the whole example; ``split`` has them of the same tokens in one call and in
    two, None where the block does not take a part of its tokens.
    """

    cases: list[SampledCase]
    digests: list[int]
    ids_TK: Tensor
    weights_TK: Tensor
    split: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def sampled(model: nn.Module, call: ArgsKwargs, ops: list[ExpertOp]) -> list[Sample]:
    """One call of ``model`` on its example, looked at.

    Raises:
        UsageError: a block runs its original code on it, or the call fails: the model was changed since.
    """
    numbers = {id(op.bank): n for n, op in enumerate(ops)}
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    inputs: dict[int, Tensor] = {}

    def look(x: Tensor, ids: Tensor, weights: Tensor, bank: PyObject, spec: PyObject) -> None:
        if (n := numbers.get(id(bank))) is not None:
            seen.setdefault(n, (x.detach().clone(), ids.clone(), weights.detach().clone()))

    args, kwargs = clone_inputs(call)
    try:
        with torch.no_grad(), override_experts_impl(look), _inputs_seen(ops, inputs):
            model(*args, **kwargs)
    except Exception as err:  # whatever the user's code raises on weights that were cast or moved
        raise UsageError(_why_it_fails(model, call, ops, err)) from err
    samples = []
    for n, op in enumerate(ops):
        if n not in seen:
            raise UsageError(
                f"{op.name} does not run its rewritten code on the example that the model was optimised with "
                f"({op.forward.last_refusal or 'its experts were not reached'}); optimise the model again"
            )
        samples.append(_sample(op, *seen[n], inputs.get(id(op.module))))
        give_back()
    return samples


def _why_it_fails(model: nn.Module, call: ArgsKwargs, ops: list[ExpertOp], err: Exception) -> str:
    changed = next((f" ({op.name}: {op.forward.last_refusal})" for op in ops if op.forward.last_refusal), "")
    return (
        f"{type(model).__name__} cannot be distributed: it was changed after moeopt.optimize{changed}, and its example "
        f"inputs fail ({in_short(err)}{call_hint(model, *call)}): change the model first (dtype=, device= of "
        "moeopt.optimize do), then optimise it"
    )


@contextlib.contextmanager
def _inputs_seen(ops: list[ExpertOp], inputs: dict[int, Tensor]) -> Iterator[None]:
    """Inside, ``inputs`` gets the first input of each block that takes one tensor. A hook would stop the rewrite."""
    places = {id(op.module): (op.module, op.key, op.forward) for op in ops}

    def seen(module: nn.Module, forward: RewrittenForward) -> Callable[..., PyObject]:
        def run(*args: PyObject, **kwargs: PyObject) -> PyObject:
            if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
                inputs.setdefault(id(module), args[0].detach().clone())
            return forward(*args, **kwargs)

        return run

    for module, key, forward in places.values():
        module.__dict__[key] = seen(module, forward)
    try:
        yield
    finally:
        for module, key, forward in places.values():
            module.__dict__[key] = forward


def _sample(op: ExpertOp, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, block_input: Tensor | None) -> Sample:
    cases = []
    with torch.no_grad():
        for name, ids in _routes(op.experts, ids_TK[:MOST]):
            T = len(ids)
            x, w = _repeated(x_TH, T), _repeated(weights_TK, T)
            cases.append(SampledCase(name, x, ids, w, experts(x, ids, w, op.bank, op.spec)))
    digests = [digest_of_expert(op.bank, e, op.spec) for e in range(op.experts)]
    width = cases[0].y_TD.shape[1]
    split = None if block_input is None else _split(op, block_input, width)
    return Sample(cases, digests, ids_TK, weights_TK, split)


def _routes(E: int, ids_TK: Tensor) -> list[tuple[str, Tensor]]:
    """The example's own routes, and those that dispatch gets wrong first."""
    K, T = ids_TK.shape[1], max(len(ids_TK), 4)
    g = torch.Generator().manual_seed(0)

    def like(ids: Tensor) -> Tensor:
        return ids.to(dtype=ids_TK.dtype, device=ids_TK.device)

    every = -(-E // max(K, 1))
    return [
        ("as routed", ids_TK),
        ("every expert", like((torch.arange(every * K) % E).view(every, K))),
        ("all to the last expert", like(torch.full((T, K), E - 1))),
        ("no expert, and ids of none", like(torch.randint(-1, E + 1, (T, K), generator=g))),
    ]


def _repeated(t: Tensor, rows: int) -> Tensor:
    """``rows`` rows of ``t``, over again where it has fewer."""
    if not len(t):
        return t.new_ones(rows, *t.shape[1:])
    return t[torch.arange(rows, device=t.device) % len(t)]


def _split(op: ExpertOp, x: Tensor, width: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """(ids, weights) of the block's router on the tokens of ``x``, in one call and in two."""
    if x.dim() < 2:
        return None
    flat = x.reshape(-1, x.shape[-1])
    half = len(flat) // 2
    parts = [part.view(*([1] * (x.dim() - 2)), *part.shape) for part in (flat, flat[:half], flat[half:]) if len(part)]
    found: list[tuple[Tensor, Tensor]] = []

    def only_route(x: Tensor, ids: Tensor, weights: Tensor, bank: PyObject, spec: PyObject) -> Tensor:
        if bank is op.bank:
            found.append((ids.clone(), weights.detach().clone()))
        return x.new_zeros(len(x), width, dtype=dtypes(x, spec)[2])

    call: Callable[[Tensor], PyObject] = op.module
    with torch.no_grad(), override_experts_impl(only_route), silent_refusals(op.module):
        for part in parts:
            try:
                call(part)
            except Exception:  # whatever the user's code raises on a part of its tokens
                return None
    if len(found) != len(parts):
        return None
    ids_TK, weights_TK = (torch.cat(parts) for parts in zip(*found[1:], strict=True))
    return (found[0], (ids_TK, weights_TK)) if ids_TK.shape == found[0][0].shape else None
