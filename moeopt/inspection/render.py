"""An inspection as a table of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moeopt.inspection.counting import CONVENTIONS, PARTS
from moeopt.inspection.roofline import PartTime

if TYPE_CHECKING:
    from moeopt.inspection.result import BlockKind, Inspection

WIDTH = 80
_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def amount(value: float, unit: str = "") -> str:
    """Four figures and a prefix: 14.3 GB, 989 TFLOP."""
    for size, prefix in _UNITS:
        if value >= size * 0.9995:
            return f"{_figures(value / size)} {prefix}{unit}"
    return f"{_figures(value)} {unit}".rstrip()


def _figures(value: float) -> str:
    digits = 0 if value >= 99.95 or abs(value - round(value)) < 5e-4 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}"


def billions(count: int | None) -> str:
    """Parameters: 46.703 B, or 1 234 567 plain where they are few."""
    if count is None:
        return "?"
    return f"{count / 1e9:.3f} B" if count >= 10_000_000 else f"{count:,}"


def table(inspection: Inspection) -> str:
    """The whole report."""
    sections = [
        _structure(inspection),
        _parameters(inspection),
        _memory(inspection),
        _work(inspection),
        _quantized(inspection),
        _notes(inspection),
    ]
    return "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines)


def _structure(inspection: Inspection) -> Iterator[str]:
    yield from _wrapped(f"{inspection.name} (from {_article(inspection.source)})", "")
    if not inspection.kinds:
        yield f"{_many(inspection.layers, 'layer')}, no mixture of experts found: a dense model"
        return
    yield f"{_many(inspection.layers, 'layer')}, {inspection.moe_layers} with experts"
    for kind in inspection.kinds:
        yield from _wrapped(_kind(kind, len(inspection.kinds) > 1), "  ")
        yield from _wrapped(f"router: {kind.router}", "  ")


def _kind(kind: BlockKind, count: bool) -> str:
    where = f"{_many(kind.blocks, 'block')} of " if count else ""
    chosen = "an unknown number of them" if kind.top_k is None else f"top-{kind.top_k}"
    shared = f", {_many(kind.shared, 'shared expert')}" if kind.shared else ""
    form = "gated" if kind.gated else "plain"
    return f"{where}{kind.experts} experts, {chosen}{shared}; each {kind.hidden} x {kind.inner}, {form}"


def _parameters(inspection: Inspection) -> Iterator[str]:
    counts = inspection.counts
    two = bool(inspection.kinds)
    yield f"{'parameters':<50}{'total':>14}" + (f"{'per token':>14}" if two else "")
    for part, total in counts.total.items():
        used = billions((counts.active or {}).get(part, 0)) if counts.active else "?"
        yield f"  {PARTS[part]:<48}{billions(total):>14}" + (f"{used:>14}" if two else "")
    for name, words in CONVENTIONS.items():
        whole = billions(counts.all) if name == "all" else ""
        used = billions(counts.by_convention()[name])
        label = "all" if name == "all" else words
        yield f"  {label:<48}" + (f"{whole:>14}{used:>14}" if two else f"{whole or used:>14}")


def _memory(inspection: Inspection) -> Iterator[str]:
    yield f"memory for the weights, on {inspection.device.name} ({amount(inspection.device.memory, 'B')})"
    for fit in inspection.memory:
        verdict = (
            f"fits, {amount(-fit.short_by, 'B')} free"
            if fit.fits
            else f"does not fit: {amount(fit.short_by, 'B')} short; {fit.devices} devices would hold it"
        )
        yield f"  {fit.bits:>2} bits {amount(fit.bytes, 'B'):>10}   {verdict}"
    also = "every expert must be resident, chosen or not; " if inspection.kinds else ""
    yield from _wrapped(f"{also}KV cache, activations and the scales of 8 and 4 bits come on top", "  ")


def _work(inspection: Inspection) -> Iterator[str]:
    device, prefill, decode = inspection.device, inspection.prefill, inspection.decode
    rates = f"{amount(device.bandwidth, 'B/s')}, {amount(device.flops, 'FLOP/s')}"
    on = f"{device.name} ({rates}{', measured' if device.measured else ''})"
    yield from _wrapped(f"work per token at {inspection.bits} bits, batch {inspection.batch}, on {on}", "")
    many, one = f"prefill, T={_short(prefill.tokens)}", f"decode, T={_short(decode.tokens)}"
    yield f"{'':<35}{many:>18}{one:>17}{'compute':>10}"
    yield f"{'':<26}{'FLOP':>9}{'bytes':>9}{'bound':>9}{'bytes':>8}{'bound':>9}{'from T ≥':>10}"
    for first, then in zip(prefill.parts, decode.parts, strict=True):
        yield _row(PARTS[first.name], first, then, prefill.tokens, decode.tokens)
    yield from _sums(inspection)
    if prefill.hit is not None and decode.hit is not None and (main := inspection.main):
        yield from _wrapped(
            f"distinct experts that a layer's tokens reach, if routing is uniform, E(1-(1-K/E)^T): "
            f"{prefill.hit:.1f} of {main.experts} at T = {prefill.tokens}, {decode.hit:.1f} at T = {decode.tokens}",
            "  ",
        )
    yield from _wrapped("weights, and rows in and out of each product; attention scores and KV cache not counted", "  ")


def _quantized(inspection: Inspection) -> Iterator[str]:
    found = inspection.quantized
    if found is None:
        return
    yield from _wrapped(f"with the experts in {found.format}, the rest at {inspection.bits} bits", "")
    each = f"{found.bits_per_weight:.2f} bits a weight"
    yield f"  experts     {amount(found.experts, 'B'):>10}   {each}, {amount(found.before, 'B')} before"
    verdict = (
        f"fits {inspection.device.name}, {amount(-found.memory.short_by, 'B')} free"
        if found.memory.fits
        else f"does not fit: {amount(found.memory.short_by, 'B')} short; {found.memory.devices} devices would hold it"
    )
    yield f"  whole model {amount(found.memory.bytes, 'B'):>10}   {verdict}"
    before, after = inspection.decode.seconds, found.decode.seconds
    if after and before:
        moved = sum(p.bytes for p in found.decode.parts)
        yield from _wrapped(
            f"a decoding step reads {amount(moved, 'B')}: at best {_time(after)}, "
            f"{found.decode.tokens / after:,.0f} tokens/s, {before / after:.2f} times what {inspection.bits} bits "
            "allow",
            "  ",
        )


def _short(tokens: int) -> str:
    return str(tokens) if tokens < 100_000 else amount(tokens)


def _row(name: str, many: PartTime, one: PartTime, prefill: int, decode: int) -> str:
    turns = "never" if many.turns_at is None else f"{many.turns_at}"
    return (
        f"  {name:<24}{amount(one.flops / decode):>9}{amount(many.bytes / prefill):>9}{_by(many):>9}"
        f"{amount(one.bytes / decode):>8}{_by(one):>9}{turns:>10}"
    )


def _sums(inspection: Inspection) -> Iterator[str]:
    prefill, decode = inspection.prefill, inspection.decode
    many, one = prefill.to_dict(), decode.to_dict()
    yield (f"  {'all':<24}{amount(one['flops']):>9}{amount(many['bytes']):>9}{'':>9}{amount(one['bytes']):>8}").rstrip()
    rate = decode.tokens / decode.seconds
    fits = next(f.fits for f in inspection.memory if f.bits == inspection.bits)
    yield from _wrapped(
        f"at best {_time(prefill.seconds)} for the prefill and {_time(decode.seconds)} for a decoding step, "
        f"{f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'} tokens/s"
        f"{'' if fits else ', were all weights in the memory of this device'}",
        "  ",
    )


def _by(part: PartTime) -> str:
    return "compute" if part.by == "compute" else "memory"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _notes(inspection: Inspection) -> Iterator[str]:
    if inspection.stored:
        dtypes = ", ".join(f"{amount(n)} {d}" for d, n in sorted(inspection.stored.elements.items()))
        files = _many(inspection.stored.files, "file")
        yield from _wrapped(f"stored: {amount(inspection.stored.bytes, 'B')} in {files}, elements: {dtypes}", "")
    for note in inspection.notes:
        yield from _wrapped(f"note: {note}", "")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=True,
        break_on_hyphens=False,
    )  # fmt: skip


def _many(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _article(source: str) -> str:
    return f"a {source}"
