"""What got worse between two certificates: a list of which block, which measure, from what to what.

Both certificates measured rounding, and two roundings of one function differ. So a distance counts as worse only
beyond what the certificate itself allows between an original and its rewrite, with the stored figure in the
original's place:

    after > FACTOR * before + EPS_ALLOWANCE * eps        eps of the dtype that the stored certificate speaks of

The float64 run of the rewritten code has no such excuse: two runs of one function in float64 agree in ten digits
and more (``block``), so there the floor is ``EXACT_FLOOR``. It shows damage that 16 bits hide.

Not only numbers get worse: a block that is no longer rewritten, a case that is no longer run, an engine that was
replayed instead of executed are listed too. The figures of language models are left out: they follow from the
logits, whose distance is compared, and a tie turns them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeopt.errors import BundleError, UsageError
from moeopt.untrusted import parse_json
from moeopt.value_types import PyObject
from moeopt.verification.certificate import Certificate
from moeopt.verification.judge import EPS_ALLOWANCE, FACTOR
from moeopt.verification.model import EndToEnd
from moeopt.verification.results import BlockCheck

EXACT_FLOOR = 1e-10
"""Relative L2 distance per token between two float64 runs: ten digits."""
_ORDER = {"off": 0, "fast": 1, "strict": 2}
END = "end to end"


@dataclass(frozen=True)
class Regression:
    """One thing that got worse.

    Attributes:
        where: a block's name, "end to end" or "certificate".
        what: the measure, in words.
        before, after: its values; text for what is no number.
        limit: what rounding would explain of ``after``; None for what is no number.
    """

    where: str
    what: str
    before: float | str
    after: float | str
    limit: float | None = None

    @property
    def factor(self) -> float | None:
        """``after`` over ``before``: how many times worse; None where that is no number."""
        if isinstance(self.before, str) or isinstance(self.after, str) or not self.before:
            return None
        return self.after / self.before

    def to_dict(self) -> dict[str, Any]:
        """JSON types; an infinity is text."""
        body = dataclasses.asdict(self) | {"factor": self.factor}
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in body.items()}

    def __str__(self) -> str:
        if isinstance(self.before, str) or isinstance(self.after, str):
            return f"{self.where}: {self.what}: was {self.before}, is {self.after}"
        times = "" if self.factor is None else f", {self.factor:.3g} times as far"
        return (
            f"{self.where}: {self.what}: {self.before:.2e} -> {self.after:.2e}{times}; "
            f"rounding explains {self.limit:.2e}"
        )


def regressions(before: Certificate, after: Certificate) -> list[Regression]:
    """What is worse in ``after`` than in ``before``, blocks in the order of ``before``; empty: nothing is.

    Blocks are matched by name. Blocks that only ``after`` has are no regression, and neither is anything that got
    better.
    """
    found: list[Regression] = []
    if _ORDER.get(after.level, 0) < _ORDER.get(before.level, 0):
        found.append(Regression("certificate", "verified", before.level, after.level))
    if before.executed and not after.executed:
        found.append(Regression("certificate", "the engine", "executed", "replayed"))
    blocks = {block.name: block for block in after.blocks}
    fewer = before.level != after.level
    for old in before.blocks:
        new = blocks.get(old.name)
        if new is None:
            found.append(Regression(old.name, "the block", "rewritten and verified", "not in the certificate"))
            continue
        found += _block(old, new, before.dtype, fewer)
    found += _end(before.end_to_end, after.end_to_end, before.dtype)
    return found


def current(saved: Certificate, checked: Certificate, stored: Certificate) -> Certificate:
    """A bundle's certificate as it stands now, to be compared with ``stored``.

    Args:
        saved: the certificate in the bundle, with the blocks as they were verified.
        checked: what checking the bundle here gave.
        stored: what it will be compared with: where that speaks of golden runs, so does the result.
    """
    end = next((c.end_to_end for c in (checked, saved) if _golden(c.end_to_end) is _golden(stored.end_to_end)), None)
    return dataclasses.replace(saved, executed=checked.executed, device=checked.device, end_to_end=end)


def read_certificate(path: str | os.PathLike[str]) -> Certificate:
    """A certificate from a file: a bundle's ``certificate.json``, or what the command printed with ``--json``.

    Raises:
        UsageError: there is no such file.
        BundleError: it holds no certificate.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{file}: there is no such certificate: copy a bundle's certificate.json there")
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        body = parse_json(text, "it")
        inner = json.dumps(body["certificate"]) if isinstance(body, dict) and "certificate" in body else text
        return Certificate.from_json(inner)
    except (ValueError, BundleError) as err:
        raise BundleError(f"{file}: {err}: give a bundle's certificate.json, or what --json printed") from None


def _block(old: BlockCheck, new: BlockCheck, dtype: str, fewer: bool) -> list[Regression]:
    found = []
    if old.passed and not new.passed:
        after = "not verified" if new.passed is None else f"failed: {new.reason}"
        found.append(Regression(old.name, "the verdict", "passed", after))
    eps = _eps(old.dtype or dtype)
    found += _farther(old.name, "from the float64 oracle", old.distance_rewritten, new.distance_rewritten, _limit, eps)
    if old.distance_exact is not None and new.distance_exact is not None:
        found += _farther(
            old.name, "run in float64, from the oracle", old.distance_exact, new.distance_exact, _limit_exact, eps
        )
    if old.distance_exact is not None and new.distance_exact is None and new.passed is not None:
        found.append(Regression(old.name, "the rewritten code in float64", "run", "not run"))
    ran = {case.name: case for case in new.cases}
    for case in old.cases if not fewer and new.passed is not None else ():
        now = ran.get(case.name)
        if case.status == "passed" and (now is None or now.status == "skipped"):
            after = "not run" if now is None else f"skipped: {now.reason}"
            found.append(Regression(old.name, f"case {case.name!r}", "passed", after))
    return found


def _end(old: EndToEnd | None, new: EndToEnd | None, dtype: str) -> list[Regression]:
    if old is None:
        return []
    if new is None:
        return [Regression(END, "the comparison", "passed" if old.passed else "made", "not made")]
    found = []
    if old.passed and not new.passed:
        after = "not verified" if new.passed is None else f"failed: {new.reason}"
        found.append(Regression(END, "the verdict", "passed", after))
    if _golden(old) is _golden(new):
        eps = _eps(dtype)
        found += _farther(END, "worst token", old.distance, new.distance, _limit, eps)
        found += _farther(END, "rms over tokens", old.distance_rms, new.distance_rms, _limit, eps)
    return found


def _golden(end: EndToEnd | None) -> bool:
    """Whether it speaks of golden runs, which count no tokens, and not of a comparison with the original."""
    return end is not None and not end.tokens


def _farther(where: str, what: str, before: float, after: float, limit: PyObject, eps: float) -> list[Regression]:
    most = limit(before, eps)
    return [] if after <= most else [Regression(where, what, before, after, most)]


def _limit(before: float, eps: float) -> float:
    return FACTOR * before + EPS_ALLOWANCE * eps


def _limit_exact(before: float, eps: float) -> float:
    return FACTOR * before + EXACT_FLOOR


def _eps(dtype: str) -> float:
    """Of a floating dtype by name; float32's where the certificate names none."""
    named = getattr(torch, dtype or "float32", torch.float32)
    return torch.finfo(named if isinstance(named, torch.dtype) and named.is_floating_point else torch.float32).eps
