"""A sum of joined products and rows of biases becomes the products' own sums, of the same bits, or stays."""

import pytest
import torch
from torch import nn

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import record
from moeopt.recognise.gemm_sites import find_sites
from moeopt.recognise.joined_biases import split_joined_biases

E, K, M = 3, 4, 5
IDS = torch.tensor([0, 0, 0, 1, 2, 2])
COUNTS = (3, 1, 2)


class Linear(nn.Module):
    """(6, K) -> (6, M): rows in the order of their experts."""

    def __init__(self, join=torch.cat, add=torch.add):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(E, K, M)), nn.Parameter(torch.randn(E, M))
        self.join, self.add = join, add

    def forward(self, x):
        return self.add(self.join([rows @ w for rows, w in zip(x.split(COUNTS), self.w, strict=True)]), self.b[IDS])


class Behind(nn.Module):
    """The sum is the first call of a submodule, and others come before and after it."""

    def __init__(self):
        super().__init__()
        self.inner = Linear()
        self.plus = Plus()

    def forward(self, x):
        y = torch.cat([rows @ w for rows, w in zip((x * 2).split(COUNTS), self.inner.w, strict=True)])
        return self.plus(y, self.inner.b).relu()


class Plus(nn.Module):
    def forward(self, y, b):
        return y + b[IDS]


def tape_of(module):
    torch.manual_seed(0)
    return record(module(), (torch.randn(6, K),))


def recomputed(tape):
    """The tape's result from its inputs and Parameters alone."""
    inner = {n for n in tape.nodes if n.op == "call_function"}
    tape._values = {n: v for n, v in tape._values.items() if n not in inner}
    return tape.value(tape.output)


@pytest.mark.parametrize(
    "module", [Linear, lambda: Linear(add=lambda y, b: b + y), Linear], ids=["added", "added to", "again"]
)
def test_each_product_has_its_bias_and_the_bits_stay(module):
    tape = tape_of(module)
    want = tape.value(tape.output).clone()
    split_joined_biases(tape)
    split_joined_biases(tape)  # finds nothing more
    assert torch.equal(recomputed(tape), want)
    sites = find_sites(tape)
    assert [[(b.path, b.origin) for b in site.biases] for site in sites] == [[("b", (e, 0))] for e in range(E)]
    assert [n.meta["index"] for n in tape.nodes] == list(range(len(tape.nodes)))


def test_the_calls_of_modules_hold_the_nodes_that_they_held():
    tape = tape_of(Behind)
    want = tape.value(tape.output).clone()
    plus = tape.calls[1]
    before = [op_name(n) for n in tape.nodes]
    split_joined_biases(tape)
    assert [op_name(n) for n in tape.nodes] == before, "the joined rows go into a call, and stay as they are"
    plus.args = plus.args[1:]  # as if they did not
    split_joined_biases(tape)
    assert torch.equal(recomputed(tape), want)
    inside = [op_name(n) for n in tape.nodes[plus.first : plus.last]]
    assert inside[-2 * E - 2 :] == ["index", *["slice", "add"] * E, "cat"]
    assert [op_name(n) for n in tape.nodes[plus.last :]] == ["relu"]


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (lambda: Linear(join=lambda parts: torch.cat(parts).tanh()), "not the products themselves"),
        (lambda: Linear(add=lambda y, b: (y + b) * y), "the joined products are read by others too"),
        (lambda: Linear(add=lambda y, b: torch.add(y, b, alpha=2)), "a multiple of the rows"),
        (lambda: Linear(add=lambda y, b: y + b.relu()), "rows that are no weights"),
        (lambda: Linear(add=lambda y, b: y + b[0]), "one row for all"),
        (lambda: Linear(join=lambda parts: torch.cat([*parts, parts[0]], 0)[:6]), "a part of the joined"),
        (lambda: Linear(join=lambda parts: torch.cat([p.t() for p in parts], 1).t()), "side by side"),
    ],
)
def test_other_sums_stay(module, why):
    tape = tape_of(module)
    nodes = list(tape.nodes)
    split_joined_biases(tape)
    assert tape.nodes == nodes, why
