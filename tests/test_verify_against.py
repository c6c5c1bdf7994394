"""``moeopt verify DIR --against FILE``: exit codes, differences in words and in JSON."""

import json

import pytest

from moeopt.cli import main


@pytest.fixture
def stored(toy_bundle, tmp_path):
    """The bundle's own certificate, with one block more than there is now."""
    file = tmp_path / "stored.json"
    body = json.loads((toy_bundle / "certificate.json").read_text())
    body["blocks"].append({**body["blocks"][0], "name": "layers.7"})
    file.write_text(json.dumps(body))
    return file


def run(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(["verify", *map(str, argv)])
    out = capsys.readouterr()
    return stop.value.code or 0, out.out, out.err


def test_nothing_is_worse(capsys, toy_bundle):
    code, out, _ = run(capsys, toy_bundle, "--against", toy_bundle / "certificate.json")
    assert code == 0 and out.endswith("nothing is worse\n") and "moeopt certificate: PASSED" in out


def test_a_regression_is_exit_code_1(capsys, toy_bundle, stored):
    code, out, err = run(capsys, toy_bundle, "--against", stored, "--quiet")
    assert code == 1 and err == f"moeopt: not equivalent, or worse than {stored}\n"
    assert out.endswith(
        "1 figure worse\n  layers.7: the block: was rewritten and verified, is not in the certificate\n"
    )


def test_json(capsys, toy_bundle, stored):
    code, out, _ = run(capsys, toy_bundle, "--against", stored, "--json")
    body = json.loads(out)
    assert code == 1 and body["certificate"]["passed"] is True and body["against"] == str(stored)
    assert [r["where"] for r in body["regressions"]] == ["layers.7"]
    stored.write_text(out)  # what it printed is a stored certificate too
    assert run(capsys, toy_bundle, "--against", stored, "--json")[0] == 0


def test_wrong_use(capsys, toy_bundle, stored):
    code, _, err = run(capsys, toy_bundle, "--against", stored, "--original", "x.py:f")
    assert code == 2 and "--against compares a bundle with its past, --original with a model" in err
    code, _, err = run(capsys, toy_bundle, "--against", stored.parent / "none.json", "--quiet")
    assert code == 2 and "there is no such certificate" in err
