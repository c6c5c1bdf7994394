"""Which of several equal ways is the fastest on this machine: measured once, in milliseconds, and remembered.

No table of one machine decides on another. A question ("which spelling of a product with 16 rows?") is measured
where it is first asked, the ways in turns, and its answer kept in memory and in the user's cache directory, in one
file for each machine and version: its CPU model, torch's version and instruction set, the number of threads, and the
hash of the CPU kernel's sources, for that kernel is one of the ways. An answer that was stored is not measured again,
so a process computes as the one before it did. ``MOEOPT_MEASURE=off`` measures and reads nothing: each question then
has its safe default.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from moeopt.ops.native.compile import digest_of_sources
from moeopt.ops.stopwatch import Stopwatch
from moeopt.options import cache_directory, cpu_limits, measuring

TimedCall = Callable[[], object]
Way = TimedCall | Sequence[TimedCall]
"""What is timed. Of several calls each counts the same, however long it takes: their geometric mean is compared."""

ADVANTAGE = 1.12
"""By how much a way must be faster than the default to be taken: a tie or a disturbed clock changes nothing."""

TURNS = 5
MORE_TURNS = 10
"""Further turns where the answer is close and a turn is short."""
SHORT = 5e-3
"""Seconds of one turn of all ways."""
CLOSE = 1.2
"""A gain that is so near to the advantage that is asked for."""
SCHEMA = 4
GPU_FLUSH = 1 << 30
"""Bytes written before a call on a GPU, or twice its L2 if that is less: in a model, other layers ran before."""

_answers: dict[tuple[str, str], str] = {}
_lock = threading.RLock()  # a way may itself ask which spelling it shall take


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # another thread of the parent may have held the lock


def fastest(
    question: str,
    ways: Callable[[], Mapping[str, Way]],
    default: str,
    advantage: float = ADVANTAGE,
    device: torch.device | None = None,
) -> str:
    """The name of the fastest of ``ways`` on this machine.

    Args:
        question: names what is asked, everything that may change the answer included, but for the machine.
        ways: makes the ways by name, ``default`` among them; called only if the answer is not known yet.
        default: the answer without a measurement, and if no other way is ``advantage`` times as fast.
        device: where the ways run, if that is a GPU: its own events time them, and its name is part of the question.
    """
    if not measuring():
        return default
    timer: Callable[[], Timer] = _on_host
    if device is not None and device.type == "cuda":
        question = f"{torch.cuda.get_device_name(device)}: {question}"
        timer = functools.partial(_on_gpu, device)
    key = (machine(), question)
    found = _answers.get(key)
    if found is None:
        with _lock:
            found = _answers.get(key) or _stored(key[0]).get(question)
            if found is None:
                with _default_device():
                    found = _measure(ways(), default, advantage, timer())
                _store(key[0], question, found)
            _answers[key] = found
    return found


def _default_device() -> contextlib.AbstractContextManager[object]:
    """The CPU where the caller has another default; to name the one that is there would slow each small call down."""
    return contextlib.nullcontext() if torch.empty(0).is_cpu else torch.device("cpu")


def machine() -> str:
    """What the answers depend on, as one line."""
    return f"{_cpu()}; {torch.get_num_threads()} threads; schema {SCHEMA}"


@functools.cache
def _cpu() -> str:
    limits = ", ".join(f"{name}={value}" for name, value in cpu_limits().items())
    capability = torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__} {capability}; kernel {digest_of_sources()}"
    return f"{cpu_model()}; {versions}" + (f" ({limits})" if limits else "")


@functools.cache
def cpu_model() -> str:
    """The CPU's name, with its family, model and stepping where the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return f"{platform.processor() or 'unknown CPU'} {platform.machine()}"
    facts = dict(re.findall(r"^(model name|cpu family|model|stepping|CPU part)\s*: (.+)$", text, re.M))
    numbers = [facts[name] for name in ("cpu family", "model", "stepping", "CPU part") if name in facts]
    return f"{facts.get('model name', platform.machine())} ({' '.join(numbers)})"


Timer = Callable[[TimedCall], float]
"""Makes a call and gives its seconds."""


def _on_host() -> Timer:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(call: TimedCall) -> float:
        start = clock()
        call()
        return clock() - start

    return seconds


def _on_gpu(device: torch.device) -> Timer:
    return Stopwatch(device, GPU_FLUSH).seconds


def _measure(ways: Mapping[str, Way], default: str, advantage: float, seconds_of: Timer | None = None) -> str:
    """The way that in the middle of the turns gains most on the default; a way that raises is none."""
    seconds_of = seconds_of or _on_host()
    took: dict[str, list[list[float]]] = {}
    with torch.no_grad():
        for turn in range(TURNS + 1 + MORE_TURNS):
            if turn == TURNS + 1 and not _is_short_and_close(took, default, advantage):
                break
            for name, way in ways.items():
                if turn and name not in took:
                    continue
                try:
                    seconds = [seconds_of(call) for call in ([way] if callable(way) else way)]
                except RuntimeError:  # a dtype or a layout that this CPU's library has no kernel for
                    took.pop(name, None)
                    continue
                # the first turn warms up; its time is no candidate
                took[name] = [] if turn == 0 else [*took[name], seconds]
    if default not in took:
        medians = {name: _mean([statistics.median(call) for call in _by_call(turns)]) for name, turns in took.items()}
        return min(medians, key=medians.__getitem__, default=default)
    # turn by turn, as what else runs on the machine slows whole turns, and seldom one way alone
    gains = {name: _gain(took[default], turns) for name, turns in took.items()}
    quickest = max(gains, key=gains.__getitem__)
    return quickest if gains[quickest] > advantage else default


def _is_short_and_close(took: dict[str, list[list[float]]], default: str, advantage: float) -> bool:
    """Whether more turns may change the answer, and take milliseconds: a busy machine disturbs a turn by a fifth."""
    if default not in took or sum(sum(turns[-1]) for turns in took.values()) > SHORT:
        return False
    gains = [_gain(took[default], turns) / advantage for name, turns in took.items() if name != default]
    return bool(gains) and 1 / CLOSE < max(gains) < CLOSE


def _gain(slow: list[list[float]], quick: list[list[float]]) -> float:
    """How many times as long the first way takes as the second: of each call the median of the turns' ratios."""
    calls = zip(_by_call(slow), _by_call(quick), strict=True)
    return _mean([statistics.median(a / max(b, 1e-9) for a, b in zip(*both, strict=True)) for both in calls])


def _by_call(turns: list[list[float]]) -> list[tuple[float, ...]]:
    """The seconds of each call in every turn, of those of each turn in every call."""
    return list(zip(*turns, strict=True))


def _mean(numbers: Sequence[float]) -> float:
    """The geometric mean; a call too short for the clock counts 1 ns."""
    return math.exp(statistics.fmean(math.log(max(one, 1e-9)) for one in numbers))


def _file(about: str) -> Path | None:
    folder = cache_directory()
    return None if folder is None else folder / "measured" / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


def _stored(about: str) -> dict[str, str]:
    """The answers on disk for this machine; none where the file is missing, damaged or another machine's."""
    path = _file(about)
    try:
        data = json.loads(path.read_text()) if path is not None else {}
        answers = data["answers"] if data.get("machine") == about else {}
        return {k: v for k, v in answers.items() if isinstance(v, str)}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def _store(about: str, question: str, answer: str) -> None:
    """Add one answer to the file, whole or not at all; a folder that cannot be written to stays without."""
    path = _file(about)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"machine": about, "answers": {**_stored(about), question: answer}}
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(data, file, indent=1, sort_keys=True)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
