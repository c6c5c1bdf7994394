"""The bundle as a directory: a manifest that knows every file's size and sha256, written aside and moved into place.

moeopt.json            format, schema, backend, versions, source, signature, blocks, files
<the runtime's files>  graph.json + weights.safetensors; or model.onnx + its data; or engine.plan
certificate.json       what was verified, where, and how it came out
golden.safetensors     inputs and results to check again where it is deployed
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeopt.bundle import aside
from moeopt.bundle.schemas import ManifestFile
from moeopt.errors import BundleError, UsageError
from moeopt.full_disk import told
from moeopt.other_files import home_hint
from moeopt.untrusted import checked, open_regular, read_bytes, read_json, shown
from moeopt.value_types import JsonValue, PyObject

NAME = "moeopt.json"
FORMAT = "moeopt-bundle"
SCHEMA = 1
BACKENDS = ("torch", "onnxruntime", "tensorrt")
BACKEND_GROUP = "moeopt.backends"
"""The entry points with which installed packages bring more."""
MAX_CERTIFICATE = 64 << 20
"""Bytes: one of a thousand blocks has about two million."""

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")


@dataclass(frozen=True)
class Manifest:
    """A bundle's directory and what its ``moeopt.json`` says; made by :func:`read_manifest`."""

    directory: Path
    data: Mapping[str, Any]

    @property
    def backend(self) -> str:
        return str(self.data["backend"])

    def path(self, name: str) -> Path:
        """The path of a file that the manifest lists and that was checked; ``BundleError`` for any other."""
        if name not in self.data["files"]:
            raise BundleError(f"{self.directory}: the bundle has no {name}: it is not complete, save it again")
        return self.directory / name

    @property
    def bytes(self) -> int:
        """The bytes of all files."""
        return sum(entry["bytes"] for entry in self.data["files"].values())

    def read_json(self, name: str) -> JsonValue:
        """A listed JSON file; ``BundleError`` when it is none."""
        return read_json(self.path(name))

    def read_text(self, name: str, max_size: int = MAX_CERTIFICATE) -> str:
        """A listed text file of at most ``max_size`` bytes, as it was when the manifest was written."""
        blob = read_bytes(self.path(name), max_size)
        if hashlib.sha256(blob).hexdigest() != self.data["files"][name]["sha256"]:
            raise BundleError(f"{self.directory / name}: it changed while the bundle was read: load the bundle again")
        try:
            return blob.decode("utf-8")
        except UnicodeDecodeError as err:
            raise BundleError(f"{self.directory / name}: it is not text ({err}): it was damaged") from None


def write_bundle(
    directory: str | os.PathLike[str],
    backend: str,
    write_files: Callable[[Path], None],
    fields: Mapping[str, Any],
) -> Path:
    """Let ``write_files`` fill a new directory, add the manifest, and move it to ``directory`` in one step.

    ``fields`` are the manifest's own keys beside format, schema, backend, versions and files. ``UsageError`` when
    ``directory`` exists and is no bundle; nothing is left behind when ``write_files`` raises.
    """
    import torch  # what only reads a manifest need not wait for it

    target = Path(directory)
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside.clear_abandoned(target)
    with told(target), aside.folder(target) as folder:
        write_files(folder)
        files = {}
        for path in sorted(folder.iterdir()):
            _check_name(path.name, target)
            os.chmod(path, 0o644)  # some writers leave files that only their owner reads
            files[path.name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        manifest = {
            "format": FORMAT,
            "schema": SCHEMA,
            "backend": backend,
            "versions": {"moeopt": version(), "torch": torch.__version__, "python": sys.version.split()[0]},
            **fields,
            "files": files,
        }
        (folder / NAME).write_text(json.dumps(manifest, indent=1, allow_nan=False))
        os.chmod(folder, 0o755)
        _move_into_place(folder, target)
    return target


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and check a bundle: its manifest, then the presence, size and sha256 of every file it lists."""
    root = Path(directory).resolve()  # the engine outlives a change of the working directory
    data = _read_header(root)
    if not isinstance(data.get("files"), dict):
        raise BundleError(f"{root / NAME}: it lists no files")
    for name, entry in data["files"].items():
        _check_file(root, name, entry)
    checked(data, ManifestFile, str(root / NAME))
    return Manifest(root, data)


def _read_header(root: Path) -> dict[str, Any]:
    """What ``moeopt.json`` says, its format, schema and backend checked."""
    if not os.path.lexists(root / NAME):
        what = "has no moeopt.json" if root.is_dir() else "is no directory"
        raise BundleError(f"{root} {what}: it is not a bundle, or writing it was cut off{_instead(root)}")
    data = read_json(root / NAME)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f"{root / NAME}: this is not a moeopt manifest")
    schema = data.get("schema")
    if type(schema) is not int or schema < 1:
        raise BundleError(f"{root / NAME}: the schema is {schema!r:.60}, not a version number")
    if schema > SCHEMA:
        versions = data.get("versions")
        wrote = shown(versions.get("moeopt", "a newer one") if isinstance(versions, dict) else "a newer one", 40)
        raise BundleError(
            f"{root / NAME}: the bundle has schema {schema} (moeopt {wrote}), and this moeopt reads up to {SCHEMA}: "
            "upgrade moeopt"
        )
    if data.get("backend") not in (known := known_backends()):
        raise BundleError(f"{root / NAME}: the backend is {data.get('backend')!r:.60}, not one of {', '.join(known)}")
    return data


def known_backends() -> tuple[str, ...]:
    """The names of the backends that are here, moeopt's own first; a package cannot take the place of one of those."""
    from importlib import metadata

    others = {point.name for point in metadata.entry_points(group=BACKEND_GROUP)} - set(BACKENDS)
    return (*BACKENDS, *sorted(others))


OTHER_NAMES = {
    "torch": {"pytorch", "pt", "eager", "aten", "inductor", "native"},
    "onnxruntime": {"ort", "onnx", "onnxrt", "onnxruntimegpu", "onnxruntimecpu", "optimum"},
    "tensorrt": {"trt", "tensorrtrtx", "trtrtx", "nvtensorrtrtx", "tensorrtllm", "nvidia", "torchtensorrt"},
}
"""What people call a backend when they do not use its name: the error then says which name they mean."""


def check_backend(name: str) -> None:
    """``UsageError`` where no backend of that name is here."""
    if name not in (known := known_backends()):
        word = str(name).lower().replace("-", "").replace("_", "").replace(" ", "")
        near = [meant for meant, words in OTHER_NAMES.items() if word in words and meant in known]
        near = near or difflib.get_close_matches(str(name).lower(), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"backend {name!r} is not available; {hint}use one of {', '.join(map(repr, known))}, or install the "
            f"package that brings it (an entry point in the group {BACKEND_GROUP})"
        )


_ARCHIVES = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z"}


def _instead(root: Path) -> str:
    """What to give instead of a path that is no bundle's directory."""
    if root.is_file() and os.path.lexists(root.parent / NAME):
        return f": give the directory, {root.parent}"
    if root.suffix == ".onnx" and root.is_file():
        return f": an ONNX file becomes one by moeopt.optimize({root.name!r}).save(directory)"
    if (root / "config.json").is_file():
        return ": the directory of a model becomes one by moeopt.optimize(directory, out=bundle)"
    if root.suffix.lower() in _ARCHIVES and root.is_file():
        return ": unpack the archive, and give the directory in it"
    if root.is_dir() and (inside := sorted(path.parent for path in root.glob(f"*/{NAME}"))):
        return f": give the directory in it, {inside[0]}"
    return "" if root.exists() else f": there is no such path{home_hint(root)}"


def read_backend(directory: str | os.PathLike[str]) -> str:
    """Which backend a bundle claims to be for, its files unchecked; ``BundleError`` when it claims nothing."""
    return str(_read_header(Path(directory))["backend"])


def is_bundle(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory claims to be a bundle; says nothing about its health."""
    try:
        data = read_json(Path(directory) / NAME)
    except BundleError:
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


def _check_file(root: Path, name: str, entry: JsonValue) -> None:
    _check_name(name, root)
    path = root / name
    good = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
    if not good:
        raise BundleError(f"{root / NAME}: the entry of {name} is {str(entry)[:60]!r}, not a size and a sha256")
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry["bytes"]:
            raise BundleError(
                f"{path}: it has {size} bytes, and the manifest says {entry['bytes']}: copy the bundle again"
            )
        found = _digest(file)
    if found != entry["sha256"]:
        why = f"{path}: its sha256 is not the one in the manifest"
        raise BundleError(f"{why}: it was damaged or swapped, so copy the bundle again")


def _check_name(name: PyObject, root: Path) -> None:
    if not isinstance(name, str) or not _FILE.fullmatch(name) or name == NAME:
        raise BundleError(f"{root}: a file is named {name!r}: files lie in the bundle itself, under plain names")


def check_target(target: Path) -> None:
    """``UsageError`` where ``target`` is a file, a link, or a directory that holds something else than a bundle."""
    if target.is_symlink():
        raise UsageError(
            f"{target} is a symbolic link, and a bundle that is replaced is moved: give what it leads to, "
            f"{os.path.realpath(target)}"
        )
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} exists and is not a directory: give a new path")
    if hint := home_hint(target):
        raise UsageError(f"{target} would be a folder of that name{hint}")
    if target.is_dir() and any(target.iterdir()) and not is_bundle(target):
        raise UsageError(f"{target} exists and is not a moeopt bundle: it is left alone, give a new path")


def _move_into_place(new: Path, target: Path) -> None:
    if not target.exists():
        os.rename(new, target)
        return
    with aside.folder(target, "old.") as old:
        os.rename(target, old / "bundle")
        try:
            os.rename(new, target)
        except OSError:
            os.rename(old / "bundle", target)
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return _digest(file)


def _digest(file: PyObject) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 22):
        digest.update(chunk)
    return digest.hexdigest()


def version() -> str:
    """The version of moeopt that runs here."""
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("moeopt")
    return "source tree"
