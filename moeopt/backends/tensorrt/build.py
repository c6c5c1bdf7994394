"""An ONNX file becomes a serialised engine, in a process of its own that may crash, hang or swell without harm.

build_plan(Job(...))  ->  Built, or EngineBuildError with the block that the builder stopped at
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeopt.backends.tensorrt.layers import Layer, read_log
from moeopt.backends.tensorrt.product import REGULAR
from moeopt.backends.tensorrt.target import Target
from moeopt.errors import EngineBuildError
from moeopt.options import inherited
from moeopt.sizes import in_words

WORKER = Path(__file__).with_name("worker.py")
ProfileRanges = Mapping[str, Sequence[Sequence[int]]]
"""The least, the best and the largest shape of each input with free sizes."""
_INHERITED = (
    "PATH",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "CUDA_PATH",
    "HOME",
    "TMPDIR",
    "SYSTEMROOT",
)
"""No others: each variable moves the addresses that the order of a plan's numbers hangs on."""
_KEPT = 400
"""Lines of the log that an error carries."""


@dataclass(frozen=True)
class Job:
    """One engine to build.

    Attributes:
        model: a ``.onnx`` file, its weights beside it; ``plan``: where the engine is written.
        profiles: which sizes it shall run in.
        blocks: module paths of the expert blocks, whose nodes are named after them.
        tf32: let float32 matmuls round to TF32.
        timing_cache: a file that TensorRT reads if it exists, and writes; TensorRT for RTX times nothing.
        seconds, bytes: limits of the builder's time and resident memory; None for bytes is what is free here.
    """

    model: Path
    plan: Path
    target: Target
    profiles: Sequence[ProfileRanges] = ()
    blocks: Sequence[str] = ()
    tf32: bool = False
    timing_cache: Path | None = None
    seconds: float = 3600.0
    bytes: int | None = None


@dataclass(frozen=True)
class BuiltPlan:
    """A written engine.

    Attributes:
        sha256, bytes: of the plan.
        version: of the package that built it; ``flags``: its builder flags that were set.
        inputs, outputs: name, dtype and shape as the network has them, free sizes -1.
        layers: after all fusions; ``activation_bytes``: planned for the largest sizes.
        peak_bytes: the most resident memory that the builder was seen with.
    """

    sha256: str
    bytes: int
    version: str
    flags: tuple[str, ...]
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    layers: tuple[Layer, ...]
    activation_bytes: int | None
    weights_bytes: int | None
    seconds: float
    peak_bytes: int
    profiles: Sequence[ProfileRanges] = field(default_factory=tuple)


def build_plan(job: Job, say: Callable[[str], None] = lambda line: None) -> BuiltPlan:
    """Build ``job.plan``.

    Raises:
        EngineBuildError: the builder refused the graph, or did not live to the end; the file is not written then.
    """
    say(f"building the engine for {job.target} with {job.target.product}")
    with tempfile.TemporaryDirectory(prefix="moeopt-build-") as name:
        folder = Path(name)
        task = {
            "product": job.target.product,
            "sm": job.target.sm,
            "model": str(job.model.resolve()),
            "plan": str(folder / "engine.plan"),
            "log": str(folder / "log"),
            "result": str(folder / "result.json"),
            "profiles": [{n: [list(shape) for shape in shapes] for n, shapes in p.items()} for p in job.profiles],
            "tf32": job.tf32,
            "timing_cache": _cache(job),
            "sys_path": [str(Path(p).resolve()) for p in sys.path],
        }
        (folder / "job.json").write_text(json.dumps(task))
        ended, peak = _run(folder, job)
        log = _text(folder / "log")
        result = json.loads(_text(folder / "result.json") or "null")
        if ended or result is None or "errors" in result:
            raise _error(job, ended, result, log, _text(folder / "output"))
        plan = (folder / "engine.plan").read_bytes()
        _place(folder / "engine.plan", job.plan)
    facts = read_log(log)
    return BuiltPlan(
        sha256=hashlib.sha256(plan).hexdigest(),
        bytes=len(plan),
        version=result["version"],
        flags=tuple(result["flags"]),
        inputs=tuple(result["inputs"]),
        outputs=tuple(result["outputs"]),
        layers=facts.layers,
        activation_bytes=facts.activation_bytes,
        weights_bytes=facts.weights_bytes,
        seconds=result["seconds"],
        peak_bytes=peak,
        profiles=tuple(job.profiles),
    )


def stopped_at(log: str, blocks: Sequence[str]) -> str:
    """The block that the errors of a log name, or its last lines where it has no errors; "" where none is named.

    A line about a region, "{ForeignNode[first...last]}", or about more blocks than one tells nothing.
    """
    lines = log.split("\n")
    errors = [line for line in reversed(lines) if line.startswith("E:")]
    for line in errors or lines[:-40:-1]:
        named = {b for b in blocks if re.search(rf"(?<![\w.]){re.escape(b)}/", line)}
        if len(named) == 1 and "..." not in line:
            return named.pop()
    return ""


def _run(folder: Path, job: Job) -> tuple[str, int]:
    """Run the worker to its end, or to ours: how it ended ("" is well) and its peak resident bytes."""
    limit = job.bytes if job.bytes is not None else _free_bytes()
    with open(folder / "output", "wb") as output:
        child = subprocess.Popen(
            [sys.executable, str(WORKER), "job.json"],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder, start_new_session=True,
            env={**inherited(*_INHERITED), "PYTHONHASHSEED": "0"},
        )  # fmt: skip
        started, peak, pause = time.monotonic(), 0, 0.01
        try:
            while True:
                try:
                    code = child.wait(pause)
                    break
                except subprocess.TimeoutExpired:
                    pause = min(2 * pause, 0.25)
                peak = max(peak, _resident(child.pid))
                if limit is not None and peak > limit:
                    return f"took more than {in_words(limit)} of memory and was stopped", peak
                if time.monotonic() - started > job.seconds:
                    return f"did not end within {job.seconds:g} seconds and was stopped", peak
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})", peak
    return ("" if code == 0 else f"stopped with exit code {code}"), peak


def _error(job: Job, ended: str, result: dict[str, Any] | None, log: str, output: str) -> EngineBuildError:
    """What went wrong, in one sentence with the block, the node and the builder's own words."""
    lines = log.split("\n")
    errors = [] if ended or result is None else result["errors"]
    node = next((e["node"] for e in errors if e.get("node")), "")
    block = next((b for b in job.blocks if node.startswith(f"{b}/")), "") or stopped_at(log, job.blocks)
    who = f"{job.target.product}, building for {job.target},"
    if ended:
        last = next((x for x in reversed([*lines, *output.splitlines()]) if x.strip()), "nothing")
        why = f"{who} {ended}; the last it said was: {last[:300]}"
    elif errors:
        at = f" at node {node} ({errors[0]['op']})" if node else ""
        why = f"{who} does not take the graph{at}: {errors[0]['text'][:400]}"
    else:
        said = next((x[3:] for x in lines if x.startswith("E:")), "it gives no reason")
        why = f"{who} does not build the graph: {said[:400]}"
    where = f"block {block}: " if block else ""
    return EngineBuildError(f"{where}{why}", block, "\n".join([*lines[-_KEPT:], *output.splitlines()[-_KEPT:]]))


def _cache(job: Job) -> str | None:
    if job.timing_cache is None or job.target.product != REGULAR:
        return None
    return str(Path(job.timing_cache).resolve())


def _place(made: Path, plan: Path) -> None:
    """Move a finished plan where it belongs, in one step also from another disk."""
    try:
        os.replace(made, plan)
    except OSError:
        aside = plan.with_name(f".{plan.name}.{os.getpid()}")
        aside.write_bytes(made.read_bytes())
        os.replace(aside, plan)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where the system does not say (then only time is limited)."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def _free_bytes() -> int | None:
    """What can be taken here before the system kills processes of its own choice; None where it is not known."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found.group(1)) * 1000 if found else None
