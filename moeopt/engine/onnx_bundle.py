"""The bundle of the ONNX Runtime backend: ``model.onnx``, its weights beside it, and what re-checks them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeopt.engine import golden as goldens
from moeopt.engine.manifest import write_bundle
from moeopt.engine.onnx_build import Built
from moeopt.engine.onnx_engine import OnnxEngine
from moeopt.report import Report

SIGNATURE, CERTIFICATE = "signature.json", "certificate.json"


def save_onnx_bundle(
    engine: OnnxEngine,
    built: Built,
    directory: str | os.PathLike[str],
    report: Report,
    certificate: Any,
    call: tuple[tuple[Any, ...], Mapping[str, Any]],
    source: Mapping[str, str] | None,
) -> Path:
    """Write an engine as a bundle; returns its directory. Errors are those of ``save_torch_bundle``."""
    args, kwargs = call
    runs = [goldens.golden_run(args, kwargs, engine(*args, **kwargs))]
    fields = {
        "source": dict(source or {}),
        "provider": engine.provider,
        "blocks": report.to_dict()["blocks"],
        "lowerings": built.lowerings,
        "facts": built.facts,
        "golden": {"runs": len(runs), "distance": None},
    }

    def write(aside: Path) -> None:
        for path in engine.directory.iterdir():
            shutil.copyfile(path, aside / path.name)
        (aside / SIGNATURE).write_text(json.dumps(built.signature, allow_nan=False))
        (aside / CERTIFICATE).write_text(certificate.to_json())
        goldens.save_golden(runs, aside / goldens.FILE)

    return write_bundle(directory, "onnxruntime", write, fields)
