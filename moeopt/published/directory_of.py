"""Where a loaded model came from, as transformers remembers it, and what its config says of quantisation."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeopt.hub_cache import cached_folder
from moeopt.value_types import PyObject


def directory_of(model: PyObject) -> Path | None:
    """The directory of safetensors files that ``model`` was loaded from; None where it is not on this machine.

    A name as on the hub is looked up in the local cache, in the version that was loaded; nothing is downloaded.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    path = Path(name).expanduser()
    commit = getattr(config, "_commit_hash", None)
    with contextlib.suppress(ImportError):
        path = cached_folder(name, commit if isinstance(commit, str) else None) or path
    return path if path.is_dir() and any(path.glob("*.safetensors")) else None


def stated_by(directory: Path) -> Mapping[str, Any]:
    """``quantization_config`` of a directory's ``config.json``, or of its text model's; {} where there is none.

    Early files of compressed-tensors call it ``compression_config``.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return _quantization(config) if isinstance(config, dict) else {}


def stated_of(model: PyObject) -> Mapping[str, Any]:
    """The same of the config that a loaded model holds: of a quantiser that ran while it was loaded."""
    held = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(held, Mapping):
        return held
    told = getattr(held, "to_dict", None)
    found = told() if callable(told) else {}
    return found if isinstance(found, Mapping) else {}


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for part in (config, *(config.get(key) for key in ("text_config", "llm_config", "language_config"))):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part, dict) and isinstance(part.get(key), dict):
                found: Mapping[str, Any] = part[key]
                return found
    return {}
