"""A MoE small enough to read, its rewritten twin, and the damages a verifier must see."""

import torch
import torch.nn.functional as F
from torch import nn

E, K, H, I = 6, 2, 16, 16  # square weights on purpose: a transposed one still fits


class TinyMoE(nn.Module):
    """(B, S, H) -> (B, S, H): softmax over E, top-k, renormalise, a loop over the experts that are hit."""

    def __init__(self, seed: int = 0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        new = lambda *shape, scale: nn.Parameter(torch.randn(*shape, generator=g) * scale)  # noqa: E731
        self.router_EH = new(E, H, scale=H**-0.5)
        self.gate_EIH = new(E, I, H, scale=H**-0.5)
        self.up_EIH = new(E, I, H, scale=H**-0.5)
        self.down_EHI = new(E, H, I, scale=I**-0.5)
        self.bias_EH = new(E, H, scale=0.006)  # small: in bfloat16 it hides in the allowance of 8 eps

    def route(self, x_TH):
        p_TE = torch.softmax(x_TH @ self.router_EH.t(), -1, dtype=torch.float32)
        w_TK, ids_TK = torch.topk(p_TE, K, dim=-1)
        return ids_TK, (w_TK / w_TK.sum(-1, keepdim=True)).to(x_TH.dtype)

    def forward(self, x_BSH):
        x_TH = x_BSH.reshape(-1, H)
        ids_TK, w_TK = self.route(x_TH)
        y_TH = torch.zeros_like(x_TH)
        for e in range(E):
            token, slot = torch.where(ids_TK == e)
            if token.numel() == 0:
                continue
            h = x_TH[token]
            a = F.silu(F.linear(h, self.gate_EIH[e])) * F.linear(h, self.up_EIH[e])
            o = F.linear(a, self.down_EHI[e], self.bias_EH[e])
            y_TH.index_add_(0, token, o * w_TK[token, slot, None])
        return y_TH.view_as(x_BSH)


class Twin(nn.Module):
    """The same function, every token through gathered weights; ``damage`` names what is done wrong."""

    def __init__(self, moe: TinyMoE, damage: str = ""):
        super().__init__()
        self.moe, self.damage = moe, damage

    def route(self, x_TH):
        m, damage = self.moe, self.damage
        p_TE = torch.softmax(x_TH @ m.router_EH.t(), -1, dtype=torch.float32)
        w_TK, ids_TK = torch.topk(p_TE, K, dim=-1, largest=damage != "worst experts")
        if damage == "second best experts":
            w_TK, ids_TK = (t[:, 1:] for t in torch.topk(p_TE, K + 1, dim=-1))
        if damage == "drop renormalise":
            return ids_TK, w_TK.to(x_TH.dtype)
        total = w_TK.sum(-1, keepdim=True)
        if damage == "epsilon":
            total = total + 1e-2
        return ids_TK, (w_TK / total).to(x_TH.dtype)

    def forward(self, x_BSH):
        m, damage = self.moe, self.damage
        x_TH = x_BSH.reshape(-1, H)
        ids_TK, w_TK = self.route(x_TH)
        if damage == "off by one":
            ids_TK = (ids_TK + 1) % E
        if damage == "swap two experts":
            ids_TK = torch.tensor([0, 2, 1, *range(3, E)])[ids_TK]
        gate, up = (m.up_EIH, m.gate_EIH) if damage == "swap gate and up" else (m.gate_EIH, m.up_EIH)
        down = m.down_EHI.transpose(1, 2) if damage == "transpose" else m.down_EHI
        ids = ids_TK.flatten()
        x_R1H = x_TH.repeat_interleave(K, 0).unsqueeze(1)
        a = F.silu(torch.bmm(x_R1H, gate[ids].mT)) * torch.bmm(x_R1H, up[ids].mT)
        o_RH = torch.bmm(a, down[ids].mT).squeeze(1)
        if damage != "forget bias":
            o_RH = o_RH + m.bias_EH[ids]
        if damage == "one dead expert":
            o_RH = torch.where((ids == E - 1)[:, None], 0, o_RH)
        o_TKH = o_RH.view(-1, K, H) * w_TK.unsqueeze(-1)
        if damage == "reordered sum":  # not a damage
            o_TKH = o_TKH.flip(1)
        y_TH = o_TKH.sum(1)
        if damage == "nan leak":
            y_TH = y_TH + 0 * y_TH.sum()
        return y_TH.view_as(x_BSH)


DAMAGES = (
    "swap two experts",
    "swap gate and up",
    "drop renormalise",
    "transpose",
    "forget bias",
    "off by one",
    "epsilon",
    "one dead expert",
    "second best experts",
    "worst experts",
    "nan leak",
)


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
