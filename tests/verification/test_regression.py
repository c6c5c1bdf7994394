"""What counts as worse, what is rounding, and what a difference says."""

import copy
import dataclasses
import json
import math

import pytest
import torch

from moeopt.errors import BundleError, UsageError
from moeopt.verification.certificate import Certificate
from moeopt.verification.model import EndToEnd
from moeopt.verification.regression import current, read_certificate, regressions
from moeopt.verification.results import BlockCheck, CaseResult

EPS = torch.finfo(torch.float32).eps


def block(name="layers.0", far=4e-7, exact=1e-16, dtype="float32"):
    cases = [
        CaseResult("one token", tokens=1, distance_rewritten=far, distance_exact=exact),
        CaseResult("exact ties", tokens=6),
    ]
    return BlockCheck(name, True, cases, dtype=dtype)


def certificate(**fields):
    end = EndToEnd(True, tokens=32, distance=2e-7, budget=2e-6, distance_rms=1e-7, budget_rms=1e-6)
    return Certificate(**{"blocks": [block(), block("layers.1")], "end_to_end": end, "dtype": "float32"} | fields)


def changed(change):
    after = copy.deepcopy(certificate())
    change(after)
    return regressions(certificate(), after)


def test_a_certificate_is_not_worse_than_itself_or_than_worse_ones():
    assert regressions(certificate(), certificate()) == []
    better = certificate(blocks=[block(far=0.0), block("layers.1"), block("layers.2", far=1.0)])
    assert regressions(certificate(), better) == []


@pytest.mark.parametrize(("far", "worse"), [(4 * 4e-7 + 7.9 * EPS, False), (4 * 4e-7 + 8.1 * EPS, True)])
def test_rounding_is_no_regression_and_more_is(far, worse):
    found = regressions(certificate(), certificate(blocks=[block(far=far), block("layers.1")]))
    assert len(found) == worse
    if worse:
        (one,) = found
        assert (one.where, one.before, one.after) == ("layers.0", 4e-7, far)
        assert one.factor == far / 4e-7 and one.limit == 4 * 4e-7 + 8 * EPS
        assert str(one) == (
            "layers.0: from the float64 oracle: 4.00e-07 -> 2.57e-06, 6.41 times as far; rounding explains 2.55e-06"
        )


def test_rounding_of_the_stored_dtype_counts():
    """float32 stored, bfloat16 now: its rounding is a hundred times what float32 explains."""
    after = certificate(blocks=[block(far=3e-3, dtype="bfloat16"), block("layers.1")], dtype="bfloat16")
    (one,) = regressions(certificate(), after)
    assert one.where == "layers.0" and one.factor > 1000


def test_what_sixteen_bits_hide_is_seen_in_float64():
    before = certificate(blocks=[block(far=2e-3, dtype="bfloat16")], dtype="bfloat16")
    after = certificate(blocks=[block(far=2e-3, exact=1e-6, dtype="bfloat16")], dtype="bfloat16")
    (one,) = regressions(before, after)
    assert one.what == "run in float64, from the oracle" and one.limit < 1.1e-10


def verdict(c):
    c.blocks[1].passed, c.blocks[1].reason = False, "case 'one token': too far"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (verdict, "layers.1: the verdict: was passed, is failed: case 'one token': too far"),
        (lambda c: setattr(c.blocks[1], "passed", None), "layers.1: the verdict: was passed, is not verified"),
        (lambda c: c.blocks.pop(), "layers.1: the block: was rewritten and verified, is not in the certificate"),
        (lambda c: c.blocks[0].cases.pop(), "layers.0: case 'exact ties': was passed, is not run"),
        (
            lambda c: c.blocks[0].cases.__setitem__(1, CaseResult("exact ties", "skipped", "it raises")),
            "layers.0: case 'exact ties': was passed, is skipped: it raises",
        ),
        (
            lambda c: setattr(c.blocks[0].cases[0], "distance_exact", None),
            "layers.0: the rewritten code in float64: was run, is not run",
        ),
        (lambda c: setattr(c, "executed", False), "certificate: the engine: was executed, is replayed"),
        (lambda c: setattr(c, "end_to_end", None), "end to end: the comparison: was passed, is not made"),
        (
            lambda c: setattr(c, "end_to_end", EndToEnd(False, "it moves", tokens=32)),
            "end to end: the verdict: was passed, is failed: it moves",
        ),
        (lambda c: setattr(c.end_to_end, "passed", None), "end to end: the verdict: was passed, is not verified"),
        (
            lambda c: setattr(c.end_to_end, "distance_rms", 1e-3),
            "end to end: rms over tokens: 1.00e-07 -> 1.00e-03, 1e+04 times as far; rounding explains 1.35e-06",
        ),
        (
            lambda c: setattr(c.end_to_end, "distance", math.inf),
            "end to end: worst token: 2.00e-07 -> inf, inf times as far; rounding explains 1.75e-06",
        ),
    ],
)
def test_each_way_to_become_worse(change, text):
    (one,) = changed(change)
    assert str(one) == text
    json.dumps(one.to_dict(), allow_nan=False)


def test_fewer_cases_of_a_lower_level_are_one_entry():
    def change(c):
        c.level = "fast"
        for b in c.blocks:
            b.cases.pop()

    (one,) = changed(change)
    assert str(one) == "certificate: verified: was strict, is fast"


def test_from_zero_there_is_no_factor():
    before = certificate(blocks=[block(far=0.0)])
    (one,) = regressions(before, certificate(blocks=[block(far=1e-3)]))
    assert one.factor is None and "times" not in str(one) and one.to_dict()["factor"] is None


def test_golden_runs_are_compared_with_golden_runs():
    """A distance from the bundle's own results and one from the original are two different things."""
    golden = EndToEnd(True, outputs=2, distance=1e-8, budget=1e-6)
    saved, checked = certificate(), certificate(blocks=[], end_to_end=golden, executed=False, device="gpu")
    now = current(saved, checked, certificate())
    assert now.end_to_end is saved.end_to_end and now.blocks == saved.blocks
    assert (now.executed, now.device) == (False, "gpu")
    assert current(saved, checked, checked).end_to_end is golden
    far = dataclasses.replace(golden, distance=1e-3)
    assert [r.what for r in regressions(checked, dataclasses.replace(checked, end_to_end=far))] == ["worst token"]
    assert regressions(certificate(), dataclasses.replace(certificate(), end_to_end=far)) == []


def test_a_certificate_is_read_from_a_bundle_or_from_what_the_command_printed(tmp_path):
    bare, wrapped = tmp_path / "certificate.json", tmp_path / "printed.json"
    text = certificate().to_json()
    bare.write_text(text)
    wrapped.write_text(json.dumps({"report": {}, "certificate": json.loads(text)}))
    assert read_certificate(bare) == read_certificate(wrapped) == certificate()
    with pytest.raises(UsageError, match="no such certificate: copy a bundle's certificate.json there"):
        read_certificate(tmp_path / "missing.json")
    for damage in (text[:-9], "[]", '{"certificate": 3}'):
        bare.write_text(damage)
        with pytest.raises(BundleError, match="certificate.json: "):
            read_certificate(bare)
