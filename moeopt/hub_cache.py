"""A model by its name on the Hugging Face hub, where the local cache has it; nothing is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_hub_name(target: str) -> bool:
    """Whether ``target`` is written as a model's name on the hub, ``owner/model``, and is nothing on this disk."""
    known = (".py", ".json", ".onnx")
    return bool(_NAME.fullmatch(target)) and not Path(target).exists() and Path(target).suffix not in known


def may_be_a_name(name: str) -> bool:
    """Whether a model on the hub can be called ``name``; ``ImportError`` as for :func:`cached_file`."""
    from huggingface_hub import try_to_load_from_cache

    try:
        try_to_load_from_cache(name, "config.json")
    except ValueError:  # of huggingface_hub, which looks at the name before the cache
        return False
    return True


def cached_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of the model called ``name`` in the local cache, in ``revision`` or the newest one; None where it is not.

    Raises:
        ImportError: huggingface_hub, which comes with transformers, is not installed.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision) if may_be_a_name(name) else None
    return Path(found) if isinstance(found, str) else None


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder in the local cache of the model called ``name``; None where it is not there.

    Raises:
        ImportError: as :func:`cached_file`.
    """
    found = cached_file(name, "config.json", revision) if is_hub_name(name) else None
    return None if found is None else found.parent


def name_of(folder: Path) -> str:
    """The name on the hub of the model whose snapshot in a cache ``folder`` is; "" for any other folder."""
    home = folder.parent.parent.name.split("--")
    return "/".join(home[1:]) if folder.parent.name == "snapshots" and home[0] == "models" and len(home) > 1 else ""


def on_this_disk(path: Path) -> Path:
    """``path``, or the cached folder of the model that it names; ``path`` again where there is none."""
    try:
        return cached_folder(str(path)) or path
    except ImportError:
        return path
