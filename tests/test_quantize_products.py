"""Products outside of MoE blocks in few bits, in an engine: told apart, judged, gated, saved, and never the router."""

import json
import sys
from os import environ

import pytest
import torch
from torch import nn

import moeopt
from moeopt import QuantPlan
from moeopt.cli import main
from moeopt.errors import UsageError
from moeopt.verification.certificate import Certificate
from tests import children
from tests.toy_moe import Block, Expert, H
from tests.trained_lm import load, text

IDS = torch.arange(30).view(2, 15)


class Turned(nn.Module):
    """A product whose Parameter is (in, out), under names of its own, as GPT-2's are."""

    def __init__(self, inside, outside):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(inside, outside) / inside**0.5)
        self.shift = nn.Parameter(torch.randn(outside))

    def forward(self, x):
        return torch.addmm(self.shift, x.reshape(-1, x.shape[-1]), self.matrix).view(*x.shape[:-1], -1)


class Attention(nn.Module):
    def __init__(self, wide):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(wide, wide, bias=b) for b in (True, False, False))
        self.out = Turned(wide, wide)

    def forward(self, x):
        scores = self.q(x) @ self.k(x).transpose(-1, -2) / x.shape[-1] ** 0.5
        return self.out(torch.softmax(scores, -1) @ self.v(x))


class Capped(nn.Linear):
    """A Linear by its class, and not by what it computes."""

    def forward(self, x):
        return 30 * torch.tanh(super().forward(x) / 30)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.moe = nn.Embedding(50, 16), Attention(16), Block()
        self.capped, self.head = Capped(16, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.attention(x)
        x = x + self.moe(x.reshape(-1, 16)).view_as(x)
        return self.head(x + self.capped(x))


def model():
    torch.manual_seed(0)
    return Model().eval()


def optimized(plan, source=None, inputs=IDS, **fields):
    fields = {"backend": "onnxruntime", "verify": "fast", **fields}
    return moeopt.optimize(model() if source is None else source, inputs, quantize=plan, **fields)


PRODUCTS = [f"attention.{name}" for name in ("q", "k", "v", "out")]


@pytest.fixture(scope="module")
def int4():
    return optimized(QuantPlan(default="int4", products={"head": "int8", "*": "int4"}), limit={"kl_mean": 0.01})


def test_every_product_but_the_router_is_on_codes_and_told(int4):
    certificate = int4.certificate
    assert certificate.passed is True and certificate.equivalent is False
    told = {name: form.split()[0] for name, form in certificate.products.items()}
    assert told == dict.fromkeys(PRODUCTS, "int4") | {"head": "int8"}
    assert list(certificate.quantized) == ["moe"]  # by what it computes: the capped Linear and the router are not there
    assert "against the model with quantised experts and products" in str(certificate).replace("\n    ", " ")
    assert "5 products to int4" in " ".join(str(certificate).split())
    names = [b["name"] for b in certificate.loss["blocks"]]
    assert names == ["moe", "attention", "head"]  # what each loses, an attention told as one
    assert all(0 < b["figures"]["kl_mean"] < 0.01 for b in certificate.loss["blocks"])
    notes = " ".join(int4.report.notes)
    assert "5 products outside of MoE blocks are quantised, 0.0073 MB of floats to 0.00164 MB" in notes
    assert "embed.weight, capped.weight: what computes with these is no module of one product alone" in notes
    assert "embed.weight, which has the floats of head and keeps them beside the codes" in notes


def test_the_engine_computes_the_model_on_the_floats_that_the_codes_mean(int4):
    """Independent of moeopt's judge: the original's class with rounded weights, written here."""
    from moeopt.ir.weight_format import INT4_BLOCK32, INT8_CHANNEL
    from moeopt.ops import quantize

    rounded = model()
    rounded.head.weight = nn.Parameter(quantize(rounded.head.weight.detach(), INT8_CHANNEL).dequantize())
    attention = rounded.attention
    for linear in (attention.q, attention.k, attention.v):
        linear.weight = nn.Parameter(quantize(linear.weight.detach(), INT4_BLOCK32).dequantize())
    matrix = attention.out.matrix
    matrix.data = quantize(matrix.detach().t(), INT4_BLOCK32).dequantize().t().contiguous()
    for expert in rounded.moe.experts:
        for linear in (m for m in expert.children() if isinstance(m, nn.Linear)):
            linear.weight = nn.Parameter(quantize(linear.weight.detach(), INT4_BLOCK32).dequantize())
    with torch.no_grad():
        want = rounded(IDS)
        assert not torch.allclose(want, model()(IDS), rtol=1e-3)
        torch.testing.assert_close(int4(IDS), want, rtol=1e-4, atol=1e-5)


def test_a_bundle_holds_the_codes_and_its_certificate_the_products(int4, tmp_path):
    import onnx

    folder = int4.save(tmp_path / "b")
    assert torch.equal(moeopt.load(folder)(IDS), int4(IDS))
    again = moeopt.verify(folder)
    assert again.passed is True and again.products == int4.certificate.products and again.equivalent is False
    assert Certificate.from_json(int4.certificate.to_json()).products == int4.certificate.products
    graph = onnx.load(folder / "model.onnx").graph
    assert {n.name for n in graph.node if n.op_type == "MatMulNBits"} >= {f"{name}/product" for name in PRODUCTS}
    held = {t.name: list(t.dims) for t in graph.initializer}
    assert held["head/weight.codes"] == [50, 16]
    assert held[next(n for n in held if n.startswith("embed") or n == "head.weight")] == [50, 16]  # for look-ups
    assert not [n for n in held if n.startswith("attention.") and n.endswith(("weight", "matrix"))]  # no floats stay
    assert moeopt.verify(int4, original=model()).passed is True
    assert moeopt.verify(folder, original=model(), inputs=IDS).loss["tokens"] == 30


def test_a_limit_names_the_products_that_cost_most():
    opt = optimized(QuantPlan(products="int4"), limit={"kl_mean": 1e-9})
    assert opt.certificate.passed is False and not opt.certificate.quantized
    assert "the blocks that cost most: " in opt.certificate.loss["missed"][0]
    assert "head (int4" in opt.certificate.loss["missed"][0]


class Outside(nn.Module):
    """The router is a plain Linear beside the experts' module: at the model's top, or in a layer."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts, self.out = nn.Linear(16, 4, bias=False), Given(), nn.Linear(16, 16)

    def forward(self, x):
        weights, ids = torch.topk(torch.softmax(self.gate(x), -1), 2)
        return self.out(self.experts(x, ids, weights))


class Given(Block):
    def __init__(self):
        super().__init__()
        del self.gate

    def forward(self, x, ids, weights):
        return self.loop(x, ids, weights)


@pytest.mark.parametrize("inside", [False, True])
def test_a_router_beside_its_experts_stays_float(inside):
    torch.manual_seed(0)
    source = nn.Sequential(Outside(), nn.Linear(16, 8)).eval() if inside else Outside().eval()
    plan, x = QuantPlan(products="int8"), torch.randn(9, 16)
    opt = moeopt.optimize(source, x, backend="onnxruntime", verify="fast", quantize=plan)
    assert opt.report.rewritten and list(opt.certificate.products) == (["1"] if inside else ["out"])


def test_a_model_without_such_products_is_told_so_and_its_experts_are_quantised():
    torch.manual_seed(0)
    opt = optimized(QuantPlan(default="int4", products="int8"), Block().eval(), torch.randn(9, H))
    assert opt.certificate.quantized and not opt.certificate.products
    assert "not quantised: products: the model has none outside of MoE blocks and rewritten ones" in opt.report.notes


class Shared(Block):
    """A shared expert in the block, of which no router decides."""

    def __init__(self):
        super().__init__()
        self.shared = Expert()

    def forward(self, x):
        return super().forward(x) + self.shared(x)


def test_a_shared_expert_is_quantised_with_the_products_and_its_router_is_not(tmp_path):
    from moeopt.ir.weight_format import INT4_BLOCK32, INT8_CHANNEL
    from moeopt.ops import quantize

    torch.manual_seed(0)
    source, x = nn.Sequential(nn.Linear(H, H), Shared()).eval(), torch.randn(9, H)
    opt = optimized(QuantPlan(default="int4", products={"0": "float", "*": "int8"}), source, x)
    assert list(opt.certificate.products) == ["1.shared.w1", "1.shared.w3", "1.shared.w2"] and opt.certificate.passed
    assert not any(note.startswith("not quantised") for note in opt.report.notes)
    for module, format in ((source[1].shared, INT8_CHANNEL), (source[1].experts, INT4_BLOCK32)):
        for layer in (m for m in module.modules() if isinstance(m, nn.Linear)):
            layer.weight = nn.Parameter(quantize(layer.weight.detach(), format).dequantize())
    with torch.no_grad():
        torch.testing.assert_close(opt(x), source(x), rtol=1e-4, atol=1e-6)
    assert torch.equal(moeopt.load(opt.save(tmp_path / "b"))(x), opt(x)) and moeopt.verify(tmp_path / "b").passed


class Threshold(nn.Module):
    """A mixture that no report names: gates beyond a half, on parts of one wide product."""

    def __init__(self):
        super().__init__()
        self.gate, self.wide = nn.Linear(16, 3), nn.Linear(16, 48)

    def forward(self, x):
        p = torch.sigmoid(self.gate(x))
        p = torch.where(p > 0.5, p, torch.zeros_like(p))
        return (self.wide(x).unflatten(-1, (3, 16)) * p[..., None]).sum(-2)


def test_the_router_of_a_mixture_that_was_not_found_stays_float_and_is_named():
    torch.manual_seed(0)
    source, x = nn.Sequential(Threshold(), nn.Linear(16, 8)).eval(), torch.randn(9, 16)
    opt = optimized(QuantPlan(products="int8"), source, x)
    assert not opt.report.blocks and sorted(opt.certificate.products) == ["0.wide", "1"]
    notes = " ".join(opt.report.notes)
    assert "not quantised: 0.gate: it is a router, its results are chosen from (gt at " in notes


def test_a_model_that_calls_no_module_keeps_its_floats():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe, self.out, self.last = Block(), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.last(torch.nn.functional.linear(self.moe(x), self.out.weight))

    torch.manual_seed(0)
    opt = moeopt.optimize(
        Reads().eval(), torch.randn(9, 16), backend="onnxruntime", verify="fast", quantize=QuantPlan(products="int8")
    )
    assert list(opt.certificate.products) == ["last"]
    assert any("out: no call of it was seen" in note for note in opt.report.notes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: QuantPlan(products="int3"), "QuantPlan(products=)='int3' is no format"),
        (lambda: QuantPlan(products={"head": "checkpoint"}), "QuantPlan(products=)='checkpoint' is no format"),
        (lambda: QuantPlan(activations="int4"), "it must be one of float, int8"),
        (lambda: QuantPlan(products=["int8"]), "it must be a format, or map patterns of module paths to formats"),
        (
            lambda: optimized(QuantPlan(products="int8"), backend="torch"),
            "QuantPlan(products=) is for engines, and backend='torch' keeps a model whose own modules compute these",
        ),
        (
            lambda: optimized(QuantPlan(products={"lm_head": "int8"})),
            "names 'lm_head', which matches no product outside of MoE blocks and of no rewritten one; the products are "
            "attention.q, attention.k",
        ),
        (lambda: optimized(QuantPlan(products={"moe.*": "int8"})), "names 'moe.*', which matches no product"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for(make, words):
    with pytest.raises(UsageError) as err:
        make()
    assert words in str(err.value)


def test_a_weight_that_is_no_number_is_named():
    broken = model()
    with torch.no_grad():
        broken.attention.v.weight[3, 1] = float("nan")
    with pytest.raises(UsageError, match="the weight of attention.v holds NaN or infinity"):
        optimized(QuantPlan(products="int4"), broken, verify="off")


def test_the_command_quantises_products(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom tests.test_quantize_products import IDS, model\n\ndef build():\n    return model(), IDS\n"
    )
    words = ["optimize", f"{tmp_path}/mine.py:build", "--backend", "onnxruntime", "--verify", "fast", "--json", "-q"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--quantize", "int4", "--quantize-products", "int4", "--quantize-products", "head=int8"])
    certificate = json.loads(capsys.readouterr().out)["certificate"]
    assert end.value.code == 0 and certificate["products"]["head"].startswith("int8")
    assert certificate["products"]["attention.q"].startswith("int4") and certificate["quantized"]


@pytest.fixture(scope="module")
def rounding():
    plan = QuantPlan(default="int4", products={"head": "int8", "*": "int4"}, activations="int8")
    return optimized(plan, limit={"kl_mean": 0.01})


def test_activations_are_rounded_after_the_engine_was_verified_and_the_loss_counts_it(rounding, int4):
    certificate, before = rounding.certificate, int4.certificate
    assert certificate.passed is True and certificate.equivalent is False
    assert certificate.end_to_end.distance <= certificate.end_to_end.budget  # of the form with float activations
    told = certificate.activations
    assert told["products"] == 17 and told["kinds"] == 2 and told["error_eps"] < 64 and before.activations == {}
    if torch.equal(rounding(IDS), int4(IDS)):
        pytest.skip("this CPU computes these products in float32")
    assert 1e-4 < told["outputs"] < 0.05 and 1e-3 < told["product"] < 0.05
    assert certificate.loss["kl_mean"] != before.loss["kl_mean"]  # of what runs, rounded activations and all
    with torch.no_grad():
        want, got = (torch.log_softmax(f(IDS).double(), -1) for f in (model(), rounding))
    assert certificate.loss["kl_mean"] == pytest.approx(float((want.exp() * (want - got)).sum(-1).mean()), rel=1e-3)
    assert "17 products of codes round what they read to int8" in " ".join(str(certificate).split())


def test_a_bundle_with_rounded_activations(rounding, tmp_path):
    import onnx

    from moeopt.errors import BundleError

    folder = rounding.save(tmp_path / "b")
    nodes = onnx.load(folder / "model.onnx").graph.node
    levels = {a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {4} and json.loads((folder / "moeopt.json").read_text())["activations"] == "int8"
    assert torch.equal(moeopt.load(folder)(IDS), rounding(IDS))
    again = moeopt.verify(folder)
    assert again.passed is True and again.activations == rounding.certificate.activations
    assert moeopt.verify(rounding, original=model()).passed is True  # in the form that was verified
    manifest = json.loads((folder / "moeopt.json").read_text())
    del manifest["activations"]
    (folder / "moeopt.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="at accuracy level 4, with which activations may be rounded to int8"):
        moeopt.load(folder)


def test_a_limit_judges_rounded_activations(rounding):
    plan = QuantPlan(products={"head": "int8"}, activations="int8")
    assert optimized(plan, limit={"kl_mean": 1e-9}).certificate.passed is False
    assert Certificate.from_json(rounding.certificate.to_json()).activations == rounding.certificate.activations


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(portable=True), "is for ONNX Runtime's own products of codes on a CPU: leave it out, or leave portable"),
        (dict(target="cuda"), "leave it out, or leave the provider cuda out"),
    ],
)
def test_where_activations_cannot_be_rounded(fields, words):
    with pytest.raises(UsageError) as err:
        optimized(QuantPlan(default="int8", activations="int8"), **fields)
    assert words in str(err.value)


def test_a_kernel_that_computes_something_else_leaves_activations_floats(monkeypatch):
    from moeopt.backends.onnxrt import rounded_activations

    monkeypatch.setattr(rounded_activations, "rounded_rows", lambda x, block, dtype: x.to(dtype) * 1.01)
    opt = optimized(QuantPlan(default="int8", products="int8", activations="int8"))
    assert opt.certificate.activations == {} and opt.certificate.passed is True
    for notes in (opt.report.notes, opt.certificate.notes):
        assert sum("activations stay floats: a product of 16 x 16 in 8 bits is" in note for note in notes) == 1
    plain = optimized(QuantPlan(default="int8", products="int8"))  # and the engine is no other than without the plan
    (lowering,), (same) = ([b.lowering for b in one.report.rewritten] for one in (opt, plain))
    assert [lowering.split(",")[0]] == [same[0].split(",")[0]] and "unrolled-bytes" not in lowering.split(";")[0]
    assert torch.equal(opt(IDS), plain(IDS)) and opt.certificate.products == plain.certificate.products


class Twice(nn.Module):
    """One Linear at two places, called three times, asked for its sizes."""

    def __init__(self):
        super().__init__()
        self.moe, self.a = Block(), nn.Linear(H, H)
        self.b = self.a

    def forward(self, x):
        for layer in (self.a, self.b, self.a):
            x = layer(x) / layer.in_features**0.5
        return self.moe(x)


def test_a_module_of_several_places_is_one_product_however_often_it_is_called():
    torch.manual_seed(0)
    wide, x = Twice().eval(), torch.randn(6, H)
    engine = moeopt.optimize(
        wide, x, backend="onnxruntime", quantize=QuantPlan(products={"*": "int8"}), mapped=True, verify="fast"
    )
    assert engine.certificate.passed is True and list(engine.certificate.products) == ["a"]
    with pytest.raises(UsageError, match="a and b are one module, for which QuantPlan.* several formats"):
        moeopt.optimize(
            wide, x, backend="onnxruntime", quantize=QuantPlan(products={"a": "float", "b": "int8"}), verify="fast"
        )


def test_rounded_activations_alone_are_not_equivalent():
    rounded = {"products": 2, "kinds": 1, "error_eps": 1.0, "product": 1e-2, "outputs": 0.4}
    certificate = Certificate(activations=rounded)
    assert certificate.lossy and certificate.equivalent is False
    assert "activations: 2 products of codes round what they read to int8" in " ".join(str(certificate).split())
    assert Certificate.from_json(certificate.to_json()).activations == rounded


def test_golden_runs_of_rounded_activations_do_not_allow_a_flipped_expert():
    from moeopt.backends.onnxrt.golden import budget_of
    from moeopt.verification.certificate import EndToEnd

    rounded = {"products": 2, "kinds": 1, "error_eps": 1.0, "product": 1e-2, "outputs": 0.4}
    made = Certificate(activations=rounded, end_to_end=EndToEnd(passed=True, budget=1e-5))
    assert budget_of(made)[0] == 1e-2
    made.activations = rounded | {"outputs": 1e-3}
    assert budget_of(made)[0] == 1e-3


def test_distances_are_those_of_finite_rows():
    from moeopt.verification.rounded import distance_between

    masked = torch.tensor([[1.0, -torch.inf], [3.0, 4.0]])
    assert distance_between(masked, masked * 1.1) == pytest.approx(0.1, rel=1e-5)
    assert distance_between(masked[:1], masked[:1]) == 0.0


def test_a_language_model_in_few_bits_generates_from_its_bundle_in_another_process(tmp_path):
    """Products, experts and activations in codes: the greedy tokens are those of the original on rounded weights."""
    pytest.importorskip("transformers")
    model, ids = load("moe"), text(2)[:, :12]
    plan = QuantPlan(default="int8", products="int8", activations="int8")
    opt = optimized(plan, model, {"input_ids": ids})
    assert opt.certificate.passed and len(opt.certificate.products) > 8
    assert not [path for path in opt.certificate.products if path.endswith("mlp.gate")]
    folder, words = opt.save(tmp_path / "b"), dict(max_new_tokens=8, do_sample=False)
    tokens = opt.generate(ids, **words)
    agree = (tokens == model.generate(ids, **words)).float().mean()
    assert tokens.shape == (2, 20) and agree > 0.8  # 8 bits move a token of a trained model now and then
    code = (
        "import moeopt, torch, sys, json\n"
        f"engine, ids = moeopt.load({str(folder)!r}), torch.tensor({ids.tolist()})\n"
        f"print(json.dumps(engine.generate(ids, **{words}).tolist()))\n"
    )
    environment = dict(environ) | {"ORT_QMOE_CPU_QNBIT_GEMM": "int8", "OMP_NUM_THREADS": "1"}
    ran = children.run([sys.executable, "-c", code], env=environment)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == tokens.tolist()
