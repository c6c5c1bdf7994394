"""A hint names the function of the blocks its pattern matches, and of no others."""

import pytest

from moeopt.errors import UsageError
from moeopt.ir.specs import ExpertsSpec
from moeopt.recognise.hints import hint_for as assumed

SPEC = ExpertsSpec(rows="plain", activation="tanh")


def test_the_first_pattern_that_matches():
    relu = ExpertsSpec(rows="plain", activation="relu")
    hints = {"layers.*.moe": SPEC, "layers.*": relu}
    assert assumed(hints, "layers.3.moe") is SPEC and assumed(hints, "layers.3") is relu
    assert assumed(hints, "head") is None and assumed({}, "head") is None


def test_a_callable_is_asked_with_the_path():
    assert assumed({"*": lambda path: ExpertsSpec(rows="plain", activation=path)}, "gelu").activation == "gelu"


def test_a_hint_must_be_a_spec():
    with pytest.raises(UsageError, match=r"hints\['\*'\] gave 'silu' for layers.0; it must be an ExpertsSpec"):
        assumed({"*": "silu"}, "layers.0")
    with pytest.raises(UsageError, match="gave None for moe"):
        assumed({"*": lambda path: None}, "moe")
