"""How many columns a product gives, whichever operator it is and however its matrix lies in the file."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import moeopt
from moeopt.onnx_in.chains import columns_given
from moeopt.onnx_in.index import GraphIndex
from moeopt.onnx_in.products import weight_products
from moeopt.onnx_in.read import read_onnx
from tests.onnx_in.by_hand import E, File, H, K
from tests.onnx_in.coded_files import Packed

FUSED = {"domain": "com.microsoft"}
RELU = {"activation": "Relu", **FUSED}


def turned(file, value):
    return file.node("Transpose", value, perm=[1, 0])


def packed(file):
    node, weights = Packed(4).product("x", "w", np.ones((H, E), np.float32), "packed")
    file.nodes.append(node)
    file.weights += weights
    return "packed"


MADE = {
    "MatMul": lambda file: file.node("MatMul", "x", file.weight(H, E)),
    "MatMul of a turned matrix": lambda file: file.node("MatMul", "x", turned(file, file.weight(E, H))),
    "MatMul from the left": lambda file: file.node("MatMul", file.weight(E, H), turned(file, "x")),
    "Gemm": lambda file: file.node("Gemm", "x", file.weight(H, E), file.weight(E), alpha=0.5),
    "Gemm, transB": lambda file: file.node("Gemm", "x", file.weight(E, H), transB=1),
    "Gemm, transA": lambda file: file.node("Gemm", file.weight(H, E), turned(file, "x"), transA=1),
    "FusedMatMul, transB": lambda file: file.node("FusedMatMul", "x", file.weight(E, H), transB=1, **FUSED),
    "FusedGemm, transB": lambda file: file.node("FusedGemm", "x", file.weight(E, H), transB=1, **RELU),
    "MatMulNBits": packed,
    "Einsum": lambda file: file.node("Einsum", "x", file.weight(H, E), equation="td,de->te"),
    "Einsum of a turned matrix": lambda file: file.node("Einsum", "x", file.weight(E, H), equation=" td, ed -> te"),
    "Einsum from the left": lambda file: file.node("Einsum", file.weight(E, H), "x", equation="ed,td->te"),
    "Einsum of any axes": lambda file: file.node("Einsum", "x", file.weight(E, H), equation="...d,ed->...e"),
}  # fmt: skip
NOT_SEEN = {
    "Einsum whose rows come last": lambda file: file.node("Einsum", "x", file.weight(E, H), equation="td,ed->et"),
    "Einsum without a result": lambda file: file.node("Einsum", "x", file.weight(H, E), equation="td,de"),
    "of a part": lambda file: file.node(
        "MatMul", "x", file.node("Gather", file.weight(H, E + 1), file.constant([*range(E)]), axis=1)
    ),
}


@pytest.mark.parametrize("how", [*MADE, *NOT_SEEN])
def test_the_columns_of_a_product_are_counted(how):
    file = File()
    model = file.model((MADE | NOT_SEEN)[how](file))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    (product,) = weight_products(GraphIndex(read_onnx(model).model.graph)).values()
    assert columns_given(product) == (E if how in MADE else 0)
    if how in MADE:
        session = onnxruntime.InferenceSession(model.SerializeToString())
        (made,) = session.run(None, {"x": np.ones((3, H), np.float32)})
        assert made.shape in ((3, E), (E, 3))


def test_a_router_that_is_an_einsum_scores_as_many_experts_as_there_are():
    """Its matrix lies turned: its second axis is the rows' width."""
    file = File()
    scores = file.node("Einsum", "x", file.weight(E, H, name="gate"), equation="td,ed->te")
    values, ids = file.node("TopK", scores, file.constant([K]), results=2, axis=-1)
    table = file.table(file.node("Softmax", values, axis=-1), ids, scores)
    model = file.model(file.weighed("x", table, lambda x, e: file.expert(x, f"experts.{e}")))
    found = moeopt.optimize(model, verify="off")
    assert [(b.status, b.reason, b.experts) for b in found.report.blocks] == [("rewritten", "", E)]
    x = torch.randn(5, H, generator=torch.Generator().manual_seed(0))
    (wanted,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})
    torch.testing.assert_close(found(x), torch.from_numpy(wanted), rtol=1e-4, atol=1e-5)
