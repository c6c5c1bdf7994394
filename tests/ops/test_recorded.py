"""A call whose gradient is needed: one node around the kernel, and the gradients of what it reached."""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_refs import ExpertRef, MatrixRef
from moeopt.ops import ListExpertWeights, StackedExpertWeights, experts, experts_reference
from moeopt.ops import recorded as module
from moeopt.rewrite.live_weights import LiveExpertWeights, Place
from moeopt.rewrite.same_layout import SameLayout
from tests.capture.tiny import Run, rand
from tests.ops.cases import make
from tests.rewrite.test_live_weights import E, H, I, listed, stacked

SPEC = ExpertsSpec(rows="plain", activation="relu")
PAIRED = ExpertsSpec(rows="separate", w_out_layout="io")
SKIPPING = (False, True)


@pytest.fixture(params=("whole", "turned", "stacked", "one by one"))
def live(request, monkeypatch):
    """Banks that read a module's Parameters, and the spec that they are of."""
    torch.manual_seed(0)
    if request.param == "stacked":
        root, refs = stacked()
        spec = PAIRED
    else:
        root, refs = listed()
        spec = ExpertsSpec(rows="plain", activation="relu", w_in_layout="io" if request.param == "turned" else "oi")
        if request.param == "one by one":
            monkeypatch.setattr(LiveExpertWeights, "whole", lambda self: None)
    root.double().requires_grad_()
    bank = LiveExpertWeights(root, refs, (spec.w_in_layout, spec.w_out_layout))
    return root, bank, spec


def inputs(ids):
    ids = torch.tensor(ids)
    x, weights = torch.randn(len(ids), H, dtype=torch.float64), torch.rand(ids.shape, dtype=torch.float64)
    return x.requires_grad_(), ids, weights.requires_grad_()


def gradients(function, root, x, ids, weights, *more):
    y = function(x, ids, weights, *more)
    if not y.requires_grad:  # the definition where no expert is hit
        return y, [None] * (2 + len(list(root.parameters())))
    return y, torch.autograd.grad(y.square().sum(), [x, weights, *root.parameters()], allow_unused=True)


@pytest.mark.parametrize("skip_idle", SKIPPING)
@pytest.mark.parametrize("ids", ([[0, 1], [1, 0]], [[2, 2]], [[0, 1], [2, -1], [0, E]], [[-1, E]]))
def test_gradients_are_those_of_the_definition(live, ids, skip_idle):
    root, bank, spec = live
    x, ids, weights = inputs(ids)
    y, got = gradients(experts, root, x, ids, weights, bank, spec, skip_idle)
    want_y, want = gradients(experts_reference, root, x, ids, weights, bank, spec)
    torch.testing.assert_close(y, want_y)
    separate = bank.stacked() is None
    hit = {e for e in ids.flatten().tolist() if 0 <= e < E}
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        reached = i < 2 or not separate or not skip_idle or (i - 2) // 4 in hit  # two weights, two biases each
        assert (g is not None) == reached
        if reached:
            torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w)


def test_a_weight_of_zero_reaches_no_expert(live):
    root, bank, spec = live
    x, ids, weights = inputs([[0, 1], [0, 2]])
    weights = torch.tensor([[0.5, 0.0], [0.25, 1.0]], dtype=torch.float64, requires_grad=True)
    _, got = gradients(experts, root, x, ids, weights, bank, spec, True)
    _, want = gradients(experts_reference, root, x, ids, weights, bank, spec)
    for g, w in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(g, w)
    if bank.stacked() is None:
        assert [g is None for g in got[2:]] == [False] * 4 + [True] * 4 + [False] * 4


def test_a_tensor_that_two_experts_share_has_the_sum(live):
    root, bank, spec = live
    if bank.stacked() is not None:
        pytest.skip("stacked weights are one tensor")
    root.experts[2][0].weight = root.experts[0][0].weight
    x, ids, weights = inputs([[0, 2], [2, 1]])
    for skip_idle in SKIPPING:
        _, got = gradients(experts, root, x, ids, weights, bank, spec, skip_idle)
        _, want = gradients(experts_reference, root, x, ids, weights, bank, spec)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
    _, got = gradients(experts, root, x, ids * 0, weights, bank, spec, True)
    assert got[2] is not None  # experts.0.0.weight, which expert 2 has too


def test_views_and_absent_biases_have_gradients():
    case = make(ExpertsSpec(rows="separate", w_in_layout="io", out_norm_eps=1e-6), stacked=False, seed=1)
    case.bank.b_out_l = [None if e == 1 else b for e, b in enumerate(case.bank.b_out_l)]
    case.bank.b_in_l = (case.bank.b_in_l[0], None)
    held = {id(t): t for e in range(4) for t in [*case.bank.w_in(e), case.bank.w_out(e), case.bank.b_in(e)[0],
                                                 case.bank.b_out(e), case.bank.norm(e)] if t is not None}  # fmt: skip
    leaves = [t.requires_grad_() for t in held.values()]
    for skip_idle in SKIPPING:
        got = torch.autograd.grad(experts(*case.args, skip_idle).square().sum(), leaves)
        want = torch.autograd.grad(experts_reference(*case.args).square().sum(), leaves)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)


def test_no_custom_op_is_called_and_no_weight_is_looked_up_one_by_one(monkeypatch):
    root, refs = listed()
    bank = LiveExpertWeights(root, refs, ("oi", "oi"))
    ids = torch.tensor([[0, 1], [1, 2]])
    x, weights = torch.randn(2, H), torch.rand(2, 2).requires_grad_()
    want = experts(x, ids, weights, bank, SPEC)
    monkeypatch.setattr(Place, "read", lambda self: pytest.fail("looked up one by one"))
    with torch.profiler.profile() as profile:
        got = experts(x, ids, weights, bank, SPEC)
    assert got.requires_grad and torch.equal(got, want)
    assert not [event.key for event in profile.key_averages() if event.key.startswith("moeopt::")]


def test_what_is_read_again_may_not_be_changed_before(live):
    root, bank, spec = live
    if bank.stacked() is not None:
        pytest.skip("stacked weights are one tensor")
    x, ids, weights = inputs([[0, 1]])
    y = experts(x, ids, weights, bank, spec, True)
    with torch.no_grad():
        root.experts[2][0].weight.zero_()  # no token reached it
    y.sum().backward(retain_graph=True)
    with torch.no_grad():
        root.experts[1][0].weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as err:
        y.sum().backward()
    assert "moeopt::experts reads its tokens, routing weights and experts again in the backward pass" in str(err.value)
    assert "or write h = h + moe(h) in the place of h += moe(h)" in str(err.value)


def test_a_graph_that_was_freed_says_what_torch_says(live):
    root, bank, spec = live
    y = experts(*inputs([[0, 1]]), bank, spec)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time") as err:
        y.sum().backward()
    assert "moeopt" not in str(err.value)


def test_tokens_of_inference_mode_are_kept(live):
    root, bank, spec = live
    x, ids, weights = inputs([[0, 1], [2, 1]])
    _, want = gradients(experts, root, x, ids, weights, bank, spec)
    with torch.inference_mode():
        x, ids, scores = x.detach().clone(), ids.clone(), weights.detach().clone()
    for share in (weights, scores):
        y = experts(x, ids, share, bank, spec)
        got = torch.autograd.grad(y.square().sum(), list(root.parameters()), allow_unused=True)
        for g, w in zip(got, want[2:], strict=True):
            torch.testing.assert_close(g, w)


def test_two_parameters_in_the_same_memory_have_a_gradient_each():
    root = Run(None, gate=rand(E, I, H), up=rand(E, I, H), out=rand(E, H, I, seed=1))
    root.up.data = root.gate.data
    refs = [
        ExpertRef(
            tuple(MatrixRef(name, (e, 0, 0), (0, 0, 1), (0, 1, 0), H, I) for name in ("gate", "up")), (None, None),
            MatrixRef("out", (e, 0, 0), (0, 0, 1), (0, 1, 0), I, H), None,
        )
        for e in range(E)
    ]  # fmt: skip
    root.requires_grad_()
    spec = ExpertsSpec(rows="separate")
    bank = LiveExpertWeights(root, refs, ("oi", "oi"))
    x, ids, weights = torch.randn(2, H), torch.tensor([[0, 1], [2, 1]]), torch.rand(2, 2)
    for _ in range(2):
        whole = StackedExpertWeights([root.gate, root.up], root.out)
        got, want = (
            torch.autograd.grad(f(x, ids, weights, b, spec).square().sum(), list(root.parameters()), allow_unused=True)
            for f, b in ((experts, bank), (experts_reference, whole))
        )
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
        root.up.data = root.up.data + 1  # and is memory of its own from now on


def test_a_second_derivative_is_refused(live):
    root, bank, spec = live
    x, ids, weights = inputs([[0, 1]])
    y = experts(x, ids, weights, bank, spec)
    with pytest.raises(RuntimeError, match=r"moeopt::experts has no second derivative \(create_graph=True\); take it"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_it_is_recomputed_by_a_checkpoint(live):
    root, bank, spec = live
    x, ids, weights = inputs([[0, 1], [2, 1]])

    def again(x, ids, weights, *more):
        return checkpoint(lambda x, weights: experts(x, ids, weights, *more), x, weights, use_reentrant=False)

    for got, want in zip(*(gradients(f, root, x, ids, weights, bank, spec)[1] for f in (again, experts)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_nothing_is_kept_of_a_call_whose_result_is_gone(live):
    root, bank, spec = live
    x, ids, weights = inputs([[0, 1], [2, 1]])
    x = x.detach().requires_grad_()
    gone = weakref.ref(x)
    gc.disable()
    try:
        y = experts(x, ids, weights, bank, spec, True)
        del x, y
        assert gone() is None
    finally:
        gc.enable()


def test_a_bank_of_lists_is_not_asked_for_experts_that_no_id_names(monkeypatch):
    case = make(ExpertsSpec(rows="plain", activation="relu"), stacked=False, biases=False)
    case.bank.w_out_l[3].requires_grad_()
    case.ids.clamp_(max=2)
    read = []
    honest = ListExpertWeights.w_out
    monkeypatch.setattr(ListExpertWeights, "w_out", lambda self, e: (read.append(e), honest(self, e))[1])
    case.x.requires_grad_()
    held, rebuild, _ = module.separate_experts(case.bank, case.ids, case.weights, True)
    assert 3 not in read and len(held) == 2 * len(set(case.ids.flatten().tolist()))
    assert rebuild(held).num_experts == 4


def test_a_frozen_bank_records_nothing_and_looks_no_expert_up(monkeypatch):
    root, refs = listed()
    bank = LiveExpertWeights(root.requires_grad_(False), refs, ("oi", "oi"))
    call = torch.randn(2, H), torch.tensor([[0, 1], [1, 2]]), torch.rand(2, 2)
    want = experts(*call, bank, SPEC)
    for name in ("w_in", "w_out"):
        monkeypatch.setattr(LiveExpertWeights, name, lambda self, e: pytest.fail("looked up one by one"))
    assert torch.equal(experts(*call, bank, SPEC), want) and not want.requires_grad
    root.experts[2][0].bias.requires_grad_()
    assert experts(*call, bank, SPEC).requires_grad


def test_a_recorded_call_looks_once_at_how_its_weights_lie(monkeypatch):
    """One look for what is recorded and for the kernel: two took a tenth of a small block's time."""
    root, refs = listed()
    bank = LiveExpertWeights(root, refs, ("oi", "oi"))
    looks, honest = [], SameLayout.look
    monkeypatch.setattr(SameLayout, "look", lambda self: (looks.append(self), honest(self))[1])
    for skip_idle in (False, True):
        looks.clear()
        y = experts(torch.randn(2, H), torch.tensor([[0, 1], [1, 2]]), torch.rand(2, 2), bank, SPEC, skip_idle)
        assert y.requires_grad and len(looks) == 1
