"""Dispatch that asks the routing weights: a row whose weight is zero is left out, whatever its expert would give."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.capture.tape import record
from moeopt.recognise.any_experts import recognize
from moeopt.recognise.ids_of_masks import ids_not_zero, ids_positive
from tests.toy_moe import Block, E, H, build

DISPATCHES = {
    "ids": lambda table, ids, e: torch.where((ids == e).any(-1))[0],
    "nonzero": lambda table, ids, e: table[:, e].nonzero().squeeze(-1),
    "ne": lambda table, ids, e: torch.where(table[:, e] != 0)[0],
    "gt": lambda table, ids, e: torch.where(table.t()[e] > 0)[0],
    "bool": lambda table, ids, e: table.bool()[:, e].nonzero()[:, 0],
}
ONE_HOT = {
    "slots": lambda one_hot, w, e: ((one_hot * w[..., None]).sum(1)[:, e] > 0).nonzero()[:, 0],
    "ne": lambda one_hot, w, e: ((one_hot * w[..., None]).sum(1)[:, e] != 0).nonzero()[:, 0],
}


class Asks(Block):
    """Sigmoid scores, the best two, in a table of all experts; ``dispatch`` says which rows an expert gets."""

    def __init__(self, how):
        super().__init__()
        self.dispatch, self.gate = DISPATCHES[how], nn.Linear(H, E)

    def forward(self, x):
        scores = torch.sigmoid(self.gate(x))
        weights, ids = torch.topk(scores, 2, -1)
        table = torch.zeros_like(scores).scatter(-1, ids, weights)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = self.dispatch(table, ids, e)
            y.index_add_(0, rows, expert(x[rows]) * table[rows, e, None])
        return y


def made(how, dtype=torch.float32):
    torch.manual_seed(0)
    source = Asks(how)
    with torch.no_grad():
        source.gate.bias.zero_()
    return source.to(dtype).eval(), torch.randn(12, H).to(dtype)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("backend", "dtype", "large"),
    [("torch", torch.float16, 3e3), ("torch", torch.float32, 1e21), ("onnxruntime", torch.float32, 1e21)],
)
@pytest.mark.parametrize("how", DISPATCHES)
def test_a_weight_that_underflowed_meets_an_expert_that_overflows(how, backend, dtype, large):
    source, x = made(how, dtype)
    opt = moeopt.optimize(source, x, backend=backend, verify="fast")
    assert opt.report.rewritten and opt.certificate.passed
    away = torch.linalg.pinv(source.gate.weight.detach().float()) @ -torch.ones(E)  # every score is that of -1
    x[3] = away.to(dtype) * large
    with torch.no_grad():
        assert (torch.sigmoid(source.gate(x[3])) == 0).all() and not source.experts[0](x[3]).isfinite().all()
        want, got = source(x), opt(x)
    assert torch.equal(want.isnan(), got.isnan())
    assert (got[3] == 0).all() if how != "ids" else got[3].isnan().any()


@pytest.mark.parametrize(
    ("how", "leaves_out"),
    [("ids", None), ("nonzero", ids_not_zero), ("ne", ids_not_zero), ("gt", ids_positive), ("bool", ids_not_zero)],
)
def test_what_the_dispatch_asks(how, leaves_out):
    source, x = made(how)
    (found,) = recognize(record(source, (x,)))
    assert found.routing.leave_out is leaves_out


def test_a_mask_that_only_counts_picks_no_rows():
    class Counts(Asks):
        def forward(self, x):
            weights, ids = torch.topk(torch.sigmoid(self.gate(x)), 2, -1)
            self.used = (weights > 0).float().mean()
            return self.loop(x, ids, weights)

    torch.manual_seed(0)
    source = Counts("ids").eval()
    (found,) = recognize(record(source, (torch.randn(12, H),)))
    assert found.routing.leave_out is None


def test_ids_by_weights():
    ids, weights = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[0.5, 0.0], [float("nan"), -1.0]])
    assert ids_not_zero(ids, weights, 4).tolist() == [[0, 4], [1, 3]]
    assert ids_positive(ids, weights, 4).tolist() == [[0, 4], [4, 4]]


class Compares(Block):
    """The best two, weights that add up to 1 or lie in (-1, 1); ``keep`` says which of the two the dispatch takes."""

    def __init__(self, keep, signed=False):
        super().__init__()
        self.keep, self.signed = keep, signed

    def forward(self, x):
        scores = self.gate(x)
        shown = (torch.tanh(scores + 1.5) if self.signed else scores.softmax(-1)) * (x[:, :1] < 99)
        weights, ids = torch.topk(shown, 2, -1)
        weights = weights if self.signed else weights / weights.sum(-1, keepdim=True)
        keep, y = self.keep(self, weights), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where((ids == e) & keep)
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y


def compares(keep, signed=False):
    torch.manual_seed(1)
    source, x = Compares(keep, signed).eval(), torch.randn(12, H)
    return source, x, moeopt.optimize(source, x, verify="fast")


@pytest.mark.parametrize(
    ("keep", "signed", "by"),
    [
        (lambda self, w: ~(w < 0.02), False, "lt"),
        (lambda self, w: ~(w <= w.new_tensor([0.02])), False, "le"),
        (lambda self, w: (w > 0) | (torch.arange(2) == 0), True, "gt"),
    ],
)
def test_a_threshold_that_no_probe_reaches_is_not_left_out(keep, signed, by):
    source, x, opt = compares(keep, signed)
    (block,) = opt.report.blocks
    assert block.status == "declined", block
    assert f"a comparison of the routing weights ({by}) beside the expert ids" in block.reason
    assert "set the weights of the rows that are left out to 0" in block.reason
    assert torch.equal(opt(x * 30), source(x * 30))


def count_positive(self, weights):
    self.used = (weights > 0).nonzero()
    self.mean = weights[weights > 0].mean()
    return torch.ones_like(weights, dtype=torch.bool)


def test_a_mask_that_finds_rows_for_a_count_picks_no_rows_of_experts():
    source, x, opt = compares(count_positive, signed=True)
    assert opt.report.rewritten, opt.report
    for scale in (1, 30):
        torch.testing.assert_close(opt(x * scale), source(x * scale), rtol=1e-4, atol=1e-5)


class SumsAsked(Asks):
    """Scores of both signs, and experts that run only where the weights of their tokens do not add up to zero."""

    def __init__(self, score):
        super().__init__("ids")
        self.score = score

    def forward(self, x):
        weights, ids = torch.topk(self.score(self.gate(x)), 2, -1)
        hit = torch.zeros(E).scatter_add(0, ids.flatten(), weights.flatten())
        y = torch.zeros_like(x)
        for e in (hit != 0).nonzero().flatten().tolist():
            token, slot = torch.where(ids == e)
            y.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return y


@pytest.mark.parametrize(("score", "status"), [(torch.tanh, "declined"), (torch.sigmoid, "rewritten")])
def test_weights_of_both_signs_can_add_up_to_zero(score, status):
    torch.manual_seed(0)
    (block,) = moeopt.explain(SumsAsked(score).eval(), torch.randn(12, H), verify="fast").blocks
    assert block.status == status
    said = "which experts run depends on whether a sum of routing weights is zero (ne), and weights of both signs can"
    assert block.reason.startswith(said) == (status == "declined")


class AsksOneHot(Block):
    """Rows are picked where the sum of a token's one-hot weights is not zero, or above zero."""

    def __init__(self, how):
        super().__init__()
        self.dispatch = ONE_HOT[how]

    def loop(self, x, ids, w):
        one_hot = torch.nn.functional.one_hot(ids, E).to(x.dtype)
        table, y = (one_hot * w[..., None]).sum(1), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = self.dispatch(one_hot, w, e)
            y.index_add_(0, rows, expert(x[rows]) * table[rows, e, None])
        return y


@pytest.mark.parametrize("how", ONE_HOT)
def test_a_sum_of_one_hot_weights_is_asked_as_the_weights_are(how):
    source = build(AsksOneHot, how=how)
    opt = moeopt.optimize(source, torch.randn(12, H))
    assert opt.report.rewritten and opt.certificate.passed, str(opt.report)
    x = torch.randn(7, H)
    x[2] = torch.nan
    with torch.no_grad():
        y, want = opt(x), source(x)
    assert want[2].isnan().all() == (how == "ne")
    torch.testing.assert_close(y, want, equal_nan=True)


class AsksTwice(Block):
    """An expert runs where some weight is above zero, and then for rows whose weight is not zero: NaN is one, and
    runs no expert by itself."""

    def loop(self, x, ids, w):
        table, y = torch.zeros(len(x), E).scatter_(1, ids, w), torch.zeros_like(x)
        for e in (table > 0).any(0).nonzero().flatten().tolist():
            rows = (table[:, e] != 0).nonzero().flatten()
            y.index_add_(0, rows, self.experts[e](x[rows]) * table[rows, e, None])
        return y


def test_experts_that_run_by_another_question_than_their_rows_are_picked_by():
    block = moeopt.explain(build(AsksTwice), torch.randn(12, H)).blocks[0]
    assert block.status == "declined" and "case 'a nan row alone'" in block.reason
    assert "the token itself is not finite, and the original's code leaves it out" in block.reason
    assert "torch.nan_to_num" in block.reason
