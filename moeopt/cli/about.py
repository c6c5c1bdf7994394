"""Facts for ``moeopt info``: what is installed here, or what a bundle says of itself."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from moeopt.bundle.manifest import read_manifest
from moeopt.untrusted import cleaned, shown_line
from moeopt.value_types import PyObject

RUNTIMES = ("transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt-cu13", "tensorrt-rtx-cu13")
_LISTS = ("inputs", "holds where", "lowerings", "blocks", "profiles")
"""Facts that take a line each."""


def machine_facts() -> dict[str, Any]:
    """Versions and devices; nothing optional is imported to find out."""
    import torch

    from moeopt.ops.native.library import describe

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "moeopt": _version("moeopt"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "native kernel": describe(),
        "gpu": ", ".join(gpus) or "none",
        **{name: _version(name) for name in RUNTIMES},
    }


def bundle_facts(directory: Path) -> dict[str, Any]:
    """A bundle's manifest in the order a reader asks; every file is checked on the way."""
    manifest = read_manifest(directory)  # a mistyped path is told before torch is imported
    from moeopt.backends import registry
    from moeopt.bundle.io_names import called

    data = cleaned(manifest.data)
    blocks = [f"{b['name']}: {b['status']}, {b.get('lowering') or b.get('reason', '')}" for b in data.get("blocks", [])]
    signature = data.get("signature") or {}
    inputs, sizes = called(signature.get("inputs", []), data.get("dynamic", {}))
    return {
        "bundle": str(directory),
        "backend": data["backend"],
        "source": data.get("source", {}).get("class", "unknown"),
        **registry.of_bundle(directory).facts(data),
        "written by": ", ".join(
            f"{k} {v}" for k, v in {**data.get("versions", {}), **data.get("runtimes", {})}.items()
        ),
        "takes": signature.get("parameters", []),
        "inputs": [_format_input(entry) for entry in inputs],
        "sizes": sizes,
        **({"holds where": data["holds"]} if data.get("holds") else {}),
        "blocks": blocks,
        "golden runs": (data.get("golden") or {}).get("runs", 0),
        "bytes": manifest.bytes,
    }


def _format_input(entry: Mapping[str, Any]) -> str:
    """An input of the graph in words: its name, dtype and shape, or the value that it always has."""
    name = entry.get("onnx", entry.get("name"))
    if "dtype" not in entry:
        return f"{name} = {entry.get('constant', 'a number')!r}"
    return f"{name} {entry['dtype']} ({', '.join('?' if d is None else str(d) for d in entry.get('shape', []))})"


def print_facts(facts: dict[str, Any]) -> None:
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        lines = value if isinstance(value, list) and name in _LISTS else [_words(value)]
        for i, line in enumerate(lines or ["none"]):
            print(f"{name if i == 0 else '':{width}}{shown_line(line)}")


def _words(value: PyObject) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_range(v)}" for k, v in value.items()) or "fixed"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _range(bounds: PyObject) -> str:
    low, high = bounds
    return f"from {low}" + ("" if high is None else f" to {high}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
