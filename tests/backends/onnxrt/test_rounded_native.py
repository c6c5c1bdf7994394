"""moeopt's own operator on rows of 8 bits: the stated rounding within its bound, in engines and bundles."""

import json
import re

import onnx
import onnx_ir as ir
import pytest
import torch

import moeopt
from moeopt.backends.onnxrt import rounded_activations
from moeopt.backends.onnxrt.lowerings import by_name
from moeopt.backends.onnxrt.lowerings.native import Native
from moeopt.backends.onnxrt.native_choice import _rounds_alike
from moeopt.backends.onnxrt.plan import session_of
from moeopt.backends.onnxrt.session import GRAPH, NATIVE, VERIFIED_NATIVE
from moeopt.errors import BundleError
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_format import FORMATS, INT4_BLOCK32
from moeopt.lower.onnx.experts_node import ON_CODES, ExpertsNode
from moeopt.ops.reference import experts_reference
from moeopt.ops.rounded_rows import rounded_rows
from moeopt.options import QuantPlan
from moeopt.verification.rounded import ALLOWED
from tests.backends.onnxrt.lowerings.one_site import make_site, model_of
from tests.backends.onnxrt.lowerings.test_native import session_of as opened
from tests.backends.onnxrt.lowerings.test_quantized import quantized
from tests.backends.onnxrt.native import choose_native, needs_operator
from tests.backends.onnxrt.toys import call, net
from tests.ops.native.test_rounded import exact_bank, exact_rows, routed

CODES, BYTES = (Native(by_name(f"unrolled-{stored}")) for stored in ("codes", "bytes"))


@pytest.fixture(autouse=True)
def operator():
    needs_operator()


@pytest.mark.parametrize(
    "spec", [ExpertsSpec(activation="relu"), ExpertsSpec(rows="plain", activation="relu")], ids=str
)
@pytest.mark.parametrize("name", ["int4", "int4-block128", "int8", "int8-block64"])
def test_it_rounds_rows_as_the_reference_does_and_stays_within_the_stated_bound(name, spec):
    """Exact before each rounding, so that no float32 sum decides between two steps."""
    for H, I in ((33, 24), (300, 136)):
        bank = exact_bank(FORMATS[name], H, I, spec=spec)
        site = ExpertsNode("block", bank, spec, torch.float32, 2, torch.float32)
        native = BYTES if name.startswith("int8") else CODES
        session, floats = (session_of(site, native, rounds=rounds) for rounds in (True, False))
        for T in (0, 1, 5, 40):
            args = exact_rows(max(T, 1), H)[:T], *(t[:T] for t in routed(max(T, 1)))
            feeds = dict(zip(("x", "ids", "weights"), args, strict=True))
            want, (got,), (plain,) = experts_reference(*args, bank, spec), session.run(feeds), floats.run(feeds)
            length = want.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
            assert bool(((got - want).norm(dim=-1) / length <= ALLOWED * torch.finfo(torch.float32).eps).all())
            assert T < 5 or not torch.equal(got, plain)


def test_a_product_is_no_further_from_float_rows_than_the_bound_says():
    """largest / 254 of each block times the sum of |w| there: W_out is the identity, so a product is what comes out."""
    H = 96
    bank = exact_bank(INT4_BLOCK32, H, H, spec=ExpertsSpec(rows="plain", activation="identity"))
    spec = ExpertsSpec(rows="plain", activation="identity")
    site = ExpertsNode("block", bank, spec, torch.float32, 1, torch.float32)
    x = torch.randn(9, H, generator=torch.Generator().manual_seed(3)) * 10
    args = {"x": x, "ids": torch.zeros(9, 1, dtype=torch.int64), "weights": torch.ones(9, 1)}
    got = session_of(site, CODES, rounds=True).run(args)[0].double()
    w_in, w_out = (m[0].dequantize(torch.float64) for m in (bank.w_in_q[0], bank.w_out_q))
    between = rounded_rows(x).double() @ w_in.T

    def bound(rows, w):
        largest = rows.abs().view(len(rows), -1, 32).amax(-1)
        return largest / 254 @ w.abs().view(len(w), -1, 32).sum(-1).T

    first, second = bound(x.double(), w_in), bound(between, w_out)
    exact = x.double() @ w_in.T @ w_out.T
    assert bool(((got - exact).abs() <= 1.0001 * (first @ w_out.abs().T + second) + 1e-5).all())


def test_what_cannot_be_rounded_is_refused_before_anything_runs():
    proto = ir.to_proto(model_of(quantized(make_site(H=96, I=96), FORMATS["int4-block16"]), CODES))
    (node,) = [node for node in proto.graph.node if node.op_type == ON_CODES]
    node.attribute.append(onnx.helper.make_attribute("rounds", 1))
    with pytest.raises(Exception, match=r"moeopt::Experts: rows are rounded in blocks of 32, which its scales cut"):
        opened(onnx.ModelProto.FromString(proto.SerializeToString()))
    proto = ir.to_proto(model_of(make_site(), Native(by_name("unrolled"))))
    proto.graph.node[0].attribute.append(onnx.helper.make_attribute("rounds", 1))
    with pytest.raises(Exception, match=r"moeopt::Experts: rows are rounded to 8 bits for codes, and its weights are"):
        opened(onnx.ModelProto.FromString(proto.SerializeToString()))


def test_both_forms_of_a_block_round_or_neither():
    floats, codes, bytes_ = (by_name(name) for name in ("unrolled-floats", "unrolled-codes", "unrolled-bytes"))
    assert _rounds_alike(make_site(), by_name("unrolled"))
    assert _rounds_alike(quantized(make_site(), INT4_BLOCK32), codes)
    assert not _rounds_alike(quantized(make_site(), INT4_BLOCK32), floats)
    assert _rounds_alike(quantized(make_site(), FORMATS["int8"]), bytes_)
    assert not _rounds_alike(quantized(make_site(), FORMATS["int8"]), floats)
    assert not _rounds_alike(quantized(make_site(H=96, I=96), FORMATS["int4-block16"]), codes)


@pytest.fixture(scope="module", params=["int4", "int8"])
def rounding(request):
    needs_operator()
    plan = QuantPlan(default=request.param, activations="int8")
    with pytest.MonkeyPatch.context() as patch:
        choose_native(patch)
        return moeopt.optimize(net(), call(), backend="onnxruntime", quantize=plan, verify="fast")


def test_an_engine_is_verified_with_float_rows_and_rounds_then(rounding):
    told, floats = rounding.certificate.activations, rounding.model.verified_form()
    assert (rounding.model.graph, floats.graph) == (NATIVE, VERIFIED_NATIVE) and rounding.certificate.passed
    assert told["products"] == 3 * sum(b.experts for b in rounding.report.rewritten) > 0  # gate, up and down
    assert told["error_eps"] < ALLOWED and 1e-4 < told["product"] < 0.05 and 0 < told["outputs"] < 0.1
    inputs = call(3, 7)
    with torch.no_grad():
        assert not torch.equal(rounding(**inputs)["x"], floats(**inputs)["x"])
    assert moeopt.verify(rounding, original=net()).passed is True


def test_a_bundle_says_that_its_nodes_round(rounding, tmp_path):
    folder, inputs = rounding.save(tmp_path / "b"), call(3, 7)
    for graph, name in ((NATIVE, "rounds"), (GRAPH, "accuracy_level")):
        nodes = onnx.load(folder / graph, load_external_data=False).graph.node
        assert {a.i for node in nodes for a in node.attribute if a.name == name} == {1 if name == "rounds" else 4}
    engine = moeopt.load(folder)
    assert engine.graph == NATIVE and torch.equal(engine(**inputs)["x"], rounding(**inputs)["x"])
    assert moeopt.verify(folder).passed
    manifest = json.loads((folder / "moeopt.json").read_text())
    del manifest["activations"]
    (folder / "moeopt.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="at accuracy level 4|reads rows rounded to int8"):
        moeopt.load(folder)


def test_an_operator_that_computes_something_else_is_not_let_round(rounding, monkeypatch, tmp_path):
    folder = rounding.save(tmp_path / "b")
    monkeypatch.setattr(rounded_activations, "error_of", lambda ask, format: (900.0, 0.1))
    said = r"moeopt's operator on experts of \d+ x \d+ and .* is 900 eps from what rounding to int8 gives"
    with pytest.raises(rounded_activations.RoundingDeclined, match=said):
        rounded_activations.check_rounding(rounding.model.directory)
    engine = moeopt.load(folder)
    assert engine.graph == GRAPH and any(re.search("model.onnx runs, not .*: " + said, n) for n in engine.notes)
