"""The certificate's verdict, its JSON and its 80 columns."""

import json
import math

import pytest
import torch

from moeopt.errors import BundleError
from moeopt.verification.block import verify_block
from moeopt.verification.certificate import Certificate
from moeopt.verification.model import EndToEnd
from moeopt.verification.results import BlockCheck, Case, CaseResult
from tests.verification.tiny import TinyMoE, Twin, seeded


def block(passed=True, name="model.layers.0.mlp", **kwargs):
    return BlockCheck(name, passed, [CaseResult("one token", tokens=1, distance_exact=1e-16)], **kwargs)


@pytest.mark.parametrize(
    ("certificate", "passed", "verdict"),
    [
        (Certificate([block()], EndToEnd(True)), True, "PASSED"),
        (Certificate([block(), block(False)], EndToEnd(True)), False, "FAILED"),
        (Certificate([block()], EndToEnd(False)), False, "FAILED"),
        (Certificate([block(None)]), None, "NOT VERIFIED: something was left out"),
        (Certificate([], level="off"), None, "NOT VERIFIED: verify='off'"),
        (Certificate([]), True, "PASSED: nothing was rewritten, nothing to verify"),
    ],
)
def test_verdict(certificate, passed, verdict):
    assert certificate.passed is passed
    assert str(certificate).startswith(f"moeopt certificate: {verdict}\n")
    assert json.loads(certificate.to_json())["passed"] is passed


def real():
    moe = TinyMoE()
    checks = [
        verify_block(name, moe, Twin(moe, damage), [Case("a", (seeded(1, 5, 16),)), Case("refused", (seeded(2, 3),))])
        for name, damage in [("model.decoder.layers.17.block_sparse_moe", ""), ("layers.1", "swap gate and up")]
    ]
    end = EndToEnd(True, tokens=9, language={"KL divergence, max": 1e-9}, notes=["a note " * 30])
    return Certificate(checks, end, executed=False, dtype="float32", notes=["the engine was replayed " * 10])


def test_json_round_trip():
    certificate = real()
    certificate.blocks[1].cases[0].required = math.inf
    again = Certificate.from_json(certificate.to_json())
    assert again == certificate and str(again) == str(certificate)
    assert again.versions["torch"] == torch.__version__


def test_prints_within_80_columns():
    text = str(real())
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "engine: not executed",
        "model.decoder.layers.17.block_sparse_moe",
        "FAILED",
        "layers.1: case 'a': the output of token",
        "case refused skipped: the original raises",
        "(2 blocks)",
        "end to end: passed; 9 tokens",
        "KL divergence, max: 1e-09",
        "note: the engine was replayed",
    ):
        assert words in text, text


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda t: t[:-5], "cannot be read"),
        (lambda t: t.replace('"schema": 1', '"schema": 9'), "another schema version"),
        (
            lambda t: t.replace('"passed": false', '"passed": true', 1),
            "says passed=True, and its parts say passed=False",
        ),
        (lambda t: t.replace('"executed"', '"exec"'), "cannot be read"),
        (lambda t: "[]", "cannot be read"),
    ],
)
def test_a_damaged_certificate_is_refused(damage, reason):
    with pytest.raises(BundleError, match=reason):
        Certificate.from_json(damage(real().to_json()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["blocks"][0]["cases"][0].update(required="much"), "lacks or mistypes a part"),
        (lambda d: d["blocks"][0].update(passed=[]), "lacks or mistypes a part"),
        (lambda d: d.update(end_to_end=[]), "lacks or mistypes a part"),
        (lambda d: d["end_to_end"].update(extra=1), "a EndToEnd has no field 'extra'"),
        (lambda d: d["end_to_end"].update(passed=True, budget="inf"), "with a budget of inf, which allows anything"),
        (lambda d: d["end_to_end"].update(passed=True, budget="nan"), "with a budget of nan, which allows anything"),
        (lambda d: d["end_to_end"].update(passed=True, distance=0.5, budget=0.1), "less than was seen: it was edited"),
        (lambda d: d.pop("passed"), "says nothing of passed"),
    ],
)
def test_an_edited_certificate_is_refused(change, reason):
    data = json.loads(real().to_json())
    change(data)
    with pytest.raises(BundleError, match=reason):
        Certificate.from_json(json.dumps(data))


def test_a_certificate_writes_nothing_to_the_terminal():
    data = json.loads(real().to_json())
    data["notes"] = ["\x1b]0;owned\x07a note\x1b[2J"]
    assert "a note" in str(Certificate.from_json(json.dumps(data)))
    assert "\x1b" not in str(Certificate.from_json(json.dumps(data)))


def lossy(**loss):
    body = {"kl_mean": 0.02, "top1": 0.9, "tokens": 9, "data": "the example inputs", "limit": {}, "missed": [], **loss}
    return Certificate([block()], EndToEnd(True), quantized={"model.layers.0.mlp": "int4"}, loss=body)


def test_a_loss_is_no_equivalence():
    certificate = lossy()
    assert certificate.passed is True and certificate.equivalent is False
    assert certificate.verdict == "PASSED as the quantised model, not equivalent"
    assert json.loads(certificate.to_json())["equivalent"] is False
    assert Certificate([block()], EndToEnd(True)).equivalent is True
    assert Certificate([block(False)]).equivalent is False and Certificate([], level="off").equivalent is None


def test_a_limit_is_a_gate():
    assert lossy(limit={"kl_mean": 0.02}).verdict == "PASSED as the quantised model, not equivalent, within its limits"
    certificate = lossy(limit={"kl_mean": 0.01}, missed=["kl_mean is 0.02"])
    assert certificate.passed is False and certificate.verdict.startswith("LIMIT MISSED: what quantising lost")
    assert "  LIMIT MISSED: kl_mean is 0.02" in str(certificate)


def test_a_loss_goes_through_json():
    certificate = lossy(kl_max=math.inf, reference={"kl_mean": 1e-4}, standard_errors={"kl_mean": 1e-3})
    again = Certificate.from_json(certificate.to_json())
    assert again == certificate and str(again) == str(certificate)
    assert "kl_mean: 0.02 +- 0.001; int8 per channel 0.0001" in str(again)
    assert max(map(len, str(again).splitlines())) <= 80


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["loss"].update(kl_mean=0.5), "says passed=True, and its parts say passed=False"),
        (lambda d: d["loss"].update(limit={"kl_mean": 0.001}), "says passed=True, and its parts say passed=False"),
        (lambda d: d.update(equivalent=True), "says equivalent=True, and its parts say False"),
        (lambda d: d["loss"].update(good=True), "a loss has no 'good'"),
        (lambda d: d["loss"].update(top1="much"), "lacks or mistypes a part"),
    ],
)
def test_an_edited_loss_is_refused(change, reason):
    data = json.loads(lossy(limit={"kl_mean": 0.02}).to_json())
    change(data)
    with pytest.raises(BundleError, match=reason):
        Certificate.from_json(json.dumps(data))
