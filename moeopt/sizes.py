"""Bytes in words, for messages and pages: each place chooses how many figures its reader needs."""


def in_words(size: float) -> str:
    """Like ``1.25 GB``, ``3.20 MB`` or ``18.4 kB``."""
    if size >= 1e8:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def in_megabytes(size: float) -> str:
    """Like ``1.25 GB`` or ``3.2 MB``; ``0 MB`` of nothing, so that sizes side by side are of one unit."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def in_three_figures(size: float) -> str:
    """Like ``14.3 GB`` or ``512 B``."""
    unit, word = next(((u, w) for u, w in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u), (1.0, "B"))
    return f"{size / unit:.3g} {word}"
