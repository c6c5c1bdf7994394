"""A verified rewrite on calls of few tokens, for a block whose Python reads numbers of its routing."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from moeopt.capture.probe_inputs import aimed_at_router
from moeopt.control_flow.computed_numbers import computed_numbers
from moeopt.ir.weight_refs import expert_paths
from moeopt.ops.override import default_impl
from moeopt.options import Options
from moeopt.pipeline.block_capture import Capture, original_forward, statistics_kept
from moeopt.rewrite.block_program import BlockProgram
from moeopt.rewrite.install import RewrittenForward
from moeopt.rewrite.live_codes import dequantized
from moeopt.verification.block import verify_block
from moeopt.verification.few_tokens import ROWS, FewTokens, unlike
from moeopt.verification.ids_in_order import Choosing, choices_of, orders
from moeopt.verification.oracle import record_selections
from moeopt.verification.results import BlockCheck, Case

_CALLS = {"strict": 48, "fast": 24}
_FEWEST = 8
_WEIGHTS = 4 * 10**9
"""That all calls together may read."""
_EXPERTS = 4096
"""That all calls together may ask for."""
_LISTED = 64
"""Numbers of a buffer that may be ids in a certain order."""
_LEFT_OUT = (
    "its Python reads numbers or sizes that its routing gives, and what it makes of them is left out of the rewritten "
    "code; compute with them as tensors"
)
RunsBlock = Callable[..., Any]


class _TellsIds(RewrittenForward):
    """Notes the ids (T, K) that reached its op number 0."""

    ids: Tensor | None = None

    def experts(self, index: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if index == 0:
            self.ids = ids.detach().clone()
        return super().experts(index, x, ids, weights)


def check_few_tokens(
    capture: Capture, program: BlockProgram, original: Callable[..., Any], options: Options
) -> BlockCheck | None:
    """The check of the first call on which ``program`` is another function than ``original``; None without one."""
    if options.verify == "off" or not capture.branches.any:
        return None
    module, spec, experts = capture.module, capture.call_spec, max(len(f.experts) for f in capture.found)
    numbers = computed_numbers(module) | (program.reads.numbers() if program.reads is not None else set())
    weights = sum(p.numel() for p in module.parameters())
    count = min(_CALLS[options.verify], max(_WEIGHTS // max(weights, 1), _FEWEST), max(_EXPERTS // experts, _FEWEST))
    known = set().union(*(expert_paths(f.experts) for f in capture.found))
    aimed, chosen = aimed_at_router(module, spec, known), max(f.routing.per_token or 1 for f in capture.found)
    calls = FewTokens(spec, experts, numbers, aimed, chosen, count, options.seed)
    rewritten = _TellsIds(module, program, original_forward(module))
    rewritten.silent = True
    with default_impl(), statistics_kept(module), dequantized(module, [bank for bank, _ in rewritten.banks]):
        everyone = calls.all_rows
        with contextlib.suppress(Exception):  # a block that does not take so many
            record_selections(rewritten, everyone.args, everyone.kwargs)
        ids = rewritten.ids
        pair: tuple[RunsBlock, RunsBlock] = (original, rewritten)
        alike = (*pair, itertools.chain(calls.cases(ids), calls.alone(ids)))
        own_order = _in_order(capture, program, pair, calls, ids)
        for own, new, cases in (alike, (*own_order[:2], itertools.islice(own_order[2], count))):
            for case in unlike(own, new, cases):
                check = verify_block(
                    capture.name, own, new, [case], level=options.verify, features=capture.found[-1].features
                )
                if any(result.status == "failed" for result in check.cases):
                    check.reason = f"{check.reason}; {_LEFT_OUT}"
                    return check
    return None


def _in_order(
    capture: Capture, program: BlockProgram, pair: tuple[RunsBlock, RunsBlock], calls: FewTokens, ids: Tensor | None
) -> tuple[RunsBlock, RunsBlock, Iterable[Case]]:
    """The two of ``pair``, and a call for each exact order of experts, which both are made to choose.

    Args:
        ids: of ``calls.all_rows``; None where that call is not taken.
    """
    module, (original, rewritten) = capture.module, pair
    if ids is None or len(capture.found) != 1:
        return *pair, ()
    listed = program.reads.sequences() if program.reads is not None else set()
    small = (b for b in module.buffers() if not b.is_floating_point() and 1 < b.numel() <= _LISTED)
    listed |= {tuple(b.flatten().tolist()) for b in small}
    wanted = orders(len(capture.found[0].experts), ids.shape[-1], sorted(listed), ROWS)
    if capture.call_spec.routed():
        return *pair, map(calls.of, wanted) if calls.names(ids.shape[-1]) else ()
    both: list[Choosing] = []
    for run in (original, rewritten):
        found: tuple[int, ...] = ()
        with contextlib.suppress(Exception):  # as above
            found = choices_of(run, module, calls.all_rows, ids)
        both.append(Choosing(run, module, found))
    own, new = both

    def cases() -> Iterator[Case]:
        for ids_TK in wanted:
            own.ids = new.ids = ids_TK
            yield calls.of(ids_TK)

    return own, new, cases() if own.at and new.at else ()
