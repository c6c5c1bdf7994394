"""One op for all of a block's experts: what is recognised, and one twin for each reason not to."""

import contextlib
import dataclasses
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeopt.capture.tape import record
from moeopt.errors import Declined
from moeopt.ops import experts as experts_op
from moeopt.recognise.expert_refs import same_layout
from moeopt.recognise.experts import recognize
from moeopt.recognise.experts_hit import ExpertsNotHit
from moeopt.recognise.ffn_candidates import find_candidates
from moeopt.recognise.gemm_sites import find_sites
from moeopt.rewrite.live_weights import LiveExpertWeights
from tests.capture.tiny import rand
from tests.recognise.tiny import GLU, H, I, MoE, ffn, seeded, tape_of


def assert_is_the_sum(tape, found):
    """The op on the recipe's ids and weights is what the tape's combine node holds, less its base."""
    x = tape.value(found.tokens.node).movedim(found.tokens.axis, -1).reshape(-1, H)
    if found.routing.ids is None:
        w = found.routing.weights.run(tape)
        ids = torch.where(w != 0, torch.arange(w.shape[1]), w.shape[1])
    else:
        ids = found.routing.ids.run(tape)
        w = found.routing.weights.run(tape, ids)
    bank = LiveExpertWeights(tape.root, found.experts, (found.spec.w_in_layout, found.spec.w_out_layout))
    with torch.no_grad():
        got = experts_op(x, ids.long(), w, bank, found.spec).double()
    want = tape.value(found.combine.node).movedim(found.combine.axis, -1).reshape(-1, H).double()
    if found.base is not None:
        want = want - tape.value(found.base).movedim(found.combine.axis, -1).reshape(-1, H).double()
    # float32: two matmuls and a sum over K experts in another order
    assert (got - want).norm() <= 32 * torch.finfo(torch.float32).eps * want.norm()


# -- forms that are recognised -----------------------------------------------------------------------


class Slots(MoE):
    """One pass over (token, slot) rows, sorted by expert."""

    def mix(self, x, w, ids):
        order = ids.flatten().argsort(stable=True)
        rows = x.repeat_interleave(self.top_k, 0)[order]
        counts = ids.flatten().bincount(minlength=len(self.experts)).tolist()
        out = torch.cat([f(part) for f, part in zip(self.experts, rows.split(counts), strict=True)])
        back = torch.empty_like(out).index_copy_(0, order, out)
        return (back.view(len(x), self.top_k, -1) * w[..., None]).sum(1)


class Dense(MoE):
    def mix(self, x, w, ids):
        full = torch.zeros(len(x), len(self.experts)).scatter(1, ids, w)
        return torch.einsum("te,eth->th", full, torch.stack([f(x) for f in self.experts]))


class Hard(MoE):
    """Top-1 whose weight is one."""

    def mix(self, x, w, ids):
        y = torch.empty_like(x)
        for e, expert in enumerate(self.experts):
            hit = ids[:, 0] == e
            y[hit] = expert(x[hit])
        return y

    def route(self, x):
        return None, self.router(x).argmax(-1, keepdim=True)


class OnInput(MoE):
    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y.index_add_(0, t, expert(x[t] * w[t, k, None]))
        return y


class Gathered(MoE):
    """Weights fetched per token: two bmm."""

    def __init__(self):
        super().__init__()
        del self.experts
        self.w1, self.w2 = nn.Parameter(rand(4, H, I)), nn.Parameter(rand(4, I, H, seed=1))

    def mix(self, x, w, ids):
        h = F.gelu(torch.einsum("th,tkhi->tki", x, self.w1[ids]))
        return torch.einsum("tki,tkih,tk->th", h, self.w2[ids], w)


class Added(MoE):
    """The sum starts from a shared expert's output."""

    def __init__(self):
        super().__init__(shared=ffn(inner=20))

    def mix(self, x, w, ids):
        y = self.shared(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y = y.index_add(0, t, expert(x[t]) * w[t, k, None])
        return y


class Shared(MoE):
    """A shared expert of the routed experts' own shape."""

    def __init__(self):
        super().__init__(shared=ffn())

    def forward(self, x):
        return super().forward(x) + self.shared(x)


class SharedAndAllOnAll(Dense):
    """The same where every expert runs on every token, so that rows alone do not tell them apart."""

    def __init__(self):
        super().__init__(shared=ffn())

    def mix(self, x, w, ids):
        return super().mix(x, w, ids) + torch.sigmoid(x[:, :1]) * self.shared(x)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (MoE, "ids and weights", "plain relu"),
        (lambda: MoE(GLU), "ids and weights", "silu GLU, rows separate"),
        (lambda: MoE(lambda: GLU(F.gelu)), "ids and weights", "gelu GLU"),
        (Slots, "ids and weights", "plain relu"),
        (Dense, "ids and weights", "plain relu"),
        (Hard, "ids, constant weight", "plain relu"),
        (OnInput, "ids and weights", "weight on input"),
        (Gathered, "ids and weights", "plain gelu"),
        (Added, "ids and weights", "plain relu"),
    ],
)
def test_a_mixture_is_one_op(make, kind, words):
    tape = tape_of(make)
    (found,) = recognize(tape)
    assert found.routing.form == kind and words in str(found.spec)
    assert len(found.experts) == 4
    assert "tiny.py:" in found.source or "linear.py" in found.source or "test_experts" in found.source
    assert_is_the_sum(tape, found)
    assert (found.base is not None) == (make is Added)


@pytest.mark.parametrize("make", [Shared, SharedAndAllOnAll])
def test_a_shared_expert_of_the_same_shape_is_no_fifth_expert(make):
    tape = tape_of(make)
    (found,) = recognize(tape)
    assert [e.w_out.path for e in found.experts] == [f"experts.{e}.2.weight" for e in range(4)]
    assert_is_the_sum(tape, found)


def test_two_mixtures_side_by_side_are_two_ops_in_order():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = MoE(), MoE(lambda: ffn(nn.GELU, inner=20))

        def forward(self, x):
            return self.a(x) + self.b(x)

    tape = tape_of(Two, tokens=48)
    found = recognize(tape)
    assert [f.experts[0].w_out.path for f in found] == ["a.experts.0.2.weight", "b.experts.0.2.weight"]
    for f in found:
        assert_is_the_sum(tape, f)


def test_two_mixtures_one_after_the_other_are_two_ops():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = MoE(), MoE()

        def forward(self, x):
            return self.b(x + self.a(x))

    tape = tape_of(Two, tokens=48)
    assert [f.experts[0].w_out.path for f in recognize(tape)] == ["a.experts.0.2.weight", "b.experts.0.2.weight"]


def test_a_later_witness_may_miss_experts_that_an_earlier_one_showed():
    module = seeded(MoE)
    known = recognize(record(module, (rand(24, H, seed=7),)))
    few = record(module, (rand(2, H, seed=8),))
    (again,) = recognize(few, known=known)
    assert again.experts == known[0].experts and again.spec == known[0].spec
    assert_is_the_sum(few, again)


# -- one twin for each refusal -----------------------------------------------------------------------


class Nothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(H, H)

    def forward(self, x):
        return self.one(x).relu()


class DifferentFunctions(MoE):
    def __init__(self):
        acts = iter([nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh])
        super().__init__(lambda: ffn(next(acts)))


class DifferentWidths(MoE):
    def __init__(self):
        sizes = iter([8, 12, 16, 20])
        super().__init__(lambda: ffn(inner=next(sizes)))


def test_experts_may_differ_in_their_number_of_neurons():
    (found,) = recognize(tape_of(DifferentWidths))
    assert sorted(ref.w_out.k for ref in found.experts) == [8, 12, 16, 20] and found.spec.rows == "plain"


def test_experts_that_differ_in_more_are_declined():
    (found,) = recognize(tape_of(DifferentWidths))
    first = found.experts[0]
    packed = dataclasses.replace(first, w_in=(dataclasses.replace(first.w_in[0], m=2 * first.w_out.k),))
    with pytest.raises(Declined, match=r"its experts have different shapes \(\[\(\(8, "):
        same_layout([first, packed], find_candidates(*_sites(tape_of(DifferentWidths))))


def _sites(tape):
    return tape, find_sites(tape)


class Normed(nn.Module):
    """A norm inside the expert mixes features."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, I), nn.Linear(I, H)

    def forward(self, x):
        h = self.up(x).relu()
        return self.down(h.cumsum(-1))


class Permuted(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, I), nn.Linear(I, H)

    def forward(self, x):
        h = self.up(x).relu()
        return self.down(h + h.flip(0))


class CubeExpert(Permuted):
    def forward(self, x):
        return self.down(self.up(x) ** 3)


class OtherTokensForUp(GLU):
    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x.flip(0)))


class BothSides(OnInput):
    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y.index_add_(0, t, expert(x[t] * w[t, k, None]) * w[t, k, None])
        return y


class Residual(MoE):
    """Each expert adds its input: the sum starts from no tensor that exists."""

    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y.index_add_(0, t, (expert(x[t]) + x[t]) * w[t, k, None])
        return y


class Maximum(MoE):
    def mix(self, x, w, ids):
        return torch.stack([f(x) for f in self.experts]).amax(0)


class Product(MoE):
    def mix(self, x, w, ids):
        outs = torch.stack([f(x) for f in self.experts])
        return outs.prod(0)


class OneByOne(MoE):
    """Each expert's weight is computed inside the loop, out of no tensor of all weights."""

    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y.index_add_(0, t, expert(x[t]) * (x[t] @ self.router.weight[e]).sigmoid()[:, None])
        return y


class NoIds(MoE):
    """Which rows an expert takes stands in no tensor: a slice of the batch each."""

    def mix(self, x, w, ids):
        cut = len(x) // 4
        return torch.cat([f(x[i * cut : (i + 1) * cut]) for i, f in enumerate(self.experts)])


class Branch(MoE):
    """A Python branch on something else than the routing."""

    def mix(self, x, w, ids):
        return super().mix(x, w * (2.0 if x.abs().mean().item() > 0.1 else 1.0), ids)


class InTurn(MoE):
    """Each expert replaces its rows in the buffer that the next one reads from."""

    def mix(self, x, w, ids):
        y = x.clone()
        for e, expert in enumerate(self.experts):
            hit = (ids == e).any(-1)
            y[hit] = expert(y[hit])
        return y


class SoftSlots(MoE):
    """Experts take mixtures of tokens."""

    def mix(self, x, w, ids):
        p = self.router(x).softmax(0)
        return sum(p[:, e, None] * f(p[:, e, None].t() @ x) for e, f in enumerate(self.experts))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Nothing, "something that is not element-wise on each token's row"),
        (DifferentFunctions, "its experts do not all compute the same function (plain "),
        (lambda: MoE(CubeExpert), "the function between the expert's two matmuls (pow) is none that the op carries"),
        (
            lambda: MoE(Permuted),
            "between an expert's matmuls features of different rows, or of different matrices, come into one row",
        ),
        (lambda: MoE(OtherTokensForUp), "an expert's gate and up matmuls see different tokens"),
        (BothSides, "routing weights act on both the experts' inputs and their outputs"),
        (Residual, "tokens that no expert serves keep another value"),
        (Maximum, "the experts' outputs are not combined by a weighted sum per token: "),
        (Product, "the experts' outputs are not combined by a weighted sum per token: "),
        (OneByOne, "but no tensor holds the routing weights that the experts are multiplied by"),
        (NoIds, "no tensor before the experts holds the expert ids of each token"),
        (Branch, "its forward turns a value computed from the input into a Python number (mean) and may branch on it"),
        (InTurn, "each of its experts writes into the tensor that the next one reads its rows from"),
        (SoftSlots, "the experts' input rows are not rows of any one tensor (slots that mix tokens"),
    ],
    ids=lambda v: getattr(v, "__name__", None) if not isinstance(v, str) else "",
)
def test_declines_with_a_reason(make, reason):
    with pytest.raises(Declined) as caught:
        recognize(tape_of(make))
    assert reason in caught.value.reason, caught.value.reason


def test_experts_that_no_token_reached_are_named():
    class Lopsided(MoE):
        def route(self, x):
            w, ids = super().route(x)
            return w, ids % 2

    with pytest.raises(ExpertsNotHit, match="no probe token reached the expert weights experts.2.0.weight, experts.3.0.weight, "  # noqa: E501
                       "so what they compute could not be checked; pass example inputs that reach every expert") as e:  # fmt: skip  # noqa: E501
        recognize(tape_of(Lopsided))
    assert e.value.num_named == 4


def test_experts_of_a_stack_that_no_token_reached_are_named():
    class Lopsided(Gathered):
        def route(self, x):
            w, ids = super().route(x)
            return w, ids % 3

    with pytest.raises(ExpertsNotHit, match=r"no probe token reached the expert weights w1\[3\], so what they compute"):
        recognize(tape_of(Lopsided))


class Packed(MoE):
    """All experts' weights lie in Parameters that count no experts: their last one may be out of reach."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        del self.experts
        w1, w2 = rand(4, H, I), rand(4, I, H, seed=1)
        if how == "rows":
            self.w1, self.w2 = nn.Parameter(w1.flatten(0, 1)), nn.Parameter(w2.flatten(0, 1))
        elif how == "columns":
            self.w1, self.w2 = nn.Parameter(torch.cat(list(w1), 1)), nn.Parameter(torch.cat(list(w2), 1))
        elif how == "experts in the middle":
            self.w1, self.w2 = nn.Parameter(w1.transpose(0, 1).contiguous()), nn.Parameter(w2.transpose(0, 1).clone())
        else:
            self.w = nn.Parameter(torch.cat([w1.flatten(), w2.flatten()]))

    def matrices(self, e):
        if self.how == "rows":
            return self.w1[e * H : (e + 1) * H], self.w2[e * I : (e + 1) * I]
        if self.how == "columns":
            return self.w1[:, e * I : (e + 1) * I], self.w2[:, e * H : (e + 1) * H]
        if self.how == "experts in the middle":
            return self.w1[:, e], self.w2[:, e]
        ins, outs = self.w.split(4 * H * I)
        return ins.view(4, H, I)[e], outs.view(4, I, H)[e]

    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, k = torch.where(ids == e)
            w1, w2 = self.matrices(e)
            y.index_add_(0, t, (torch.relu(x[t] @ w1) @ w2) * w[t, k, None])
        return y


class PackedLopsided(Packed):
    def route(self, x):
        w, ids = super().route(x)
        return w, ids % 3


PACKED = ("rows", "columns", "experts in the middle", "one vector")


@pytest.mark.parametrize("how", PACKED)
def test_experts_in_the_rest_of_a_parameter_that_no_token_reached_are_told(how):
    with pytest.raises(
        ExpertsNotHit, match=r"the expert weights w1? beyond [0-9,]+ of its [0-9,]+ numbers, so what"
    ) as e:
        recognize(tape_of(lambda: PackedLopsided(how)))
    assert e.value.num_named == 4


@pytest.mark.parametrize("how", PACKED)
def test_packed_experts_that_are_all_reached_are_recognised(how):
    tape = tape_of(lambda: Packed(how))
    (found,) = recognize(tape)
    assert len(found.experts) == 4
    assert_is_the_sum(tape, found)


def test_idle_weights_that_ids_never_name_stay_uncovered():
    class Lopsided(MoE):
        def route(self, x):
            w, ids = super().route(x)
            return w, ids % 2

    with pytest.raises(ExpertsNotHit, match="some of the weights that look like experts were never reached by a probe"):
        recognize(tape_of(Lopsided), idle=True)


def test_without_a_single_token_there_is_nothing_to_see():
    with pytest.raises(Declined):
        recognize(tape_of(MoE, rand(0, H)))


@pytest.mark.parametrize("make", [MoE, Dense, Gathered, BothSides, NoIds])
def test_a_tape_dies_with_its_last_reference(make):
    """Its values are the memory of a probe: they must not wait for Python's collector."""
    gc.collect()
    gc.disable()
    try:
        tape = tape_of(make)
        last = weakref.ref(tape)
        with contextlib.suppress(Declined):
            recognize(tape)
        del tape
        assert last() is None
    finally:
        gc.enable()
