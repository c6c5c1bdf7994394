"""onnxscript's ``opset20``, imported when the first node is written: reading a translation needs no onnxscript."""

from __future__ import annotations

from collections.abc import Callable

from moeopt.value_types import OnnxValue


class _Opset:
    def __getattr__(self, name: str) -> Callable[..., OnnxValue]:
        from onnxscript import opset20

        form: Callable[..., OnnxValue] = getattr(opset20, name)
        return form


OPSET = _Opset()
