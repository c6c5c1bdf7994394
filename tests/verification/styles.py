"""One MoE function in the dispatch styles people write; all take x (T, H) and the weights of ``ExpertWeights``."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

T, E, K, H, I = 11, 5, 2, 16, 8


def bank(dtype: torch.dtype) -> SimpleNamespace:
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: (torch.randn(*shape, generator=g) * shape[-1] ** -0.5).to(dtype)  # noqa: E731
    return SimpleNamespace(router_EH=draw(E, H), w_in_EJH=draw(E, 2 * I, H), w_out_EHI=draw(E, H, I))


def route(x_TH, b):
    p_TE = F.softmax(x_TH @ b.router_EH.t(), dim=-1, dtype=torch.float)
    w_TK, ids_TK = torch.topk(p_TE, K, dim=-1)
    w_TK /= w_TK.sum(dim=-1, keepdim=True)
    return ids_TK, w_TK.to(x_TH.dtype)


def expert(h, b, e):
    g, u = F.linear(h, b.w_in_EJH[e]).chunk(2, dim=-1)
    return F.linear(F.silu(g) * u, b.w_out_EHI[e])


def hit_loop(x_TH, b):
    ids_TK, w_TK = route(x_TH, b)
    y_TH = torch.zeros_like(x_TH)
    mask_EKT = F.one_hot(ids_TK, num_classes=E).permute(2, 1, 0)
    for e in torch.greater(mask_EKT.sum(dim=(-1, -2)), 0).nonzero():
        slot, token = torch.where(mask_EKT[e.item()])
        y_TH.index_add_(0, token, (expert(x_TH[token], b, e.item()) * w_TK[token, slot, None]).to(x_TH.dtype))
    return y_TH


def boolean_mask(x_TH, b):
    ids_TK, w_TK = route(x_TH, b)
    y_TH = torch.zeros_like(x_TH)
    for e in range(E):
        for k in range(K):
            m = ids_TK[:, k] == e
            if m.any():
                y_TH[m] += expert(x_TH[m], b, e) * w_TK[m, k].unsqueeze(-1)
    return y_TH


def sort_slice(x_TH, b):
    ids_TK, w_TK = route(x_TH, b)
    order = ids_TK.view(-1).argsort()
    counts = torch.bincount(ids_TK.view(-1), minlength=E).cpu().numpy()
    sorted_RH, outs, start = x_TH[order // K], [], 0
    for e, count in enumerate(counts):
        end = start + int(count)
        if count:
            outs.append(expert(sorted_RH[start:end], b, e))
        start = end
    o_RH = torch.cat(outs)
    new = torch.empty_like(o_RH)
    new[order] = o_RH
    return (new.view(T, K, -1).type(w_TK.dtype) * w_TK.unsqueeze(-1)).sum(1).type(new.dtype)


def bmm_dense(x_TH, b):
    ids_TK, w_TK = route(x_TH, b)
    w_TE = torch.zeros(T, E, dtype=x_TH.dtype).scatter_(1, ids_TK, w_TK)
    h_ETJ = torch.bmm(x_TH.repeat(E, 1).view(E, T, H), b.w_in_EJH.transpose(1, 2))
    g, u = h_ETJ.chunk(2, dim=-1)
    o_ETH = torch.bmm(F.silu(g) * u, b.w_out_EHI.transpose(1, 2))
    return (o_ETH * w_TE.t().unsqueeze(-1)).sum(0)


def threshold(x_TH, b):
    """Top-p-like: experts whose probability passes a threshold; comparisons choose."""
    p_TE = torch.sigmoid(x_TH @ b.router_EH.t())
    w_TE = torch.where(p_TE > 0.5, p_TE, torch.zeros_like(p_TE))
    return sum(expert(x_TH, b, e) * w_TE[:, e : e + 1] for e in range(E))


def argmax_switch(x_TH, b):
    p_TE = (x_TH @ b.router_EH.t()).float().softmax(-1)
    best_T = p_TE.argmax(-1)
    w_T, _ = p_TE.max(dim=-1)
    y_TH = x_TH.new_zeros(T, H)
    for e in best_T.unique().tolist():
        rows = (best_T == e).nonzero().squeeze(-1)
        y_TH[rows] = expert(x_TH[rows], b, e)
    return y_TH * w_T.to(x_TH.dtype).unsqueeze(-1)


def sorted_router(x_TH, b):
    """``sort`` descending then a slice, and ``out=`` buffers."""
    scores_TE, order_TE = (x_TH @ b.router_EH.t()).sort(dim=-1, descending=True)
    w_TK = scores_TE[:, :K].softmax(-1)
    y_TH = torch.zeros_like(x_TH)
    buffer_TH = torch.empty_like(x_TH)
    for k in range(K):
        for e in range(E):
            torch.mul(expert(x_TH, b, e), (w_TK[:, k] * (order_TE[:, k] == e)).unsqueeze(-1), out=buffer_TH)
            y_TH += buffer_TH
    return y_TH


def grouped(x_TH, b):
    """aten._grouped_mm wants rows of 16 bytes: H and I are 16 bytes and more in each dtype tested."""
    ids_TK, w_TK = route(x_TH, b)
    order = ids_TK.flatten().argsort(stable=True)
    offs_E = torch.histc(ids_TK.flatten().float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)
    h_RJ = F.grouped_mm(x_TH[order // K], b.w_in_EJH.transpose(1, 2), offs=offs_E)
    g, u = h_RJ.chunk(2, dim=-1)
    o_RH = F.grouped_mm(F.silu(g) * u, b.w_out_EHI.transpose(1, 2), offs=offs_E)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return (o_RH[back].view(T, K, H) * w_TK.unsqueeze(-1)).sum(1).to(x_TH.dtype)


STYLES = (
    grouped,
    hit_loop,
    boolean_mask,
    sort_slice,
    bmm_dense,
    threshold,
    argmax_switch,
    sorted_router,
)
