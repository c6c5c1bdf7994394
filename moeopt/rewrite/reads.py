"""What a block's forward reads besides its modules: taken once, compared at each call.

Configuration objects, tables, globals, closures, defaults, class attributes: ``observe`` finds by a few runs which
code the forward consists of, ``Reads`` keeps the plain values that this code can reach (``moeopt.rewrite.walk``), as
text, so that it can be pickled. A place whose value another run changed is the forward's own and is left out. One that
every call changes is an effect, which rewritten code has not: a log, a tensor, whatever the block's modules hold is
declined, and a number outside of them (a count of calls) is named for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from moeopt.errors import Declined
from moeopt.obstacles import Rank
from moeopt.rewrite.executed_code import ExecutedCode, observing
from moeopt.rewrite.guard_expression import GuardExpression
from moeopt.rewrite.value_text import Spelled
from moeopt.rewrite.walk import MOST, Walk
from moeopt.rewrite.walk_live import read_live

_SHOWN = 60
_NUMBERS = ("int", "float", "bool")
Entries = dict[str, Spelled]


@dataclass
class Reads:
    """The code of one block's forward, and what it could read when it was verified.

    Attributes:
        ran, names: what the code names.
        entries: (type, text) at each place.
        ignored: places that the forward itself changes.
        whole: places of modules outside the block that the forward calls.
        kept: paths of submodules that are still called, whose own state is live.
        written: (path, attribute) pairs that the forward sets on its modules.
    """

    ran: ExecutedCode
    kept: tuple[str, ...]
    written: frozenset[tuple[str, str]]
    names: frozenset[str] = frozenset()
    entries: dict[str, Spelled] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    effects: tuple[str, ...] = ()
    whole: frozenset[str] = frozenset()
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Without the modules' globals: they are found again by name."""
        return self.__dict__ | {"tables": {}}

    def numbers(self) -> set[int]:
        """The whole numbers that its code holds or reads."""
        return {*self.ran.numbers, *(int(text) for kind, text in self.entries.values() if kind == "int")}

    def sequences(self) -> set[tuple[int, ...]]:
        """The sequences of whole numbers that its code holds or reads: lists, lists of lists."""
        found: dict[str, list[int]] = {}
        for place, (kind, text) in self.entries.items():
            while kind == "int" and place.endswith("]"):
                place = place.rpartition("[")[0]
                found.setdefault(place, []).append(int(text))
        return {*self.ran.sequences, *(tuple(numbers) for numbers in found.values() if len(numbers) > 1)}

    def walk(
        self, root: nn.Module, guard: GuardExpression, links: Callable[[str], GuardExpression],
        called: Iterable[int] = (), *, code: bool = True,
    ) -> Walk:  # fmt: skip
        """What ``root`` and the code reach now.

        Args:
            guard: gets a term for each link.
            links: by a module's path, the guard that gets the terms of that module's own attributes.
            called: ids of the modules that a run called, where ``whole`` is not known yet.
            code: whether to follow classes and globals too.
        """
        walk = Walk(root, self, guard, called=frozenset(called))
        kept = {p for p, _ in root.named_modules() if any(p == k or p.startswith(f"{k}.") for k in self.kept)}
        modules = [(p, m, {name for at, name in self.written if at == p}) for p, m in root.named_modules()]
        for path, module, _ in modules if code else ():
            if path not in kept:
                walk.klass(type(module))
        for path, module, written in modules:
            if path in kept:
                read_live(walk, path, module, written, links(path))
            else:
                walk.module(path, module, written, links(path))
        if code:
            walk.functions()
        return walk

    def difference(self, walk: Walk) -> str:
        """What is another than it was; "" when nothing is."""
        for place, (kind, text) in self.entries.items():
            now = walk.entries.get(place)
            if now is None:
                return f"{place}, which its code reads, was removed"
            if now != (kind, text):
                if (
                    kind in ("function", "class", "same", "own", "tensor", "array", "object")
                    or now[0] != kind
                    and not text
                ):
                    return f"{place}, which its code reads, is not what was verified"
                return f"{place}, which its code reads, is {_short(now)} and was {_short((kind, text))}"
        added = next((place for place in walk.entries if place not in self.entries), None)
        return (
            "" if added is None else f"{added}, which its code reads, is {_short(walk.entries[added])} and was absent"
        )


def _short(spelled: Spelled) -> str:
    text = spelled[1] or spelled[0]
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _effects(changed: Iterable[str], root: nn.Module, before: Entries, after: Entries) -> tuple[str, ...]:
    """The numbers outside the block ``root`` among ``changed`` that a call which was made before has changed again.

    Args:
        before, after: the entries before and after that call.

    Raises:
        Declined: for any other place.
    """
    again = sorted((p for p in changed if before.get(p) != after.get(p)), key=len)
    own = {f"{path}.{name}" if path else name for path, m in root.named_modules() for name in m.__dict__}
    for place in again:
        pair = [e[place] for e in (before, after) if place in e]
        inside = any(place.startswith(name) and place[len(name) : len(name) + 1] in ("", ".", "[") for name in own)
        if not inside and all(kind in _NUMBERS for kind, _ in pair):
            continue
        told = all(kind not in ("tensor", "array") for kind, _ in pair)  # of these the text is a digest
        then = f" ({' and then '.join(map(_short, pair))})" if told else ""
        raise Declined(
            f"its forward writes to {place} at each call{then}, which the rewritten code would leave out; return "
            "the value, or store a tensor in an attribute of the module itself (self.last = ...)",
            rank=Rank.FORBIDS,
        )
    return tuple(again)


def observe(
    root: nn.Module, kept: Iterable[str], written: Iterable[tuple[str, str]], runs: Iterable[Callable[[], Any]]
) -> Reads:
    """Call each of ``runs``, which run ``root``'s forward, and take what that code can read.

    Args:
        kept: paths of submodules that will be called as they are.
        written: (path, attribute) pairs that the forward sets.

    Raises:
        Declined: its code reaches more than ``MOST`` places, writes to one of them at each call, or works with other
            threads.
    """
    kept = tuple(kept)
    runs = list(runs)
    with observing([root.get_submodule(path) for path in kept]) as observed:
        runs[0]()
    reads = Reads(observed.ran(), kept, frozenset(written), tables=observed.modules())
    if threads := reads.ran.threads:
        raise Declined(
            f"its forward works with other threads ({', '.join(threads[:3])}), in which neither ops nor questions are "
            "seen; compute it in the forward itself"
        )
    reads.names = reads.ran.names
    unused = GuardExpression()
    walk = reads.walk(root, unused, lambda path: unused, observed.called)
    for _ in range(4):  # strings may name attributes, which may hold strings
        if walk.strings <= reads.names:
            break
        reads.names |= walk.strings
        walk = reads.walk(root, unused, lambda path: unused, observed.called)
    reads.whole = frozenset(walk.whole)
    if len(walk.entries) > MOST:
        raise Declined(
            f"its code reads more than {MOST} values outside its modules (the last is {list(walk.entries)[-1]}), too "
            "many to watch for changes; give it a table of its own, or a tensor"
        )
    for run in runs[1:]:
        run()
    later = reads.walk(root, unused, lambda path: unused).entries
    places = walk.entries.keys() | later.keys()
    changed = frozenset(p for p in places if walk.entries.get(p) != later.get(p))
    if changed:
        runs[1]()  # fills no memo any more, and stores what the last run did not
        again = reads.walk(root, unused, lambda path: unused).entries
        own = (p for p in changed if not any(p.startswith(f"{k}.") for k in kept))  # what kept modules write is live
        reads.effects = _effects(own, root, later, again)
    reads.ignored = changed
    reads.entries = reads.walk(root, unused, lambda path: unused).entries
    return reads
