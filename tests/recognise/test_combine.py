"""By what each expert's row enters the sum is read off one-hot codes, bit for bit."""

import pytest
import torch

from moeopt.errors import Declined
from moeopt.recognise.combine import Labels, read_combine
from moeopt.recognise.gemm_sites import find_sites
from tests.capture.tiny import rand, recorded

T, C, H, M = 6, 3, 4, 5
W = torch.rand(T, C, generator=torch.Generator().manual_seed(3))
VISITS = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [1, 0], [2, 0]])  # the two experts of each token


def read(mix, dtype=torch.float32):
    """The combine of ``mix(outs, w)``, where ``outs[c]`` are the products of all tokens with matrix c."""

    def fn(m, x, w):
        return mix([x @ m.get_parameter(f"w{c}") for c in range(C)], w)

    parts = {f"w{c}": rand(H, M, seed=c, dtype=dtype) for c in range(C)}
    tape = recorded(fn, rand(T, H, dtype=dtype), W.to(dtype), **parts)
    sites = find_sites(tape)
    token = {s: torch.arange(T) for s in sites}
    candidate = {s: torch.full((T,), c) for c, s in enumerate(sites)}
    return tape, read_combine(tape, Labels(token, candidate, T, C))


def at_slots(outs, w):
    """(T, 2) slots, un-permuted from rows sorted by expert."""
    picked = torch.stack(outs)[VISITS, torch.arange(T)[:, None]]
    return (picked * w.gather(1, VISITS)[..., None]).sum(1)


CHOSEN = torch.zeros(T, C).scatter(1, VISITS, 1.0)


@pytest.mark.parametrize(
    ("mix", "want"),
    [
        (lambda o, w: sum(w[:, c, None] * o[c] for c in range(C)), W),
        (lambda o, w: torch.einsum("tc,ctm->tm", w, torch.stack(o)), W),
        (lambda o, w: (torch.stack(o, 1) * w[..., None]).sum(1), W),
        (lambda o, w: torch.bmm(w[:, None], torch.stack(o, 1)).squeeze(1), W),
        (lambda o, w: torch.stack(o).mean(0), torch.full((T, C), 1 / 3)),
        (at_slots, W * CHOSEN),
        (lambda o, w: torch.where((w > 0.5)[:, :1], o[0] * 2, o[1] - o[2]), None),
    ],
)
def test_every_way_to_sum_gives_its_weights(mix, want):
    tape, found = read(mix)
    if want is None:
        hit = W[:, :1] > 0.5
        want = torch.where(hit, torch.tensor([[2.0, 0, 0]]), torch.tensor([[0, 1.0, -1.0]]))
    assert torch.equal(found.weights, want) and found.base is None
    value = tape.value(found.node)
    assert found.weights.dtype == torch.float32 and value.numel() == T * M and found.axis == value.dim() - 1


def test_features_may_lie_on_the_first_axis():
    tape, found = read(lambda o, w: torch.stack([a.t() * w[:, c] for c, a in enumerate(o)]).sum(0))
    assert found.axis == 0 and torch.equal(found.weights, W)


def test_the_sum_may_start_from_something():
    start = rand(T, M, seed=9)
    _, found = read(lambda o, w: torch.addcmul(start + w[:, :1] * o[0], w[:, 1:2], o[1]) + w[:, 2:] * o[2])
    assert torch.equal(found.base, start)
    # (base + weight) - base: the weight is rounded once at the size of the base
    torch.testing.assert_close(found.weights, W, atol=4e-7, rtol=0)


def test_rounding_of_the_weights_is_kept():
    _, found = read(lambda o, w: sum(w[:, c, None] * o[c] for c in range(C)), torch.bfloat16)
    assert found.weights.dtype == torch.bfloat16 and torch.equal(found.weights, W.bfloat16())


def test_rows_are_counted_by_visit():
    token = {0: torch.tensor([0, 1, -1, 1])}
    labels = Labels(token, {0: torch.tensor([0, 2, -1, 2])}, 2, 3)
    assert labels.visits().tolist() == [[1, 0, 0], [0, 0, 2]]


@pytest.mark.parametrize(
    ("mix", "nearest"),
    [
        (lambda o, w: (o[0], o[1], o[2]), "their outputs never meet in one tensor with a row per token"),
        (lambda o, w: torch.cat(o), "their outputs never meet in one tensor with a row per token"),
        (lambda o, w: torch.stack(o).sum((0, 1)), "their outputs never meet in one tensor with a row per token"),
        (lambda o, w: torch.stack(o).amax(0), "amax puts them together over the experts"),
        (lambda o, w: o[0] * o[1] + o[2], "is not linear in the experts' outputs"),
        (lambda o, w: o[0].tanh() + o[1] + o[2], "is not linear in the experts' outputs"),
        (lambda o, w: (sum(o), o[1]), "reads the result of single experts"),
    ],
)
def test_what_is_no_weighted_sum_is_declined(mix, nearest):
    with pytest.raises(Declined) as caught:
        read(mix)
    assert caught.value.reason.startswith("the experts' outputs are not combined by a weighted sum per token: ")
    assert nearest in caught.value.reason and "test_combine.py:" in caught.value.where


def test_outputs_that_are_not_put_back_in_order_are_declined():
    def fn(m, x):
        return torch.cat([x[3:] @ m.a, x[:3] @ m.b])

    tape = recorded(fn, rand(T, H), a=rand(H, M), b=rand(H, M, seed=1))
    first, second = find_sites(tape)
    token = {first: torch.arange(3, 6), second: torch.arange(3)}
    candidate = {first: torch.zeros(3, dtype=torch.long), second: torch.ones(3, dtype=torch.long)}
    with pytest.raises(Declined, match="row 0 of .* holds an expert that did not see that token"):
        read_combine(tape, Labels(token, candidate, T, 2))
