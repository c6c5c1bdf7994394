"""What a lossy model lost: each figure against a computation by hand, and what does not count."""

import math

import pytest
import torch

from moeopt.verification.loss import LossFigures, is_language
from moeopt.verification.loss_text import judged, loss_lines, revived_loss


def call(ids, **more):
    return (), {"input_ids": ids, **more}


def out(logits):
    return {"logits": logits}


def measured(a, b, ids, **more):
    figures = LossFigures(True)
    figures.add(out(a), out(b), call(ids, **more))
    return figures


def logits(seed, rows=3, length=5, words=7):
    return torch.randn(rows, length, words, generator=torch.Generator().manual_seed(seed))


IDS = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(9))


def test_the_figures_are_those_of_their_definitions():
    a, b = logits(0), logits(1)
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1).flatten()
    found = measured(a, b, IDS).figures()
    assert found["kl_mean"] == pytest.approx(float(kl.mean()))
    assert found["kl_max"] == pytest.approx(float(kl.max()))
    assert found["kl_p99"] == pytest.approx(float(kl.quantile(0.99)))
    assert found["kl_p999"] == pytest.approx(float(kl.quantile(0.999)))
    assert found["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    target = IDS[:, 1:, None]
    nll = [-float(x[:, :-1].gather(-1, target).log().mean()) for x in (p, q)]
    assert found["perplexity_ratio"] == pytest.approx(math.exp(nll[1] - nll[0]))


def test_the_same_model_loses_nothing():
    found = measured(logits(0), logits(0), IDS).figures()
    assert found["kl_max"] == 0 and found["top1"] == 1 and found["perplexity_ratio"] == 1


def test_padding_does_not_count():
    a, b = logits(0), logits(1)
    mask = torch.ones_like(IDS)
    mask[1, 3:] = 0
    kept = measured(a, b, IDS, attention_mask=mask)
    assert kept.tokens == 13
    b[1, 3:] = 100 * torch.randn(2, 7)
    assert measured(a, b, IDS, attention_mask=mask).figures() == kept.figures()
    assert measured(a, b, IDS).figures() != kept.figures()


def test_positions_where_the_original_has_no_numbers_do_not_count_and_new_ones_do():
    a, b = logits(0), logits(0)
    a[0, 2] = b[0, 2] = math.nan
    assert measured(a, b, IDS).tokens == 14 and measured(a, b, IDS).figures()["kl_max"] == 0
    b[1, 1] = math.nan
    assert math.isnan(measured(a, b, IDS).figures()["kl_mean"])


def test_a_masked_word_is_no_loss_and_a_lost_word_is_infinite():
    a, b = logits(0), logits(0)
    a[..., 3] = b[..., 3] = -math.inf
    assert measured(a, b, IDS).figures()["kl_max"] == 0
    b[..., 2] = -math.inf
    assert measured(a, b, IDS).figures()["kl_mean"] == math.inf


def test_several_calls_are_one_sample():
    a, b = logits(0), logits(1)
    parts = LossFigures(True)
    for rows in (slice(0, 1), slice(1, 3)):
        parts.add(out(a[rows]), out(b[rows]), call(IDS[rows]))
    assert parts.figures() == measured(a, b, IDS).figures()


def test_standard_errors_are_over_sequences_and_repeat():
    figures = LossFigures(True)
    for seed in range(40):
        figures.add(out(logits(seed, 1)), out(logits(seed + 100, 1)), call(IDS[:1]))
    errors = figures.standard_errors(0)
    means = torch.stack([d.mean() for d in figures.distances])
    assert errors["kl_mean"] == pytest.approx(float(means.std() / math.sqrt(40)), rel=0.2)  # 200 draws: 5 %
    assert "kl_max" not in errors and errors == figures.standard_errors(0)


def test_one_sequence_has_errors_over_its_tokens_and_none_of_the_perplexity():
    errors = measured(logits(0, 1, 50), logits(1, 1, 50), torch.zeros(1, 50, dtype=torch.int64)).standard_errors(0)
    assert errors["kl_mean"] > 0 and "perplexity_ratio" not in errors


def test_other_models_have_relative_distances():
    assert not is_language(torch.randn(3, 4), ((torch.randn(3, 4),), {}))
    figures = LossFigures(False)
    a = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[4] *= 1.5
    figures.add(a, b, ((a,), {}))
    found = figures.figures()
    assert found["error_max"] == pytest.approx(0.5) and found["error_mean"] == pytest.approx(0.05)
    assert set(found) == {"error_mean", "error_p99", "error_p999", "error_max"} and figures.tokens == 10


BLOCKS = [
    {"name": f"layer.{i}", "format": "int4", "bytes": 1, "float_bytes": 8, "figures": {"kl_mean": i / 100}}
    for i in range(5)
]


def test_a_missed_limit_names_the_blocks_that_cost_most():
    loss = {"kl_mean": 0.02, "top1": 0.9, "tokens": 3, "data": "the example inputs", "blocks": BLOCKS}
    assert judged(loss, {"kl_mean": 0.02, "top1": 0.9}) == []
    (told,) = judged(loss, {"kl_mean": 0.01})
    assert told.startswith("kl_mean is 0.02, and limit allows at most 0.01; the blocks that cost most: layer.4 (int4")
    assert "layer.2" in told and "layer.1" not in told
    (told,) = judged(loss, {"top1": 0.95})
    assert told.startswith("top1 is 0.9, and limit allows at least 0.95")
    text = "\n".join(loss_lines({"layer.0": "int4"}, loss))
    assert text.index("layer.4") < text.index("layer.0: int4")


def test_a_figure_that_is_no_number_keeps_no_limit():
    assert judged({"kl_mean": math.nan}, {"kl_mean": 5.0}) and judged({}, {"kl_mean": 5.0})


def test_json_words_become_numbers_again():
    body = {"kl_mean": "inf", "top1": "nan", "reference": {"kl_max": "-inf"}, "data": "nan"}
    found = revived_loss(body)
    assert found["kl_mean"] == math.inf and math.isnan(found["top1"]) and found["reference"]["kl_max"] == -math.inf
    assert found["data"] == "nan"


def test_data_in_which_no_token_counts_measures_nothing_and_says_so():
    a, b = logits(0), logits(1)
    hidden = measured(a, b, IDS, attention_mask=torch.zeros_like(IDS))
    assert hidden.tokens == 0 and hidden.figures() == {} and hidden.standard_errors(0) == {}
    loss = {"tokens": 0, "data": "1 call of data=", "blocks": [{**BLOCKS[0], "figures": {}}]}
    (told,) = judged(loss, {"kl_mean": 5.0})
    assert told.startswith("kl_mean was not measured: no token of 1 call of data= counts") and "give data=" in told
    text = "\n".join(loss_lines({"layer.0": "int4"}, loss))
    assert "not measured: no token of 1 call of data= counts" in text and "nan" not in text
    one = torch.ones_like(IDS)
    one[1] = 0
    errors = measured(a, b, IDS, attention_mask=one).standard_errors(0)
    assert errors and all(math.isfinite(e) for e in errors.values())


def test_empty_rows_of_another_model():
    empty = LossFigures(False)
    empty.add(torch.zeros(0, 4), torch.zeros(0, 4), ((), {}))
    assert empty.figures() == {} and empty.standard_errors(0) == {}
