"""The operator ``moeopt::Experts`` for ONNX Runtime's CPU: the library with the native kernel, proved before its use.

The library declares the few entries of ONNX Runtime's C interface that it calls by their place in a table. That the
places are right, for this very runtime, is shown in a child process: each entry is used there by sessions whose answers
are known. A child that crashes or errs costs this process nothing; the engine's graph of plain ONNX Runtime runs then.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from moeopt.backends.onnxrt.lowerings import by_name
from moeopt.backends.onnxrt.lowerings.native import Native
from moeopt.backends.onnxrt.providers import runtime
from moeopt.backends.onnxrt.session import ISA_ENTRY
from moeopt.errors import UsageError
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_format import INT4_BLOCK32, INT8_CHANNEL, WeightFormat
from moeopt.lower.onnx.assemble import one_op
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.ops.expert_weights import ExpertWeights, ListExpertWeights
from moeopt.ops.native.library import Library, describe, library
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices
from moeopt.ops.reference import experts_reference
from moeopt.options import cache_directory
from moeopt.value_types import PyObject

SECONDS = 120
"""After which the child is given up."""
_CHILD = Path(__file__).with_name("custom_op_child.py")
_asked: dict[Path, str] = {}


def native_library() -> Library | None:
    """The library with the operator, proved in a child process once; None where there is none, or it is wrong here."""
    found = library()
    return found if found is not None and not _wrong(found) else None


def why_not() -> str:
    """Why ONNX Runtime has no native operator here; "" where it has."""
    found = library()
    return describe() if found is None else _wrong(found)


def forget() -> None:
    """Ask anew; for tests."""
    _asked.clear()


def _wrong(library: Library) -> str:
    if library.path not in _asked:
        mark = _mark(library)
        if mark is not None and mark.is_file():
            _asked[library.path] = ""
        else:
            _asked[library.path] = ask_child(library.path, library.bit)
            if mark is not None and not _asked[library.path]:
                mark.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                mark.touch()
    return _asked[library.path]


def _mark(library: Library) -> Path | None:
    """The empty file that says that this library answered rightly in this runtime; its name has both."""
    folder = cache_directory()
    if folder is None:
        return None
    ort = runtime()
    core = sorted(Path(ort.__file__).parent.glob("capi/*pybind11_state*"))
    facts = [(path.name, (info := path.stat()).st_size, info.st_mtime_ns) for path in (library.path, *core)]
    text = json.dumps([ort.__version__, library.isa, str(library.path), facts])
    return folder / "native" / f"proved-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def ask_child(path: Path, isa: int) -> str:
    """What the operator of the library ``path`` does wrong in a process of its own, in words; "" when nothing."""
    with tempfile.TemporaryDirectory(prefix="moeopt-") as folder:
        try:
            _write_questions(Path(folder), path, isa)
            done = subprocess.run(
                [sys.executable, "-c", _CHILD.read_text(encoding="utf-8")],
                cwd=folder, capture_output=True, text=True, errors="replace", timeout=SECONDS,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as err:
            return f"the operator could not be tried in a process of its own ({type(err).__name__})"
    if done.returncode < 0:
        return f"the operator ends the process that runs it (signal {-done.returncode})"
    lines = done.stdout.strip().splitlines()
    if lines[-1:] == ["good"]:
        return ""
    said = (lines or done.stderr.strip().splitlines() or ["it says nothing"])[-1]
    return f"the operator is not right in onnxruntime {runtime().__version__}: {said[:300]}"


def _write_questions(folder: Path, path: Path, isa: int) -> None:
    """Blocks with their answers, of each way to store weights; a block and a call that must be refused, with words."""
    import onnx_ir as ir

    said: dict[str, Any] = {"library": str(path), "entry": [ISA_ENTRY, str(isa)], "blocks": []}
    for number, (base, spec, format) in enumerate(_QUESTIONS):
        site, feeds, want = _block(spec, format, seed=number)
        proto = ir.to_proto(one_op(site, Native(by_name(base))))
        (folder / f"{number}.onnx").write_bytes(proto.SerializeToString())
        for name, tensor in (*feeds.items(), ("y", want)):
            (folder / f"{number}.{name}").write_bytes(tensor.numpy().tobytes())
        shapes = {name: list(tensor.shape) for name, tensor in (*feeds.items(), ("y", want))}
        said["blocks"].append({"model": f"{number}.onnx", "shapes": shapes})
        if number == 0:
            attribute = next(a for node in proto.graph.node for a in node.attribute if a.name == "experts")
            attribute.i -= 1
            (folder / "wrong.onnx").write_bytes(proto.SerializeToString())
    (folder / "questions.json").write_text(json.dumps(said))


_QUESTIONS = (
    ("unrolled", ExpertsSpec(gate_max=0.5, activation="swish", alpha=1.5), None),
    ("dense", ExpertsSpec(rows="plain", activation="gelu", out_norm_eps=1e-3), None),
    ("moe-expand", ExpertsSpec(out_of_range="identity"), None),
    ("unrolled-codes", ExpertsSpec(), INT4_BLOCK32),
    ("unrolled-floats", ExpertsSpec(rows="plain", activation="relu"), INT8_CHANNEL),
)
"""The base lowering, the experts' function, and the format of their weights where they are codes."""


def _block(
    spec: ExpertsSpec, format: WeightFormat | None, seed: int
) -> tuple[ExpertsNode, dict[str, torch.Tensor], torch.Tensor]:
    """A block with enough work for a second thread, what it is asked, and the definition's answer."""
    E, K, H, I, T = 4, 2, 96, 64, 40
    rng = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(*shape, generator=rng) / shape[-1] ** 0.5 for _ in range(E)]

    O = 2 * I if spec.gated else I
    norm = some(H) if spec.out_norm_eps is not None else [None] * E
    bank: ExpertWeights = ListExpertWeights([some(O, H)], some(H, I), [some(O)], some(H), norm)
    if format is not None:
        w_in, w_out = (QuantizedMatrices.of([quantize(w, format) for w in some(*shape)]) for shape in ((O, H), (H, I)))
        bank = QuantizedExpertWeights([w_in], w_out, [some(O)], some(H))
    site = ExpertsNode("block", bank, spec, torch.float32, K, torch.float32)
    x = torch.randn(T, H, generator=rng)
    ids = torch.randint(-1, E + 1, (T, K), generator=rng)
    weights = torch.rand(T, K, generator=rng)
    return site, {"x": x, "ids": ids, "weights": weights}, experts_reference(x, ids, weights, bank, spec)


def register(options: PyObject) -> None:
    """Let sessions of ``options``, an ``onnxruntime.SessionOptions``, find the operator; once for each.

    Raises:
        UsageError: there is none on this machine; the message says why.
    """
    found = native_library()
    if found is None:
        raise UsageError(f"the graph holds moeopt's native operator, and there is none here: {why_not()}")
    try:
        options.get_session_config_entry(ISA_ENTRY)
    except RuntimeError:  # it has no such entry: these options are new
        options.add_session_config_entry(ISA_ENTRY, str(found.bit))
        options.register_custom_ops_library(os.fspath(found.path))
