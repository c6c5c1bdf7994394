"""The saved graph is one that others can read and run: names, checker, shapes, plain ONNX Runtime."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxruntime")

import onnxruntime as ort

from moeopt.bundle.io_names import input_names, output_names
from tests.backends.onnxrt.toys import E, H, call, net


def proto_of(bundle):
    import onnx

    return onnx.load(bundle / "model.onnx", load_external_data=False)


def test_plain_onnx_runtime_runs_it(onnx_pristine):
    session = ort.InferenceSession(onnx_pristine / "model.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x", "mask"]
    names = [o.name for o in session.get_outputs()]
    assert names == ["x_out", "states.0", "states.1"], "a result named as an input gets another name"
    inputs = call(3, 7)
    got = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        want = net()(**inputs)
    for one, two in zip(got, (want["x"], *want["states"]), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), two, rtol=0, atol=64 * torch.finfo(torch.float32).eps)


def test_the_checker_and_shape_inference_pass(onnx_pristine):
    import onnx

    path = str(onnx_pristine / "model.onnx")
    onnx.checker.check_model(path)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
    known = {v.name: v for v in inferred.graph.value_info}
    assert len(known) > len(inferred.graph.node) // 2
    dims = [d.dim_value or d.dim_param for d in inferred.graph.output[0].type.tensor_type.shape.dim]
    assert dims == ["x_0", "x_1", H]
    used = {d.dim_param for v in inferred.graph.value_info for d in v.type.tensor_type.shape.dim}
    assert not [word for word in used if re.search(r"\b[su]\d+\b", word)], "sizes of the exporter's own"


def test_names_are_unique_and_say_the_block(onnx_pristine):
    proto = proto_of(onnx_pristine)
    names = [n.name for n in proto.graph.node]
    values = [o for n in proto.graph.node for o in n.output if o] + [t.name for t in proto.graph.initializer]
    values += [v.name for v in proto.graph.input]
    assert all(names) and len(set(names)) == len(names) and len(set(values)) == len(values)
    blocks = {}
    for node in proto.graph.node:
        for prop in node.metadata_props:
            if prop.key == "moeopt.block":
                assert node.name.startswith(f"{prop.value}/")
                blocks[prop.value] = blocks.get(prop.value, 0) + 1
    assert set(blocks) == {"layers.0", "layers.1"} and len(set(blocks.values())) == 1
    assert len([name for name in names if name.startswith(tuple(f"{block}/" for block in blocks))]) == sum(
        blocks.values()
    ), "only a block's nodes begin with its name"
    assert {"layers.0.forward", "layers.1.forward"} <= {name.partition("/")[0] for name in names}
    assert not [name for name in names if name.startswith("node_")]
    assert {p.key for p in proto.metadata_props} == {"moeopt.version"} and proto.producer_name == "moeopt"


def test_no_path_of_the_machine_that_saved_it(onnx_pristine):
    blob = (onnx_pristine / "model.onnx").read_bytes()
    assert str(Path(__file__).parent).encode() not in blob and b"stack_trace" not in blob and b".py" not in blob


def test_weights_are_outside(onnx_pristine):
    outside = [t for t in proto_of(onnx_pristine).graph.initializer if t.external_data]
    assert {e.value for t in outside for e in t.external_data if e.key == "location"} == {"model.onnx.data"}
    assert sum(t.dims[0] == E for t in outside if len(t.dims) == 3) >= 2


def signature(parameters, positional, keys, keywords, out="*"):
    tree = {"type": "tuple", "items": positional}, {"type": "dict", "keys": keys, "items": keywords}
    return {"parameters": parameters, "in_tree": {"type": "tuple", "items": list(tree)}, "out_tree": out}


PAIR = {"type": "tuple", "items": ["*", "*"]}


@pytest.mark.parametrize(
    ("call_", "ins", "outs"),
    [
        (signature(["x"], ["*"], [], []), ["x"], ["output"]),
        (signature(["x", "m"], ["*"], ["m"], [PAIR], PAIR), ["x", "m.0", "m.1"], ["output.0", "output.1"]),
        (signature([], ["*", "*"], [], []), ["args.0", "args.1"], ["output"]),
        (
            signature(
                ["a b", "a_b"], ["*", "*"], [], [], {"type": "dict", "keys": ["a_b", "out"], "items": ["*", PAIR]}
            ),
            ["a_b", "a_b_2"],
            ["a_b_out", "out.0", "out.1"],
        ),
        (signature(["output"], ["*"], [], []), ["output"], ["output_out"]),
    ],
    ids=["one", "nested", "unnamed", "same words", "named output"],
)
def test_names_of_the_ends(call_, ins, outs):
    assert input_names(call_) == ins
    assert output_names(call_, ins) == outs
