import pytest
import torch

pytest.importorskip("onnxscript")

from torch.onnx._internal.exporter._registration import ONNXRegistry

from moeopt.patches import one_registry, onnx_export


def names(table):
    return {str(target): [meta.onnx_function.__name__ for meta in found] for target, found in table.functions.items()}


def test_each_export_has_a_table_of_its_own_with_what_torch_puts_into_it():
    want = names(ONNXRegistry.from_torchlib(opset_version=20))
    with one_registry():
        first = ONNXRegistry.from_torchlib(opset_version=20)
        assert names(first) == want
        target = next(iter(first.functions))
        first.functions[target].clear()
        first.functions["mine"] = []
        assert names(ONNXRegistry.from_torchlib(opset_version=20)) == want
        assert names(ONNXRegistry.from_torchlib(opset_version=18)) != {}


def test_ops_registered_later_make_the_table_anew():
    with one_registry():
        ONNXRegistry.from_torchlib(opset_version=20)
        made = len(onnx_export._tables)
        ONNXRegistry.from_torchlib(opset_version=20)
        assert len(onnx_export._tables) == made
        with torch.library._scoped_library("moeopt_later", "DEF") as library:
            library.define("op(Tensor x) -> Tensor")
            ONNXRegistry.from_torchlib(opset_version=20)
    assert len(onnx_export._tables) == made + 1


def test_torchs_own_is_back_afterwards():
    before = vars(ONNXRegistry)["from_torchlib"]
    with pytest.raises(RuntimeError), one_registry():
        raise RuntimeError
    assert vars(ONNXRegistry)["from_torchlib"] is before
