"""What a block's Python makes of numbers of its routing, other than a branch: calls of few tokens show it."""

import functools
import operator

import pytest
import torch

import moeopt
from tests.toy_moe import Block, E, H, build


def counts(ids):
    return torch.bincount(ids.flatten(), minlength=E).tolist()


def named(ids):
    """The experts that have tokens, as bits."""
    return functools.reduce(operator.or_, (1 << i for i in ids.flatten().tolist()))


def looked_up(ids):
    try:
        return {(1, 1, 1, 1): 3, (2, 2, 0, 0): 4, (0, 0, 2, 2): 2}[tuple(counts(ids))]
    except KeyError:
        return 1


@torch.jit.script
def scripted(ids: torch.Tensor) -> int:
    if int(ids.max()) < 2:
        return 2
    return 1


compiled = {}
exec("def of(counts):\n    return 2 if len(set(counts)) == 1 else 1\n", compiled)

FACTORS = {
    "a table of truths": lambda ids: {True: 2, False: 1}.get(counts(ids)[0] == counts(ids)[1]),
    "a table of counts": lambda ids: {(1, 1, 1, 1): 3, (2, 2, 0, 0): 4, (0, 0, 2, 2): 2}.get(tuple(counts(ids)), 1),
    "a key that is missing": looked_up,
    "an index": lambda ids: (1, 2)[int(max(counts(ids)) == min(counts(ids)))],
    "a product": lambda ids: 1 + all(count == counts(ids)[0] for count in counts(ids)),
    "bits": lambda ids: 1 + (named(ids) == 0b0011),
    "NumPy": lambda ids: 1 + int((torch.tensor(counts(ids)).numpy() == counts(ids)[0]).all()),
    "a truth made a number": lambda ids: 2 - float(bool(counts(ids)[0] - counts(ids)[1])),
    "a function of an operator": lambda ids: 1 + operator.eq(*counts(ids)[:2]),
    "places": lambda ids: 1 + (counts(ids).index(max(counts(ids))) == counts(ids).index(min(counts(ids)))),
    "sizes": lambda ids: 1 + ((ids == 0).nonzero().shape[0] == (ids == 1).nonzero().shape[0]),
    "a set": lambda ids: 1 + {0, 1}.issuperset(ids.flatten().tolist()),
    "the ends": lambda ids: 1 + (ids[0, 0].item() == ids[-1, -1].item() and len(ids) < 9),
    "order": lambda ids: 1 + (len(ids) > 3 and sorted(ids[:, 0].tolist()) == ids[:, 0].tolist()),
    "a count of 29": lambda ids: 1 + (max(counts(ids)) == 29),
    "TorchScript": scripted,
    "code without source": lambda ids: compiled["of"](counts(ids)),
}


class Factor(Block):
    """A number that follows from the routing multiplies the result, at sizes that no other case has."""

    def __init__(self, name):
        super().__init__()
        self.of = FACTORS[name]

    def forward(self, x):
        ids, w = self.route(x)
        return self.loop(x, ids, w) * self.of(ids) ** (len(x) in (2, 3, 4, 29))


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", FACTORS)
def test_a_number_of_the_routing_that_no_case_changed_is_declined(name):
    block = moeopt.explain(build(Factor, name=name), torch.randn(24, H)).blocks[0]
    assert block.status == "declined" and "test_few_tokens.py" in block.source
    if not block.reason.startswith("its forward branches on numbers"):
        assert block.reason.startswith("it was rewritten, verified and reverted: case '"), block.reason
        assert "its Python reads numbers or sizes that its routing gives" in block.reason


class Rare(Block):
    """Sixteen experts whose matrices have the router's shape; one pair of neighbours among them doubles the result."""

    def __init__(self):
        super().__init__(experts=16)

    def forward(self, x):
        ids, w = self.route(x)
        return self.loop(x, ids, w) * (1 + {7, 8}.issuperset(ids.flatten().tolist()))


def test_rows_are_aimed_at_a_router_of_the_experts_shape():
    block = moeopt.explain(build(Rare), torch.randn(24, H)).blocks[0]
    assert block.status == "declined" and "it was rewritten, verified and reverted" in block.reason
    assert "its Python reads numbers or sizes that its routing gives" in block.reason


ORDER = [3, 1, 2, 0]
ORDERED = {
    "all experts": lambda self, ids: 1 + (ids.flatten().tolist() == list(range(E))),
    "all experts from behind": lambda self, ids: 1 + (ids.flatten().tolist() == list(range(E))[::-1]),
    "columns": lambda self, ids: 1 + (ids.t().flatten().tolist() == list(range(E))),
    "rows that ascend": lambda self, ids: 1 + (len(ids) == 3) * (ids.sort(1)[0].tolist() == ids.tolist()),
    "all ascends": lambda self, ids: 1 + (len(ids) > 1) * (sorted(ids.flatten().tolist()) == ids.flatten().tolist()),
    "there and back": lambda self, ids: 1 + (len(ids) == 4) * (ids.flatten().tolist() == ids.flatten().tolist()[::-1]),
    "one pair": lambda self, ids: 1 + (ids.tolist() == [[2, 0]]),
    "a constant": lambda self, ids: 1 + (ids.flatten().tolist() == [3, 0, 1, 2]),
    "a global": lambda self, ids: 1 + (ids.flatten().tolist() == ORDER),
    "an attribute": lambda self, ids: 1 + (ids.tolist() == self.pairs),
    "a buffer": lambda self, ids: 1 + (ids.tolist() == self.order.tolist()),
}


class Ordered(Block):
    """Its result is doubled where the ids come in an exact order; no router is likely to give one."""

    def __init__(self, name):
        super().__init__()
        self.ask, self.pairs = name, [[3, 0], [2, 1]]
        self.register_buffer("order", torch.tensor([[1, 0], [3, 2], [1, 3]]))

    def forward(self, x):
        ids, w = self.route(x)
        return self.loop(x, ids, w) * ORDERED[self.ask](self, ids)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ORDERED)
def test_a_factor_that_asks_for_one_order_of_the_experts_is_declined(name):
    block = moeopt.explain(build(Ordered, name=name), torch.randn(24, H)).blocks[0]
    assert block.status == "declined" and block.reason.startswith("it was rewritten, verified and reverted: case '")
    assert "its Python reads numbers or sizes that its routing gives" in block.reason


class Sorted(Ordered):
    """Experts chosen by a sort of all scores."""

    def route(self, x):
        w, ids = self.gate(x).softmax(-1).sort(-1, descending=True)
        return ids[:, :2], w[:, :2]


class Twice(Ordered):
    """The choice is made once for the experts and once for the factor."""

    def forward(self, x):
        ids, w = self.route(x)
        return self.loop(x, ids, w) * ORDERED[self.ask](self, self.route(x)[0])


class Given(Ordered):
    def forward(self, x, ids):
        return self.loop(x, ids, torch.ones(ids.shape) / 2) * ORDERED[self.ask](self, ids)


def test_it_is_declined_where_a_sort_or_two_choose_or_the_caller_gives_the_ids():
    given = torch.randn(24, H), torch.stack([torch.randperm(E)[:2] for _ in range(24)])
    for cls, call in ((Sorted, torch.randn(24, H)), (Twice, torch.randn(24, H)), (Given, given)):
        block = moeopt.explain(build(cls, name="a constant"), call).blocks[0]
        assert block.status == "declined" and "experts in an exact order" in block.reason


class Masked(Block):
    """Its caller says in a mask, with a place for each choice or with one for all, which experts a token has."""

    def forward(self, x, mask):
        y = torch.zeros_like(x)
        for e in range(E):
            (t,) = torch.where(mask[..., e].reshape(len(x), -1).sum(-1) > 0)
            if t.numel():
                y[t] += self.experts[e](x[t])
        return y


@pytest.mark.parametrize("shape", ["one expert", "places", "one for all"])
def test_a_caller_s_mask_is_no_obstacle(shape):
    ids = torch.stack([torch.randperm(E)[: 1 if shape == "one expert" else 2] for _ in range(24)])
    hot = torch.nn.functional.one_hot(ids, E)
    mask = hot.sum(1) if shape == "one for all" else hot
    block = moeopt.explain(build(Masked), (torch.randn(24, H), mask)).blocks[0]
    assert block.status == "rewritten", block.reason
