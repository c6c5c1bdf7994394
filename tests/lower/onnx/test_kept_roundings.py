"""Roundings to 16 bits that decide are in an engine's graph, and no others."""

import pytest
import torch
import torch.nn.functional as F

from moeopt.errors import NotSaveableError
from tests.lower.onnx.emitted import graph_of, session_of

T = 700
X = torch.linspace(0.5, 1.5, T)
W = torch.linspace(-1, 1, 7 * 4).view(7, 4)


def flags(x, dtype=torch.bfloat16):
    return (x > 0).to(dtype)


ASKED = {
    "sums in float16": lambda x: ((8 * x).half() + 3 - x.half()).float(),
    "a product that overflows": lambda x: (x.half() * 60000 * 2).float(),
    "a mask that overflows": lambda x: (x.half() + (x > 1).half() * -1e9).float().isinf().float(),
    "each step of several": lambda x: ((3 * x).bfloat16().exp() / 7 + 1).float(),
}
"""In a graph whose weights are wider."""
COUNTED = {
    "places": lambda x: flags(x).cumsum(0),
    "places in a capacity": lambda x: (flags(x).cumsum(0) - 1 < 300.5).float(),
    "counts": lambda x: F.one_hot(x.round().long(), 4).bfloat16().sum(0) * 3,
    "counts above 2048": lambda x: flags(torch.stack([x, x, x, x]), torch.float16).sum() - 1,
    "a product of masks": lambda x: flags(x)[None] @ flags(x)[:, None] + 1,
    "a number of integers": lambda x: (torch.arange(T) + x.long()).to(torch.bfloat16),
    "counts that are scattered": lambda x: torch.zeros(4).bfloat16().scatter_add(0, x.round().long(), flags(x)),
    "a multiple": lambda x: flags(x).cumsum(0) * 3,
}
"""In any graph."""


def outputs(f, x=X):
    graph = graph_of(f, x).graph
    return session_of(f, x).run({graph.inputs[0].name: x})[0], f(x), [node.op_type for node in graph]


@pytest.mark.parametrize("name", ASKED)
def test_a_graph_of_wider_weights_rounds_where_its_code_does(name):
    got, want, _ = outputs(ASKED[name])
    assert torch.equal(got, want)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", COUNTED)
def test_whole_numbers_are_rounded_in_a_graph_of_16_bit_weights_too(name):
    def f(x):
        return COUNTED[name](x).float() + (x[:7].bfloat16() @ W.bfloat16()).float().sum() * 0

    got, want, _ = outputs(f)
    assert torch.equal(got, want)


def test_a_graph_of_16_bit_weights_has_no_other_rounding():
    weight = torch.linspace(-1, 1, 40 * 40).view(40, 40).bfloat16()

    def f(x):
        return ((x[:40].bfloat16() @ weight).sigmoid() * 2).softmax(-1).float()

    assert outputs(f)[2].count("Cast") <= 2


@pytest.mark.parametrize("put", ["index_add", "index_put"])
def test_counts_that_stop_where_a_sum_is_rounded_down_are_no_engine(put):
    def f(x):
        zeros, ids = torch.zeros(4, dtype=torch.bfloat16), x.round().long()
        if put == "index_add":
            return zeros.index_add(0, ids, flags(x)).float()
        return zeros.index_put((ids,), flags(x), accumulate=True).float()

    assert f(torch.ones(T))[1] == 256
    with pytest.raises(
        NotSaveableError, match="it counts in bfloat16 by index_add or index_put, one by one, which stops"
    ):
        outputs(f)
