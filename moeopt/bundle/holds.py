"""Which calls an engine holds for, in words: beside the sizes that its inputs declare, the conditions of its trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moeopt.bundle.io_names import KEY, input_names
from moeopt.bundle.shape_guards import text_of
from moeopt.value_types import JsonValue


def stated(signature: Mapping[str, Any]) -> tuple[list[Any], Callable[[int], str]]:
    """The conditions of a signature that say more than its inputs' shapes, and what their leaves are called.

    A size that is a number there, and two sizes of one name, are declared.
    """
    if KEY in signature:
        caller = signature[KEY]
        leaves = caller.get("condition_leaves", {})
        return list(caller.get("conditions", [])), lambda leaf: str(leaves[str(leaf)])
    entries, names = signature["inputs"], input_names(signature)

    def declared(condition: JsonValue) -> bool:
        dims = [entries[leaf]["shape"][dim] for leaf, dim in sizes_in(condition)]
        alike = condition[0] == "==" and all(isinstance(s, list) and s[0] == "size" for s in condition[1:])
        return all(isinstance(d, int) for d in dims) or (alike and isinstance(dims[0], str) and dims[0] == dims[1])

    return [c for c in signature.get("conditions", []) if not declared(c)], lambda leaf: names[leaf]


def sentences(signature: Mapping[str, Any]) -> list[str]:
    """A condition a line; [] where all sizes that the inputs leave open are free."""
    conditions, name = stated(signature)
    return [text_of(condition, name) for condition in conditions]


def notes_on_sizes(signature: Mapping[str, Any]) -> list[str]:
    """The note for a report and a certificate; [] where the sizes are free.

    That two sizes are equal, or one the product of others, is what any call of the model must meet, and no news.
    """
    conditions, name = stated(signature)
    told = [text_of(condition, name) for condition in conditions if _names_a_number(condition)]
    if not told:
        return []
    return [
        f"the engine holds for calls where {' and '.join(told)}, as in the example call: the model's code made this of "
        "its sizes. Calls of other sizes are refused, by plain runtimes too; for them optimise again with example "
        "inputs of such sizes, or use backend='torch'"
    ]


def _names_a_number(condition: JsonValue) -> bool:
    if not isinstance(condition, list):
        return True
    return condition[0] != "size" and any(_names_a_number(child) for child in condition[1:])


def sizes_in(condition: JsonValue) -> Iterator[tuple[int, int]]:
    """(leaf, dimension) of each size in a condition."""
    if isinstance(condition, list):
        if condition[0] == "size":
            yield condition[1], condition[2]
        else:
            for child in condition[1:]:
                yield from sizes_in(child)
