"""What quantising lost: figures of a lossy model's outputs against the original's, on a user's data.

Loss is not equivalence: no budget explains it, and only the user's limits judge it.

A model whose outputs hold next-token logits (``language.find_logits``) is judged by ``KL(original || lossy)`` of its
next-token distributions at each position, in nats and in float64, by the likeliest tokens, and by the perplexity of the
given ids; positions that an ``attention_mask`` hides do not count. Any other model is judged by the relative L2
distance of its floating outputs a token (``distance.token_distance``).

Errors are standard errors by bootstrap over sequences, which are independent where tokens are not; over tokens where
there is one sequence.

Shape legend: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor

from moeopt.capture.tree import ArgsKwargs
from moeopt.value_types import PyObject
from moeopt.verification.distance import as_rows, finite_rows, token_distance
from moeopt.verification.language import find_ids, find_logits
from moeopt.verification.trees import flatten

DRAWS = 200
"""Resamples of the bootstrap."""
_QUANTILES = {"mean": None, "p99": 0.99, "p999": 0.999, "max": 1.0}


class BlockLoss(TypedDict, total=False):
    """One quantised block, or the quantised products of one module: its format, what quantising it alone loses, and how
    its choices of experts change when all are quantised."""

    name: str
    format: str
    bytes: int
    float_bytes: int
    figures: dict[str, float]
    ids_compared: int
    ids_differ: int


class Loss(TypedDict, total=False):
    """``certificate.loss``: the figures of ``loss_limits.FIGURES`` that the model has, and what explains them."""

    kl_mean: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    top1: float
    perplexity_ratio: float
    error_mean: float
    error_p99: float
    error_p999: float
    error_max: float
    ids_changed: float
    standard_errors: dict[str, float]
    tokens: int
    sequences: int
    data: str
    blocks: list[BlockLoss]
    reference: dict[str, float]
    reference_errors: dict[str, float]
    nearest: dict[str, float]
    limit: dict[str, float]
    missed: list[str]


@dataclass
class LossFigures:
    """Per-token figures of one lossy model, gathered call by call.

    Attributes:
        distances: of each sequence: KL, or the relative distance, of each of its tokens.
        equal: of each sequence: whether each token's likeliest next token is the same. Empty without logits.
        surprise: of each sequence: summed log-probability ratio of the given next tokens, and how many there are.
    """

    language: bool
    distances: list[Tensor] = field(default_factory=list)
    equal: list[Tensor] = field(default_factory=list)
    surprise: list[tuple[float, int]] = field(default_factory=list)

    def add(self, original: PyObject, lossy: PyObject, call: ArgsKwargs) -> None:
        """Note what one call of both models returned."""
        if not self.language:
            for a, b in _float_outputs(original, lossy):
                d = token_distance(b, a)
                rows = a.shape[0] if a.dim() > 2 else len(d)
                sound = finite_rows(as_rows(a)).reshape(rows, -1)  # what was no number before is no loss
                self.distances += [one[keep].cpu() for one, keep in zip(d.reshape(rows, -1), sound, strict=True)]
            return
        logits, ids = logits_of(original, call)
        new, _ = logits_of(lossy, call)
        keep_BS = _attended(call[1], ids)
        for a, b, row, keep in zip(logits, new, ids, keep_BS, strict=True):
            self._row(a, b, row, keep)

    def _row(self, logits_SV: Tensor, new_SV: Tensor, ids_S: Tensor, keep_S: Tensor) -> None:
        old = torch.log_softmax(logits_SV.detach().double(), -1)
        new = torch.log_softmax(new_SV.detach().double(), -1)
        keep_S = keep_S.to(old.device) & ~old.isnan().any(-1)
        gap = torch.where(old == -torch.inf, 0.0, old.exp() * (old - new))  # p log(p/q), and 0 log 0 = 0
        self.distances.append(gap.sum(-1).clamp_min(0.0)[keep_S].cpu())  # rounding can leave -1e-17
        self.equal.append((old.argmax(-1) == new.argmax(-1))[keep_S].double().cpu())
        both = keep_S[:-1] & keep_S[1:]
        target = ids_S[1:, None].long().to(old.device)
        ratio = (old - new)[:-1].gather(-1, target)[:, 0][both]
        self.surprise.append((float(ratio.sum()), int(both.sum())))

    def figures(self) -> dict[str, float]:
        """Each figure by its key; none where no token counts."""
        return self._figures(range(len(self.distances))) if self.tokens else {}

    def standard_errors(self, seed: int) -> dict[str, float]:
        """Of each figure but the maximum, of which no resample says anything; over sequences with tokens."""
        units = self._with_tokens()
        units = units if len(units.distances) > 1 else units._by_token()
        count = len(units.distances)
        if count < 2:
            return {}
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(count, (DRAWS, count), generator=generator).tolist()
        drawn = [units._figures(pick) for pick in picks]
        keys = [key for key in drawn[0] if not key.endswith("_max")]
        return {key: float(torch.tensor([d[key] for d in drawn], dtype=torch.float64).std()) for key in keys}

    @property
    def tokens(self) -> int:
        return sum(len(d) for d in self.distances)

    def _with_tokens(self) -> LossFigures:
        """The same without sequences of which no token counts."""
        keep = [i for i, d in enumerate(self.distances) if len(d)]
        parts = (self.distances, self.equal, self.surprise)
        return LossFigures(self.language, *([part[i] for i in keep] if part else [] for part in parts))  # type: ignore[arg-type]

    def _by_token(self) -> LossFigures:
        """The same with each token as a sequence of its own; the perplexity, of which it has one figure, left out."""
        return LossFigures(
            self.language,
            [d for row in self.distances for d in row.split(1)],
            [e for row in self.equal for e in row.split(1)],
        )

    def _figures(self, pick: Sequence[int]) -> dict[str, float]:
        word = "kl" if self.language else "error"
        d = torch.cat([self.distances[i] for i in pick]) if self.distances else torch.zeros(0, dtype=torch.float64)
        found = {f"{word}_{name}": _quantile(d, q) for name, q in _QUANTILES.items()}
        if self.equal:
            found["top1"] = float(torch.cat([self.equal[i] for i in pick]).mean())
        if self.surprise and (count := sum(self.surprise[i][1] for i in pick)):
            found["perplexity_ratio"] = float(
                torch.tensor(sum(self.surprise[i][0] for i in pick) / count, dtype=torch.float64).exp()
            )
        return found


def is_language(output: PyObject, call: ArgsKwargs) -> bool:
    """Whether the outputs of a call hold next-token logits for its token ids."""
    ids = find_ids(*call)
    return ids is not None and find_logits(output, ids) is not None


def logits_of(output: PyObject, call: ArgsKwargs) -> tuple[Tensor, Tensor]:
    """(B, S, V) logits of a language model's output and the (B, S) ids of its call."""
    ids = find_ids(*call)
    assert ids is not None
    logits = find_logits(output, ids)
    assert logits is not None
    return logits, ids


def _attended(kwargs: Mapping[str, Any], ids_BS: Tensor) -> Tensor:
    """Which positions are text, (B, S) bool: all of them without a 2-D ``attention_mask``."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids_BS.shape:
        return mask.bool()
    return torch.ones_like(ids_BS, dtype=torch.bool)


def _float_outputs(original: PyObject, lossy: PyObject) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(flatten(original)[0], flatten(lossy)[0], strict=True)
    return [
        (a, b)
        for a, b in pairs
        if isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.is_floating_point()
        and a.numel()
        and a.shape == b.shape
    ]


def _quantile(values: Tensor, q: float | None) -> float:
    """The mean for None; NaN where there is no value. Sorted here: ``torch.quantile`` refuses 2**24 values."""
    if not len(values):
        return float("nan")
    if q is None:
        return float(values.mean())
    ordered = values.sort().values
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (at - low)) if high > low else float(ordered[low])
