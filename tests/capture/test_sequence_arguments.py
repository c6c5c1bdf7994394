"""Arguments with one entry for each sequence follow the number of sequences in a probe call."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.capture.probe_inputs import call_specs, probe_call

X, LANGUAGE, CONDITION = torch.randn(4, 6, 8), torch.tensor([3, 0, 2, 1]), torch.randn(4, 5)


def test_they_are_repeated_from_their_start():
    reading = next(r for r in call_specs((X, LANGUAGE, CONDITION), {}) if any(leaf.dims for leaf in r.leaves))
    assert reading.grid == (4, 6)
    for variant in (0, 1, 2):
        (x, language, condition), _ = probe_call(reading, 30, 0, variant=variant)
        assert len(x) == len(language) == len(condition)
        assert torch.equal(language, LANGUAGE[torch.arange(len(x)) % 4])
        assert torch.equal(condition, CONDITION[torch.arange(len(x)) % 4])


def test_the_reading_that_leaves_them_as_they_are_comes_after_it():
    """Two samples' conditions beside three samples run in much code, which then dispatches two of the three."""
    follows = [any(leaf.dims for leaf in r.leaves) for r in call_specs((X, LANGUAGE), {})]
    assert follows[:2] == [True, False]


def test_one_sequence_tells_nothing():
    assert not any(leaf.dims for r in call_specs((X[:1], LANGUAGE[:1]), {}) for leaf in r.leaves)


@pytest.mark.parametrize("shape", [(12, 8), (1, 12, 8)])
@pytest.mark.parametrize("bounds", [[0, 5, 12], [0, 1, 1, 12], [0, 12]])
def test_bounds_of_packed_sequences_are_those_of_the_tokens_that_are_made(shape, bounds):
    reading = next(call_specs((torch.randn(shape), torch.tensor(bounds, dtype=torch.int32)), {}))
    made = [probe_call(reading, tokens, 0, variant=v)[0] for v, tokens in enumerate((48, 14, 20))]
    for x, new in made:
        assert new.dtype == torch.int32 and len(x.shape) == len(shape)
        assert x.shape[0] == 1 or len(shape) == 2
        assert new[0] == 0 and new[-1] == x[..., 0].numel() and bool((new.diff() > 0).all())
    assert len({len(new) for _, new in made}) == 3, "how many sequences there are must show as a size"


def test_lengths_of_packed_sequences_add_up():
    reading = next(call_specs((torch.randn(12, 8), torch.tensor([5, 7])), {}))
    for tokens in (48, 14, 1):
        (x, new), _ = probe_call(reading, tokens, 0)
        assert new.sum() == len(x) and bool((new > 0).all())


def test_lengths_beside_padded_sequences_are_no_longer_than_these():
    filled = next(
        r for r in call_specs((X, torch.tensor([6, 1, 6, 3])), {}) if any(leaf.role == "filled" for leaf in r.leaves)
    )
    for variant in (0, 1, 2):
        (x, new), _ = probe_call(filled, 30, 0, variant=variant)
        assert len(new) == len(x) and new.max() == x.shape[1] and new.min() >= 1
    assert len(new.unique()) > 1


@pytest.mark.parametrize(
    ("sizes", "numbers"),
    [
        ((12, 8), [1] * 12), ((12, 8), [0, 7, 5, 12]), ((12, 8), [0, 5, 11]), ((12, 8), [0, 3, 9]),
        ((4, 6, 8), [3, 0, 2, 1]), ((2, 6, 8), [5, 7]),
    ],
)  # fmt: skip
def test_other_integers_are_none(sizes, numbers):
    roles = {leaf.role for r in call_specs((torch.randn(sizes), torch.tensor(numbers)), {}) for leaf in r.leaves}
    assert roles.isdisjoint({"bounds", "lengths", "filled"})


class PerSequence(nn.Module):
    """Experts that are chosen for each of some packed sequences, by the mean of its tokens."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(4))

    def forward(self, x, cu_seqlens):
        sequence = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())
        total = x.new_zeros(len(cu_seqlens) - 1, 8).index_add(0, sequence, x)
        weights, ids = (part[sequence] for part in self.gate(total / cu_seqlens.diff()[:, None]).softmax(-1).topk(2))
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            y.index_add_(0, row, expert(x[row]) * weights[row, slot, None])
        return y


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_block_of_packed_sequences_is_rewritten_for_any_number_of_them(backend):
    torch.manual_seed(0)
    model = PerSequence().eval()
    optimised = moeopt.optimize(model, (torch.randn(12, 8), torch.tensor([0, 5, 12])), backend=backend, verify="fast")
    (block,) = optimised.report.blocks
    assert block.status == "rewritten", block.reason
    for bounds in ([0, 5, 12], [0, 2, 6, 9], [0, 4]):
        x, bounds = torch.randn(bounds[-1], 8), torch.tensor(bounds)
        with torch.no_grad():
            torch.testing.assert_close(optimised(x, bounds), model(x, bounds), rtol=1e-5, atol=1e-5)
