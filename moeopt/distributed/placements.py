"""What a user gives as ``placement``, as one placement for each block: the ranks that hold each expert."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moeopt.errors import UsageError
from moeopt.planning.given import plain_values
from moeopt.planning.placement import Placement, balanced, contiguous
from moeopt.value_types import PyObject

FORMS = (
    "give None (neighbouring experts on one rank), what moeopt.plan(..., load=...) returned or its JSON, what "
    "moeopt.profile returned (the heaviest expert to the lightest rank), or {block: ranks of each expert}"
)


def placements_of(given: PyObject, ops: Sequence[tuple[str, int]], ranks: int) -> tuple[list[Placement], list[str]]:
    """A placement for each of ``ops`` (block, number of experts), and notes.

    Raises:
        UsageError: ``given`` is of another form, for another number of devices, or of another model.
    """
    even = [contiguous(E, ranks) for _, E in ops]
    if given is None:
        return even, []
    found = _by_name(given, ranks)
    blocks = list(dict.fromkeys(name for name, _ in ops))
    if isinstance(found, list):
        found = dict.fromkeys(blocks, [found])
    if unknown := sorted(set(found) - set(blocks)):
        raise UsageError(
            f"placement names {unknown[0]!r}, which is no block with experts on several ranks: those are "
            f"{', '.join(blocks)}"
        )
    placed, turns = [], dict.fromkeys(blocks, 0)
    for (name, E), default in zip(ops, even, strict=True):
        given_here = found.get(name, [default])
        placement = given_here[min(turns[name], len(given_here) - 1)]  # a block with several ops has them in turn
        turns[name] += 1
        _check(name, placement, E, ranks)
        placed.append(placement)
    left = [name for name in blocks if name not in found]
    more = f"placement says nothing of {', '.join(left)}: neighbouring experts lie on one rank there"
    return placed, [more] if left else []


def _by_name(given: PyObject, ranks: int) -> dict[str, list[Placement]] | Placement:
    """By block, one for each of its ops or one for all; or one for all blocks."""
    fields = plain_values(given, "placement", f"; {FORMS}")
    if isinstance(fields, Mapping) and isinstance(fields.get("placements"), Sequence) and "devices" in fields:
        return _planned(fields, ranks)
    if isinstance(fields, Mapping) and isinstance(fields.get("layers"), Sequence):
        return _listed((str(layer["name"]), balanced(layer["fired"], ranks)) for layer in fields["layers"])
    if isinstance(fields, Mapping):
        return {str(name): [_plain(placement)] for name, placement in fields.items()}
    if isinstance(fields, Sequence) and not isinstance(fields, (str, bytes)):
        plain: Placement = _plain(fields)
        return plain
    raise UsageError(f"placement is a {type(fields).__name__}; {FORMS}")


def _planned(plan: Mapping[str, Any], ranks: int) -> dict[str, list[Placement]]:
    if plan["devices"] != ranks:
        raise UsageError(
            f"placement is a plan for {plan['devices']} devices, and the mesh has {ranks} ranks: plan with "
            f"devices={ranks}"
        )
    if not plan["placements"]:
        raise UsageError(
            "placement is a plan without a measured load, which places no expert: plan with load=moeopt.profile(...), "
            "or leave placement out"
        )
    # a plan may put two copies on one device, where there are more copies than devices
    return _listed(
        (str(p["layer"]), [list(dict.fromkeys(ranks)) for ranks in _plain(p["ranks"])]) for p in plan["placements"]
    )


def _listed(pairs: Iterable[tuple[str, Placement]]) -> dict[str, list[Placement]]:
    found: dict[str, list[Placement]] = {}
    for name, placement in pairs:
        found.setdefault(name, []).append(placement)
    return found


def _plain(placement: PyObject) -> PyObject:
    try:
        return [[_rank(rank) for rank in ranks] for ranks in placement]
    except TypeError:
        raise UsageError(
            f"a placement lists for each expert the ranks that hold it, like [[0], [0], [1], [0, 1]]; got "
            f"{str(placement):.60}"
        ) from None


def _rank(given: PyObject) -> int:
    """``TypeError`` for what is no whole number: half a rank would be rounded to another one."""
    if isinstance(given, bool):
        raise TypeError
    return operator.index(given)


def _check(name: str, placement: Placement, E: int, ranks: int) -> None:
    if len(placement) != E:
        raise UsageError(
            f"placement of {name} has {len(placement)} lists, and the block {E} experts: it lists for each expert the "
            "ranks that hold it"
        )
    for e, where in enumerate(placement):
        if not where or len(set(where)) != len(where) or not all(0 <= rank < ranks for rank in where):
            raise UsageError(
                f"placement of {name} puts expert {e} on ranks {where}: give it one or more different ranks from 0 to "
                f"{ranks - 1}"
            )
