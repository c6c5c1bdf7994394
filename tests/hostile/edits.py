"""The edits that make a bad bundle of a good one, and make its manifest agree with it again, as an attacker would."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

GOOD = Path(__file__).parents[1] / "fixtures" / "bundles"
Change = Callable[[Path], None]
Made = tuple[str, str, Change]
CODE = {"torch": "graph.json", "onnxruntime": "signature.json"}
DEEP = "[" * 5000 + "]" * 5000


def reseal(bundle: Path) -> None:
    """Make the manifest agree with the files again, as an attacker would."""
    data = json.loads((bundle / "moeopt.json").read_text())
    for name in data["files"]:
        if (bundle / name).is_file():
            blob = (bundle / name).read_bytes()
            data["files"][name] = {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}
    (bundle / "moeopt.json").write_text(json.dumps(data))


def edited(name: str, change: Callable[[Any], Any]) -> Change:
    """Change the JSON of a file, and reseal; what ``change`` returns takes its place, if anything."""

    def apply(bundle: Path) -> None:
        data = json.loads((bundle / name).read_text())
        new = change(data)
        (bundle / name).write_text(json.dumps(data if new is None else new))
        if name != "moeopt.json":
            reseal(bundle)

    return apply


def written(name: str, blob: bytes) -> Change:
    def apply(bundle: Path) -> None:
        (bundle / name).write_bytes(blob)
        if name != "moeopt.json":
            reseal(bundle)

    return apply


def put(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = copy.deepcopy(value)

    return change
