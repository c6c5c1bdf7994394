"""The backends by name: moeopt's own, and those that installed packages bring.

A package brings one with an entry point in the group ``moeopt.backends`` whose value is a class:

    [project.entry-points."moeopt.backends"]
    numpy = "my_package.backend:NumpyBackend"

Nothing is imported before it is asked for.
"""

from __future__ import annotations

import functools
import importlib
import os
from importlib import metadata

from moeopt.backends.base import Backend
from moeopt.bundle.manifest import BACKEND_GROUP, check_backend, known_backends, read_backend
from moeopt.errors import UsageError
from moeopt.limits import DEFAULT, LoadLimits
from moeopt.value_types import JsonValue, PyObject

OWN = {
    "torch": "moeopt.backends.torch.backend:TorchBackend",
    "onnxruntime": "moeopt.backends.onnxrt.backend:OnnxRuntimeBackend",
    "tensorrt": "moeopt.backends.tensorrt.backend:TensorRTBackend",
}


def names() -> tuple[str, ...]:
    """Every name that ``backend=`` takes, moeopt's own first."""
    return known_backends()


def get(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        UsageError: there is none of that name, or the package that brings it does not load.
    """
    check_backend(name)
    return _made(name)


@functools.cache
def _made(name: str) -> Backend:
    if name in OWN:
        module, _, attribute = OWN[name].partition(":")
        made: Backend = getattr(importlib.import_module(module), attribute)()
        return made
    (point, *_) = [p for p in metadata.entry_points(group=BACKEND_GROUP) if p.name == name]
    try:
        made = point.load()()
    except Exception as err:
        raise UsageError(f"backend {name!r} ({point.value}) does not load: {type(err).__name__}: {err}") from err
    if not isinstance(made, Backend) or made.name != name:
        kind = type(made).__name__
        raise UsageError(f"backend {name!r} ({point.value}) is a {kind}, not a moeopt.backends.base.Backend")
    return made


def of_bundle(directory: str | os.PathLike[str]) -> Backend:
    """The backend that a bundle says it is for; ``BundleError`` where it says none that is here."""
    if not isinstance(directory, (str, os.PathLike)):
        kind = type(directory).__name__
        raise UsageError(f"give the directory of a bundle, or what moeopt.optimize returned, not a {kind}")
    return get(read_backend(directory))


def open_bundle(
    directory: str | os.PathLike[str],
    device: PyObject = None,
    session_options: JsonValue = None,
    limits: LoadLimits = DEFAULT,
    mapped: bool = False,
    resident: int | None = None,
) -> PyObject:
    """The engine of a bundle, whatever its backend; arguments and errors as those of ``moeopt.load``."""
    return of_bundle(directory).open(directory, device, session_options, limits, mapped, resident)
