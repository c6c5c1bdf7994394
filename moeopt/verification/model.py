"""End to end: the optimised model against the original, in the model's own dtype.

No oracle runs here: a whole model in float64 is too large. The budget is the original's own *rounding
sensitivity*: the original is run again with each rewritten block's output multiplied by 1 + eps * n,
n normal, and the outputs move by s (largest of ``DRAWS`` draws). A correct rewrite moves its outputs
by an amount of that kind, so

    d(optimised, original) <= FACTOR * s + EPS_ALLOWANCE * eps

must hold, d the relative L2 distance per token, once for the largest token and once for the root mean
square over tokens.

A product of few outputs (the head of a regression, a value) may cancel: its result is near zero and the terms of its
sum are not, so that another order of that sum moves it by many eps. A cast to bfloat16 inside a float32 model may fall
on either side of a step. Where a verdict fails, the noise therefore enters the inputs of products as well, each term
by one eps, and the results of narrowing casts by the eps that they round to, and the outputs are judged once more.

Noise must not choose experts: where two scores tie, it would send tokens elsewhere, move the outputs by
all of their norm, and allow anything. So noisy runs choose as the quiet run did (``pins``), and a token
that moves by more than ``CEILING`` even so is not judged: it is counted and told, and where only such
tokens are left there is no verdict but a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.capture.isolated_run import WatchWrites
from moeopt.listed import listed
from moeopt.value_types import PyObject
from moeopt.verification.distance import finiteness, token_distance
from moeopt.verification.judge import EPS_ALLOWANCE, FACTOR, MISTRUST
from moeopt.verification.language import find_ids, find_logits, greedy_agreement, language_metrics
from moeopt.verification.noise import Noise
from moeopt.verification.pins import RoutingLog, RoutingPins
from moeopt.verification.state import RestoreState, clone_inputs_and_objects, modules_of
from moeopt.verification.trees import describe, equal_leaves, flatten, not_comparable, numbers

DRAWS = 3
CEILING = FACTOR * MISTRUST
"""No token is judged by a budget of more than half of its norm: that allows anything."""


@dataclass
class EndToEnd:
    """The verdict on a whole model. ``distance`` is the largest over tokens, ``budget`` what it may be.

    Of several outputs, the one that uses most of its budget is shown.
    """

    passed: bool | None
    reason: str = ""
    outputs: int = 0
    tokens: int = 0
    distance: float = 0.0
    budget: float = 0.0
    distance_rms: float = 0.0
    budget_rms: float = 0.0
    ids: int = 0
    ids_differ: int = 0
    """Expert choices inside an engine that were compared with the model's, and those that are not the same."""
    ties: int = 0
    """Expert choices inside an engine that were ties, and that it made otherwise than the model."""
    language: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The verdict in plain lines."""
        verdict = {True: "passed", False: "FAILED", None: "not run"}[self.passed]
        told = [f"distance at most {self.distance:.2e} (budget {self.budget:.2e})"]
        if self.tokens:  # golden runs count none, and have no rms
            told = [f"{self.tokens} tokens", *told, f"rms {self.distance_rms:.2e} (budget {self.budget_rms:.2e})"]
        lines = [f"end to end: {verdict}; {', '.join(told)}"]
        if self.reason:
            lines.append(f"  {self.reason}")
        if self.ids:
            lines.append(f"  expert ids chosen inside the engine: {self.ids} compared, {self.ids_differ} differ")
        lines += [f"  {name}: {value:.6g}" for name, value in self.language.items()]
        return lines + [f"  note: {note}" for note in self.notes]


def run_plain(fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> PyObject:
    """Outputs of ``fn`` on cloned inputs, with no gradient and no trace left on ``fn``."""
    buffers = [(b, b.detach().clone()) for module in modules_of(fn) for b in module.buffers()]
    with torch.inference_mode(False), torch.no_grad(), RestoreState(fn) as guard:
        own_args, own_kwargs = clone_inputs_and_objects(tuple(args)), clone_inputs_and_objects(dict(kwargs))
        try:
            with WatchWrites(guard.before_write):
                return fn(*own_args, **own_kwargs)
        finally:
            for buffer, value in buffers:  # what no op announces: a write through NumPy
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def end_to_end(
    original: nn.Module,
    optimized: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    noise_blocks: Sequence[str] = (),
    seed: int = 0,
    greedy_steps: int = 8,
    otherwise: Callable[[OriginalRuns, Any], EndToEnd | None] | None = None,
    known: OriginalRuns | None = None,
) -> EndToEnd:
    """Compare ``optimized(*args, **kwargs)`` with ``original(*args, **kwargs)``.

    Args:
        noise_blocks: names of the submodules of ``original`` that were rewritten; the budget comes of
            perturbing their outputs by one eps. None given: only EPS_ALLOWANCE * eps is allowed.
        seed: of the noise.
        greedy_steps: tokens to generate where both models have ``generate`` and the call has token ids.
        otherwise: asked for another verdict on a comparison that failed, with the original's runs and what
            ``optimized`` gave; None from it leaves the verdict as it is.
        known: the original's runs on this call, for these blocks and this seed, where they were made before.

    Floating outputs are compared per token on the last dim; integers and other leaves must be equal.
    """
    kwargs = dict(kwargs or {})
    runs = replace(known) if known is not None else OriginalRuns.of(original, args, kwargs, noise_blocks, seed)
    try:
        got = run_plain(optimized, args, kwargs)
    except Exception as err:
        return EndToEnd(False, f"the optimised model raises {type(err).__name__}: {err}")
    want = runs.want
    result = compare_outputs(want, got, runs.noisy)
    if not result.passed and otherwise is not None:
        result = otherwise(runs, got) or result
    if not result.passed and noise_blocks:
        runs.noisy = runs.shaken(original, args, kwargs, noise_blocks, seed, inside=True)
        again = compare_outputs(want, got, runs.noisy)
        if not again.passed and otherwise is not None:
            again = otherwise(runs, got) or again
        if again.passed:
            again.notes.append(_INSIDE)
            result = again
    ids = find_ids(args, kwargs)
    logits, logits_new = (None, None) if ids is None else (find_logits(want, ids), find_logits(got, ids))
    if ids is not None and logits is not None and logits_new is not None and logits.shape == logits_new.shape:
        result.language = language_metrics(logits, logits_new, ids)
        if greedy_steps and hasattr(original, "generate") and hasattr(optimized, "generate"):
            try:
                result.language["greedy tokens equal"] = greedy_agreement(original, optimized, ids, greedy_steps)
            except Exception as err:
                result.notes.append(f"generate was not compared: {type(err).__name__}: {err}")
    return result


_INSIDE = (
    "the sum of a product cancels, or a cast rounds to a narrower dtype: the result was judged by what it moves by "
    "when the terms of the product and the result of the cast are rounded otherwise"
)


@dataclass
class OriginalRuns:
    """Outputs of the original: as it is, and under rounding noise with the same choices of experts."""

    want: PyObject
    noisy: list[Any]
    log: RoutingLog

    @classmethod
    def of(
        cls, original: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], noise_blocks: Sequence[str], seed: int
    ) -> OriginalRuns:
        """Run ``original`` 1 + ``DRAWS`` times; once where there is no block to shake."""
        log = RoutingLog()
        try:
            with log:
                want = run_plain(original, args, kwargs)
        except Exception:  # of the model itself, or an operator that no mode can look at: then nothing is pinned
            log = RoutingLog()
            want = run_plain(original, args, kwargs)
        runs = cls(want, [], log)
        runs.noisy = runs.shaken(original, args, kwargs, noise_blocks, seed)
        return runs

    def shaken(
        self, original: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], noise_blocks: Sequence[str], seed: int,
        inside: bool = False,
    ) -> list[Any]:  # fmt: skip
        """``DRAWS`` runs of ``original`` under :class:`Noise`, with the choices of the quiet run."""
        noisy = []
        for draw in range(DRAWS if noise_blocks else 0):
            with Noise(original, noise_blocks, seed + draw, inside), RoutingPins(self.log.events):
                noisy.append(run_plain(original, args, kwargs))
        return noisy


def compare_outputs(want: PyObject, got: PyObject, noisy: Sequence[Any], noiseless: PyObject = None) -> EndToEnd:
    """Judge outputs ``got`` against ``want``.

    Args:
        noisy: outputs of the original under rounding noise.
        quiet: the outputs that these are the noise of, where it is not ``want``.
    """
    (wants, spec), (gots, spec_got) = flatten(want), flatten(got)
    if spec != spec_got:
        forms = f"{describe(got)} instead of {describe(want)}"
        if describe(got) == describe(want):  # classes that hold the same
            forms += f", as {type(got).__qualname__} and not {type(want).__qualname__}"
        return EndToEnd(False, f"the optimised model returns another structure than the original: {forms}")
    result = EndToEnd(True, outputs=len(wants))
    others = [flatten(tree)[0] for tree in noisy]
    still = wants if noiseless is None else flatten(noiseless)[0]
    for number, (a, b) in enumerate(zip(wants, gots, strict=True)):
        shaken = [(leaves[number], still[number]) for leaves in others if len(leaves) == len(wants) == len(still)]
        reason = _leaf(a, b, shaken, result)
        if reason:
            result.passed = False
            result.reason = result.reason or f"output {number} {reason}"
    result.notes += _not_compared(wants)
    return result


def _not_compared(leaves: Sequence[Any]) -> Iterator[str]:
    """What is to be told of results that hold values of which only the types were compared, or none."""
    closed = [leaf for leaf in leaves if not_comparable(leaf)]
    once = sorted({type(leaf).__name__ for leaf in closed if hasattr(leaf, "__next__")})
    other = sorted({type(leaf).__name__ for leaf in closed if not hasattr(leaf, "__next__")})
    if once:
        yield (
            f"the result holds what can be read only once ({listed(once)}), whose values were not compared: return a "
            "list or a tuple to have them compared"
        )
    if other:
        yield (
            f"the result holds objects ({listed(other)}) of which only the types were compared: return tensors and "
            "numbers, in lists, tuples or dicts, to have them compared"
        )
    if not closed and not any(isinstance(numbers(leaf), (Tensor, int)) for leaf in leaves):
        yield "the model returns no numbers, so its blocks were compared, and nothing end to end"


def _leaf(a: PyObject, b: PyObject, shaken: list[tuple[Any, Any]], result: EndToEnd) -> str:
    """Judge one leaf into ``result``; ``shaken``: noisy and quiet of each draw. The reason why it fails, or ""."""
    if isinstance(a, Tensor) != isinstance(b, Tensor):
        return f"is {b!r} instead of {a!r}"
    a, b, shaken = numbers(a), numbers(b), [(numbers(noisy), numbers(noiseless)) for noisy, noiseless in shaken]
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return "" if equal_leaves(a, b) else f"is {b!r} instead of {a!r}"
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"is {b.dtype} {tuple(b.shape)} instead of {a.dtype} {tuple(a.shape)}"
    if not (a.dtype.is_floating_point or a.dtype.is_complex):
        return "" if torch.equal(a, b) else f"({a.dtype}) differs in {int((a != b).sum())} elements"
    if not a.numel():
        return ""
    pattern = finiteness(a, b)
    if pattern.leaked:
        return f"is not finite at token {pattern.leaked[0]}, where the original is"
    eps = torch.finfo(a.dtype).eps
    d = token_distance(b, a)[pattern.both]
    if not len(d):
        result.notes.append(
            f"none of the {len(pattern.both)} tokens of an output is finite in the original (NaN or infinity), so no "
            "distance was compared: give example inputs on which the model computes numbers"
        )
        return ""
    moved = [
        token_distance(noisy, noiseless).nan_to_num(0.0)[pattern.both]
        for noisy, noiseless in shaken
        if noisy.shape == a.shape
    ]
    sound = torch.stack(moved).amax(0) * FACTOR <= CEILING if moved else torch.ones_like(d, dtype=torch.bool)
    if not sound.any():
        return (
            f"cannot be judged: one rounding error in each block moves every one of its {len(d)} tokens by more than "
            f"{CEILING / FACTOR:g} of its norm, and any result would be within such a budget"
        )
    if not sound.all():
        result.notes.append(
            f"{int((~sound).sum())} of {len(d)} tokens were not judged: one rounding error in each block moves the "
            f"original's own result by more than {CEILING / FACTOR:g} of its norm there"
        )
    d, moved = d[sound], [m[sound] for m in moved]
    budget = FACTOR * max((float(m.max()) for m in moved), default=0.0) + EPS_ALLOWANCE * eps
    budget_rms = FACTOR * max((_rms(m) for m in moved), default=0.0) + EPS_ALLOWANCE * eps
    result.tokens += len(d)
    if float(d.max()) * result.budget >= result.distance * budget:
        result.distance, result.budget = float(d.max()), budget
    if _rms(d) * result.budget_rms >= result.distance_rms * budget_rms:
        result.distance_rms, result.budget_rms = _rms(d), budget_rms
    if float(d.max()) > budget:
        return f"moves by {float(d.max()):.3g} at its worst token; the original's rounding explains {budget:.3g}"
    if _rms(d) > budget_rms:
        return f"moves by {_rms(d):.3g} (rms over tokens); the original's rounding explains {budget_rms:.3g}"
    return ""


def _rms(d: Tensor) -> float:
    return float(d.square().mean().sqrt())
