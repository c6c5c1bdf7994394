"""The certificate: what was verified, where, against what, and the verdict; prints and travels as JSON.

``passed`` is True, False, or None when nothing was verified (verify="off"). ``executed`` is False when
the engine itself did not run and ``passed`` speaks of a replay of it.

Where experts were quantised there are two statements. ``blocks`` and ``end_to_end`` say that what runs computes the
*quantised* model; ``loss`` says how far that is from the original, ``equivalent`` is False, and ``passed`` also needs
each limit that was set to hold.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import textwrap
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from msgspec import UNSET

from moeopt.errors import BundleError
from moeopt.options.loss_limits import FIGURES
from moeopt.untrusted import checked, cleaned, parse_json, shown
from moeopt.value_types import PyObject
from moeopt.verification.judge import EPS_ALLOWANCE, FACTOR
from moeopt.verification.loss import Loss
from moeopt.verification.loss_text import activation_lines, judged, loss_lines, revived_loss
from moeopt.verification.model import EndToEnd
from moeopt.verification.results import BlockCheck, CaseResult

WIDTH = 80
SCHEMA = 1


def current_versions() -> dict[str, str]:
    """Versions of python, torch and moeopt, as they run here."""
    try:
        own = version("moeopt")
    except PackageNotFoundError:
        own = "source tree"
    return {"python": platform.python_version(), "torch": torch.__version__, "moeopt": own}


@dataclass
class Certificate:
    """See the module's docstring. ``notes`` are sentences for the reader, ``level`` the Options.verify value.

    ``quantized``: the format of each block whose experts were quantised; ``products``: that of each product outside of
    the blocks, by its module's path; ``method``: how floats became codes, "" where none did; ``loss``: what that lost,
    empty where nothing was quantised or measured.
    ``activations``: of an engine whose products of codes round what they read to int8, after it was verified with
    floats: how many ``products`` of how many ``kinds`` do, how many eps a kind's answer is from what rounding gives
    (``error_eps``), and how far rounding moves a ``product`` and the ``outputs``, worst token; {} where none does.
    """

    blocks: list[BlockCheck] = field(default_factory=list)
    end_to_end: EndToEnd | None = None
    level: str = "strict"
    executed: bool = True
    device: str = "cpu"
    dtype: str = ""
    versions: dict[str, str] = field(default_factory=current_versions)
    notes: list[str] = field(default_factory=list)
    quantized: dict[str, str] = field(default_factory=dict)
    loss: Loss = field(default_factory=Loss)
    products: dict[str, str] = field(default_factory=dict)
    activations: dict[str, float] = field(default_factory=dict)
    method: str = ""

    @property
    def lossy(self) -> bool:
        """Whether another function than the original's is computed: weights or activations are rounded."""
        return bool(self.quantized or self.products or self.activations)

    @property
    def equivalent(self) -> bool | None:
        """Whether the original's function is computed: False where it is ``lossy``, else as ``passed``."""
        return False if self.lossy else self.passed

    @property
    def passed(self) -> bool | None:
        """False if anything failed; None if nothing was verified; else True."""
        verdicts = [block.passed for block in self.blocks]
        if self.end_to_end is not None:
            verdicts.append(self.end_to_end.passed)
        if False in verdicts or judged(self.loss, self.loss.get("limit", {})):
            return False
        if self.level == "off" or None in verdicts:
            return None
        return True

    @property
    def verdict(self) -> str:
        """One line: the verdict in words."""
        if self.level == "off":
            return "NOT VERIFIED: verify='off'"
        if self.passed is None:
            return "NOT VERIFIED: something was left out"
        if not self.blocks and self.end_to_end is None:
            return "PASSED: nothing was rewritten, nothing to verify"
        if not self.lossy:
            return "PASSED" if self.passed else "FAILED"
        if judged(self.loss, self.loss.get("limit", {})):
            return "LIMIT MISSED: what quantising lost is more than was allowed"
        kept = ", within its limits" if self.loss.get("limit") else ""
        return f"PASSED as the quantised model, not equivalent{kept}" if self.passed else "FAILED"

    def to_json(self) -> str:
        """The certificate as JSON text; :meth:`from_json` is the inverse."""
        body = dataclasses.asdict(self)
        verdicts = {"passed": self.passed, "equivalent": self.equivalent}
        return json.dumps({"schema": SCHEMA, **verdicts, **_plain(body)}, indent=1, allow_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a reader: :meth:`to_json`'s, the verdict in words, and what a block may need."""
        limits: dict[str, Any] = {"verdict": self.verdict, "factor": FACTOR, "eps_allowance": EPS_ALLOWANCE}
        if self.lossy:
            misses = [key for key, most in self.loss.get("limit", {}).items() if judged(self.loss, {key: most})]
            limits |= {"figures": FIGURES, "limits_missed": misses}
        return {**json.loads(self.to_json()), **limits}

    def _repr_html_(self) -> str:
        from moeopt.html import certificate_table, loss_table

        return certificate_table(self.blocks, self.verdict) + (loss_table(self.to_dict()) if self.loss else "")

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read what :meth:`to_json` wrote; ``BundleError`` if it is damaged or newer than this moeopt."""
        body = cleaned(parse_json(text, "the certificate cannot be read"))
        if not isinstance(body, dict) or "schema" not in body:
            raise BundleError("the certificate cannot be read: it is no JSON object with a schema version")
        if body.pop("schema") != SCHEMA:
            raise BundleError("the certificate has another schema version: written by another moeopt")
        stated, end = body.pop("passed", UNSET), body.get("end_to_end")
        equivalent = body.pop("equivalent", UNSET)  # none in a certificate of an older moeopt
        if isinstance(body.get("loss"), dict):
            body["loss"] = revived_loss(body["loss"])
        if isinstance(end, dict):
            body["end_to_end"] = _revived(EndToEnd, end)
        for block in body["blocks"] if isinstance(body.get("blocks"), list) else ():
            _known(BlockCheck, block)
            if isinstance(block, dict) and isinstance(block.get("cases"), list):
                block["cases"] = [_revived(CaseResult, case) for case in block["cases"]]
        certificate = checked(_known(cls, body), cls, "the certificate cannot be read")
        if certificate.passed is not stated:
            said = "nothing of passed" if stated is UNSET else f"passed={shown(stated, 40)}"
            raise BundleError(f"the certificate says {said}, and its parts say passed={certificate.passed}")
        if equivalent is not UNSET and certificate.equivalent is not equivalent:
            raise BundleError(
                f"the certificate says equivalent={shown(equivalent, 40)}, and its parts say {certificate.equivalent}"
            )
        _check_budget(certificate.end_to_end)
        return certificate

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"moeopt certificate: {self.verdict}"]
        if self.passed and self.blocks:
            count = f"{len(self.blocks)} rewritten block{'s' * (len(self.blocks) > 1)}"
            whole = "" if self.end_to_end is None else ", and the whole model end to end"
            parts = self._quantised_parts()
            what = f" against the model with quantised {parts}" if parts else ""
            lines += _wrap(f"what passed: {count}{whole}{what}", "  ")
        if not self.executed:
            lines.append("engine: not executed; the verdict is that of a replay")
        lines += _wrap(versions, "  ")
        lines += _wrap(f"device {self.device}, dtype {self.dtype or '-'}, verify {self.level}", "  ")
        if self.blocks:
            lines += ["", _HEADER]
            lines += [line for block in self.blocks for line in _row(block)]
            lines += _wrap(
                "orig, new: worst distance per token from the float64 oracle, relative L2; f64: that of the "
                f"rewritten code run in float64; factor: needed beyond {EPS_ALLOWANCE:g} eps ({FACTOR:g} is "
                "allowed); ids: expert choices compared, - where a block gets its choices as input or makes none; tie: "
                "choices among equal scores; flip: choices that came out otherwise",
                "  ",
            )
            lines += self._reasons()
        if self.end_to_end is not None:
            lines += ["", *(part for line in self.end_to_end.lines() for part in _wrap(line, ""))]
        if self.lossy:
            told = [*loss_lines(self.quantized, self.loss, self.products, self.method)]
            told += activation_lines(self.activations)
            lines += ["", *(part for line in told for part in _wrap(line, ""))]
        for note in self.notes:
            lines += _wrap(f"note: {note}", "")
        return lines

    def _quantised_parts(self) -> str:
        return " and ".join(["experts"] * bool(self.quantized) + ["products"] * bool(self.products))

    def _reasons(self) -> list[str]:
        lines: list[str] = []
        for block in self.blocks:
            if block.reason:
                lines += _wrap(f"{block.name}: {block.reason}", "  ")
        skipped: dict[str, list[str]] = {}
        for block in self.blocks:
            for case in block.cases:
                for text in [case.reason] * (case.status == "skipped") + case.notes:
                    skipped.setdefault(f"{case.name} {case.status}: {text}", []).append(block.name)
        for text, names in skipped.items():
            where = names[0] if len(names) == 1 else f"{len(names)} blocks"
            lines += _wrap(f"case {text} ({where})", "  ")
        return lines


_HEADER = (
    f"{'block':<22} {'verdict':<7} {'orig':>7} {'new':>7} {'f64':>7} {'factor':>6} {'ids':>7} {'tie':>3} {'flip':>4}"
)


def _row(block: BlockCheck) -> list[str]:
    """The block's figures; a name that is too long for its column has lines of its own above them."""
    above, name = ([], block.name) if len(block.name) <= 22 else (_wrap(block.name, ""), "")
    verdict = {True: "passed", False: "FAILED", None: "not run"}[block.passed]
    if not block.cases:
        return [*above, f"{name:<22} {verdict:<7} {'-':>7} {'-':>7} {'-':>7} {'-':>6} {'-':>7} {'-':>3} {'-':>4}"]
    exact = "-" if block.distance_exact is None else f"{block.distance_exact:.1e}"
    return [
        *above,
        f"{name:<22} {verdict:<7} {block.distance_original:>7.1e} {block.distance_rewritten:>7.1e} {exact:>7} "
        f"{block.required:>6.2g} {block.ids_compared or '-':>7} {block.ties:>3} {block.flips:>4}",
    ]


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ") or [indent]


def _plain(value: PyObject) -> PyObject:
    """``value`` with infinities and NaN as text, which strict JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _revived(cls: PyObject, body: PyObject) -> PyObject:
    """The plain form of a dataclass with its float fields as numbers: strict JSON has "inf" and "nan" as text."""
    if not isinstance(body, dict):
        return body
    _known(cls, body)
    floats = {f.name for f in dataclasses.fields(cls) if str(f.type).startswith("float")}
    return {k: float(v) if k in floats and v in ("inf", "-inf", "nan") else v for k, v in body.items()}


def _known(cls: PyObject, body: PyObject) -> PyObject:
    """``body``; ``BundleError`` where it has a field that this moeopt would drop in silence."""
    unknown = sorted(set(body) - {f.name for f in dataclasses.fields(cls)}) if isinstance(body, dict) else []
    if unknown:
        raise BundleError(f"the certificate cannot be read: a {cls.__name__} has no field {unknown[0]!r:.60}")
    return body


def _check_budget(end: EndToEnd | None) -> None:
    """A verdict that passed rests on a finite budget, and keeps to it."""
    if end is None or end.passed is not True:
        return
    for distance, budget in ((end.distance, end.budget), (end.distance_rms, end.budget_rms)):
        if not (math.isfinite(budget) and 0 <= distance <= budget):
            raise BundleError(
                f"the certificate passed end to end at a distance of {distance:g} with a budget of {budget:g}, "
                "which allows anything or less than was seen: it was edited"
            )
