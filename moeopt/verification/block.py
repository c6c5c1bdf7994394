"""Is a rewritten block the same function? The original's own float64 run is the judge.

For each case: the original runs at its own dtype and its choices are recorded; its code runs again in
float64 with those choices; the rewritten runs. Routing is compared first (``routing``), then what is
returned and written, then numbers (``judge``).

Rounding can hide damage: in bfloat16, 8 eps are 6 %. So the rewritten code too runs in float64, with its
own choices, and must agree with the oracle as far as :meth:`~.judge.Judge.same_function` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeopt.errors import Declined
from moeopt.value_types import PyObject
from moeopt.verification.judge import EPS_ALLOWANCE, Judge
from moeopt.verification.oracle import oracle_run, record_selections, run_pinned
from moeopt.verification.results import BlockCheck, Case, CaseResult, Fail
from moeopt.verification.routing import compare_routing, ids_seen
from moeopt.verification.selections import Event, OracleError, Selections
from moeopt.verification.trees import describe, equal_leaves, flatten


def verify_block(
    name: str,
    original: Callable[..., Any],
    rewritten: Callable[..., Any],
    cases: Sequence[Case],
    level: Literal["strict", "fast", "off"] = "strict",
    ids_of: Callable[[Selections], list[Event]] | None = None,
    features: int | None = None,
) -> BlockCheck:
    """Run every case on both and judge (see the module's docstring).

    Args:
        name: the block's path, for the certificate.
        original, rewritten: callables of the same signature; neither they nor the cases are changed.
        cases: the inputs. A case on which the original itself raises is skipped, with the reason.
        level: "strict" runs all cases; "fast" stops at the first failure; "off" runs nothing.
        ids_of: which recorded choices are routing; by default every top-k, sort, argmax, ...
        features: that an output has for each token, where they may not be its last axis.
    """
    if level == "off":
        return BlockCheck(name, None, reason="not verified: verify='off'")
    started = time.perf_counter()
    check = BlockCheck(name, True)
    for case in cases:
        result = CaseResult(case.name)
        check.cases.append(result)
        try:
            _run_case(case, original, rewritten, result, check, ids_of, features)
        except Fail as failure:
            result.status, result.reason = "failed", str(failure)
            if check.passed:
                check.passed, check.reason = False, f"case {case.name!r}: {failure}"
            if level == "fast":
                break
    if check.passed and not any(case.status == "passed" and case.tokens for case in check.cases):
        check.passed = False
        skipped = next((case.reason for case in check.cases if case.reason), "no finite output in any case")
        check.reason = f"no case could be judged: {skipped}" if check.cases else "no case was given"
    check.seconds = time.perf_counter() - started
    return check


def _run_case(
    case: Case,
    original: Callable[..., Any],
    rewritten: Callable[..., Any],
    result: CaseResult,
    check: BlockCheck,
    ids_of: Callable[[Selections], list[Event]] | None,
    features: int | None,
) -> None:
    try:
        y_orig, chosen = record_selections(original, case.args, case.kwargs)
    except Exception as err:
        result.status, result.reason = "skipped", f"the original raises {_text(err)}"
        return
    try:
        y_new, chosen_new = record_selections(rewritten, case.args, case.kwargs)
    except Declined:  # of the runtime that answers for the experts: no form of it carries them
        raise
    except Exception as err:
        raise Fail(f"the rewritten block raises {_text(err)}, the original does not") from err
    _samedescribe(y_orig, y_new)
    _same_writes(chosen, chosen_new)
    eps = max((torch.finfo(t.dtype).eps for t in _floats((case.args, case.kwargs, y_orig))), default=0.0)
    routing = compare_routing(chosen, chosen_new, eps, ids_of)
    result.ids_seen = ids_seen(chosen, ids_of)
    result.ids_compared, result.ties, result.flips = routing.ids_compared, routing.ties, routing.flips
    if routing.flips:
        raise Fail(f"routing differs: {routing.reason}")
    try:
        if routing.as_rewritten is not None:
            chosen = routing.as_rewritten
            y_orig = run_pinned(original, case.args, case.kwargs, chosen)
        y_64, is_exact = oracle_run(original, case.args, case.kwargs, chosen)
    except OracleError as err:
        raise Fail(str(err)) from err
    leaves = [flatten(y)[0] for y in (y_orig, y_new, y_64)]
    if len(leaves[0]) != len(leaves[2]):
        raise Fail("the float64 oracle returned another structure than the original")
    judge = Judge(
        result,
        (original, case.args, case.kwargs, chosen),
        leaves[2],
        [torch.finfo(y.dtype).eps if isinstance(y, Tensor) and y.is_floating_point() else eps for y in leaves[0]],
        routing.ties > 0,
        features,
    )
    for number, (a, b, o) in enumerate(zip(*leaves, strict=True)):
        where = "the output" if len(leaves[0]) == 1 else f"output {number}"
        if isinstance(a, Tensor):
            check.dtype = check.dtype or str(a.dtype).removeprefix("torch.")
            judge.tensor(number, where, a, b, o)
        elif isinstance(a, float):
            judge.tensor(number, where, *(torch.tensor(value, dtype=torch.float64) for value in (a, b, o)))
        elif not equal_leaves(a, b):
            raise Fail(f"{where} is {b!r} instead of {a!r}")
    if is_exact:
        _exact(case, rewritten, chosen_new, leaves[0], judge)
    if result.rerounded and result.distance_exact is None:
        raise Fail(f"{judge.too_far}; and it was not run in float64, so it is not known whether only rounding differs")


def _exact(case: Case, rewritten: Callable[..., Any], chosen: Selections, y: list[Any], judge: Judge) -> None:
    """Run the rewritten in float64 and demand that it is the oracle's function; note where it cannot run."""
    try:
        y_new, is_exact = oracle_run(rewritten, case.args, case.kwargs, chosen)
    except OracleError as err:
        judge.result.notes.append(f"the rewritten block was not run in float64: {err.reason}")
        return
    leaves = flatten(y_new)[0]
    if not is_exact or len(leaves) != len(judge.oracle):
        return
    for number, (a, b) in enumerate(zip(y, leaves, strict=True)):
        if isinstance(a, Tensor) and a.dtype.is_floating_point and a.numel() and b.shape == judge.oracle[number].shape:
            judge.same_function(number, a, b)


def _samedescribe(a: PyObject, b: PyObject) -> None:
    """Structure, shapes, dtypes and devices of two outputs are equal, or the case fails."""
    (leaves_a, spec_a), (leaves_b, spec_b) = flatten(a), flatten(b)
    if spec_a != spec_b:
        raise Fail(f"the rewritten block returns {describe(b)}, the original returns {describe(a)}")
    for x, y in zip(leaves_a, leaves_b, strict=True):
        if isinstance(x, Tensor) != isinstance(y, Tensor) or isinstance(x, float) != isinstance(y, float):
            raise Fail(f"the rewritten block returns {describe(b)}, the original returns {describe(a)}")
        if isinstance(x, Tensor) and (x.shape, x.dtype, x.device) != (y.shape, y.dtype, y.device):
            raise Fail(f"the rewritten block returns {describe(y)} where the original returns {describe(x)}")


def _same_writes(a: Selections, b: Selections) -> None:
    """What the original writes besides its outputs, the rewritten writes too: arguments and buffers."""
    for number in sorted(a.inputs.keys() ^ b.inputs.keys()):
        one, other = ("original", "rewritten block") if number in a.inputs else ("rewritten block", "original")
        raise Fail(f"the {one} writes argument {number} in place, the {other} does not")
    mine = {(name.rpartition(".")[2], tuple(value.shape)) for name, value in a.state.items()}
    for name in sorted(b.changed):
        if (name.rpartition(".")[2], tuple(b.state[name].shape)) not in mine:
            raise Fail(f"the rewritten block updates its own {name!r}, the original does not")
    theirs = {(name.rpartition(".")[2], tuple(value.shape)): value for name, value in b.state.items()}
    for name, value in a.state.items():
        twin = theirs.get((name.rpartition(".")[2], tuple(value.shape)))
        if twin is None:
            raise Fail(f"the original updates its own {name!r}, the rewritten block does not")
        exact = not value.dtype.is_floating_point
        if (
            exact
            and not torch.equal(value, twin)
            or not exact
            and not torch.allclose(
                value, twin, rtol=EPS_ALLOWANCE * torch.finfo(value.dtype).eps, atol=0, equal_nan=True
            )
        ):
            raise Fail(f"the rewritten block leaves {name!r} with another value than the original")


def _floats(tree: PyObject) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.dtype.is_floating_point]


def _text(err: Exception) -> str:
    first = str(err).strip().splitlines()
    return f"{type(err).__name__}: {first[0]}" if first else type(err).__name__
