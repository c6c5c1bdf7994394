"""A graph from elsewhere is run within its limits before it runs in this process.

Where the cost of a call can be told from its sizes, it is compared with the limits, and nothing is run. Where it
cannot, a child process, which imports ONNX Runtime and nothing else, makes the same session and the same calls under
the system's own limits on memory and time; if that ends badly, this process never opens the graph.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moeopt.backends.onnxrt.budget import cost_of
from moeopt.backends.onnxrt.custom_op import native_library
from moeopt.backends.onnxrt.idle_optimizers import idle_optimizers
from moeopt.backends.onnxrt.session import FLOAT_ROWS, ISA_ENTRY
from moeopt.bundle import golden as goldens
from moeopt.bundle.manifest import Manifest
from moeopt.errors import BundleError, LimitError
from moeopt.ir.element_bytes import element_bytes
from moeopt.limits import STILL, LoadLimits
from moeopt.lower.onnx.experts_node import DOMAIN
from moeopt.untrusted import shown
from moeopt.value_types import OnnxModel

PRODUCTS_A_SECOND = 1e10
"""Multiplications that any machine of today does in a second; a call of more is timed in a child."""
_LONGEST = 1e6
"""Seconds that a child is waited for at most; a system call that waits counts milliseconds in 32 bits."""
_CHILD = Path(__file__).with_name("trial_child.py")
_WAY_OUT = (
    "if you trust the bundle, give it more: moeopt.load(directory, limits=moeopt.LoadLimits({0}=...)), or `moeopt "
    "verify --{0}`"
)

Feeds = Mapping[str, torch.Tensor]


def check_calls(
    proto: OnnxModel,
    model: Path | bytes,
    folder: Path,
    calls: Sequence[Feeds],
    limits: LoadLimits,
    files: int,
    where: str,
) -> None:
    """Refuse a graph whose ``calls`` take more than they may.

    Args:
        proto: the graph, its weights left in their file.
        model: the file that it was read from, or its bytes.
        folder: where its weights lie.
        calls: the inputs by name, of each call that will be made here.
        limits: of the whole.
        files: bytes of the bundle's files.
        where: what the errors call it.

    Raises:
        LimitError: a call takes more memory or time than the limits say.
        BundleError: the graph ends the process that runs it.
    """
    seconds, unknown = limits.seconds_for(files), []
    if math.isinf(seconds) and math.isinf(limits.bytes_for(files)):
        return
    for feeds in calls:
        budget = limits.bytes_for(files, _size(feeds))
        cost = cost_of(proto, {name: tuple(t.shape) for name, t in feeds.items()})
        if cost is not None and cost.bytes > budget:
            raise LimitError(f"{where}: a call holds {cost.bytes:.2g} bytes, and may {budget:.2g}: {_more('bytes')}")
        if cost is None or cost.products > seconds * PRODUCTS_A_SECOND:
            unknown.append(feeds)
    if unknown:
        _in_a_child(proto, model, folder, unknown, limits, files, where)


def within_limits(
    manifest: Manifest, proto: OnnxModel, graph: str, signature: Mapping[str, Any], limits: LoadLimits
) -> None:
    """``LimitError`` where the golden runs of a graph take more than they may."""
    runs = goldens.load_golden(manifest.path(goldens.FILE), torch.device("cpu"))
    names = [entry.get("onnx") for entry in signature["inputs"]]
    calls = [
        {n: v for n, v in zip(names, run.inputs, strict=False) if n is not None and isinstance(v, torch.Tensor)}
        for run in runs
    ]
    path = manifest.path(graph)
    check_calls(proto, path, manifest.directory, calls, limits, manifest.bytes, str(path))


def _operator(proto: OnnxModel) -> list[str]:
    """What a session of the graph registers for moeopt's own operator: an entry of its configuration, a library."""
    library = native_library() if any(opset.domain == DOMAIN for opset in proto.opset_import) else None
    return [] if library is None else [ISA_ENTRY, str(library.bit), str(library.path)]


def _in_a_child(
    proto: OnnxModel,
    model: Path | bytes,
    folder: Path,
    calls: Sequence[Feeds],
    limits: LoadLimits,
    files: int,
    where: str,
) -> None:
    seconds = limits.seconds_for(files)
    budget = max(limits.bytes_for(files, _size(feeds)) for feeds in calls)
    code, out, err = _child(proto, model, folder, calls, budget + files, seconds)
    if out.split()[-1:] == [b"time"]:
        raise LimitError(f"{where}: its calls take longer than {seconds:.3g} s: {_more('seconds')}")
    if code < 0:
        raise BundleError(f"{where}: the graph ends the process that runs it (signal {-code})")
    verdict = out.split()[-1:]
    if verdict == [b"memory"]:
        raise LimitError(f"{where}: its calls take more than {budget:.2g} bytes: {_more('bytes')}")
    if not verdict:
        lines = err.decode(errors="replace").strip().splitlines()
        raise BundleError(
            f"{where}: its calls cannot be told from their sizes, and {sys.executable} does not try them in a process "
            f"of their own ({shown(lines[-1] if lines else 'it says nothing', 200)}): if you trust the bundle, load it "
            "without limits: limits=moeopt.LoadLimits(seconds=math.inf, bytes=math.inf)"
        )


def ended_by(proto: OnnxModel, folder: Path, feeds: Feeds) -> int | None:
    """The signal that ends a process which runs a graph on ``feeds``; None where none does.

    ONNX Runtime divides by a size of 0 in some kernels (``Einsum`` of no batches, 1.32), and stops in others (``GRU``).
    """
    with tempfile.TemporaryDirectory(prefix="moeopt-") as aside:
        path = Path(aside) / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        code, _, _ = _child(proto, path, folder, [feeds], math.inf, math.inf)
    return -code if code < 0 else None


def _child(
    proto: OnnxModel, model: Path | bytes, folder: Path, calls: Sequence[Feeds], bytes_: float, seconds: float
) -> tuple[int, bytes, bytes]:
    """The exit code of a process that makes the ``calls`` within limits, and what it said.

    The word "time" is all that one says which took longer than ``seconds``.
    """
    with tempfile.TemporaryDirectory(prefix="moeopt-") as aside:
        path = model
        if isinstance(model, bytes):
            path = Path(aside) / "model.onnx"
            path.write_bytes(model)
        said = {
            "model": str(path),
            "folder": str(folder.resolve()),
            "bytes": int(min(bytes_, 1 << 62)),
            "seconds": min(seconds, 1e9),
            "threads": torch.get_num_threads(),
            "entries": {FLOAT_ROWS: "1"},
            "left_out": idle_optimizers(model, "cpu"),
            "operator": _operator(proto),
            "calls": [_written(feeds, Path(aside), n) for n, feeds in enumerate(calls)],
        }
        (Path(aside) / "calls.json").write_text(json.dumps(said))
        process = [sys.executable, "-c", _CHILD.read_text(encoding="utf-8")]
        with subprocess.Popen(process, cwd=aside, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as child:
            assert child.stdout is not None
            child.stdout.readline()  # it has started, which takes long where other processes have the machine
            try:
                out, err = child.communicate(timeout=min(STILL * seconds, _LONGEST))
            except subprocess.TimeoutExpired:
                out, err = b"time", b""
            finally:
                child.kill()
        return child.returncode, out, err


def _written(feeds: Feeds, folder: Path, number: int) -> dict[str, Any]:
    """The tensors of a call as files, and what they are: element type, bytes of an element, shape, file."""
    said = {}
    for at, (name, tensor) in enumerate(feeds.items()):
        path = folder / f"{number}.{at}"
        path.write_bytes(element_bytes(tensor.cpu()).numpy().tobytes())
        said[name] = [_element_type(tensor.dtype), tensor.element_size(), list(tensor.shape), path.name]
    return said


def _size(feeds: Feeds) -> int:
    return sum(t.numel() * t.element_size() for t in feeds.values())


def _more(name: str) -> str:
    return _WAY_OUT.format(name)


def _element_type(dtype: torch.dtype) -> int:
    from onnx_ir.tensor_adapters import from_torch_dtype

    return int(from_torch_dtype(dtype))
