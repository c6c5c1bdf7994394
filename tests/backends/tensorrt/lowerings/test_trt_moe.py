"""TRT_MoE: what IMoELayer cannot carry is refused, and the graph around it is right, by the layer's definition."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from moeopt.backends.tensorrt.lowerings.trt_moe import TrtMoE, together
from moeopt.ir.specs import RouterSpec
from moeopt.lower.onnx.assemble import one_op
from tests.backends.onnxrt.lowerings.one_site import eps_off, exact, make_site, renamed, run, session_of, tokens

ROUTER = RouterSpec("softmax_topk", 2, 5)
BUDGET = 32  # as in test_forms.py
FORM = TrtMoE()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(rows="plain"), "gated experts only"),
        (dict(activation="gelu"), "the activations silu and none, not gelu"),
        (dict(activation="swish", alpha=1.702), "not swish"),
        (dict(gate_max=7.0, up_min=-7.0, up_max=7.0), "have gate_max, up_min, up_max; NVIDIA's page"),
        (dict(act_max=1.0), "have act_max"),
        (dict(up_offset=1.0), "have up_offset; NVIDIA's page on MoE says its swiglu parameters are not"),
        (dict(compute_dtype="float64"), "computes in float32, float16 or bfloat16, not torch.float64"),
        (dict(act_dtype="bfloat16"), "the activation runs in torch.bfloat16"),
        (dict(D=20), "as wide as its input, 12; these experts give 20"),
    ],
    ids=lambda x: renamed(x) if isinstance(x, dict) else "",
)
def test_refuses_what_the_layer_cannot_carry(changes, reason):
    assert reason in FORM.refuses(make_site(**changes), "sm_100")


def test_refuses_other_targets_and_unequal_experts():
    assert "IMoELayer is for sm_100, sm_103, sm_110, not sm_120" in FORM.refuses(make_site(), "sm_120")
    site = make_site()
    site.bank.w_out_l[2] = torch.zeros(12, 7)
    assert "expert 2 differs in size" in FORM.refuses(site, "sm_103")


CARRIED = [
    dict(router=ROUTER),
    dict(router=ROUTER, bias=False, rows="separate", w_in_layout="io", w_out_layout="io"),
    dict(rows="interleaved_up", activation="identity"),
    dict(out_of_range="identity", weight_on="input", K=3),
    dict(out_norm_eps=1e-5, rows="up|gate"),
    dict(router=ROUTER, accum_dtype="float64"),
]


@pytest.mark.parametrize("changes", CARRIED, ids=renamed)
def test_the_graph_is_right_where_the_layer_is(changes):
    """ONNX Runtime runs the graph with the layer replaced by its definition."""
    site = make_site(**changes)
    assert FORM.refuses(site, "sm_100") == ""
    session = session_of(with_definition(one_op(site, FORM)))
    beyond = 0.0 if together(site) else 0.2
    for T in (1, 33):
        args = tokens(site, T, beyond=beyond, negative=beyond)
        assert eps_off(run(session, *args), exact(site, *args)) <= BUDGET


def test_an_id_that_names_no_expert_leaks_nothing_from_the_first():
    site = make_site(bias=False)
    site.bank.w_out_l[0].fill_(float("inf"))
    x, _, w = tokens(site, 3)
    ids = torch.tensor([[1, -1], [7, 2], [-1, -1]])
    got = run(session_of(with_definition(one_op(site, FORM))), x, ids, w)
    assert eps_off(got, exact(site, x, ids, w)) <= BUDGET


def test_one_layer_takes_all_k_experts_only_where_ids_are_within():
    for router in (ROUTER, None):
        site = make_site(router=router)
        assert together(site) is (router is not None)
        (layer,) = (node for node in one_op(site, FORM).graph if node.op_type == "TRT_MoE")
        assert layer.inputs[3].shape == (5, 12, 6) and len(layer.inputs) == 9
        assert layer.attributes["activation_type"].as_int() == 1
    assert not together(make_site(router=RouterSpec("softmax_topk", 2, 9)))  # ids up to 8, and 5 experts


def with_definition(model: ir.Model) -> ir.Model:
    """``model`` with each TRT_MoE node as a function of standard operators: one pair of row and slot after another."""
    (node,) = (n for n in model.graph if n.op_type == "TRT_MoE")
    x, ids, scores, gate, up, down, *biases = node.inputs
    made = []

    def op(kind, inputs, **attributes):
        made.append(ir.node(kind, inputs, attributes))
        return made[-1].outputs[0]

    def const(values):
        value = ir.Value(name=f"defined_{len(made)}", const_value=ir.tensor(np.asarray(values, dtype=np.int64)))
        model.graph.register_initializer(value)
        return value

    def of(stack):
        return op("Gather", [stack, ids], axis=0)  # (1, S, K, ...)

    def product(rows, stack, bias):
        out = op("MatMul", [rows, of(stack)])
        return out if bias is None else op("Add", [out, op("Unsqueeze", [of(bias), const([3])])])

    b_gate, b_up, b_down = biases or (None, None, None)
    rows = op("Unsqueeze", [x, const([2, 3])])  # (1, S, 1, 1, H)
    g = product(rows, gate, b_gate)
    if node.attributes["activation_type"].as_int() == 1:
        g = op("Mul", [g, op("Sigmoid", [g])])
    o = product(op("Mul", [g, product(rows, up, b_up)]), down, b_down)
    o = op("Mul", [o, op("Unsqueeze", [scores, const([3, 4])])])
    y = op("ReduceSum", [o, const([2, 3])], keepdims=0)
    model.graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(node.outputs[0], y)
    model.graph.remove(node, safe=True)
    model.graph.opset_imports.pop("trt")
    return model
