"""What is said of files that a model cannot be made of: the same words before and while weights are read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

from moeopt.checkpoint.directory import CheckpointDirectory
from moeopt.errors import CheckpointError
from moeopt.listed import listed


def unfit(directory: CheckpointDirectory, kind: str, why: str) -> CheckpointError:
    """The error that a model of class ``kind`` cannot be made of the files."""
    return CheckpointError(
        f"{directory.path}: its tensors do not become a {kind} ({why}): config.json and the weights may be of two "
        "versions; fetch both again"
    )


def broken_words(directory: CheckpointDirectory, broken: Collection[str]) -> str:
    """In words, which Parameters transformers could not put together, and the tensor that is the odd one."""
    return "; ".join([f"{listed(sorted(broken))} cannot be put together", *odd_experts(directory)])


def mismatch_words(mismatched: Iterable[tuple[str, Collection[int], Collection[int]]]) -> str:
    """In words, transformers' triples of a name, the shape in the files and the shape by the config; "" for none."""
    other = sorted(mismatched, key=str)
    if not other:
        return ""
    name, stored, wanted = other[0]
    more = f", and {len(other) - 1} more" if len(other) > 1 else ""
    return f"{name} is {list(stored)} in the files and {list(wanted)} by config.json{more}"


def odd_experts(directory: CheckpointDirectory) -> list[str]:
    """In words, the first tensor that one expert lacks and others have, or that has another shape than theirs;
    [] where there is none."""
    named: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in directory:
        parts = name.split(".")
        numbers = [at for at, part in enumerate(parts) if part.isdigit()]
        if len(numbers) > 1:  # of a layer, and of an expert in it
            prefix, suffix = ".".join(parts[: numbers[-1]]), ".".join(parts[numbers[-1] + 1 :])
            named[prefix][suffix][int(parts[numbers[-1]])] = name
    found = []
    for prefix, by_suffix in sorted(named.items()):
        everyone = set().union(*by_suffix.values())
        for suffix, there in sorted(by_suffix.items()):
            gone = sorted(everyone - there.keys())
            if 0 < len(gone) < len(there):
                found.append(f"{prefix}.{gone[0]}.{suffix} is not there, and {len(there)} like it are")
            shape, most = Counter(directory[name].shape for name in there.values()).most_common(1)[0]
            odd = sorted(name for name in there.values() if directory[name].shape != shape)
            if 0 < len(odd) < most:
                found.append(f"{odd[0]} is {list(directory[odd[0]].shape)}, and {most} like it are {list(shape)}")
    return found[:1]
