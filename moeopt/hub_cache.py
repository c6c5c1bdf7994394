"""A model by its name on the Hugging Face hub, where the local cache has it; nothing is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_hub_name(target: str) -> bool:
    """Whether ``target`` is written as a model's name on the hub, ``owner/model``, and is nothing on this disk."""
    known = (".py", ".json", ".onnx")
    return bool(_NAME.fullmatch(target)) and not Path(target).exists() and Path(target).suffix not in known


def cached_folder(name: str) -> Path | None:
    """The folder in the local cache of the model called ``name``; None where it is not there.

    Raises:
        ImportError: huggingface_hub, which comes with transformers, is not installed.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json") if is_hub_name(name) else None
    return Path(found).parent if isinstance(found, str) else None


def on_this_disk(path: Path) -> Path:
    """``path``, or the cached folder of the model that it names; ``path`` again where there is none."""
    try:
        return cached_folder(str(path)) or path
    except ImportError:
        return path
