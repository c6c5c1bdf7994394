"""A whole graph held to the table: each problem with its block, node and way out, in subgraphs too."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from moeopt.backends.tensorrt.graph_check import BLOCK, check_graph
from moeopt.backends.tensorrt.lowerings import FUNCTION_FORMS, PORTABLE, by_name
from moeopt.backends.tensorrt.target import parse_target
from moeopt.ir.specs import RouterSpec
from moeopt.lower.onnx.assemble import one_op
from tests.backends.onnxrt.lowerings.one_site import make_site

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def graph_of(op, *, domain="", dtype=FLOAT, others=(), outputs=1, name="model.layer/it", **attributes):
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["T", 4]))
    arrays = [ir.tensor(array) for array in others]
    consts = [ir.Value(name=f"c{n}", const_value=a, type=ir.TensorType(a.dtype)) for n, a in enumerate(arrays)]
    node = ir.node(op, [x, *consts], attributes, domain=domain, num_outputs=outputs, name=name)
    if "/" in name:
        node.metadata_props[BLOCK] = name.partition("/")[0]
    graph = ir.Graph([x], list(node.outputs), nodes=[node], initializers=consts, opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


ADD = dict(others=(np.zeros((3, 4), np.int64), np.zeros((3, 4), np.float32)), reduction="add")


@pytest.mark.parametrize(
    ("graph", "target", "text"),
    [
        (graph_of("NonZero"), "sm_89", "block model.layer, node model.layer/it (NonZero): sm_89 does not take NonZero"),
        (graph_of("ScatterElements", **ADD), "sm_89", "does not take ScatterElements with a reduction"),
        (graph_of("ScatterND", **ADD), "sm_120", "does not take ScatterND with a reduction"),
        (graph_of("TopK", others=(np.array([4000]),), outputs=2), "sm_89", "TopK of more than 3840 values"),
        (graph_of("Unique"), "sm_80", "sm_80 does not take Unique: the parser has no importer for it"),
        (graph_of("MoE", domain="com.microsoft"), "sm_89", "com.microsoft: its operators are ONNX Runtime's own"),
        (graph_of("Gelu", domain="my.ops"), "sm_89", "the parser ignores the domain of my.ops::Gelu"),
        (graph_of("Mul", dtype=ir.DataType.DOUBLE), "sm_89", "does not take float64: the parser reads float64 as"),
        (graph_of("Relu", dtype=ir.DataType.BFLOAT16), "sm_75", "does not take bfloat16: Turing has no bfloat16"),
        (graph_of("Cast", to=int(ir.DataType.INT16)), "sm_89", "does not take INT16: the parser has no such type"),
        (graph_of("MatMul", others=(np.ones((4, 2), np.float32),)), "sm_75", "matmuls in float32"),
        (
            graph_of("MatMul", dtype=INT64, others=(np.ones((4, 2), np.int64),)),
            "sm_89",
            "matmuls in INT64: the",
        ),
        (graph_of("Cast", to=int(ir.DataType.FLOAT8E4M3FN)), "sm_80", "does not take fp8 quantisation"),
        (graph_of("Cast", to=int(ir.DataType.FLOAT4E2M1)), "sm_89", "does not take fp4 quantisation"),
        (graph_of("Unique", name="alone"), "sm_80", "node alone (Unique): sm_80"),
    ],
)
def test_a_problem_is_told(graph, target, text):
    problems = check_graph(graph, parse_target(target))
    assert len(problems) == 1 and text in problems[0], problems


@pytest.mark.parametrize(
    ("graph", "target"),
    [
        (graph_of("ScatterElements", others=ADD["others"]), "sm_89"),
        (graph_of("TopK", others=(np.array([8]),), outputs=2), "sm_89"),
        (graph_of("MatMul", dtype=ir.DataType.FLOAT16, others=(np.ones((4, 2), np.float16),)), "sm_75"),
        (graph_of("Softmax"), "sm_75"),
        (graph_of("Cast", to=int(ir.DataType.FLOAT8E4M3FN)), "sm_89"),
    ],
)
def test_what_is_taken_is_not_told(graph, target):
    assert check_graph(graph, parse_target(target)) == []


@pytest.mark.parametrize("form", [f for f in PORTABLE if f not in FUNCTION_FORMS], ids=lambda form: form.name)
def test_dtypes_are_worked_out_where_the_graph_does_not_state_them(form):
    """The forms state no dtypes between their ends; in float16 every one suits Turing, in bfloat16 none does."""
    spec = dict(out_norm_eps=1e-5, accum_dtype="float32", act_dtype="float32")
    assert check_graph(one_op(make_site(dtype=torch.float16, **spec), form), parse_target("sm_75")) == []
    for site, word in ((make_site(dtype=torch.bfloat16), "bfloat16"), (make_site(), "matmuls in float32")):
        problems = check_graph(one_op(site, form), parse_target("sm_75"))
        assert any(word in problem and "node layers.0.mlp/" in problem for problem in problems)
    problems = check_graph(one_op(make_site(accum_dtype="float64"), form), parse_target("sm_89"))
    assert any("float64" in problem for problem in problems)


def test_a_problem_inside_a_loop_is_told():
    model = one_op(make_site(), by_name("loop"))
    (loop,) = (node for node in model.graph if node.op_type == "Loop")
    next(node for node in loop.attributes["body"].as_graph() if node.op_type == "Where").op_type = "BitShift"
    (problem,) = check_graph(model, parse_target("sm_89"))
    assert "(BitShift): sm_89 does not take BitShift" in problem


def test_trt_moe_is_for_its_targets():
    model = one_op(make_site(router=RouterSpec("softmax_topk", 2, 5)), by_name("trt-moe"))
    assert check_graph(model, parse_target("sm_110")) == []
    (problem,) = check_graph(model, parse_target("sm_120"))
    assert "node layers.0.mlp/experts (TRT_MoE): sm_120 does not take TRT_MoE: IMoELayer is for sm_100" in problem
