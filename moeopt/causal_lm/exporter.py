"""transformers' ONNX exporter, in each version that has one, with what exports here need of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from moeopt.errors import Declined
from moeopt.lower.onnx.complex import through_real_views
from moeopt.lower.onnx.composites import composites_written_out
from moeopt.lower.onnx.float64 import attributes_written_out
from moeopt.lower.onnx.scalars import numbers_as_read
from moeopt.lower.onnx.written_values import writes_as_results
from moeopt.lower.stamps import Stamps
from moeopt.patches import untraced_contiguity
from moeopt.value_types import PyObject


def onnx_exporter() -> PyObject:
    """The module of transformers' ONNX exporter.

    Raises:
        Declined: this version of transformers has none.
    """
    try:
        from transformers.exporters import exporter_onnx
    except ImportError as err:
        raise Declined(
            "this version of transformers has no ONNX exporter; for an engine with a cache: "
            "pip install 'transformers>=5.15'"
        ) from err
    return exporter_onnx


def with_real_views(exporter: PyObject) -> PyObject:
    """transformers' ONNX exporter, with complex numbers (Llama 4's rotary) in the form that it can translate."""
    from transformers.exporters.exporter_dynamo import DynamoExporter

    def ready(program: PyObject) -> PyObject:
        program = attributes_written_out(numbers_as_read(through_real_views(program)))
        return composites_written_out(writes_as_results(program))

    class Traced(DynamoExporter):  # type: ignore[misc]
        """Its ``super()`` has the first method since transformers 5.23, the second before."""

        stamps: Stamps | None = None

        def export_program(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
            with _tracing(self.stamps):
                self.program, metadata = super().export_program(*args, **kwargs)
            return ready(self.program), metadata

        def export(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
            with _tracing(self.stamps):
                self.program = super().export(*args, **kwargs)
            return ready(self.program)

    class Exporter(exporter.OnnxExporter, Traced):  # type: ignore[misc]
        """Its own ``super()`` is the class above."""

        if not hasattr(exporter.OnnxExporter, "export_program"):

            def export_program(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
                return super().export(*args, **kwargs).model, None

    return Exporter


@contextlib.contextmanager
def _tracing(stamps: Stamps | None) -> Iterator[None]:
    """What holds while transformers' exporter traces a model."""
    stamping = contextlib.nullcontext() if stamps is None else stamps.during()
    with _own_dtypes(), untraced_contiguity(), stamping:
        yield


@contextlib.contextmanager
def _own_dtypes() -> Iterator[None]:
    """The sample as it is: the exporter casts every tensor to the model's dtype, and a model may keep states wider."""
    from transformers.exporters import utils

    theirs = utils.cast_leaf_tensors
    utils.cast_leaf_tensors = lambda sample, dtype, device: sample
    try:
        yield
    finally:
        utils.cast_leaf_tensors = theirs
