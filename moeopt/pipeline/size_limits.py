"""For how many tokens a rewrite holds: cases past the numbers in the block's code, and a bound where none can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from moeopt.capture.call_roles import CallSpec
from moeopt.capture.foreign_ops import of_another_library
from moeopt.control_flow.computed_numbers import computed_numbers
from moeopt.options import Options
from moeopt.recognise.recognition import Recognition
from moeopt.rewrite.block_program import BlockProgram
from moeopt.rewrite.install import RewrittenForward
from moeopt.verification.block import verify_block
from moeopt.verification.results import Case
from moeopt.verification.size_cases import columns_in_memory, more_tokens_than, most_tokens, no_token, passable

MOST_FLOPS = 4e10
"""Of one run of a block in its largest verification case."""


def max_tokens(module: nn.Module, recognitions: list[Recognition]) -> int:
    """Tokens that the largest case may have: their matmuls should not take more than a second or a few."""
    share = max(min(1.0, (f.routing.per_token or len(f.experts)) / len(f.experts)) for f in recognitions)
    return int(MOST_FLOPS / max(1.0, 2 * share * sum(p.numel() for p in module.parameters())))


class SizeCases:
    """The cases of unusual sizes and layouts for one block.

    Args:
        experts: of the block.
        chosen: experts of a token.
        program: gives the numbers in the block's code; its guard gets the bounds.
        max_tokens: that a case may have.

    Attributes:
        cases: to be verified with the others.
    """

    def __init__(
        self, module: nn.Module, call_spec: CallSpec, experts: int, chosen: int, program: BlockProgram,
        max_tokens: int, options: Options,
    ) -> None:  # fmt: skip
        self._spec, self._experts, self._program, self._options = call_spec, experts, program, options
        self._sizes, program.guard.sizes = program.guard.sizes, None  # of an alike block; cases are refused by none
        numbers = program.reads.numbers() if program.reads is not None else set()
        numbers |= computed_numbers(module)
        sizes = {size for t in (*module.parameters(), *module.buffers()) for size in t.shape}
        features = [call_spec.rows(n)[:1].numel() for n in call_spec.indices("tokens")]
        passed, self._most = passable(numbers, sizes, (max([1, *features]), max(chosen, 1)), max_tokens)
        self.cases: list[Case] = [columns_in_memory(call_spec, experts, options.seed)]
        if passed:
            most = most_tokens(max_tokens)
            self.cases += more_tokens_than(call_spec, experts, passed, options.verify, options.seed, most)

    def bound(self, original: Callable[..., Any], rewritten: RewrittenForward, *, empty: bool) -> None:
        """Set the bounds: the number that no case passed, and no ``empty`` call where that is not the original's."""
        guard = self._program.guard
        guard.fewest, guard.most = 0, None
        foreign = any(of_another_library(node.target) for node in self._program.block.graph.nodes)
        calls = [no_token(self._spec, self._experts)] if empty and not foreign else []
        check = verify_block("", original, rewritten, calls, self._options.verify)
        guard.fewest = int((empty and foreign) or any(case.status == "failed" for case in check.cases))
        guard.most = self._most
        guard.sizes = self._sizes
