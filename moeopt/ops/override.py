"""Let someone else answer ``experts`` for a while: an exporter that emits a node, or a check of another runtime.

Per thread and per context: two threads may export and serve at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import Bank

Answer = Callable[[Tensor, Tensor, Tensor, Bank, ExpertsSpec], "Tensor | None"]
"""(x, ids, weights, bank, spec) -> what ``experts`` returns, or None to leave the call as it is."""

_answer: ContextVar[Answer | None] = ContextVar("moeopt_experts_answer", default=None)


@contextlib.contextmanager
def intercepted(answer: Answer) -> Iterator[None]:
    """Every call of ``experts`` inside goes to ``answer`` first."""
    token = _answer.set(answer)
    try:
        yield
    finally:
        _answer.reset(token)


def left_alone() -> contextlib.AbstractContextManager[None]:
    """Calls of ``experts`` inside are nobody else's, whatever is open around."""
    return intercepted(lambda *call: None)


def current() -> Answer | None:
    """What :func:`intercepted` has set here, or None."""
    return _answer.get()
