"""Heartbeats: each process writes to the job's store, about once a second, how many collectives it has begun.

The error of a failed collective names neither the lost process nor the cause. The store does: a process that exited or
was stopped writes no heartbeat, a process that raised has written its error, and a process that waits elsewhere has
begun fewer collectives.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import threading
import time
import weakref
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from moeopt.value_types import PyObject

GRACE = 4
"""Intervals in which a living process writes at least one heartbeat."""


_SILENT = "exited or stopped: nothing is heard of it"


class Lifeline:
    """The heartbeats of one process, from construction until :meth:`close`, and what it reads of the others.

    Args:
        store: this model's part of the job's store.
        ranks: the ranks of the job that share the model.
        me: the rank of this process in the job.
        timeout: seconds that a collective may take, including the time to find a lost process.

    Attributes:
        calls: how many collectives this process has begun.
    """

    def __init__(self, store: PyObject, ranks: Sequence[int], me: int, timeout: float) -> None:
        self.me, self.others, self.calls = me, [r for r in ranks if r != me], 0
        self.interval = min(1.0, timeout / 24)
        self.collectives = timeout - (GRACE + 2) * self.interval
        self._tells, self._asks = store.clone(), store.clone()  # a read may block, and a heartbeat must not
        self._done = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}
        self._tells.set(f"lives/{me}", "0 0")
        threading.Thread(target=_tell, args=(weakref.ref(self), self._done, self.interval), daemon=True).start()
        atexit.register(_exited, weakref.ref(self))

    def tell(self, number: int) -> None:
        """Write a heartbeat; ``number`` differs each time."""
        self._tells.set(f"lives/{self.me}", f"{number} {self.calls}")

    def say(self, what: str) -> None:
        """Write what became of this process, if the store still answers."""
        self._with_store(lambda: self._tells.set(f"said/{self.me}", json.dumps([self.calls, what])), 1.0)

    def agree(self, rank: int, reason: str) -> tuple[int, str]:
        """The loss that all processes report: the one that the first process found."""
        told = self._asks.compare_set("verdict", "", json.dumps([rank, reason]))
        found, why = json.loads(told)
        return int(found), str(why)

    def lost(self) -> tuple[int, str]:
        """The rank that a failed collective waited for, and why it is lost; takes a few intervals."""
        found: tuple[int, str] | None = self._with_store(self._look, 2 * GRACE * self.interval + 2.0)
        return found or self._without_store()

    def heard(self) -> tuple[int, str] | None:
        """A rank that was lost while this process worked alone, and why; None where none was."""
        found = self._with_store(lambda: (self._fallen(self.others),), self.collectives)
        return self._without_store() if found is None else found[0]

    def come(self, place: str) -> tuple[int, str] | None:
        """Wait until all ranks have reached ``place``, however long one works; returns a lost rank, if there is one."""

        def ask() -> PyObject:
            away = [rank for rank in self.others if not self._asks.check([f"at/{place}/{rank}"])]
            return away, self._fallen(away)

        self._with_store(lambda: self._asks.set(f"at/{place}/{self.me}", ""), self.collectives)
        while True:
            found = self._with_store(ask, self.collectives)
            if found is None:
                return self._without_store()
            away, lost = found
            if lost or not away:
                return None if lost is None else (int(lost[0]), str(lost[1]))
            time.sleep(self.interval)

    def _fallen(self, ranks: Sequence[int]) -> tuple[int, str] | None:
        """One of ``ranks`` that wrote an error, or wrote no heartbeat for the timeout."""
        if told := self._read("verdict"):
            rank, reason = json.loads(told)
            return int(rank), str(reason)
        now = time.monotonic()
        for rank in ranks:
            if said := self._read(f"said/{rank}"):
                return self.agree(rank, json.loads(said)[1])
            told = self._read(f"lives/{rank}")
            if rank not in self._seen or self._seen[rank][0] != told:
                self._seen[rank] = told, now
            elif now - self._seen[rank][1] > self.collectives:
                return self.agree(rank, _SILENT)
        return None

    def _without_store(self) -> tuple[int, str]:
        host = 0 if 0 in self.others else self.others[0]
        return host, "exited or stopped, and with it the store of the job, which does not answer any more"

    def close(self) -> None:
        """Write no further heartbeat."""
        self._done.set()

    def _with_store(self, ask: PyObject, seconds: float) -> PyObject:
        """The result of ``ask``; None where the store does not answer within ``seconds``."""
        answers: SimpleQueue[PyObject] = SimpleQueue()

        def run() -> None:
            try:
                answers.put(ask())
            except Exception:  # whatever a broken connection raises
                answers.put(None)

        threading.Thread(target=run, daemon=True).start()
        try:
            return answers.get(timeout=seconds)
        except Empty:
            return None

    def _read(self, key: str) -> str:
        return self._asks.get(key).decode() if self._asks.check([key]) else ""

    def _look(self) -> tuple[int, str]:
        before = {rank: self._read(f"lives/{rank}") for rank in self.others}
        alive: dict[int, int] = {}
        started = time.monotonic()
        while len(alive) < len(self.others) and time.monotonic() - started < GRACE * self.interval:
            time.sleep(self.interval / 5)
            if told := self._read("verdict"):
                rank, reason = json.loads(told)
                return int(rank), str(reason)
            for rank in self.others:
                if said := self._read(f"said/{rank}"):
                    calls, what = json.loads(said)
                    if calls <= self.calls:
                        return self.agree(rank, what)
                now = self._read(f"lives/{rank}")
                if now != before[rank]:
                    alive[rank] = int(now.split()[1])
        if silent := [rank for rank in self.others if rank not in alive]:
            came = before[silent[0]]
            why = _SILENT if came else "did not come to moeopt.distribute in time"
            return self.agree(silent[0], why)
        behind = min(self.others, key=lambda rank: alive[rank])
        return self.agree(
            behind, "lives, and did not take part in time: it waits elsewhere, or computes something else"
        )


def _tell(lifeline: weakref.ref[Lifeline], done: threading.Event, interval: float) -> None:
    number = 0
    while not done.wait(interval):
        own, number = lifeline(), number + 1
        if own is None:
            return
        try:
            own.tell(number)
        except Exception:  # the store is gone, which the next read reports
            return
        del own


def _exited(lifeline: weakref.ref[Lifeline]) -> None:
    own = lifeline()
    if own is not None and not own._done.is_set():
        with contextlib.suppress(RuntimeError):  # no thread can be started at exit: the missing heartbeats say as much
            own.say("exited")
        own.close()
