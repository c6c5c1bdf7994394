"""Hostile torch graphs: ops with arguments that would read, write, hang or fill memory, and graphs of wrong types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.hostile.edits import Change, Made, edited, put


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
        (
            "aten._native_batch_norm_legit_no_training.default",
            [_node("zz0"), *[None] * 2, *[_node("mask")] * 2, 0.1, 1e-5],
        ),
        ("operator.getitem", [_node("zz1"), 0]),
    ],
    "division of the least integer": [
        _LEAST,
        _MINUS,
        ("aten.div.Tensor_mode", [_node("zz0"), _node("zz1")], {"rounding_mode": "trunc"}),
    ],
    "flash attention, longer values": [
        ("aten.zeros.default", [[1, 1, 4, 8]]),
        ("aten.zeros.default", [[1, 1, 1 << 18, 8]]),
        ("aten._scaled_dot_product_flash_attention_for_cpu.default", [_node("zz0"), _node("zz0"), _node("zz1")]),
        ("operator.getitem", [_node("zz2"), 0]),
    ],
    "segment_reduce": [("aten.segment_reduce.default", [_node("x"), "sum"], {"unsafe": True})],
    "ctc_loss": [("aten.ctc_loss.IntList", [_node("x"), _node("x"), [9], [9]])],
    "a packed LSTM": [
        ("aten.lstm.data", [_node("x"), _node("x"), [_node("x")], [_node("x")], True, 1, 0.0, False, False])
    ],
    "an unsafe index": [
        ("aten.full.default", [[4], 1 << 40], {"dtype": {"dtype": "int64"}}),
        ("aten._unsafe_index.Tensor", [_node("x"), [_node("zz0")]]),
    ],
    "an index beyond": [
        ("aten.full.default", [[4], 1 << 40], {"dtype": {"dtype": "int64"}}),
        ("aten.index.Tensor", [_node("x"), [_node("zz0")]]),
    ],
    "a fill of 8 GB": [("aten.full.default", [[1 << 31], 1.0])],
    "an empty tensor of 1 TB": [("aten.empty.memory_format", [[1 << 38]])],
    "an endless range": [("aten.arange.default", [1 << 38])],
    "a repeat": [("aten.repeat.default", [_node("x"), [1 << 14, 1 << 14, 1]])],
    "a wide view, copied": [
        ("aten.expand.default", [_node("x"), [1 << 30, -1, -1, -1]]),
        ("aten.clone.default", [_node("zz0")]),
    ],
    "an outer product": [
        ("aten.arange.default", [1 << 17]),
        ("aten.unsqueeze.default", [_node("zz0"), 1]),
        ("aten.mul.Tensor", [_node("zz0"), _node("zz1")]),
    ],
    "a matmul": [
        ("aten.zeros.default", [[1 << 17, 1]]),
        ("aten.zeros.default", [[1, 1 << 17]]),
        ("aten.mm.default", [_node("zz0"), _node("zz1")]),
    ],
    "an einsum": [("aten.zeros.default", [[1 << 12]]), ("aten.einsum.default", ["a,b,c->abc", [_node("zz0")] * 3])],
    "34 doublings": [("aten.ones.default", [[1]]), *_DOUBLE],
    "a pad": [("aten.constant_pad_nd.default", [_node("x"), [0, 1 << 32]])],
    "one hot": [
        ("aten.zeros.default", [[1 << 16]], {"dtype": {"dtype": "int64"}}),
        ("aten.one_hot.default", [_node("zz0"), 1 << 16]),
    ],
    "triangle indices": [("aten.tril_indices.default", [1 << 18, 1 << 18])],
    "a window": [("aten.hann_window.default", [1 << 33])],
    "an identity": [("aten.eye.default", [1 << 18])],
    "upsampling": [
        ("aten.zeros.default", [[1, 1, 2, 2]]),
        ("aten.upsample_nearest2d.default", [_node("zz0"), [1 << 16, 1 << 16]]),
    ],
    "bins by value": [
        ("aten.full.default", [[1], 1 << 36], {"dtype": {"dtype": "int64"}}),
        ("aten.bincount.default", [_node("zz0")]),
    ],
    "repeats by value": [
        ("aten.full.default", [[1], 1 << 36], {"dtype": {"dtype": "int64"}}),
        ("aten.repeat_interleave.Tensor", [_node("zz0")]),
    ],
    "a wide view in parts": [
        ("aten.expand.default", [_node("mask"), [1 << 34, -1, -1]]),
        ("aten.unbind.int", [_node("zz0")]),
        ("operator.getitem", [_node("zz1"), 0]),
    ],
    "endless chunks": [("aten.chunk.default", [_node("x"), (1 << 63) - 1]), ("operator.getitem", [_node("zz0"), 0])],
    "numbers without end": [
        ("aten.sym_size.int", [_node("x"), 2]),
        *[("operator.mul", [_node(f"zz{n}"), _node(f"zz{n}")]) for n in range(40)],
        ("aten.full.default", [[2], _node("zz40")]),
    ],
    "a list without end": [("operator.mul", [[1, 2], 1 << 40])],
    "a word without end": [("operator.mul", ["ab", 1 << 40])],
    "arithmetic on tensors": [("operator.add", [_node("x"), _node("x")])],
    "a layout of 99": [("aten._to_copy.default", [_node("x")], {"layout": 99})],
    "a dtype of 99": [("aten._to_copy.default", [_node("x")], {"dtype": 99})],
    "a dtype of a size": [
        ("aten.sym_size.int", [_node("x"), 0]),
        ("aten._to_copy.default", [_node("x")], {"dtype": _node("zz0")}),
    ],
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
}


def called(calls: list[Call]) -> Change:
    """A torch graph that makes ``calls`` and returns what the last one gives."""

    def change(data: Any) -> None:
        for n, (op, args, *kwargs) in enumerate(calls):
            data["nodes"].append({"op": op, "args": args, "out": f"zz{n}", **({"kwargs": kwargs[0]} if kwargs else {})})
        last = {"op": "aten.clone.default", "args": [_node(f"zz{len(calls) - 1}")], "out": "leak"}
        data["nodes"].append(last)
        data["outputs"][0] = _node("leak")

    return edited("graph.json", change)


def made() -> Iterator[Made]:
    for name, calls in CALLS.items():
        yield name, "torch", called(calls)
    spec = {"op": "moeopt.experts.default", "out": "zz"}
    for n, text in enumerate(["[" * 5000, '{"alpha": []}', '{"rows": []}', '{"alpha": "x"}', "7", '{"nothing": 1}']):
        args = [*[_node("x")] * 3, [], text]
        change = put("nodes", value=[{**spec, "args": args}])
        yield f"experts of a wrong spec {n}", "torch", edited("graph.json", change)
    wrong = {
        "nodes": [
            7,
            [7],
            [{}],
            [{"op": "aten.add.Tensor", "args": 3, "out": "z"}],
            [{"op": [], "args": [], "out": "z"}],
        ],
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
