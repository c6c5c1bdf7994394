"""Ids are known to name experts only where the graph's nodes say so; without them the unrolled form is shorter."""

import dataclasses

import onnx
import onnx_ir as ir
import pytest
import torch

from moeopt.backends.onnxrt.lowerings import by_name
from moeopt.lower.onnx.assemble import replace_sites
from moeopt.lower.onnx.experts_node import DOMAIN, OP
from moeopt.lower.onnx.named_ids import always_named
from tests.backends.onnxrt.lowerings.one_site import make_site, model_of, run, session_of, tokens

HEAD = '<ir_version: 9, opset_import: ["" : 20]>\n'


def ids_of(body, E=8):
    text = f"""{HEAD} g (float[T,{E}] s, int64[T,2] given) => (int64[a,b] ids)
        <int64[1] two = {{2}}, int64[1] m = {{-1}}, int64[2] pairs = {{-1, 2}}> {{ {body} }}"""
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))).graph.outputs[0]


TOP = "w, i = TopK(s, two)\n"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("w, ids = TopK(s, two)", True),
        ("w, ids = TopK<axis=1>(s, two)", True),
        ("w, ids = TopK<axis=0>(s, two)", False),
        (TOP + "flat = Reshape(i, m)\n ids = Reshape(flat, pairs)", True),
        (TOP + "narrow = Cast<to=6>(i)\n ids = Cast<to=7>(narrow)", True),
        (TOP + "narrow = Cast<to=3>(i)\n ids = Cast<to=7>(narrow)", False),
        (TOP + "rounded = Cast<to=1>(i)\n ids = Cast<to=7>(rounded)", False),
        (TOP + "ids = Add(i, two)", False),
        (TOP + "ids = Cast<to=7>(w)", False),
        ("ids = Identity(given)", False),
    ],
)
def test_what_is_known_of_ids(body, named):
    assert always_named(ids_of(body), 8) is named


def test_more_scores_than_experts_may_name_none():
    assert always_named(ids_of("w, ids = TopK(s, two)"), 8)
    assert not always_named(ids_of("w, ids = TopK(s, two)"), 7)
    assert not always_named(ids_of("w, ids = TopK(s, two)", E="N"), 8)


SPECS = [{}, dict(rows="plain", out_norm_eps=1e-5, bias=False), dict(weight_on="input"), dict(E=1, K=1), dict(K=4, E=9)]


@pytest.mark.parametrize("changes", SPECS, ids=str)
def test_the_shorter_form_gives_the_same_bits(changes):
    site = make_site(**changes)
    long, short = (model_of(dataclasses.replace(site, named=named), "unrolled") for named in (False, True))
    assert len(short.graph) <= len(long.graph) - 8
    assert not {"And", "Less", "Where"} & {node.op_type for node in short.graph}
    for T in (0, 1, 7, 64):
        args = tokens(site, T)
        assert torch.equal(run(session_of(short), *args), run(session_of(long), *args))


@pytest.mark.parametrize(("spec", "shorter"), [({}, True), ({"out_of_range": "identity"}, False)])
def test_a_graph_s_own_top_k_decides(spec, shorter):
    site = make_site(**spec)
    text = f"""{HEAD.replace("]", f', "{DOMAIN}" : 1]')} g (float[T,12] x, float[T,5] s) => (float[T,12] y)
        <int64[1] two = {{2}}> {{
        w, ids = TopK(s, two)
        y = {DOMAIN}.{OP}<site=0>(x, ids, w) }}"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    replace_sites(model, [site], lambda _: by_name("unrolled"))
    assert ("Less" not in {node.op_type for node in model.graph}) is shorter
