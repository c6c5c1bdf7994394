"""Calls of sizes and layouts at which a block's code may turn to something else than it does for the other cases.

case                    what it is there to catch
more tokens than N      a branch, a chunk or a capacity of N tokens, where N is a number in the block's code
no token                statistics that an empty call leaves alone, a return before the experts
columns in memory       code that asks whether a tensor is contiguous, or for its strides
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.utils import _pytree as pytree

from moeopt.capture.call_roles import CallSpec
from moeopt.verification.cases import MANY, CaseBuilder
from moeopt.verification.results import Case

COLUMNS = "columns in memory"
"""The name of that case."""
LARGEST = 8192
"""Tokens of the largest of these cases, however small the block is."""

_SURE = {"fast": 7, "strict": MANY // 2}
"""Tokens that one expert certainly gets in the other cases of a level."""


def passable(
    numbers: Iterable[int], sizes: Iterable[int], widths: Sequence[int], max_tokens: int
) -> tuple[int, int | None]:  # fmt: skip
    """The largest number of tokens that a case of ``max_tokens`` passes (0 without one), the least that none does.

    Args:
        numbers: in the block's code, which may be tokens, rows of one expert, or what a token has ``widths`` of.
        sizes: of the block's tensors: a number that is one of them, and that only a large case would pass, is none, and
            none is a number that no case passes: a model of 128 experts names 128 for other reasons.
    """
    known, most = set(sizes), most_tokens(max_tokens)
    asked = {n for n in numbers if n > 2 and (n not in known or _count(n) <= MANY)}
    passed = [n for n in asked if _count(n) <= most] + [n for n in _shares(asked, widths) if 2 < n < most]
    late = [n for n in asked - known if _count(n) > most] + [n for n in _shares(asked - known, widths) if n >= most]
    return max(passed, default=0), min(late, default=None)


def most_tokens(max_tokens: int) -> int:
    """Tokens of the largest of these cases for a block whose cases may have ``max_tokens``."""
    return min(max(max_tokens, 64), LARGEST)


def _shares(numbers: Iterable[int], widths: Sequence[int]) -> list[int]:
    """The tokens that have ``numbers`` of something, of which each has one of ``widths``."""
    return [number // width for number in numbers for width in widths]


def _count(number: int) -> int:
    """Tokens of a case in which one expert gets more than ``number``: half of them are one and the same token."""
    return 2 * number + 2


def more_tokens_than(
    call_spec: CallSpec, num_experts: int, number: int, level: str, seed: int = 0, most: int = LARGEST
) -> list[Case]:  # fmt: skip
    """Calls in which the tokens, and those of one expert, are more than ``number``, unless other cases do that.

    Where one expert would need more than ``most``, only the tokens together are more than ``number``.
    Where tokens come in sequences, one call has them in one sequence, one in as many sequences.
    """
    count, rank = min(_count(number), most), len(call_spec.grid)
    grids = [(1,) * (rank - 1) + (count,)] if number > _SURE[level] else []
    grids += [(count,) + (1,) * (rank - 1)] if rank > 1 else []
    cases = []
    for grid in grids:
        case = CaseBuilder(call_spec, num_experts, seed, None).many_tokens(count, grid)
        where = ", in as many sequences" if grid[0] > 1 and rank > 1 else ""
        cases.append(Case(f"more tokens than {number}, a number in its code{where}", case.args, case.kwargs))
    return cases


def no_token(call_spec: CallSpec, num_experts: int, seed: int = 0) -> Case:
    """The call without a token."""
    build = CaseBuilder(call_spec, num_experts, seed, None)
    return build.case("no token", build.flat(0), build.draw(0), range(num_experts))


def columns_in_memory(call_spec: CallSpec, num_experts: int, seed: int = 0) -> Case:
    """A few tokens whose features lie apart in memory, as those of a transposed tensor do."""
    build = CaseBuilder(call_spec, num_experts, seed, None)
    case = build.case(COLUMNS, build.flat(6), build.draw(6), range(num_experts))
    leaves, spec = pytree.tree_flatten((case.args, case.kwargs))
    for n in call_spec.indices("tokens"):
        if leaves[n].dim() > 1:
            leaves[n] = leaves[n].transpose(-1, -2).contiguous().transpose(-1, -2)
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return Case(case.name, args, kwargs)
