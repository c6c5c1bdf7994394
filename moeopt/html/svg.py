"""Inline SVG, piece by piece; every text is escaped, every picture has a title that says what it shows."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

CHARACTER = 6.7
"""Width of a character of 12-pixel text, about."""


def picture(width: float, height: float, title: str, parts: Iterable[str], name: str = "") -> str:
    """An ``<svg>`` of this size that shrinks with its column; ``title`` is its text alternative."""
    label = escape(title, quote=True)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{label}" class="{escape(name, quote=True)}"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )


def tag(name: str, text: str | None = None, /, title: str = "", **attributes: object) -> str:
    """One element; ``_`` in attribute names is ``-``, and ``cls`` is ``class``; ``title`` is shown on hovering."""
    named = {"class" if k == "cls" else k.replace("_", "-"): v for k, v in attributes.items()}
    words = "".join(f' {k}="{_value(v)}"' for k, v in named.items())
    inner = (f"<title>{escape(title)}</title>" if title else "") + ("" if text is None else escape(text))
    return f"<{name}{words}>{inner}</{name}>" if inner else f"<{name}{words}/>"


def group(parts: Iterable[str], title: str = "") -> str:
    """Parts with one hovering text."""
    return f"<g>{f'<title>{escape(title)}</title>' if title else ''}{''.join(parts)}</g>"


def label(x: float, y: float, text: str, room: float = 1e9, anchor: str = "start", cls: str = "") -> str:
    """Text that is cut to ``room`` pixels; then the whole of it is its hovering text."""
    most = max(int(room / CHARACTER), 2)
    shown = text if len(text) <= most else text[: most - 1] + "…"
    return tag("text", shown, title="" if shown == text else text, x=x, y=y, text_anchor=anchor, cls=cls)


def _value(value: object) -> str:
    return escape(f"{value:g}" if isinstance(value, float) else str(value), quote=True)
