"""Small tables for notebooks: plain HTML that takes the notebook's own style."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from moeopt.html.certificate import loss_view
from moeopt.html.numbers import ratio
from moeopt.sizes import in_three_figures
from moeopt.value_types import PyObject

SHOWN = 40
"""Rows that a notebook shows; the text and the JSON have all."""


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table; everything is escaped."""
    all_rows = list(rows)
    shown = [f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in all_rows[:SHOWN]]
    if len(all_rows) > SHOWN:
        shown.append(f'<tr><td colspan="{len(heads)}">and {len(all_rows) - SHOWN} more: print it to see all</td></tr>')
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(shown)}</tbody>"
    return f"<table><caption>{escape(caption)}</caption>{body}</table>"


def report_table(report: Mapping[str, Any]) -> str:
    """``Report.to_dict()``: one row a block."""
    rows = [
        (b["name"], b["kind"], b["status"], b["experts"] or "", b["reason"] or b["lowering"], _distance(b["error"]))
        for b in report["blocks"]
    ]
    done = sum(b["status"] == "rewritten" for b in report["blocks"])
    caption = f"moeopt: {report['model'] or 'model'}, {done} of {len(rows)} blocks rewritten"
    return table(caption, ("block", "kind", "status", "experts", "runs as, or why not", "error"), rows)


def certificate_table(blocks: Iterable[Any], verdict: str) -> str:
    """The blocks of a certificate: their verdicts and worst figures."""
    words = {True: "passed", False: "FAILED", None: "not run"}
    rows = [
        (b.name, words[b.passed], _distance(b.distance_original), _distance(b.distance_rewritten), f"{b.required:.2g}",
         b.ids_compared, b.ties, b.flips, b.reason)
        for b in blocks
    ]  # fmt: skip
    heads = ("block", "verdict", "original", "rewritten", "factor", "ids", "ties", "flips", "reason")
    return table(f"moeopt certificate: {verdict}", heads, rows)


def loss_table(certificate: Mapping[str, Any]) -> str:
    """``Certificate.to_dict()`` of quantised experts: one row a figure."""
    rows = [
        (f["words"], f["value"] + (" (limit missed)" if f["missed"] else ""),
         *(f[part] for part in ("error", "nearest", "reference", "limit")))
        for f in loss_view(certificate)["figures"]
    ]  # fmt: skip
    heads = ("figure", "value", "standard error", "to nearest", "int8 per channel", "limit")
    return table("what quantising lost", heads, rows)


def load_table(profile: Mapping[str, Any]) -> str:
    """``LoadProfile.to_dict()``: one row a layer, and one for each block that could not be read."""
    rows: list[tuple[object, ...]] = []
    for x in profile["layers"]:
        at, cost = x["imbalance"], x["cost"]
        figures = (
            (f"{at['max_over_mean']:.2f}", f"{at['cv']:.2f}", f"{at['entropy']:.3f}", len(at["dead"]), len(at["hot"]))
            if at
            else ("", "", "", "", "")
        )
        rows.append((x["name"], x["experts"], x["tokens"], *figures, ratio(cost) if cost else ""))
    rows += [(u["name"], "", f"not profiled: {u['reason']}", *[""] * 6) for u in profile["unread"]]
    heads = ("block", "experts", "tokens", "max/mean", "cv", "entropy", "dead", "hot", "cost")
    return table(f"moeopt profile: {profile['model']}, {profile['batches']} batches", heads, rows)


def inspection_table(found: Mapping[str, Any]) -> str:
    """``Inspection.to_dict()``: structure, parameters, memory."""
    params, memory = found["params"], found["memory"]
    rows: list[tuple[object, object]] = [
        ("layers", f"{found['layers']}, {found['moe_layers']} with experts"),
        ("experts", f"{found['experts']}, top-{found['top_k'] if found['top_k'] is not None else '?'}"),
        ("router", found["router"] or "none"),
        ("parameters", f"{params['total']:,}"),
    ]
    rows += [
        (f"active, {name.replace('_', ' ')}", "?" if n is None else f"{n:,}") for name, n in params["active"].items()
    ]
    rows += [(f"weights at {bits} bits", in_three_figures(fit["bytes"])) for bits, fit in memory["bits"].items()]
    return table(f"moeopt inspect: {found['model']}", ("", ""), rows)


def _distance(value: PyObject) -> str:
    return "" if value is None else f"{float(value):.1e}"
