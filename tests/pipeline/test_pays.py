"""Row functions in PyTorch: taken where counted calls say so, and by an engine whatever they say."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.ops import measured
from moeopt.pipeline import pays
from tests.zoo.row_functions import D, DenseMixture, NormInside, Routed


def block(model, **options):
    torch.manual_seed(0)
    (found,) = [
        b for b in moeopt.optimize(model.eval(), torch.randn(2, 7, D), **options).report.blocks if b.kind == "moe"
    ]
    return found


def test_few_experts_are_left_alone_and_many_are_taken():
    few, many = block(Routed(NormInside, n=3)), block(Routed(NormInside, n=16))
    assert few.status == "declined"
    assert few.reason.startswith(
        "its experts are two matmuls with native_layer_norm, a function of a row that no grouped"
    )
    assert "would not pay here" in few.reason and "backend='onnxruntime' takes it" in few.reason
    assert few.experts == 3 or few.experts is None
    assert many.status == "rewritten" and many.experts == 16
    assert many.lowering == "moeopt::row_function (expert by expert, one op)"


def counted(calls, flops):
    """``fastest`` of a machine that makes so many small calls and so many multiply-adds in the same time."""

    def answer(question, ways, default, advantage):
        small, rows, k, m = (int(n) for n in question.replace(",", "").split() if n.isdigit())
        return "calls" if small / calls < rows * k * m / flops else "rows"

    return answer


def test_rows_that_are_thrown_away_count(monkeypatch):
    """All experts on all rows, of which the gate keeps one: what is saved grows with the size of the experts."""
    monkeypatch.setattr(pays, "fastest", counted(calls=1, flops=2e5))

    class KeepOne(DenseMixture):
        def forward(self, x):
            score = self.gate(x).softmax(-1)
            best, which = score.max(-1, keepdim=True)
            kept = torch.zeros_like(score).scatter(-1, which, best)
            return (torch.stack([net(x) for net in self.nets], 1) * kept.unsqueeze(-1)).sum(1)

    def deep(width):
        return lambda: nn.Sequential(
            nn.Linear(D, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, D)
        )

    torch.manual_seed(0)
    x = torch.randn(9, D)
    small, large = (moeopt.optimize(KeepOne(deep(w)).eval(), x).report.blocks[0] for w in (12, 512))
    assert (small.status, large.status) == ("declined", "rewritten"), (small.reason, large.reason)


def asked(monkeypatch):
    """The questions that were put to the machine, each answered with its default."""
    questions = []
    monkeypatch.setattr(
        pays, "fastest", lambda question, ways, default, advantage: questions.append(question) or default
    )
    return questions


@pytest.mark.parametrize(
    ("calls", "rows", "pays_off"),
    [(5, 0, True), (5, 9, True), (0, 9, True), (0, 0, False), (-1, -1, False), (-1, 0, False)],
)
def test_where_one_side_has_no_more_of_anything_the_counts_decide(monkeypatch, calls, rows, pays_off):
    questions = asked(monkeypatch)
    assert pays._quicker(calls, rows, 8, 64) is pays_off and questions == []


@pytest.mark.parametrize(("calls", "rows", "pays_off"), [(5, -100, True), (-5, 100, False)])
def test_else_the_machine_is_asked_and_without_an_answer_the_calls_decide(monkeypatch, calls, rows, pays_off):
    questions = asked(monkeypatch)
    assert pays._quicker(calls, rows, 8, 64) is pays_off
    assert questions == ["4 small calls, or 128 rows of 8 x 8"]


@pytest.mark.parametrize(("flops", "more_calls", "more_rows"), [(1e3, True, False), (1e9, False, True)])
def test_the_answer_of_the_machine_decides(monkeypatch, flops, more_calls, more_rows):
    monkeypatch.setattr(pays, "fastest", counted(calls=1, flops=flops))
    assert pays._quicker(-5, 100, 8, 64) is more_calls
    assert pays._quicker(5, -100, 8, 64) is more_rows


def test_the_question_is_measured_once_on_each_machine_and_not_where_that_is_off(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "_answers", {})
    made = []
    ways = pays._ways
    monkeypatch.setattr(pays, "_ways", lambda *sizes: made.append(sizes) or ways(*sizes))
    assert pays._quicker(-5, 100, 8, 64) is False and made == []  # MOEOPT_MEASURE is off in tests
    monkeypatch.setenv("MOEOPT_MEASURE", "on")
    first = pays._quicker(-2000, 1, 8, 8)
    assert first is False, "two thousand calls take longer than one row"
    assert pays._quicker(-2000, 1, 8, 8) is first and made == [(2048, 1, 1, 8)]


def test_large_products_are_timed_in_proportion(monkeypatch):
    questions = asked(monkeypatch)
    pays._quicker(2.0**20, -(2.0**18), 1024, 2**20)
    (question,) = questions
    small, rows, k, m = (int(n) for n in question.replace(",", "").split() if n.isdigit())
    assert rows * k * m <= 2 * pays.MOST and rows / small == 1 / 4


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))

    def forward(self, x):
        return self.inner(x) + 1


def test_a_number_that_experts_add_to_their_result_is_named():
    """Not what kept them from the grouped op alone: by the values, tokens that no expert serves."""
    few = block(Routed(Shifted, n=3), verify="fast")
    assert few.reason.startswith("its experts are two matmuls with a number added, a function of a row that no grouped")
