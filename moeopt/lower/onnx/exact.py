"""onnxscript's simplifications, held to those that keep every number.

Its rules match constants to 1e-5 and 1e-8: ``x + 1e-9`` and ``x * 0.999995`` become ``x``, and the epsilon that keeps a
row of zeros from being divided by zero is gone. While :func:`exact_rules` is open

    a constant of a rule is equal to the graph's in the graph's own dtype, or the rule does not match
    ``x + 0``      is ``x`` only for a float 0 of the sign that keeps the sign of a zero x; ``x - 0`` alike
    left out       Clip(Clip(x)), Clip(Relu(x)), Min(Max(x)) as one Clip: clamp(0, 1) then clamp(2, 3) is 2 and not 1,
                   and a Clip with one bound takes infinity for the largest number; Cast(Cast(x)), which rounds once
                   instead of twice; batch norms and paddings multiplied into a convolution, which round anew

Folding evaluates nodes of constants alone with NumPy, in the node's dtype, which is the same arithmetic; other rules
move data and look at no value.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from moeopt.patches import InForce, Patch, Undo, replace
from moeopt.value_types import OnnxNode, OnnxValue

_CHANGING = ("_min_max_to_clip", "_fuse_relus_clips", "_fuse_pad_into_conv", "_fuse_batchnorm")
"""Modules of default rules after which a number may differ."""
_ROUNDING = ("CastCast",)
"""Default rules of other modules after which a number may differ."""


@contextlib.contextmanager
def exact_rules() -> Iterator[bool]:
    """While open, onnxscript's optimiser and its fusions change no constant; gives whether that could be had.

    False where onnxscript is built otherwise than version 0.7: nothing of it may then be run.
    """
    try:
        _changing_rules()
    except (ImportError, AttributeError):
        yield False
        return
    with _exact():
        yield True


def _changing_rules() -> list[Any]:
    """onnxscript's default rules after which a number may differ."""
    from onnxscript import rewriter
    from onnxscript.rewriter._matcher import SimplePatternMatcher
    from onnxscript.rewriter.ort_fusions import sdpa

    assert SimplePatternMatcher._match_constant and sdpa.math  # what _install leans on
    changing = [rule for name in _CHANGING for rule in getattr(rewriter, name).rules]
    return [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule in changing or rule.name in _ROUNDING]


def _install() -> Undo:
    from onnxscript import rewriter
    from onnxscript.rewriter._matcher import SimplePatternMatcher
    from onnxscript.rewriter.ort_fusions import sdpa

    changing = _changing_rules()

    def match_constant(match: OnnxValue, in_force: InForce) -> OnnxValue:
        def exactly(self: OnnxValue, pattern: OnnxValue, value: OnnxValue) -> bool:
            if not match(self, pattern, value):
                return False
            same: bool = not in_force.yes or _equal(pattern.value, value.const_value.numpy(), self._current_node)
            return same or self.fail(f"{value.name} is close to {pattern.value} and not equal")

        return exactly

    steps = [
        replace(SimplePatternMatcher, "_match_constant", match_constant),
        replace(rewriter, "_DEFAULT_REWRITE_RULES", lambda rules, _: tuple(r for r in rules if r not in changing)),
        replace(sdpa, "math", lambda math, _: types.SimpleNamespace(**{**vars(math), "isclose": _isclose})),
    ]

    def undo() -> None:
        for step in steps:
            step()

    return undo


def _isclose(a: OnnxValue, b: OnnxValue, **tolerances: float) -> bool:
    return bool(a == b)


_exact = Patch(_install)


def _equal(wanted: OnnxValue, found: np.ndarray, node: OnnxNode) -> bool:
    """Whether ``found`` is ``wanted`` rounded to its dtype; a zero of a float Add or Sub must add nothing, too."""
    same = bool(np.all(found == np.asarray(wanted).astype(found.dtype)))
    if wanted == 0 and node is not None and found.dtype.kind not in "iub":
        negative = bool(np.signbit(found.astype(np.float64)))
        return same and negative == (node.op_type == "Add")  # -0 + 0 is 0, and -0 + -0, -0 - 0 are -0
    return same
