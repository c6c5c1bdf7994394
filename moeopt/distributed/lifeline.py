"""Who is still there: each process tells the job's store, a few times a second, that it lives and how far it is.

A collective that fails says neither which process was lost nor why. The store does: a process that exited or was
stopped tells no more, one that raised said so, and one that waits elsewhere has begun fewer collectives.
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
"""Intervals in which a living process tells at least once that it lives."""


_SILENT = "exited or stopped: nothing is heard of it"


class Lifeline:
    """The part of one process; it tells from its making on until :meth:`close`.

    Args:
        store: of the whole job, this model's part of it.
        ranks: of the job, those that share the model.
        me: the rank of this process in the job.
        timeout: seconds that a collective may take; what is needed to find the lost process is kept aside of them.

    Attributes:
        calls: how many collectives this process has begun.
    """

    def __init__(self, store: PyObject, ranks: Sequence[int], me: int, timeout: float) -> None:
        self.me, self.others, self.calls = me, [r for r in ranks if r != me], 0
        self.interval = min(1.0, timeout / 24)
        self.collectives = timeout - (GRACE + 2) * self.interval
        self._tells, self._asks = store.clone(), store.clone()  # a connection each: one may wait, the other not
        self._done = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}
        self._tells.set(f"lives/{me}", "0 0")
        threading.Thread(target=_tell, args=(weakref.ref(self), self._done, self.interval), daemon=True).start()
        atexit.register(_exited, weakref.ref(self))

    def tell(self, number: int) -> None:
        """This process lives; ``number`` is another one each time."""
        self._tells.set(f"lives/{self.me}", f"{number} {self.calls}")

    def say(self, what: str) -> None:
        """Tell the others what became of this process; where nobody can be told any more, nobody is."""
        self._with_store(lambda: self._tells.set(f"said/{self.me}", json.dumps([self.calls, what])), 1.0)

    def agree(self, rank: int, reason: str) -> tuple[int, str]:
        """What all processes hold for the loss: that which the first of them found."""
        told = self._asks.compare_set("verdict", "", json.dumps([rank, reason]))
        found, why = json.loads(told)
        return int(found), str(why)

    def lost(self) -> tuple[int, str]:
        """The rank that a failed collective waited for, and what is known of it; takes a few intervals."""
        found: tuple[int, str] | None = self._with_store(self._look, 2 * GRACE * self.interval + 2.0)
        return found or self._without_store()

    def heard(self) -> tuple[int, str] | None:
        """A rank that is lost by now while this process works alone, and why; None where all are well."""
        found = self._with_store(lambda: (self._fallen(self.others),), self.collectives)
        return self._without_store() if found is None else found[0]

    def come(self, place: str) -> tuple[int, str] | None:
        """Wait until all ranks have come to ``place``, however long one of them works; the lost rank where one is."""

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
        """One of ``ranks`` that said what became of it, or whose life nothing was heard of for the timeout."""
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
        """Tell no more."""
        self._done.set()

    def _with_store(self, ask: PyObject, seconds: float) -> PyObject:
        """What ``ask`` gives; None where the store does not answer, which may last for ever."""
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
        except Exception:  # the store is gone; whoever asks it is told
            return
        del own


def _exited(lifeline: weakref.ref[Lifeline]) -> None:
    own = lifeline()
    if own is not None and not own._done.is_set():
        with contextlib.suppress(RuntimeError):  # an interpreter that ends may start no thread; silence tells as well
            own.say("exited")
        own.close()
