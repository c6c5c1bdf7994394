"""What happened to each block, and why: one entry per call site, printable, and JSON both ways."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moeopt.errors import UsageError
from moeopt.obstacles import Obstacle
from moeopt.value_types import PyObject

if TYPE_CHECKING:
    from rich.text import Text

    from moeopt.passes.base import PassRecord

WIDTH = 80
SCHEMA = 1
KEY = (
    "W_in, W_out: an expert's first and second weight, oi: stored (outputs, inputs), io: (inputs, outputs); compute: "
    "dtype of its matmuls; accum: dtype in which a token's experts are summed"
)
"""What the words of a block's ``spec`` mean."""
KINDS = ("moe", "dense_ffn")
STATUSES = ("rewritten", "declined")


@dataclass(frozen=True)
class BlockReport:
    """One feed-forward or MoE block at one call site.

    Args:
        name: module path, or path and call for a module that is called more than once.
        kind: ``moe`` or ``dense_ffn``; a shared expert is a ``dense_ffn`` of its own.
        status: ``rewritten`` or ``declined``.
        reason: why it was declined, a sentence for the model's owner; "" when rewritten.
        experts: how many routed experts there are, shared ones not counted; None when unknown.
        router: the router in words ("softmax, top-2 of 8, renormalised"); "" for a dense FFN.
        lowering: what the backend runs for it; "" when declined.
        error: the worst token's relative L2 distance from the float64 oracle; None when not verified.
        source: the user's file and line.
        nearest: for a declined block, the next thing found that stands in the way once ``reason`` does not; or "".
        seconds: time spent on it.
        top_k: experts chosen per token; None when unknown or not fixed.
        spec: the experts' function in words.
        router_spec: a recognised router's ``RouterSpec`` as JSON; "" where it stays an opaque graph.
        obstacles: whatever else was met while a declined block was looked for, at each level of modules around it.
    """

    name: str
    kind: Literal["moe", "dense_ffn"]
    status: Literal["rewritten", "declined"]
    reason: str = ""
    experts: int | None = None
    router: str = ""
    lowering: str = ""
    error: float | None = None
    source: str = ""
    nearest: str = ""
    seconds: float = 0.0
    top_k: int | None = None
    spec: str = ""
    router_spec: str = ""
    obstacles: tuple[Obstacle, ...] = ()

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("status", STATUSES)):
            if getattr(self, name) not in choices:
                raise UsageError(f"block {self.name!r}: {name} is {getattr(self, name)!r}, not {' or '.join(choices)}")
        if self.status == "declined" and not self.reason.strip():
            raise UsageError(f"block {self.name!r} is declined without a reason: say what stands in the way")
        if self.status == "rewritten" and self.reason:
            raise UsageError(f"block {self.name!r} is rewritten and has a reason to decline: {self.reason!r}")

    def facts(self) -> Iterator[tuple[str, str]]:
        """The labelled lines under the block's name, empty ones left out."""
        found = [
            ("why", self.reason),
            ("nearest", self.nearest),
            ("router", self.router),
            ("experts", self.spec),
            ("runs as", self.lowering),
            ("error", "" if self.error is None else f"{self.error:.1e} from the float64 oracle, worst token"),
            ("source", self.source),
        ]
        return ((label, text) for label, text in found if text)

    def summary(self) -> str:
        """The block in four words: "MoE, 8 experts, top-2" or "dense FFN"."""
        if self.kind == "dense_ffn":
            return "dense FFN"
        words = ["MoE"]
        if self.experts is not None:
            words.append(f"{self.experts} expert{'s' if self.experts != 1 else ''}")
        if self.top_k is not None:
            words.append(f"top-{self.top_k}")
        return ", ".join(words)


@dataclass(frozen=True)
class Report:
    """Every block of one model in execution order; ``print`` it, or take ``to_json()``.

    Args:
        blocks: one ``BlockReport`` per call site.
        model: the model's name in words, usually its class.
        backend: torch, onnxruntime or tensorrt; "" for a dry run.
        seconds: time the whole run took.
        notes: what the reader should know besides, a sentence each.
        graph: one rewritten block before and after, in names and counts (``moeopt.pipeline.diagram``).
        certificate: that of the same run, for :meth:`to_html`; it has a JSON of its own and is not in this one.
        passes: what each pass did to each block, in order; see :class:`moeopt.passes.base.PassRecord`.
        print_passes: whether the text lists them, or the names of the passes that it lists.
    """

    blocks: tuple[BlockReport, ...] = ()
    model: str = ""
    backend: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = field(default=())
    graph: dict[str, Any] | None = None
    certificate: PyObject = field(default=None, repr=False, compare=False)
    passes: tuple[PassRecord, ...] = ()
    print_passes: bool | tuple[str, ...] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "passes", tuple(self.passes))
        object.__setattr__(self, "notes", tuple(self.notes))
        if not isinstance(self.print_passes, bool):
            object.__setattr__(self, "print_passes", tuple(self.print_passes))

    @property
    def rewritten(self) -> tuple[BlockReport, ...]:
        return tuple(b for b in self.blocks if b.status == "rewritten")

    @property
    def declined(self) -> tuple[BlockReport, ...]:
        return tuple(b for b in self.blocks if b.status == "declined")

    def __str__(self) -> str:
        return "\n".join(line for line, _ in self._lines())

    def __rich__(self) -> Text:
        from rich.text import Text

        text = Text("\n").join(Text(line, style=style) for line, style in self._lines())
        text.no_wrap = False
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only; a non-finite error is written as text."""
        out = {"schema": SCHEMA, **dataclasses.asdict(dataclasses.replace(self, certificate=None, passes=()))}
        del out["certificate"]
        out["passes"] = [record.to_dict() for record in self.passes]
        for block, own in zip(out["blocks"], self.blocks, strict=True):
            block["obstacles"] = [o.to_dict() for o in own.obstacles]
            if block["error"] is not None and not math.isfinite(block["error"]):
                block["error"] = str(block["error"])
        out["blocks"], out["notes"] = list(out["blocks"]), list(out["notes"])
        return out

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        profile: PyObject = None,
        inspection: PyObject = None,
        timings: Mapping[str, float] | None = None,
    ) -> Path:
        """Write one self-contained HTML file: this report, its certificate, and what else is given.

        Args:
            profile: a :class:`moeopt.LoadProfile`: adds the heat map and what imbalance costs.
            inspection: a :class:`moeopt.Inspection`: adds the memory for the weights.
            timings: seconds of one call by name, like ``{"original": 0.1, "moeopt": 0.05}``, as you measured them.

        Returns:
            the file.

        Raises:
            UsageError: jinja2 is not installed; the folder does not exist.
        """
        from moeopt.html import write_page

        alike = [
            (name, block.summary(), block) for part in (self.rewritten, self.declined) for name, block in _alike(part)
        ]
        return write_page(
            path,
            report=self.to_dict(),
            groups=[(name, summary, dataclasses.asdict(block)) for name, summary, block in alike],
            certificate=None if self.certificate is None else self.certificate.to_dict(),
            profile=None if profile is None else profile.to_dict(),
            inspection=None if inspection is None else inspection.to_dict(),
            timings=timings,
            key=KEY,
        )

    def _repr_html_(self) -> str:
        from moeopt.html import report_table

        return report_table(self.to_dict())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`; ``UsageError`` for anything that it did not write."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            schema = data.get("schema") if isinstance(data, dict) else None
            raise UsageError(f"not a report of schema {SCHEMA} (found {schema!r}): written by another moeopt?")
        try:
            fields = {k: v for k, v in data.items() if k not in ("schema", "blocks", "passes")}
            blocks = [_block(b) for b in data["blocks"]]
            passes = _records(data.get("passes", ()))
            return cls(blocks=tuple(blocks), passes=passes, **fields)
        except (TypeError, KeyError, ValueError, AttributeError) as err:
            raise UsageError(f"not a report: {err}") from err

    @classmethod
    def from_json(cls, text: str) -> Report:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as err:
            raise UsageError(f"not a report: {err}") from err
        return cls.from_dict(data)

    def _lines(self) -> Iterator[tuple[str, str]]:
        """The report as (line, style): at most WIDTH columns; a longer word is broken."""
        title = " on ".join(word for word in (self.model or "model", self.backend) if word)
        yield from _wrap(f"moeopt: {title}", "", "bold")
        count = f"{len(self.blocks)} block{'s' if len(self.blocks) != 1 else ''} found"
        took = f" ({self.seconds:.1f} s)" if self.seconds else ""
        yield f"{count}: {len(self.rewritten)} rewritten, {len(self.declined)} declined{took}", ""
        for status, style, blocks in (("rewritten", "green", self.rewritten), ("declined", "yellow", self.declined)):
            if not blocks:
                continue
            yield "", ""
            yield status, f"bold {style}"
            for name, block in _alike(blocks):
                yield from _wrap(f"{name}: {block.summary()}", "  ", style)
                for label, text in block.facts():
                    yield from _wrap(text, "    ", "", label=f"{label:8}")
        if any(block.spec for block in self.rewritten):
            yield "", ""
            yield from _wrap(KEY, "", "dim", label="key: ")
        if listed := [record for record in self.passes if record.printed(self.print_passes)]:
            yield "", ""
            yield "passes", "bold"
            for record in listed:
                yield from _wrap(str(record), "  ", "" if record.fired else "dim")
        if self.notes:
            yield "", ""
        for note in self.notes:
            yield from _wrap(note, "", "dim", label="note: ")


def _records(data: Iterable[Mapping[str, Any]]) -> tuple[PassRecord, ...]:
    from moeopt.passes.base import PassRecord  # brings torch, which a report on its own does not need

    return tuple(PassRecord(**record) for record in data)


def _block(data: Mapping[str, Any]) -> BlockReport:
    obstacles = tuple(Obstacle.from_dict(o) for o in data.get("obstacles", ()))
    return BlockReport(**{**data, "error": _number(data.get("error")), "obstacles": obstacles})


def _number(value: PyObject) -> float | None:
    return None if value is None else float(value)


def _wrap(text: str, indent: str, style: str, label: str = "") -> Iterator[tuple[str, str]]:
    first, rest = indent + label, indent + " " * (len(label) or 2)
    lines = textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return ((line, style) for line in lines)


def _alike(blocks: tuple[BlockReport, ...]) -> Iterator[tuple[str, BlockReport]]:
    """Blocks that differ only in the numbers of their name, folded into one line with the worst error."""
    groups: dict[tuple[Any, ...], list[BlockReport]] = {}
    for block in blocks:
        shape = dataclasses.replace(block, name=re.sub(r"\d+", "#", block.name), error=None, seconds=0.0, obstacles=())
        groups.setdefault(dataclasses.astuple(shape), []).append(block)
    for group in groups.values():
        first, last = group[0], group[-1]
        errors = [b.error for b in group if b.error is not None]
        worst = max(errors, key=lambda e: (math.isnan(e), e)) if errors else None
        name = first.name if len(group) == 1 else f"{first.name} ... {last.name} ({len(group)} alike)"
        yield name, dataclasses.replace(first, error=worst)
