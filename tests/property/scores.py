"""Score functions of routers: logits to scores, elementwise but for the softmax.

Each is right over the whole range of its dtype in torch, or as far as its formula goes (``log1p_exp`` overflows).
An engine's form of it may lose all digits where a score is far below one, or saturates.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sigmoid_by_division": lambda x: 1 / (1 + torch.exp(-x)),
    "logsigmoid": F.logsigmoid,
    "log1p_exp": lambda x: torch.log1p(torch.exp(x)),
    "softplus": F.softplus,
    "sqrt_softplus": lambda x: F.softplus(x).sqrt(),
    "relu": F.relu,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "one_plus_tanh": lambda x: torch.tanh(x / 2) + 1,
    "silu": F.silu,
    "elu_plus_one": lambda x: F.elu(x) + 1,
}
