"""What stands around the experts beside their block's own parts: norms written out, soft caps, layers inside a row.

Shape legend: H hidden, an even number. A norm takes (..., H) and gives the same.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """16-bit values in float32; wider ones as they are, so that a float64 copy of a model is float64 throughout."""
    return x if x.dtype == torch.float64 else x.float()


def softcap(x: Tensor, size: float) -> Tensor:
    return torch.tanh(x / size) * size


class Written(nn.Module):
    """A norm as a formula, with a weight: ``formula(x)`` in at least float32."""

    def __init__(self, hidden: int, formula: Callable[[Tensor], Tensor]):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(hidden))
        self.formula = formula

    def forward(self, x):
        return self.weight * self.formula(at_least_float32(x)).to(x.dtype)


def rms(epsilon: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


def rms_by_division(epsilon: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x / ((x * x).mean(-1, keepdim=True).sqrt() + epsilon)


def layer(epsilon: float) -> Callable[[Tensor], Tensor]:
    def formula(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + epsilon)

    return formula


def attention(x):
    """Pairs of elements attend to the pairs before them: the first sees none, and gets zeros."""
    pairs = x.unflatten(-1, (-1, 2))
    sees = torch.ones(pairs.shape[-2], pairs.shape[-2], dtype=torch.bool, device=x.device).tril(-1)
    return x + F.scaled_dot_product_attention(pairs, pairs, pairs, sees).flatten(-2)


def running_logsumexp(x):
    return x + 0.1 * x.logcumsumexp(-1)


def peaks(x):
    return x + F.max_pool1d(x.reshape(-1, 1, x.shape[-1]), 3, 1, 1).view(x.shape)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rms 1e-8": lambda hidden: Written(hidden, rms(1e-8)),
    "rms 1e-12": lambda hidden: Written(hidden, rms(1e-12)),
    "rms by division 1e-8": lambda hidden: Written(hidden, rms_by_division(1e-8)),
    "layer 1e-12": lambda hidden: Written(hidden, layer(1e-12)),
    "nn.LayerNorm 1e-12": lambda hidden: nn.LayerNorm(hidden, eps=1e-12),
    "nn.RMSNorm 1e-8": lambda hidden: nn.RMSNorm(hidden, eps=1e-8),
    "attention": lambda hidden: Written(hidden, attention),
    "running logsumexp": lambda hidden: Written(hidden, running_logsumexp),
    "peaks": lambda hidden: Written(hidden, peaks),
    "normalize": lambda hidden: Written(hidden, lambda x: F.normalize(x, dim=-1) * hidden**0.5),
}
"""Beside ``rms`` and ``layer``: norms whose epsilon is too small to be seen on ordinary rows, and layers that exporters
have had as other functions."""
