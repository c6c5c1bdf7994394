"""Is a rewritten block the same function? The original's own float64 run is the judge.

For each case: the original runs at its own dtype and its choices are recorded; its code runs again in
float64 with those choices; the rewritten runs. Routing is compared first (``routing``), then numbers:

    d_opt[t] <= FACTOR * max(d_orig[t], typical) + EPS_ALLOWANCE * eps        for every token t

where ``d`` is the relative L2 distance from the oracle (``distance``), eps is of the output's dtype
and ``typical`` is the root mean square of d_orig over the case's tokens. Why ``typical``: d_orig[t] is
one draw of rounding noise; a token on which the original happened to be exact would otherwise make the
bound arbitrarily tight, above all where H is tiny. Why it is capped at 4 medians: one token whose sum
cancels must not loosen the bound of all others.

The judge must be fit to judge: an original that itself lies further than ``MISTRUST`` from its oracle
(median over tokens) means that the oracle ran another function, and the block fails for that reason.

Rounding can hide damage: in bfloat16, 8 eps are 6 %. So the rewritten code too runs in float64, with its
own choices, and must agree with the oracle within ``EXACT_EPS`` eps of the output's dtype: two runs of
one function in float64 agree in ten digits and more, whatever the dtype. Two eps remain because code
may read ``torch.finfo(x.dtype).eps``, which is a constant in the rewritten and follows x in the oracle.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeopt.compare.distance import Finiteness, as_rows, finite_rows, finiteness, token_distance
from moeopt.compare.oracle import oracle_run, record_selections, run_pinned
from moeopt.compare.routing import compare_routing, ids_seen
from moeopt.compare.selections import Event, OracleError, Selections
from moeopt.compare.trees import describe, equal_leaves, flatten

FACTOR = 4.0
EPS_ALLOWANCE = 8.0
EXACT_EPS = 2.0
MISTRUST = 0.125
"""FACTOR times this is half of an output's norm: no bound at all."""


@dataclass(frozen=True)
class Case:
    """One call of a block: ``original(*args, **kwargs)``."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class CaseResult:
    """What one case showed. Distances are the largest over tokens; ``tokens`` is how many were judged.

    ``distance_exact`` is that of the rewritten code run in float64; None where it could not run so.
    ``ids_seen``: the different expert ids chosen, by the last of the routing choices over the most experts.
    """

    name: str
    status: Literal["passed", "failed", "skipped"] = "passed"
    reason: str = ""
    tokens: int = 0
    distance_original: float = 0.0
    distance_rewritten: float = 0.0
    distance_exact: float | None = None
    required: float = 0.0
    ids_compared: int = 0
    ties: int = 0
    flips: int = 0
    ids_seen: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class BlockCheck:
    """The verdict on one block.

    ``required`` is the factor that would have been needed in place of FACTOR (0: eps alone covers it).
    ``passed`` is None when nothing was checked (verify="off").
    """

    name: str
    passed: bool | None
    cases: list[CaseResult] = field(default_factory=list)
    reason: str = ""
    dtype: str = ""
    seconds: float = 0.0

    @property
    def required(self) -> float:
        return max((case.required for case in self.cases), default=0.0)

    @property
    def distance_original(self) -> float:
        return max((case.distance_original for case in self.cases), default=0.0)

    @property
    def distance_rewritten(self) -> float:
        return max((case.distance_rewritten for case in self.cases), default=0.0)

    @property
    def distance_exact(self) -> float | None:
        return max((case.distance_exact for case in self.cases if case.distance_exact is not None), default=None)

    @property
    def ids_compared(self) -> int:
        return sum(case.ids_compared for case in self.cases)

    @property
    def experts_seen(self) -> int:
        """How many different experts the cases reached, as far as recorded choices tell (0: they do not)."""
        return len(set().union(*(case.ids_seen for case in self.cases)))

    @property
    def ties(self) -> int:
        return sum(case.ties for case in self.cases)

    @property
    def flips(self) -> int:
        return sum(case.flips for case in self.cases)


class _Fail(Exception):
    """A case failed; the text says why."""


def verify_block(
    name: str,
    original: Callable[..., Any],
    rewritten: Callable[..., Any],
    cases: Sequence[Case],
    level: Literal["strict", "fast", "off"] = "strict",
    ids_of: Callable[[Selections], list[Event]] | None = None,
) -> BlockCheck:
    """Run every case on both and judge (see the module's docstring).

    Args:
        name: the block's path, for the certificate.
        original, rewritten: callables of the same signature; neither they nor the cases are changed.
        cases: the inputs. A case on which the original itself raises is skipped, with the reason.
        level: "strict" runs all cases; "fast" stops at the first failure; "off" runs nothing.
        ids_of: which recorded choices are routing; by default every top-k, sort, argmax, ...
    """
    if level == "off":
        return BlockCheck(name, None, reason="not verified: verify='off'")
    started = time.perf_counter()
    check = BlockCheck(name, True)
    for case in cases:
        result = CaseResult(case.name)
        check.cases.append(result)
        try:
            _run_case(case, original, rewritten, result, check, ids_of)
        except _Fail as failure:
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
) -> None:
    try:
        y_orig, chosen = record_selections(original, case.args, case.kwargs)
    except Exception as err:
        result.status, result.reason = "skipped", f"the original raises {_text(err)}"
        return
    try:
        y_new, chosen_new = record_selections(rewritten, case.args, case.kwargs)
    except Exception as err:
        raise _Fail(f"the rewritten block raises {_text(err)}, the original does not") from err
    _samedescribe(y_orig, y_new)
    _same_writes(chosen, chosen_new)
    eps = max((torch.finfo(t.dtype).eps for t in _floats((case.args, case.kwargs, y_orig))), default=0.0)
    routing = compare_routing(chosen, chosen_new, eps, ids_of)
    result.ids_seen = ids_seen(chosen, ids_of)
    result.ids_compared, result.ties, result.flips = routing.ids_compared, routing.ties, routing.flips
    if routing.flips:
        raise _Fail(f"routing differs: {routing.reason}")
    try:
        if routing.as_rewritten is not None:
            chosen = routing.as_rewritten
            y_orig = run_pinned(original, case.args, case.kwargs, chosen)
        y_64, is_exact = oracle_run(original, case.args, case.kwargs, chosen)
    except OracleError as err:
        raise _Fail(str(err)) from err
    leaves = [flatten(y)[0] for y in (y_orig, y_new, y_64)]
    if len(leaves[0]) != len(leaves[2]):
        raise _Fail("the float64 oracle returned another structure than the original")
    for number, (a, b, o) in enumerate(zip(*leaves, strict=True)):
        where = "the output" if len(leaves[0]) == 1 else f"output {number}"
        if isinstance(a, Tensor):
            check.dtype = check.dtype or str(a.dtype).removeprefix("torch.")
            _judge(a, b, o, torch.finfo(a.dtype).eps if a.is_floating_point() else eps, where, result, routing.ties > 0)
        elif isinstance(a, float):
            x, y, z = (torch.tensor(value, dtype=torch.float64) for value in (a, b, o))
            _judge(x, y, z, eps, where, result, routing.ties > 0)
        elif not equal_leaves(a, b):
            raise _Fail(f"{where} is {b!r} instead of {a!r}")
    if is_exact:
        _exact(case, rewritten, chosen_new, leaves[0], leaves[2], result)


def _exact(
    case: Case, rewritten: Callable[..., Any], chosen: Selections, y: list[Any], y_64: list[Any], result: CaseResult
) -> None:
    """Run the rewritten in float64 and demand that it is the oracle's function; note where it cannot run."""
    try:
        y_new, is_exact = oracle_run(rewritten, case.args, case.kwargs, chosen)
    except OracleError as err:
        result.notes.append(f"the rewritten block was not run in float64: {err.reason}")
        return
    leaves = flatten(y_new)[0]
    if not is_exact or len(leaves) != len(y_64):
        return
    for number, (a, b, o) in enumerate(zip(y, leaves, y_64, strict=True)):
        if isinstance(a, Tensor) and a.dtype.is_floating_point and a.numel() and b.shape == o.shape:
            eps = torch.finfo(a.dtype).eps
            d = token_distance(b, o, eps=eps)
            far = d[~d.isnan() & finite_rows(as_rows(a))]
            worst = float(far.max()) if len(far) else 0.0
            result.distance_exact = max(result.distance_exact or 0.0, worst)
            if worst > EXACT_EPS * eps:
                raise _Fail(
                    f"run in float64, output {number} of the rewritten block lies {worst:.3g} from the original's "
                    f"(at most {EXACT_EPS * eps:.3g}): it is another function, and rounding hides it"
                )


def _judge(a: Tensor, b: Tensor, o: Tensor, eps: float, where: str, result: CaseResult, tied: bool) -> None:
    """Compare one output tensor: original ``a``, rewritten ``b``, oracle ``o``; fill ``result``."""
    if not (a.dtype.is_floating_point or a.dtype.is_complex):
        if not torch.equal(a, b) and not tied:
            wrong = int((a != b).sum())
            raise _Fail(f"{where} ({a.dtype}) differs in {wrong} of {a.numel()} elements; integers must be equal")
        return
    if not a.numel():
        return
    if o.shape != a.shape:
        raise _Fail(f"the float64 oracle gave {where} shape {tuple(o.shape)}, the original {tuple(a.shape)}")
    pattern = finiteness(a, b)
    if pattern.leaked:
        raise _Fail(
            f"{where} of token {pattern.leaked[0]} is not finite, and is finite in the original "
            f"({len(pattern.leaked)} such tokens): NaN or Inf leaked"
        )
    d_orig, d_new = token_distance(a, o, eps=eps), token_distance(b, o, eps=eps)
    judged = pattern.both
    if d_orig[judged].isnan().any():
        t = int((judged & d_orig.isnan()).nonzero()[0])
        raise _Fail(f"the float64 oracle is not finite for {where} of token {t}, where the original is")
    if judged.any():
        _bound(d_orig, d_new, judged, eps, where, result)
    allowed = FACTOR * typical(d_orig[judged]) + EPS_ALLOWANCE * eps
    _healed(pattern, d_new, allowed, where, result)


def _bound(d_orig: Tensor, d_new: Tensor, judged: Tensor, eps: float, where: str, result: CaseResult) -> None:
    mine, theirs = d_orig[judged], d_new[judged]
    median = float(mine.median())
    if median > MISTRUST:
        raise _Fail(
            f"the float64 oracle does not compute what the original does: they lie {median:.3g} apart at {where} "
            f"(median over tokens, at most {MISTRUST:g} can be judged)"
        )
    floor = mine.clamp_min(typical(mine))
    excess = (theirs - EPS_ALLOWANCE * eps).clamp_min(0.0)
    factor = torch.where(excess > 0, excess / floor, 0.0)
    worst = int(factor.argmax())
    result.tokens += len(mine)
    result.distance_original = max(result.distance_original, float(mine.max()))
    result.distance_rewritten = max(result.distance_rewritten, float(theirs.max()))
    result.required = max(result.required, float(factor[worst]))
    if float(factor[worst]) > FACTOR:
        token = int(judged.nonzero().flatten()[worst])
        raise _Fail(
            f"{where} of token {token} lies {float(theirs[worst]):.3g} from the float64 oracle, the original "
            f"{float(mine[worst]):.3g} (typical {float(floor[worst]):.3g}): a factor {float(factor[worst]):.3g} "
            f"would be needed, {FACTOR:g} is allowed; {int((factor > FACTOR).sum())} of {len(mine)} tokens are too far"
        )


def typical(d: Tensor) -> float:
    """Root mean square of the distances of a case's tokens, at most 4 medians of those above zero."""
    above = d[(d > 0) & d.isfinite()]
    if not len(above):
        return 0.0
    rms = math.sqrt(float(d[d.isfinite()].square().mean()))
    return min(rms, 4 * float(above.median()))


def _healed(pattern: Finiteness, d_new: Tensor, allowed: float, where: str, result: CaseResult) -> None:
    """Rows finite in the rewritten only: right after a NaN, and after an Inf if the oracle agrees."""
    for t in pattern.healed_inf:
        if not float(d_new[t]) <= allowed:
            raise _Fail(
                f"{where} of token {t} is infinite in the original, and finite but wrong in the rewritten block"
            )
    for rows, what in ((pattern.healed_nan, "NaN"), (pattern.healed_inf, "infinite")):
        if rows:
            result.notes.append(f"{len(rows)} tokens are {what} in the original and finite in the rewritten block")


def _samedescribe(a: Any, b: Any) -> None:
    """Structure, shapes, dtypes and devices of two outputs are equal, or the case fails."""
    (leaves_a, spec_a), (leaves_b, spec_b) = flatten(a), flatten(b)
    if spec_a != spec_b:
        raise _Fail(f"the rewritten block returns {describe(b)}, the original returns {describe(a)}")
    for x, y in zip(leaves_a, leaves_b, strict=True):
        if isinstance(x, Tensor) != isinstance(y, Tensor) or isinstance(x, float) != isinstance(y, float):
            raise _Fail(f"the rewritten block returns {describe(b)}, the original returns {describe(a)}")
        if isinstance(x, Tensor) and (x.shape, x.dtype, x.device) != (y.shape, y.dtype, y.device):
            raise _Fail(f"the rewritten block returns {describe(y)} where the original returns {describe(x)}")


def _same_writes(a: Selections, b: Selections) -> None:
    """What the original writes besides its outputs, the rewritten writes too: arguments and buffers."""
    for number in sorted(a.inputs.keys() ^ b.inputs.keys()):
        one, other = ("original", "rewritten block") if number in a.inputs else ("rewritten block", "original")
        raise _Fail(f"the {one} writes argument {number} in place, the {other} does not")
    theirs = {(name.rpartition(".")[2], tuple(value.shape)): value for name, value in b.state.items()}
    for name, value in a.state.items():
        twin = theirs.get((name.rpartition(".")[2], tuple(value.shape)))
        if twin is None:
            raise _Fail(f"the original updates its own {name!r}, the rewritten block does not")
        exact = not value.dtype.is_floating_point
        if (
            exact
            and not torch.equal(value, twin)
            or not exact
            and not torch.allclose(
                value, twin, rtol=EPS_ALLOWANCE * torch.finfo(value.dtype).eps, atol=0, equal_nan=True
            )
        ):
            raise _Fail(f"the rewritten block leaves {name!r} with another value than the original")


def _floats(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.dtype.is_floating_point]


def _text(err: Exception) -> str:
    first = str(err).strip().splitlines()
    return f"{type(err).__name__}: {first[0]}" if first else type(err).__name__
