"""The native operator for tests: a compiler is needed, and the choice is the native one without a clock."""

import pytest

from moeopt.backends.onnxrt import custom_op, native_choice
from moeopt.ops.native import build

pytest.importorskip("onnxruntime")


def needs_operator():
    """Skip where no compiler is; a library that is wrong is no reason to skip."""
    if build.find_compiler() is None:
        pytest.skip(f"the native operator: {build.how_to_get_one()}")
    assert custom_op.why_not() == ""


def choose_native(monkeypatch):
    """Blocks get the native lowering wherever it fits, as if it had been measured to be the faster."""
    monkeypatch.setattr(native_choice, "measuring", lambda: True)
    monkeypatch.setattr(native_choice, "fastest", lambda *args, **kwargs: "native")
