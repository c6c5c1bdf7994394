"""Hostile ONNX bundles: signatures of wrong types, and graphs that loop, grow or hold what moeopt does not write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.hostile.edits import Change, Made, edited, put, reseal


def made() -> Iterator[Made]:
    yield from _signatures()
    yield from _onnx()


def _signatures() -> Iterator[Made]:
    wrong = {
        "in_tree": [7, "*", [], {"type": []}],
        "out_tree": [7, [], {"type": {}, "items": []}],
        "inputs": [7, [7], [{}], [{"name": "x", "onnx": []}]],
        "outputs": [7, [7], [{}], [{"tensor": -1}], [{"tensor": 99, "onnx": "x_out"}]],
        "parameters": [7, [[]]],
        "sizes": [[], {"s0": "x"}],
        "causal_lm": [7, [], {}, {"inputs": []}],
    }
    for key, values in wrong.items():
        for n, value in enumerate(values):
            yield f"signature {key} wrong {n}", "onnxruntime", edited("signature.json", put(key, value=value))


def onnx_edited(change: Callable[[Any], Any]) -> Change:
    """Change the protobuf of ``model.onnx``, and reseal."""

    def apply(bundle: Path) -> None:
        import onnx

        proto = onnx.load(bundle / "model.onnx", load_external_data=False)
        change(proto)
        (bundle / "model.onnx").write_bytes(proto.SerializeToString())
        reseal(bundle)

    return apply


def grown(*nodes: tuple[Any, ...], **weights: Any) -> Change:
    """An ONNX graph that computes ``nodes`` from ``weights`` too, and adds the size of the last to its result."""

    def change(proto: Any) -> None:
        import numpy
        import onnx
        from onnx import helper, numpy_helper

        graph = proto.graph
        for name, value in weights.items():
            graph.initializer.append(numpy_helper.from_array(numpy.asarray(value), f"zz_{name}"))
        for n, (op, inputs, *attributes) in enumerate(nodes):
            graph.node.append(
                helper.make_node(op, inputs, [f"zz{n}"], name=f"zz{n}", **(attributes[0] if attributes else {}))
            )
        last, result = f"zz{len(nodes) - 1}", graph.output[0].name
        for node in graph.node:
            node.output[:] = ["zz_result" if o == result else o for o in node.output]
        zero = onnx.numpy_helper.from_array(numpy.zeros((), numpy.float32), "zz_zero")
        graph.initializer.append(zero)
        graph.node.append(helper.make_node("ReduceMax", [last], ["zz_most"], keepdims=0))
        graph.node.append(helper.make_node("Cast", ["zz_most"], ["zz_float"], to=1))
        graph.node.append(helper.make_node("Mul", ["zz_float", "zz_zero"], ["zz_none"]))
        graph.node.append(helper.make_node("Add", ["zz_result", "zz_none"], [result]))

    return onnx_edited(change)


def _looped(trips: int, grow: bool = False) -> Change:
    from onnx import TensorProto, helper

    step = "Concat" if grow else "Add"
    inner = [
        helper.make_node("Identity", ["c"], ["co"]),
        helper.make_node(step, ["v", "v" if grow else "zz_one"], ["vo"], **({"axis": 0} if grow else {})),
    ]
    kinds = [("i", TensorProto.INT64, []), ("c", TensorProto.BOOL, []), ("v", TensorProto.FLOAT, [None])]
    takes = [helper.make_tensor_value_info(*kind) for kind in kinds]
    gives = [helper.make_tensor_value_info("co", 9, []), helper.make_tensor_value_info("vo", 1, [None])]
    body = helper.make_graph(inner, "body", takes, gives)
    return grown(
        ("Loop", ["zz_trips", "zz_true", "zz_one"], {"body": body}), trips=trips, true=True, one=torch.ones(1).numpy()
    )


def _onnx() -> Iterator[Made]:
    big, wide = [1 << 30], [1 << 15, 1 << 16]
    sized: dict[str, Change] = {
        "a loop of 2^62 trips": _looped(1 << 62),
        "a loop of 10^9 trips": _looped(10**9),
        "a loop that doubles": _looped(40, grow=True),
        "a constant of 2^30": grown(("ConstantOfShape", ["zz_s"]), s=big),
        "a constant of 2^40": grown(("ConstantOfShape", ["zz_s"]), s=[1 << 40]),
        "expanded": grown(("Expand", ["zz_x", "zz_s"]), x=torch.ones(1).numpy(), s=wide),
        "tiled": grown(("Tile", ["zz_x", "zz_s"]), x=torch.ones(1, 1).numpy(), s=wide),
        "a range": grown(("Range", ["zz_a", "zz_b", "zz_c"]), a=0, b=1 << 33, c=1),
        "padded": grown(("Pad", ["zz_x", "zz_s"]), x=torch.ones(1).numpy(), s=[0, 1 << 32]),
        "resized": grown(
            ("Resize", ["zz_x", "", "", "zz_s"], {"mode": "nearest"}),
            x=torch.ones(1, 1, 2, 2).numpy(),
            s=[1, 1, 1 << 15, 1 << 15],
        ),
        "an outer product": grown(
            ("ConstantOfShape", ["zz_s"]), ("Unsqueeze", ["zz0", "zz_a"]), ("Mul", ["zz0", "zz1"]), s=[1 << 16], a=[1]
        ),
        "a matmul": grown(
            ("ConstantOfShape", ["zz_s"]),
            ("ConstantOfShape", ["zz_t"]),
            ("MatMul", ["zz0", "zz1"]),
            s=[1 << 16, 1],
            t=[1, 1 << 16],
        ),
        "sizes from sizes": grown(
            ("Shape", ["x"]), ("Mul", ["zz0", "zz_k"]), ("ConstantOfShape", ["zz1"]), k=[1 << 10, 1 << 10, 1 << 7]
        ),
        "sizes from values": grown(
            ("ReduceSum", ["mask"], {"keepdims": 0}),
            ("Cast", ["zz0"], {"to": 7}),
            ("Unsqueeze", ["zz1", "zz_a"]),
            ("Mul", ["zz2", "zz_k"]),
            ("ConstantOfShape", ["zz3"]),
            a=[0],
            k=[1 << 27],
        ),
        "one hot": grown(
            ("ConstantOfShape", ["zz_s"]),
            ("Cast", ["zz0"], {"to": 7}),
            ("OneHot", ["zz1", "zz_d", "zz_v"]),
            s=[1 << 15],
            d=1 << 15,
            v=[0.0, 1.0],
        ),
        "an identity": grown(("ConstantOfShape", ["zz_s"]), ("EyeLike", ["zz0"]), s=wide),
        "a random tensor": grown(("RandomNormal", [], {"shape": [1 << 30]})),
        "a column of products": grown(
            ("ConstantOfShape", ["zz_s"]), ("MatMul", ["zz0", "zz0"]), ("MatMul", ["zz1", "zz1"]), s=[1 << 13, 1 << 13]
        ),
    }
    for name, change in sized.items():
        yield name, "onnxruntime", change
    edits: dict[str, Callable[[Any], Any]] = {
        "nodes without inputs": lambda p: [n.ClearField("input") for n in p.graph.node],
        "no nodes": lambda p: p.graph.ClearField("node"),
        "no inputs": lambda p: p.graph.ClearField("input"),
        "no outputs": lambda p: p.graph.ClearField("output"),
        "no opset": lambda p: p.ClearField("opset_import"),
        "opset 9999": lambda p: setattr(p.opset_import[0], "version", 9999),
        "an unknown operator": lambda p: p.graph.node.add(op_type="Nothing", name="n", output=["never"]),
        "a weight of no dtype": lambda p: setattr(p.graph.initializer[0], "data_type", 99),
        "a weight of negative sizes": lambda p: p.graph.initializer[0].dims.append(-1),
        "a weight at an address": lambda p: p.graph.initializer.add(
            name="a", data_type=1, dims=[4], data_location=1
        ).external_data.add(key="location", value="*/_ORT_MEM_ADDR_/*"),
        "a sparse weight": lambda p: p.graph.sparse_initializer.add(),
        "training": lambda p: p.training_info.add(),
        "a cycle": lambda p: p.graph.node[0].input.__setitem__(0, p.graph.node[-1].output[0]),
    }
    for name, edit in edits.items():
        yield name, "onnxruntime", onnx_edited(edit)
