"""The gradient that is written out: what it computes, which products it makes, and what it leaves to the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import ListExpertWeights, experts, experts_backward, experts_reference, unflatten
from moeopt.ops import experts_op as op_module
from moeopt.ops import recorded as recorded_module
from moeopt.ops.experts import flatten
from moeopt.ops.native.library import library
from tests.ops.cases import cases, make

aten = torch.ops.aten
MM = (aten.mm.default, aten.mm.out, aten.addmm.default, aten.addmm.out, aten.addmm_.default)
SMOOTH = ("silu", "gelu", "gelu_tanh", "tanh", "mish", "softplus")


def leaves_of(case):
    """x, the routing weights and the weights of the bank, which hold each other's memory nowhere."""
    return [case.x, case.weights, *(t for part in flatten(case.bank, case.spec) for t in part)]


def want(leaves, asked):
    chosen = [t.requires_grad_(n in asked) for n, t in enumerate(leaves)]
    return [t for t in chosen if t.requires_grad]


def differentiated(function, case, wanted, grad, *more):
    y = function(*case.args, *more)
    if not y.requires_grad:  # the definition where no expert is hit
        return [torch.zeros_like(t) for t in wanted]
    found = torch.autograd.grad(y, wanted, grad(y), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


def normal(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)


@pytest.fixture
def definition(monkeypatch):
    """The calls of the definition that a backward pass makes."""
    calls = []

    def counted(*args):
        calls.append(args)
        return experts_reference(*args)

    for module in (recorded_module, op_module):
        monkeypatch.setattr(module, "experts_reference", counted)
    return calls


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_they_are_those_of_the_definition_in_float64(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_backward, "GROUP", data.draw(st.sampled_from((1, 60, experts_backward.GROUP))))
        right_in_float64(data)


def right_in_float64(data):
    case = data.draw(cases())
    if data.draw(st.booleans()):  # every token to every expert
        E = case.bank.num_experts
        case.ids, case.weights = torch.arange(E).expand(len(case.x), E), torch.rand(len(case.x), E).double()
    leaves = leaves_of(case)
    wanted = want(leaves, data.draw(st.sets(st.integers(0, len(leaves) - 1), min_size=1)))
    for function in (experts, op):
        got = differentiated(function, case, wanted, normal)
        for g, w in zip(got, differentiated(experts_reference, case, wanted, normal), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def op(x, ids, weights, bank, spec):
    return torch.ops.moeopt.experts(x, ids, weights, *flatten(bank, spec), spec.text)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("weight_on", ("output", "input"))
@pytest.mark.parametrize("shares", (None, torch.float32), ids=("same", "float32"))
@pytest.mark.parametrize("act", SMOOTH)
def test_no_more_is_lost_than_by_autograd(dtype, weight_on, shares, act):
    """Both round after each operation, in another order: four times as much as autograd loses, or a few units."""
    spec = ExpertsSpec(activation=act, weight_on=weight_on, rows="separate" if act == "gelu" else "gate|up")
    case = make(spec, T=33, E=3, dtype=dtype, stacked=act in SMOOTH[:3])
    case.weights = case.weights.to(shares or dtype)
    wide = make(spec, T=33, E=3, stacked=act in SMOOTH[:3])
    for a, b in zip(leaves_of(case), leaves_of(wide), strict=True):
        b.copy_(a)
    every = range(len(leaves_of(case)))
    exact = differentiated(experts_reference, wide, want(leaves_of(wide), every), normal)
    wanted = want(leaves_of(case), every)
    ours, theirs = (differentiated(f, case, wanted, normal) for f in (experts, experts_reference))
    for got, other, true in zip(ours, theirs, exact, strict=True):
        lost, usual = ((t.double() - true).abs().max() for t in (got, other))
        assert got.dtype == other.dtype and lost <= 4 * usual + 4 * torch.finfo(dtype).eps * true.abs().max()


@pytest.mark.parametrize("stacked", (True, False))
@pytest.mark.parametrize("spec", (
    ExpertsSpec(), ExpertsSpec(rows="plain", w_in_layout="io", weight_on="input", activation="tanh"),
    ExpertsSpec(rows="interleaved", out_of_range="identity", gate_max=0.5, up_offset=1.0),
), ids=str)  # fmt: skip
def test_gradcheck_of_the_eager_call(spec, stacked):
    case = make(spec, T=3, E=2, stacked=stacked, strange_ids=True)
    sizes = [len(part) for part in flatten(case.bank, spec)]

    def run(x, weights, *flat):
        rest = iter(flat)
        return experts(x, case.ids, weights, unflatten([[next(rest) for _ in range(n)] for n in sizes], spec), spec)

    assert torch.autograd.gradcheck(run, [t.detach().clone().requires_grad_() for t in leaves_of(case)])


@pytest.mark.parametrize("every", (False, True))
@pytest.mark.parametrize("biases", (False, True))
def test_routing_weights_of_a_wider_dtype_see_the_outputs_as_they_were_rounded(every, biases):
    """float32 ones of a bfloat16 block: their gradient is held to float32's tolerance where a block is verified."""
    spec = ExpertsSpec(accum_dtype="float32")
    case = make(spec, T=33, E=3, K=3, dtype=torch.bfloat16, biases=biases)
    case.weights = case.weights.float()
    if every:
        case.ids = torch.arange(3).expand(33, 3)
    wanted = want(leaves_of(case), range(len(leaves_of(case))))
    ours, theirs = (differentiated(f, case, wanted, normal) for f in (experts, experts_reference))
    assert (ours[1] - theirs[1]).norm() <= 1e-3 * theirs[1].norm()
    for got, other in zip(ours, theirs, strict=True):
        assert (got.double() - other.double()).norm() <= 1e-2 * other.double().norm()


class Products(TorchDispatchMode):
    """Counts the products of matrices."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in MM
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", ("gate|up", "separate", "plain"))
@pytest.mark.parametrize("stacked", (True, False))
def test_only_what_is_asked_for_is_multiplied(rows, stacked, definition):
    spec, firsts = ExpertsSpec(rows=rows), 2 if rows == "separate" else 1
    case = make(spec, E=3, stacked=stacked, biases=False, dtype=torch.float32)
    case.ids = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [1, 0]])  # two experts of three
    leaves = leaves_of(case)
    w_in, w_out = range(2, 2 + (1 if stacked else 3) * firsts), range(2 + (1 if stacked else 3) * firsts, len(leaves))
    again = 0 if library() is not None else firsts  # h was kept
    for asked, each in (
        ((0,), 1 + firsts), ((1,), 1), ((0, 1), 1 + firsts), (w_out, 1), (w_in, 1 + firsts),
        ((*w_in, *w_out), 2 + firsts), ((0, 1, *w_in, *w_out), 2 + 2 * firsts),
    ):  # fmt: skip
        wanted, y = want(leaves, asked), experts(*case.args)
        with Products() as products:
            torch.autograd.grad(y.sum(), wanted)
        assert products.count == 2 * (each + again), (asked, rows)
    assert not definition


@pytest.mark.parametrize("stacked", (True, False))
def test_what_is_not_known_is_left_to_the_definition(stacked, definition):
    case = make(ExpertsSpec(out_norm_eps=1e-2), stacked=stacked)
    wanted = want(leaves_of(case), range(9))
    got = differentiated(experts, case, wanted, normal)
    assert len(definition) == 1
    for g, w in zip(got, differentiated(experts_reference, case, wanted, normal), strict=True):
        torch.testing.assert_close(g, w)


def test_experts_of_several_widths_are_left_to_the_definition(definition):
    narrow, wide = (torch.randn(n, 6, dtype=torch.float64) for n in (4, 8))
    bank = ListExpertWeights([[narrow, wide]], [torch.randn(6, n, dtype=torch.float64) for n in (4, 8)])
    spec = ExpertsSpec(rows="plain")
    x = torch.randn(5, 6, dtype=torch.float64).requires_grad_()
    call = x, torch.tensor([[0], [1], [0], [1], [1]]), torch.rand(5, 1).double(), bank, spec
    wanted = [x, narrow.requires_grad_(), wide.requires_grad_()]
    got, right = (torch.autograd.grad(f(*call).square().sum(), wanted) for f in (experts, experts_reference))
    for g, w in zip(got, right, strict=True):
        torch.testing.assert_close(g, w)
    assert len(definition) == 1


class Tagged(torch.nn.Parameter):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_of_a_class_of_their_own_are_left_to_the_definition(definition):
    case = make(ExpertsSpec(), stacked=False, dtype=torch.float32)
    case.bank.w_out_l = [Tagged(t) for t in case.bank.w_out_l]
    torch.autograd.grad(experts(*case.args).sum(), list(case.bank.w_out_l))
    assert len(definition) == 1


@pytest.mark.parametrize("grad", (
    lambda y: torch.ones((), dtype=y.dtype).expand(y.shape),
    lambda y: torch.randn(y.shape[::-1], dtype=y.dtype).t(),
    lambda y: torch.randn(*y.shape, 2, dtype=y.dtype)[..., 1],
), ids=("expanded", "transposed", "strided"))  # fmt: skip
@pytest.mark.parametrize("every", (False, True))
def test_gradients_that_lie_otherwise(grad, every):
    case = make(ExpertsSpec(rows="plain"), E=3, K=3)
    if every:
        case.ids = torch.arange(3).expand(7, 3)
    wanted = want(leaves_of(case), range(9))
    torch.manual_seed(0)
    got = differentiated(experts, case, wanted, grad)
    torch.manual_seed(0)
    for g, w in zip(got, differentiated(experts_reference, case, wanted, grad), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("where", ("x", "grad", "expert"))
@pytest.mark.parametrize("stacked", (True, False))
def test_what_is_no_number_stays_where_it_is(bad, where, stacked):
    case = make(ExpertsSpec(), E=4, K=2, stacked=stacked)
    case.ids = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3], [0, 1], [3, 2], [1, 0]])

    def grad(y):
        found = normal(y)
        if where == "grad":
            found[1, 2] = bad
        return found

    if where == "x":
        case.x[1, 2] = bad
    if where == "expert":
        case.bank.w_out(3)[1, 2] = bad
    leaves = leaves_of(case)
    wanted = want(leaves, range(len(leaves)))
    got = differentiated(experts, case, wanted, grad)
    right = differentiated(experts_reference, case, wanted, grad)
    for n, (g, w) in enumerate(zip(got, right, strict=True)):
        assert torch.equal(g.isfinite(), w.isfinite()), n
    assert got[0][0].isfinite().all() and not all(g.isfinite().all() for g in got)


def test_grads_of_several_passes_are_added_and_hooks_run():
    case = make(ExpertsSpec(rows="separate", w_in_layout="io"), stacked=False, dtype=torch.float32)
    leaves = leaves_of(case)
    want(leaves, range(len(leaves)))
    seen = []
    leaves[2].register_post_accumulate_grad_hook(seen.append)
    leaves[3].register_hook(lambda grad: grad * 2)
    experts(*case.args).sum().backward()
    first = [t.grad.clone() for t in leaves]
    experts(*case.args).sum().backward()
    assert len(seen) == 2
    for t, g in zip(leaves, first, strict=True):
        torch.testing.assert_close(t.grad, 2 * g)
    (once,) = torch.autograd.grad(experts_reference(*case.args).sum(), leaves[3:4])
    torch.testing.assert_close(first[3], once)  # torch.autograd.grad runs the hook too


@pytest.mark.parametrize("layout", ("oi", "io"))
def test_the_gradient_of_a_separate_weight_is_kept_as_it_is(layout, monkeypatch):
    """It lies as the weight does, and nobody else holds it: ``.grad`` needs no copy."""
    case = make(ExpertsSpec(rows="plain", w_in_layout=layout), stacked=False, biases=False, dtype=torch.float32)
    weights = [torch.nn.Parameter(w) for w in case.bank.w_in_l[0]]
    case.bank.w_in_l = (weights,)
    made = []
    honest = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **more: made.append((g := honest(*args, **more)).data_ptr()) or g)
    experts(*case.args).sum().backward()
    hit = [e for e in range(4) if (case.ids == e).any()]
    assert hit and all(weights[e].grad.data_ptr() in made for e in hit)
