"""A file whose sizes are declared to be freer than they are: the new graph takes each that the file takes."""

import pytest
import torch
from torch import nn

import moeopt
from moeopt.backends.onnxrt.onnx_file.compare_files import compare_files
from moeopt.errors import NotEquivalentError, UsageError
from moeopt.onnx_in.read import read_onnx
from tests.onnx_in.hit_loops import H as HIT_H
from tests.onnx_in.hit_loops import hit_loop
from tests.onnx_in.toys import run

H, E = 8, 4


class Kinds(nn.Module):
    """Rows that a flag marks have a router and experts of their own, and so have the others."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(H, E) for _ in range(2))
        self.experts = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(H, i), nn.GELU(), nn.Linear(i, H)) for _ in range(E))
            for i in (12, 20)
        )

    def forward(self, x, mark):
        y = torch.zeros_like(x)
        for rows, gate, experts in zip((mark, ~mark), self.gates, self.experts, strict=True):
            kept = x[rows]
            weights, ids = gate(kept).softmax(-1).topk(2)
            total = torch.zeros_like(kept)
            for number, expert in enumerate(experts):
                row, slot = torch.where(ids == number)
                total.index_add_(0, row, expert(kept[row]) * weights[row, slot, None])
            y[rows] = total
        return y


def test_a_size_that_is_free_alone_stays_free(tmp_path):
    """The length is free in one input and six in the other: calls of six tokens run, of any batch."""
    torch.manual_seed(0)
    path = str(tmp_path / "home.onnx")
    example = torch.randn(2, 6, H), torch.tensor([[True, False] * 3] * 2)
    torch.onnx.export(
        Kinds().eval(), example, path, dynamo=False, input_names=["x", "mark"],
        dynamic_axes={"x": {0: "b", 1: "t"}, "mark": {0: "b"}}, opset_version=18,
    )  # fmt: skip
    found = moeopt.optimize(path, verify="fast")
    assert found.report.blocks[0].status == "rewritten"
    x, mark = torch.randn(3, 6, H), torch.rand(3, 6) < 0.5
    for flags in (mark, ~mark, torch.ones_like(mark)):
        torch.testing.assert_close(found(x=x, mark=flags), run(path, x=x, mark=flags)[0], rtol=1e-4, atol=1e-5)


def test_a_graph_that_refuses_a_call_of_the_file_is_not_kept(tmp_path):
    file = read_onnx(hit_loop("all", tmp_path / "all.onnx", 3))

    def refuses(**feeds):
        raise UsageError("x has size 5 in dimension 0")

    with pytest.raises(NotEquivalentError, match=r"refuses a call that the file takes, and was not kept: x has size 5"):
        compare_files(file, refuses, [{"x": torch.randn(5, HIT_H)}], {}, 0)
