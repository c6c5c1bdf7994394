"""Limits on what quantising may lose, as words of a command: ``--limit kl_mean=0.01 --limit top1=0.97``."""

from __future__ import annotations

from collections.abc import Iterable

from moeopt.errors import UsageError
from moeopt.value_types import PyObject


def as_limits(words: Iterable[str]) -> dict[str, float]:
    """The limits by figure; ``moeopt.Options`` checks the figures.

    Raises:
        UsageError: a word is not ``figure=number``, or names a figure again.
    """
    found: dict[str, float] = {}
    for word in words:
        key, equals, number = (part.strip() for part in word.partition("="))
        try:
            value = float(number)
        except ValueError:
            equals = ""
        if not equals or not key:
            raise UsageError(f"--limit {word}: it must be a figure and a number, like --limit kl_mean=0.01")
        if key in found:
            raise UsageError(f"--limit {key} is given twice: give it once")
        found[key] = value
    return found


def missed_words(certificate: PyObject) -> str:
    """What of a certificate's limits was missed, for the command's last line; "" where nothing was."""
    missed = getattr(certificate, "loss", {}).get("missed", ())
    return "a limit was missed: " + "; ".join(sentence.partition(";")[0] for sentence in missed) if missed else ""
