"""Random wide programs: never a wrong number, on any input, on backend torch and in ONNX Runtime engines.

A failure prints its ``Program(...)``; ``check_wide(Program(...), backend)`` runs it again. ``MOEOPT_NIGHTLY=1`` takes
over a thousand programs on torch and 500 engines; ``python -m tests.property.run`` takes any others.
"""

import os

import pytest

from tests.property.check_wide import check_wide
from tests.property.faults import FAULTS
from tests.property.run import SAVED_EACH, drawn_one, outcome
from tests.property.spec import Expert, Program, Router
from tests.property.wide import config_programs, engine_programs, wide_programs

NIGHTLY = os.environ.get("MOEOPT_NIGHTLY") == "1"
TORCH, CONFIGS, ENGINES = (1000, 100, 500) if NIGHTLY else (8, 4, 10)
DRAWS = 300
ON_INPUTS = "slot_where", "slot_loop", "hit_loop", "split"


def obey(p, backend, number):
    word, complaint = outcome(p, backend, saved=number % SAVED_EACH == 0, verify="fast")
    assert not complaint, f"{word}: check_wide({p!r}, {backend!r})\n{complaint}"


@pytest.mark.parametrize("number", range(TORCH))
def test_torch(number):
    obey(drawn_one(wide_programs(), number), "torch", number)


@pytest.mark.parametrize("number", range(CONFIGS))
def test_a_configuration_that_changes(number):
    obey(drawn_one(config_programs(), number), "torch", number)


@pytest.mark.parametrize("number", range(ENGINES))
def test_engine(number):
    pytest.importorskip("onnxruntime")
    obey(drawn_one(engine_programs(), number), "onnxruntime", number)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", FAULTS)
def test_no_fault_of_a_known_kind(name):
    fault = FAULTS[name]
    if fault.backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    obey(fault.program, fault.backend, list(FAULTS).index(name))


@pytest.fixture(scope="module")
def many():
    """Programs of each strategy, as the nightly run draws them."""
    return {
        "onnxruntime": [drawn_one(engine_programs(), n) for n in range(DRAWS)],
        "torch": [drawn_one(wide_programs(), n) for n in range(DRAWS)],
    }


@pytest.mark.skipif(not NIGHTLY, reason="MOEOPT_NIGHTLY=1 runs it: it speaks of the nightly programs")
@pytest.mark.parametrize("name", FAULTS)
def test_each_kind_of_fault_can_be_met(name, many):
    fault = FAULTS[name]
    assert fault.shows(fault.program)
    met = sum(fault.shows(p) for p in many[fault.backend])
    assert met >= 3, f"{met} of {DRAWS} programs could show that {name}"


@pytest.mark.parametrize(
    ("form", "verify"),
    [
        *[(form, "fast" if number % 2 else "strict") for number, form in enumerate(ON_INPUTS)],
        *[
            pytest.param(form, "strict" if number % 2 else "fast", marks=pytest.mark.nightly)
            for number, form in enumerate(ON_INPUTS)
        ],
    ],
)
def test_a_weight_that_is_one_on_every_probe_stays_where_it_multiplies(form, verify):
    """Renormalised over one expert, on the experts' inputs: likely rows do not show what unlikely ones do."""
    router = Router("score_topk", score="sigmoid", renormalize="sum+1e-9")
    p = Program(form=form, router=router, expert=Expert(bias_in=True, bias_out=True), weight_on="input")
    assert check_wide(p, "torch", verify=verify) == "rewritten"
