"""A verified rewrite on calls of few tokens, for a block whose Python reads numbers of its routing."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from moeopt.capture.probe_inputs import aimed_at_router
from moeopt.ir.weight_refs import expert_paths
from moeopt.ops.override import default_impl
from moeopt.options import Options
from moeopt.pipeline.block_capture import Capture, original_forward, statistics_kept
from moeopt.pipeline.computed_numbers import computed_numbers
from moeopt.rewrite.block_program import BlockProgram
from moeopt.rewrite.install import RewrittenForward
from moeopt.rewrite.live_codes import dequantized
from moeopt.verification.block import verify_block
from moeopt.verification.few_tokens import FewTokens, unlike
from moeopt.verification.oracle import record_selections
from moeopt.verification.results import BlockCheck

_CALLS = {"strict": 48, "fast": 24}
_FEWEST = 8
_WEIGHTS = 4 * 10**9
"""That all calls together may read."""
_EXPERTS = 4096
"""That all calls together may ask for."""
_LEFT_OUT = (
    "its Python reads numbers or sizes that its routing gives, and what it makes of them is left out of the rewritten "
    "code; compute with them as tensors"
)


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
        for case in unlike(original, rewritten, itertools.chain(calls.cases(ids), calls.alone(ids))):
            check = verify_block(capture.name, original, rewritten, [case], level=options.verify)
            if any(result.status == "failed" for result in check.cases):
                check.reason = f"{check.reason}; {_LEFT_OUT}"
                return check
    return None
