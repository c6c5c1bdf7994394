"""``--quantize-products`` says one thing of one pattern, or it is refused before a model is loaded."""

import pytest

from moeopt.cli.quantize_words import as_quantize
from moeopt.errors import UsageError
from tests.test_cli import run


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["int8", "int4"], "--quantize-products is given twice for all products, int8 and int4: give it once"),
        (["*=int8", "int4"], "given twice for all products, int8 and int4"),
        (["lm_head=int8", "int4", "lm_head=int4"], "given twice for lm_head, int8 and int4: give it once"),
        (["lm_head="], "--quantize-products lm_head=: it must be a format, or a pattern of names and a format"),
        (["=int8"], "--quantize-products =int8: it must be a format"),
        ([""], "--quantize-products : it must be a format"),
        (["int4,lm_head=int8"], "like --quantize-products lm_head=int8; give the option again for another one"),
    ],
)
def test_words_that_say_two_things_or_none(words, text, capsys):
    with pytest.raises(UsageError) as told:
        as_quantize(None, words, None)
    assert text in str(told.value)
    options = [option for word in words for option in ("--quantize-products", word)]
    code, out, err = run(capsys, "optimize", "nowhere.py:build", "--backend", "onnxruntime", *options)
    assert code == 2 and not out and "Traceback" not in err


def test_words_that_go_together():
    assert as_quantize("int8", [], None) == "int8" and as_quantize(None, [], None) is None
    plan = as_quantize("int4", ["int4", " lm_head = int8 "], None)
    assert dict(plan.products) == {"lm_head": "int8", "*": "int4"}  # the first pattern that matches decides
    assert plan.product_format_of("lm_head") == "int8" and plan.product_format_of("model.q") == "int4"
