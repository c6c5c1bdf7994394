"""The tensors that say which experts and by how much are found by value, in every form they take."""

import pytest
import torch
import torch.nn.functional as F

from moeopt.errors import Declined
from moeopt.recognise.experts import recognize
from moeopt.recognise.ids_of_masks import mask_to_ids, table_to_ids
from moeopt.recognise.routing import find_routing
from moeopt.recognise.routing_types import Table
from tests.capture.tiny import rand, recorded
from tests.recognise.tiny import E, MoE, T, tape_of


class ByRank(MoE):
    """ids as int32 (K, T), slot-major, weights likewise."""

    def route(self, x):
        w, ids = super().route(x)
        return w.t().contiguous(), ids.t().contiguous().int()

    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            k, t = torch.where(ids == e)
            y = y.index_add(0, t, expert(x[t]) * w[k, t, None])
        return y


class Scores(MoE):
    """Weights are looked up in the scores of all experts."""

    def route(self, x):
        scores = self.router(x).sigmoid()
        return scores, scores.topk(2)[1]

    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t = torch.where((ids == e).any(-1))[0]
            y = y.index_add(0, t, expert(x[t]) * w[t, e, None])
        return y


class Mask(MoE):
    """Top-1 as a one-hot mask; nobody computes integers."""

    def route(self, x):
        p = self.router(x).softmax(-1)
        best = p.amax(-1, keepdim=True)
        return best[:, 0], (p == best).float()

    def mix(self, x, w, mask):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t = torch.where(mask[:, e] > 0)[0]
            y = y.index_add(0, t, expert(x[t]) * w[t, None])
        return y


class MaskAlone(Mask):
    def route(self, x):
        p = self.router(x)
        return None, (p == p.amax(-1, keepdim=True)).float()

    def mix(self, x, w, mask):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t = torch.where(mask[:, e] > 0)[0]
            y = y.index_add(0, t, expert(x[t]))
        return y


class EveryOne(MoE):
    """All experts, softmax weights."""

    def route(self, x):
        return self.router(x).softmax(-1), None

    def mix(self, x, w, ids):
        return sum(w[:, e, None] * f(x) for e, f in enumerate(self.experts))


class Sparse(MoE):
    """Scores below a threshold are zero: as many experts per token as there are."""

    def route(self, x):
        p = self.router(x).softmax(-1)
        return torch.where(p > 0.25, p, 0.0), None

    mix = EveryOne.mix


class SumOfTwo(MoE):
    """Several weights of one token stand for one: the same number for each slot."""

    def route(self, x):
        w, ids = super().route(x)
        return x.mean(-1).sigmoid(), ids

    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t = torch.where((ids == e).any(-1))[0]
            y = y.index_add(0, t, expert(x[t]) * w[t, None])
        return y


class Equal(SumOfTwo):
    def mix(self, x, w, ids):
        return super().mix(x, torch.full((len(x),), 0.5), ids)


class Reordered(MoE):
    """Id v runs the expert of another name."""

    def mix(self, x, w, ids):
        y = torch.zeros_like(x)
        for v, e in enumerate((2, 0, 3, 1)):
            t, k = torch.where(ids == v)
            y = y.index_add(0, t, self.experts[e](x[t]) * w[t, k, None])
        return y


@pytest.mark.parametrize(
    ("make", "kind", "top_k"),
    [
        (MoE, "ids and weights", 2),
        (ByRank, "ids and weights", 2),
        (Scores, "ids and weights", 2),
        (Mask, "one-hot mask", 1),
        (MaskAlone, "one-hot mask, constant weight", 1),
        (EveryOne, "dense", 4),
        (Sparse, "table", 4),
        (SumOfTwo, "ids and weights", 2),
        (Equal, "ids and weights", 2),
        (Reordered, "ids and weights", 2),
    ],
)
def test_each_form_of_routing_has_its_frontier(make, kind, top_k):
    tape = tape_of(make)
    (found,) = recognize(tape)
    routing = found.routing
    assert (routing.form, routing.top_k) == (kind, top_k)
    dense = torch.zeros(T, E + 1)
    if routing.ids is None:
        dense[:, :E] = routing.weights.run(tape)
    else:
        ids = routing.ids.run(tape)
        assert ids.shape == (T, top_k) and ids.dtype == torch.int64
        weights = routing.weights.run(tape, ids)
        assert weights.shape == ids.shape
        dense.scatter_add_(1, ids, weights)
    by_chain = torch.zeros(T, E)
    for v, e in enumerate(routing.experts):
        by_chain[:, e] += dense[:, v]
    torch.testing.assert_close(by_chain, found.combine.weights, rtol=4e-7, atol=0)  # summed weights may round once


def test_names_of_the_experts_follow_the_ids():
    (found,) = recognize(tape_of(Reordered))
    assert [e.w_out.path.split(".")[1] for e in found.experts] == ["2", "0", "3", "1"]


def test_the_router_is_kept_where_it_writes_its_answer_down():
    tape = tape_of(MoE)
    (found,) = recognize(tape)
    ids, weights = found.routing.ids.source, found.routing.weights.source
    assert ids.args[0].target is torch.ops.aten.topk.default and weights.target is torch.ops.aten.div.Tensor


def test_masks_and_tables_become_ids():
    onehot = F.one_hot(torch.tensor([[2, 0], [1, 1]]), 3)
    onehot[1, 1] = 0
    assert mask_to_ids(onehot).tolist() == [[2, 0], [1, 3]]
    assert table_to_ids(torch.tensor([[0.5, 0.0, -1.0]])).tolist() == [[0, 3, 2]]


def table(weights, visits=None):
    visits = (weights != 0).long() if visits is None else visits
    return Table(weights, visits, list(range(weights.shape[1])), weights.shape[1], True)


def test_weights_that_are_one_are_not_taken_for_a_constant_if_the_input_weighs():
    """``w / max(w)`` is one on this witness; elsewhere it may not be."""
    ids = torch.tensor([[0], [2], [1]])
    tape = recorded(lambda _, x, i: x.sum() + i.sum(), rand(3, 3), ids)
    seen = F.one_hot(ids[:, 0], 3).float()
    before = [n for n in tape.nodes if n.meta.get("shape") is not None]
    with pytest.raises(Declined, match="the expert ids were found, but no tensor holds the routing weights"):
        find_routing(tape, before, table(seen), None)
    loose = table(seen)
    loose.weighed = False
    assert find_routing(tape, before, loose, None).form == "ids, constant weight"


def test_without_ids_there_is_no_frontier():
    tape = recorded(lambda _, x: x.sum(), rand(3, 3))
    with pytest.raises(Declined, match=r"no tensor before the experts holds the expert ids of each token"):
        find_routing(tape, [n for n in tape.nodes if n.meta.get("shape") is not None], table(torch.eye(3)), None)


def test_capacity_slots_are_summed_over():
    """A (T, E, C) combine tensor, as in Switch and GShard."""
    combine = torch.zeros(5, 3, 4)
    combine[torch.arange(5), torch.tensor([0, 1, 0, 2, 1]), torch.tensor([0, 0, 1, 0, 1])] = torch.rand(5) + 0.1
    tape = recorded(lambda _, x, c: x.sum() + (c * 1).sum(), rand(5, 3), combine)
    before = [n for n in tape.nodes if n.meta.get("shape") is not None]
    found = find_routing(tape, before, table(combine.sum(-1)), None)
    assert found.form == "table" and torch.equal(found.weights.run(tape), combine.sum(-1))
