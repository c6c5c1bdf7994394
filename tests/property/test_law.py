"""The law of wide programs can fail: it catches each kind of fault, and complains of nothing else.

Nothing is compiled here: ``moeopt.optimize`` is replaced by one that hands out a model of the test's own.
"""

import types
from dataclasses import replace

import pytest
import torch

import moeopt
from tests.property.build import build
from tests.property.check_wide import check_wide
from tests.property.configs import KINDS, change, make_config, read
from tests.property.faults import FAULTS, LastOfEqual
from tests.property.law import Reference, moved_ties, ties
from tests.property.run import drawn_one, main, outcome
from tests.property.spec import Around, Program, Router
from tests.property.unlike import MEMORY, calls, example
from tests.property.wide import engine_programs


class HandedOut:
    """Stands for what optimize returns."""

    def __init__(self, model, budget=1e-5, notes=()):
        self.model = model
        block = types.SimpleNamespace(name="Block", kind="moe", status="rewritten", reason="")
        self.report = types.SimpleNamespace(blocks=(block,), notes=notes)
        self.certificate = types.SimpleNamespace(end_to_end=types.SimpleNamespace(budget=budget), notes=[])

    def __call__(self, *args):
        return self.model(*args)


def hand_out(monkeypatch, make, **more):
    monkeypatch.setattr(moeopt, "optimize", lambda model, *args, **kwargs: HandedOut(make(), **more))


@pytest.mark.parametrize("name", FAULTS)
def test_each_kind_of_fault_is_caught(name, monkeypatch):
    fault = FAULTS[name]
    budget = 4.0 if name == "a budget that allows anything" else 1e-5
    hand_out(monkeypatch, lambda: fault.spoiled(fault.program), budget=budget)
    word, complaint = outcome(fault.program, fault.backend, saved=False, verify="fast")
    assert word == ("CRASH" if name == "a strided example crashes" else "WRONG")
    assert fault.complaint in complaint
    assert repr(fault.program) in complaint


@pytest.mark.parametrize("name", FAULTS)
def test_the_model_itself_obeys(name, monkeypatch):
    fault = FAULTS[name]
    hand_out(monkeypatch, lambda: build(fault.program))
    assert check_wide(fault.program, fault.backend) == "rewritten"


def test_a_note_on_ties_is_enough(monkeypatch):
    p = FAULTS["tied rows go elsewhere in silence"].program
    hand_out(monkeypatch, lambda: LastOfEqual(p), notes=("rows with a tie may go to other experts",))
    assert check_wide(p, "onnxruntime") == "rewritten"
    with pytest.raises(AssertionError, match="zero rows: output 0"):  # a twin has no such excuse
        check_wide(p, "torch")


def test_a_refusal_must_say_something(monkeypatch):
    def refuse(text):
        def optimize(*args, **kwargs):
            raise moeopt.errors.NotEquivalentError(text)

        monkeypatch.setattr(moeopt, "optimize", optimize)

    refuse("the engine is 1e-2 away from the model and was not kept")
    assert check_wide(Program(), "onnxruntime").startswith("refused: NotEquivalentError: the engine is 1e-2 away")
    refuse("no")
    with pytest.raises(AssertionError, match="says nothing"):
        check_wide(Program(), "onnxruntime")


class SpreadsNaN(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 0 * x.sum()


class HidesNaN(SpreadsNaN):
    def forward(self, x):
        return self.inner(x).nan_to_num()


@pytest.mark.parametrize(("spoil", "tokens"), [(SpreadsNaN, "13 of 14"), (HidesNaN, "1 of 14")])
def test_a_nan_stays_where_it_is(monkeypatch, spoil, tokens):
    hand_out(monkeypatch, lambda: spoil(build(Program())))
    with pytest.raises(AssertionError, match=f"a NaN row: output 0: {tokens} tokens are wrong"):
        check_wide(Program(), "onnxruntime")


INFINITE_WEIGHTS = Program(
    form="bool_mask", experts=2, top_k=2, router=Router("score_topk", score="expm1"), around=Around(softcap=2.0)
)
"""On large rows a weight is infinite, and the form multiplies it by zero for the other expert."""


def test_zero_times_infinity_need_not_be_kept_and_may_not_come_in(monkeypatch):
    plain = replace(INFINITE_WEIGHTS, form="all_where")
    hand_out(monkeypatch, lambda: build(plain))
    assert check_wide(INFINITE_WEIGHTS, "torch") == "rewritten"
    hand_out(monkeypatch, lambda: build(INFINITE_WEIGHTS))
    with pytest.raises(AssertionError, match=r"rows of 1e4: output 0: \d of 14 tokens are wrong"):
        check_wide(plain, "torch")


def test_a_nan_of_any_other_making_must_be_kept(monkeypatch):
    hand_out(monkeypatch, lambda: HidesNaN(build(INFINITE_WEIGHTS)))
    with pytest.raises(AssertionError, match="a NaN row: output 0: 1 of 14") as wrong:
        check_wide(INFINITE_WEIGHTS, "torch")
    assert "rows of 1e4" not in str(wrong.value)
    plain = replace(INFINITE_WEIGHTS, form="all_where")
    hand_out(monkeypatch, lambda: HidesNaN(build(plain)))
    with pytest.raises(AssertionError, match=r"rows of 1e4: output 0: \d of 14 tokens are wrong"):
        check_wide(plain, "torch")


def test_a_tied_token_that_overflowed_shows_no_choice():
    own = torch.tensor([[torch.inf, 1.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float16)
    got = torch.tensor([[1000.0, 1.0], [1.0, 1.0], [2.0, 1.0]], dtype=torch.float16)
    all_tied, none = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    ref = Reference(own, own.double(), all_tied, none, none, by_zero=False)
    assert moved_ties(got, ref) == 1
    assert moved_ties(torch.full_like(got, torch.inf), ref) == 2


def test_counts_of_tokens_must_be_equal(monkeypatch):
    p = Program(router=Router("given"), around=Around(aux="tuple"))
    hand_out(monkeypatch, lambda: build(p))
    assert check_wide(p, "onnxruntime") == "rewritten"
    hand_out(monkeypatch, lambda: lambda *args: (build(p)(*args)[0], build(p)(*args)[1] + 1))
    with pytest.raises(AssertionError, match="output 1: integers differ in 4 of 4 values"):
        check_wide(p, "onnxruntime")


def test_ties_are_told_from_choices():
    mine = torch.tensor([[3.0, 2.0, 2.0], [3.0, 2.0, 1.0], [3.0, 2.0, 2.0000002], [3.0, 2.0, -torch.inf]]).double()
    tied, near = ties(mine, mine, 2, torch.finfo(torch.float32).eps)
    assert tied.tolist() == [True, False, False, False]
    assert near.tolist() == [True, False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_is_read_and_changed(kind):
    p = Program(top_k=2, config=kind)
    model, (x,) = build(p), example(p)
    assert read(make_config(p), "top_k") == 2
    with torch.no_grad():
        before = model(x)
        change(model, "top_k", 1)
        assert not torch.allclose(model(x), before)
        assert torch.equal(model(x), build(Program(top_k=1))(x))


@pytest.mark.parametrize("kind", MEMORY)
def test_examples_lie_in_memory_as_they_say(kind):
    x = example(Program(around=Around(rank=3), example=kind))[0]
    assert x.shape == (2, 7, 8)
    assert x.is_contiguous() == (kind == "contiguous")


def test_calls_reach_the_logits_they_name():
    p = Program()
    model = build(p)
    for logit in (-45.0, -12.0, 12.0, 45.0):
        x = calls(p, model)[f"logits at {logit:.0f}"][0]
        assert abs(model.router.logits(x).mean().item() - logit) < 1


def test_programs_are_drawn_the_same_each_time():
    assert drawn_one(engine_programs(), 7) == drawn_one(engine_programs(), 7) != drawn_one(engine_programs(), 8)


def test_the_script_writes_what_failed(monkeypatch, tmp_path, capsys):
    hand_out(monkeypatch, lambda: SpreadsNaN(build(Program())))
    assert main(["--count", "2", "--backend", "onnxruntime", "--out", str(tmp_path / "failures")]) == 1
    assert "seed 0, program 1, onnxruntime" in (tmp_path / "failures").read_text()
    assert "Program(" in capsys.readouterr().out
