"""Hostile bundles: files that are none, and manifests, certificates, conditions and golden runs that are wrong."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.hostile.edits import CODE, DEEP, GOOD, Made, edited, put, reseal, written


def made() -> Iterator[Made]:
    yield from _files()
    yield from _manifests()
    yield from _certificates()
    yield from _conditions()
    yield from _golden()


def _files() -> Iterator[Made]:
    for base in CODE:
        for name in sorted(p.name for p in (GOOD / base).iterdir()):
            yield f"{name} missing", base, lambda b, n=name: (b / n).unlink()
            yield f"{name} a fifo", base, lambda b, n=name: ((b / n).unlink(), os.mkfifo(b / n))
            yield f"{name} a symlink", base, lambda b, n=name: ((b / n).unlink(), (b / n).symlink_to("/dev/zero"))
            yield f"{name} a directory", base, lambda b, n=name: ((b / n).unlink(), (b / n).mkdir())
            if name != "moeopt.json" and not name.endswith(".data"):
                yield f"{name} empty", base, written(name, b"")
                yield f"{name} not UTF-8", base, written(name, b"\xff\xfe\x00\x9f" * 9)
                unlisted = edited("moeopt.json", lambda d, n=name: d["files"].pop(n) and None)
                yield f"{name} not listed", base, unlisted
            if name.endswith(".json"):
                for what, text in (
                    ("deep", DEEP),
                    ("of NaN", "NaN"),
                    ("a number", "7"),
                    ("a list", "[]"),
                    ("null", "null"),
                ):
                    yield (
                        f"{name} {what}",
                        base,
                        written(name, text.encode())
                        if name != "moeopt.json"
                        else (lambda b, t=text: (b / "moeopt.json").write_text(t) and None),
                    )
            if name.endswith(".safetensors"):
                header = b'{"x":{"dtype":"F32","shape":[1073741824],"data_offsets":[0,4294967296]}}'
                yield f"{name} of 4 GiB", base, written(name, struct.pack("<Q", len(header)) + header)
                yield f"{name} of a long header", base, written(name, struct.pack("<Q", 1 << 62) + b"{}")


WRONG: dict[str, list[Any]] = {
    "versions": [[], 7, None, {"moeopt": []}],
    "source": [[], "x", {"class": {}}],
    "signature": [[], "x", {"parameters": 3}, {"inputs": [3]}, {"parameters": [[]]}, {"inputs": [{"name": {}}]}],
    "dynamic": [[], {"s0": 3}, {"s0": [1]}, {"s0": ["a", "b"]}, {"s0": [1, 2, 3]}],
    "blocks": [7, {}, [3], [{}], [{"name": [], "status": "x"}], [{"name": "x"}]],
    "golden": [[], 7, {"runs": -1}, {"runs": "one"}, {"runs": True}, {"runs": 99}],
    "files": [None, 3, [], {"graph.json": None}, {"graph.json": {"bytes": True, "sha256": ""}}, {"../x": {"bytes": 1}}],
    "schema": [None, True, 1.5, -1, 0, 99, "1", [1]],
    "format": [None, [], "x"],
    "backend": [None, [], "pickle", {"a": 1}, "\u001b]0;owned\u0007"],
}
ENGINE_ONLY: dict[str, list[Any]] = {
    "provider": [None, 7, [], "quantum"],
    "runtimes": [[], 7, {"onnx": 3}],
    "sites": [None, 7, {}, [3], [{}], [{"name": 3}]],
    "probes": [None, 7, [3], [{}], [{"budget": "x"}], [{"budget": 1e30}], [{"budget": -1}]],
    "facts": [[], {"nodes": "x"}, {"nodes": None}],
    "portable": [None, 7, [], {"sites": 3}],
    "lowerings": [[], 7],
}


def _manifests() -> Iterator[Made]:
    for base in CODE:
        table = WRONG | (ENGINE_ONLY if base == "onnxruntime" else {"device": [None, 7, [], "x\0y", "gpu!", "meta"]})
        for key, values in table.items():
            for n, value in enumerate(values):
                yield f"manifest {key} wrong {n}", base, edited("moeopt.json", put(key, value=value))
        for distance in (1e30, 1, -1, "inf", "0.1", [], True, 1.0):
            yield (
                f"golden distance {distance!r}",
                base,
                edited("moeopt.json", put("golden", "distance", value=distance)),
            )
        yield "golden distance NaN", base, lambda b: _raw(b, '"distance"', '"distance": NaN, "was"')
        yield "golden distance Infinity", base, lambda b: _raw(b, '"distance"', '"distance": Infinity, "was"')


def _raw(bundle: Path, old: str, new: str) -> None:
    text = (bundle / "moeopt.json").read_text()
    assert old in text
    (bundle / "moeopt.json").write_text(text.replace(old, new, 1))


def _certificates() -> Iterator[Made]:
    changes: dict[str, Callable[[Any], Any]] = {
        "without passed": lambda d: d.pop("passed") and None,
        "passed null": put("passed", value=None),
        "of another schema": put("schema", value=9),
        "blocks a number": put("blocks", value=7),
        "a block a number": put("blocks", value=[7]),
        "a case a number": put("blocks", 0, "cases", value=[7]),
        "an unknown verdict": put("blocks", 0, "cases", 0, "status", value="fine"),
        "a verdict of a list": put("blocks", 0, "passed", value=[]),
        "a distance of a word": put("blocks", 0, "cases", 0, "required", value="much"),
        "a count of a list": put("blocks", 0, "cases", 0, "ties", value=[]),
        "an infinite budget": lambda d: d["end_to_end"].update(passed=True, budget="inf"),
        "a budget of NaN": lambda d: d["end_to_end"].update(passed=True, budget="nan"),
        "beyond its budget": lambda d: d["end_to_end"].update(passed=True, distance=0.5, budget=0.1),
        "end to end a list": put("end_to_end", value=[]),
        "language a list": put("end_to_end", "language", value=[1]),
        "notes a word": put("notes", value="x"),
        "deep": lambda d: json.loads('{"schema": 1, "passed": true, "blocks": ' + "[" * 300 + "]" * 300 + "}"),
        "empty": lambda d: {},
    }
    for base in CODE:
        for name, change in changes.items():
            yield f"certificate {name}", base, edited("certificate.json", change)


def _conditions() -> Iterator[Made]:
    size = ["size", 0, 0]
    hostile: list[Any] = [
        ["==", ["**", 9, ["**", 9, ["**", 9, 2]]], size],
        ["==", ["**", size, 1 << 40], 3],
        ["==", ["**", 9, 9.5], 3],
        ["==", ["**", ["**", 9, 8], 8], 3],
        ["<<", 1, 1 << 40],
        ["==", ["size", 99, 0], 1],
        ["==", ["size", 0, 99], 1],
        ["==", ["size", -1, 0], 1],
        ["==", ["size", 0.5, 0], 1],
        ["==", ["size", [], {}], 1],
        ["==", 1 << 90, size],
        ["==", size],
        ["max", 1],
        ["eval", "1"],
        [["=="], 1, 1],
        {"==": [1, 1]},
        "x",
        None,
        [],
        ["==", "a", "b"],
        [">", size, "x"],
    ]
    for base, file in CODE.items():
        for n, condition in enumerate(hostile):
            yield f"condition {n}", base, edited(file, put("conditions", value=[condition]))
        deep: Any = size
        for _ in range(90):
            deep = ["+", deep, 1]
        yield "condition deep", base, edited(file, put("conditions", value=[["==", deep, 0]]))
        yield "conditions a number", base, edited(file, put("conditions", value=7))
        wide = ["and", *[["==", size, size]] * 40000]
        yield "condition wide", base, edited(file, put("conditions", value=[wide]))


def _golden() -> Iterator[Made]:
    from safetensors.torch import load_file, save_file

    tables: dict[str, str] = {
        "deep": DEEP,
        "no list": "{}",
        "a run of three": "[[[],[],[]]]",
        "a run of a number": "[7]",
        "not JSON": "[[",
        "a node": '[[[{"node": "x"}], []]]',
        "a device of NUL": '[[[{"device": "a\\u0000b"}], []]]',
        "an unknown literal": '[[[{"pickle": "x"}], []]]',
        "no runs": "[]",
        "a complex of words": '[[[{"complex": ["a", "b"]}], []]]',
    }
    for base in CODE:
        for name, table in tables.items():

            def change(bundle: Path, table: str = table) -> None:
                tensors = load_file(bundle / "golden.safetensors")
                save_file(tensors, bundle / "golden.safetensors", metadata={"runs": table})
                reseal(bundle)

            yield f"golden {name}", base, change

        def other(bundle: Path) -> None:
            tensors = load_file(bundle / "golden.safetensors")
            runs = _metadata(bundle / "golden.safetensors")
            doubled = {k: t * 2 if ".out." in k and t.is_floating_point() else t for k, t in tensors.items()}
            save_file(doubled, bundle / "golden.safetensors", metadata={"runs": runs})
            reseal(bundle)

        yield "golden of another model", base, other


def _metadata(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return (file.metadata() or {})["runs"]
