"""Experts of one product in the bodies of loops, scans and branches: written out and rewritten, or told."""

import numpy as np
import onnxruntime
import pytest
import torch

import moeopt
from tests.onnx_in.bodies import BRANCH, GATHERED, LOOP, SCAN, E, H, model, of_one_product
from tests.onnx_in.test_left_alone import branches, saved

UP = np.random.default_rng(1).normal(size=(E, H, H))
FORMS = {"Loop": LOOP, "Loop, its results gathered": GATHERED, "Scan": SCAN, "Loop in an If": BRANCH}
ONE = {name: of_one_product(text) for name, text in FORMS.items()}
WEIGHED = ("t = Mul(m, weights)", "w = ReduceSum (t, last)", "m = Cast <to = 1> (hit)", "hit = Equal(ids, e)")


def blocks(text, **fields):
    return [(b.name, b.status, b.experts) for b in moeopt.explain(model(text, up=UP, **fields), verify="off").blocks]


@pytest.mark.parametrize("form", ONE)
def test_they_are_written_out_and_rewritten(form):
    given = model(ONE[form], up=UP)
    found = moeopt.optimize(given, verify="off")
    assert [(b.status, b.experts, b.top_k) for b in found.report.blocks] == [("rewritten", E, 2)]
    x = torch.randn(7, H, generator=torch.Generator().manual_seed(2))
    (want,) = onnxruntime.InferenceSession(given.SerializeToString()).run(None, {"x": x.numpy()})
    torch.testing.assert_close(found(x), torch.from_numpy(want), rtol=1e-4, atol=1e-5)


STAYS = {
    "it may stop": (
        ONE["Loop"].replace("again = Identity(go)", "most = ReduceMax(w)\n again = Cast <to = 9> (most)"),
        {},
        "loop_4.experts",
    ),
    "how often is not known": (ONE["Loop"], {"takes": "float[t, 8] x, int64 trips"}, "loop_4.experts"),
    "the caller decides": (ONE["Loop in an If"], {"takes": "float[t, 8] x, bool yes"}, "Loop.experts"),
}


@pytest.mark.parametrize("why", STAYS)
def test_one_that_stays_in_its_body_is_told(why):
    text, fields, name = STAYS[why]
    (block,) = moeopt.explain(model(text, up=UP, **fields), verify="off").blocks
    assert (block.name, block.status, block.experts) == (name, "declined", E)
    node = "that gives 'y_then' (Loop)" if "caller" in why else "'loop_4' (Loop)"
    assert block.reason.startswith(f"it stands in a body of the node {node}, and moeopt replaces blocks of the main")


def test_layers_and_heads_are_no_experts():
    layers = ONE["Loop"].replace("c = MatMul(x, u)", "c = MatMul(y_in, u)")
    heads = ONE["Loop"].replace("part = Mul(c, w)", "part = Relu(c)")
    for line in WEIGHED:
        heads = heads.replace(line, "")
    assert blocks(layers) == blocks(heads) == []


def one_each_in_a_branch(otherwise):
    nodes, weights = branches(otherwise=otherwise)
    for node in nodes:
        for body in (a.g for a in node.attribute if a.name == "then_branch"):
            first, _, last, part = body.node
            last.input[:], last.output[0] = [first.input[0], last.input[1]], first.output[0]
            part.input[0] = first.output[0]
            del body.node[:2]
    sizes = {name: w[:, :H] if ".up" in name else w[:H] if ".down" in name else w for name, w in weights.items()}
    return nodes, sizes


def test_branches_of_one_product_are_written_out_or_told(tmp_path):
    found = moeopt.optimize(saved(tmp_path / "m.onnx", *one_each_in_a_branch("zero"), []), verify="off")
    assert [(b.status, b.experts) for b in found.report.blocks] == [("rewritten", 3)]
    (block,) = moeopt.explain(saved(tmp_path / "n.onnx", *one_each_in_a_branch("half"), []), verify="off").blocks
    assert (block.name, block.status, block.experts) == ("experts", "declined", 3)
    assert block.reason.startswith(
        "each of its experts stands in a branch of its own, like those of the nodes 'if0' and"
    )
