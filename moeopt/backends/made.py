"""What backends give back: a model that was optimised, a bundle that was opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from moeopt.report import Report
from moeopt.value_types import PyObject
from moeopt.verification.certificate import Certificate


@dataclass
class Made:
    """What a backend makes of a model.

    Attributes:
        model: what is called: the rewritten model, or an engine.
        report, certificate: as in :class:`moeopt.Optimized`.
        source: the original's fingerprint, for a bundle's manifest.
        built: the backend's own record of an engine; None where ``model`` is the user's own module.
    """

    model: PyObject
    report: Report
    certificate: Certificate
    source: dict[str, str] | None = None
    built: PyObject = None


@dataclass
class Opened:
    """A bundle that was opened to be verified.

    Attributes:
        engine: what runs here.
        executed: whether that is the engine that was built, and not a replay of it.
        device: the certificate's ``device``.
        notes: sentences for the certificate.
    """

    engine: PyObject
    executed: bool
    device: str
    notes: Sequence[str] = ()


def bytes_of(model: PyObject) -> int:
    """About how large a bundle of ``model`` is: its weights, or the files of its engine."""
    if isinstance(model, nn.Module):
        weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
        return sum(weights.values())
    folder = getattr(model, "directory", None)
    if folder is None:
        return 0
    return sum(f.stat().st_size for f in Path(folder).glob("*") if f.is_file())
