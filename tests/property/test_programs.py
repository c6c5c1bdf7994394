"""Random MoE programs go through ``moeopt.optimize``: those inside the two ops are rewritten and equal, the others
are left alone with a reason and equal bit for bit. Never wrong in any case.

A failure prints a ``Program(...)``; ``check(Program(...))`` runs it again.
``MOEOPT_NIGHTLY=1`` runs over a thousand programs instead of fifty.
"""

import copy
import os
import types
import warnings
import zlib

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import moeopt
from moeopt.rewrite.reads import observe
from tests.helpers import assert_same, run
from tests.property import experts, outside
from tests.property.build import SHAPES, build, inputs
from tests.property.programs import FORMS, inside_programs, outside_programs
from tests.property.routers import Route
from tests.property.spec import Around, Layout, Program

NIGHTLY = os.environ.get("MOEOPT_NIGHTLY") == "1"
INSIDE_EACH, OUTSIDE_EACH = (45, 12) if NIGHTLY else (1, 2)
UNREACHED = "no probe token reached the expert weights"

# Fixed seeds, so that a run can be repeated; optimising takes as long as it takes; nothing is stored.
# Nightly shrinks what fails, which is slow; otherwise the failing program is printed as it was drawn.
PROFILE = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink] if NIGHTLY else [Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    print_blob=False,
)


def calls(p: Program, original: torch.nn.Module) -> list[tuple]:
    """All calls; that without tokens only where the original takes it."""
    made = [inputs(p, i) for i in range(len(SHAPES))]
    try:
        run(copy.deepcopy(original), (made[-1], {}))
    except (RuntimeError, IndexError, ValueError):
        made.pop()
    return made


def misses_an_expert(p: Program) -> bool:
    """Whether the example that optimize is given leaves some expert of some block without a token."""
    model, chosen = build(p), []
    for module in model.modules():
        if isinstance(module, Route):
            module.register_forward_hook(lambda module, args, out: chosen.append(out[0]))
    run(model, (inputs(p, 0), {}))
    return any(ids is not None and len(ids.unique()) < p.experts for ids in chosen)


def check(p: Program) -> None:
    """The law, on one program."""
    original, model = build(p), build(p)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = moeopt.optimize(model, inputs(p, 0), backend="torch", verify="fast")
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), f"optimize changed {name} of the model it was given"

    blocks = [b for b in opt.report.blocks if b.kind == "moe"]
    told = [(b.name, b.status, b.reason) for b in blocks]
    rewritten = any(b.status == "rewritten" for b in opt.report.blocks)
    for i, call in enumerate(calls(p, original)):
        want, got = run(original, (call, {}), seed=i), run(opt, (call, {}), seed=i)
        assert_same(got, want, exact=not rewritten)
    if p.inside and any(b.reason.startswith(UNREACHED) for b in blocks):  # honest, if the example does not help
        assert misses_an_expert(p), told
    elif p.inside:
        assert len(blocks) == p.around.layers and all(b.status == "rewritten" for b in blocks), told
        assert all(b.experts == p.experts for b in blocks), [b.experts for b in blocks]
    elif p.outside not in outside.OPEN:
        assert all(b.status == "declined" for b in blocks), told
    assert all(b.reason for b in opt.report.blocks if b.status == "declined"), told


def run_all(strategy, at_least: int, name: str) -> int:
    """Checks programs drawn from ``strategy``, seeded by ``name``; returns how many, after asserting their number."""
    seen = []

    @seed(zlib.crc32(name.encode()))
    @settings(PROFILE, max_examples=at_least)
    @given(strategy)
    def each(p: Program) -> None:
        seen.append(p)
        check(p)

    each()
    assert len(seen) >= at_least, f"{len(seen)} programs were drawn, not {at_least}"
    return len(seen)


@pytest.mark.parametrize("form", FORMS)
def test_inside(form, record_property):
    record_property("inside programs", run_all(inside_programs(form), INSIDE_EACH, form))


@pytest.mark.parametrize("kind", outside.KINDS)
def test_outside(kind, record_property):
    record_property("outside programs", run_all(outside_programs(kind), OUTSIDE_EACH, kind))


AMBIGUOUS = [
    (Program(form="slot_where", top_k=2, weight_on="input"), "is not linear in the experts' outputs"),
    (Program(form="slot_where", experts=2, top_k=2, weight_on="input"), "is not linear in the experts' outputs"),
]
"""Left out of ``inside_programs``: one sum per slot."""


@pytest.mark.parametrize(("program", "reason"), AMBIGUOUS, ids=lambda p: repr(p) if isinstance(p, Program) else "")
def test_what_cannot_be_told_is_declined_and_right(program, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = moeopt.optimize(build(program), inputs(program, 0), backend="torch", verify="fast")
    assert [b.status for b in opt.report.blocks if b.kind == "moe"] == ["declined"]
    assert all(reason in b.reason for b in opt.report.blocks if b.kind == "moe")
    original = build(program)
    for i, call in enumerate(calls(program, original)):
        assert_same(run(opt, (call, {}), seed=i), run(original, (call, {}), seed=i), exact=True)


TWIN = Around(shared="twin")
TWINS = [
    Program(form="hit_loop", experts=3, top_k=3, around=TWIN),
    Program(form="dense_loop", experts=5, top_k=4, around=TWIN),
    Program(form="slot_where", experts=3, top_k=3, around=TWIN),
    Program(experts=5, top_k=4, around=TWIN),
]
"""Shared experts of the routed ones' shape that see what some routed expert sees: their weight alone tells them."""


@pytest.mark.parametrize("program", TWINS, ids=repr)
def test_a_shared_expert_that_sees_what_a_routed_one_sees_is_told_by_its_weight(program):
    check(program)


def test_counts(capsys):
    """How many programs the tests above check; each of them asserts its own share."""
    inside_count, outside_count = INSIDE_EACH * len(FORMS), OUTSIDE_EACH * len(outside.KINDS)
    with capsys.disabled():
        print(f"\nrandom programs: {inside_count} inside, {outside_count} outside")
    assert inside_count + outside_count >= (1000 if NIGHTLY else 50)


@pytest.mark.parametrize("kind", experts.KINDS)
def test_no_program_reads_a_number_that_may_count_thousands_of_tokens(kind):
    """Verification would run each program on more tokens than that: its seed was such a number."""
    p = Program(layout=Layout(kind=kind), seed=7919, around=Around(near_one=0.999995), config="namespace")
    model, call = build(p), inputs(p, 0)
    reads = observe(model, (), (), [lambda: model(*call)] * 3)
    assert reads.ran.codes and max(reads.numbers()) < 100


def test_a_program_prints_as_it_is_built():
    p = Program(form="split", top_k=2)
    assert repr(p) == "Program(form='split', top_k=2)"
    assert eval(repr(p), {"Program": Program}) == p


class Claims:
    """Stands for what optimize returns: a model, and a report that says what it is told to."""

    def __init__(self, model, status, reason=""):
        self.model = model
        block = types.SimpleNamespace(name="Block", kind="moe", status=status, reason=reason, experts=4)
        self.report = types.SimpleNamespace(blocks=(block,))

    def __call__(self, *args):
        return self.model(*args)


def off_by_little(p):
    """The program's model, with one expert's weight 1 % larger."""
    model = build(p)
    if not p.outside:
        with torch.no_grad():
            model.experts[3].down.weight *= 1.01
    return model


@pytest.mark.parametrize(
    ("program", "claims", "complaint"),
    [
        (Program(), lambda p: Claims(off_by_little(p), "rewritten"), "apart"),
        (Program(), lambda p: Claims(lambda x: build(p)(x).double(), "rewritten"), "float64"),
        (Program(), lambda p: Claims(build(p), "declined", "not today"), "not today"),
        (Program(top_k=4), lambda p: Claims(build(p), "declined", UNREACHED), UNREACHED),
        (Program(outside="expert choice"), lambda p: Claims(build(p), "rewritten"), "rewritten"),
        (Program(outside="expert choice"), lambda p: Claims(build(p), "declined"), "declined"),
    ],
    ids=["wrong numbers", "other dtype", "declined inside", "reached after all", "rewritten outside", "no reason"],
)
def test_the_check_can_fail(monkeypatch, program, claims, complaint):
    monkeypatch.setattr(moeopt, "optimize", lambda model, *args, **kwargs: claims(program))
    with pytest.raises(AssertionError, match=complaint):
        check(program)
