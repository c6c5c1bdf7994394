"""What comes from elsewhere: files that are opened with care, JSON that is checked by a schema, words that are shown.

``msgspec`` reads the JSON: it refuses NaN, numbers beyond 64 bits in a typed place, text that is not UTF-8 and data
nested deeper than Python's stack, and its ``Struct`` classes are the schemas.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import TypeVar

import msgspec

from moeopt.errors import BundleError
from moeopt.value_types import JsonValue, PyObject

MAX_JSON = 1 << 30
"""Bytes of JSON that are read into memory: a 1000-layer graph is a few hundred MiB."""
MAX_DEPTH = 100
"""Levels of JSON: moeopt writes trees of at most 64, and a few around them."""

_CONTROLS = re.compile(
    r"(\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # a control sequence
    r"|(\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(\x07|\x1b\\|\x9c)?"  # a title, a link, a picture
    r"|\x1b.?|[\x00-\x08\x0b-\x1f\x7f-\x9f]",
    re.S,
)
_INVISIBLE = re.compile("[\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
T = TypeVar("T")


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, which no symlink led to and no reader waits for; ``BundleError`` otherwise."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as err:
        if path.is_symlink():
            what = "a symlink"
        else:
            what = "missing" if isinstance(err, FileNotFoundError) else f"not to be read ({err.strerror})"
        raise BundleError(f"{path}: the file is {what}: copy the bundle again") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{path}: it is no regular file: copy the bundle again")
    return descriptor


def read_bytes(path: Path, max_size: int = MAX_JSON) -> bytes:
    """The content of a regular file of at most ``max_size`` bytes; ``BundleError`` otherwise."""
    with open(open_regular(path), "rb") as file:
        large = os.fstat(file.fileno()).st_size > max_size  # told without reading a gigabyte of it
        blob = b"" if large else file.read(max_size + 1)
    if large or len(blob) > max_size:
        raise BundleError(f"{path}: it has more than {max_size} bytes, more than any bundle's")
    return blob


def read_json(path: Path) -> JsonValue:
    """The JSON in a regular file, not deeper than ``MAX_DEPTH``; ``BundleError`` otherwise."""
    return parse_json(read_bytes(path), str(path))


def parse_json(text: str | bytes, where: str) -> JsonValue:
    """JSON from text, not deeper than ``MAX_DEPTH``; ``BundleError`` names ``where`` it came from."""
    try:
        data = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeError, ValueError) as err:
        raise BundleError(
            f"{where}: it is not JSON ({str(err)[:80]}): it was damaged or cut off, so copy it again"
        ) from None
    if not _shallow(data):
        raise BundleError(f"{where}: it is nested deeper than {MAX_DEPTH} levels, and moeopt writes no such JSON")
    return data


def checked(data: JsonValue, schema: type[T], where: str) -> T:
    """``data`` read by a schema; ``BundleError`` says what is of the wrong type, and where."""
    try:
        return msgspec.convert(data, schema, strict=True)
    except (msgspec.ValidationError, RecursionError) as err:
        raise BundleError(
            f"{where}: it lacks or mistypes a part ({shown(err, 200)}): it was damaged or edited"
        ) from None


def shown(value: JsonValue, max_size: int | None = None) -> str:
    """``value`` as text for a terminal: one that comes from a bundle can neither move the cursor nor set a title.

    Escape sequences, control characters but tab and newline, and characters that turn or hide text are taken out.
    """
    text = _INVISIBLE.sub("", _CONTROLS.sub("", str(value)))
    return text if max_size is None or len(text) <= max_size else text[:max_size] + "..."


def shown_line(value: JsonValue) -> str:
    """``value`` as one line of text for a terminal."""
    return " ".join(shown(value).split())


def cleaned(data: JsonValue) -> PyObject:
    """JSON with every word in it as :func:`shown` would show it."""
    if isinstance(data, str):
        return shown(data)
    if isinstance(data, list):
        return [cleaned(value) for value in data]
    if isinstance(data, dict):
        return {shown(key): cleaned(value) for key, value in data.items()}
    return data


def _shallow(data: JsonValue) -> bool:
    """Whether lists and objects are at most ``MAX_DEPTH`` deep; level by level, without recursion."""
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for node in level
            if isinstance(node, (list, dict))
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (list, dict))
        ]
        if not level:
            return True
    return False
