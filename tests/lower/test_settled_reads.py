"""Engines of code that asks whether any row is left, or whether its values are sound."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.errors import NotSaveableError
from moeopt.lower.settled_reads import settled_reads

D = 8


class Depths(nn.Module):
    """Mixture of depths: a mask picks the rows that pass the block; ``ask`` is what differs below."""

    def __init__(self):
        super().__init__()
        self.router, self.block = nn.Linear(D, 1), nn.Sequential(nn.Linear(D, 12), nn.GELU(), nn.Linear(12, D))

    def ask(self, mask):
        return mask.any()

    def passed(self, x, mask, score):
        y = x.clone()
        y[mask] = x[mask] + self.block(x[mask]) * score[mask].sigmoid()[:, None]
        return y

    def forward(self, x):
        score = self.router(x).squeeze(-1)
        mask = score > 0
        return self.passed(x, mask, score) if self.ask(mask) else x


class Counts(Depths):
    def ask(self, mask):
        return mask.sum() > 0


class AtLeastOne(Depths):
    def ask(self, mask):
        return torch.count_nonzero(mask) >= 1


class LeavesEarly(Depths):
    def forward(self, x):
        score = self.router(x).squeeze(-1)
        mask = score > 0
        if not mask.any():
            return x.clone()
        return self.passed(x, mask, score)


class Nested(Depths):
    """A second mask inside the branch of the first."""

    def passed(self, x, mask, score):
        y = super().passed(x, mask, score)
        high = mask & (score > 0.5)
        if high.any():
            y[high] = F.normalize(y[high], dim=-1)
        return y


def build(cls):
    torch.manual_seed(0)
    return cls().eval()


def rows_left(model, x, left):
    """``x`` with rows that the router picks, or none of them."""
    with torch.no_grad():
        sign = 1 if left else -1
        return x + (sign * 5 - model.router(x)) * model.router.weight / model.router.weight.square().sum()


@pytest.mark.sample(2)
@pytest.mark.parametrize("cls", [Depths, Counts, AtLeastOne, LeavesEarly, Nested])
def test_an_engine_passes_the_rows_that_are_left_and_none_where_there_are_none(cls):
    model, x = build(cls), torch.randn(2, 6, D)
    engine = moeopt.optimize(model, x, backend="onnxruntime")
    for call in (x, torch.randn(1, 9, D), rows_left(model, x, False), rows_left(model, x, True)):
        with torch.no_grad():
            torch.testing.assert_close(engine(call), model(call), rtol=1e-5, atol=1e-5)
    assert torch.equal(engine(rows_left(model, x, False)), rows_left(model, x, False))


def test_an_example_without_rows_shows_what_is_asked_too():
    model, x = build(Depths), torch.randn(2, 6, D)
    engine = moeopt.optimize(model, rows_left(model, x, False), backend="onnxruntime")
    with torch.no_grad():
        torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)


class Doubles(Depths):
    """Where a row is left, the others change too."""

    def passed(self, x, mask, score):
        return 2 * super().passed(x, mask, score)


class Limits(Depths):
    """The same, which only large values show."""

    def passed(self, x, mask, score):
        return super().passed(x.clamp(-50, 50), mask, score)


class MostOf(Depths):
    """Of no rows there is no largest one."""

    def passed(self, x, mask, score):
        return x / x[mask].abs().amax()


class Rounds(Depths):
    """As often as a row is left."""

    def forward(self, x):
        mask = self.router(x).squeeze(-1) > 0
        while True:
            if not mask.any():
                return x
            x = torch.where(mask[..., None], x / 2 - 0.1, x)
            mask = mask & (x.abs().amax(-1) > 0.3)


class Both(Depths):
    """Whether all rows are left is another question."""

    def ask(self, mask):
        return mask.all()


class LimitsOfAll(Depths):
    """The same within limits that these inputs do not reach, though the weights let others do."""

    def passed(self, x, mask, score):
        limited = F.layer_norm(x, (D,)).clamp(-4, 4)
        return super().passed(torch.where(limited.abs() < 4, x, limited), mask, score)


class DeadZone(Depths):
    def passed(self, x, mask, score):
        return super().passed(torch.where(x.abs() < 1e-7, torch.zeros_like(x), x), mask, score)


class OtherMask(Depths):
    """The rows that are written are not those that are asked for."""

    def passed(self, x, mask, score):
        return super().passed(x, score < -100, score)


class PartOfMask(Depths):
    """Whether the first rows are left is asked, and all are written."""

    def forward(self, x):
        mask = x[..., 0] > 100
        return super().passed(x, mask, x[..., 1]) if mask[:, 0].any() else x


@pytest.mark.parametrize("cls", [Doubles, Limits, MostOf, Rounds, Both, LimitsOfAll, DeadZone, OtherMask, PartOfMask])
def test_a_branch_that_does_more_is_refused(cls):
    model, x = build(cls), torch.randn(2, 6, D)
    assert settled_reads(model, (x,), {}) == {}
    with pytest.raises(NotSaveableError, match="depends on the values of tensors"):
        moeopt.optimize(model, x, backend="onnxruntime")


class Ids(Depths):
    """Integers are given, and one of the vectors that they name is larger than those of the example."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, D)
        with torch.no_grad():
            self.table.weight[19] = 300

    def forward(self, ids):
        x = self.table(ids)
        mask = ids == 3
        if mask.any():
            x = self.passed(x.clamp(-50, 50), mask, x[..., 0])
        return x


class PadIsBlank(Ids):
    """The same mask made twice: either is of no rows where the other is."""

    def forward(self, ids):
        x = self.table(ids)
        if (ids == 0).any():
            x = x.masked_fill((ids == 0)[..., None], 0.0)
        return x


class PadAfterStart(Ids):
    """Two masks, neither of which has a row of the example."""

    def forward(self, ids):
        x = self.table(ids)
        if (ids == 1).any():
            x = x.masked_fill((ids == 0)[..., None], 0.0)
        return x


@pytest.mark.parametrize("cls", [Ids, PadAfterStart])
def test_a_branch_on_integers_that_does_more_is_refused(cls):
    model, ids = build(cls), torch.randint(4, 18, (2, 6))
    assert settled_reads(model, (ids,), {}) == {}
    with pytest.raises(NotSaveableError, match="depends on the values of tensors"):
        moeopt.optimize(model, ids, backend="onnxruntime")


ROWS_GIVEN = []


@torch.library.custom_op("moeopt_tests::kernel_of_others", mutates_args=())
def kernel_of_others(x: torch.Tensor) -> torch.Tensor:
    ROWS_GIVEN.append(len(x))
    return x * 2


class OtherKernel(Depths):
    def passed(self, x, mask, score):
        y = x.clone()
        y[mask] = kernel_of_others(x[mask])
        return y


def test_a_kernel_of_another_library_is_never_run_without_rows():
    model, x = build(OtherKernel), torch.randn(2, 6, D)
    with torch.no_grad():
        model(x)
    assert settled_reads(model, (x,), {}) == {}
    assert len(set(ROWS_GIVEN)) == 1 and ROWS_GIVEN[0] > 0


@pytest.mark.parametrize("least", [0, 4])
def test_a_mask_made_twice_is_one(least):
    model, ids = build(PadIsBlank), torch.randint(least, 18, (2, 40))
    engine = moeopt.optimize(model, ids, backend="onnxruntime")
    for call in (ids, torch.tensor([[0, 5, 0]]), torch.tensor([[7, 5, 1]])):
        with torch.no_grad():
            torch.testing.assert_close(engine(call), model(call), rtol=1e-5, atol=1e-5)


class Writes(Depths):
    """A buffer that the branch writes shows that it ran."""

    def __init__(self):
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def passed(self, x, mask, score):
        self.runs += 1
        return super().passed(x, mask, score)


def test_what_the_branch_writes_counts_too():
    model, x = build(Writes), torch.randn(2, 6, D)
    assert settled_reads(model, (x,), {}) == {}
    assert model.runs == 0


class Checks(Depths):
    def forward(self, x):
        assert x.isfinite().all(), "not finite"
        y = super().forward(x)
        if torch.isnan(y).any():
            raise ValueError("NaN")
        return y


def test_assertions_are_left_out_of_an_engine():
    model, x = build(Checks), torch.randn(2, 6, D)
    engine = moeopt.optimize(model, x, backend="onnxruntime")
    with torch.no_grad():
        torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError, match="not finite"):
        model(x / 0)


def test_a_graph_module_keeps_its_questions():
    """Its weights stay alive, and its Python is asked at each call."""
    model, x = build(Depths), torch.randn(2, 6, D)
    with pytest.warns(UserWarning, match="holds Depths as one call"):
        program, _ = moeopt.passes.run(model, (x,))
    for call in (x, rows_left(model, x, False)):
        with torch.no_grad():
            torch.testing.assert_close(program(call), model(call))


class Asks(nn.Module):
    """A mixture in a model that asks; tied rows are among the cases of its verification."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 12), nn.GELU(), nn.Linear(12, D)) for _ in range(4))

    def forward(self, x):
        rows = x.reshape(-1, D)
        weights, ids = self.gate(rows).softmax(-1).topk(2)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            y.index_add_(0, row, expert(rows[row]) * weights[row, slot, None])
        return y.view_as(x)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = Asks()

    def forward(self, x):
        if torch.isnan(x).any():
            raise ValueError("NaN")
        return self.moe(x)


def test_the_runs_that_settle_a_question_are_no_calls_of_the_export():
    model, x = build(Outer), torch.randn(2, 9, D)
    engine = moeopt.optimize(model, x, backend="onnxruntime")
    assert [b.status for b in engine.report.blocks] == ["rewritten"]
    with torch.no_grad():
        torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)
