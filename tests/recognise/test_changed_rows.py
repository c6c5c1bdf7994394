"""Experts of which one changes its rows first: told so, of a module and of a file; folded into a bias it is none."""

import pytest
import torch
from torch import nn

import moeopt

H, E = 8, 4


class Changed(nn.Module):
    """(T, H) -> (T, H); to the rows of ``some`` experts a vector is added, or they are scaled."""

    def __init__(self, some, how=torch.add, dense=False):
        super().__init__()
        torch.manual_seed(0)
        self.some, self.how, self.dense = some, how, dense
        self.gate, self.by = nn.Linear(H, E), nn.Parameter(torch.randn(E, H))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, 12), nn.GELU(), nn.Linear(12, H)) for _ in range(E))

    def forward(self, x):
        probs = self.gate(x).softmax(-1)
        weights, ids = probs.topk(2, -1)
        table, y = torch.zeros_like(probs).scatter(1, ids, weights), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(ids == number)
            mine = x if self.dense else x[row]
            mine = self.how(mine, self.by[number]) if number in self.some else mine
            if self.dense:
                y = y + table[:, number, None] * expert(mine)
            else:
                y = y.index_add(0, row, expert(mine) * weights[row, slot, None])
        return y


def reason_of(target, x):
    (block,) = [b for b in moeopt.explain(target, x).blocks if b.kind == "moe"]
    assert (block.status, block.experts) == ("declined", E)
    return block.reason


@pytest.mark.parametrize(
    ("some", "how", "dense", "said"),
    [
        ({1}, torch.add, False, "1 of its 4 experts reads rows that are changed first (add), where the others read"),
        ({2}, torch.mul, True, "1 of its 4 experts reads rows that are changed first (mul), where the others read"),
    ],
)
def test_it_is_told_by_the_call_that_changes_them(some, how, dense, said):
    reason = reason_of(Changed(some, how, dense).eval(), torch.randn(12, H))
    assert reason.startswith(said) and "they do not all compute the same function of a row" in reason


def test_a_file_of_it_is_not_told_as_broken(tmp_path):
    path = str(tmp_path / "home.onnx")
    torch.onnx.export(
        Changed({1}).eval(), (torch.randn(9, H),), path, dynamo=False, input_names=["x"],
        dynamic_axes={"x": {0: "n"}}, opset_version=17,
    )  # fmt: skip
    reason = reason_of(path, None)
    assert reason.startswith("1 of its 4 experts reads rows that are changed first (add)")


def test_the_change_folded_into_a_bias_is_no_obstacle():
    given, folded = Changed({1}).eval(), Changed(()).eval()
    with torch.no_grad():
        folded.experts[1][0].bias += folded.experts[1][0].weight @ folded.by[1]
    x = torch.randn(12, H)
    torch.testing.assert_close(folded(x), given(x), rtol=1e-5, atol=1e-5)
    found = moeopt.optimize(folded, x, verify="fast")
    assert [(b.status, b.experts) for b in found.report.blocks] == [("rewritten", E)]
