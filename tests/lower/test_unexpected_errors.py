"""What a library raises becomes one sentence with the line of the model; what is ours, or a full disk, stays."""

import pytest

from moeopt.errors import NotSaveableError, UsageError
from moeopt.lower.unexpected_errors import unexpected_errors_as

OUT = "use backend='torch'"


def raised(err):
    with pytest.raises(NotSaveableError) as caught, unexpected_errors_as("saving the model", OUT, NotSaveableError):
        raise err
    assert caught.value.__cause__ is err
    return str(caught.value)


def test_the_cause_and_the_line_are_named():
    err = KeyError("s77")
    assert raised(err).startswith("saving the model stops at KeyError: 's77' (")
    assert "test_unexpected_errors.py:" in raised(err) and raised(err).endswith(f"; {OUT}")


def test_the_first_line_of_what_came_first():
    root = ValueError("\nno such op\nmuch more")
    try:
        raise RuntimeError("while translating") from root
    except RuntimeError as err:
        told = raised(err)
    assert "stops at ValueError: no such op" in told and "much more" not in told and "translating" not in told


def test_the_op_and_the_models_line_in_an_exporters_text():
    text = (
        "bad\n\nWhile executing %add : [num_users=1] = call_function[target=torch.ops.aten.add.Tensor](args = ())\n"
        'Original traceback:\nFile "/home/me/model.py", line 7, in forward\n    return x + y'
    )
    assert "(torch.ops.aten.add.Tensor, " in raised(RuntimeError(text))


def test_a_text_without_words_names_the_class():
    assert "stops at AssertionError" in raised(AssertionError())


@pytest.mark.parametrize("err", [UsageError("ours"), OSError("disk full"), MemoryError(), KeyboardInterrupt()])
def test_others_pass(err):
    with pytest.raises(type(err)) as caught, unexpected_errors_as("saving", OUT, NotSaveableError):
        raise err
    assert caught.value is err
