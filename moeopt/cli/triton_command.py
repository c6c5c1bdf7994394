"""``moeopt triton``: an ONNX bundle as a model of Triton Inference Server.

A model is ``NAME/config.pbtxt`` and ``NAME/1/model.onnx`` with its weights beside it.

The configuration's fields: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from moeopt.bundle.aside import clear_abandoned, folder
from moeopt.cli.early import check_bundle
from moeopt.errors import UsageError
from moeopt.full_disk import told
from moeopt.value_types import OnnxValue

_TYPES = {
    "BOOL": "TYPE_BOOL", "INT8": "TYPE_INT8", "INT16": "TYPE_INT16", "INT32": "TYPE_INT32", "INT64": "TYPE_INT64",
    "UINT8": "TYPE_UINT8", "UINT16": "TYPE_UINT16", "UINT32": "TYPE_UINT32", "UINT64": "TYPE_UINT64",
    "FLOAT16": "TYPE_FP16", "FLOAT": "TYPE_FP32", "DOUBLE": "TYPE_FP64", "BFLOAT16": "TYPE_BF16",
}  # fmt: skip
_GRAPH = "model.onnx"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


def triton_command(
    bundle: Annotated[Path, typer.Argument(help="a bundle of backend onnxruntime")],
    repository: Annotated[Path, typer.Argument(help="the server's model repository; made where it is not there")],
    name: Annotated[str | None, typer.Option(help="of the model; else that of the bundle's directory")] = None,
) -> None:
    """Write a bundle's engine into a model repository of Triton Inference Server."""
    check_bundle(bundle)
    print(f"saved: {write_triton_model(bundle, repository, name)}")


def write_triton_model(bundle: Path, repository: Path, name: str | None = None) -> Path:
    """``repository/name`` with ``config.pbtxt`` and ``1/model.onnx``.

    Raises:
        BundleError: the bundle is damaged.
        UsageError: it is a bundle of another backend; the name is none; the model is there already, or cannot be.
    """
    from moeopt.bundle.manifest import is_bundle, read_manifest

    manifest = read_manifest(bundle)
    names = list(manifest.data["files"])
    if _GRAPH not in names or any(n.endswith(".plan") for n in names):
        raise UsageError(
            f"{bundle} is a bundle for {manifest.backend}, and the server's backend onnxruntime reads an ONNX graph: "
            "optimise the model with backend='onnxruntime'"
        )
    name = bundle.resolve().name if name is None else name
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for a model (up to 200 letters, digits, '_', '-', '.'): give another with --name"
        )
    if is_bundle(repository) or (repository.exists() and not repository.is_dir()):
        what = "a bundle" if repository.is_dir() else "a file"
        raise UsageError(f"{repository} is {what}: give the server's model repository, a folder of models")
    target = repository / name
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{target} is there already: remove it, or give another name with --name")
    import onnx_ir as ir

    files = [n for n in names if n in (_GRAPH, f"{_GRAPH}.data")]
    graph = ir.load(manifest.path(_GRAPH)).graph
    config = _config(name, graph.inputs, graph.outputs, str(manifest.data.get("provider", "cpu")))
    try:
        repository.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(dir=repository, prefix=f".{name}."))
    except OSError as err:
        raise UsageError(
            f"{target} cannot be written: {err.strerror or err}; give a repository that you may write to"
        ) from err
    clear_abandoned(target)
    with told(target), folder(target) as new:  # in its place when it is whole: a server may be looking for it
        (new / "1").mkdir()
        for file in files:
            shutil.copyfile(manifest.path(file), new / "1" / file)
        (new / "config.pbtxt").write_text(config)
        os.chmod(new, 0o755)
        os.rename(new, target)
    return target


def _config(name: str, inputs: list[OnnxValue], outputs: list[OnnxValue], provider: str) -> str:
    """In protobuf's text format; ``max_batch_size`` 0 means that shapes are whole, their first size included."""
    ends = [_end("input", value) for value in inputs] + [_end("output", value) for value in outputs]
    kind = "KIND_CPU" if provider == "cpu" else "KIND_GPU"
    head = [f"name: {json.dumps(name)}", 'backend: "onnxruntime"', "max_batch_size: 0"]
    return "\n".join([*head, *ends, f"instance_group {{ kind: {kind} count: 1 }}"]) + "\n"


def _end(kind: str, value: OnnxValue) -> str:
    dtype = _TYPES.get(value.dtype.name)
    if dtype is None:
        raise UsageError(f"{value.name} is {value.dtype.name}, which Triton Inference Server has no type for")
    sizes: list[Any] = [getattr(dim, "value", dim) for dim in value.shape]
    dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in sizes)
    scalar = " reshape { shape: [] }" if not sizes else ""
    return f"{kind} {{ name: {json.dumps(value.name)} data_type: {dtype} dims: [ {dims or 1} ]{scalar} }}"
