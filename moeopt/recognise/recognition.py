"""What was recognised of a block on one probe call: its experts, their function, the sum and the routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from moeopt.ir.specs import ExpertsSpec
from moeopt.recognise.combine import Combine
from moeopt.recognise.routing_types import Routing
from moeopt.recognise.token_rows import Tokens
from moeopt.value_types import ExpertFunction


@dataclass
class Recognition:
    """Everything needed to replace ``combine.node`` by the op; ``experts[v]`` is what id v runs.

    ``experts`` are ``ExpertRef`` and ``spec`` an ``ExpertsSpec``; or ``SlotRefs`` and a ``RowFunction``.
    ``kept_from_grouped``: of a ``RowFunction``, the limit for which the experts did not get an ``ExpertsSpec``.
    """

    tokens: Tokens
    routing: Routing
    combine: Combine
    base: fx.Node | None
    experts: list[Any]
    spec: ExpertFunction
    interior: set[fx.Node]
    source: str
    functions: dict[object, tuple[ExpertsSpec, bool]]
    unmatched_reason: str = ""
    kept_from_grouped: str = ""

    @property
    def features(self) -> int:
        """The numbers that the experts' sum has for each token."""
        shape = self.combine.node.meta["shape"]
        return int(shape[self.combine.axis]) if self.combine.axis < len(shape) else 1
