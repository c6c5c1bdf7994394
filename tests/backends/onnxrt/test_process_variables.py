"""Variables that change what kernels compute: an engine that they were verified with is not loaded without them."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import moeopt
from moeopt.backends.onnxrt.int8_activations import VARIABLE
from moeopt.backends.onnxrt.process_variables import KEY, operators_of, variables
from moeopt.errors import UsageError
from tests.backends.onnxrt.lowerings.one_site import session_of
from tests.onnx_in.test_left_alone import moe_file, qmoe_file

pytestmark = pytest.mark.one_isa  # what the environment says of a process

SIZE = 128
ASK = """
import sys, numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1])
np.save(sys.argv[2], session.run(None, {"x": np.random.default_rng(1).standard_normal((6, 128)).astype("f4")})[0])
"""


def child(code, *words, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ORT_")}
    words = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(words, env=clean | environment, capture_output=True, text=True, timeout=300)


def blocks_of_4_bits(path):
    """A QMoE of 4 bits in blocks of 32 on codes that are no chance: the kernel that a variable replaces."""
    draw, E = np.random.default_rng(0), 2
    held = {"w1": draw.integers(0, 256, (E, SIZE, SIZE // 2)), "w2": draw.integers(0, 256, (E, SIZE, SIZE // 2))}
    held = {name: array.astype(np.uint8) for name, array in held.items()}
    held |= {n: draw.uniform(0.01, 0.02, (E, SIZE, SIZE // 32)).astype(np.float32) for n in ("s1", "s2")}
    held["gate"] = draw.standard_normal((SIZE, E)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "gate"], ["logits"]),
        helper.make_node(
            "QMoE", ["x", "logits", "w1", "s1", "", "w2", "s2"], ["y"], domain="com.microsoft", k=1,
            activation_type="silu", normalize_routing_weights=1, expert_weight_bits=4, block_size=32,
        ),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["t", SIZE]) for n in "xy"]
    constants = [numpy_helper.from_array(array, name) for name, array in held.items()]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def test_the_variable_changes_the_numbers_of_a_qmoe(tmp_path):
    """The trap: two processes, one file, two answers."""
    path, answers = blocks_of_4_bits(tmp_path / "q.onnx"), []
    for value in ({}, {VARIABLE: "int8"}):
        assert child(ASK, path, tmp_path / "y.npy", **value).returncode == 0
        answers.append(np.load(tmp_path / "y.npy"))
    off = float(np.abs(answers[0] - answers[1]).max() / np.abs(answers[0]).max())
    if off == 0:
        pytest.skip("this CPU or version computes it alike")
    assert off > 1e-3


def test_an_engine_is_refused_where_a_variable_differs(tmp_path, monkeypatch):
    for name in [n for n in os.environ if n.startswith("ORT_")]:
        monkeypatch.delenv(name)
    made = moeopt.optimize(qmoe_file(tmp_path / "q.onnx"))
    assert not any("set in the process" in note for note in made.report.notes)
    folder = made.save(tmp_path / "out")
    assert KEY not in json.loads((folder / "moeopt.json").read_text())
    moeopt.load(folder)
    want = (
        f"the engine was verified with the variable {VARIABLE} not set, and in this process it is 'int8': its QMoE "
        f"nodes compute other numbers then. For this engine unset {VARIABLE} before it starts, or optimise the model"
    )
    with pytest.MonkeyPatch.context() as here, pytest.raises(UsageError, match=re.escape(want)):
        here.setenv(VARIABLE, "int8")
        moeopt.load(folder)
    # a variable that leaves chosen experts out is as bad
    with pytest.MonkeyPatch.context() as here, pytest.raises(UsageError, match="ORT_QMOE_MIN_EXPERT_WEIGHT"):
        here.setenv("ORT_QMOE_MIN_EXPERT_WEIGHT", "0.2")
        moeopt.load(folder)
    monkeypatch.setenv("ORT_LOG_LEVEL", "3")
    moeopt.load(folder)


def test_a_variable_that_was_set_is_remembered_and_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "fp32")
    made = moeopt.optimize(qmoe_file(tmp_path / "q.onnx"))
    for notes in (made.report.notes, made.certificate.notes):
        assert f"verified with {VARIABLE}=fp32 set in the process" in " ".join(notes)
    folder = made.save(tmp_path / "out")
    assert json.loads((folder / "moeopt.json").read_text())[KEY] == {VARIABLE: "fp32"}
    assert moeopt.verify(folder).passed is True
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(UsageError, match=f"{VARIABLE} set to 'fp32', and in this process it is not set.*=fp32"):
        moeopt.load(folder)


def test_a_graph_without_a_qmoe_asks_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "int8")
    folder = moeopt.optimize(moe_file(tmp_path / "m.onnx")).save(tmp_path / "out")
    assert KEY not in json.loads((folder / "moeopt.json").read_text())
    assert variables(operators_of(onnx.load(folder / "model.onnx"))) == {}
    moeopt.load(folder)
    assert session_of(onnx.load(blocks_of_4_bits(tmp_path / "q.onnx"))) is not None
    assert list(variables(operators_of(onnx.load(tmp_path / "q.onnx")))) == [VARIABLE]
