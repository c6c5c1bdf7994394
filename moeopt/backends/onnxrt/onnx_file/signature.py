"""How a graph is called, in the words of a bundle's ``signature.json``: its inputs by name or in order."""

from __future__ import annotations

from typing import Any

from moeopt.onnx_in.ends import graph_inputs, tensor_type
from moeopt.onnx_in.read import OnnxFile


def file_signature(file: OnnxFile) -> dict[str, Any]:
    """The signature of a file's graph: keyword arguments under the names of its inputs; one output alone or a tuple."""
    graph = file.proto.graph
    inputs = []
    for number, value in enumerate(graph_inputs(graph)):
        dtype, dims = tensor_type(file, value)
        inputs.append(
            {
                "name": value.name,
                "dtype": str(dtype).removeprefix("torch."),
                "device": "cpu",
                "shape": [d if d is not None else f"size_{number}_{axis}" for axis, d in enumerate(dims)],
                "onnx": value.name,
            }
        )
    for value in graph.output:
        tensor_type(file, value)
    names = [entry["name"] for entry in inputs]
    items: list[Any] = ["*"] * len(names)
    outputs = ["*"] * len(graph.output)
    symbols = {d for entry in inputs for d in entry["shape"] if isinstance(d, str)}
    return {
        "parameters": names,
        "in_tree": {
            "type": "tuple",
            "items": [
                {"type": "tuple", "items": []},
                {"type": "dict", "keys": names, "items": items},
            ],
        },
        "out_tree": outputs[0] if len(outputs) == 1 else {"type": "tuple", "items": outputs},
        "inputs": inputs,
        "sizes": {symbol: [0, None] for symbol in sorted(symbols)},
        "conditions": [],
        "outputs": [{"tensor": n, "onnx": value.name} for n, value in enumerate(graph.output)],
    }
