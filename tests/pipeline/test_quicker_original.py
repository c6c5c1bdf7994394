"""Calls that are left to a block's own code where it is the quicker: which, what they compute, and when none is."""

import copy
import pickle
import types
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moeopt
from moeopt.errors import StaleModelWarning
from moeopt.ops.override import default_impl
from moeopt.pipeline import quicker_original
from moeopt.rewrite.install import rewritten_forward
from moeopt.rewrite.original_calls import LOOK, OriginalCalls
from moeopt.rewrite.whole_model import without_original_calls
from tests.zoo.dense_forms import EinsumAll

D = 20


def model():
    torch.manual_seed(0)
    return EinsumAll(d=D).eval()


def x(tokens, seed=3):
    return torch.randn(1, tokens, D, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def slower_at(monkeypatch):
    """Makes a machine on which the rewritten code is slower at these numbers of tokens, and ties or wins elsewhere."""

    def machine(*counts, asked=None, recorded=None, trained=None):
        def fastest(question, ways, default, advantage, device):
            tokens, records, trains = int(question.split()[-2]), "recorded, on" in question, "trained, on" in question
            if asked is not None and not records and not trains:
                asked.append(tokens)
            answer = recorded if records else trained if trains else None
            return "own" if tokens in (counts if answer is None else answer) else default

        monkeypatch.setattr(quicker_original, "measuring", lambda: True)
        monkeypatch.setattr(quicker_original, "fastest", fastest)

    return machine


def optimized(source=None, **options):
    return moeopt.optimize(model() if source is None else source, x(24), **{"verify": "off", **options})


def ran(opt, call):
    """What ``opt`` gives, and how many calls ran the rewritten code."""
    forward = rewritten_forward(opt.model)
    before = forward.calls, forward.fallbacks
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        y = opt.model(call)
    assert forward.fallbacks == before[1], "a call that is left to the own code was not refused"
    return y, forward.calls - before[0]


def test_calls_of_so_many_tokens_run_the_own_code_and_the_others_the_rewritten(slower_at):
    slower_at(8)
    opt, original = optimized(), model()
    for tokens, rewritten in ((1, 1), (2, 0), (8, 0), (16, 0), (17, 1), (600, 1)):
        y, calls = ran(opt, x(tokens))
        assert calls == rewritten, tokens
        want = original(x(tokens))
        assert torch.equal(y, want) if not rewritten else torch.allclose(y, want, rtol=1e-4, atol=1e-5)
    assert opt.report.blocks[0].status == "rewritten"
    (note,) = [n for n in opt.report.notes if "own code" in n]
    assert "ranks that it is divided over run the rewritten code at any size" in note
    assert note.startswith("calls of 2 to 16 tokens are left to the own code of EinsumAll: timed on this machine")
    assert "MOEOPT_MEASURE=off" in note and "a bundle saved of this model" in note


def test_calls_whose_gradients_are_recorded_are_asked_by_themselves(slower_at):
    slower_at(8, recorded=(64,), trained=(512,))
    opt = optimized()
    forward = rewritten_forward(opt.model)
    left = {("eval", False): 8, ("eval", True): 64, ("train", False): 8, ("train", True): 512}
    for (mode, recorded), own in left.items():
        getattr(opt.model, mode)()
        for tokens in (8, 64, 512):
            before = forward.calls
            with torch.set_grad_enabled(recorded):
                assert opt.model(x(tokens)).requires_grad == recorded
            assert forward.calls - before == (tokens != own), (tokens, mode, recorded)
    notes = [n.split(" are left")[0] for n in opt.report.notes if "own code" in n]
    assert notes == [
        "calls of 2 to 16 tokens under torch.no_grad()", "calls of 17 to 128 tokens outside of torch.no_grad()",
        "calls of 321 to 512 tokens in training",
    ]  # fmt: skip


def test_without_a_parameter_that_wants_a_gradient_nothing_is_recorded(slower_at):
    slower_at(8, recorded=(64,))
    opt = optimized(model().requires_grad_(False))
    own = rewritten_forward(opt.model).original_calls
    assert own.recorded == own.sizes == own.trained == {D * tokens for tokens in range(2, 17)}
    assert [n.split(" are left")[0] for n in opt.report.notes] == ["calls of 2 to 16 tokens"]


class Steadied(EinsumAll):
    """Computes something else in training mode."""

    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


def test_what_was_verified_in_evaluation_mode_alone_is_asked_about_no_training(slower_at):
    slower_at(8)
    torch.manual_seed(0)
    own = rewritten_forward(optimized(Steadied(d=D).eval()).model).original_calls
    assert own.sizes == own.recorded and own.sizes and not own.trained


@pytest.mark.parametrize(
    "hook",
    (
        lambda m: next(m.parameters()).register_hook(lambda grad: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    ),
    ids=("a Parameter", "the block"),
)
def test_hooks_on_gradients_are_run_by_no_timing(slower_at, hook):
    slower_at(8)
    source = model()
    plain = rewritten_forward(optimized(source).model).original_calls
    hook(source)
    hooked = rewritten_forward(optimized(source).model).original_calls
    assert plain.trained and not hooked.trained and hooked.recorded == plain.recorded


def test_the_note_names_every_range(slower_at):
    slower_at(1, 8, 512)
    assert any(n.startswith("calls of 1 to 16 and 321 to 512 tokens are") for n in optimized().report.notes)
    slower_at(1, 64, 256)
    assert any(n.startswith("calls of 1 and 17 to 320 tokens are") for n in optimized().report.notes)
    slower_at(1)
    assert any(n.startswith("calls of 1 token are") for n in optimized().report.notes)


def test_a_keyword_and_a_batch_count_as_their_tokens(slower_at):
    slower_at(8)
    opt, call = optimized(), x(8).reshape(4, 2, D)
    forward = rewritten_forward(opt.model)
    assert torch.equal(opt.model(x=call), model()(call)) and forward.calls == 0


def test_nothing_is_left_where_nothing_may_be_measured_and_ties_are_rewritten(slower_at):
    assert rewritten_forward(optimized().model).original_calls is None  # MOEOPT_MEASURE is off in tests
    asked = []
    slower_at(asked=asked)
    opt = optimized()
    assert asked == [1, 8, 64, 256, 512]
    assert rewritten_forward(opt.model).original_calls is None and not any("own code" in n for n in opt.report.notes)


def test_copies_and_pickles_choose_alike(slower_at):
    slower_at(8)
    opt = optimized()
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert ran(twin, x(8))[1] == 0 and ran(twin, x(1))[1] == 1


def test_verification_and_other_implementations_run_the_rewritten_code(slower_at):
    slower_at(*quicker_original.NEAR)
    opt, source = optimized(), model()
    forward = rewritten_forward(opt.model)
    assert moeopt.verify(opt, original=source, inputs=x(5)).passed and forward.calls > 0
    before = forward.calls
    with default_impl():  # as a profile and the example of a saved bundle have it
        opt.model(x(5))
    with torch.device("cpu"):
        opt.model(x(5))
    assert forward.calls == before + 2
    program = torch.export.export(opt.model, (x(5),))
    assert any("moeopt" in str(node.target) for node in program.graph.nodes)


def test_a_model_that_is_divided_over_ranks_runs_the_rewritten_code(slower_at):
    slower_at(*quicker_original.NEAR)
    opt = optimized()
    without_original_calls(opt.model)
    assert ran(opt, x(5))[1] == 1


def test_a_strict_optimize_verifies_the_rewritten_code_first(slower_at):
    slower_at(*quicker_original.NEAR)
    opt = optimized(verify="strict")
    assert opt.certificate.passed and opt.certificate.blocks[0].cases
    assert ran(opt, x(24))[1] == 0


def test_a_changed_source_is_told_by_calls_of_the_own_code_too(slower_at):
    slower_at(*quicker_original.NEAR)
    source = model()
    opt = optimized(source)
    source.wi = torch.nn.Parameter(torch.zeros_like(source.wi))
    with pytest.warns(StaleModelWarning, match="wi"):
        for _ in range(20):
            opt.model(x(2))


def test_calls_of_the_own_code_are_looked_at_once_in_a_while(slower_at, monkeypatch):
    slower_at(*quicker_original.NEAR)
    source = model()
    opt = optimized(source)
    forward, looks, guarded = rewritten_forward(opt.model), [], []
    honest, change = forward.source.look, forward.change
    monkeypatch.setattr(forward.source, "look", lambda: looks.append(1) or honest())
    monkeypatch.setattr(forward, "change", lambda: guarded.append(1) or change())
    for _ in range(3 * LOOK):
        assert ran(opt, x(2))[1] == 0
    assert len(guarded) == 3
    assert 3 * LOOK <= len(looks) <= 3 * LOOK + 3  # a guard looks too


def test_a_call_that_is_not_left_to_the_own_code_is_no_answer(monkeypatch):
    opt = optimized()
    monkeypatch.setattr(quicker_original, "fastest", lambda question, ways, *rest, **more: ways() and "own")
    assert (
        quicker_original._slower(
            rewritten_forward(opt.model), ((x(24),), {}), OriginalCalls("x", D + 1), quicker_original.PLAIN
        )
        == []
    )


def test_of_what_the_rewritten_code_would_refuse_calls_of_the_own_code_tell_too(slower_at):
    slower_at(*quicker_original.NEAR)
    opt, changed = optimized(), model()
    attribute = next(name for name, value in vars(changed).items() if type(value) is int)
    opt.model(x(2))
    setattr(opt.model, attribute, 1)
    setattr(changed, attribute, 1)
    with pytest.warns(StaleModelWarning, match=f"{attribute} of the block is 1 and was"):
        for _ in range(LOOK):
            assert torch.equal(opt.model(x(2)), changed(x(2)))
    with warnings.catch_warnings():  # told once
        warnings.simplefilter("error")
        for _ in range(2 * LOOK):
            assert torch.equal(opt.model(x(2)), changed(x(2)))


def test_under_autocast_calls_of_the_own_code_say_so(slower_at):
    slower_at(*quicker_original.NEAR)
    opt = optimized()
    with pytest.warns(StaleModelWarning, match="autocast is on"), torch.autocast("cpu"):
        want = model()(x(2))
        for _ in range(LOOK):
            assert torch.equal(opt.model(x(2)), want)


def test_two_threads_that_count_at_once_do_not_end_the_telling(slower_at):
    slower_at(*quicker_original.NEAR)
    opt = optimized()
    rewritten_forward(opt.model)._unlooked = -1  # both had taken the last
    with pytest.warns(StaleModelWarning, match="autocast is on"), torch.autocast("cpu"):
        opt.model(x(2))


def test_a_guard_that_was_changed_is_compiled_as_it_is(slower_at):
    opt = optimized()
    forward = rewritten_forward(opt.model)
    forward.program.guard.most = 100
    with torch.no_grad():
        got = torch.compile(opt.model, backend="eager", fullgraph=True)(x(5))
    assert torch.allclose(got, model()(x(5)), atol=1e-5) and forward._usual_of != forward.program.guard.changes


def test_a_limit_of_tokens_is_compiled_with_sizes_that_are_free():
    opt = optimized()
    rewritten_forward(opt.model).program.guard.most = 100
    compiled = torch.compile(opt.model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (5, 9):
            assert torch.allclose(compiled(x(tokens)), model()(x(tokens)), atol=1e-5)


@pytest.mark.parametrize("mode", quicker_original.MODES)
def test_both_ways_are_timed_on_the_same_call(monkeypatch, mode):
    took, steps = {}, []
    honest = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **more: steps.append(args) or honest(*args, **more))

    def fastest(question, ways, default, advantage, device):
        forward = question_of[0]
        for name, way in ways().items():
            before, stepped = forward.calls, len(steps)
            way()
            took[question.split()[-2], name] = forward.calls - before
            assert f"own code,{mode} on" in question and forward.module.training == (mode == quicker_original.TRAINED)
            assert (len(steps) > stepped) == (mode == quicker_original.TRAINED)
        assert default == "rewritten" and advantage == quicker_original.GAIN
        return default

    opt = optimized()
    question_of = [rewritten_forward(opt.model)]
    monkeypatch.setattr(quicker_original, "fastest", fastest)
    call = ((x(24),), {})
    assert quicker_original._slower(question_of[0], call, OriginalCalls("x", D), mode) == []
    module = question_of[0].module
    assert not module.training and all(p.grad is None for p in module.parameters())
    for _, wanted, *_ in steps[:1]:
        assert len(wanted) == 1 + len(list(module.parameters()))
    for tokens in map(str, quicker_original.NEAR):
        assert 1 <= took[tokens, "rewritten"] <= quicker_original.CALLS and took[tokens, "own"] == 0
    assert not question_of[0].silent


def test_large_blocks_quantised_ones_and_calls_that_are_refused_are_not_asked_about(slower_at, monkeypatch):
    asked = []
    slower_at(*quicker_original.NEAR, asked=asked)
    assert not rewritten_forward(optimized(quantize="int8").model).original_calls and asked == []
    monkeypatch.setattr(quicker_original, "WORK", 10 * sum(p.numel() for p in model().parameters()))
    optimized()
    assert asked == [1, 8]
    monkeypatch.setattr(quicker_original, "LARGEST", 10)
    optimized()
    assert asked == [1, 8]


def test_a_call_that_the_rewritten_code_refuses_is_no_answer(monkeypatch):
    opt = optimized()
    forward = rewritten_forward(opt.model)
    forward.program.guard.most = 10  # as many tokens as were verified
    asked = []
    monkeypatch.setattr(
        quicker_original, "fastest", lambda question, ways, *rest, **more: asked.append(ways()) or "own"
    )
    assert (
        quicker_original._slower(forward, ((x(24),), {}), OriginalCalls("x", D), quicker_original.PLAIN) == [1, 8]
        and len(asked) == 2
    )


class Either(EinsumAll):
    """Runs one of two implementations, as its configuration says."""

    def __init__(self, way, **sizes):
        super().__init__(**sizes)
        self.config = types.SimpleNamespace(way=way)


def test_what_configurations_decide_is_a_question_of_its_own():
    kinds = set()
    for way in ("eager", "grouped", "grouped"):
        torch.manual_seed(0)
        kinds.add(quicker_original._kind(rewritten_forward(optimized(Either(way, d=D).eval()).model)))
    assert len(kinds) == 2


def test_a_block_on_a_gpu_is_asked_about_on_that_gpu_and_at_its_sizes(monkeypatch):
    opt = optimized()
    forward, asked, gpu = rewritten_forward(opt.model), [], torch.device("cuda", 1)
    numbers = sum(p.numel() for p in forward.module.parameters())

    def fastest(question, ways, default, advantage, device):
        asked.append((int(question.split()[-2]), device))
        return "own"

    monkeypatch.setattr(quicker_original, "fastest", fastest)
    monkeypatch.setattr(quicker_original, "WORK", 10 * numbers)
    monkeypatch.setattr(quicker_original, "LARGEST", numbers - 1)
    question = forward, ((x(24),), {}), OriginalCalls("x", D), quicker_original.PLAIN
    assert quicker_original._slower(*question) == [] and not asked
    monkeypatch.setattr(quicker_original, "_device", lambda held: gpu)
    assert quicker_original._slower(*question) == list(quicker_original.NEAR)
    assert asked == [(n, gpu) for n in quicker_original.NEAR]


def test_each_number_of_tokens_up_to_the_longest_stands_near_one_that_is_timed():
    covered = [count for near in quicker_original.NEAR.values() for count in near]
    assert covered == list(range(1, 513)) and all(n in near for n, near in quicker_original.NEAR.items())


def test_tensors_of_one_cpu_or_gpu_have_a_clock():
    cpu, other = torch.empty(1), torch.empty(1, device="meta")
    with FakeTensorMode():
        first, second = torch.empty(1, device="cuda:0"), torch.empty(1, device="cuda:1")
    assert quicker_original._device([cpu, cpu]) == torch.device("cpu")
    assert quicker_original._device([first, first]) == torch.device("cuda", 0)
    for held in ([first, second], [cpu, first], [other], []):
        assert quicker_original._device(held) is None
