"""Programs of regions: counted names that no weight of the file's own has, and numbers that mean what GELU's do."""

import math

import pytest
import torch

from moeopt.onnx_in.interpreter import InterpretedGraph
from moeopt.onnx_in.program import NodeStep, program_of


def product(*names, prefix="layers.0.mlp", opset=17):
    """``x`` times one weight after the other, each called as the file calls it."""
    names = [f"{prefix}.{name}" for name in names]
    made = ["x", *(f"t{n}" for n in range(len(names) - 1)), "out"]
    steps = [NodeStep("", "MatMul", f"n{n}", (made[n], name), (made[n + 1],)) for n, name in enumerate(names)]
    weights = {name: torch.full((2, 2), float(n + 2)) for n, name in enumerate(names)}
    program, tensors = program_of(steps, ["x"], ["out"], weights, opset, prefix=prefix)
    return InterpretedGraph(program, tensors)


def test_weights_that_are_called_as_counted_values_keep_their_names_and_theirs_alone():
    """DBRX calls a matrix ``v1``; a region's values are counted as ``x0``, ``v1``, ``y0``."""
    module = product("x0", "v1", "y0", "v2", "ca3")
    assert sorted(name for name, _ in module.named_parameters()) == ["ca3", "v1", "v2", "x0", "y0"]
    assert torch.equal(module(torch.eye(2)), torch.full((2, 2), 2.0**4 * 2 * 3 * 4 * 5 * 6))


@pytest.mark.parametrize("name", ["coded", "training", "program", "names", "forward", "chains_of_regions"])
def test_a_weight_may_be_called_as_an_attribute_of_modules(name):
    module = product(name)
    assert [n for n, _ in module.named_parameters()] == [f"c_{name}"]
    assert torch.equal(module(torch.eye(2)), torch.full((2, 2), 2.0))


def test_weights_without_names_are_told_apart_by_their_shapes():
    steps = [
        NodeStep("", "MatMul", "a", ("x", "onnx::MatMul_7"), ("h",)),
        NodeStep("", "MatMul", "b", ("h", "onnx::MatMul_8"), ("i",)),
        NodeStep("", "MatMul", "c", ("i", "onnx::MatMul_9"), ("y",)),
    ]
    weights = {"onnx::MatMul_7": torch.ones(2, 3), "onnx::MatMul_8": torch.ones(3, 2)}
    weights["onnx::MatMul_9"] = torch.ones(2, 3)
    _, tensors = program_of(steps, ["x"], ["y"], weights, 17, prefix="mlp")
    families = {name.rstrip("0123456789"): value.shape for name, value in tensors.items()}
    assert sorted(families) == ["ca", "cb"] and families["ca"] == (2, 3) and len(tensors) == 3


@pytest.mark.parametrize("meant", [math.sqrt(2), math.sqrt(0.5), math.sqrt(2 / math.pi), 0.044715])
def test_a_rounded_number_of_gelu_is_the_same_in_float32_and_the_number_itself_in_float64(meant):
    steps = [NodeStep("", "Mul", "n", ("x", "c"), ("y",))]
    program, tensors = program_of(steps, ["x"], ["y"], {"c": torch.tensor(meant)}, 17)
    module = InterpretedGraph(program, tensors)
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x), x * torch.tensor(meant))
    assert torch.equal(module(x.double()), x.double() * meant)
    other = torch.tensor(meant).nextafter(torch.tensor(9.0))
    program, tensors = program_of(steps, ["x"], ["y"], {"c": other}, 17)
    assert torch.equal(InterpretedGraph(program, tensors)(x.double()), x.double() * other.item())
