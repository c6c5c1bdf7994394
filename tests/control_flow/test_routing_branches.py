"""A branch of a block's Python on its routing: a dispatch may ask whether an expert has tokens, and nothing else that
no case of verification tried both ways."""

import pytest
import torch

import moeopt
from tests.control_flow.test_branches_taken import needs_columns
from tests.toy_moe import Block, E, H, build

UNTRIED = {
    "all to the first": (lambda ids, w: (ids[:, 0] == 0).all(), "(all) that is False in every case"),
    "one of the first half": (lambda ids, w: ids.max() < E // 2, "(lt) that is False in every case"),
    "none to the last": (lambda ids, w: ~(ids == E - 1).any(), "(bitwise_not) that is False in every case"),
    "sure": (lambda ids, w: (w[:, 0] > 0.9).all(), "weights with a limit (all)"),
    "faint": (lambda ids, w: w.sum() < 0.3, "weights with a limit (lt)"),
}


class Doubling(Block):
    """Twice the result where a condition on the routing of all tokens holds."""

    def __init__(self, name):
        super().__init__()
        self.condition, self.renormalise = UNTRIED[name][0], False

    def forward(self, x):
        ids, w = self.route(x)
        y = self.loop(x, ids, w)
        return 2 * y if self.condition(ids, w) else y


@pytest.mark.parametrize("name", UNTRIED)
def test_a_branch_that_no_case_took_is_declined(name):
    block = moeopt.explain(build(Doubling, name=name), torch.randn(12, H)).blocks[0]
    assert block.status == "declined"
    asked = "comparison of routing" if "limit" in UNTRIED[name][1] else "value computed from the routing"
    assert block.reason.startswith(f"its forward branches on a {asked} {UNTRIED[name][1]}")
    assert "write both ways as tensors (torch.where)" in block.reason and "test_routing_branches.py" in block.source


class Asking(Block):
    """Asks whether each expert has tokens, in one of the ways in which a dispatch does."""

    def __init__(self, asks, top_k=2):
        super().__init__()
        self.asks, self.top_k = asks, top_k

    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        assert (ids < E).all() and (ids.max() < E), "an id that names no expert"
        numbers = range(E) if self.asks is not None else torch.bincount(ids.flatten(), minlength=E).nonzero()
        for e in numbers:
            if self.asks is None and e == E or self.asks is not None and not self.asks(ids, e):
                continue
            token, slot = torch.where(ids == e)
            y.index_add_(0, token, self.experts[e](x[token]) * w[token, slot, None])
        return y


ASKS = {
    "any": lambda ids, e: (ids == e).any(),
    "not all": lambda ids, e: not (ids != e).all(),
    "not the not": lambda ids, e: ~(~(ids == e).any()),
    "count": lambda ids, e: (ids == e).sum() > 0,
    "no count": lambda ids, e: (torch.bincount(ids.flatten(), minlength=E)[e] == 0).logical_not(),
    "mask": lambda ids, e: torch.nn.functional.one_hot(ids, E).bool()[..., e].any(),
    "a number that none has": None,
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("top_k", [2, E])
@pytest.mark.parametrize("name", ASKS)
def test_what_a_dispatch_asks_is_no_such_branch(name, top_k):
    block = moeopt.explain(build(Asking, asks=ASKS[name], top_k=top_k), torch.randn(12, H), verify="fast").blocks[0]
    assert block.status == "rewritten", block.reason


class Loops(Asking):
    """Weights are halved until none is too large: on most calls not once."""

    def loop(self, x, ids, w):
        while (w > 1.5).any():
            w = w * 0.5
        return super().loop(x, ids, w)


def test_a_loop_that_runs_on_large_weights_only_is_declined_and_ends():
    block = moeopt.explain(build(Loops, asks=ASKS["any"]), torch.randn(12, H), verify="fast").blocks[0]
    assert block.status == "declined" and "its forward branches on a comparison of routing weights" in block.reason


def balanced(counts):
    return all(count == counts[0] for count in counts)


def counts(ids):
    return torch.bincount(ids.flatten(), minlength=E).tolist()


def none_below(ids, least):
    return min(ids.flatten().tolist()) >= least


def code_of(ids):
    """One number of many ids: no case of verification is made for it."""
    code = 0
    for i in ids.flatten().tolist():
        code = (7 * code + i) % 10007
    return code


def matched(ids):
    match counts(ids):
        case held if not any(held[2:]):
            return True
    return False


def is_first(ids):
    match int(ids.max()):
        case 1:
            return True
    return False


def once(ids):
    """What can be gone through once is left to the code that does it."""
    numbers = (2 * i for i in ids.flatten().tolist())
    return set(numbers) == {0, 2}


NUMBERS = {
    "an int": (lambda ids, x: int(ids.max()) < E // 2, "int(ids.max()) < E // 2", False),
    "of a loop": (lambda ids, x: any([True for c in [counts(ids)] if c[2:] == [0] * 6]), "c[2:] == [0] * 6", False),
    "a function's": (lambda ids, x: code_of(ids) == 1234, "code_of(ids) == 1234", False),
    "an item": (lambda ids, x: ids.min().item() >= E // 2, "ids.min().item() >= E // 2", False),
    "a set": (lambda ids, x: set(ids.flatten().tolist()) == {0, 1}, "== {0, 1}", False),
    "a list": (lambda ids, x: E - 1 not in ids.flatten().tolist(), "E - 1 not in ids", False),
    "a NumPy number": (lambda ids, x: ids.numpy().max() < E // 2, "ids.numpy().max() < E // 2", False),
    "a size": (lambda ids, x: ids[ids >= E // 2].numel() == 0, "ids[ids >= E // 2].numel() == 0", False),
    "a length": (lambda ids, x: not len((ids >= E // 2).nonzero()), "len((ids >= E // 2).nonzero())", False),
    "a generator": (lambda ids, x: len(x) > 3 and balanced(counts(ids)), "count == counts[0]", False),
    "in a function": (lambda ids, x: none_below(ids, 3), "min(ids.flatten().tolist()) >= least", False),
    "a chain": (lambda ids, x: -1 < int(ids.min()) * 0 <= int(ids.max()) < E // 2, "<= int(ids.max()) < E // 2", False),
    "an order": (lambda ids, x: next((2 for c in [counts(ids)] if c == [12, 12, 0, 0]), 1) == 2, "c == [", False),
    "an iterator": (lambda ids, x: once(ids), "set(numbers) == {0, 2}", False),
    "a pattern": (lambda ids, x: matched(ids), "(any(held[2:]))", True),
    "a pattern's numbers": (lambda ids, x: is_first(ids), "int(ids.max())", False),
    "of equal tokens": (lambda ids, x: len(x) > 1 and torch.equal(ids[0], ids[1] + 1), "torch.equal(", False),
}


class DoublingByNumbers(Doubling):
    def __init__(self, name):
        Block.__init__(self)
        self.holds, self.renormalise = NUMBERS[name][0], False

    def forward(self, x):
        ids, w = self.route(x)
        y = self.loop(x, ids, w)
        return 2 * y if self.holds(ids, x) else y


@pytest.mark.sample(2)
@needs_columns
@pytest.mark.parametrize("name", NUMBERS)
def test_a_branch_on_numbers_and_sizes_that_no_case_took_is_declined(name):
    block = moeopt.explain(build(DoublingByNumbers, name=name), torch.randn(12, H)).blocks[0]
    text, answer = NUMBERS[name][1:]
    assert block.status == "declined"
    assert block.reason.startswith("its forward branches on numbers or sizes that its input decides (")
    assert text in block.reason and f"which is {answer} in every case of verification" in block.reason
    assert "write both ways as tensors (torch.where)" in block.reason and "test_routing_branches.py" in block.source


class AskingNumbers(Block):
    """Asks as dispatches do: whether an expert has tokens, and whether a number names an expert."""

    def __init__(self, asks, top_k=2):
        super().__init__()
        self.asks, self.top_k, self.limit, self.flag = asks, top_k, 1 << 30, False

    def loop(self, x, ids, w):
        y = torch.zeros_like(x)
        assert int(ids.max()) < E, "an id that names no expert"
        if len(ids.unique()) > E:
            raise ValueError("more experts than there are")
        if self.flag or x.shape[0] > 1 << 30 or isinstance(x, str):
            return y
        done = []
        for e in self.asks(ids):
            if not 0 <= e < E or e == E:
                continue
            token, slot = torch.where(ids == e)
            if not token.numel():
                continue
            if len(token) > self.limit:
                token, slot = token[: self.limit], slot[: self.limit]
            done.append((token, self.experts[e](x[token]) * w[token, slot, None]))
        rows = [token for token, _ in done]
        if len(rows) > 0:
            y.index_add_(0, torch.cat(rows), torch.cat([result for _, result in done]))
        return y


LOOPS = {
    "all": lambda ids: range(E),
    "unique": lambda ids: ids.unique(),
    "list": lambda ids: ids.unique().tolist(),
    "set": lambda ids: sorted(set(ids.flatten().tolist())),
    "counts": lambda ids: [e for e, count in enumerate(counts(ids)) if count > 0],
    "truths": lambda ids: [e for e, count in enumerate(counts(ids)) if count],
    "marks": lambda ids: [e for e in range(E) if (ids == e).any().item()],
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("top_k", [1, E])
@pytest.mark.parametrize("name", LOOPS)
def test_what_a_dispatch_asks_of_numbers_is_no_such_branch(name, top_k):
    model = build(AskingNumbers, asks=LOOPS[name], top_k=top_k)
    block = moeopt.explain(model, torch.randn(12, H), verify="fast").blocks[0]
    assert block.status == "rewritten", block.reason


class Counts(Block):
    """Reads truths of its routing, and counts its calls in training mode."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(H)

    def loop(self, x, ids, w):
        return super().loop(self.norm(x), ids, w) if (ids >= 0).any() else x


def test_what_a_watched_forward_writes_is_put_back():
    model = build(Counts).train()
    block = moeopt.explain(model, torch.randn(12, H), verify="fast").blocks[0]
    assert "num_batches_tracked" not in block.reason
    assert model.norm.num_batches_tracked == 0
