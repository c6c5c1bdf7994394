"""``moeopt::row_function`` as every consumer meets it, against a loop over tokens."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from moeopt.errors import UsageError
from moeopt.ir.row_function import RowCount, RowFunction, Value, write_body
from moeopt.ops import experts
from moeopt.ops.row_function import FlatSlots, expert_by_expert, function_of

aten = torch.ops.aten
OP = torch.ops.moeopt.row_function.default
H, D, E, K, T = 6, 5, 4, 2, 9

GRAPH = write_body(
    H, torch.float64, [(torch.float64, (D, H)), (torch.float64, (D,)), (torch.float64, (D,))],
    [
        (aten.linear.default, (Value(0), Value(1)), {}),
        (aten.native_layer_norm.default, (Value(4), [D], Value(2), Value(3), 1e-3), {}),
        ("getitem", (Value(5), 0), {}),
        (aten.sin.default, (Value(6),), {}),
    ],
    7, D,
)  # fmt: skip
"""sin(layer_norm(W x; gamma, beta))"""


def weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    each = [[torch.randn(s, generator=g, dtype=torch.float64) for s in ((D, H), (D,), (D,))] for _ in range(E)]
    return [t for expert in each for t in expert]


def call(spec, strange=True):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(T, H, generator=g, dtype=torch.float64)
    ids = torch.randint(0, E - 1, (T, K), generator=g)  # the last expert has no token
    if strange:
        ids[2, 1], ids[3, 0] = -1, E + 1
    w = torch.rand(T, K, generator=g, dtype=torch.float64)
    return x, ids, w


def by_token(x, ids, w, flat, spec):
    rows = []
    for t in range(len(x)):
        total = torch.zeros(D, dtype=x.dtype)
        for k in range(K):
            e = int(ids[t, k])
            if not 0 <= e < E:
                continue
            matrix, gamma, beta = flat[3 * e : 3 * e + 3]
            row = x[t] * w[t, k] if spec.weight_on == "input" else x[t]
            y = torch.sin(F.layer_norm(matrix @ row, (D,), gamma, beta, 1e-3))
            total = total + (y if spec.weight_on == "input" else y * w[t, k])
        rows.append(total)
    return torch.stack(rows)


SPECS = [
    RowFunction(GRAPH, "float64"),
    RowFunction(GRAPH, "float64", weight_on="input", combine="expert"),
    RowFunction(GRAPH, "float64", combine="expert", accum_dtype="float64", out_dtype="float64"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.weight_on}-{s.combine}")
def test_definition(spec):
    x, ids, w = call(spec)
    flat = weights()
    got = experts(x, ids, w, FlatSlots(flat, 3), spec)
    torch.testing.assert_close(got, by_token(x, ids, w, flat, spec), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(OP(x, ids, w, flat, spec.encode()), got, rtol=0, atol=0)


def test_an_id_beyond_the_experts_is_the_identity_where_the_spec_says_so():
    square = write_body(H, torch.float64, [(torch.float64, (H,))], [(aten.mul.Tensor, (Value(0), Value(1)), {})], 2, H)
    spec = RowFunction(square, "float64", out_of_range="identity")
    x, ids, w = call(spec)
    bank = FlatSlots([torch.full((H,), float(e), dtype=torch.float64) for e in range(E)], 1)
    factor = torch.where(ids >= E, 1.0, ids.clamp(min=0).double()) * (ids >= 0)
    want = x * (factor * w).sum(-1, keepdim=True)
    torch.testing.assert_close(experts(x, ids, w, bank, spec), want, rtol=1e-12, atol=1e-12)


def test_no_token_gives_no_row():
    assert experts(*(t[:0] for t in call(SPECS[0])), FlatSlots(weights(), 3), SPECS[0]).shape == (0, D)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.weight_on}-{s.combine}")
def test_opcheck_and_gradcheck(spec):
    x, ids, w = call(spec)
    flat = [t.requires_grad_() for t in weights()]
    torch.library.opcheck(OP, (x.requires_grad_(), ids, w.requires_grad_(), flat, spec.encode()))
    leaves = [t.detach().clone().requires_grad_() for t in (x, w, *flat)]
    assert torch.autograd.gradcheck(lambda x, w, *f: OP(x, ids, w, list(f), spec.encode()), leaves)


def test_gradients_of_an_expert_without_tokens():
    """Zeros as in a loop over all experts; None as in a loop over those that are hit."""
    x, ids, w = call(SPECS[0])
    for skip, want in ((False, 0.0), (True, None)):
        flat = [t.requires_grad_() for t in weights()]
        experts(x, ids, w, FlatSlots(flat, 3), SPECS[0], skip).sum().backward()
        assert flat[0].grad is not None and flat[0].grad.abs().sum() > 0
        assert (flat[-1].grad is None) if want is None else bool((flat[-1].grad == want).all())


def test_float64_form_ignores_the_dtypes_of_the_graph():
    half = write_body(
        H, torch.bfloat16, [(torch.bfloat16, (D, H))],
        [
            (aten.linear.default, (Value(0), Value(1)), {}),
            (aten._to_copy.default, (Value(2),), {"dtype": torch.float32}),
        ],
        3, D,
    )  # fmt: skip
    rows, matrix = torch.randn(3, H, dtype=torch.float64), torch.randn(D, H, dtype=torch.float64)
    got = function_of(half, double=True)(rows, matrix)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, rows @ matrix.t(), rtol=1e-14, atol=1e-14)


def test_tracers_see_one_node():
    spec, flat = SPECS[0], weights()
    x, ids, w = call(spec)

    class Module(torch.nn.Module):
        def forward(self, x, ids, w):
            return experts(x, ids, w, FlatSlots(flat, 3), spec)

    program = torch.export.export(Module(), (x, ids, w))
    assert [str(n.target) for n in program.graph.nodes].count("moeopt.row_function.default") == 1
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, ids, w)]
        assert experts(*fake, FlatSlots([mode.from_tensor(t) for t in flat], 3), spec).shape == (T, D)


def test_spec_survives_its_text():
    for spec in SPECS:
        assert RowFunction.decode(spec.encode()) == spec
    assert "native_layer_norm, sin) with 3 weights an expert" in str(SPECS[0])
    body = dataclasses.replace(SPECS[0]).body
    assert (body.features, body.out_features, body.products(), body.out) == (H, D, 1, 7)


def test_rows_and_infinities_in_a_graph():
    graph = write_body(
        H, torch.float32, [], [(aten.new_full.default, (Value(0), [RowCount(), 2], float("-inf")), {})], 1, 2,
    )  # fmt: skip
    out = function_of(graph)(torch.zeros(3, H))
    assert out.shape == (3, 2) and bool((out == float("-inf")).all())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not a RowFunction"),
        ('{"graph":"{}"}', "not a RowFunction"),
        (SPECS[0].encode().replace("aten.sin.default", "aten.sin_.default"), "writes to its arguments"),
        (SPECS[0].encode().replace("aten.sin.default", "moeopt.route.default"), "is no ATen op"),
        (SPECS[0].encode().replace('"compute_dtype":"float64"', '"compute_dtype":"int8"'), "must be None or one of"),
        ("[" * 100_000, "not a RowFunction"),
        (json.dumps({"graph": "[" * 100_000}), "not a RowFunction"),
        (SPECS[0].encode().replace('\\"out\\":7', '\\"out\\":8'), "value 8 of 8"),
        (SPECS[0].encode().replace('{\\"v\\":0}', '{\\"v\\":9}'), "value 9 of 4"),
        (SPECS[0].encode().replace(f'[{H},\\"float64\\"', f'[{H},\\"load\\"'), "load is no dtype"),
        (SPECS[0].encode().replace(f'[{H},\\"float64\\"', '[-1,\\"float64\\"'), "rows of -1"),
    ],
)
def test_bad_text_is_refused(text, why):
    with pytest.raises(UsageError, match=why):
        RowFunction.decode(text)


def test_wrong_shapes_are_refused():
    x, ids, w = call(SPECS[0])
    with pytest.raises(UsageError, match=r"they must be \(T, 6\), \(T, K\) and \(T, K\): flatten batch and sequence"):
        expert_by_expert(x[:, :4], ids, w, FlatSlots(weights(), 3), SPECS[0])
