"""`moeopt schema`: what the schemas say is what is written, all of it, and the published files are those schemas."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import msgspec
import pytest
import torch

import moeopt
from moeopt.cli import main
from moeopt.cli.schema_command import KINDS, json_schema
from moeopt.verification.certificate import Certificate
from moeopt.verification.results import BlockCheck, CaseResult
from tests.toy_moe import Block, H

PUBLISHED = Path(__file__).parents[1] / "docs" / "schemas"


class Odd(torch.nn.Module):
    """Experts of which each token's choice is drawn at random: declined."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(H, H) for _ in range(4))

    def forward(self, x):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = y + torch.where(torch.rand(len(x), 1) > e / 4, torch.relu(expert(x)), 0)
        return y


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def written(request, tmp_path_factory):
    """The JSON of each kind, of one run with a rewritten and a declined block."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(Block(), Odd()) if request.param == "torch" else Block()
    x = torch.randn(6, H)
    optimized = moeopt.optimize(model.eval(), x, backend=request.param)
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    if request.param == "torch":
        moeopt.optimize(Block().eval(), x).save(folder)
    else:
        optimized.save(folder)
    return {
        "report": json.loads(optimized.report.to_json()),
        "certificate": json.loads(optimized.certificate.to_json()),
        "manifest": json.loads((folder / "moeopt.json").read_text()),
    }


def closed(schema):
    """The schema, with keys that it does not name forbidden."""
    if isinstance(schema, dict):
        closing = {"additionalProperties": False} if "properties" in schema else {}
        return {k: closed(v) for k, v in schema.items()} | closing
    return [closed(v) for v in schema] if isinstance(schema, list) else schema


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_keeps_to_the_schema(written, kind):
    schema = json_schema(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(written[kind], schema, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("kind", ["report", "certificate"])
def test_no_key_is_written_that_the_schema_does_not_name(written, kind):
    jsonschema.validate(written[kind], closed(json_schema(kind)), cls=jsonschema.Draft202012Validator)


def test_a_report_with_a_declined_block_and_a_number_that_is_not_finite():
    from moeopt.obstacles import Obstacle
    from moeopt.report import BlockReport, Report

    block = BlockReport("m", "moe", "declined", "no reason", error=float("nan"), obstacles=(Obstacle("why", "a.py:1"),))
    jsonschema.validate(json.loads(Report((block,)).to_json()), closed(json_schema("report")))
    case = CaseResult("one token", "failed", distance_rewritten=float("inf"))
    jsonschema.validate(
        json.loads(Certificate([BlockCheck("m", False, [case])]).to_json()), closed(json_schema("certificate"))
    )


@pytest.mark.parametrize(("kind", "damage"), [
    ("report", {"schema": 2}),
    ("report", {"blocks": [{"name": "m", "kind": "moe", "status": "maybe"}]}),
    ("certificate", {"passed": "yes"}),
    ("manifest", {"format": "zip"}),
    ("manifest", {"files": {"a": {"sha256": "0", "bytes": 1}}}),
])  # fmt: skip
def test_a_schema_refuses(written, kind, damage):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**written[kind], **damage}, json_schema(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_file_is_the_schema(kind, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["schema", kind])
    assert not stop.value.code
    said = f"docs/schemas/{kind}.schema.json is old: python -m moeopt schema {kind} > docs/schemas/{kind}.schema.json"
    assert (PUBLISHED / f"{kind}.schema.json").read_text() == capsys.readouterr().out, said


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_schema_does_not_depend_on_how_msgspec_spells_it(kind, empty, monkeypatch):
    """Defaults of lists and dicts are written for all fields or for none; null comes first or last."""
    real, expected = msgspec.json.schema_components, json_schema(kind)

    def respelled(field):
        field = {k: v for k, v in field.items() if k != "default" or v not in ([], {})}
        if field.get("anyOf", [{}])[-1] == {"type": "null"}:
            field["anyOf"] = [field["anyOf"][-1], *field["anyOf"][:-1]]
        default = {"array": [], "object": {}}.get(field.get("type")) if empty else None
        return field if default is None else {**field, "default": default}

    def components(*types, **kwargs):
        tops, parts = real(*types, **kwargs)
        for part in parts.values():
            if "properties" in part:
                part["properties"] = {name: respelled(field) for name, field in part["properties"].items()}
        return tops, parts

    monkeypatch.setattr(msgspec.json, "schema_components", components)
    got = json_schema(kind)
    assert json.dumps(got) == json.dumps(expected)


def test_another_kind_is_told():
    done = subprocess.run([sys.executable, "-m", "moeopt", "schema", "repot"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "moeopt: there is no schema of 'repot': it is one of report, certificate, manifest\n"
