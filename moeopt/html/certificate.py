"""A certificate's figures as the page shows them: one row a block, its cases under it, two pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeopt.html import errors
from moeopt.value_types import PyObject


def certificate_view(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """What the template needs: the certificate, ``rows`` with their worst figures, and the pictures.

    A block's budget is factor x (original's distance) + allowance x eps at its worst case; a token whose sum cancels
    may be judged by more (``rerounded``), so the verdict is the certificate's, never the picture's.
    """
    rows = [_row(block, certificate) for block in certificate["blocks"]]
    checked = [r for r in rows if r["cases"]]
    cases = [c for r in rows for c in r["cases"] if c["status"] != "skipped"]
    return {
        **certificate,
        **loss_view(certificate),
        "rows": rows,
        "distances": errors.distances(checked) if checked else "",
        "spread": errors.spread(
            [float(c["distance_original"]) for c in cases], [float(c["distance_rewritten"]) for c in cases]
        ),
    }


def loss_view(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """``figures`` and ``costs`` of a certificate's loss: words and numbers as text; empty where nothing was lost."""
    loss = certificate.get("loss") or {}
    parts = ("standard_errors", "nearest", "reference", "limit")
    errors, nearest, reference, limit = (loss.get(part, {}) for part in parts)
    figures = [
        {
            "words": words,
            "value": _number(loss[key]),
            "error": _number(errors.get(key)),
            "nearest": _number(nearest.get(key)),
            "reference": _number(reference.get(key)),
            "limit": _number(limit.get(key)),
            "missed": key in certificate["limits_missed"],
        }
        for key, words in certificate.get("figures", {}).items()
        if key in loss
    ]
    blocks = sorted(loss.get("blocks", ()), key=lambda b: -float(next(iter(b["figures"].values()), 0.0)))
    costs = [
        {
            **{key: b[key] for key in ("name", "format", "bytes", "float_bytes")},
            "alone": _number(next(iter(b["figures"].values()), None)),
            "ids": f"{b['ids_differ']} of {b['ids_compared']}" if b["ids_compared"] else "–",
        }
        for b in blocks
    ]
    return {"figures": figures, "costs": costs}


def _number(value: PyObject) -> str:
    """Four figures; a dash where there is none."""
    return "–" if value is None else f"{float(value):.4g}"


def _row(block: Mapping[str, Any], certificate: Mapping[str, Any]) -> dict[str, Any]:
    import torch  # the command shows its help without it

    cases = block["cases"]
    eps = torch.finfo(getattr(torch, block["dtype"])).eps if block["dtype"] else 0.0

    def worst(name: str) -> float:
        return max((float(c[name]) for c in cases), default=0.0)

    exact = [float(c["distance_exact"]) for c in cases if c["distance_exact"] is not None]
    budget = certificate["factor"] * worst("distance_original") + certificate["eps_allowance"] * eps
    return {
        **block,
        "verdict": {True: "passed", False: "FAILED", None: "not run"}[block["passed"]],
        "original": worst("distance_original"),
        "rewritten": worst("distance_rewritten"),
        "exact": max(exact, default=None),
        "budget": budget,
        "required": worst("required"),
        **{name: sum(c[name] for c in cases) for name in ("ids_compared", "ties", "flips", "tokens", "rerounded")},
    }
