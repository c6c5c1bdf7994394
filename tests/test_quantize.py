"""Quantise on request: what runs is the quantised model, what that lost is told, and limits are gates."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import moeopt
from moeopt.cli import main
from moeopt.errors import StaleModelWarning, UsageError
from moeopt.verification.certificate import Certificate
from tests.toy_moe import Block, build
from tests.trained_lm import load, perplexity, text

pytestmark = pytest.mark.usefixtures("fast_by_default")
X = torch.randn(30, 16, generator=torch.Generator().manual_seed(3))

# Mean KL, top-1 agreement and perplexity ratio on 1536 held-out characters. The bands are the measured figures give or
# take four standard errors (over the 16 sequences), for another CPU may send a token at a tie to other experts.
BANDS = {
    "int8": ((5e-5, 2e-4), 0.985, (0.998, 1.003)),
    "fp8": ((5e-4, 4e-3), 0.97, (0.99, 1.01)),
    "int4": ((6e-3, 1.5e-2), 0.92, (1.0, 1.03)),
    "mxfp4": ((8e-3, 1.7e-2), 0.91, (1.005, 1.045)),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", BANDS)
def test_a_trained_model_in_each_format(name):
    pytest.importorskip("transformers")
    model = load("moe")
    opt = moeopt.optimize(model, {"input_ids": text(4)}, quantize=name, data={"input_ids": text()}, verify="fast")
    (low, high), top1, (least, most) = BANDS[name]
    loss, certificate = opt.certificate.loss, opt.certificate
    assert certificate.passed is True and certificate.equivalent is False
    assert certificate.end_to_end.distance <= certificate.end_to_end.budget
    assert low < loss["kl_mean"] < high and loss["top1"] > top1 and least < loss["perplexity_ratio"] < most
    assert loss["kl_mean"] <= loss["kl_p99"] <= loss["kl_p999"] <= loss["kl_max"]
    assert loss["tokens"] == 1536 and loss["sequences"] == 16 and 0 < loss["ids_changed"] < 0.05
    assert 5e-5 < loss["reference"]["kl_mean"] < 2e-4  # int8 per channel, whatever was asked for
    assert [b["name"] for b in loss["blocks"]] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert loss["blocks"][0]["ids_differ"] == 0 < loss["blocks"][1]["ids_differ"]  # nothing is lost before layer 0
    assert perplexity(opt) / perplexity(model) == pytest.approx(loss["perplexity_ratio"], rel=1e-4)
    tokens = opt.generate(text(1)[:, :8], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 12)


def test_a_dense_model_in_groups():
    pytest.importorskip("transformers")
    opt = moeopt.optimize(
        load("dense"), {"input_ids": text(4)}, dense="split", experts=4, quantize="int8", verify="fast"
    )
    assert opt.certificate.passed is True and len(opt.certificate.quantized) == 2
    assert opt.certificate.loss["kl_mean"] < 1e-3 and opt.certificate.loss["ids_changed"] == 0


def test_codes_are_held_instead_of_floats():
    model = build()
    want = {name: p.clone() for name, p in model.named_parameters()}
    opt = moeopt.optimize(model, X, quantize="int4")
    state = opt.model.state_dict()
    assert [n for n in state if "weight" in n] == ["gate.weight"]
    assert state["moeopt_experts_0_w_out_codes"].shape == (4, 16, 8)  # two codes a byte
    codes = sum(t.numel() * t.element_size() for n, t in state.items() if "codes" in n or "scales" in n)
    floats = sum(p.numel() * 4 for name, p in model.named_parameters() if name.startswith("experts."))
    (told,) = opt.certificate.loss["blocks"]
    assert (codes, floats) == (told["bytes"], told["float_bytes"])
    assert codes * 8 == (4 + 16 / 16) * floats / 4  # 4 bits and, for each row of 16, a scale of 16
    assert all(torch.equal(p, want[name]) for name, p in model.named_parameters())  # the input model keeps its own
    assert any("are quantised, 0.0123 MB of floats to 0.00192 MB" in note for note in opt.report.notes)
    assert opt.report.rewritten[0].lowering.endswith("weights in int4 (uint4, one bfloat16 scale per 1 x 32)")


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_carry_the_codes(twin):
    opt = moeopt.optimize(build(), X, quantize="int8")
    with torch.no_grad():
        assert torch.equal(twin(opt)(X), opt(X))


def test_a_state_goes_from_one_to_another():
    opt = moeopt.optimize(build(), X, quantize="int8")
    torch.manual_seed(5)
    other = moeopt.optimize(Block().eval(), X, quantize="int8")
    assert not torch.allclose(other(X), opt(X))
    other.model.load_state_dict(opt.model.state_dict())
    assert torch.equal(other(X), opt(X))


def test_a_bundle_round_trip(tmp_path):
    model = build()
    routed = moeopt.optimize(model, X, quantize="int4", limit={"error_mean": 0.5})
    with torch.no_grad():
        want = routed(X)
    folder = routed.save(tmp_path / "bundle")
    engine = moeopt.load(folder)
    assert torch.equal(engine(X), want)
    certificate = moeopt.verify(folder)
    assert certificate.passed is True and certificate.equivalent is False
    assert certificate.loss["limit"] == {"error_mean": 0.5} and certificate.loss == routed.certificate.loss
    again = moeopt.verify(folder, original=model, inputs=X[:7])
    assert again.passed is True and again.loss["tokens"] == 7 and again.loss["data"] == "the inputs that were given"


def test_verify_compares_with_the_quantised_original():
    model = build()
    opt = moeopt.optimize(model, X, quantize="int4", limit={"error_mean": 0.3})
    certificate = moeopt.verify(opt, original=model)
    assert certificate.passed is True and certificate.equivalent is False
    assert certificate.loss["error_mean"] == pytest.approx(opt.certificate.loss["error_mean"])
    opt.model.moeopt_experts_0_w_out_codes[:] ^= 0x88  # other codes are another loss
    certificate = moeopt.verify(opt, original=model)
    assert certificate.passed is False and certificate.loss["missed"]


def test_a_missed_limit_is_told_and_nothing_is_reverted():
    opt = moeopt.optimize(build(), X, quantize="int4", limit={"error_mean": 0.01, "error_max": 0.9})
    certificate = opt.certificate
    assert certificate.passed is False and certificate.quantized == {
        "Block": "int4 (uint4, one bfloat16 scale per 1 x 32)"
    }
    (told,) = certificate.loss["missed"]
    assert told.startswith("error_mean is 0.1") and "the blocks that cost most: Block (int4" in told
    assert Certificate.from_json(certificate.to_json()).passed is False


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = build(), build()
        with torch.no_grad():
            for p in self.b.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        return self.b(self.a(x) + x)


def test_a_plan_gives_each_block_its_own():
    """The second block is alike the first and bound to its graph: its format is its own all the same."""
    opt = moeopt.optimize(Two().eval(), X, quantize=moeopt.QuantPlan({"a": "int8", "b": "float"}))
    assert list(opt.certificate.quantized) == ["a"]
    assert opt.model.b.experts[0].w1.weight is not None and opt.model.a.experts[0].w1.weight is None
    opt = moeopt.optimize(Two().eval(), X, quantize=moeopt.QuantPlan({"b": "mxfp4"}, default="int8"))
    assert [name.split()[0] for name in opt.certificate.quantized.values()] == ["int8", "mxfp4"]


def test_a_plan_whose_pattern_names_nothing():
    with pytest.raises(UsageError, match=r"quantize names 'c\*', which matches no block; the blocks are a, b"):
        moeopt.optimize(Two().eval(), X, quantize=moeopt.QuantPlan({"c*": "int8"}))


def test_data_are_a_call_or_several():
    opt = moeopt.optimize(build(), X, quantize="int8", data=[X[:4], (X[4:9],), {"x": X[9:]}])
    whole = moeopt.optimize(build(), X, quantize="int8")
    assert opt.certificate.loss["tokens"] == 30 and opt.certificate.loss["data"] == "3 calls of data="
    assert opt.certificate.loss["error_mean"] == pytest.approx(whole.certificate.loss["error_mean"], rel=1e-5)


def test_what_is_left_float_is_told():
    opt = moeopt.optimize(Two().eval(), X, quantize="int8", only_passes="group_experts")
    assert opt.certificate.equivalent is True and not opt.certificate.quantized
    assert any(n == "not quantised: a: skipped: only_passes names group_experts" for n in opt.report.notes)


class Odd(Block):
    def forward(self, x):
        return super().forward(x) if x.sum().item() < 1e9 else x


def test_a_declined_block_is_told():
    opt = moeopt.optimize(build(Odd), X, quantize="int8")
    assert any("only experts that were rewritten into one op can be" in n for n in opt.report.notes), opt.report


def test_gradients_flow_to_what_is_still_float():
    model = build()
    opt = moeopt.optimize(model, X, quantize="int8")
    x = X.clone().requires_grad_()
    opt(x).square().sum().backward()
    assert x.grad.abs().sum() > 0 and model.gate.weight.grad.abs().sum() > 0


def test_a_change_of_the_block_runs_its_own_code_on_the_rounded_floats():
    opt = moeopt.optimize(build(), X, quantize="int8")
    before = opt(X)
    opt.model.top_k = 1
    with pytest.warns(StaleModelWarning, match="runs its original code: top_k of the block is 1 and was 2"):
        after = opt(X)
    assert not torch.allclose(before, after)
    opt.model.top_k = 2
    opt.model.gate.register_forward_hook(lambda m, a, y: None)
    assert torch.allclose(opt(X), before, rtol=1e-5, atol=1e-6)
    assert opt.model.experts[0].w1.weight is None


def test_codes_that_were_cast_are_refused():
    opt = moeopt.optimize(build(), X, quantize="int8")
    opt.model.half()
    with pytest.warns(StaleModelWarning), pytest.raises(UsageError, match="cast the model before it is optimised"):
        opt(X.half())


@pytest.mark.parametrize(("name", "dtype"), [("int4", torch.bfloat16), ("mxfp4", torch.float16)])
def test_a_cast_that_leaves_codes_and_scales_as_they_are_is_told(name, dtype):
    """The scales are bfloat16 or bytes: only the rest of the block has another dtype then."""
    opt = moeopt.optimize(build(), X, quantize=name, verify="fast")
    opt.model.to(dtype)
    with pytest.warns(StaleModelWarning), pytest.raises(UsageError, match=f"called with {dtype}, .* with dtype="):
        opt(X.to(dtype))


def test_writes_to_the_original_are_told():
    model = build()
    opt = moeopt.optimize(model, X, quantize="int8")
    with torch.no_grad():
        model.experts[1].w1.weight.zero_()
    with pytest.warns(StaleModelWarning, match="has changed since"):
        for _ in range(50):
            opt(X)


def test_in_place():
    model = build()
    want = moeopt.optimize(copy.deepcopy(model), X, quantize="int8")(X)
    opt = moeopt.optimize(model, X, quantize="int8", inplace=True)
    assert opt.model is model and model.experts[0].w1.weight is None and torch.equal(model(X), want)


class Shared(nn.Module):
    """Both blocks have one set of experts, and something else reads one of its weights."""

    def __init__(self):
        super().__init__()
        self.a, self.b = build(), build()
        self.b.experts = self.a.experts
        self.head = nn.Linear(16, 16, bias=False)
        self.head.weight = self.a.experts[0].w1.weight

    def forward(self, x):
        return self.head(self.b(self.a(x)))


def test_weights_that_something_else_reads_stay():
    opt = moeopt.optimize(Shared().eval(), X, quantize="int8")
    assert opt.certificate.passed is True, opt.certificate
    assert opt.model.head.weight is not None and opt.model.a.experts[1].w1.weight is None
    assert any("its floats stay beside the codes" in note for note in opt.report.notes)
    assert opt(X).shape == X.shape


def test_blocks_of_zeros_and_tiny_numbers():
    model = build()
    with torch.no_grad():
        model.experts[0].w1.weight.zero_()
        model.experts[1].w2.weight[:3].zero_()
        model.experts[2].w3.weight.mul_(1e-42)
    for name in ("int8", "int4", "fp8", "mxfp4"):
        opt = moeopt.optimize(model, X, quantize=name)
        assert opt.certificate.passed is True and name in opt.certificate.quantized["Block"], opt.certificate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    opt = moeopt.optimize(build().to(dtype), X.to(dtype), quantize="int4")
    assert opt.certificate.passed is True and opt.certificate.quantized and opt(X.to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"quantize": "int5"},
            "quantize='int5' is no format: did you mean 'int8'? the formats are int8 (int8, a scale",
        ),
        ({"quantize": 4}, "quantize=4 is no format: the formats are int8"),
        ({"quantize": {"a": "int8"}}, "quantize is a mapping: give quantize=QuantPlan({pattern: format, ...}"),
        ({"limit": {"kl_mean": 1}}, "limit is about what quantising loses, and nothing is quantised: give quantize="),
        ({"data": X}, "data is about what quantising loses, and nothing is quantised"),
        (
            {"quantize": "int8", "limit": {"klmean": 1}},
            "limit names 'klmean', which is no figure: did you mean 'kl_mean'",
        ),
        ({"quantize": "int8", "limit": {"top1": 2}}, "limit['top1']=2: it is a share, between 0 and 1"),
        ({"quantize": "int8", "limit": {"kl_mean": "x"}}, "limit['kl_mean']='x': it must be a number, 0 or more"),
        ({"quantize": "int8", "limit": 0.1}, "limit=0.1: it must map figures to numbers, like {'kl_mean': 0.01"),
        ({"quantize": "int8", "limit": {}}, "limit={}: it must map figures to numbers"),
        (
            {"quantize": "int8", "limit": {"kl_mean": 1, "error_max": 1}},
            "limit names kl_mean and error_max: a model has",
        ),
        (
            {"quantize": "int8", "limit": {"kl_mean": 1}},
            "limit names kl_mean, and the model returns no next-token logits",
        ),
        ({"quantize": "int8", "limit": {"kl_mean": 1}, "verify": "off"}, "limit is a gate, and verify='off' measures"),
        ({"quantize": "int8", "skip_passes": "quantize_experts"}, "quantize asks for the pass quantize_experts, and"),
        ({"quantize": "int8", "data": "abc"}, "data is a str; give one call's inputs"),
        ({"quantize": "int8", "data": []}, "data yields no batch: there is nothing to measure"),
        ({"quantize": "int8", "data": X[:, :3]}, "the model does not run on data= (RuntimeError"),
    ],
)
def test_refusals(fields, words):
    with pytest.raises(UsageError) as err:
        moeopt.optimize(build(), X, **fields)
    assert words in str(err.value), err.value


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: moeopt.QuantPlan({"a": "int3"}), "QuantPlan='int3' is no format: did you mean 'int"),
        (lambda: moeopt.QuantPlan("int4"), "QuantPlan(blocks='int4'): it must map module name patterns to formats"),
        (lambda: moeopt.QuantPlan(default=None), "QuantPlan=None is no format"),
    ],
)
def test_plans_that_are_none(made, words):
    with pytest.raises(UsageError) as err:
        made()
    assert words in str(err.value)


TOY = """
import torch
from tests.toy_moe import build

def model():
    return build(), torch.randn(30, 16, generator=torch.Generator().manual_seed(3))
"""


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    return f"{tmp_path / 'toy.py'}:model"


@pytest.mark.parametrize(("name", "form"), [("int4", "unrolled-codes"), ("fp8", "unrolled-floats")])
def test_an_onnx_runtime_engine_computes_the_quantised_model(name, form, tmp_path):
    pytest.importorskip("onnxruntime")
    model = build()
    opt = moeopt.optimize(model, X, quantize=name, backend="onnxruntime", limit={"error_mean": 0.5})
    certificate, same = opt.certificate, moeopt.optimize(model, X, quantize=name)
    assert certificate.passed is True and certificate.equivalent is False
    assert certificate.loss["error_mean"] == pytest.approx(same.certificate.loss["error_mean"])
    torch.testing.assert_close(opt(X), same(X), rtol=1e-5, atol=1e-6)  # float32 sums in another order
    assert opt.report.rewritten[0].lowering.startswith(f"onnxruntime {form}")
    told = any("the file holds codes, and a session makes floats of them" in note for note in opt.report.notes)
    assert told == (form == "unrolled-floats")
    folder = opt.save(tmp_path / "bundle")
    assert torch.equal(moeopt.load(folder)(X), opt(X))
    again = moeopt.verify(folder)
    assert again.passed is True and again.equivalent is False and again.loss == certificate.loss
    if name == "int4":
        checked = moeopt.verify(opt, original=model)
        assert checked.passed is True and checked.loss["error_mean"] == pytest.approx(certificate.loss["error_mean"])


def test_a_mapped_onnx_runtime_engine_holds_8_bit_codes(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = build()
    opt = moeopt.optimize(model, X, quantize="int8", backend="onnxruntime", mapped=True, verify="fast")
    assert opt.certificate.passed is True
    assert opt.report.rewritten[0].lowering.startswith("onnxruntime unrolled-bytes")
    assert any("asks, a session holds these codes and no floats" in note for note in opt.report.notes)
    torch.testing.assert_close(opt(X), moeopt.optimize(model, X, quantize="int8")(X), rtol=1e-5, atol=1e-6)
    folder = opt.save(tmp_path / "bundle")
    kinds = [n.op_type for n in onnx.load(folder / "model.onnx", load_external_data=False).graph.node]
    assert "MatMulNBits" in kinds
    assert torch.equal(moeopt.load(folder, mapped=True)(X), opt(X)) and moeopt.verify(folder).passed is True


def test_a_trained_model_on_onnx_runtime():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("transformers")
    model = load("moe")
    opt = moeopt.optimize(
        model, {"input_ids": text(4)}, quantize="int4", data={"input_ids": text()}, verify="fast", backend="onnxruntime"
    )
    loss = opt.certificate.loss
    assert opt.certificate.passed is True and BANDS["int4"][0][0] < loss["kl_mean"] < BANDS["int4"][0][1]
    assert opt.certificate.end_to_end.ids_differ == 0 < opt.certificate.end_to_end.ids
    assert perplexity(opt) / perplexity(model) == pytest.approx(loss["perplexity_ratio"], rel=1e-4)
    assert opt.generate(text(1)[:, :8], max_new_tokens=4, do_sample=False).shape == (1, 12)


def test_tensorrt_says_what_takes_quantised_experts():
    with pytest.raises(UsageError, match="quantize is for the backends torch and onnxruntime, and backend='tensorrt'"):
        moeopt.optimize(build(), X, quantize="int8", backend="tensorrt", target="sm_89")


def exit_code(*words):
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return end.value.code


def test_the_command(toy, capsys):
    assert exit_code("optimize", toy, "--quantize", "int4", "--limit", "error_mean=0.3", "--json", "-q") == 0
    certificate = json.loads(capsys.readouterr().out)["certificate"]
    assert certificate["passed"] is True and certificate["equivalent"] is False
    assert certificate["loss"]["limit"] == {"error_mean": 0.3} and 0 < certificate["loss"]["error_mean"] < 0.3


def test_the_command_exits_with_1_on_a_missed_limit(toy, capsys):
    words = ["--limit", "error_mean=0.01", "--limit", "ids_changed=1"]
    assert exit_code("optimize", toy, "--quantize", "int4", *words, "-q") == 1
    out, err = capsys.readouterr()
    assert "LIMIT MISSED: error_mean is" in out and "moeopt: a limit was missed: error_mean is" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--quantize", "int5"], "quantize='int5' is no format"),
        (["--quantize", "int4", "--limit", "kl_mean"], "--limit kl_mean: it must be a figure and a number"),
        (["--quantize", "int4", "--limit", "kl_mean=a"], "--limit kl_mean=a: it must be a figure and a number"),
        (["--quantize", "int4", "--limit", "top1=1", "--limit", "top1=0"], "--limit top1 is given twice"),
        (["--limit", "top1=1"], "limit is about what quantising loses, and nothing is quantised"),
    ],
)
def test_the_command_refuses(toy, capsys, words, told):
    assert exit_code("optimize", toy, *words, "-q") == 2
    assert told in capsys.readouterr().err
