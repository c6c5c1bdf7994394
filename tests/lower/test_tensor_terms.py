"""Two runs give the same for every input where their results have equal terms."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.lower.tensor_terms import Terms


class Entering(TorchDispatchMode):
    def __init__(self, terms):
        super().__init__()
        self.terms = terms

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.terms.call(func, args, kwargs or {})


def equal(one, other, x, mask):
    """Whether two functions of rows, of a mask of none of them, and of a mask that has none here, are equal."""
    interned, values = {}, []
    for run in (one, other):
        given = x.clone(), mask.clone(), torch.zeros_like(mask)
        terms = Terms(interned, nn.Module(), given)
        terms.empty(given[1])
        with Entering(terms), torch.no_grad():
            values.append(terms.value(run(*given)))
    return values[0] == values[1]


def rows(change):
    """Rows of a copy, changed where a mask says."""

    def run(x, mask, chance):
        y = x.clone()
        change(y, mask, chance)
        return y

    return run


def as_it_is(x, mask, chance):
    return x


SAME = {
    "clone": lambda x, m, c: x.clone(),
    "index_put": rows(lambda y, m, c: y.__setitem__(m, y[m] * 2)),
    "masked_fill": lambda x, m, c: x.masked_fill(m[:, None], 0.0),
    "where": lambda x, m, c: torch.where(m[:, None], 2 * x, x),
    "numbers of rows": rows(lambda y, m, c: y.index_add_(0, m.nonzero()[:, 0], y[m] + 1)),
    "zeros are added": lambda x, m, c: x + torch.zeros_like(x).index_copy_(0, m.nonzero()[:, 0], x[m]),
    "times the mask": lambda x, m, c: x + (x * 3) * m[:, None].to(x.dtype),
    "less than the mask": rows(lambda y, m, c: y.__setitem__(m & (y[:, 0] > 0), 7.0)),
}
OTHER = {
    "clamp": lambda x, m, c: x.clamp(-1e9, 1e9),
    "mask that has none here": rows(lambda y, m, c: y.__setitem__(c, y[c] * 2)),
    "either mask": rows(lambda y, m, c: y.__setitem__(m | c, 7.0)),
    "not the mask": rows(lambda y, m, c: y.__setitem__(~m, y[~m] * 1)),
    "row 0": rows(lambda y, m, c: y.index_add_(0, m.to(torch.int64), torch.zeros(4, 4))),
    "rows of both": lambda x, m, c: x + torch.cat([x[c], x[m]]).sum(0),
    "none here, in place": rows(lambda y, m, c: y.__setitem__(c, y[c].mul_(2))),
    "turned": lambda x, m, c: x.t().contiguous(),
    "turned over": lambda x, m, c: x.t().clone(memory_format=torch.contiguous_format).view(4, 4),
    "part of the mask": lambda x, m, c: x[: int(m.sum()) + 3],
    "random": lambda x, m, c: x + torch.zeros(4, 4).uniform_() * 0,
    "infinite": lambda x, m, c: x + m[:, None].to(x.dtype) / 0,
}


def _x():
    return torch.ones(4, 4)


@pytest.mark.parametrize("name", SAME)
def test_what_can_change_nothing_is_left_out(name):
    x, mask = torch.randn(4, 4), torch.tensor([True, False, True, False])
    assert equal(as_it_is, SAME[name], x, mask)


@pytest.mark.parametrize("name", OTHER)
def test_equal_numbers_of_these_inputs_are_no_proof(name):
    assert not equal(as_it_is, OTHER[name], _x(), torch.tensor([True, False, True, False]))


def test_random_numbers_and_what_was_written_in_place_are_told_apart():
    def once(x, mask, chance):
        return x + torch.rand(4, 4)

    def later(x, mask, chance):
        torch.rand(4, 4)
        return x + torch.rand(4, 4)

    def written(x, mask, chance):
        rows = x[chance]
        return x.index_put((chance,), rows.mul_(2))

    def unwritten(x, mask, chance):
        return x.index_put((chance,), x[chance])

    mask = torch.zeros(4, dtype=torch.bool)
    assert equal(once, once, _x(), mask)
    assert not equal(once, later, _x(), mask)
    assert not equal(unwritten, written, _x(), mask)


def test_a_copy_is_what_it_was_made_of_and_its_views_are_not():
    mask = torch.zeros(4, dtype=torch.bool)
    assert equal(lambda x, m, c: x.t(), lambda x, m, c: x.t().contiguous(), _x(), mask)
    assert not equal(lambda x, m, c: x.t(), lambda x, m, c: x.t().contiguous().t(), _x(), mask)


def test_pythons_numbers_are_terms_by_their_bytes():
    def adds(*numbers):
        return lambda x, mask, chance: x + torch.tensor(numbers)

    mask = torch.zeros(4, dtype=torch.bool)
    assert equal(adds(1.0, 2, 3, 4), adds(1.0, 2, 3, 4), _x(), mask)
    assert not equal(adds(1.0, 2, 3, 4), adds(1.0, 2, 3, 5), _x(), mask)
