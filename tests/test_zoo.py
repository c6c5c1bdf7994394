"""The zoo goes through ``moeopt.optimize``: rewritten where it should be, declined with a reason, never wrong."""

import copy
import inspect
import os
import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import moeopt
from tests.helpers import assert_same, count_expert_calls, run, run_in_place, tensors
from tests.zoo import CASES
from tests.zoo.case import ZooCase

CALLS = 5
ON_EACH_ISA = set(sorted(CASES)[1::8])
"""An eighth of the zoo, through all of its files: sums in another order stay within the same budgets."""
OFTEN = ON_EACH_ISA | set(sorted(CASES)[5::8])
"""The quarter that `make test` takes."""
STRICT = set(CASES) if os.environ.get("MOEOPT_NIGHTLY") == "1" else ON_EACH_ISA
"""Those that are verified on all cases; the others on the first of them, and by the calls of these tests."""


def example(case, model):
    """``optimize`` takes positional or keyword arguments; a call that mixes both is given by keyword."""
    args, kwargs = case.inputs()
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments) if kwargs else args


def state(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def hidden_states(case):
    """Whether the first argument is a contiguous float tensor of tokens."""
    args, _ = case.fresh(3)
    return bool(args) and args[0].is_floating_point() and args[0].dim() in (2, 3) and args[0].is_contiguous()


def is_meta(model):
    return any(p.is_meta for p in model.parameters())


def check_report(case, blocks):
    if case.moe is not None:
        assert len(blocks) == case.moe, [str(b) for b in blocks]
    if case.expect != "either":
        assert {b.status for b in blocks} <= {case.expect}, [(b.name, b.status, b.reason) for b in blocks]
    for i, b in enumerate(blocks):
        if b.status == "rewritten":
            assert b.experts == (case.experts[i] if isinstance(case.experts, tuple) else case.experts)
        elif case.expect == "declined":
            assert re.search(case.reason, b.reason), f"{b.reason!r} does not say {case.reason!r}"


@dataclass(frozen=True)
class Optimised:
    """A case, the model that was given to ``optimize``, its state before, and what came back."""

    case: ZooCase
    given: nn.Module
    before: dict[str, torch.Tensor]
    opt: moeopt.Optimized


@pytest.fixture(scope="module")
def zoo(request):
    """A case, optimised once for all tests of it; each test begins with weights and buffers as built."""
    case = CASES[request.param]
    given = case.build()
    before = state(given)
    level = "strict" if case.name in STRICT else "fast"
    return Optimised(case, given, before, moeopt.optimize(given, example(case, given), backend="torch", verify=level))


def of(names):
    left_out = ((pytest.mark.one_isa, ON_EACH_ISA), (pytest.mark.nightly, OFTEN))
    params = [pytest.param(n, marks=[mark for mark, of in left_out if n not in of]) for n in sorted(names)]
    return pytest.mark.parametrize("zoo", params, indirect=True)


@of(CASES)
def test_zoo(zoo):
    case, given, before, opt = zoo.case, zoo.given, zoo.before, zoo.opt
    original = case.build()
    after = given.state_dict()
    assert list(after) == list(before) == list(opt.model.state_dict())
    for key, t in before.items():
        assert t.is_meta or torch.equal(after[key], t), f"optimize changed {key} of the model it was given"
    assert type(opt.model) is type(given) and opt.model.training == given.training

    blocks = [b for b in opt.report.blocks if b.kind == "moe"]
    check_report(case, blocks)
    if is_meta(given):
        return

    rewritten = [b for b in blocks if b.status == "rewritten"]
    for i in range(CALLS):
        call = case.fresh(i)
        got_call, want_call = copy.deepcopy(call), copy.deepcopy(call)
        with count_expert_calls() as seen:
            got = run_in_place(opt, got_call)
        want = run_in_place(original, want_call)
        if case.expect == "rewritten":
            assert len(seen) >= len(rewritten), f"{len(seen)} expert kernels ran for {len(rewritten)} rewritten blocks"
        exact = not any(b.status == "rewritten" for b in opt.report.blocks)
        assert_same(got, want, exact=exact)
        assert_same(got_call, want_call, exact=exact)  # a model may write to its inputs; then so must the rewrite
        for key in case.check_state:
            assert torch.equal(opt.model.get_buffer(key), original.get_buffer(key)), f"buffer {key} went another way"
    if not case.check_state:
        assert_same(run(given, case.inputs()), run(case.build(), case.inputs()), exact=True)


@pytest.fixture
def refused_by_the_native_kernel(monkeypatch):
    """Why the native kernel left calls to torch's, where it did."""
    from moeopt.ops.native import dispatch

    honest, reasons = dispatch.call, []

    def call(*args):
        try:
            return honest(*args)
        except dispatch.Unfit as err:
            reasons.append(str(err))
            raise

    monkeypatch.setattr(dispatch, "call", call)
    return reasons


@of(n for n, c in CASES.items() if c.expect == "rewritten")
def test_rewritten_zoo_is_certified(zoo, refused_by_the_native_kernel):
    """The certificate passes, a call with gradients on agrees, and the experts follow their weights afterwards."""
    case, opt, original = zoo.case, zoo.opt, zoo.case.build()
    opt.model.load_state_dict(zoo.before)
    assert opt.certificate.passed is True, str(opt.certificate)
    args, kwargs = case.fresh(2)
    assert_same(opt(*args, **kwargs), original(*args, **kwargs))
    changed = {k: t * 0.75 if t.is_floating_point() else t for k, t in original.state_dict().items()}
    original.load_state_dict(changed)
    opt.model.load_state_dict(changed)
    refused_by_the_native_kernel.clear()  # the oracle's calls, in float64, are not for it
    assert_same(run(opt, case.fresh(3)), run(original, case.fresh(3)))
    float64 = any(t.dtype == torch.float64 for t in original.parameters())
    assert float64 or not refused_by_the_native_kernel


@of(n for n, c in CASES.items() if c.expect == "rewritten" and hidden_states(c))
def test_nan_in_one_token_stays_where_it_was(zoo):
    """Values that the original keeps finite stay so, and stay right, when the first token is not a number."""
    case, opt, original = zoo.case, zoo.opt, zoo.case.build()
    opt.model.load_state_dict(zoo.before)
    args, kwargs = copy.deepcopy(case.fresh(3))
    args[0].view(-1, args[0].shape[-1])[0] = float("nan")
    try:
        want = run(original, (args, kwargs))
    except RuntimeError as err:
        pytest.skip(f"the original itself refuses a NaN: {err}")
    for a, b in zip(tensors(run(opt, (args, kwargs))), tensors(want), strict=True):
        finite = b.isfinite()
        assert_same(a[finite], b[finite])
