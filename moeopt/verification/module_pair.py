"""Two modules side by side: which blocks differ, and each of them against the float64 oracle of the original's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from moeopt.capture.probe_inputs import call_specs
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import Declined, UsageError
from moeopt.rewrite.install import RewrittenForward, rewritten_forward
from moeopt.value_types import PyObject
from moeopt.verification.block import verify_block
from moeopt.verification.cases import adversarial_cases
from moeopt.verification.model import run_plain
from moeopt.verification.results import BlockCheck, Case
from moeopt.verification.state import clone_inputs_and_objects

EXPERTS = 16
"""How many a plain module is taken to have: it sets how many tokens the case has that shall reach each of them."""
MOST = 4
"""So many modules with other weights are compared one by one: if all weights differ, these tell enough."""


def differing_blocks(original: nn.Module, model: nn.Module) -> list[str]:
    """Names of the submodules to compare: what moeopt rewrote in ``model``.

    If it rewrote nothing, the outermost modules of one name and two classes, and of the others the first ``MOST``
    that hold weights of other values: 16 bits hide much of those end to end.
    """
    known = dict(original.named_modules())
    rewritten = [name for name, m in model.named_modules() if name in known and rewritten_forward(m) is not None]
    if rewritten:
        return rewritten
    found: list[str] = []
    weights: list[str] = []
    for name, module in model.named_modules():
        if name not in known or any(name.startswith(f"{outer}.") or not outer for outer in found):
            continue
        if type(module) is not type(known[name]):
            found.append(name)
        elif len(weights) < MOST and not _same_tensors(module, known[name]):
            weights.append(name)
    return found + weights


def _same_tensors(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules' own parameters and buffers, not their children's, are equal bit for bit."""
    mine, theirs = ({**dict(m.named_parameters(recurse=False)), **dict(m.named_buffers(recurse=False))} for m in (a, b))
    return mine.keys() == theirs.keys() and all(
        t is theirs[n] or (t.dtype, t.device) == (theirs[n].dtype, theirs[n].device) and torch.equal(t, theirs[n])
        for n, t in mine.items()
    )


def check_blocks(
    original: nn.Module, model: nn.Module, call: ArgsKwargs, names: Sequence[str], experts: Mapping[str, int],
    level: Literal["strict", "fast"], seed: int,
) -> list[BlockCheck]:  # fmt: skip
    """Verify submodules of ``model`` against those of ``original``, on the calls that ``call`` makes of them.

    Args:
        names: of the submodules; "" is the model itself.
        experts: how many a block has, where that is known, by the block's name in a report.
        level, seed: as in ``Options``.

    Raises:
        UsageError: a name that one of the two has not.
    """
    known, others = dict(original.named_modules()), dict(model.named_modules())
    for name in names:
        if name not in known or name not in others:
            raise UsageError(f"blocks={name!r}: the {'original' if name not in known else 'optimised model'} has none")
    calls = _first_calls(original, call, names)
    checks = []
    for name in names:
        label = name or type(original).__name__
        if name not in calls:
            checks.append(BlockCheck(label, None, reason="the original did not call it on these inputs"))
            continue
        cases = [Case("the given inputs", *calls[name])]
        try:
            call_spec = next(call_specs(*calls[name]), None)
        except Declined:
            call_spec = None
        if call_spec is not None and (label in experts or not call_spec.indices("ids")):
            cases = adversarial_cases(call_spec, experts.get(label, EXPERTS), level=level, seed=seed) + cases
        forward = rewritten_forward(others[name])
        before = 0 if forward is None else forward.fallbacks
        check = verify_block(label, known[name], others[name], cases, level=level)
        _refused(check, forward, before)
        checks.append(check)
    return checks


def _refused(check: BlockCheck, forward: RewrittenForward | None, before: int) -> None:
    """A rewritten block that ran its original code was compared with itself, which proves nothing."""
    if forward is not None and forward.fallbacks > before and check.passed:
        check.passed = False
        check.reason = (
            f"the rewritten code refused a case and ran the original code instead: {forward.last_refusal}; optimise "
            "with inputs like these"
        )


def _first_calls(model: nn.Module, call: ArgsKwargs, names: Sequence[str]) -> dict[str, ArgsKwargs]:
    found: dict[str, ArgsKwargs] = {}
    handles = []
    for name in names:

        def keep(module: nn.Module, args: PyObject, kwargs: PyObject, name: str = name) -> None:
            if name not in found:
                found[name] = clone_inputs_and_objects((tuple(args), dict(kwargs)))

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True))
    try:
        run_plain(model, *call)
    finally:
        for handle in handles:
            handle.remove()
    return found
