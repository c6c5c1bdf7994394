"""Ranks that share tokens must choose the same experts: compared at every call, near ties settled by the first rank.

Shape legend: T tokens, H hidden, K chosen per token, P ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.distributed.channel import Channel
from moeopt.verification.routing import TIE

PATTERNS = 4
"""Sums of the tokens under so many patterns of weights are compared: other tokens differ in one of them."""
ALIKE = 0.02
"""How far such a sum may be apart, over the tokens' norm: layers before round otherwise on another kind of machine."""
SMALL = 1e-12
"""A norm below which float32's squares may vanish."""
_NAMES = ("the number of its tokens", "its tokens", "the experts chosen for them")


def agreed_ids(channel: Channel, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The ids that all ranks use: their own, or those of the first rank where a near tie was broken otherwise.

    Raises:
        RankLostError: a rank has other tokens, or chose other experts beyond rounding.
    """
    own = torch.cat([_exact([len(x_TH), _digest(ids_TK)], x_TH), _sums(x_TH)])
    told_PN = channel.everyones("comparing its tokens with the others'", own)
    told = told_PN.tolist()
    channel.compare([line[:1] for line in told], _NAMES[:1])
    first, norm = told[0], max(told[0][2], 1e-30)
    near = [all(abs(a - b) <= ALIKE * norm for a, b in zip(line[2:], first[2:], strict=True)) for line in told]
    channel.compare([("alike" if ok else "others",) for ok in near], _NAMES[1:2])
    if len({line[1] for line in told}) == 1:
        return ids_TK
    ids_PTK = channel.everyones("settling ties between experts", ids_TK.long())
    weights_PTK = channel.everyones("settling ties between experts", weights_TK.detach().double())
    eps = torch.finfo(weights_TK.dtype).eps
    same = [not flips(ids_PTK[0], ids_PTK[r], weights_PTK[0], weights_PTK[r], eps).any() for r in range(channel.size)]
    channel.compare([("alike" if ok else "others",) for ok in same], _NAMES[2:])
    return ids_PTK[0].to(ids_TK.dtype)


def flips(ids_TK: Tensor, others_TK: Tensor, weights_TK: Tensor, other_weights_TK: Tensor, eps: float) -> Tensor:
    """Which tokens (T,) chose other experts although their weights say it was no near tie.

    Experts that are within rounding of each other have weights that are too: an exchange of such leaves the sorted
    weights as they are, within TIE eps of the largest.
    """
    differ_T = (ids_TK.sort(1).values != others_TK.sort(1).values).any(1)
    a_TK, b_TK = weights_TK.sort(1).values, other_weights_TK.sort(1).values
    far_T = ((a_TK - b_TK).abs() > TIE * eps * a_TK.abs().amax(1, keepdim=True)).any(1)
    return differ_T & far_T


def _exact(numbers: list[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=like.device)


def _digest(ids_TK: Tensor) -> int:
    """A number below 2^50, which float64 holds, that other ids do not have."""
    flat = ids_TK.reshape(-1).long()
    odd = (torch.arange(len(flat), device=flat.device) * 2 + 1) * 0x9E3779B1
    return int(((flat + 2) * odd).sum()) & (1 << 50) - 1


def _sums(x_TH: Tensor) -> Tensor:
    """The norm, and ``PATTERNS`` sums, as float64."""
    if x_TH.dtype != torch.float64:  # a twentieth of the time, and as good where nothing over- or underflows
        quick = _sums_in(x_TH.detach().float())
        if bool(quick.isfinite().all() & (quick[0] > SMALL)):
            return quick
    # NaN is nowhere alike; float32's sums may overflow
    return _sums_in(x_TH.detach().double().nan_to_num(0.0, 0.0, 0.0)).nan_to_num()


def _sums_in(x_TH: Tensor) -> Tensor:
    n_P1 = torch.arange(1, PATTERNS + 1, dtype=torch.float64, device=x_TH.device).unsqueeze(1)
    by_T = torch.cos(torch.arange(x_TH.shape[0], device=x_TH.device) * n_P1 * 0.7 + n_P1)
    by_H = torch.cos(torch.arange(x_TH.shape[1], device=x_TH.device) * n_P1 * 1.1 + n_P1)
    sums_PH = (by_T.to(x_TH.dtype) @ x_TH).double()
    return torch.cat([x_TH.norm().double().view(1), (sums_PH * by_H).sum(1)])
