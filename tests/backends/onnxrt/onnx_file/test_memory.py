"""What optimising a file takes of its own memory: one layer's weights, however many layers the file has."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moeopt.backends.onnxrt.custom_op import native_library
from tests import children

if not Path("/proc/self/status").exists():
    pytest.skip("this system does not tell what memory is a process's own", allow_module_level=True)

CHILD = (
    children.WATCHES_MEMORY
    + """
import json, sys
import moeopt
from moeopt.backends.onnxrt import backend, measured_sites, native_choice, plan
from moeopt.verification import float64_decompositions

native_choice.measuring = lambda: True
native_choice.fastest = lambda question, ways, default, advantage: default
if sys.argv[3] == "small":  # what is large is so for models of gigabytes
    backend.MOST_PACKED = plan.PACKED = plan.HELD = 1 << 20
    float64_decompositions.AT_ONCE = 1 << 19

moeopt.optimize(sys.argv[2], verify="fast")  # libraries have their buffers
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
made = moeopt.optimize(sys.argv[1], verify="fast")
time.sleep(0.01)
statuses = [block.status for block in made.report.blocks]
print(json.dumps({"peak": peak[0] - before, "statuses": statuses, "passed": made.certificate.passed}))
"""
)


def layers(path, count, experts, hidden, inner):
    """A file of ``count`` layers of dense experts, a stack of matrices each, its weights in a file beside it."""
    draw, nodes, weights = np.random.default_rng(0), [], []
    constants = {"k": [2], "first": [0], "last": [-1]}
    weights += [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    weights.append(numpy_helper.from_array(np.float32(0), "zero"))
    data = Path(f"{path}.data")

    def node(op, reads, *made, **attributes):
        nodes.append(helper.make_node(op, reads, list(made), name=made[0], **attributes))

    with data.open("wb") as out:

        def weight(name, *shape):
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
            array = draw.standard_normal(shape, dtype=np.float32) * np.float32(shape[-2] ** -0.5)
            places = {"location": data.name, "offset": out.tell(), "length": array.nbytes}
            tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in places.items())
            out.write(array.tobytes() + b"\0" * (-array.nbytes % 4096))
            weights.append(tensor)
            return name

        x = "x"
        for n in range(count):
            at = f"layers.{n}.mlp"
            node("MatMul", [x, weight(f"{at}.gate", hidden, experts)], f"{at}.logits")
            node("TopK", [f"{at}.logits", "k"], f"{at}.values", f"{at}.ids", axis=-1)
            node("Softmax", [f"{at}.values"], f"{at}.weights", axis=-1)
            node("Mul", [f"{at}.logits", "zero"], f"{at}.zeros")
            node("ScatterElements", [f"{at}.zeros", f"{at}.ids", f"{at}.weights"], f"{at}.table", axis=-1)
            node("Unsqueeze", [x, "first"], f"{at}.rows")
            node("MatMul", [f"{at}.rows", weight(f"{at}.up", experts, hidden, inner)], f"{at}.in")
            node("Relu", [f"{at}.in"], f"{at}.act")
            node("MatMul", [f"{at}.act", weight(f"{at}.down", experts, inner, hidden)], f"{at}.out")
            node("Transpose", [f"{at}.table"], f"{at}.turned", perm=[1, 0])
            node("Unsqueeze", [f"{at}.turned", "last"], f"{at}.columns")
            node("Mul", [f"{at}.out", f"{at}.columns"], f"{at}.weighed")
            node("ReduceSum", [f"{at}.weighed", "first"], f"{at}.sum", keepdims=0)
            node("Add", [x, f"{at}.sum"], f"{at}.y")
            x = f"{at}.y"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["t", hidden]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


SIZES = {"small": (3, 16, 512, 384), "2 GB": (8, 32, 1024, 1024)}


@pytest.mark.parametrize("size", ["small", pytest.param("2 GB", marks=pytest.mark.nightly)])
def test_no_more_than_one_layer_is_taken_beside_the_file(size, tmp_path):
    if native_library() is None:
        pytest.skip("ONNX Runtime's own products pack a copy of each weight, which is what the engine holds")
    count, experts, hidden, inner = SIZES[size]
    layer = 2 * experts * hidden * inner * 4
    file = layers(tmp_path / "file.onnx", count, experts, hidden, inner)
    tiny = layers(tmp_path / "tiny.onnx", 1, 4, 32, 16)
    done = children.run([sys.executable, "-c", CHILD, file, tiny, size], timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["statuses"] == ["rewritten"] * count and found["passed"]
    assert found["peak"] < 1.1 * layer + (40 << 20)  # and what tracing and verifying take
