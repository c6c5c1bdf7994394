"""Codes whose products read rows of 8 bits: one word of the format, through the op, its tracers and its gradient."""

import json

import pytest
import torch

from moeopt.errors import UsageError
from moeopt.ir.bank_format import BankFormat, MatrixFormat
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_format import INT4_BLOCK32, INT8_CHANNEL
from moeopt.ops import experts, quantize
from moeopt.ops.native.compile import all_isas
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices
from moeopt.ops.quantized_experts import flatten, in_float64, unflatten
from moeopt.options import instruction_sets

E, K, H, I = 4, 2, 64, 32
SPEC = ExpertsSpec()


def bank_of(format=INT4_BLOCK32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def matrices(n, k):
        return QuantizedMatrices.of([quantize(torch.randn(n, k, generator=g) / k**0.5, format) for _ in range(E)])

    return QuantizedExpertWeights([matrices(2 * I, H)], matrices(H, I), None, [torch.randn(H, generator=g)] * E)


def call_of(T=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, H, generator=g), torch.randint(0, E, (T, K), generator=g), torch.rand(T, K, generator=g)


def test_the_format_says_what_products_read():
    one = MatrixFormat(INT8_CHANNEL, (4, 32))
    floats, rounded = BankFormat(2, (one,), one), BankFormat(2, (one,), one, "int8")
    assert "activations" not in floats.text and json.loads(rounded.text)["activations"] == "int8"
    assert [BankFormat.decode(f.text) for f in (floats, rounded)] == [floats, rounded]
    assert str(rounded) == f"{floats}, activations in int8"


@pytest.mark.parametrize("value", ["int4", None, 8, ["int8"]], ids=str)
def test_another_word_is_refused(value):
    one = MatrixFormat(INT8_CHANNEL, (4, 32))
    with pytest.raises(UsageError, match="activations is .*; it must be one of float, int8"):
        BankFormat(2, (one,), one, value)
    text = json.dumps({**json.loads(BankFormat(2, (one,), one).text), "activations": value})
    with pytest.raises(UsageError, match="not a BankFormat"):
        BankFormat.decode(text)


def test_rounding_is_another_function_and_stays_when_the_bank_is_handed_on():
    bank, call = bank_of(), call_of()
    rounded = bank.reading("int8")
    assert rounded.rounds and not bank.rounds and rounded.handed_out(("io", "io"), torch.float64).rounds
    got, floats = experts(*call, rounded, SPEC), experts(*call, bank, SPEC)
    off = (got - floats).norm(dim=-1) / floats.norm(dim=-1)
    assert 1e-4 < off.max() < 3e-2
    assert torch.equal(experts(*call, rounded.reading("float"), SPEC), floats)
    again = unflatten(flatten(rounded), rounded.format)
    assert torch.equal(experts(*call, again, SPEC), got)


def test_tracers_see_the_op_that_rounds():
    rounded, call = bank_of().reading("int8"), call_of()

    class Block(torch.nn.Module):
        def forward(self, x, ids, weights):
            return experts(x, ids, weights, rounded, SPEC)

    program = torch.export.export(Block(), call)
    (node,) = [n for n in program.graph.nodes if "quantized_experts" in str(n.target)]
    assert json.loads(node.args[-1])["activations"] == "int8"
    assert torch.equal(program.module()(*call), experts(*call, rounded, SPEC))


def test_a_gradient_passes_the_rounding_as_if_it_were_not_there():
    x, ids, weights = call_of()
    bank, found = bank_of(), []
    for one in (bank, bank.reading("int8")):
        leaf = x.clone().requires_grad_()
        experts(leaf, ids, weights, one, SPEC).sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found) and found[0].abs().max() > 0


def test_the_oracle_rounds_nothing():
    x, ids, weights = call_of()
    bank = bank_of()
    spec = ExpertsSpec(compute_dtype="float64")
    exact, oracle = (
        in_float64(x, ids, weights, *flatten(b), spec, b.format.text) for b in (bank, bank.reading("int8"))
    )
    assert torch.equal(exact, oracle)


def test_no_instruction_set_that_a_virtual_cpu_has_in_part(monkeypatch):
    """The kernel of AVX-512 BF16 multiplies rows of 8 bits by VNNI, which older CPUs have without BF16."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for name in ("avx2", "avx512", "avx512_bf16", "vnni"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx_vnni": True}, raising=False)
    assert instruction_sets.isas_here() == list(all_isas()) == list(instruction_sets.INSTRUCTION_SETS[:-1])
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert instruction_sets.isas_here()[-1] == "avx512_vnni"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert instruction_sets.isas_here()[-1] == "avx512"
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert instruction_sets.isas_here()[-1] == "avx2_vnni"  # a laptop's
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert instruction_sets.isas_here()[-1] == "avx2"


@pytest.mark.parametrize("name", ["aarch64", "arm64", "ARM64"])  # of Linux, macOS and Windows
def test_arm_has_neon_and_is_built_for_it(name, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: name)
    assert instruction_sets.isas_here() == list(all_isas()) == ["generic", "neon"]
    monkeypatch.setattr("sys.maxsize", 2**31 - 1)  # a Python of 32 bits
    assert all_isas() == ("generic",) and "neon" not in instruction_sets.isas_here()
