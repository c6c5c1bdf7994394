"""A spec is a value: it checks its fields, travels as text and reads as words."""

import pytest

from moeopt.errors import UsageError
from moeopt.ir.specs import ACTIVATIONS, ExpertsSpec, RouterSpec


def test_a_spec_survives_its_text():
    for spec in (
        ExpertsSpec(),
        ExpertsSpec(rows="plain", activation="swish", alpha=1.702, weight_on="input", out_of_range="identity"),
        ExpertsSpec(rows="gate|up", gate_max=7.0, up_min=-7.0, up_max=7.0, up_offset=1.0, accum_dtype="float32"),
    ):
        assert ExpertsSpec.decode(spec.encode()) == spec and hash(ExpertsSpec.decode(spec.encode())) == hash(spec)
    assert ExpertsSpec().encode() == "{}"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rows": "sideways"}, "ExpertsSpec.rows is 'sideways'; it must be one of "),
        ({"activation": "cube"}, "ExpertsSpec.activation is 'cube'; it must be one of "),
        ({"weight_on": "both"}, "ExpertsSpec.weight_on is 'both'; it must be one of "),
        ({"act_dtype": "int8"}, "ExpertsSpec.act_dtype is 'int8'; it must be None or one of "),
        ({"activation": "swish"}, "ExpertsSpec.activation 'swish' needs alpha"),
        ({"activation": "elu"}, "ExpertsSpec.activation 'elu' needs alpha"),
    ],
)
def test_a_wrong_field_is_named(fields, text):
    with pytest.raises(UsageError) as caught:
        ExpertsSpec(**fields)
    assert text in str(caught.value)


def test_text_that_is_no_spec_is_refused():
    with pytest.raises(UsageError, match="not an ExpertsSpec: 'rows'"):
        ExpertsSpec.decode("rows")
    with pytest.raises(UsageError, match="ExpertsSpec has no field 'spin': written by a newer moeopt"):
        ExpertsSpec.decode('{"spin": 1}')


def test_a_spec_in_words():
    words = str(ExpertsSpec(rows="plain", activation="swish", alpha=1.702, gate_max=7.0, weight_on="input"))
    assert words.startswith("plain swish(1.702); W_in ") and "gate_max 7" in words and words.endswith("weight on input")
    gated = str(
        ExpertsSpec(rows="gate|up", activation="silu", up_offset=1.0, out_of_range="identity", accum_dtype="float32")
    )
    assert "silu GLU, rows gate|up" in gated and "up+1" in gated
    assert "identity beyond E" in gated and "accum in float32" in gated
    assert ExpertsSpec(rows="separate").gated and not ExpertsSpec(rows="plain").gated and "silu" in ACTIVATIONS


def test_a_router_in_words():
    assert str(RouterSpec("softmax_topk", 2, 8)) == "softmax, top-2 of 8"
    assert str(RouterSpec("topk_softmax", 1, 4, renormalize=True)) == "top-1, softmax of 4, renormalised"
