"""How much time and memory a bundle from elsewhere may take while it is loaded, verified and called."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from moeopt.errors import UsageError

SECONDS, SECONDS_PER_BYTE = 10.0, 1 / 50e6
BYTES, TIMES = 2 << 30, 8
STILL = 20


@dataclass(frozen=True)
class LoadLimits:
    """What a bundle may ask of this machine; more is a ``BundleError``.

    Args:
        seconds: time of the self-test and of the golden runs, as :class:`TimeLimit` counts it: a machine that is busy
            with other work takes none of it. None is 10 s, and 1 s for each 50 MB of the bundle's files.
        bytes: memory of the values that a graph computes, weights not counted: at any moment of a call of a torch
            bundle, and in the self-test and the golden runs of an ONNX bundle. None is 2 GiB, and 8 times the bytes of
            the bundle's files and of the call's inputs.

    ``math.inf`` is no limit.

    Raises:
        UsageError: a limit that is no positive number.
    """

    seconds: float | None = None
    bytes: float | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "bytes"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and value > 0 and not math.isnan(value)):
                raise UsageError(f"LoadLimits.{name} is {value!r}: give a positive number, or None for the default")

    def seconds_for(self, files: int) -> float:
        """The time for a bundle whose files have ``files`` bytes."""
        return SECONDS + files * SECONDS_PER_BYTE if self.seconds is None else self.seconds

    def bytes_for(self, files: int, inputs: int = 0) -> float:
        """The memory for a bundle of ``files`` bytes that is called with ``inputs`` bytes."""
        return BYTES + TIMES * (files + inputs) if self.bytes is None else self.bytes


DEFAULT = LoadLimits()


def checked_limits(given: LoadLimits | None) -> LoadLimits:
    """``given``, or the defaults for None; ``UsageError`` for what is no ``LoadLimits``."""
    if given is not None and not isinstance(given, LoadLimits):
        raise UsageError(f"limits={given!r:.60} is no LoadLimits: give one, like moeopt.LoadLimits(seconds=60)")
    return given or DEFAULT


class TimeLimit:
    """Seconds that begin now. They are over when as many have passed on the clock and as CPU time of this process, all
    its threads together; or ``STILL`` times as many on the clock, for a run that waits and computes nothing.

    So a machine that gives this process a tenth of a core gives it ten times as long, and threads that compute side by
    side make the clock decide.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self._clock, self._cpu = seconds, time.monotonic(), time.process_time()

    @property
    def over(self) -> bool:
        clock, cpu = time.monotonic() - self._clock, time.process_time() - self._cpu
        return min(clock, cpu) >= self.seconds or clock >= STILL * self.seconds

    def watch(self, ended: threading.Event, end: Callable[[], None]) -> None:
        """Wait until ``ended`` is set, and call ``end`` where the time is over first."""
        while not self.over:
            if ended.wait(min(max(self.seconds / 20, 0.005), 0.25)):
                return
        if not ended.is_set():
            end()


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 1 << 10, "mib": 1 << 20,
          "gib": 1 << 30, "tib": 1 << 40}  # fmt: skip


def as_bytes(name: str, value: str | float) -> int:
    """A size like ``"8GB"``, ``"512 MiB"`` or a number of bytes; ``UsageError`` names the argument ``name``."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", str(value).lower())
    size = 0.0
    if found is not None and found[2] in _UNITS and not isinstance(value, bool):
        size = float(found[1]) * _UNITS[found[2]]
    if size < 1:
        raise UsageError(f"{name}={value!r} is no size: give one like '8GB', '512MB', or a number of bytes")
    return int(size)
