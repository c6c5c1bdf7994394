"""The CPU kernel where every token goes everywhere: one expert for all tokens, and experts of unequal size."""

import dataclasses
import itertools

import pytest
import torch

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ListExpertWeights
from moeopt.ops.kernels import cpu
from moeopt.ops.kernels.cpu import experts_cpu
from moeopt.ops.reference import experts_reference

H = 10
BUDGET = {torch.float32: 16, torch.bfloat16: 3}  # eps: the same products summed in another order; one 16-bit rounding


def make(spec, sizes, dtype, bias=True):
    rng = torch.Generator().manual_seed(0)

    def tensor(*shape, turn=False):
        made = torch.randn(shape, generator=rng).to(dtype) / shape[-1] ** 0.5
        return made.t().contiguous() if turn else made

    widths = {"separate": (1, 1), "plain": (1,)}.get(spec.rows, (2,))
    w_in = [[tensor(n * I, H, turn=spec.w_in_layout == "io") for I in sizes] for n in widths]
    w_out = [tensor(H, I, turn=spec.w_out_layout == "io") for I in sizes]
    b_in = [[tensor(n * I) for I in sizes] for n in widths] if bias else None
    norm = [1 + tensor(H) for _ in sizes] if spec.out_norm_eps is not None else None
    return ListExpertWeights(w_in, w_out, b_in, [tensor(H) for _ in sizes] if bias else None, norm)


def check(x, ids, weights, bank, spec):
    got, want = experts_cpu(x, ids, weights, bank, spec), experts_reference(x, ids, weights, bank, spec)
    assert (got.shape, got.dtype) == (want.shape, want.dtype) and got.is_contiguous()
    far, size = (got.double() - want.double()).norm(), want.double().norm()
    assert far <= BUDGET[x.dtype] * torch.finfo(x.dtype).eps * size
    assert got.data_ptr() != x.data_ptr()


SPECS = [
    ExpertsSpec(rows="plain", activation="gelu"),
    ExpertsSpec(rows="separate", accum_dtype="float32"),
    ExpertsSpec(rows="gate|up", w_in_layout="io", w_out_layout="io"),
    ExpertsSpec(rows="interleaved", out_norm_eps=1e-6, weight_on="input"),
    ExpertsSpec(rows="separate", out_dtype="float32", compute_dtype="float32"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_one_expert_for_all_tokens(spec, dtype, monkeypatch):
    bank, taken = make(spec, (7,), dtype), []
    honest = cpu._one_for_all
    monkeypatch.setattr(cpu, "_one_for_all", lambda *call: (taken.append(1), honest(*call))[1])
    for T, weight in itertools.product((1, 3, 40), (1.0, 0.75)):
        x = torch.randn(T, H, generator=torch.Generator().manual_seed(T)).to(dtype)
        ids, ones = torch.zeros(1, 1, dtype=torch.long).expand(T, 1), torch.full((1, 1), weight, dtype=dtype)
        check(x, ids, ones.expand(T, 1), bank, spec)
        check(x, ids, ones.repeat(T, 1), bank, spec)
    assert len(taken) == 12


@pytest.mark.parametrize("beyond", ["nothing", "identity"])
@pytest.mark.parametrize("ids", [[[1]], [[-1]], [[0], [1], [0]], [[0], [-1], [0]]])
def test_ids_that_do_not_name_it_take_the_long_way(ids, beyond):
    spec = dataclasses.replace(SPECS[0], out_of_range=beyond)
    given = torch.tensor(ids)
    for T, table in ((len(ids), given), (4, given[:1].expand(4, 1))):
        check(torch.ones(T, H), table, torch.full((T, 1), 0.5), make(spec, (7,), torch.float32), spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_experts_of_unequal_size(spec, dtype):
    bank = make(spec, (4, 3, 6), dtype)
    for T in (1, 2, 50):  # decode, few rows, many rows
        x = torch.randn(T, H, generator=torch.Generator().manual_seed(T)).to(dtype)
        check(x, torch.arange(3).expand(T, 3), torch.rand(T, 3).to(dtype), bank, spec)
