"""What a command refuses before torch is imported: a mistyped path or name shall be told at once.

The same checks run again where the thing is used; here only what needs no torch is looked at.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from moeopt.bundle.manifest import check_backend, read_backend
from moeopt.errors import UsageError


def check_bundle(directory: Path) -> None:
    """``BundleError`` where ``directory`` is none."""
    if not directory.is_dir():
        read_backend(directory)


def check_certificate(file: Path) -> None:
    """``UsageError`` where there is no such file; a bundle's own directory is not one either."""
    if file.is_dir():
        raise UsageError(f"{file} is a directory: give a certificate, like {file}/certificate.json")
    if not file.is_file():
        raise UsageError(f"{file}: there is no such certificate: copy a bundle's certificate.json there")


def check_code(where: str, target: str) -> None:
    """``UsageError`` where ``where``, a ``.py`` file or a module by its dotted name, is not there."""
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise UsageError(f"{target}: there is no file {where}")
        return
    first = where.partition(".")[0]
    try:
        known = first in sys.modules or importlib.util.find_spec(first) or PathFinder.find_spec(first, [os.getcwd()])
    except (ImportError, ValueError):
        known = None
    if not known:
        raise UsageError(
            f"{target}: importing {where} failed: ModuleNotFoundError: no module {first!r} in {os.getcwd()} or "
            "among the installed packages"
        )


__all__ = ["check_backend", "check_bundle", "check_certificate", "check_code"]
