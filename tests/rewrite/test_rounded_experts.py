"""Which rows an expert is rounded by: its own, counted as they count in the output, through its own rounded W_in."""

import pytest
import torch
from torch import nn

from moeopt.errors import UsageError
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_format import INT4_BLOCK32
from moeopt.ir.weight_refs import ExpertRef, MatrixRef, VectorRef
from moeopt.ops import ListExpertWeights
from moeopt.ops.gptq import gptq
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_bank import from_tensors
from moeopt.ops.reference import one_expert
from moeopt.rewrite.expert_rows import ExpertRows, OneExpertsRows
from moeopt.rewrite.rounded_experts import rounded_experts

E, H, WIDE, T = 3, 24, 20, 400
SPECS = {
    "gate|up": ExpertsSpec(),
    "interleaved": ExpertsSpec(rows="interleaved", up_min=-1.0, up_max=1.0, gate_max=2.0, up_offset=1.0),
    "separate": ExpertsSpec(rows="separate", activation="gelu"),
    "plain": ExpertsSpec(rows="plain", activation="relu2", weight_on="input"),
}


class Bank(nn.Module):
    """Weights as Parameters, each expert's apart."""

    def __init__(self, spec, biases):
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        wide, pairs = (
            (2 * WIDE, 1) if spec.rows in ("gate|up", "interleaved") else (WIDE, 1 + (spec.rows == "separate"))
        )
        for e in range(E):
            for i in range(pairs):
                self.register_parameter(f"in_{i}_{e}", nn.Parameter(torch.randn(wide, H, generator=rng) / H**0.5))
                self.register_parameter(f"b_{i}_{e}", nn.Parameter(torch.randn(wide, generator=rng)))
            self.register_parameter(f"out_{e}", nn.Parameter(torch.randn(H, WIDE, generator=rng)))
        one, across = (1, 0), (0, 1)
        self.refs = [
            ExpertRef(
                tuple(MatrixRef(f"in_{i}_{e}", (0, 0), across, one, H, wide) for i in range(pairs)),
                tuple(VectorRef(f"b_{i}_{e}", (0,), (1,), wide) if biases else None for i in range(pairs)),
                MatrixRef(f"out_{e}", (0, 0), across, one, WIDE, H),
                None,
            )
            for e in range(E)
        ]

    def inside(self, e):
        """Expert e's first matrices and biases."""
        ref = self.refs[e]
        return [getattr(self, w.path) for w in ref.w_in], [b and getattr(self, b.path) for b in ref.b_in]


def rows(nobody=None):
    """Two calls; ``nobody``: an expert that none of them chooses."""
    rng, found = torch.Generator().manual_seed(2), ExpertRows()
    for _ in range(2):
        ids = torch.stack([torch.randperm(E, generator=rng)[:2] for _ in range(T)])
        ids[ids == nobody] = -1
        found.add(torch.randn(T, H, generator=rng), ids, torch.rand(T, 2, generator=rng))
    return found


def moments(spec, found, e, w_in, b_in):
    """Of what W_out is multiplied with, by the reference op: the identity in W_out's place gives it."""
    eye = torch.eye(WIDE, dtype=torch.float64)
    reads, makes = [], []
    biases = None if b_in[0] is None else [[b.double()] for b in b_in]
    bank = ListExpertWeights([[w.double()] for w in w_in], [eye], biases)
    for x, ids, weights in zip(found.x, found.ids, found.weights, strict=True):
        for row, slot in (ids == e).nonzero().tolist():
            r, share = x[row : row + 1].double(), weights[row, slot].double()
            r, share = (r * share, 1) if spec.weight_on == "input" else (r, share)
            hidden = one_expert(r, bank, 0, spec) * share
            makes.append(hidden)
            reads.append(r * share)
    return [one_experts(torch.cat(rows)).hessian(plain) for rows in (reads, makes)]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_each_matrix_is_rounded_by_what_it_is_multiplied_with(name, biases):
    spec = SPECS[name]
    bank, found = Bank(spec, biases), rows()
    format, codes = rounded_experts(bank, bank.refs, spec, INT4_BLOCK32, "gptq", found)
    held = from_tensors(format, codes.tensors.__getitem__)
    assert codes.few == 0 and not codes.exact
    for e in range(E):
        w_in, b_in = bank.inside(e)
        made, out = held.codes(e)
        inputs, total = moments(spec, found, e, [one.dequantize(torch.float64) for one in made], b_in)
        for one, w in zip(made, w_in, strict=True):
            same(one, gptq(w.detach(), INT4_BLOCK32, inputs))
        same(out, gptq(getattr(bank, f"out_{e}").detach(), INT4_BLOCK32, total))


def same(found, want):
    """Float32 sums of the rows are not the test's: a weight or two that lay halfway may have its other neighbour."""
    assert torch.equal(found.scales, want.scales)
    assert float((found.codes != want.codes).float().mean()) <= 0.02, (found.codes != want.codes).float().mean()


@pytest.mark.parametrize("method", ["gptq", "search"])
def test_an_expert_that_too_few_rows_reach_has_its_scales_searched(method):
    spec = SPECS["gate|up"]
    bank, found = Bank(spec, False), rows(nobody=1)
    found.ids[0][found.ids[0] == 2] = -1
    found.ids[1][found.ids[1] == 2] = -1
    found.ids[1][:5, 0] = 2  # five rows
    format, codes = rounded_experts(bank, bank.refs, spec, INT4_BLOCK32, method, found)
    assert codes.few == (2 if method == "gptq" else 0)
    held = from_tensors(format, codes.tensors.__getitem__)
    plain = quantize(bank.out_1.detach(), INT4_BLOCK32, search=True)
    assert torch.equal(held.codes(1)[1].codes, plain.codes)
    squares = (found.x[1][:5].double() * found.weights[1][:5, :1].double()).square().mean(0)
    five = quantize(bank.in_0_2.detach(), INT4_BLOCK32, search=True, squares_K=squares)
    assert torch.equal(held.codes(2)[0][0].codes, five.codes)
    assert rounded_experts(bank, bank.refs, spec, INT4_BLOCK32, method, None).codes.few == (
        E if method == "gptq" else 0
    )


def one_experts(rows, share=None):
    return OneExpertsRows(rows, torch.ones(len(rows), 1) if share is None else share)


def plain(rows_MK):
    return rows_MK


@pytest.mark.parametrize("rows", [20, 60, 300, 5000])
def test_columns_that_correlate_by_chance_change_nothing(rows):
    """By the plain sum of few rows GPTQ is worse on other rows than scales alone; by what is left of it, it is not."""
    rng = torch.Generator().manual_seed(3)
    w = torch.randn(64, 128, generator=rng)
    few, other = torch.randn(rows, 128, generator=rng), torch.randn(4000, 128, generator=rng).double()
    summed = few.double().T @ few.double()
    ways = (
        gptq(w, INT4_BLOCK32, one_experts(few).hessian(plain)),
        gptq(w, INT4_BLOCK32, summed),
        quantize(w, INT4_BLOCK32, search=True),
    )
    shrunk, by_sum, scales = (float((other @ (way.dequantize(torch.float64) - w).T).norm()) for way in ways)
    assert shrunk < 1.02 * scales
    assert by_sum > (1.2 if rows <= 60 else 1.0) * scales


def test_columns_that_are_one_another_stay_so():
    rng = torch.Generator().manual_seed(4)
    base = torch.randn(200, 4, generator=rng)
    rows = torch.cat([base, -3 * base, base + 0.01 * torch.randn(200, 4, generator=rng)], 1)
    share = torch.rand(200, 1, generator=rng) + 0.5
    found = one_experts(rows, share).hessian(plain)
    summed = (rows.double() * share).T @ (rows.double() * share)
    assert torch.equal(found.diagonal(), summed.diagonal())
    kept = found[0, 4] / summed[0, 4]
    assert 0.93 < float(kept) < 1  # some of it is noise: most pairs of columns have nothing to do with each other
    torch.testing.assert_close(found - torch.diag(found.diagonal()), kept * (summed - torch.diag(summed.diagonal())))


def test_the_share_of_noise_is_that_of_its_definition():
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(37, 9, generator=rng) @ torch.randn(9, 9, generator=rng)
    x[:, 3] = 0  # an input that is never there
    z = x.double() / x.double().square().mean(0).sqrt().nan_to_num(1).where(
        x.double().square().mean(0) > 0, torch.ones(9)
    )
    products = z[:, :, None] * z[:, None]
    apart = ~torch.eye(9, dtype=torch.bool)
    variance = products.var(0)[apart].sum() / 37
    share = float(variance / products.mean(0)[apart].square().sum())
    summed = x.double().T @ x.double()
    found = one_experts(x).hessian(plain)
    assert 0 < share < 1
    torch.testing.assert_close(found[apart], (1 - share) * summed[apart])


def test_rows_that_become_no_numbers():
    bank, found = Bank(SPECS["gate|up"], False), rows()
    found.x[0][:] = 1e38
    with pytest.raises(
        UsageError, match=r"hold or become NaN, .* where they reach w_.* of expert 0: leave out the calls"
    ):
        rounded_experts(bank, bank.refs, SPECS["gate|up"], INT4_BLOCK32, "gptq", found)
