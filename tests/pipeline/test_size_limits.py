"""Code that does something else for many tokens, for none or for another layout is declined, or bounded and told."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import moeopt
from moeopt.errors import StaleModelWarning
from tests.toy_moe import Block, E, H, build, close, seeded


class ManyRows(Block):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if x.shape[0] * x.shape[1] > 600 else y


class ManyByLen(Block):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if len(x) > 48 else y


class ManyInAList(Block):
    def __init__(self):
        super().__init__()
        self.limits = {"tokens": 300}

    def forward(self, x):
        y = super().forward(x)
        return y * 2 if x.size(1) > self.limits["tokens"] else y


class ManyElements(Block):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if x.numel() > 20_000 else y


class Capacity(Block):
    """An expert takes its first 280 tokens, and drops the others."""

    capacity = 280

    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = (t[: self.capacity] for t in torch.where(ids == e))
            y.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return y


class Contiguous(Block):
    def forward(self, x):
        y = super().forward(x)
        return y if x.is_contiguous() else -y


NUMBER = "a number in its code"


@pytest.mark.parametrize("verify", ["fast", "strict"])
@pytest.mark.parametrize(
    ("make", "call", "case"),
    [
        (ManyRows, (1, 601, H), f"more tokens than 600, {NUMBER}"),
        (ManyByLen, (49, 1, H), f"more tokens than 48, {NUMBER}, in as many sequences"),
        (ManyInAList, (1, 301, H), f"more tokens than 300, {NUMBER}"),
        (ManyElements, (1, 1251, H), f"more tokens than 1250, {NUMBER}"),
        (Capacity, (1, 2000, H), f"more tokens than 280, {NUMBER}"),
        (Contiguous, (1, 6, H), "columns in memory"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_changes_with_a_number_in_the_code_is_declined_with_that_number(make, call, case, verify):
    opt = moeopt.optimize(build(make), seeded(2, 5, H), verify=verify)
    (block,) = [b for b in opt.report.blocks if b.kind == "moe"]
    assert block.status == "declined" and f"case '{case}'" in block.reason, block.reason
    with torch.no_grad():
        assert torch.equal(opt(seeded(*call)), build(make)(seeded(*call)))


class InChunks(Block):
    """The numbers are the same, however many tokens there are."""

    def loop(self, x, ids, w):
        if len(x) <= 64:
            return super().loop(x, ids, w)
        parts = zip(x.split(64), ids.split(64), w.split(64), strict=True)
        return torch.cat([super(InChunks, self).loop(*part) for part in parts])


def test_a_number_that_changes_nothing_is_no_obstacle():
    opt = moeopt.optimize(build(InChunks), seeded(2, 5, H), verify="fast")
    assert [b.status for b in opt.report.blocks] == ["rewritten"]
    with torch.no_grad():
        close(opt(seeded(3, 90, H)), build(InChunks)(seeded(3, 90, H)))
    assert opt.model.forward.program.guard.most is None and opt.model.forward.fallbacks == 0


class LateBranch(Block):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if x.shape[0] * x.shape[1] > 9000 else y


def test_a_number_that_no_case_passes_bounds_the_rewritten_code():
    opt = moeopt.optimize(build(LateBranch), seeded(2, 5, H), verify="fast")
    assert [b.status for b in opt.report.blocks] == ["rewritten"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", StaleModelWarning)
        close(opt(seeded(9, 1000, H)), build(LateBranch)(seeded(9, 1000, H)))
    with torch.no_grad(), pytest.warns(StaleModelWarning, match="9001 tokens, and its code holds the number 9000"):
        got = opt(seeded(1, 9001, H))
    assert torch.equal(got, build(LateBranch)(seeded(1, 9001, H)))


class ManyMoreElements(Block):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if x.numel() > 10_000 * H else y


class ManyChoices(Block):
    def loop(self, x, ids, w):
        y = super().loop(x, ids, w)
        return y * 2 if ids.numel() > 9000 else y


def test_a_number_that_counts_choices_of_experts_is_passed_too():
    opt = moeopt.optimize(build(ManyChoices), seeded(2, 5, H), verify="fast")
    (block,) = [b for b in opt.report.blocks if b.kind == "moe"]
    assert block.status == "declined" and f"more tokens than 4500, {NUMBER}" in block.reason, block.reason


class ForEachSequence(Block):
    """Its first argument has one number for each sequence."""

    def forward(self, scale, x):
        y = super().forward(x) * scale[:, None, None]
        return y * 2 if x.shape[0] * x.shape[1] > 9000 else y


def test_a_number_that_counts_elements_or_all_sequences_bounds_the_rewritten_code():
    opt = moeopt.optimize(build(ManyMoreElements), seeded(2, 5, H), verify="fast")
    with torch.no_grad(), pytest.warns(StaleModelWarning, match="10001 tokens, and its code holds the number 10000, "):
        assert torch.equal(opt(seeded(1, 10_001, H)), build(ManyMoreElements)(seeded(1, 10_001, H)))
    opt = moeopt.optimize(build(ForEachSequence), (seeded(2), seeded(2, 5, H)), verify="fast")
    assert [b.status for b in opt.report.blocks] == ["rewritten"]
    call = seeded(3), seeded(3, 3001, H)
    with torch.no_grad(), pytest.warns(StaleModelWarning, match="9003 tokens"):
        assert torch.equal(opt(*call), build(ForEachSequence)(*call))


class Average(Block):
    """Statistics of the routing, which an empty call leaves alone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("load", torch.zeros(E))

    def route(self, x):
        ids, w = super().route(x)
        if len(x):
            self.load.mul_(0.9).add_(F.one_hot(ids, E).float().mean((0, 1)), alpha=0.1)
        return ids, w


def test_an_empty_call_leaves_alone_what_the_original_leaves_alone():
    model, opt = build(Average), moeopt.optimize(build(Average), seeded(2, 5, H), verify="fast")
    assert [b.status for b in opt.report.blocks] == ["rewritten"]
    with torch.no_grad():
        for m in (model, opt):
            m(seeded(2, 7, H))
        model(seeded(1, 0, H))
        with pytest.warns(StaleModelWarning, match="called without a token, for which its code does something else"):
            assert opt(seeded(1, 0, H)).shape == (1, 0, H)
    close(opt.model.load, model.load)
    assert opt.model.load.isfinite().all()


@torch.library.custom_op("moeopt_tests::crashes_without_rows", mutates_args=())
def crashes_without_rows(x: torch.Tensor) -> torch.Tensor:
    return x + 0


class KernelOfOthers(Block):
    def route(self, x):
        return super().route(crashes_without_rows(x))


def test_a_kernel_of_another_library_never_gets_an_empty_call():
    opt = moeopt.optimize(build(KernelOfOthers), seeded(2, 5, H), verify="fast")
    assert [b.status for b in opt.report.blocks] == ["rewritten"]
    with torch.no_grad(), pytest.warns(StaleModelWarning, match=r"was not verified \(kernels of another library\)"):
        assert opt(seeded(1, 0, H)).shape == (1, 0, H)
