"""Free sizes are called by the end and the axis where they stand first; the same in the graph and in its signature."""

import pytest

from moeopt.bundle.io_names import called, name_ends

ir = pytest.importorskip("onnx_ir")


def graph_and_signature(given, out, bounds):
    """A graph that adds its inputs, and how it is called; ``given``: name -> shape."""
    ends = [ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(s)) for n, s in given.items()]
    node = ir.node("Sum", ends)
    node.outputs[0].shape = ir.Shape(out)
    graph = ir.Graph(ends, list(node.outputs), nodes=[node], opset_imports={"": 20})
    keys = {"type": "dict", "keys": list(given), "items": ["*"] * len(given)}
    return graph, {
        "parameters": list(given),
        "in_tree": {"type": "tuple", "items": [{"type": "tuple", "items": []}, keys]},
        "out_tree": "*",
        "inputs": [
            {"name": n, "dtype": "float32", "shape": [d if isinstance(d, int) or d.isidentifier() else None for d in s]}
            for n, s in given.items()
        ],
        "sizes": bounds,
        "outputs": [{"tensor": 0}],
    }


def shapes(graph):
    return {v.name: [getattr(d, "value", d) for d in v.shape] for v in (*graph.inputs, *graph.outputs)}


def test_equal_sizes_have_one_name_and_a_second_graph_the_same():
    given = {"x": ["s77", "s27", 64], "past.0": ["s77", "s3 + s27", "s3"]}
    graph, signature = graph_and_signature(given, ["s77", "s3 + s27", "u0"], {"s77": [1, None], "s27": [1, 9]})
    again, _ = graph_and_signature(given, ["s77", "s3 + s27", "u0"], {})
    name_ends(graph, signature)
    assert shapes(graph) == {
        "x": ["x_0", "x_1", 64],
        "past.0": ["x_0", "past_0_2 + x_1", "past_0_2"],
        "output": ["x_0", "past_0_2 + x_1", "output_2"],
    }
    assert [entry["shape"] for entry in signature["inputs"]] == [["x_0", "x_1", 64], ["x_0", None, "past_0_2"]]
    assert signature["sizes"] == {"x_0": [1, None], "x_1": [1, 9]}
    name_ends(again, signature)
    assert shapes(again) == shapes(graph)


def test_sizes_of_ids_are_batch_and_sequence_and_names_that_were_given_stay():
    given = {"rows": ["mine", "s5"], "input_ids": ["mine", "s6"], "pixel_values": ["s7", 3, "s8"]}
    graph, signature = graph_and_signature(given, ["mine", "s6"], {"s6": [1, None]})
    name_ends(graph, signature)
    assert list(shapes(graph).values()) == [
        ["mine", "rows_1"], ["mine", "sequence"], ["batch", 3, "pixel_values_2"], ["mine", "sequence"],
    ]  # fmt: skip
    assert signature["sizes"] == {"sequence": [1, None]}


def test_no_two_sizes_have_one_name():
    given = {"a.0": ["s1", "s2"], "a": ["s3", 4, 4], "input_ids": ["s4"], "pixel_values": ["s5"], "a_0": [1, "s6"]}
    graph, signature = graph_and_signature(given, ["s6"], {})
    name_ends(graph, signature)
    assert list(shapes(graph).values()) == [
        ["a_0_0", "a_0_1"], ["a_0", 4, 4], ["batch"], ["pixel_values_0"], [1, "a_0_1_"], ["a_0_1_"],
    ]  # fmt: skip


def test_sizes_that_nobody_named_are_called_where_they_are_read():
    inputs = [
        {"name": "input_ids", "dtype": "int64", "shape": ["s72", "s53"]},
        {"name": "mask", "dtype": "int64", "shape": ["s43", "s53", 2, None]},
        {"name": "use_cache", "constant": False},
        {"name": "y", "dtype": "int64", "shape": ["mine"]},
    ]
    told, bounds = called(inputs, {"s72": [0, None], "s43": [1, 8], "mine": [2, None]})
    assert [entry.get("shape") for entry in told] == [
        ["batch", "sequence"], ["mask_0", "sequence", 2, None], None, ["mine"],
    ]  # fmt: skip
    assert bounds == {"batch": [0, None], "mask_0": [1, 8], "mine": [2, None]}
    assert inputs[0]["shape"] == ["s72", "s53"]
