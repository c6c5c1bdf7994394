"""A graph that ends the process in an optimiser of ONNX Runtime, which is for convolutions, is opened without it."""

import subprocess
import sys

import onnx
import onnx.parser
import onnxruntime
import pytest
import torch

from moeopt.backends.onnxrt.idle_optimizers import NCHWC, idle_optimizers
from moeopt.backends.onnxrt.session import Session

MATMUL = """
    p = Transpose <perm = [1, 2, 0]> (b)
    f = Cast <to = 1> (p)
    y = MatMul(f, x)
"""
OPENED = """
import sys, torch
from moeopt.backends.onnxrt.session import Session
session = Session(sys.argv[1])
s, x = torch.eye(3)[:, :, None].expand(3, 3, 2).contiguous(), torch.arange(12.0).view(3, 4)
print(session.run({"s": s, "x": x})[0][:, 0].tolist())
"""


def graph(nodes):
    text = '<ir_version: 9, opset_import: ["" : 17]> g (float[t, 3, 2] s, float[t, 4] x) => (float[3, 2, 4] y) {'
    return onnx.parser.parse_model(f"{text}\n b = Cast <to = 9> (s)\n {nodes} }}")


@pytest.mark.parametrize(
    ("nodes", "left_out"),
    [
        (MATMUL, [NCHWC]),
        ("c = MaxPool <kernel_shape = [1]> (s)" + MATMUL, []),
        ("c = Conv(s, s)" + MATMUL, []),
        ("c = QLinearConv(s, s, s, s, s, s, s, s)" + MATMUL, []),
    ],
)
def test_it_is_left_out_where_no_operator_has_its_layout(nodes, left_out, tmp_path):
    onnx.save(made := graph(nodes), tmp_path / "m.onnx")
    for model in (made.SerializeToString(), tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        assert idle_optimizers(model, "cpu") == left_out
        assert idle_optimizers(model, "cuda") == []


def test_what_is_no_file_is_left_to_the_session(tmp_path):
    assert idle_optimizers(tmp_path / "none.onnx", "cpu") == []
    (tmp_path / "empty.onnx").touch()
    assert idle_optimizers(tmp_path / "empty.onnx", "cpu") == []


def test_a_session_leaves_it_out(monkeypatch):
    made, seen = onnxruntime.InferenceSession, []

    def recorded(*args, **fields):
        seen.append(fields["disabled_optimizers"])
        return made(*args, **fields)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recorded)
    Session(graph("f = Transpose <perm = [1, 2, 0]> (s)\n y = MatMul(f, x)").SerializeToString())
    assert seen == [[NCHWC]]


@pytest.mark.nightly
def test_a_graph_that_ends_the_process_runs(tmp_path):
    """In a process of its own, which ONNX Runtime 1.32 ends with signal 11 where the optimiser is not left out."""
    onnx.save(graph(MATMUL), tmp_path / "m.onnx")
    done = subprocess.run([sys.executable, "-c", OPENED, str(tmp_path / "m.onnx")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(torch.arange(12.0).view(3, 4).tolist())
