"""The oracle computes what the code computes, in float64, with its choices, and leaves no trace."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeopt.errors import Declined
from moeopt.verification.distance import token_distance
from moeopt.verification.oracle import Restored, record_selections, run_oracle, run_pinned
from moeopt.verification.selections import OracleError, Selections
from tests.verification import styles
from tests.verification.tiny import TinyMoE, seeded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def oracle(fn, *args):
    y, chosen = record_selections(fn, args, {})
    return y, run_oracle(fn, args, {}, chosen), chosen


def doubled(bank):
    for name, tensor in vars(bank).items():
        setattr(bank, name, tensor.double())
    return bank


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", styles.STYLES, ids=lambda f: f.__name__)
def test_every_style_equals_a_model_cast_to_double(style, dtype):
    """The truth without a mode: weights and input cast to double (float32 casts inside remain float32)."""
    bank, x = styles.bank(dtype), seeded(styles.T, styles.H, seed=3, dtype=dtype)
    y, y_64, chosen = oracle(lambda x: style(x, bank), x)
    assert y.dtype == dtype and y_64.dtype == torch.float64
    assert chosen.events
    same = styles.hit_loop if style is styles.grouped else style  # _grouped_mm itself refuses doubles
    plain = same(x.double(), doubled(styles.bank(dtype)))
    assert token_distance(y_64, plain).max() < 32 * torch.finfo(torch.float32).eps
    assert 0 < token_distance(y, y_64).max() < 16 * torch.finfo(dtype).eps


def test_float32_casts_inside_become_float64():
    y, y_64, _ = oracle(lambda x: (x.float() / 3).to(x.dtype) + F.softmax(x, -1, dtype=torch.float32), seeded(3, 4))
    x = seeded(3, 4).double()
    assert (y_64 - (x / 3 + x.softmax(-1))).abs().max() < 1e-15


def test_grouped_mm_forms():
    x, w = seeded(8, 16, dtype=torch.bfloat16), seeded(3, 16, 8, seed=1, dtype=torch.bfloat16)
    offs = torch.tensor([2, 2, 8], dtype=torch.int32)
    y, y_64, _ = oracle(lambda x: F.grouped_mm(x, w, offs=offs), x)
    truth = torch.cat([x[:2].double() @ w[0].double(), x[2:].double() @ w[2].double()])
    assert torch.equal(y_64, truth) and token_distance(y, y_64).max() < 0.01
    b, w3 = seeded(3, 8, 16, dtype=torch.bfloat16), seeded(3, 16, 8, seed=2, dtype=torch.bfloat16)
    _, y_64, _ = oracle(lambda b: F.grouped_mm(b, w3), b)
    assert torch.equal(y_64, b.double() @ w3.double())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixtral_block_of_transformers(implementation, dtype):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = mixtral.MixtralConfig(
        hidden_size=32, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2, num_attention_heads=4
    )
    config._experts_implementation = implementation
    block = mixtral.MixtralSparseMoeBlock(config).to(dtype).eval()
    with torch.no_grad():
        for n, p in enumerate(block.parameters()):
            p.copy_(seeded(*p.shape, seed=n) * 0.1)
    y, y_64, _ = oracle(block, seeded(2, 5, 32, dtype=dtype))
    assert y_64.dtype == torch.float64
    assert 0 < token_distance(y, y_64).max() < 16 * torch.finfo(dtype).eps


def test_choices_are_pinned_not_recomputed():
    def top(x):
        values, ids = x.topk(2)
        return values, ids, x.argmax(-1), x > 0, x.sort(-1), x.max(-1)

    x = seeded(3, 5)
    y, chosen = record_selections(top, (x,), {})
    for event in chosen.events:
        event.outputs = tuple(o.flip(0) if isinstance(o, torch.Tensor) else o for o in event.outputs)
    y_64 = run_oracle(top, (x,), {}, chosen)
    assert (
        torch.equal(y_64[1], y[1].flip(0)) and torch.equal(y_64[2], y[2].flip(0)) and torch.equal(y_64[3], y[3].flip(0))
    )
    assert torch.equal(y_64[0], x.double().gather(-1, y[1].flip(0)))
    assert (
        torch.equal(y_64[4].values, x.double().gather(-1, y[4].indices.flip(0))) if hasattr(y_64[4], "values") else True
    )


def test_pinned_at_own_dtype():
    x = seeded(3, 5, dtype=torch.bfloat16)
    y, chosen = record_selections(lambda x: x.topk(1), (x,), {})
    event = chosen.routing()[0]
    other = chosen.replaced(event, event.with_ids(torch.full((3, 1), 4)))
    values, ids = run_pinned(lambda x: x.topk(1), (x,), {}, other)
    assert values.dtype == torch.bfloat16 and torch.equal(values, x[:, 4:]) and ids.tolist() == [[4]] * 3


def test_routing_events_know_their_scores():
    x = seeded(4, 6)
    _, chosen = record_selections(lambda x: (x.topk(2, dim=0), x.argmax(), x.max(0, keepdim=True)), (x,), {})
    first, second, third = chosen.routing()
    assert first.ids.shape == (6, 2) and torch.equal(first.scores, x.t())
    assert second.ids.shape == (1,) and second.scores.shape == (1, 24)
    assert third.ids.shape == (6, 1)
    assert torch.equal(first.with_ids(first.ids + 1).ids, first.ids + 1)


class Writes(nn.Module):
    """Everything a forward should not do: a counter, a cache, a swapped parameter, noise, its own input."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(seeded(4, 4))
        self.lin = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(3))
        self.last = None

    def forward(self, x):
        self.calls.add_(0.1)
        self.lin = self.lin.to(torch.float32)
        self.last = x @ self.w
        x.mul_(1 + 0.01 * torch.rand_like(x))
        return self.lin(self.last) + x


def test_no_trace_is_left():
    model, x = Writes(), seeded(3, 4)
    before = {name: (t, t.clone(), t.data_ptr()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    rng, copy_x = torch.get_rng_state(), x.clone()
    y, y_64, chosen = oracle(model, x)
    assert token_distance(y, y_64).max() < 8 * torch.finfo(torch.float32).eps
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        kept, value, address = before[name]
        assert t is kept and torch.equal(t, value) and t.data_ptr() == address and t.dtype == torch.float32
    assert model.last is None and torch.equal(rng, torch.get_rng_state()) and torch.equal(x, copy_x)
    assert torch.equal(chosen.state["calls"], torch.full((3,), 0.1)) and list(chosen.inputs) == [0]


class Counts(nn.Module):
    """Counts its calls in all that a module may hold, and adds the count to what it returns."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.norm, self.number, self.seen, self.kept = nn.BatchNorm1d(4), 0, [], {"last": torch.zeros(())}
        self.own = nn.Parameter(torch.zeros(4))

    def forward(self, x, raises=False):
        x.add_(1)
        self.calls += 1
        self.own.mul_(0).add_(self.calls)
        self.kept["last"].add_(1)
        self.number, self.last = self.number + 1, x
        self.seen.append(self.number)
        if raises:
            raise ValueError("on the way")
        counts = self.calls + self.kept["last"] + self.number + len(self.seen)
        return self.norm(x) + counts + self.own + torch.rand(4)


def test_every_run_of_many_begins_from_the_same_state():
    model, x = Counts(), seeded(6, 4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        stream = torch.get_rng_state()
        run = Restored(model)
        first = run((x,), {})
        with pytest.raises(ValueError, match="on the way"):
            run((x,), {"raises": True})
        assert len(run((seeded(3, 4),), {})) == 3 and torch.equal(run((), {"x": x}), first)
        assert torch.equal(torch.get_rng_state(), stream)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        assert (model.number, model.seen, model.kept["last"].item()) == (0, [], 0) and not hasattr(model, "last")
        assert torch.equal(x, seeded(6, 4))
        with torch.no_grad():
            torch.testing.assert_close(first, model(x.clone()), rtol=0, atol=0)
            assert not torch.equal(first, model(x.clone())), "the second call counts on"


def test_layers_that_refuse_mixed_dtypes():
    for layer, shape in [
        (nn.Conv2d(4, 4, 1), (2, 4, 3, 3)),
        (nn.PReLU(), (3, 4)),
        (nn.GRU(4, 4), (3, 2, 4)),
        (nn.BatchNorm1d(4).eval(), (3, 4)),
        (nn.MultiheadAttention(4, 2, batch_first=True).eval(), None),
    ]:
        args = (seeded(*shape),) if shape else (seeded(2, 3, 4),) * 3
        y, y_64, _ = oracle(layer, *(a.clone() for a in args))
        y, y_64 = (o[0] if isinstance(o, tuple) else o for o in (y, y_64))
        assert y_64.dtype == torch.float64 and token_distance(y, y_64).max() < 1e-5, layer


MIXED = {
    "attention to keys that are weights": lambda x, w: F.scaled_dot_product_attention(
        x.view(2, 2, 2, 2), w.view(2, 2, 2, 2), w.view(2, 2, 2, 2)
    ),
    "tensordot": lambda x, w: torch.tensordot(x, w, 1),
    "inner": lambda x, w: torch.inner(x, w) + x.inner(w),
    "multi_dot": lambda x, w: torch.linalg.multi_dot([x, w, w]),
    "vecdot": lambda x, w: torch.linalg.vecdot(x, w),
    "meshgrid": lambda x, w: (
        torch.cartesian_prod(x[0], w[0]) + torch.meshgrid(x[0], w[0], indexing="ij")[0].reshape(-1, 1)
    ),
}


@pytest.mark.parametrize("of", MIXED)
def test_functions_of_rows_and_weights_that_refuse_mixed_dtypes(of):
    weight = nn.Parameter(seeded(4, 4))
    y, y_64, _ = oracle(lambda x: MIXED[of](x * 1.5, weight), seeded(4, 4))
    assert y_64.dtype == torch.float64 and token_distance(y, y_64).max() < 1e-5


CHOOSE_BESIDE = {
    "solve": lambda x: torch.linalg.solve(x @ x.mT + torch.eye(4), x),
    "inv": lambda x: torch.linalg.inv(x @ x.mT + torch.eye(4)),
    "det": lambda x: torch.linalg.det(x)[None] + torch.linalg.slogdet(x).logabsdet,
    "lstsq": lambda x: torch.linalg.lstsq(x, x[:, :2]).solution,
    "unique rows": lambda x: x.round().unique(dim=0, return_inverse=True)[0],
}


@pytest.mark.parametrize("of", CHOOSE_BESIDE)
def test_a_call_may_choose_beside_what_it_computes(of):
    """The pivots of a matrix, or the places of equal rows: compared with those of the recorded run."""
    y, y_64, _ = oracle(CHOOSE_BESIDE[of], seeded(4, 4))
    assert y_64.dtype == torch.float64 and (y - y_64).abs().max() < 1e-4


def test_what_is_chosen_otherwise_in_float64_beside_a_result_is_told():
    with pytest.raises(OracleError, match=r"cannot pin the choice of aten.unique_dim.default: it has no gathered form"):
        oracle(lambda x: (x * 1e-9 + 1).unique(dim=0)[0], seeded(4, 4))


POOLS = {
    "of rows": lambda x: F.max_pool1d(x, 3, 1, 1),
    "of images": lambda x: F.max_pool2d(x, 2),
    "of volumes": lambda x: F.max_pool3d(x[None], 2),
    "of all": lambda x: F.adaptive_max_pool2d(x, 1),
    "without gradients": torch.no_grad()(lambda x: F.max_pool1d(x, 2)),
}


@pytest.mark.parametrize("pool", POOLS)
def test_the_largest_of_a_window_is_no_choice(pool):
    """PyTorch has kernels with and without the places; which one runs depends on dtypes and gradients."""
    x = seeded(4, 4, 6) if "row" in pool or "gradients" in pool else seeded(2, 4, 4, 6)
    _, y_64, chosen = oracle(POOLS[pool], x)
    assert torch.equal(y_64, POOLS[pool](x.double())) and not chosen.events


def test_attention_forms():
    q, lower = seeded(2, 2, 5, 8), torch.ones(5, 5).tril().bool()
    for kwargs in ({}, {"is_causal": True}, {"attn_mask": lower}, {"scale": 0.3}):
        y, y_64, _ = oracle(lambda q, kw=kwargs: F.scaled_dot_product_attention(q, q, q, **kw), q)
        scores = q.double() @ q.double().mT * kwargs.get("scale", 8**-0.5)
        if len(kwargs) and "scale" not in kwargs:
            scores = scores.masked_fill(~lower, -torch.inf)
        assert (y_64 - scores.softmax(-1) @ q.double()).abs().max() < 1e-14
        assert token_distance(y, y_64).max() < 1e-5


@pytest.mark.parametrize("hidden", [False, -torch.inf])
def test_a_query_that_sees_no_key_gets_zeros(hidden):
    q, mask = seeded(2, 2, 5, 8), torch.ones(5, 5).tril(-1).bool()
    mask = mask if hidden is False else torch.zeros(5, 5).masked_fill(~mask, hidden)
    y, y_64, _ = oracle(lambda q: F.scaled_dot_product_attention(q, q, q, mask), q)
    assert not y_64[:, :, 0].any() and token_distance(y, y_64).max() < 1e-5


@torch.library.custom_op("moeopt_tests::float32_op", mutates_args=())
def float32_op(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32:
        raise ValueError("no kernel\nfor this dtype")
    return x.clone()


def branching(x):
    y = x * 2
    return y.topk(1)[0] if y.dtype == torch.float32 else y.topk(2)[0][..., :1].sort()[0]


def never_again(x):
    y = x * 2
    return y.topk(1)[0] if y.dtype == torch.float32 else y


def compares_more(x):
    y = x * 2
    return y if y.dtype == torch.float32 else y * (y > 0)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (branching, "aten.sort.default on shapes 3x1 was not recorded|aten.sort.default chose here and not there"),
        (never_again, "aten.topk.default on shapes 3x4 was recorded and never met"),
        (compares_more, "aten.gt.Scalar chose here and not there"),
        (lambda x: (x * 2).view(torch.int32), "cannot reinterpret the bits of a float"),
        (lambda x: float32_op(x * 2), "cannot run moeopt_tests.float32_op.default: ValueError: no kernel"),
        (lambda x: fails_in_double(x * 2), "stopped in the block's own code: ValueError: float32 only"),
    ],
    ids=["branch", "fewer choices", "more choices", "bits", "no float64 kernel", "own code"],
)
def test_refusals_name_the_op(fn, reason):
    x = seeded(3, 4)
    _, chosen = record_selections(fn, (x,), {})
    with pytest.raises(OracleError, match=reason) as err:
        run_oracle(fn, (x,), {}, chosen)
    assert isinstance(err.value, Declined) and "\n" not in str(err.value)


def fails_in_double(x):
    if x.dtype == torch.float64:
        raise ValueError("float32 only")
    return x


def test_an_unrecorded_run_is_refused():
    with pytest.raises(OracleError, match="aten.topk.default"):
        run_oracle(TinyMoE(), (seeded(1, 3, 16),), {}, Selections())


def test_inputs_in_containers_are_cloned():
    def writes(batch, scale=None):
        batch["x"][0].add_(1)
        return batch["x"][0] * scale

    x = torch.zeros(2, 3)
    y, chosen = record_selections(writes, ({"x": [x]},), {"scale": torch.ones(3)})
    run_oracle(writes, ({"x": [x]},), {"scale": torch.ones(3)}, chosen)
    assert torch.equal(x, torch.zeros(2, 3)) and torch.equal(y, torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_rms_norm_without_an_epsilon_has_the_one_of_the_recorded_dtype(dtype):
    """Small rows, in which the epsilon decides; float64's own would be 5e8 times smaller."""
    weight = torch.linspace(0.5, 2, 8, dtype=dtype)

    def fn(x):
        return F.rms_norm(x, (8,), weight) + torch.rms_norm(x * 2, (8,), None, None) + F.rms_norm(x, (8,), eps=2**-10)

    x = (torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * 2e-4).to(dtype)
    _, selections = record_selections(fn, (x,), {})
    eps = torch.finfo(torch.float32).eps  # PyTorch computes 16 bits in float32
    assert selections.epsilons == [eps, eps]
    got, wide = run_oracle(fn, (x,), {}, selections), x.double()
    want = F.rms_norm(wide, (8,), weight.double(), eps) + F.rms_norm(wide * 2, (8,), None, eps)
    torch.testing.assert_close(got, want + F.rms_norm(wide, (8,), eps=2**-10), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_too_large_to_be_held_twice_are_widened_part_by_part(dtype, monkeypatch):
    """Products of stacks and of experts side by side, some matrices and some columns at a time."""
    from moeopt.verification import float64_decompositions

    torch.manual_seed(0)
    x, stack, wide = torch.randn(5, 3, 8).to(dtype), torch.randn(5, 8, 7).to(dtype), torch.randn(8, 50).to(dtype)
    widened = []
    real = torch.Tensor.to

    def to(self, *args, **kwargs):
        widened.append(self.numel())
        return real(self, *args, **kwargs)

    def products(x, stack, wide):
        return torch.bmm(x, stack), torch.mm(x[0], wide)

    want = products(x.double(), stack.double(), wide.double())
    for most in (1 << 20, 120):
        monkeypatch.setattr(float64_decompositions, "AT_ONCE", most)
        widened.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", to)
            got = run_oracle(products, (x, stack, wide), {}, Selections())
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)
        assert max(widened) == (8 * 50 if most > 400 else 15 * 8)
    flags = torch.ones(2, 2, 2, dtype=torch.int64)
    assert run_oracle(torch.bmm, (flags, flags), {}, Selections()).dtype == torch.int64
