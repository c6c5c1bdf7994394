"""Example inputs in every form that users give, or made up where the model says what it takes."""

import types

import pytest
import torch
from torch import nn

from moeopt.errors import UsageError
from moeopt.find.example_inputs import as_call, made_up
from tests.capture.tiny import rand
from tests.recognise.tiny import H, MoE, seeded

X = rand(2, 3)


def test_every_form_of_call():
    assert as_call(X) == ((X,), {}) and as_call((X, 3)) == ((X, 3), {}) and as_call([X]) == ((X,), {})
    assert as_call({"x": X}) == ((), {"x": X})
    assert as_call(((X,), {"mask": None})) == ((X,), {"mask": None})
    assert as_call((X, {"mask": None})) == ((X, {"mask": None}), {})  # two positional arguments, one of them a dict
    with pytest.raises(
        UsageError, match="example_inputs is a str; give a tensor, a tuple of positional arguments, or a dict"
    ):
        as_call("hello")


def test_rows_of_the_one_width_that_runs():
    (x,), kwargs = made_up(seeded(MoE), 0)
    assert x.shape[-1] == H and kwargs == {} and torch.equal(x, made_up(seeded(MoE), 0)[0][0])
    assert made_up(seeded(MoE).double(), 0)[0][0].dtype == torch.float64


class TwoInputs(nn.Linear):
    def forward(self, x, y):
        return super().forward(x + y)


class AnyWidth(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(rand(4, 5))

    def forward(self, x):
        return x * 2


@pytest.mark.parametrize("model", [TwoInputs(3, 3), AnyWidth(), nn.ReLU()], ids=lambda m: type(m).__name__)
def test_what_cannot_be_inferred_must_be_given(model):
    with pytest.raises(
        UsageError, match=f"{type(model).__name__} was given without example_inputs, and what it takes could"
    ):
        made_up(model, 0)


class LanguageModel(nn.Module):
    main_input_name = "input_ids"

    def __init__(self, **config):
        super().__init__()
        self.config = types.SimpleNamespace(**config)
        self.table = nn.Embedding(7, 3)

    def forward(self, input_ids, use_cache=True):
        return self.table(input_ids)


def test_a_hugging_face_model_gets_token_ids():
    args, kwargs = made_up(LanguageModel(vocab_size=7, pad_token_id=6), 0)
    ids = kwargs["input_ids"]
    assert args == () and ids.shape == (2, 16) and ids.max() < 6 and kwargs["use_cache"] is False
    _, kwargs = made_up(LanguageModel(vocab_size=7, is_encoder_decoder=True), 0)
    assert torch.equal(kwargs["decoder_input_ids"], kwargs["input_ids"][:, :8])
    text = types.SimpleNamespace(vocab_size=5, pad_token_id=None)
    _, kwargs = made_up(LanguageModel(get_text_config=lambda: text), 0)
    assert kwargs["input_ids"].max() < 5


def test_without_a_vocabulary_inputs_must_be_given():
    with pytest.raises(UsageError, match="LanguageModel has no vocab_size in its config; pass example_inputs"):
        made_up(LanguageModel(hidden_size=3), 0)
