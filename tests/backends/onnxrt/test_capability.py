"""The table of what ONNX Runtime does with its MoE operators, held against the ONNX Runtime that is installed.

Each trap is first shown to be one: the runtime ignores, drops or refuses what the graph says. Where a version newer
than those of the table no longer does, the test skips and says so: the table can then be relaxed for that version.
"""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from moeopt.backends.onnxrt.capability import CAPABILITIES, capability, check_graph
from moeopt.backends.onnxrt.lowerings import LOWERINGS
from moeopt.ir.specs import RouterSpec
from tests.backends.onnxrt.lowerings.one_site import make_site, model_of, session_of

pytestmark = pytest.mark.one_isa  # ONNX Runtime's own kernels, which torch's settings do not reach

VERSION = tuple(int(n) for n in ort.__version__.split(".")[:2])
T, E, H, I, K = 6, 4, 16, 16, 2
RNG = np.random.default_rng(0)
X = RNG.standard_normal((T, H)).astype(np.float32)
LOGITS = RNG.standard_normal((T, E)).astype(np.float32)
FC1, FC2 = (RNG.standard_normal((E, n, 16)).astype(np.float32) / 4 for n in (I, H))
SWIGLU = dict(activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0)
SWIGLU_FC1 = RNG.standard_normal((E, 2 * I, H)).astype(np.float32) / 4
GOOD = dict(activation_type="silu", k=K, normalize_routing_weights=1)


def model(op, inputs, dtype=TensorProto.FLOAT, logits=LOGITS, domain="com.microsoft", opset=18, **attributes):
    """One node fed by x, logits and constants; ``inputs`` holds the constants by position."""
    names = ["x", "logits"] + [""] * (max(inputs, default=1) - 1)
    for position in inputs:
        names[position] = f"input{position}"
    constants = [numpy_helper.from_array(array, f"input{position}") for position, array in inputs.items()]
    node = helper.make_node(op, names, ["y"], name="the_moe", domain=domain, **attributes)
    ins = [
        helper.make_tensor_value_info("x", dtype, [None, H]),
        helper.make_tensor_value_info("logits", dtype, [None, E]),
    ]
    graph = helper.make_graph([node], "g", ins, [helper.make_tensor_value_info("y", dtype, None)], constants)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def moe(fc1=FC1, fc2=FC2, more=None, **attributes):
    return model("MoE", {2: fc1, 4: fc2, **(more or {})}, **{**GOOD, **attributes})


def qmoe(router_weights=None, **attributes):
    """8-bit row-wise quantised experts; ``router_weights`` is input 14."""
    rng = np.random.default_rng(1)
    q1, q2 = (rng.integers(0, 256, (E, n, 16), dtype=np.uint8) for n in (2 * I, H))
    s1, s2 = (np.full((E, n), 0.002, np.float32) for n in (2 * I, H))
    inputs = {2: q1, 3: s1, 5: q2, 6: s2} | ({} if router_weights is None else {14: router_weights})
    given = {"k": K, "normalize_routing_weights": 1, "expert_weight_bits": 8, **SWIGLU, **attributes}
    return model("QMoE", inputs, **given)


def run(proto, x=X, logits=LOGITS):
    feeds = {"x": x, "logits": logits}
    session = session_of(proto)
    return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})[0]


def problems(proto, provider="cpu"):
    return check_graph(ir.from_proto(proto), provider)


def still_a_trap(condition):
    if not condition:
        pytest.skip(f"onnxruntime {ort.__version__} no longer does this; relax moeopt/backends/onnxrt/capability.py")


def test_a_sound_node_has_no_problems():
    assert problems(moe()) == [] and problems(moe(SWIGLU_FC1, **SWIGLU)) == [] and problems(qmoe()) == []
    assert np.isfinite(run(moe())).all() and np.isfinite(run(qmoe())).all()


def test_use_sparse_mixer_is_ignored():
    still_a_trap(np.array_equal(run(moe(use_sparse_mixer=1)), run(moe())))
    assert problems(moe(use_sparse_mixer=1)) == [
        "the_moe: use_sparse_mixer=1 is silently ignored (run on 1.31.1 and 1.32.0)"
    ]


def test_qmoe_ignores_normalize_routing_weights():
    still_a_trap(np.array_equal(run(qmoe(normalize_routing_weights=0)), run(qmoe())))
    assert "normalize_routing_weights=0 is silently ignored" in problems(qmoe(normalize_routing_weights=0))[0]


def test_qmoe_drops_negative_router_weights():
    weights = np.ones((T, E), np.float32)
    signed = weights.copy()
    signed[:, ::2] = -1
    dropped = np.where(signed > 0, signed, 0)
    as_given = dict(normalize_routing_weights=0)
    still_a_trap(np.array_equal(run(qmoe(signed, **as_given)), run(qmoe(dropped, **as_given))))
    found = problems(qmoe(signed, **as_given))
    assert len(found) == 1 and "negative router_weights are silently dropped" in found[0]
    assert problems(qmoe(weights, **as_given)) == [] and problems(qmoe(weights)) == []
    assert "router_weights (input 14) is silently ignored" in problems(qmoe(weights, weights_prepacked=0), "cuda")[-1]


@pytest.mark.parametrize("fusion", [0, 2])
def test_only_interleaved_swiglu_loads(fusion):
    proto = moe(SWIGLU_FC1, **{**SWIGLU, "swiglu_fusion": fusion})
    with pytest.raises(Exception, match="only supports interleaved"):
        session_of(proto)
    assert f"swiglu_fusion={fusion} is refused" in problems(proto)[0]


def test_a_separate_up_weight_is_not_implemented():
    proto = moe(more={6: FC1})
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        run(proto)
    assert "fc3" in problems(proto)[0] and problems(proto, "cuda") == []


def test_relu_hides_nan():
    x = X.copy()
    x[2] = np.nan
    still_a_trap(np.isfinite(run(moe(activation_type="relu"), x)).all())
    assert "relu of NaN is 0" in problems(moe(activation_type="relu"))[0]
    assert np.isnan(run(moe(), x)[2]).all()


def test_alpha_and_limit_are_ignored_without_swiglu():
    given = dict(activation_alpha=3.0, swiglu_limit=0.01)
    still_a_trap(np.array_equal(run(moe(**given)), run(moe())))
    assert [p.split(" is ")[0] for p in problems(moe(**given))] == [
        "the_moe: activation_alpha",
        "the_moe: swiglu_limit",
    ]


def test_gelu_is_the_tanh_form():
    one_hot = np.where(np.arange(E) == 1, 0, -1000).astype(np.float32).repeat(T).reshape(E, T).T.copy()
    got = run(moe(activation_type="gelu", k=1), logits=one_hot)
    h = torch.from_numpy(X) @ torch.from_numpy(FC1[1]).T
    forms = {form: torch.nn.functional.gelu(h, approximate=form) for form in ("none", "tanh")}
    off = {
        form: float((a @ torch.from_numpy(FC2[1]).T - torch.from_numpy(got)).abs().max()) for form, a in forms.items()
    }
    still_a_trap(off["none"] > 20 * off["tanh"])
    assert off["tanh"] < 1e-5


def test_alpha_and_beta_must_be_given_with_swiglu():
    assert "activation_alpha must be given" in problems(moe(SWIGLU_FC1, activation_type="swiglu", swiglu_fusion=1))[0]


@pytest.mark.parametrize(("op", "proto"), [("MoE", moe), ("QMoE", qmoe)])
def test_an_attribute_that_the_table_lacks(op, proto):
    """What such an attribute does is not known. This one is new in 1.32, whose CPU kernels take no value but 0."""
    given = proto(swiglu_limit_after_activation=1)
    with pytest.raises(Exception, match="swiglu_limit_after_activation"):
        session_of(given)
    for provider in ("cpu", "cuda"):
        words = f"the_moe: swiglu_limit_after_activation is an attribute that the table of {provider}'s {op} lacks"
        assert problems(given, provider)[0] == words


def test_what_qmoe_computes_in():
    """bfloat16 is new in 1.32; a row of the table says what every accepted version has."""
    import onnxruntime.capi.onnxruntime_pybind11_state as state

    found = {d.type_constraints["T"][0] for d in state.get_all_opkernel_def() if d.op_name == "QMoE"}
    assert found == {"tensor(float)", "tensor(float16)"} | ({"tensor(bfloat16)"} if VERSION >= (1, 32) else set())
    assert capability("cpu", "QMoE").dtypes == ("FLOAT", "FLOAT16")


def test_an_unknown_activation_is_refused():
    with pytest.raises(Exception, match="Unsupported MoE activation"):
        session_of(moe(activation_type="tanh"))
    assert "activation_type tanh is refused" in problems(moe(activation_type="tanh"))[0]


def test_layout_is_checked_before_a_legacy_reading_can_happen():
    narrow = np.zeros((E, 8, H), np.float32)
    assert "are not (E, 1I, H) and (E, H, I)" in problems(moe(narrow))[0]
    assert "k=5 exceeds the 4 experts" in problems(moe(k=5))[0]
    assert "must have rank 3" in problems(moe(FC1[0]))[0]


def test_layout_must_be_known():
    graph = ir.from_proto(moe())
    node = next(iter(graph.graph))
    node.replace_input_with(2, graph.graph.inputs[0])
    node.inputs[2].shape = None
    assert "their layout cannot be checked" in check_graph(graph, "cpu")[0]


@pytest.mark.parametrize("op", ["MatMul", "Mul", "Add", "Where"])
def test_bfloat16_arithmetic_is_missing_on_cpu(op):
    ins = ["c", "a", "a"] if op == "Where" else ["a", "a"]
    a = numpy_helper.from_array(np.ones((2, 2), ml_dtypes.bfloat16), "a")
    x = helper.make_tensor_value_info("c", TensorProto.BOOL, [2, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])
    give = helper.make_tensor_value_info("a", TensorProto.BFLOAT16, [2, 2])
    nodes = [helper.make_node(op, ins, ["z"]), helper.make_node("Cast", ["z"], ["y"], to=TensorProto.FLOAT)]
    graph = helper.make_graph(nodes, "g", [x, give] if op == "Where" else [give], [y])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    assert a.data_type == TensorProto.BFLOAT16
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        session_of(proto)
    assert problems(proto) == [f"{op}: the CPU provider has no bfloat16 {op} (NOT_IMPLEMENTED)"]
    assert problems(proto, "cuda") == []


def test_ties_are_broken_by_the_graph_s_top_k_in_another_way():
    """Why ids are inputs of every lowering, and never chosen again from the scores by ONNX's TopK."""
    node = helper.make_node("TopK", ["logits", "k"], ["v", "y"])
    x = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None, E])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, None)
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(np.array([K]), "k")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    by_onnx = run(proto, logits=np.zeros((1, E), np.float32))[0].tolist()
    assert by_onnx == [0, 1]  # the lowest index, as ONNX demands
    still_a_trap(torch.topk(torch.zeros(E), K).indices.tolist() != by_onnx)


def test_reducing_no_tokens_along_the_last_axis():
    """Why the masked log reduces along axis 1 and not -1: over no tokens the runtime leaves that axis whole."""

    def width(axis):
        node = helper.make_node("ReduceMax", ["x", "axis"], ["y"], keepdims=1)
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, None]) for n in "xy")
        constant = numpy_helper.from_array(np.array([axis]), "axis")
        graph = helper.make_graph([node], "g", [x], [y], [constant])
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        return session_of(proto).run(None, {"x": np.zeros((0, 5), np.float32)})[0].shape[1]

    assert width(1) == 1
    assert width(-1) == (1 if VERSION >= (1, 32) else 5)


@pytest.mark.parametrize("provider", ["tensorrt", "nv_tensorrt_rtx", "webgpu"])
def test_providers_without_the_kernel(provider):
    assert f"{provider} has no com.microsoft::MoE" in problems(moe(), provider)[0]


def test_cuda_qmoe_needs_the_raw_layout_named():
    assert "weights_prepacked must be 0, not left out" in problems(qmoe(), "cuda")[0]


def test_the_kernels_that_the_table_names_are_registered():
    import onnxruntime.capi.onnxruntime_pybind11_state as state

    cpu = [d for d in state.get_all_opkernel_def() if d.provider == "CPUExecutionProvider"]
    for op in ("MoE", "QMoE"):
        assert any(d.op_name == op and d.type_constraints["T"] == ["tensor(float)"] for d in cpu)
    assert not any(d.op_name == "MoE" and "tensor(bfloat16)" in d.type_constraints["T"] for d in cpu)


def test_each_row_has_evidence_and_is_alone():
    assert len({(row.provider, row.op) for row in CAPABILITIES}) == len(CAPABILITIES)
    assert all(row.evidence for row in CAPABILITIES) and capability("cpu", "Attention") is None


@pytest.mark.parametrize("provider", ["cpu", "cuda", "tensorrt", "nv_tensorrt_rtx"])
def test_nothing_that_is_emitted_has_a_problem(provider):
    emitted = 0
    for lowering in LOWERINGS:
        for changes in ({}, dict(rows="plain", activation="relu"), dict(dtype=torch.bfloat16), dict(bias=False)):
            site = make_site(router=RouterSpec("softmax_topk", 2, 5), **changes)
            if not lowering.refuses(site, provider):
                emitted += 1
                assert check_graph(model_of(site, lowering), provider) == []
    assert emitted >= 4


def test_a_problem_in_a_subgraph_is_found():
    inner = moe(use_sparse_mixer=1).graph
    branch = helper.make_graph(inner.node, "branch", [], inner.output, inner.initializer)
    node = helper.make_node("If", ["c"], ["y0"], then_branch=branch, else_branch=branch)
    ins = [*inner.input, helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
    out = helper.make_tensor_value_info("y0", TensorProto.FLOAT, None)
    proto = onnx.helper.make_model(
        helper.make_graph([node], "g", ins, [out]), opset_imports=[helper.make_opsetid("", 18)]
    )
    assert len(problems(proto)) == 2
