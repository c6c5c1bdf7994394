"""Ids as sets per token: equal, tied or flipped."""

import torch

from moeopt.ir.specs import RouterSpec
from moeopt.ops.route import route
from moeopt.verification.oracle import record_selections
from moeopt.verification.routing import compare_routing, ids_seen

EPS = 2**-23


def chosen(fn, x):
    return record_selections(fn, (x,), {})[1]


def test_order_within_a_token_does_not_matter():
    x = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    a, b = chosen(lambda x: x.topk(2), x), chosen(lambda x: [t.flip(-1) for t in x.topk(2)], x)
    b.events[0].outputs = (None, b.events[0].outputs[1].flip(-1))
    check = compare_routing(a, b, EPS)
    assert (check.ids_compared, check.ties, check.flips) == (4, 0, 0) and check.as_rewritten is None


def test_a_flip_is_reported_with_its_margin():
    x = torch.tensor([[3.0, 1.0, 2.0]])
    check = compare_routing(chosen(lambda x: x.topk(1), x), chosen(lambda x: (-x).topk(1), x), EPS)
    assert check.flips == 1
    assert check.reason == (
        "token 0 goes to experts [1] instead of [0]; their scores differ by 2, and rounding explains 2.86e-06"
    )


def test_a_tie_gives_the_selections_that_the_rewritten_made():
    x = torch.tensor([[1.0, 1.0 + EPS, 0.0], [5.0, 1.0, 0.0]])
    a = chosen(lambda x: x.topk(1), x)
    b = chosen(lambda x: (x + torch.tensor([0.1, 0, 0])).topk(1), x)
    check = compare_routing(a, b, EPS)
    assert (check.ties, check.flips) == (1, 0)
    assert a.routing()[0].ids.tolist() == [[1], [0]]
    assert check.as_rewritten.routing()[0].ids.tolist() == [[0], [0]]


def test_the_coarser_eps_decides():
    x = torch.tensor([[1.0, 1.01]])
    a, b = chosen(lambda x: x.topk(1), x), chosen(lambda x: (-x).topk(1), x)
    assert compare_routing(a, b, EPS).flips == 1
    assert compare_routing(a, b, 2**-7).ties == 1


def test_nan_rows_are_not_judged():
    x = torch.tensor([[float("nan"), 1.0], [2.0, 1.0]])
    check = compare_routing(chosen(lambda x: x.topk(1), x), chosen(lambda x: x.nan_to_num().topk(1), x), EPS)
    assert (check.ties, check.flips) == (0, 0)


def test_the_route_op_is_compared_with_a_topk():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    spec = RouterSpec("softmax_topk", 2, 5)
    check = compare_routing(chosen(lambda x: x.softmax(-1).topk(2), x), chosen(lambda x: route(x, spec), x), EPS)
    assert (check.ids_compared, check.flips) == (14, 0)


def test_whole_orders_compare_by_position():
    x = torch.tensor([[3.0, 1.0, 2.0]])
    check = compare_routing(chosen(lambda x: x.sort(-1), x), chosen(lambda x: (-x).sort(-1), x), EPS)
    assert check.flips == 1


def test_ids_of_chooses_the_events():
    x = torch.tensor([[3.0, 1.0, 2.0]])
    a = chosen(lambda x: (x.topk(1), x.argmin(-1)), x)
    assert compare_routing(a, a, EPS).ids_compared == 2
    assert compare_routing(a, a, EPS, lambda s: s.routing()[:1]).ids_compared == 1


def test_ids_seen():
    x = torch.tensor([[3.0, 1.0, 2.0], [9.0, 8.0, 7.0]])
    assert ids_seen(chosen(lambda x: (x.topk(2), x[:, :2].topk(1)), x)) == [0, 1, 2]
    assert ids_seen(chosen(lambda x: x + 1, x)) == []
