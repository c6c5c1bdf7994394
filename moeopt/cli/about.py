"""Facts for ``moeopt info``: what is installed here, or what a bundle says of itself."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moeopt.engine import read_manifest

RUNTIMES = ("transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx")


def machine_facts() -> dict[str, Any]:
    """Versions and devices; nothing optional is imported to find out."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "moeopt": _version("moeopt"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "gpu": ", ".join(gpus) or "none",
        **{name: _version(name) for name in RUNTIMES},
    }


def bundle_facts(directory: Path) -> dict[str, Any]:
    """A bundle's manifest in the order a reader asks; every file is checked on the way."""
    data = read_manifest(directory).data
    blocks = [f"{b['name']}: {b['status']}, {b['lowering'] or b['reason']}" for b in data.get("blocks", [])]
    return {
        "bundle": str(directory),
        "backend": data["backend"],
        "source": data.get("source", {}).get("class", "unknown"),
        "device": data.get("device", "unknown"),
        "written by": ", ".join(f"{k} {v}" for k, v in data.get("versions", {}).items()),
        "takes": data.get("signature", {}).get("parameters", []),
        "sizes": data.get("dynamic", {}),
        "blocks": blocks,
        "golden runs": data.get("golden", {}).get("runs", 0),
        "bytes": sum(entry["bytes"] for entry in data["files"].values()),
    }


def print_facts(facts: dict[str, Any]) -> None:
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        lines = value if isinstance(value, list) and name == "blocks" else [_words(value)]
        for i, line in enumerate(lines or ["none"]):
            print(f"{name if i == 0 else '':{width}}{line}")


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_range(v)}" for k, v in value.items()) or "fixed"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _range(bounds: Any) -> str:
    low, high = bounds
    return f"from {low}" + ("" if high is None else f" to {high}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
