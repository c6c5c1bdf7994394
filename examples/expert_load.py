"""Which experts do your data need? Counts, the cost of imbalance, and a page to look at.

    python -m examples.expert_load [load.html]

The model is that of quickstart.py; the data are tokens of three topics, one of them far more frequent than the
others. Tokens of a topic are alike, so they crowd on the same experts.
"""

import sys
from collections.abc import Iterator

import torch

import moeopt
from examples.quickstart import TwoOfEight

SHARES = torch.tensor([0.8, 0.15, 0.05])
"""Of the topics."""


def batches(count: int = 4, hidden: int = 64) -> Iterator[torch.Tensor]:
    """Batches of (2, length, hidden), each of another length."""
    generator = torch.Generator().manual_seed(1)
    topics = 2 * torch.randn(len(SHARES), hidden, generator=generator)
    for number in range(count):
        tokens = 2 * (16 + 8 * number)
        topic = torch.multinomial(SHARES, tokens, replacement=True, generator=generator)
        yield (topics[topic] + torch.randn(tokens, hidden, generator=generator)).view(2, -1, hidden)


def main(page: str | None = None) -> None:
    torch.manual_seed(0)
    model = TwoOfEight().eval()

    load = moeopt.profile(model, batches())
    print(load)

    (layer,) = load.layers
    print(
        f"\nexpert {max(range(8), key=layer.fired.__getitem__)} is the busiest, {layer.imbalance['dead']} never fired"
    )

    if page is not None:
        fast = moeopt.optimize(model, next(batches()))
        print(f"written: {fast.report.to_html(page, profile=load)}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
