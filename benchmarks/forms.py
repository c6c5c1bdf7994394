"""Some twenty ways in which people write a mixture of experts, by name, each of any size: what ``never_slower`` runs.

Most are the models of ``tests/zoo``. Legend: E experts, K chosen per token, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.original_blocks import Every, Loop, Stacked, gated, plain
from tests.zoo.capacity import GShard, NanoMoE, Switch
from tests.zoo.dense_forms import BmmOutput, EinsumAll, JacobsMixture, Llama4Like, StackDense
from tests.zoo.grouped import GatheredWeights, GroupedMM
from tests.zoo.row_functions import Routed
from tests.zoo.sorted_dispatch import GraniteLike

Make = Callable[[int, int, int, int], nn.Module]


class Masked(Loop):
    """A boolean mask for each slot and expert."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(self.K)
        y = torch.zeros_like(x)
        for k in range(self.K):
            for e, expert in enumerate(self.experts):
                mask = ids[:, k] == e
                if mask.any():
                    y[mask] += weights[mask, k, None] * expert(x[mask])
        return y


class LowRank(nn.Module):
    """One shared matrix, and a low-rank one of each expert's beside it."""

    def __init__(self, H: int, I: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(H, max(4, I // 16), bias=False), nn.Linear(max(4, I // 16), H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class NormInside(nn.Module):
    """A layer norm between the two matrices."""

    def __init__(self, H: int, I: int) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(H, I), nn.LayerNorm(I), nn.Linear(I, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.norm(self.up(x))))


class Shared(Loop):
    """A loop, and one expert of double width that every token goes through."""

    def __init__(self, E: int, K: int, H: int, I: int) -> None:
        super().__init__(E, K, H, I)
        self.shared = gated(H, 2 * I)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared(x)


def mixtral(implementation: str) -> Make:
    """Transformers' block."""

    def make(E: int, K: int, H: int, I: int) -> nn.Module:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K)
        config._experts_implementation = implementation
        block = MixtralSparseMoeBlock(config)
        for weight in block.parameters():
            nn.init.normal_(weight, std=H**-0.5)
        return block

    return make


FORMS: dict[str, Make] = {
    "loop, gated": Loop,
    "loop, plain with bias": lambda E, K, H, I: Loop(E, K, H, I, expert=plain),
    "loop, stacked (in, out)": Stacked,
    "loop, boolean masks": Masked,
    "loop, shared expert": Shared,
    "every, plain": lambda E, K, H, I: Every(E, K, H, I, expert=plain),
    "every, gated": Every,
    "every, einsum": lambda E, K, H, I: JacobsMixture(H, I, E, how="einsum"),
    "stack, top-k": lambda E, K, H, I: StackDense(H, I, E, K),
    "stack, einsum": lambda E, K, H, I: StackDense(H, I, E, K, "einsum"),
    "bmm, weighted output": lambda E, K, H, I: BmmOutput(H, I, E, K),
    "bmm, weighted input": lambda E, K, H, I: Llama4Like(H, I, E, 1),
    "einsum over all": lambda E, K, H, I: EinsumAll(H, I, E, K),
    "gshard": lambda E, K, H, I: GShard(H, I, E),
    "capacity": lambda E, K, H, I: NanoMoE(H, E, K),
    "switch": lambda E, K, H, I: Switch(H, I, E, 1 << 20),
    "gathered weights": lambda E, K, H, I: GatheredWeights(H, I, E, K),
    "grouped_mm": lambda E, K, H, I: GroupedMM(H, I, E, K),
    "sorted and split": lambda E, K, H, I: GraniteLike(H, I, E, K),
    "mixtral, eager": mixtral("eager"),
    "mixtral, grouped_mm": mixtral("grouped_mm"),
    "low rank": lambda E, K, H, I: Routed(lambda: LowRank(H, I), H, E),
    "norm inside": lambda E, K, H, I: Routed(lambda: NormInside(H, I), H, E),
}
SEQUENCES = (
    "every, einsum",
    "stack",
    "bmm",
    "einsum",
    "gshard",
    "capacity",
    "switch",
    "sorted",
    "mixtral",
    "low",
    "norm",
)
"""Beginnings of the names of forms that take (batch, length, H), the others (tokens, H)."""
