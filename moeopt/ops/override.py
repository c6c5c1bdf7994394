"""Another implementation of ``experts`` for a while: an exporter that emits a node, or a backend that is checked.

Per thread and per context: two threads may export and serve at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ExpertWeights

ExpertsImpl = Callable[[Tensor, Tensor, Tensor, ExpertWeights, ExpertsSpec], "Tensor | None"]
"""(x, ids, weights, bank, spec) -> what ``experts`` returns, or None to leave the call as it is."""

_impl: ContextVar[ExpertsImpl | None] = ContextVar("moeopt_experts_impl", default=None)


@contextlib.contextmanager
def override_experts_impl(impl: ExpertsImpl) -> Iterator[None]:
    """Every call of ``experts`` inside goes to ``impl`` first; None from it leaves the call as it is."""
    token = _impl.set(impl)
    try:
        yield
    finally:
        _impl.reset(token)


def default_impl() -> contextlib.AbstractContextManager[None]:
    """Calls of ``experts`` inside run its own kernels, also inside :func:`override_experts_impl`."""
    return override_experts_impl(lambda *call: None)


current: Callable[[], ExpertsImpl | None] = _impl.get
"""What :func:`override_experts_impl` has set here, or None."""
