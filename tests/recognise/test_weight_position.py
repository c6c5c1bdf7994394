"""Weights and factors that are one on every probe: read off the dataflow, and tried with other values."""

import pytest
import torch

import moeopt
from moeopt.errors import Declined
from moeopt.recognise.experts import recognize
from tests.capture.tiny import rand
from tests.property.check_wide import check_wide
from tests.property.spec import Around, Expert, Program, Router
from tests.recognise.tiny import H, MoE, seeded, tape_of


def saturated(scores):
    """Exactly one wherever the scores are not tiny."""
    return scores / (scores + 1e-9)


class Scored(MoE):
    """Top-1 of exponentials, renormalised; ``on_input`` and ``on_output`` are what the tests vary."""

    top_k = 1

    def route(self, x):
        w, ids = self.router(x).exp().topk(self.top_k)
        return saturated(w), ids

    def on_input(self, rows, w, gate):
        return rows

    def on_output(self, rows, w, gate):
        return rows

    def mix(self, x, w, ids):
        gate = saturated(self.router(x).exp().sum(-1, keepdim=True))
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            rows = expert(self.on_input(x[t], w[t, k, None], gate[t]))
            y.index_add_(0, t, self.on_output(rows, w[t, k, None], gate[t]))
        return y


def times_weight(self, rows, w, gate):
    return rows * w


def times_gate(self, rows, w, gate):
    return rows * gate


class Varied:
    """Softmax weights of two experts, which are one on no probe."""

    top_k = 2

    def route(self, x):
        return self.router(x).softmax(-1).topk(self.top_k)


class OnOutput(Scored):
    on_output = times_weight


class OnInput(Scored):
    on_input = times_weight


class Sorted(Scored):
    """Rows and weights are sorted by expert before they meet; the ids stay as they were."""

    def mix(self, x, w, ids):
        order = ids.flatten().sort().indices
        counts = ids.flatten().bincount(minlength=len(self.experts)).tolist()
        rows = torch.cat([f(part) for f, part in zip(self.experts, x[order].split(counts), strict=True)])
        return torch.zeros_like(x).index_add(0, order, rows * w.flatten()[order, None])


class SortedOnInput(Scored):
    """The same, and they meet before the experts: the sorted weights are as good by value as those of the tokens."""

    def mix(self, x, w, ids):
        order = ids.flatten().sort().indices
        counts = ids.flatten().bincount(minlength=len(self.experts)).tolist()
        rows = x[order] * w.flatten()[order, None]
        done = torch.cat([f(part) for f, part in zip(self.experts, rows.split(counts), strict=True)])
        back = torch.empty_like(done)
        back[order] = done
        return back.view(*ids.shape, -1).sum(1)


class Halved:
    """Weights that are one half on every probe."""

    def route(self, x):
        w, ids = super().route(x)
        return 0.5 * w, ids


class HalvedOnOutput(Halved, OnOutput):
    pass


class HalvedOnInput(Halved, OnInput):
    pass


class HalvedSorted(Halved, Sorted):
    pass


class HalvedSortedOnInput(Halved, SortedOnInput):
    pass


HALVED = [HalvedOnOutput, HalvedOnInput, HalvedSorted, HalvedSortedOnInput]


class Both(Scored):
    on_input = on_output = times_weight


class Unused(Scored):
    """The weights are computed and left aside."""


class Squared(Scored):
    def on_output(self, rows, w, gate):
        return rows * w.square()


class LargestSortedOnInput(SortedOnInput):
    """Switch: the largest softmax score multiplies rows that lie sorted by expert."""

    def route(self, x):
        return self.router(x).softmax(-1).topk(self.top_k)


class InLoop(OnInput):
    """No tensor holds the weights of all tokens: each expert renormalises its own."""

    def route(self, x):
        return self.router(x).exp().topk(self.top_k)

    def on_input(self, rows, w, gate):
        return rows * saturated(w)


class GateOnInput(Varied, OnOutput):
    on_input = times_gate


class GateOnOutput(Varied, OnInput):
    on_output = times_gate


class GateBefore(Varied, OnOutput):
    """The gate multiplies tokens before they are dispatched: the tensor of tokens equals the block's input by value."""

    def forward(self, x):
        return self.mix(x * saturated(self.router(x).exp().sum(-1, keepdim=True)), *self.route(x))


@pytest.mark.parametrize(("make", "place"), [(OnOutput, "output"), (OnInput, "input"), (Sorted, "output")])
def test_the_place_of_weights_that_are_one(make, place):
    tape = tape_of(make)
    (found,) = recognize(tape)
    assert bool((found.combine.weights[found.combine.weights != 0] == 1).all())
    assert found.spec.weight_on == place
    assert found.routing.form == "ids and weights"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Both, "would act on both the experts' inputs and their outputs"),
        (Squared, "with other values it does not multiply the experts' outputs as it is"),
        (InLoop, "a factor on its experts' input rows is the same for every probe"),
        (GateOnInput, "a factor on its experts' input rows is the same for every probe"),
        (GateOnOutput, "a factor on its experts' outputs, beside the routing weights, is the same for every probe"),
        (GateBefore, "a factor on its experts' input rows is the same for every probe"),
    ],
)
def test_what_the_rewrite_cannot_say_of_them_is_declined(make, reason):
    with pytest.raises(Declined) as refused:
        recognize(tape_of(make))
    assert reason in refused.value.reason


def test_weights_that_nothing_reads_are_a_constant():
    (found,) = recognize(tape_of(Unused))
    assert found.routing.form == "ids, constant weight"


def test_weighted_rows_that_lie_sorted_are_rows_of_the_tokens():
    (found,) = recognize(tape_of(LargestSortedOnInput))
    assert (found.spec.weight_on, found.routing.form) == ("input", "ids and weights")
    assert found.tokens.node.op == "placeholder"


@pytest.mark.parametrize("make", HALVED)
def test_weights_that_are_one_half_are_those_of_the_tokens(make):
    (found,) = recognize(tape_of(make))
    assert found.spec.weight_on == ("input" if "OnInput" in make.__name__ else "output")
    assert found.routing.form == "ids and weights"


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "make",
    [OnOutput, OnInput, Sorted, SortedOnInput, LargestSortedOnInput, *HALVED, Squared, InLoop, GateOnInput, GateBefore],
)
def test_numbers_where_the_factors_are_no_longer_one(make):
    model = seeded(make)
    opt = moeopt.optimize(model, rand(24, H, seed=7), verify="fast")
    step = torch.linalg.pinv(model.router.weight.detach()).sum(1)
    for logit in (-18.0, -21.0, -25.0, -45.0):
        x = rand(24, H, seed=8) + logit * step
        with torch.no_grad():
            torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [OnOutput, OnInput, Sorted, SortedOnInput, *HALVED])
def test_a_weight_that_vanishes_is_that_of_its_token(make):
    model = seeded(make)
    opt = moeopt.optimize(model, rand(24, H, seed=7), verify="fast")
    far = torch.arange(24) % 3 == 0
    x = rand(24, H, seed=8) - 45.0 * torch.linalg.pinv(model.router.weight.detach()).sum(1) * far[:, None]
    with torch.no_grad():
        weights = model.route(x)[0]
        assert bool((weights[far] < 1e-3).all()) and bool((weights[~far] > 0.4).all())
        torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5)


def test_sorted_weights_are_not_taken_for_those_of_the_tokens():
    """Renormalised and scaled to one half, sorted by expert before they multiply the rows: a NaN told them apart."""
    check_wide(
        Program(
            form="sort_slice", experts=6, hidden=16, inner=8, weight_on="input", dtype="bfloat16", seed=343,
            router=Router(kind="topk_score", score="softmax", renormalize="sum+1e-20", scale=0.5),
            expert=Expert(activation="elu", bias_out=True),
            around=Around(shared="gated", softcap=30.0, rank=3), example="expanded",
        ),
        "torch",
    )  # fmt: skip
