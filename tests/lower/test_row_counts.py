"""Engines of code that passes experts over that no row chose, as told by a size; of blocks that are declined too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.errors import NotSaveableError
from moeopt.lower.settled_reads import settled_reads

D = 8
LEFT = "depends on the values of tensors"


class Attend(nn.Module):
    """Rows of an expert read one another, so that its block stays as it is."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


class Sequences(nn.Module):
    """One of three experts for each sequence; ``none`` is what differs below."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, 3), nn.ModuleList(Attend() for _ in range(3))

    def none(self, rows, mask, x):
        return rows.numel() == 0

    def forward(self, x):
        weights, ids = self.gate(x.mean(1)).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = ids == number
            rows = torch.where(mask)[0]
            if self.none(rows, mask, x):
                continue
            y[rows] = expert(x[rows]) * weights[rows, None, None]
        return y


class Length(Sequences):
    def none(self, rows, mask, x):
        found = False
        if len(rows) > 0:
            found = True
        return not found


class ATruth(Sequences):
    def none(self, rows, mask, x):
        return not rows.shape[0]


class Stored(Sequences):
    def none(self, rows, mask, x):
        count = rows.size(0)
        return count < 1


class NotAny(Sequences):
    """The rows are picked before it is asked."""

    def none(self, rows, mask, x):
        return not mask.any()


class Item(Sequences):
    def none(self, rows, mask, x):
        return mask.sum().item() == 0


class Picked(Sequences):
    def none(self, rows, mask, x):
        return not x[mask].numel() > 0


class OneHot(Sequences):
    """As in Mixtral: a mask of all experts, of which one is asked after the other."""

    def forward(self, x):
        weights, ids = self.gate(x.mean(1)).softmax(-1).topk(2)
        every, y = F.one_hot(ids, 3).permute(2, 1, 0), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            slot, rows = torch.where(every[number])
            if rows.shape[0] == 0:
                continue
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None, None])
        return y


def build(cls):
    torch.manual_seed(0)
    return cls().eval()


@pytest.mark.sample(4)
@pytest.mark.parametrize("cls", [Sequences, Length, ATruth, Stored, NotAny, Item, Picked, OneHot])
def test_a_declined_block_that_passes_idle_experts_over_has_an_engine(cls):
    model, x = build(cls), torch.randn(5, 4, D)
    engine = moeopt.optimize(model, x, backend="onnxruntime", verify="fast")
    assert [b.status for b in engine.report.blocks if b.kind == "moe"] == ["declined"]
    for call in (x, torch.randn(1, 6, D), torch.randn(2, 3, D), torch.randn(1, 1, D).expand(4, 5, D).clone()):
        with torch.no_grad():  # one sequence, and equal ones, leave experts idle
            torch.testing.assert_close(engine(call), model(call), rtol=1e-5, atol=1e-5)


class ManyRows(Sequences):
    """One row is another question than none."""

    def none(self, rows, mask, x):
        return rows.numel() <= 1


class TwoRows(Sequences):
    def none(self, rows, mask, x):
        return len(rows) < 2


class Halves(Sequences):
    """With a row that chose it, the others change too."""

    def forward(self, x):
        rows = torch.where(self.gate(x.mean(1)).argmax(-1) == 1)[0]
        if len(rows) > 0:
            x = x / 2
        return super().forward(x)


class OtherRows(Sequences):
    """The rows that are written are not those that are asked for."""

    def forward(self, x):
        score = self.gate(x.mean(1))
        asked, rows = torch.where(score[:, 0] > 9)[0], torch.where(score[:, 1] > 0)[0]
        y = torch.zeros_like(x)
        if asked.numel():
            y[rows] = self.experts[0](x[rows])
        return y


class Loop(Sequences):
    """What an idle expert does to those behind it shows only where these have rows."""

    def idle(self, mask):
        return torch.where(mask)[0].numel() == 0

    def forward(self, x):
        weights, ids = self.gate(x.mean(1)).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y = self.step(y, x, weights, ids == number, expert)
        return y

    def add(self, y, x, weights, mask, expert):
        rows = torch.where(mask)[0]
        return y.index_add(0, rows, expert(x[rows]) * weights[rows, None, None])

    def step(self, y, x, weights, mask, expert):
        return y * 2 if self.idle(mask) else self.add(y, x, weights, mask, expert)


class Stops(Loop):
    def forward(self, x):
        self.stopped = False
        return super().forward(x)

    def step(self, y, x, weights, mask, expert):
        if self.idle(mask):
            self.stopped = True
        return y if self.stopped else self.add(y, x, weights, mask, expert)


class StopsAsAMaskSays(Stops):
    def idle(self, mask):
        return not mask.any()


class LeavesTheNextOut(Stops):
    def step(self, y, x, weights, mask, expert):
        if self.stopped:
            self.stopped = False
            return y
        if self.idle(mask):
            self.stopped = True
            return y
        return self.add(y, x, weights, mask, expert)


IN_A_LOOP = [Loop, Stops, StopsAsAMaskSays, LeavesTheNextOut]


@pytest.mark.parametrize("cls", IN_A_LOOP)
@pytest.mark.parametrize("seed", range(4))
def test_what_an_idle_expert_does_to_others_is_seen(cls, seed):
    x = torch.randn(5, 4, D, generator=torch.Generator().manual_seed(seed))
    assert settled_reads(build(cls), (x,), {}) == {}


class Forever(BaseException):
    """Of a loop that does not end."""


class UntilNoneIsLeft(Sequences):
    """One helper picks the rows of experts, and those for which a loop waits, twice in each round."""

    def rows(self, mask):
        return torch.where(mask)[0]

    def forward(self, x):
        ids, y, rounds = self.gate(x.mean(1)).argmax(-1), torch.zeros_like(x), 0
        for number, expert in enumerate(self.experts):
            rows = self.rows(ids == number)
            if len(rows) > 0:
                y[rows] = expert(x[rows])
        left = ids < 3
        while True:
            if self.rows(left).numel() == 0:
                return y
            y = y + len(self.rows(left))
            left, rounds = left & (ids > rounds), rounds + 1
            if rounds > 20_000:
                raise Forever


def test_a_loop_that_waits_for_an_empty_mask_is_not_followed_for_ever():
    assert settled_reads(build(UntilNoneIsLeft), (torch.randn(5, 4, D),), {}) == {}


@pytest.mark.parametrize("cls", [ManyRows, TwoRows, Halves, OtherRows, *IN_A_LOOP])
def test_a_branch_on_a_size_that_does_more_is_refused(cls):
    model, x = build(cls), torch.randn(5, 4, D)
    with pytest.raises(NotSaveableError, match=LEFT):
        moeopt.optimize(model, x, backend="onnxruntime")


class AtLeastOne(Sequences):
    """A number that is asked, and used: of no row it is 1."""

    def none(self, rows, mask, x):
        self.each = max(rows.numel(), 1)
        return False

    def forward(self, x):
        return super().forward(x) / self.each


def test_a_number_that_is_used_too_is_not_settled():
    assert settled_reads(build(AtLeastOne), (torch.randn(5, 4, D),), {}) == {}


class InAHelper(Sequences):
    def none(self, rows, mask, x):
        found = True
        if rows.shape[0] == 0:
            found = False
        return not found


class OfAnything(InAHelper):
    """The helper is asked of a size that no mask decides, too."""

    def forward(self, x):
        ids = self.gate(x.mean(1)).argmax(-1)
        return x if self.none(torch.unique(ids), None, x) else super().forward(x)


def test_a_place_that_asks_of_other_sizes_too_is_not_settled():
    for cls, want in ((InAHelper, {"none"}), (OfAnything, set())):
        found = settled_reads(build(cls), (torch.randn(5, 4, D),), {})
        assert {code.co_name for code, _ in found} == want


def test_sizes_are_plain_numbers_again_afterwards():
    """What the code keeps of one tells nothing any more, and copies as a number."""
    import copy
    import pickle

    class Keeps(Sequences):
        def none(self, rows, mask, x):
            kept.append(rows.shape[0])
            return rows.shape[0] == 0

    kept = []
    settled_reads(build(Keeps), (torch.randn(5, 4, D),), {})
    number = kept[-1]
    assert (number == 0) in (True, False) and hash(number) == hash(int(number)) and number + 1 == int(number) + 1
    assert type(pickle.loads(pickle.dumps(number))) is int and type(copy.copy(number)) is int
