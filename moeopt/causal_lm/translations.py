"""transformers' ONNX exporter with the translations that every other export here has.

It gives torch's exporter a table of its own, for ops whose usual form is wrong for its models; for others it would
take torch's. Where both have an op, transformers' form stays: its models are written for it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from moeopt.errors import Declined
from moeopt.lower.onnx.translate import table
from moeopt.patches import Patch, replace
from moeopt.value_types import PyObject

_NAME = "_ONNX_TRANSLATION_TABLE"


@contextlib.contextmanager
def own_translations(exporter: PyObject) -> Iterator[None]:
    """While open, ``transformers.exporters.exporter_onnx`` translates with :func:`moeopt.lower.onnx.translate.table`.

    Raises:
        Declined: it has no such table.
    """
    if not isinstance(vars(exporter).get(_NAME), dict):
        raise Declined(
            "this version of transformers builds its ONNX graphs otherwise, with forms that were not checked here; for "
            "an engine with a cache: pip install 'transformers==5.23.*'"
        )
    with _patch_of(exporter)():
        yield


@functools.cache
def _patch_of(exporter: PyObject) -> Patch:
    return Patch(lambda: replace(exporter, _NAME, lambda theirs, _: table() | theirs))
