"""Networks for sm_100, parsed here: each layer against its op, damage found, and the build refused here."""

import onnx_ir as ir
import pytest
import torch

from moeopt.backends.tensorrt.lowerings.trt_moe import TrtMoE
from moeopt.errors import EngineBuildError
from moeopt.ir.specs import RouterSpec
from moeopt.lower.onnx.assemble import one_op
from tests.backends.onnxrt.lowerings.one_site import make_site, renamed
from tests.backends.tensorrt.built import build_site
from tests.backends.tensorrt.network import check_networks, moe_layers

trt = pytest.importorskip("tensorrt_rtx")
ROUTER = RouterSpec("softmax_topk", 2, 5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


def written(path, site):
    ir.save(one_op(site, TrtMoE()), path)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        dict(router=ROUTER),
        dict(bias=False, rows="separate", w_in_layout="io"),
        dict(dtype=torch.bfloat16, rows="interleaved", activation="identity"),
        dict(dtype=torch.float16, router=ROUTER, w_out_layout="io"),
        dict(out_norm_eps=1e-5, weight_on="input", compute_dtype="bfloat16"),
    ],
    ids=renamed,
)
def test_the_layer_is_the_op(path, changes):
    site = make_site(**changes)
    assert check_networks(trt, written(path, site), [site]) == []


def test_what_the_parser_infers(path):
    (layer,) = moe_layers(trt, written(path, make_site(router=ROUTER, dtype=torch.float16)))
    assert layer.name == "layers.0.mlp/experts"
    weights = [(5, 12, 6), (5, 12, 6), (5, 6, 12), (5, 6), (5, 6), (5, 12)]
    assert list(layer.shapes) == [(1, -1, 12), (1, -1, 2), (1, -1, 2), *weights, (1, -1, 12)]
    assert list(layer.dtypes) == ["HALF", "INT32", *["HALF"] * 8]
    assert layer.attributes["activation"] == "SILU"


def swap_gate_and_up(layer):
    gate, up = layer.inputs[3], layer.inputs[4]
    layer.replace_input_with(3, up)
    layer.replace_input_with(4, gate)


def drop_the_activation(layer):
    layer.attributes["activation_type"] = ir.AttrInt64("activation_type", 0)


def add_a_limit(layer):
    layer.attributes["swiglu_limit"] = ir.AttrFloat32("swiglu_limit", 7.0)


def drop_the_biases(layer):
    layer.resize_inputs(6)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (swap_gate_and_up, "layers.0.mlp: the layer's expert 0 is not the op's"),
        (drop_the_activation, "the layer's activation is NONE, not SILU"),
        (add_a_limit, "the layer's swiglu is (7.0, 1.0, 0.0), not (inf, 1.0, 0.0)"),
        (drop_the_biases, "the layer's shapes are"),
    ],
)
def test_damage_is_found(path, damage, reason):
    site = make_site(router=ROUTER)
    model = one_op(site, TrtMoE())
    damage(next(node for node in model.graph if node.op_type == "TRT_MoE"))
    ir.save(model, path)
    problems = check_networks(trt, path, [site])
    assert len(problems) >= 1 and reason in problems[0], problems


def test_two_experts_swapped_are_found(path):
    site = make_site(router=ROUTER)
    written(path, site)
    outs = site.bank.w_out_l
    outs[1], outs[3] = outs[3], outs[1]
    assert check_networks(trt, path, [site]) == ["layers.0.mlp: the layer's expert 1 is not the op's"]


def test_a_layer_that_is_not_there_and_a_graph_that_does_not_parse(path):
    site = make_site(router=ROUTER)
    other = make_site()
    other.name = "layers.1.mlp"
    assert check_networks(trt, written(path, site), [other]) == ["layers.1.mlp: the network has 0 MoE layers for it"]
    model = one_op(site, TrtMoE())
    next(node for node in model.graph if node.op_type == "TRT_MoE").op_type = "TRT_MoF"
    ir.save(model, path)
    with pytest.raises(EngineBuildError, match="tensorrt_rtx does not take the graph: .*Plugin not found"):
        moe_layers(trt, path)


def test_an_engine_of_it_is_refused_here():
    with pytest.raises(EngineBuildError, match=r"block layers\.0\.mlp: .*Cannot decompose operation.*moe_fc1"):
        build_site(make_site(router=ROUTER), TrtMoE(), "sm_120")
