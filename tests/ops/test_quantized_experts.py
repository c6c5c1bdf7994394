"""``moeopt::quantized_experts`` as every consumer meets it, against ``experts`` on the dequantised weights."""

import re
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moeopt.backends.torch.bundle import load_torch_bundle, save_torch_bundle, verify_torch_bundle
from moeopt.bundle.manifest import read_manifest
from moeopt.bundle.runner import GraphRunner
from moeopt.errors import BundleError, UsageError
from moeopt.ir.bank_format import BankFormat, MatrixFormat
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_format import (
    FLOAT32,
    FP8_BLOCK128,
    INT4_ASYMMETRIC32,
    INT4_BLOCK32,
    INT8_CHANNEL,
    MXFP4,
    NF4_BLOCK64,
)
from moeopt.ops import ListExpertWeights, experts, experts_reference
from moeopt.ops.kernels.cpu import experts_cpu
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices, from_tensors
from moeopt.ops.quantized_experts import flatten, in_float64, in_spec, unflatten
from moeopt.ops.quantized_weight import QuantizedWeight
from tests.backends.torch.toys import REPORT, Certificate
from tests.ops.cases import make, specs

OP = torch.ops.moeopt.quantized_experts.default
H, I, E, K, T = 48, 37, 5, 2, 11
SPEC = ExpertsSpec()
FORMS = (INT8_CHANNEL, INT4_BLOCK32, INT4_ASYMMETRIC32, FP8_BLOCK128, MXFP4, NF4_BLOCK64, FLOAT32)


def bank_of(w_in, w_out, forms, b_in=None, b_out=None, norm=None):
    """Of (out, in) floats: for each pair E matrices, then E matrices."""
    ins = [QuantizedMatrices.of([quantize(w, forms[0]) for w in ws]) for ws in w_in]
    return QuantizedExpertWeights(ins, QuantizedMatrices.of([quantize(w, forms[1]) for w in w_out]), b_in, b_out, norm)


def stacked(matrices):
    matrix = MatrixFormat(matrices.matrix.format, matrices.matrix.shape, stacked=True)
    return QuantizedMatrices(matrix, matrices.num_experts, [[torch.stack(part)] for part in matrices.parts])


def made(forms=(INT4_BLOCK32, INT8_CHANNEL), seed=0, biases=True):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g) / 4

    b_in = [[randn(2 * I) if e % 2 else None for e in range(E)]] if biases else None
    b_out = [randn(H) for _ in range(E)] if biases else None
    bank = bank_of([[randn(2 * I, H) for _ in range(E)]], [randn(H, I) for _ in range(E)], forms, b_in, b_out)
    ids = torch.randint(0, E - 1, (T, K), generator=g)  # the last expert has no token
    ids[2, 1], ids[3, 0] = -1, E + 1
    return randn(T, H), ids, torch.rand(T, K, generator=g), bank


def floats(bank, dtype=torch.float32):
    """The same bank, expanded."""
    ins = [[m[e].dequantize(dtype) for e in range(bank.num_experts)] for m in bank.w_in_q]
    outs = [bank.w_out_q[e].dequantize(dtype) for e in range(bank.num_experts)]
    return ListExpertWeights(ins, outs, list(bank.b_in_l), bank.b_out_l, bank.norm_l)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
@pytest.mark.parametrize("combine", ["expert", "slot"])
def test_is_experts_on_the_dequantised_weights(form, combine):
    spec = ExpertsSpec(combine=combine)
    x, ids, w, bank = made((form, form))
    want = experts_reference(x, ids, w, floats(bank), spec)
    torch.testing.assert_close(experts(x, ids, w, bank, spec), want, rtol=2e-5, atol=2e-5)
    assert torch.equal(
        OP(x, ids, w, *flatten(bank), spec.encode(), bank.format.encode()), experts(x, ids, w, bank, spec)
    )
    exact = experts_reference(x.double(), ids, w.double(), floats(bank, torch.float64), spec)
    wide = ExpertsSpec(combine=combine, compute_dtype="float64", accum_dtype="float64", out_dtype="float64")
    got = in_float64(x, ids, w, *flatten(bank), wide, bank.format.encode())
    torch.testing.assert_close(got, exact, rtol=1e-13, atol=1e-13)


@settings(max_examples=40, deadline=None)
@given(
    specs(),
    st.sampled_from(FORMS),
    st.sampled_from(FORMS),
    st.integers(0, 9),
    st.booleans(),
    st.sampled_from([1, 3, 40]),
)
def test_any_spec(spec, first, second, seed, strange, rows):
    """Every layout, activation and order of the sum; biases and norms stay floats."""
    case = make(spec, T=rows, seed=seed, dtype=torch.float32, stacked=False, strange_ids=strange)
    bank, E = case.bank, case.bank.num_experts

    def straight(w, layout):
        return w if layout == "oi" else w.t()

    pairs = len(bank.w_in(0))
    w_in = [[straight(bank.w_in(e)[i], spec.w_in_layout) for e in range(E)] for i in range(pairs)]
    w_out = [straight(bank.w_out(e), spec.w_out_layout) for e in range(E)]
    held = bank_of(w_in, w_out, (first, second), bank.b_in_l, bank.b_out_l, bank.norm_l)
    expanded = floats(held)
    w_in_f = [[straight(expanded.w_in(e)[i], spec.w_in_layout) for e in range(E)] for i in range(pairs)]
    w_out_f = [straight(expanded.w_out(e), spec.w_out_layout) for e in range(E)]
    flat = ListExpertWeights(w_in_f, w_out_f, bank.b_in_l, bank.b_out_l, bank.norm_l)
    want = experts_reference(case.x, case.ids, case.weights, flat, spec)
    got = experts(case.x, case.ids, case.weights, held, spec)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert got.dtype == want.dtype


def test_stacked_and_separate_are_the_same_bits():
    x, ids, w, bank = made((MXFP4, INT4_ASYMMETRIC32))
    whole = QuantizedExpertWeights(
        [stacked(m) for m in bank.w_in_q], stacked(bank.w_out_q), bank.b_in_l, bank.b_out_l
    )  # fmt: skip
    assert torch.equal(experts(x, ids, w, whole, SPEC), experts(x, ids, w, bank, SPEC))
    assert [len(part) for part in flatten(whole)] == [2, 3, E, E, 0]
    for held in (bank, whole):
        again = unflatten(flatten(held), held.format)
        assert again.format == held.format and torch.equal(
            experts(x, ids, w, again, SPEC), experts(x, ids, w, bank, SPEC)
        )
        names = held.tensors()
        named = from_tensors(held.format, names.__getitem__, held.b_in_l, held.b_out_l)
        assert torch.equal(experts(x, ids, w, named, SPEC), experts(x, ids, w, bank, SPEC))
        assert held.nbytes == held.format.nbytes() == sum(t.nbytes for t in names.values())
    assert set(whole.tensors()) == {"w_in_0_codes", "w_in_0_scales", "w_out_codes", "w_out_scales", "w_out_zeros"}
    assert f"w_out_zeros_{E - 1}" in bank.tensors()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_matrices_become_the_compute_dtype(dtype):
    x, ids, w, bank = made()
    x, w = x.to(dtype), w.to(dtype)
    got = experts(x, ids, w, bank, SPEC)
    want = experts_reference(x, ids, w, floats(bank, dtype), SPEC)
    eps = 4 * torch.finfo(dtype).eps
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=eps, atol=eps)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(experts(x, ids, w, bank, SPEC), got)


def test_one_expert_at_a_time_is_held_in_floats():
    """512 experts, of which all are hit by 1024 tokens: nothing as large as two of them is ever made."""
    g = torch.Generator().manual_seed(0)
    count = 512
    w_in = [[torch.randn(32, 32, generator=g) for _ in range(count)]]
    bank = bank_of(w_in, [torch.randn(32, 16, generator=g) for _ in range(count)], (INT4_BLOCK32, INT8_CHANNEL))
    x, w = torch.randn(1024, 32, generator=g), torch.rand(1024, 2, generator=g)
    ids = torch.stack([torch.arange(1024) % count, torch.randint(0, count, (1024,), generator=g)], 1)
    alive, most = set(), 0

    original = QuantizedWeight.dequantize

    def counted(self, dtype=torch.float32):
        nonlocal most
        out = original(self, dtype)
        alive.add(id(out))
        weakref.finalize(out, alive.discard, id(out))
        most = max(most, len(alive))
        return out

    QuantizedWeight.dequantize = counted
    try:
        by_entry, at_entry = experts(x, ids, w, bank, SPEC), most  # 0 where the native kernel reads codes
        got = experts_cpu(x, ids, w, in_spec(bank, SPEC, torch.float32), SPEC)
    finally:
        QuantizedWeight.dequantize = original
    assert at_entry <= 3 and 1 <= most <= 3
    torch.testing.assert_close(by_entry, got, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, experts_reference(x, ids, w, floats(bank), SPEC), rtol=1e-4, atol=1e-4)
    assert experts(x[:0], ids[:0], w[:0], bank, SPEC).shape == (0, 32)


def test_opcheck_and_gradients():
    x, ids, w, bank = made()
    bank.b_out_l[0].requires_grad_()
    args = (x.requires_grad_(), ids, w.requires_grad_(), *flatten(bank), SPEC.encode(), bank.format.encode())
    torch.library.opcheck(OP, args)
    experts(x, ids, w, bank, SPEC).square().sum().backward()
    found = [t.grad.clone() for t in (x, w, bank.b_out_l[0])]
    for t in (x, w, bank.b_out_l[0]):
        t.grad = None
    experts_reference(x, ids, w, floats(bank), SPEC).square().sum().backward()
    for got, t in zip(found, (x, w, bank.b_out_l[0]), strict=True):
        torch.testing.assert_close(got, t.grad, rtol=1e-4, atol=1e-4)
    bank.w_out_q.parts[1][0].requires_grad_()
    with pytest.raises(RuntimeError, match="gives codes and scales no gradient; train the float model"):
        experts(x, ids, w, bank, SPEC).sum().backward()


class Block(torch.nn.Module):
    """A quantised bank as buffers."""

    def __init__(self, bank):
        super().__init__()
        self.format = bank.format
        for name, tensor in bank.tensors().items():
            self.register_buffer(name, tensor)
        self.gate = torch.nn.Linear(H, E)

    def forward(self, x):
        w, ids = self.gate(x).softmax(-1).topk(K)
        return experts(x, ids, w, from_tensors(self.format, self.get_buffer), SPEC)


@pytest.mark.parametrize("as_stack", [False, True])
@pytest.mark.parametrize("forms", [(INT4_BLOCK32, INT8_CHANNEL), (FP8_BLOCK128, MXFP4), (INT4_ASYMMETRIC32, FLOAT32)])
def test_a_bundle(tmp_path, forms, as_stack):
    x, _, _, bank = made(forms, biases=False)
    if as_stack:
        bank = QuantizedExpertWeights([stacked(m) for m in bank.w_in_q], stacked(bank.w_out_q))
    torch.manual_seed(0)
    model = Block(bank)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert [str(n.target) for n in program.graph.nodes].count("moeopt.quantized_experts.default") == 1
    with torch.no_grad():
        want = model(x)
    directory = save_torch_bundle(
        program, tmp_path / "b", report=REPORT, certificate=Certificate(), golden_inputs=[((x,), {})],
        golden_outputs=[want],
    )  # fmt: skip
    assert torch.equal(load_torch_bundle(directory)(x), want)
    assert load_torch_bundle(directory)(x[:3]).shape == (3, H)
    assert verify_torch_bundle(directory).passed
    size = (directory / "weights.safetensors").stat().st_size
    assert bank.nbytes < size < bank.nbytes + 4 * (E * H + E) + 12_000  # names and shapes are text


@pytest.mark.sample(2)
@pytest.mark.one_isa  # text
@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('\\"experts\\":5', '\\"experts\\":6', "have 6 tensors of codes, of scales"),
        ('\\"experts\\":5', '\\"experts\\":4', "4 more tensors than their formats have"),
        ('\\"experts\\":5', '\\"experts\\":1099511627775', "have 1099511627775 tensors"),
        ('\\"shape\\":[74,48]', '\\"shape\\":[74,4800]', "(74, 2400)"),
        ('\\"shape\\":[74,48]', '\\"shape\\":[74000,48]', "a weight of 74000 x 48"),
        ('\\"shape\\":[48,37]', '\\"shape\\":[1099511627,37]', "a weight of 1099511627 x 37"),
        ('\\"block\\":[1,32]', '\\"block\\":[1,16]', "has scales of torch.bfloat16 (74, 3)"),
        ('\\"codes\\":\\"uint4\\"', '\\"codes\\":\\"e2m1\\"', ""),
        ('\\"codes\\":\\"uint4\\"', '\\"codes\\":\\"int8\\"', "has codes of torch.int8"),
        ('\\"scale\\":\\"bfloat16\\"', '\\"scale\\":\\"e8m0\\"', "has scales of torch.uint8"),
        ('\\"symmetric\\":true', '\\"symmetric\\":false', "more tensors than|tensors of codes, of scales, of zeros"),
        ('\\"stacked\\":false', '\\"stacked\\":true', "have 1 tensors of codes|more tensors than their formats|shapes"),
        ('\\"codes\\":\\"uint4\\"', '\\"codes\\":\\"none\\"', "WeightFormat.codes is 'none'"),
    ],
)
def test_formats_that_a_stranger_wrote(tmp_path, old, new, text):
    """Whatever the words say, no memory is read that is not the tensor's."""
    x, _, _, bank = made(biases=False)
    program = torch.export.export(Block(bank), (x,))
    directory = save_torch_bundle(program, tmp_path / "b", report=REPORT, certificate=Certificate())
    graph = read_manifest(directory).read_json("graph.json")
    node = next(n for n in graph["nodes"] if n["op"] == "moeopt.quantized_experts.default")
    words = old.replace("\\", "")
    assert words in node["args"][-1]
    node["args"][-1] = node["args"][-1].replace(words, new.replace("\\", ""), 1)
    weights = {**dict(Block(bank).named_parameters()), **bank.tensors()}

    def run():
        return GraphRunner(graph, lambda key: weights[key].detach(), lambda name: torch.device("cpu"))(x)

    if not text:  # another meaning of the same bytes
        assert run().shape == (T, H)
        return
    with pytest.raises((BundleError, UsageError)) as err:
        run()
    assert re.search(text.replace("(", r"\(").replace(")", r"\)"), str(err.value))


def test_tracers_see_one_node():
    x, ids, w, bank = made()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, ids, w)]
        named = {k: mode.from_tensor(t) for k, t in bank.tensors().items()}
        assert experts(*fake, from_tensors(bank.format, named.__getitem__), SPEC).shape == (T, H)
    compiled = torch.compile(Block(made(biases=False)[3]), backend="eager", fullgraph=True)
    assert compiled(x).shape == (T, H)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (ExpertsSpec(rows="separate"), "rows 'separate' need 2 W_in of 37 rows"),
        (ExpertsSpec(rows="plain"), "rows 'plain' need 1 W_in of 37 rows"),
    ],
)
def test_a_spec_that_the_matrices_do_not_fit(spec, text):
    x, ids, w, bank = made()
    with pytest.raises(UsageError) as err:
        experts(x, ids, w, bank, spec)
    assert text in str(err.value)


def test_banks_that_do_not_agree():
    weight = quantize(torch.randn(4, 32), INT8_CHANNEL)
    with pytest.raises(UsageError, match="expert 1 is .4, 32. in int4 .* and expert 0 .4, 32. in int8"):
        QuantizedMatrices.of([weight, quantize(torch.randn(4, 32), INT4_BLOCK32)])
    with pytest.raises(UsageError, match="W_out holds 2 experts, and other parts"):
        QuantizedExpertWeights([QuantizedMatrices.of([weight])], QuantizedMatrices.of([weight] * 2))
    with pytest.raises(UsageError, match="stacked codes, scales of 2 experts have shapes"):
        parts = [[torch.zeros(3, 4, 32, dtype=torch.int8)], [torch.zeros(3, 4, 1)]]
        QuantizedMatrices(MatrixFormat(INT8_CHANNEL, (4, 32), stacked=True), 2, parts)
    with pytest.raises(UsageError, match="1 more tensors than their formats have"):
        one = BankFormat(1, (MatrixFormat(INT8_CHANNEL, (4, 32)),), MatrixFormat(INT8_CHANNEL, (4, 32)))
        held = [weight.codes, weight.scales]
        unflatten([[*held, weight.codes], held, [], [], []], one)


def test_a_scale_that_is_no_number_is_named():
    bank = made()[3]
    bank.check()
    bank.w_out_q.parts[1][3][0, 0] = float("nan")
    with pytest.raises(UsageError, match="layer 7, w_out of expert 3: the scale of block .0, 0. is nan"):
        bank.check("layer 7")
