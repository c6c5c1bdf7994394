"""Arguments with one entry for each sequence follow the number of sequences in a probe call."""

import torch

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


def test_the_reading_that_leaves_them_as_they_are_comes_first():
    first = next(iter(call_specs((X, LANGUAGE), {})))
    assert not any(leaf.dims for leaf in first.leaves)


def test_one_sequence_tells_nothing():
    assert not any(leaf.dims for r in call_specs((X[:1], LANGUAGE[:1]), {}) for leaf in r.leaves)
