"""Measure the kernels of the installed ONNX Runtime against float64, and write them to the table that graphs rest on.

    python benchmarks/onnx_accuracy.py             # the CPU provider; print what is not right
    python benchmarks/onnx_accuracy.py cuda        # another provider of this machine
    python benchmarks/onnx_accuracy.py --write     # and put it into moeopt/backends/onnxrt/accuracy.json

Its times are of no interest; it runs in seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moeopt.backends.onnxrt import accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("provider", nargs="?", default="cpu")
    parser.add_argument("--write", action="store_true", help="keep the result in the package's table")
    chosen = parser.parse_args()
    found = accuracy.measure(chosen.provider)
    for name, row in found.items():
        if not accuracy.right(row) or not row["denormal"]:
            print(f"{name:28s} {row}")
    print(f"{sum(map(accuracy.right, found.values()))} of {len(found)} kernels are right on {chosen.provider}")
    if chosen.write:
        path = Path(accuracy.__file__).with_name("accuracy.json")
        table = json.loads(path.read_text()) if path.exists() else {}
        table.setdefault(chosen.provider, {})[accuracy.version()] = found
        path.write_text(_lines(table))


def _lines(table: dict[str, dict[str, dict[str, dict[str, object]]]]) -> str:
    """A kernel a line, so that a new version's changes can be read in a diff; the newest version is the last."""
    parts = []
    for provider, versions in table.items():
        listed = []
        for version, rows in sorted(versions.items(), key=lambda item: [int(n) for n in item[0].split(".")]):
            lines = ",\n".join(f"      {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
            listed.append(f"    {json.dumps(version)}: {{\n{lines}\n    }}")
        parts.append(f"  {json.dumps(provider)}: {{\n" + ",\n".join(listed) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
