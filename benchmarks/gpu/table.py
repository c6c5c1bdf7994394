"""The tables of ``docs/performance.md`` from one ``gpu-day.json``: Markdown, whatever steps it has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Result = dict[str, Any]
NOT_TIMES = {"step", "name", "ok", "T", "experts hit", "floor of bytes", "floor of FLOPs"}


def rendered(results: list[Result]) -> str:
    """Every step's table, each behind a heading, and the failures."""
    by_step = {step: [r for r in results if r["step"] == step and r["name"] != "the step"] for step in STEPS}
    parts = [f"### {TITLES[step]}\n\n" + "\n".join(STEPS[step](rows)) for step, rows in by_step.items() if rows]
    failed = [r for r in results if not r.get("ok", True)]
    if failed:
        parts.append("### Failed\n\n" + "\n".join(f"- {r['step']}, {r['name']}: {_reason(r)}" for r in failed))
    return "\n\n".join(parts) + "\n"


def _reason(result: Result) -> str:
    said = str(result.get("error") or result.get("reason") or result.get("rc") or "no reason was given").strip()
    return said.splitlines()[-1]


def _rows(header: list[str], rows: list[list[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield "| " + " | ".join(_said(cell) for cell in row) + " |"


def _said(cell: Any) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell).replace("|", "\\|")


def _machine(rows: list[Result]) -> Iterator[str]:
    for r in rows:
        told = {k: v for k, v in r.items() if k not in ("step", "name", "ok", "text")}
        if told:
            yield f"- {r['name']}: " + ", ".join(f"{k} {_said(v)}" for k, v in told.items())


def _facts(rows: list[Result]) -> Iterator[str]:
    columns = ["us", "graph us", "kernels", "waits"]
    yield from _rows(["path", *columns], [[r["name"], *(r.get(c) for c in columns)] for r in rows if r["ok"]])


def _right(rows: list[Result]) -> Iterator[str]:
    off = [r.get("compiled is off by", r.get("off by")) for r in rows]
    yield from _rows(
        ["what", "right", "off by", "tokens equal"],
        [[r["name"], "yes" if r["ok"] else "no", o, r.get("tokens equal")] for r, o in zip(rows, off, strict=True)],
    )


def _layer(rows: list[Result]) -> Iterator[str]:
    rows = [r for r in rows if "T" in r]
    ways = list(dict.fromkeys(way for r in rows for way in r if way not in NOT_TIMES))
    yield "Microseconds, in brackets in a CUDA graph; the floor: the longer of bytes and FLOPs at this machine's rates."
    yield ""
    yield from _rows(
        ["block", "T", "floor", *ways],
        [[r["name"], r["T"], max(r["floor of bytes"], r["floor of FLOPs"]), *(_time(r.get(w)) for w in ways)]
         for r in rows],
    )  # fmt: skip


def _time(cell: Any) -> Any:
    if not isinstance(cell, dict):
        return cell
    graph = cell["graph us"]
    return f"{cell['us']:.4g} ({graph:.4g})" if isinstance(graph, float) else cell["us"]


def _model(rows: list[Result]) -> Iterator[str]:
    columns = ["prompt us", "one token us", "16 tokens us", "optimise s", "peak bytes"]
    yield from _rows(["way", *columns], [[r["name"], *(r.get(c) for c in columns)] for r in rows if r["ok"]])


def _runtime(rows: list[Result]) -> Iterator[str]:
    for r in rows:
        said = str(r.get("skipped") or (r.get("text") or _reason(r)).strip().splitlines()[-1])
        yield f"- {r['name']}: {said}"


STEPS = {
    "machine": _machine, "facts": _facts, "right": _right, "layer": _layer, "model": _model, "runtime": _runtime,
}  # fmt: skip
TITLES = {
    "machine": "The machine", "facts": "Waits, CUDA graphs and kernels of each path", "right": "What is right",
    "layer": "One layer's experts", "model": "A language model", "runtime": "ONNX Runtime",
}  # fmt: skip
