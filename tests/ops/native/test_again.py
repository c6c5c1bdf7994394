"""A small call that the kernel has done is done again by its words: where it is like that one, and nowhere else."""

import dataclasses
import pickle

import pytest
import torch
from torch.autograd import forward_ad

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import experts, experts_reference
from moeopt.ops.every_ids import every_ids
from moeopt.ops.expert_weights import StackedExpertWeights
from moeopt.ops.native import again, dispatch
from moeopt.ops.native.library import library
from moeopt.rewrite.live_weights import LiveExpertWeights
from tests.rewrite.test_live_weights import E, H, listed, stacked

SPEC = ExpertsSpec(rows="separate", w_in_layout="io", w_out_layout="io")


@pytest.fixture(autouse=True)
def no_gradients():
    if library() is None:
        pytest.skip("no native kernel here")
    with torch.no_grad():
        yield


@pytest.fixture
def bank():
    root, refs = stacked()
    bank = LiveExpertWeights(root, refs, ("io", "io"))
    bank.root = root
    return bank


@pytest.fixture
def prepared(monkeypatch):
    """How often a call was prepared from the start."""
    calls, honest = [], again.prepared_call
    monkeypatch.setattr(again, "prepared_call", lambda *args: calls.append(args) or honest(*args))
    return calls


def calls_of(bank):
    """The calls that are remembered of the weights as they lie."""
    known, _ = bank.remembered(E)
    return [done for done in known.values() if isinstance(done, again.CallDone)]


def inputs(T=1, K=2, seed=0, ids=torch.int64, x=torch.float32):
    g = torch.Generator().manual_seed(seed)
    named = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
    return torch.randn(T, H, generator=g).to(x), named.to(ids), torch.rand(T, K, generator=g)


def right(bank, call, spec=SPEC):
    got, want = experts(*call, bank, spec), experts_reference(*call, bank, spec)
    return torch.allclose(got, want, rtol=1e-2 if want.dtype is torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_call_of_the_same_sizes_is_not_prepared_again(bank, prepared):
    for seed in range(5):
        assert right(bank, inputs(seed=seed)) and right(bank, inputs(T=3, seed=seed))
    assert len(prepared) == 2


@pytest.mark.parametrize(
    "other",
    (
        inputs(ids=torch.int32), inputs(ids=torch.uint8), inputs(x=torch.bfloat16), inputs(T=2), inputs(K=1),
        (*inputs()[:2], inputs()[2].double()),
    ),
    ids=("int32", "uint8", "bfloat16", "two tokens", "top-1", "double weights"),
)  # fmt: skip
def test_other_dtypes_and_sizes_are_other_calls(bank, prepared, other):
    assert right(bank, inputs()) and right(bank, inputs(seed=1)) and len(prepared) == 1
    for _ in range(2):
        assert right(bank, other)
    assert len(prepared) > 1


def test_another_function_or_number_of_threads_is_another_call(bank, prepared):
    assert right(bank, inputs())
    relu = dataclasses.replace(SPEC, activation="relu")
    assert right(bank, inputs(), relu) and right(bank, inputs(seed=1), relu) and len(prepared) == 2
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert right(bank, inputs(), relu) and len(prepared) == 3
    finally:
        torch.set_num_threads(before)


def strided(t):
    return torch.stack([t, t + 1], -1)[..., 0]


@pytest.mark.parametrize("which", range(3))
def test_what_does_not_lie_in_one_run_is_prepared(bank, prepared, which):
    call = inputs(T=3)
    assert right(bank, call)
    other = [strided(t) if i == which else t for i, t in enumerate(call)]
    assert right(bank, other) and right(bank, call) and len(prepared) == 2


def test_a_sign_that_is_only_a_mark_is_seen(bank):
    x, ids, weights = inputs()
    assert right(bank, (x, ids, weights)) and right(bank, (torch._neg_view(x), ids, weights))


class Logged(torch.Tensor):
    """A subclass may mean something else by its numbers."""


def test_subclasses_and_tangents_are_prepared(bank, prepared):
    x, ids, weights = inputs()
    assert right(bank, (x, ids, weights)) and len(prepared) == 1
    known, run = bank.remembered(2)[0], library().run
    assert again.again(known, run, x, ids, weights, SPEC, E) is not None
    for call in ((x.as_subclass(Logged), ids, weights), (x, ids.as_subclass(Logged), weights)):
        assert again.again(known, run, *call, SPEC, E) is None
    with forward_ad.dual_level():
        assert again.again(known, run, x, ids, weights, SPEC, E) is None


def written(root):
    root.w_out.mul_(3)


def another(root):
    root.w_in = torch.nn.Parameter(root.w_in * 2)


def moved(root):
    root.w_out.data = root.w_out.data * 2


def turned(root):
    """Other strides, and other numbers, at the same address."""
    data = root.b.data
    root.b.data = data.as_strided(data.shape, (1, data.shape[0]))


def negated(root):
    """The same memory, read with the other sign."""
    root.w_out.data = torch._neg_view(root.w_out.data)


@pytest.mark.parametrize("change", (written, another, moved, turned, negated))
def test_weights_that_changed_are_seen(bank, change):
    call = inputs()
    before = experts(*call, bank, SPEC)
    assert right(bank, call)
    change(bank.root)
    assert right(bank, call) and not torch.equal(experts(*call, bank, SPEC), before)


@pytest.mark.parametrize("T", (1, 2))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_call_of_every_expert_on_every_row_is_another_call(bank, prepared, monkeypatch, T, dtype):
    x, _, weights = inputs(T=T, K=E, x=dtype)
    some, copied, kept = torch.arange(E).flip(0).repeat(T, 1), torch.arange(E).repeat(T, 1), every_ids(T, E)
    for named in (some, copied, kept):
        for _ in range(2):
            assert right(bank, (x, named, weights))
    assert len(prepared) == len(calls_of(bank)) == 3
    monkeypatch.setattr(dispatch, "_of_every", lambda *args: "torch")
    bank.root.w_out.data = bank.root.w_out.data.clone()  # forgets them
    assert right(bank, (x, some, weights)) and right(bank, (x, copied, weights)) and len(calls_of(bank)) == 1


def test_without_the_kernel_nothing_is_done_by_its_words(bank, prepared, monkeypatch):
    call = inputs()
    assert right(bank, call) and calls_of(bank)
    ran, honest = [], dispatch.experts_cpu
    monkeypatch.setattr(dispatch, "library", lambda: None)
    monkeypatch.setattr(dispatch, "experts_cpu", lambda *args: ran.append(args) or honest(*args))
    assert right(bank, call) and len(ran) == 1


def test_only_small_calls_are_kept_and_not_too_many(bank, monkeypatch):
    monkeypatch.setattr(again, "MOST", 3)
    for T in range(1, 9):
        assert right(bank, inputs(T=T)) and 1 <= len(calls_of(bank)) <= 3
    kept = len(calls_of(bank))
    assert right(bank, inputs(T=again.SMALL)) and len(calls_of(bank)) == kept


def test_a_bank_that_is_given_to_the_op_is_prepared_each_time(bank, prepared):
    given = bank.stacked()
    for _ in range(2):
        assert right(given, inputs())
    assert len(prepared) == 2, "nobody else looks where its tensors lie"


def test_weights_that_no_live_bank_gave_out_remember_nothing_and_are_pickled(bank):
    root = bank.root
    own = StackedExpertWeights([root.w_in[..., ::2], root.w_in[..., 1::2]], root.w_out, None, root.b)
    assert right(own, inputs()) and right(pickle.loads(pickle.dumps(own)), inputs())


class Forgetful(dict):
    """What is known of a bank, which another thread clears between two looks."""

    def __contains__(self, key):
        found = super().__contains__(key)
        self.clear()
        return found


def test_another_thread_may_clear_what_is_known():
    root, refs = listed()
    bank, spec, known = LiveExpertWeights(root, refs, ("oi", "oi")), ExpertsSpec(rows="plain"), Forgetful()
    call, kernel = inputs(), library()
    for _ in range(2):
        y, _ = again.prepared_call(kernel.run, *call, bank, spec, kernel.bit, known)
        torch.testing.assert_close(y, experts_reference(*call, bank, spec))
