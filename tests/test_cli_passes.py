"""`moeopt passes`: the pipeline in order, a line each."""

import json

import pytest

from moeopt.cli import main
from moeopt.passes import PIPELINE


def run(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert not stop.value.code
    return capsys.readouterr().out


def test_names_levels_and_a_line_each_in_order(capsys):
    lines = [line for line in run(capsys, "passes").splitlines() if not line.startswith(" ")]
    assert [line.split()[:2] for line in lines] == [[p.name, p.level.value] for p in PIPELINE]
    assert "group_experts" in lines[0] and lines[0].endswith("as one grouped-expert op.")


def test_json_says_what_keeps_a_pass_back(capsys):
    rows = {row["name"]: row for row in json.loads(run(capsys, "passes", "--json"))}
    assert list(rows) == [p.name for p in PIPELINE] and all(row["does"].endswith(".") for row in rows.values())
    assert rows["drop_copies"] == {
        "name": "drop_copies", "level": "exact", "engines_only": "", "off": "",
        "does": "Copies and views that change nothing are gone from what stays around the experts.",
    }  # fmt: skip
    assert "addresses" in rows["merge_shared_expert"]["off"] and rows["shrink_router_softmax"]["engines_only"]
