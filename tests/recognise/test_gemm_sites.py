"""Every way to multiply rows by a Parameter is one record: rows, matrices, biases."""

import pytest
import torch
import torch.nn.functional as F

from moeopt.recognise.gemm_sites import find_sites
from tests.capture.tiny import rand, recorded

E, K, M, R = 3, 4, 5, 6


def region(w, ref):
    offset, dk, dm = ref.offset_and_strides(w.stride())
    return w.detach().as_strided((ref.k, ref.m), (dk, dm), w.storage_offset() + offset)


def recomputed(tape, site):
    """The site's output rows from its own words: rows, matrix of each row, bias of each matrix."""
    rows = site.rows_in(tape.value(site.operand))
    out = torch.zeros(len(rows), site.matrices[0].m)
    for r, which in enumerate(site.matrix.tolist()):
        if which < 0:
            continue
        ref = site.matrices[which]
        out[r] = rows[r].float() @ region(tape.root.get_parameter(ref.path), ref)
        bias = site.biases[which] if site.biases else None
        if bias is not None:
            b = tape.root.get_parameter(bias.path).detach()
            index = [bias.origin[d] + torch.arange(bias.m) * bias.dm[d] for d in range(b.dim())]
            out[r] += b[tuple(index)]
    return out


OFFS = torch.tensor([2, 2, 5], dtype=torch.int32)
CASES = {
    "linear": (lambda m, x: F.linear(x, m.w[0].t()), (R, K)),
    "linear with bias": (lambda m, x: F.linear(x, m.w[0].t(), m.b[0]), (R, K)),
    "linear of three dims": (lambda m, x: F.linear(x, m.w[0].t(), m.b[1]), (2, 3, K)),
    "mm": (lambda m, x: x @ m.w[1], (R, K)),
    "mm, bias added": (lambda m, x: x @ m.w[1] + m.b[1], (R, K)),
    "mm, bias in front": (lambda m, x: m.b[1] + x @ m.w[1], (R, K)),
    "mm, bias after a view": (lambda m, x: (x @ m.w[1]).view(2, 3, M) + m.b[1], (R, K)),
    "weight on the left": (lambda m, x: m.w[2].t() @ x, (K, R)),
    "weight on the left, bias": (lambda m, x: torch.addmm(m.b[2][:, None], m.w[2].t(), x), (K, R)),
    "one row": (lambda m, x: m.w[0].t() @ x, (K,)),
    "one row, bias": (lambda m, x: torch.addmv(m.b[0], m.w[0].t(), x), (K,)),
    "bmm": (lambda m, x: torch.bmm(x, m.w), (E, R, K)),
    "bmm, bias": (lambda m, x: torch.bmm(x, m.w) + m.b[:, None], (E, R, K)),
    "baddbmm": (lambda m, x: torch.baddbmm(m.b[:, None], x, m.w), (E, R, K)),
    "bmm, weight on the left": (lambda m, x: torch.bmm(m.w.transpose(1, 2), x), (E, K, R)),
    "one token at all experts": (lambda m, x: torch.matmul(x, m.w), (R, K)),
    "gathered weights": (lambda m, x: torch.bmm(x, m.w[torch.tensor([2, 0, 2, 1])]), (4, R, K)),
    "gathered, with bias": (
        lambda m, x: torch.bmm(x, m.w[torch.tensor([2, 0])]) + m.b[torch.tensor([2, 0])].unsqueeze(1), (2, R, K),
    ),
    "einsum, all experts": (lambda m, x: torch.einsum("tk,ekm->tem", x, m.w), (R, K)),
    "einsum, own rows": (lambda m, x: torch.einsum("etk,ekm->etm", x, m.w), (E, R, K)),
    "experts side by side": (lambda m, x: x @ m.w.permute(1, 0, 2).reshape(K, E * M), (R, K)),
    "experts side by side, bias": (
        lambda m, x: F.linear(x, m.w.transpose(1, 2).reshape(E * M, K), m.b.reshape(-1)), (R, K),
    ),
    "stacked at run time": (lambda m, x: torch.bmm(x, torch.stack([m.w[2], m.w[0]])), (2, R, K)),
    "grouped": (lambda m, x: torch._grouped_mm(x.bfloat16(), m.w.bfloat16(), offs=OFFS), (R, K)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_product_is_its_rows_times_its_matrices(name):
    fn, shape = CASES[name]
    w = rand(E, K, M)
    if name == "grouped":
        w = rand(E, 8, 8)
        shape = (R, 8)
    tape = recorded(fn, rand(*shape, seed=1), w=w, b=rand(E, M, seed=2))
    sites = find_sites(tape)
    assert len(sites) == 1
    (site,) = sites
    got = site.rows_out(tape.value(site.node)).float()
    want = recomputed(tape, site)
    keep = site.matrix >= 0
    # two roundings of a product of K terms; in bfloat16 the inputs are rounded as well
    tolerance = 2e-2 if name == "grouped" else 1e-5
    torch.testing.assert_close(got[keep], want[keep], atol=tolerance, rtol=tolerance)
    rows = torch.arange(got.numel()).view(got.shape)
    assert torch.equal(site.rows_out(site.from_rows(rows, tape.value(site.node))), rows)


def test_rows_beyond_the_last_group_belong_to_nobody():
    fn, _ = CASES["grouped"]
    (site,) = find_sites(recorded(fn, rand(R, 8, seed=1), w=rand(E, 8, 8), b=rand(E, M)))
    assert site.matrix.tolist() == [0, 0, 2, 2, 2, -1] and [m.origin for m in site.matrices] == [
        (i, 0, 0) for i in range(E)
    ]


def test_a_pointwise_convolution_is_a_product():
    tape = recorded(lambda m, x: F.conv2d(x, m.w, m.b), rand(2, K, 3, 2, seed=1), w=rand(M, K, 1, 1), b=rand(M, seed=2))
    (site,) = find_sites(tape)
    ref = site.matrices[0]
    assert (ref.path, ref.origin, ref.dk, ref.dm) == ("w", (0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 0, 0))
    assert site.axis_in == site.axis_out == 1 and site.matrix.numel() == 2 * 3 * 2 and site.biases[0].path == "b"
    # K products and a sum, in another order
    torch.testing.assert_close(site.rows_out(tape.value(site.node)), recomputed(tape, site), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "fn",
    [
        lambda m, x: x @ x.t(),  # two activations
        lambda m, x: x @ (m.w[0] * 2),  # a computed matrix
        lambda m, x: x @ torch.ones(K, M),  # a constant
        lambda m, x: m.w[0].t() @ m.w[0] + x[0, 0],  # two weights
        lambda m, x: x * m.w[0, 0, 0],
    ],
)
def test_what_is_no_product_with_a_parameter(fn):
    assert find_sites(recorded(fn, rand(R, K), w=rand(E, K, M))) == []


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"groups": 2}])
def test_other_convolutions_mix_rows(options):
    channels = K // options.get("groups", 1)
    tape = recorded(lambda m, x: F.conv1d(x, m.w, **options), rand(2, K, 6), w=rand(M + 1, channels, 1))
    assert find_sites(tape) == []
    assert find_sites(recorded(lambda m, x: F.conv1d(x, m.w), rand(2, K, 6), w=rand(M, K, 3))) == []


def test_an_embedding_row_is_the_activation_of_two_weights():
    tape = recorded(
        lambda m, ids: F.linear(m.table[ids], m.w), torch.tensor([1, 0, 2]), table=rand(4, K), w=rand(M, K, seed=1)
    )
    (site,) = find_sites(tape)
    assert site.matrices[0].path == "w" and site.operand.target is torch.ops.aten.index.Tensor


def test_a_product_that_is_read_twice_keeps_its_sum_to_itself():
    def fn(m, x):
        h = x @ m.w[0]
        return h + m.b[0], h * 2

    (site,) = find_sites(recorded(fn, rand(R, K), w=rand(E, K, M), b=rand(E, M)))
    assert site.node is site.matmul and not site.biases


def test_an_addmm_of_an_activation_is_no_site():
    tape = recorded(lambda m, x: torch.addmm(x[:, :1].expand(R, M), x, m.w[0]), rand(R, K), w=rand(E, K, M))
    assert all(not s.matrices for s in find_sites(tape))
