"""Files are opened with care, JSON is checked by a schema, and words of a bundle cannot write to the terminal."""

import json
import os

import pytest
from msgspec import Struct

from moeopt.errors import BundleError
from moeopt.untrusted import MAX_DEPTH, MAX_JSON, checked, cleaned, parse_json, read_bytes, read_json, shown, shown_line


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07name", "name"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("a\x9b2Jb", "ab"),
        ("a\u202eb\u200b", "ab"),
        ("over\rwrite\x08", "overwrite"),
        ("\x1b", ""),
        ("tab\tand\nline", "tab\tand\nline"),
        ("Größe 專家", "Größe 專家"),
    ],
)
def test_what_is_shown(text, want):
    assert shown(text) == want
    assert cleaned({"k\x1b[0m": [text, 3]}) == {"k": [want, 3]}


def test_a_line_is_one_line():
    assert shown_line("block: rewritten\nblock: declined") == "block: rewritten block: declined"
    assert shown("abcdef", 3) == "abc..."


def test_a_file_is_a_regular_file(tmp_path):
    (tmp_path / "good").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "good")
    os.mkfifo(tmp_path / "pipe")
    assert read_json(tmp_path / "good") == {}
    for name, text in (
        ("link", "is a symlink"),
        ("pipe", "no regular file"),
        ("gone", "is missing"),
        ("", "no regular file"),
    ):
        with pytest.raises(BundleError, match=text):
            read_bytes(tmp_path / name)
    with pytest.raises(BundleError, match="it has more than 1 bytes"):
        read_bytes(tmp_path / "good", max_size=1)
    with open(tmp_path / "holes", "wb") as file:
        file.truncate(1 << 40)  # read, it would be more than this process may have
    with pytest.raises(BundleError, match=f"it has more than {MAX_JSON} bytes, more than any bundle's"):
        read_bytes(tmp_path / "holes")


@pytest.mark.parametrize("text", ["NaN", "[1", "1e999", b"\xff", "[" * 100_000, '"\\ud800"'])
def test_what_is_no_json(text):
    with pytest.raises(BundleError, match="place: it is not JSON"):
        parse_json(text, "place")


def test_depth():
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "place")
    with pytest.raises(BundleError, match="place: it is nested deeper than 100 levels"):
        parse_json("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "place")


class Point(Struct):
    x: int
    y: list[float] = []


@pytest.mark.parametrize("data", [{}, {"x": True}, {"x": "1"}, {"x": 1, "y": [None]}, [], None, {"x": 1.5}])
def test_a_schema_refuses_other_types(data):
    with pytest.raises(BundleError, match="place: it lacks or mistypes a part"):
        checked(json.loads(json.dumps(data)), Point, "place")
    assert checked({"x": 1, "more": 2}, Point, "place") == Point(1)
