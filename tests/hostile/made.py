"""Hostile bundles made by hand, as changes to two good ones whose manifests are made to agree with them again.

Each is a name, the good bundle that it starts from, and a change of its directory. None may be taken for good.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

GOOD = Path(__file__).parents[1] / "fixtures" / "bundles"
Change = Callable[[Path], None]
Made = tuple[str, str, Change]
CODE = {"torch": "graph.json", "onnxruntime": "signature.json"}
DEEP = "[" * 5000 + "]" * 5000


def reseal(bundle: Path) -> None:
    """Make the manifest agree with the files again, as an attacker would."""
    data = json.loads((bundle / "moeopt.json").read_text())
    for name in data["files"]:
        if (bundle / name).is_file():
            blob = (bundle / name).read_bytes()
            data["files"][name] = {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}
    (bundle / "moeopt.json").write_text(json.dumps(data))


def edited(name: str, change: Callable[[Any], Any]) -> Change:
    """Change the JSON of a file, and reseal; what ``change`` returns takes its place, if anything."""

    def apply(bundle: Path) -> None:
        data = json.loads((bundle / name).read_text())
        new = change(data)
        (bundle / name).write_text(json.dumps(data if new is None else new))
        if name != "moeopt.json":
            reseal(bundle)

    return apply


def written(name: str, blob: bytes) -> Change:
    def apply(bundle: Path) -> None:
        (bundle / name).write_bytes(blob)
        reseal(bundle)

    return apply


def put(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = copy.deepcopy(value)

    return change


def made() -> list[Made]:
    """All of them."""
    return [*_files(), *_manifests(), *_certificates(), *_conditions(), *_golden(), *_graphs(), *_signatures(), *_onnx()]


def _files() -> Iterator[Made]:
    for base in CODE:
        for name in sorted(p.name for p in (GOOD / base).iterdir()):
            yield f"{name} missing", base, lambda b, n=name: (b / n).unlink()
            yield f"{name} a fifo", base, lambda b, n=name: ((b / n).unlink(), os.mkfifo(b / n))
            yield f"{name} a symlink", base, lambda b, n=name: ((b / n).unlink(), (b / n).symlink_to("/dev/zero"))
            yield f"{name} a directory", base, lambda b, n=name: ((b / n).unlink(), (b / n).mkdir())
            if name != "moeopt.json" and not name.endswith(".data"):
                yield f"{name} empty", base, written(name, b"")
                yield f"{name} not UTF-8", base, written(name, b"\xff\xfe\x00\x9f" * 9)
                unlisted = edited("moeopt.json", lambda d, n=name: d["files"].pop(n) and None)
                yield f"{name} not listed", base, unlisted
            if name.endswith(".json"):
                for what, text in (("deep", DEEP), ("of NaN", "NaN"), ("a number", "7"), ("a list", "[]"), ("null", "null")):
                    yield f"{name} {what}", base, written(name, text.encode()) if name != "moeopt.json" else (
                        lambda b, t=text: (b / "moeopt.json").write_text(t) and None
                    )
            if name.endswith(".safetensors"):
                header = b'{"x":{"dtype":"F32","shape":[1073741824],"data_offsets":[0,4294967296]}}'
                yield f"{name} of 4 GiB", base, written(name, struct.pack("<Q", len(header)) + header)
                yield f"{name} of a long header", base, written(name, struct.pack("<Q", 1 << 62) + b"{}")


WRONG: dict[str, list[Any]] = {
    "versions": [[], 7, None, {"moeopt": []}],
    "source": [[], "x", {"class": {}}],
    "signature": [[], "x", {"parameters": 3}, {"inputs": [3]}, {"parameters": [[]]}, {"inputs": [{"name": {}}]}],
    "dynamic": [[], {"s0": 3}, {"s0": [1]}, {"s0": ["a", "b"]}, {"s0": [1, 2, 3]}],
    "blocks": [7, {}, [3], [{}], [{"name": [], "status": "x"}], [{"name": "x"}]],
    "golden": [[], 7, {"runs": -1}, {"runs": "one"}, {"runs": True}, {"runs": 99}],
    "files": [None, 3, [], {"graph.json": None}, {"graph.json": {"bytes": True, "sha256": ""}}, {"../x": {"bytes": 1}}],
    "schema": [None, True, 1.5, -1, 0, 99, "1", [1]],
    "format": [None, [], "x"],
    "backend": [None, [], "pickle", {"a": 1}, "\u001b]0;owned\u0007"],
}
ENGINE_ONLY: dict[str, list[Any]] = {
    "provider": [None, 7, [], "quantum"],
    "runtimes": [[], 7, {"onnx": 3}],
    "sites": [None, 7, {}, [3], [{}], [{"name": 3}]],
    "probes": [None, 7, [3], [{}], [{"budget": "x"}], [{"budget": 1e30}], [{"budget": -1}]],
    "facts": [[], {"nodes": "x"}, {"nodes": None}],
    "portable": [None, 7, [], {"sites": 3}],
    "lowerings": [[], 7],
}


def _manifests() -> Iterator[Made]:
    for base in CODE:
        table = WRONG | (ENGINE_ONLY if base == "onnxruntime" else {"device": [None, 7, [], "x\0y", "gpu!", "meta"]})
        for key, values in table.items():
            for n, value in enumerate(values):
                yield f"manifest {key} wrong {n}", base, edited("moeopt.json", put(key, value=value))
        for n, distance in enumerate([1e30, 1, -1, "inf", "0.1", [], True, 1.0]):
            yield f"golden distance {distance!r}", base, edited("moeopt.json", put("golden", "distance", value=distance))
        yield "golden distance NaN", base, lambda b: _raw(b, '"distance"', '"distance": NaN, "was"')
        yield "golden distance Infinity", base, lambda b: _raw(b, '"distance"', '"distance": Infinity, "was"')


def _raw(bundle: Path, old: str, new: str) -> None:
    text = (bundle / "moeopt.json").read_text()
    assert old in text
    (bundle / "moeopt.json").write_text(text.replace(old, new, 1))


def _certificates() -> Iterator[Made]:
    changes: dict[str, Callable[[Any], Any]] = {
        "without passed": lambda d: d.pop("passed") and None,
        "passed null": put("passed", value=None),
        "of another schema": put("schema", value=9),
        "blocks a number": put("blocks", value=7),
        "a block a number": put("blocks", value=[7]),
        "a case a number": put("blocks", 0, "cases", value=[7]),
        "an unknown verdict": put("blocks", 0, "cases", 0, "status", value="fine"),
        "a verdict of a list": put("blocks", 0, "passed", value=[]),
        "a distance of a word": put("blocks", 0, "cases", 0, "required", value="much"),
        "a count of a list": put("blocks", 0, "cases", 0, "ties", value=[]),
        "an infinite budget": lambda d: d["end_to_end"].update(passed=True, budget="inf"),
        "a budget of NaN": lambda d: d["end_to_end"].update(passed=True, budget="nan"),
        "beyond its budget": lambda d: d["end_to_end"].update(passed=True, distance=0.5, budget=0.1),
        "end to end a list": put("end_to_end", value=[]),
        "language a list": put("end_to_end", "language", value=[1]),
        "notes a word": put("notes", value="x"),
        "deep": lambda d: json.loads('{"schema": 1, "passed": true, "blocks": ' + "[" * 300 + "]" * 300 + "}"),
        "empty": lambda d: {},
    }
    for base in CODE:
        for name, change in changes.items():
            yield f"certificate {name}", base, edited("certificate.json", change)


def _conditions() -> Iterator[Made]:
    size = ["size", 0, 0]
    hostile: list[Any] = [
        ["==", ["**", 9, ["**", 9, ["**", 9, 2]]], size],
        ["==", ["**", size, 1 << 40], 3],
        ["==", ["**", 9, 9.5], 3],
        ["==", ["**", ["**", 9, 8], 8], 3],
        ["<<", 1, 1 << 40],
        ["==", ["size", 99, 0], 1],
        ["==", ["size", 0, 99], 1],
        ["==", ["size", -1, 0], 1],
        ["==", ["size", 0.5, 0], 1],
        ["==", ["size", [], {}], 1],
        ["==", 1 << 90, size],
        ["==", size],
        ["max", 1],
        ["eval", "1"],
        [["=="], 1, 1],
        {"==": [1, 1]},
        "x",
        None,
        [],
        ["==", "a", "b"],
        [">", size, "x"],
    ]
    for base, file in CODE.items():
        for n, condition in enumerate(hostile):
            yield f"condition {n}", base, edited(file, put("conditions", value=[condition]))
        deep: Any = size
        for _ in range(90):
            deep = ["+", deep, 1]
        yield "condition deep", base, edited(file, put("conditions", value=[["==", deep, 0]]))
        yield "conditions a number", base, edited(file, put("conditions", value=7))
        wide = ["and", *[["==", size, size]] * 40000]
        yield "condition wide", base, edited(file, put("conditions", value=[wide]))


def _golden() -> Iterator[Made]:
    from safetensors.torch import load_file, save_file

    tables: dict[str, str] = {
        "deep": DEEP,
        "no list": "{}",
        "a run of three": "[[[],[],[]]]",
        "a run of a number": "[7]",
        "not JSON": "[[",
        "a node": '[[[{"node": "x"}], []]]',
        "a device of NUL": '[[[{"device": "a\\u0000b"}], []]]',
        "an unknown literal": '[[[{"pickle": "x"}], []]]',
        "no runs": "[]",
        "a complex of words": '[[[{"complex": ["a", "b"]}], []]]',
    }
    for base in CODE:
        for name, table in tables.items():

            def change(bundle: Path, table: str = table) -> None:
                tensors = load_file(bundle / "golden.safetensors")
                save_file(tensors, bundle / "golden.safetensors", metadata={"runs": table})
                reseal(bundle)

            yield f"golden {name}", base, change

        def other(bundle: Path) -> None:
            tensors = load_file(bundle / "golden.safetensors")
            runs = _metadata(bundle / "golden.safetensors")
            doubled = {k: t * 2 if ".out." in k and t.is_floating_point() else t for k, t in tensors.items()}
            save_file(doubled, bundle / "golden.safetensors", metadata={"runs": runs})
            reseal(bundle)

        yield "golden of another model", base, other


def _metadata(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return (file.metadata() or {})["runs"]


def _node(name: str) -> dict[str, str]:
    return {"node": name}


Call = tuple[Any, ...]
_LEAST = ("aten.full.default", [[4], -(1 << 63)], {"dtype": {"dtype": "int64"}})
_MINUS = ("aten.full.default", [[4], -1], {"dtype": {"dtype": "int64"}})
_DOUBLE = [("aten.cat.default", [[_node(f"zz{n}"), _node(f"zz{n}")]]) for n in range(34)]
CALLS: dict[str, list[Call]] = {
    "reads beyond a tensor": [("aten._reshape_alias.default", [_node("x"), [4096], [1]])],
    "reads far beyond a tensor": [("aten._reshape_alias.default", [_node("x"), [1 << 28], [1]])],
    "as_strided beyond": [("aten.as_strided.default", [_node("x"), [4096], [1]])],
    "as_strided before": [("aten.as_strided.default", [_node("x"), [4], [1], -9])],
    "as_strided far": [("aten.as_strided.default", [_node("x"), [2], [1 << 60]])],
    "short statistics": [
        ("aten.zeros.default", [[2, 1 << 20]]),
        ("aten._native_batch_norm_legit_no_training.default", [_node("zz0"), *[None] * 2, *[_node("mask")] * 2, 0.1, 1e-5]),
        ("operator.getitem", [_node("zz1"), 0]),
    ],
    "division of the least integer": [_LEAST, _MINUS, ("aten.div.Tensor_mode", [_node("zz0"), _node("zz1")], {"rounding_mode": "trunc"})],
    "flash attention, longer values": [
        ("aten.zeros.default", [[1, 1, 4, 8]]),
        ("aten.zeros.default", [[1, 1, 1 << 18, 8]]),
        ("aten._scaled_dot_product_flash_attention_for_cpu.default", [_node("zz0"), _node("zz0"), _node("zz1")]),
        ("operator.getitem", [_node("zz2"), 0]),
    ],
    "segment_reduce": [("aten.segment_reduce.default", [_node("x"), "sum"], {"unsafe": True})],
    "ctc_loss": [("aten.ctc_loss.IntList", [_node("x"), _node("x"), [9], [9]])],
    "a packed LSTM": [("aten.lstm.data", [_node("x"), _node("x"), [_node("x")], [_node("x")], True, 1, 0.0, False, False])],
    "an unsafe index": [("aten.full.default", [[4], 1 << 40], {"dtype": {"dtype": "int64"}}), ("aten._unsafe_index.Tensor", [_node("x"), [_node("zz0")]])],
    "an index beyond": [("aten.full.default", [[4], 1 << 40], {"dtype": {"dtype": "int64"}}), ("aten.index.Tensor", [_node("x"), [_node("zz0")]])],
    "a fill of 8 GB": [("aten.full.default", [[1 << 31], 1.0])],
    "an empty tensor of 1 TB": [("aten.empty.memory_format", [[1 << 38]])],
    "an endless range": [("aten.arange.default", [1 << 38])],
    "a repeat": [("aten.repeat.default", [_node("x"), [1 << 14, 1 << 14, 1]])],
    "a wide view, copied": [("aten.expand.default", [_node("x"), [1 << 30, -1, -1, -1]]), ("aten.clone.default", [_node("zz0")])],
    "an outer product": [("aten.arange.default", [1 << 17]), ("aten.unsqueeze.default", [_node("zz0"), 1]), ("aten.mul.Tensor", [_node("zz0"), _node("zz1")])],
    "a matrix product": [("aten.zeros.default", [[1 << 17, 1]]), ("aten.zeros.default", [[1, 1 << 17]]), ("aten.mm.default", [_node("zz0"), _node("zz1")])],
    "an einsum": [("aten.zeros.default", [[1 << 12]]), ("aten.einsum.default", ["a,b,c->abc", [_node("zz0")] * 3])],
    "34 doublings": [("aten.ones.default", [[1]]), *_DOUBLE],
    "a pad": [("aten.constant_pad_nd.default", [_node("x"), [0, 1 << 32]])],
    "one hot": [("aten.zeros.default", [[1 << 16]], {"dtype": {"dtype": "int64"}}), ("aten.one_hot.default", [_node("zz0"), 1 << 16])],
    "triangle indices": [("aten.tril_indices.default", [1 << 18, 1 << 18])],
    "a window": [("aten.hann_window.default", [1 << 33])],
    "an identity": [("aten.eye.default", [1 << 18])],
    "upsampling": [("aten.zeros.default", [[1, 1, 2, 2]]), ("aten.upsample_nearest2d.default", [_node("zz0"), [1 << 16, 1 << 16]])],
    "bins by value": [("aten.full.default", [[1], 1 << 36], {"dtype": {"dtype": "int64"}}), ("aten.bincount.default", [_node("zz0")])],
    "repeats by value": [("aten.full.default", [[1], 1 << 36], {"dtype": {"dtype": "int64"}}), ("aten.repeat_interleave.Tensor", [_node("zz0")])],
    "a wide view in parts": [("aten.expand.default", [_node("mask"), [1 << 34, -1, -1]]), ("aten.unbind.int", [_node("zz0")]), ("operator.getitem", [_node("zz1"), 0])],
    "endless chunks": [("aten.chunk.default", [_node("x"), (1 << 63) - 1]), ("operator.getitem", [_node("zz0"), 0])],
    "numbers without end": [("aten.sym_size.int", [_node("x"), 2]), *[("operator.mul", [_node(f"zz{n}"), _node(f"zz{n}")]) for n in range(40)], ("aten.full.default", [[2], _node("zz40")])],
    "a list without end": [("operator.mul", [[1, 2], 1 << 40])],
    "a word without end": [("operator.mul", ["ab", 1 << 40])],
    "arithmetic on tensors": [("operator.add", [_node("x"), _node("x")])],
    "a layout of 99": [("aten._to_copy.default", [_node("x")], {"layout": 99})],
    "a dtype of 99": [("aten._to_copy.default", [_node("x")], {"dtype": 99})],
    "a dtype of a size": [("aten.sym_size.int", [_node("x"), 0]), ("aten._to_copy.default", [_node("x")], {"dtype": _node("zz0")})],
    "a memory format of 99": [("aten.clone.default", [_node("x")], {"memory_format": 99})],
    "a sparse layout": [("aten._to_copy.default", [_node("x")], {"layout": {"layout": "sparse_coo"}})],
    "a storage": [("aten.set_.source_Tensor", [_node("x"), _node("mask")])],
    "a resize": [("aten.resize.default", [_node("x"), [1 << 20]])],
    "a file": [("aten.from_file.default", ["/etc/passwd", False, 10])],
    "a polynomial of 10^18 terms": [("aten.special_hermite_polynomial_h.n_scalar", [_node("x"), 10**18])],
    "an embedding bag": [("aten.embedding_bag.default", [_node("x")] * 3)],
    "no arguments": [("aten.add.Tensor", [])],
    "too many arguments": [("aten.add.Tensor", [_node("x")] * 9)],
    "words for tensors": [("aten.add.Tensor", ["x", "y"])],
    "a missing dimension": [("aten.sum.dim_IntList", [_node("x"), [99]])],
    "a dtype that adds nothing": [("aten.add.Tensor", [_node("x"), {"dtype": "qint8"}])],
    "quantised": [("aten._to_copy.default", [_node("x")], {"dtype": {"dtype": "quint8"}})],
}  # fmt: skip


def called(calls: list[Call]) -> Change:
    """A torch graph that makes ``calls`` and returns what the last one gives."""

    def change(data: Any) -> None:
        for n, (op, args, *kwargs) in enumerate(calls):
            data["nodes"].append({"op": op, "args": args, "out": f"zz{n}", **({"kwargs": kwargs[0]} if kwargs else {})})
        last = {"op": "aten.clone.default", "args": [_node(f"zz{len(calls) - 1}")], "out": "leak"}
        data["nodes"].append(last)
        data["outputs"][0] = _node("leak")

    return edited("graph.json", change)


def _graphs() -> Iterator[Made]:
    for name, calls in CALLS.items():
        yield name, "torch", called(calls)
    spec = {"op": "moeopt.experts.default", "out": "zz"}
    for n, text in enumerate(["[" * 5000, '{"alpha": []}', '{"rows": []}', '{"alpha": "x"}', "7", '{"nothing": 1}']):
        args = [*[_node("x")] * 3, [], text]
        change = put("nodes", value=[{**spec, "args": args}])
        yield f"experts of a wrong spec {n}", "torch", edited("graph.json", change)
    wrong = {
        "nodes": [7, [7], [{}], [{"op": "aten.add.Tensor", "args": 3, "out": "z"}], [{"op": [], "args": [], "out": "z"}]],
        "outputs": [7, [[]], [{"node": "ghost"}]],
        "write_back": [7, [7], [{}], [{"from": "ghost", "into": "ghost"}], [{"from": [], "into": {}}]],
        "weights": [[], {"a": 3}, {"a": "ghost"}],
        "views": [[], 7, {}],
        "in_tree": [7, "*", [], {"type": []}, {"type": "tuple", "items": "*"}],
        "out_tree": [7, [], {"type": {}, "items": []}],
        "inputs": [7, [7], [{}], [{"name": "x", "dtype": [], "shape": []}]],
        "parameters": [7, [[]], [None]],
        "sizes": [[], {"s0": [True, None]}, {"s0": [0.5, None]}],
        "schema": [None, [], 2],
    }
    for key, values in wrong.items():
        for n, value in enumerate(values):
            yield f"graph {key} wrong {n}", "torch", edited("graph.json", put(key, value=value))
    for n, view in enumerate([{}, [], {"shape": [1 << 40]}, {"offset": 1 << 62}, {"stride": [1 << 62, 1]}]):

        def change(data: Any, view: Any = view) -> None:
            name = next(iter(data["views"]))
            data["views"][name] = {**data["views"][name], **view} if isinstance(view, dict) and view else view

        yield f"graph view wrong {n}", "torch", edited("graph.json", change)


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
            graph.node.append(helper.make_node(op, inputs, [f"zz{n}"], name=f"zz{n}", **(attributes[0] if attributes else {})))
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
            ("Resize", ["zz_x", "", "", "zz_s"], {"mode": "nearest"}), x=torch.ones(1, 1, 2, 2).numpy(), s=[1, 1, 1 << 15, 1 << 15]
        ),
        "an outer product": grown(
            ("ConstantOfShape", ["zz_s"]), ("Unsqueeze", ["zz0", "zz_a"]), ("Mul", ["zz0", "zz1"]), s=[1 << 16], a=[1]
        ),
        "a matrix product": grown(
            ("ConstantOfShape", ["zz_s"]), ("ConstantOfShape", ["zz_t"]), ("MatMul", ["zz0", "zz1"]), s=[1 << 16, 1], t=[1, 1 << 16]
        ),
        "sizes from sizes": grown(
            ("Shape", ["x"]), ("Mul", ["zz0", "zz_k"]), ("ConstantOfShape", ["zz1"]), k=[1 << 10, 1 << 10, 1 << 7]
        ),
        "sizes from values": grown(
            ("ReduceSum", ["mask"], {"keepdims": 0}), ("Cast", ["zz0"], {"to": 7}), ("Unsqueeze", ["zz1", "zz_a"]),
            ("Mul", ["zz2", "zz_k"]), ("ConstantOfShape", ["zz3"]), a=[0], k=[1 << 27],
        ),
        "one hot": grown(
            ("ConstantOfShape", ["zz_s"]), ("Cast", ["zz0"], {"to": 7}), ("OneHot", ["zz1", "zz_d", "zz_v"]), s=[1 << 15], d=1 << 15, v=[0.0, 1.0]
        ),
        "an identity": grown(("ConstantOfShape", ["zz_s"]), ("EyeLike", ["zz0"]), s=wide),
        "a random tensor": grown(("RandomNormal", [], {"shape": [1 << 30]})),
        "a column of products": grown(
            ("ConstantOfShape", ["zz_s"]), ("MatMul", ["zz0", "zz0"]), ("MatMul", ["zz1", "zz1"]), s=[1 << 13, 1 << 13]
        ),
    }  # fmt: skip
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
