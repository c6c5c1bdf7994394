"""An exported graph through the passes and back: GraphModule in, GraphModule out, then torch.compile.

python examples/fx_passes.py
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from moeopt import passes

TOKENS, EXPERTS, TOP_K, HIDDEN, INNER = 16, 8, 2, 64, 128


class AllExperts(nn.Module):
    """Every expert on every token, then a weighted sum: torch.export takes it, and it costs E / K times too much."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w_in = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) * HIDDEN**-0.5)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) * INNER**-0.5)

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH).softmax(-1).topk(TOP_K)
        table_TE = torch.zeros(x_TH.shape[0], EXPERTS).scatter(1, ids_TK, weights_TK)
        y_ETH = F.silu(x_TH @ self.w_in.transpose(1, 2)) @ self.w_out.transpose(1, 2)
        return (table_TE.t()[:, :, None] * y_ETH).sum(0)


def ops(module: fx.GraphModule) -> Counter[str]:
    """How many nodes of each op there are."""
    return Counter(str(n.target) for n in module.graph.nodes if n.op == "call_function")


def main() -> None:
    torch.manual_seed(0)
    model, x_TH = AllExperts().eval(), torch.randn(TOKENS, HIDDEN)
    exported = torch.export.export(model, (x_TH,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    grouped, records = passes.run(exported, x_TH)
    print(*records, sep="\n")
    print(f"\nbefore: {ops(exported.graph_module)}\nafter: {ops(grouped)}")
    fast = torch.compile(grouped, backend="aot_eager")  # any backend: moeopt::experts is one opaque op to it
    for tokens in (TOKENS, 5):
        x_TH = torch.randn(tokens, HIDDEN)
        worst = (fast(x_TH) - model(x_TH)).abs().max()
        print(f"{tokens} tokens: at most {worst:.1e} from the original")


if __name__ == "__main__":
    main()
