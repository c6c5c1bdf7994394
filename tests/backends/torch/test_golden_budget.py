"""What a golden run of a saved model may come back with: what verification measured that rounding moves it by."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moeopt
from moeopt.bundle.golden import golden_run, with_edges
from moeopt.errors import BundleError
from tests.backends.onnxrt.toys import call, net, reseal
from tests.toy_moe import Block, H

EPS = 2.0**-23


def _shifted(bundle, factor):
    """The bundle with another golden result, and the verdict on it."""
    path = bundle / "golden.safetensors"
    tensors, plain = load_file(path), safe_open(path, "pt").metadata()
    tensors["0.out.0"] *= factor
    save_file(tensors, path, plain)
    return moeopt.verify(reseal(bundle))


def test_the_budget_is_that_of_the_verification(tmp_path):
    made = moeopt.optimize(net(), call(), verify="fast")
    bundle, budget = made.save(tmp_path / "b"), made.certificate.end_to_end.budget
    assert json.loads((bundle / "moeopt.json").read_text())["golden"]["distance"] == budget > 8 * EPS
    assert _shifted(bundle, 1 + (budget + 8 * EPS) / 2).end_to_end.passed  # another form of a graph may round so
    wrong = _shifted(bundle, 1.001).end_to_end
    assert wrong.passed is False and f"where {budget:.2e} is allowed" in wrong.reason


def test_without_a_verification_it_is_what_rounding_moves_most_tokens_by(tmp_path):
    """8 eps at least: a shallow model is moved by less, one that takes a difference of near numbers by more."""
    budgets = []
    for sums in (2.0**-8, 64.0):
        torch.manual_seed(0)
        bundle = moeopt.optimize(_Differs(sums), torch.randn(6, H), verify="off").save(tmp_path / str(sums))
        budgets.append(json.loads((bundle / "moeopt.json").read_text())["golden"]["distance"])
        assert moeopt.verify(bundle).end_to_end.budget == budgets[-1]
    assert 8 * EPS <= budgets[0] < 32 * EPS and 64 * budgets[0] < budgets[1] < 0.01


class _Differs(torch.nn.Module):
    """``sums`` is how large the terms are whose difference counts."""

    def __init__(self, sums):
        super().__init__()
        self.block, self.sums = Block().eval(), sums
        self.more, self.less = torch.nn.Linear(H, H), torch.nn.Linear(H, H)
        self.less.load_state_dict(self.more.state_dict())

    def forward(self, x):
        return self.more(x) * self.sums + self.block(x) - self.less(x) * self.sums


@pytest.fixture
def on_the_edge(tmp_path):
    """A bundle of a router in which tokens 3 to 8 of twelve score two experts alike but for rounding."""
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(12, H)
    model.top_k = 1
    with torch.no_grad():
        axis = torch.nn.functional.normalize(torch.randn(H), dim=0)
        aside = torch.randn(H)
        model.gate.weight[1] = axis
        model.gate.weight[2] = axis + aside - (aside @ axis) * axis
        x[3:9] = axis * torch.linspace(4, 9, 6)[:, None]
    return moeopt.optimize(model, x, verify="off").save(tmp_path / "b")


def test_tokens_whose_choice_of_experts_is_on_the_edge_are_not_compared(on_the_edge):
    path = on_the_edge / "golden.safetensors"
    tensors, plain = load_file(path), safe_open(path, "pt").metadata()
    edges = tensors["0.edge.0"].tolist()
    assert edges and set(edges) <= set(range(3, 9))
    tensors["0.out.0"][edges] += 1
    save_file(tensors, path, plain)
    told = moeopt.verify(reseal(on_the_edge))
    assert (
        told.end_to_end.passed
        and f"; {len(edges)} rows, which rounding alone moves further, are left out" in told.notes[-1]
    )
    tensors["0.out.0"][0] *= 1.001
    save_file(tensors, path, plain)
    assert moeopt.verify(reseal(on_the_edge)).end_to_end.passed is False


@pytest.mark.parametrize("rows", [list(range(12)), [12], [-1], []])
def test_rows_that_are_not_compared_are_some_of_a_results(on_the_edge, rows):
    path = on_the_edge / "golden.safetensors"
    tensors, plain = load_file(path), safe_open(path, "pt").metadata()
    tensors["0.edge.0"] = torch.tensor(rows, dtype=torch.int64)
    save_file(tensors, path, plain)
    with pytest.raises(BundleError, match="rows that are not to be compared must be some of a result's 12"):
        moeopt.verify(reseal(on_the_edge))


def test_a_run_that_is_all_on_the_edge_says_nothing():
    y, ids = torch.randn(3, 4), torch.tensor([[1], [2], [3]])
    run, moved, other = golden_run((), {}, (y, ids)), y.clone(), ids.clone()
    moved[1], other[2] = moved[1] * 1.1, 0
    told = with_edges(run, [(moved, ids), (y, other)], 1e-3)
    assert {j: rows.tolist() for j, rows in told.edges.items()} == {0: [1], 1: [2]}
    assert with_edges(run, [(y * 1.1, ids)], 1e-3) is None and with_edges(run, [(y[:2], ids)], 1e-3) is None
    assert with_edges(run, [(y, ids)], 1e-3).edges == {}
    assert with_edges(run, [(moved, ids)], 1e-3, states={0}) is None  # a state is one row
