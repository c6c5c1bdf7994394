"""One self-contained HTML page: text, tables and inline SVG; no script, no network, written in one move.

A strict content policy in the page's head forbids the browser to fetch anything, and every text that comes from a
model (names, reasons, source lines) is escaped by jinja2 or by ``svg``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeopt.errors import UsageError
from moeopt.full_disk import told
from moeopt.html import graph, heat
from moeopt.html.certificate import certificate_view
from moeopt.html.load import load_views
from moeopt.html.numbers import memory_view, ratio, speed_view
from moeopt.value_types import PyObject

_HERE = Path(__file__).parent


def write_page(
    path: str | os.PathLike[str],
    *,
    report: Mapping[str, Any] | None = None,
    groups: list[tuple[str, str, dict[str, Any]]] | None = None,
    certificate: Mapping[str, Any] | None = None,
    profile: Mapping[str, Any] | None = None,
    inspection: Mapping[str, Any] | None = None,
    timings: Mapping[str, float] | None = None,
    key: str = "",
) -> Path:
    """Write the page, whole or not at all; a part that is not given is left out.

    Args:
        report: ``Report.to_dict()``.
        groups: its blocks, alike ones folded: (name, summary, block).
        certificate: ``Certificate.to_json()`` as values, with ``verdict``, ``factor`` and ``eps_allowance``.
        profile: ``LoadProfile.to_dict()``.
        inspection: ``Inspection.to_dict()``.
        timings: seconds of one call by name, as their owner measured them.
        key: what the words of a block's ``spec`` mean.

    Raises:
        UsageError: jinja2 is not installed, the folder does not exist, or ``timings`` are no positive numbers.
    """
    target = check_target(path)
    text = page(report, groups or [], certificate, profile, inspection, timings, key)
    handle, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with told(target), os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.chmod(draft, 0o644)
        os.replace(draft, target)
    except BaseException:
        os.unlink(draft)
        raise
    return target


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path, where a page can be written to it; ``UsageError`` where not, or where jinja2 is missing."""
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"give the name of a file, like 'report.html', and no {type(path).__name__}")
    target = Path(path)
    if importlib.util.find_spec("jinja2") is None:
        raise UsageError("the HTML report needs jinja2: pip install 'moeopt[report]'")
    if not target.parent.is_dir():
        raise UsageError(f"{target} cannot be written: there is no folder {target.parent}")
    if target.is_dir():
        raise UsageError(f"{target} is a folder: give the name of a file, like {target / 'report.html'}")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as err:
        raise UsageError(
            f"{target} cannot be written: {err.strerror or err} in {target.parent}; give a file in a folder that you "
            "may write to"
        ) from err
    return target


def page(
    report: Mapping[str, Any] | None,
    groups: list[tuple[str, str, dict[str, Any]]],
    certificate: Mapping[str, Any] | None,
    profile: Mapping[str, Any] | None,
    inspection: Mapping[str, Any] | None,
    timings: Mapping[str, float] | None,
    key: str = "",
) -> str:
    """The page as text; see :func:`write_page`."""
    import jinja2
    from markupsafe import Markup

    speed = speed_view(timings, profile, report)
    subject = report or profile or {}
    facts = {"report": report, "certificate": certificate, "profile": profile, "inspection": inspection,
             "timings": dict(timings) if timings else None}  # fmt: skip
    shown = report.get("graph") if report else None
    spelled = report is not None and any(block.get("spec") for block in report["blocks"])
    loads = profile["layers"] if profile else []
    pages = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters["svg"] = Markup
    pages.filters["distance"] = distance
    pages.filters["ratio"] = ratio
    return pages.from_string((_HERE / "page.html.j2").read_text()).render(
        css=Markup((_HERE / "page.css").read_text()),
        json=Markup(json.dumps(facts, allow_nan=False).translate(_HARMLESS)),
        model=subject.get("model") or "model",
        report=report,
        groups=groups,
        key=key if spelled else "",
        headline=headline(report, certificate, profile),
        graph=shown,
        captured=graph.captured(shown) if shown else "",
        rewritten=graph.rewritten(shown) if shown else "",
        certificate=certificate_view(certificate) if certificate else None,
        speed=speed,
        memory=memory_view(inspection),
        profile=profile,
        loads=load_views(loads),
        heat=heat.heat_map(loads),
        sorted=max((len(x["fired"]) for x in loads), default=0) > heat.BY_NUMBER,
        levels=heat.levels(),
        inspection=inspection,
    )


_HARMLESS = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}
"""So that no text in the JSON can end the element that holds it."""


def headline(
    report: Mapping[str, Any] | None, certificate: Mapping[str, Any] | None, profile: Mapping[str, Any] | None
) -> tuple[str, str]:
    """(class, sentence): the verdict before everything else."""
    if report is None:
        layers = len(profile["layers"]) if profile else 0
        return "plain", f"Expert load of {layers} block{'' if layers == 1 else 's'}"
    blocks = report["blocks"]
    done = sum(b["status"] == "rewritten" for b in blocks)
    words = f"{done} of {len(blocks)} block{'' if len(blocks) == 1 else 's'} rewritten"
    if certificate is None:
        return "plain", words
    kind = {True: "good", False: "bad", None: "warn"}[certificate["passed"]]
    return kind, f"{words}. {certificate['verdict']}{what_passed(certificate, len(blocks) - done)}"


def what_passed(certificate: Mapping[str, Any], left: int) -> str:
    """What a verdict speaks of, where it is not of every block."""
    lossy = certificate.get("quantized") or certificate.get("products") or certificate.get("activations")
    if certificate["passed"] is not True or not certificate["blocks"] or lossy:
        return ""
    whole = " and the whole model" if certificate.get("end_to_end") else ""
    rest = f"; the other {left} run{'s' * (left == 1)} the original code" if left else ""
    return f": what was rewritten{whole}{rest}"


def distance(value: PyObject) -> str:
    """A relative distance in two figures; a dash where there is none."""
    return "–" if value is None else f"{float(value):.1e}"
