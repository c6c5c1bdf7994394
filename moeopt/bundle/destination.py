"""Where a bundle shall go, checked before the work that fills it: hours may lie between the two."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from moeopt.bundle.manifest import NAME, check_target
from moeopt.errors import UsageError
from moeopt.sizes import in_words


def check_destination(
    directory: str | os.PathLike[str], verified: bool, overwrite: bool = False, need_bytes: int = 0
) -> str:
    """What lies at ``directory`` and would be replaced, in words; "" where nothing does.

    Args:
        verified: whether what would be saved is verified and passed.
        overwrite: whether an unverified bundle may take the place of a verified one.
        need_bytes: about how large the bundle will be; 0 where that is not known.

    Raises:
        UsageError: it is a file or holds something else, cannot be written to, has too little space, or holds a
            verified bundle that an unverified one would replace.
    """
    if not isinstance(directory, (str, os.PathLike)):
        given = type(directory).__name__
        raise UsageError(f"give the directory of the bundle, a string or a path, not a {given}: opt.save('engine')")
    target = Path(directory)
    check_name(target)
    check_target(target)
    parent = next(p for p in target.absolute().parents if p.exists())
    if not parent.is_dir():
        raise UsageError(f"{target} cannot be written: {parent} is a file; give another directory")
    try:
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=".moeopt."))
    except OSError as err:
        raise UsageError(
            f"{target} cannot be written: {err.strerror or err} in {parent}; give a directory that you may write to"
        ) from err
    free = shutil.disk_usage(parent).free
    if need_bytes > free:
        raise UsageError(
            f"{target} needs about {in_words(need_bytes)}, and {in_words(free)} are free there: free some space, or "
            "give a directory on another disk"
        )
    old = _old_bundle(target)
    if old is None:
        return ""
    passed, words = old
    if passed and not verified and not overwrite:
        raise UsageError(
            f"{target} holds a verified bundle ({words}), and what would replace it is not verified: give another "
            "directory, verify it (verify='strict'), or say overwrite=True (--overwrite)"
        )
    return words


def check_name(target: Path) -> None:
    """``UsageError`` for a path that nothing can have: a name in it is too long, or holds what no name may."""
    try:
        os.lstat(target)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as err:
        why = getattr(err, "strerror", None) or err
        raise UsageError(f"{str(target)[:80]!r} cannot be written: {why}; give another directory") from err


def _old_bundle(target: Path) -> tuple[bool, str] | None:
    """Whether the bundle at ``target`` passed, and what it is; None where there is none."""
    if not (target / NAME).is_file():
        return None
    manifest, certificate = _json(target / NAME), _json(target / "certificate.json")
    passed = certificate.get("passed") is True
    source = manifest.get("source")
    name = source.get("class", "a model") if isinstance(source, dict) else "a model"
    return passed, f"{name:.80} for {manifest.get('backend', 'a backend'):.80}, {'' if passed else 'not '}verified"


def _json(path: Path) -> dict[str, Any]:
    """What a file of the old bundle says; {} where it is damaged, which is no reason to keep it."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
