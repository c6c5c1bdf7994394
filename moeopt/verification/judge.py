"""The numbers: how far each token of each output may be from the float64 oracle, and is.

    d_opt[t] <= FACTOR * max(d_orig[t], typical) + EPS_ALLOWANCE * eps        for every token t

where ``d`` is the relative L2 distance from the oracle (``distance``), eps is of the output's dtype
and ``typical`` is the root mean square of d_orig over the case's tokens. Why ``typical``: d_orig[t] is
one draw of rounding noise; a token on which the original happened to be exact would otherwise make the
bound arbitrarily tight, above all where H is tiny. Why it is capped at 4 medians: one token whose sum
cancels must not loosen the bound of all others.

A token that fails this may be one whose sum cancels, and on which the original was right by luck. Only then
is m[t] measured, the original's distance without luck (``rerounding``), and it stands in for d_orig[t] if it
exceeds EPS_ALLOWANCE * eps: below, the token is well conditioned, and nothing is loosened. Such a token
counts only if the code was also run in float64 and found to be the same function (``block``).

The judge must be fit to judge: an original that itself lies further than ``MISTRUST`` from its oracle
(median over tokens) means that the oracle ran another function, and the block fails for that reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeopt.verification.distance import Finiteness, as_rows, features_last, finite_rows, finiteness, token_distance
from moeopt.verification.rerounding import rerounded_distances
from moeopt.verification.results import CaseResult, Fail
from moeopt.verification.selections import OracleError, Selections

FACTOR = 4.0
EPS_ALLOWANCE = 8.0
EXACT_EPS = 2.0
MISTRUST = 0.125
"""FACTOR times this is half of an output's norm: no bound at all."""


_LEFT_OUT = (
    "the token itself is not finite, and the original's code leaves it out (a comparison with NaN is false) or "
    "replaces what it gives; to have it so in the rewritten code too, replace it with torch.nan_to_num or torch.where"
)


class Judge:
    """Judges the outputs of one case, one tensor after the other, and fills ``result``; ``Fail`` says why.

    Args:
        result: the case's.
        call: original, args, kwargs and its pinned choices: run again if a token may have been lucky.
        oracle: the leaves of the float64 outputs.
        eps: per leaf, of the dtype it was computed in.
        tied: whether routing ties were broken otherwise, so that integers may differ.
        features: of a token, as ``features_last`` takes them.
    """

    def __init__(
        self,
        result: CaseResult,
        call: tuple[Callable[..., Any], Any, Any, Selections],
        oracle: list[Any],
        eps: list[float],
        tied: bool,
        features: int | None = None,
    ) -> None:
        self.features = features
        self.result, self.call, self.oracle, self.eps, self.tied = result, call, oracle, eps, tied
        self.too_far = ""  # the reason to give for the first ill-conditioned token, should the float64 run differ
        self._measured: list[Tensor | None] | None = None

    def tensor(self, leaf: int, where: str, a: Tensor, b: Tensor, o: Tensor) -> None:
        """Compare one output tensor: original ``a``, rewritten ``b``, oracle ``o``."""
        if not (a.dtype.is_floating_point or a.dtype.is_complex):
            if not torch.equal(a, b) and not self.tied:
                wrong = int((a != b).sum())
                raise Fail(f"{where} ({a.dtype}) differs in {wrong} of {a.numel()} elements; integers must be equal")
            return
        if not a.numel():
            return
        if o.shape != a.shape:
            raise Fail(f"the float64 oracle gave {where} shape {tuple(o.shape)}, the original {tuple(a.shape)}")
        a, b, o = (features_last(t, self.features) for t in (a, b, o))
        pattern, eps = finiteness(a, b), self.eps[leaf]
        if pattern.leaked:
            own = self._not_finite_itself(pattern.leaked[0], len(pattern.both))
            raise Fail(
                f"{where} of token {pattern.leaked[0]} is not finite, and is finite in the original "
                f"({len(pattern.leaked)} such tokens): {_LEFT_OUT if own else 'NaN or Inf leaked'}"
            )
        d_orig, d_new = token_distance(a, o, eps=eps), token_distance(b, o, eps=eps)
        judged = pattern.both
        if d_orig[judged].isnan().any():
            t = int((judged & d_orig.isnan()).nonzero()[0])
            raise Fail(f"the float64 oracle is not finite for {where} of token {t}, where the original is")
        if judged.any():
            self._bound(leaf, where, d_orig, d_new, judged)
        allowed = FACTOR * typical(d_orig[judged]) + EPS_ALLOWANCE * eps
        _healed(pattern, d_new, allowed, where, self.result)

    def _not_finite_itself(self, token: int, tokens: int) -> bool:
        """Whether a row of an argument that has ``tokens`` rows holds NaN or infinity."""
        given = [t for t in pytree.tree_leaves(self.call[1:3]) if isinstance(t, Tensor) and t.dtype.is_floating_point]
        rows = [as_rows(features_last(t, self.features)) for t in given]
        return any(len(r) == tokens and not bool(torch.isfinite(r[token]).all()) for r in rows)

    def _bound(self, leaf: int, where: str, d_orig: Tensor, d_new: Tensor, judged: Tensor) -> None:
        mine, theirs, result = d_orig[judged], d_new[judged], self.result
        median = float(mine.median())
        if median > MISTRUST:
            raise Fail(
                f"the float64 oracle does not compute what the original does: they lie {median:.3g} apart at {where} "
                f"(median over tokens, at most {MISTRUST:g} can be judged)"
            )
        floor = mine.clamp_min(typical(mine))
        excess = (theirs - EPS_ALLOWANCE * self.eps[leaf]).clamp_min(0.0)
        factor = torch.where(excess > 0, excess / floor, 0.0)
        far = factor > FACTOR
        if far.any():
            plain = _too_far(where, judged, mine, theirs, floor, factor)
            measured = self._without_luck(leaf, judged)
            factor = torch.where(far, excess / floor.clamp_min(measured), factor)
            if not (factor > FACTOR).any():
                self.too_far = self.too_far or plain
                result.rerounded += int(far.sum())
                result.notes.append(
                    f"{int(far.sum())} tokens of {where} cancel: the rewritten block lies up to "
                    f"{float(theirs[far].max()):.3g} from the float64 oracle there, the original "
                    f"{float(mine[far].max()):.3g}, and {float(measured[far].max()):.3g} when it is rounded otherwise"
                )
        result.tokens += len(mine)
        result.distance_original = max(result.distance_original, float(mine.max()))
        result.distance_rewritten = max(result.distance_rewritten, float(theirs.max()))
        result.required = max(result.required, float(factor.max()))
        if (factor > FACTOR).any():
            raise Fail(_too_far(where, judged, mine, theirs, floor, factor))

    def same_function(self, leaf: int, a: Tensor, b: Tensor) -> None:
        """Compare an output of the rewritten's float64 run, ``b``, with the oracle; ``a`` is the original's output.

        Two runs of one function in float64 agree in ten digits and more, whatever dtype ``a`` has, so that no rounding
        hides another function. Two eps of that dtype remain because code may read ``torch.finfo(x.dtype).eps``, which
        is a constant in the rewritten and follows x in the oracle. Where ``a`` is in float64 itself, both runs are
        rounded as ``a`` is, and they agree as far as outputs of that dtype do.
        """
        eps, result = torch.finfo(a.dtype).eps, self.result
        a, b, o = (features_last(t, self.features) for t in (a, b, self.oracle[leaf]))
        judged = finite_rows(as_rows(a))
        d = token_distance(b, o, eps=eps)[judged]
        d = torch.where(d.isnan(), 0.0, d)
        if not len(d):
            return
        result.distance_exact = max(result.distance_exact or 0.0, float(d.max()))
        allowed = torch.full_like(d, (EPS_ALLOWANCE if a.dtype == torch.float64 else EXACT_EPS) * eps)
        if a.dtype == torch.float64 and (d > allowed).any():
            allowed += FACTOR * self._without_luck(leaf, judged)
        if (d > allowed).any():
            worst = int((d - allowed).argmax())
            raise Fail(
                f"run in float64, output {leaf} of the rewritten block lies {float(d[worst]):.3g} from the original's "
                f"(at most {float(allowed[worst]):.3g}): it is another function, and rounding hides it"
            )

    def _without_luck(self, leaf: int, judged: Tensor) -> Tensor:
        """The original's distance when it is rounded otherwise, of ill-conditioned tokens; 0 for the others."""
        if self._measured is None:
            try:
                self._measured = rerounded_distances(*self.call, self.oracle, self.eps, self.features)
            except OracleError:  # other rounding led to other choices: no distance was measured, so the bound stays
                self._measured = [None] * len(self.oracle)
        found = self._measured[leaf]
        if found is None:
            return torch.zeros(int(judged.sum()), dtype=torch.float64, device=judged.device)
        return torch.where(found > EPS_ALLOWANCE * self.eps[leaf], found, 0.0)[judged]


def _too_far(where: str, judged: Tensor, mine: Tensor, theirs: Tensor, floor: Tensor, factor: Tensor) -> str:
    """In words, how far the worst token is."""
    worst = int(factor.argmax())
    token = int(judged.nonzero().flatten()[worst])
    return (
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
            raise Fail(f"{where} of token {t} is infinite in the original, and finite but wrong in the rewritten block")
    for rows, what in ((pattern.healed_nan, "NaN"), (pattern.healed_inf, "infinite")):
        if rows:
            result.notes.append(f"{len(rows)} tokens are {what} in the original and finite in the rewritten block")
