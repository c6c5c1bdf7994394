"""Written forms: the same sum over chosen experts, as fifteen people would write it.

Shape legend: T tokens, E experts, K chosen per token, H hidden.
Sparse forms take (bank, x_TH, ids_TK, weights_TK), dense ones (bank, x_TH, weights_TE), any rank of T.
``on`` says where the weight multiplies: "output" or "input".
"""

import torch
import torch.nn.functional as F


def weighted(bank, e, x, w, on):
    """Expert e on rows x (N, H) with weights w (N, 1)."""
    return bank.run(e, (x * w).to(x.dtype)) if on == "input" else bank.run(e, x) * w


def hit_loop(bank, x, ids, w, E, on):
    y = torch.zeros_like(x)
    mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
    for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
        e = hit[0]
        slot, tok = torch.where(mask[e])
        y.index_add_(
            0, tok, weighted(bank, e, x[None, tok].reshape(-1, x.shape[-1]), w[tok, slot, None], on).to(x.dtype)
        )
    return y


def all_where(bank, x, ids, w, E, on):
    y = torch.zeros_like(x)
    for e in range(E):
        tok, slot = torch.where(ids == e)
        y.index_add_(0, tok, weighted(bank, e, x[tok], w[tok, slot].unsqueeze(-1), on).to(y.dtype))
    return y


def all_if(bank, x, ids, w, E, on):
    y = torch.zeros_like(x)
    for e in range(E):
        hit = (ids == e).nonzero()
        if hit.shape[0] == 0:
            continue
        tok, slot = hit.unbind(-1)
        y = y.index_add(0, tok, weighted(bank, e, x[tok], w[tok, slot, None], on).to(y.dtype))
    return y


def bool_mask(bank, x, ids, w, E, on):
    y = torch.zeros_like(x)
    for e in range(E):
        chosen = ids == e
        rows = chosen.any(dim=-1)
        if rows.any():
            y[rows] += weighted(bank, e, x[rows], (w * chosen).sum(-1)[rows].unsqueeze(-1), on).to(y.dtype)
    return y


def slot_loop(bank, x, ids, w, E, on):
    y = torch.zeros_like(x)
    for k in range(ids.shape[1]):
        for e in range(E):
            rows = ids[:, k] == e
            y[rows] = y[rows] + weighted(bank, e, x[rows], w[rows, k : k + 1], on).to(y.dtype)
    return y


def slot_where(bank, x, ids, w, E, on):
    """Every expert on every token, and torch.where keeps what was chosen, slot by slot."""
    y = torch.zeros_like(x)
    for k in range(ids.shape[1]):
        for e in range(E):
            y = y + torch.where(
                (ids[:, k] == e)[:, None], weighted(bank, e, x, w[:, k, None], on).to(y.dtype), torch.zeros_like(y)
            )
    return y


def sort_slice(bank, x, ids, w, E, on):
    """DeepSeek's inference code: a sorted copy, Python slices, an un-permuted (T, K, H) sum."""
    K = ids.shape[1]
    counts = torch.zeros(ids.shape[0], E, dtype=ids.dtype).scatter_(1, ids, 1).sum(0)
    order = ids.reshape(-1).argsort(stable=True)
    rows, row_w = x[order // K], w.reshape(-1)[order].unsqueeze(-1)
    outputs, start = [], 0
    for e, n in enumerate(counts.cpu().numpy()):
        if n == 0:
            continue
        part = rows[start : start + n]
        outputs.append(bank.run(e, (part * row_w[start : start + n]).to(x.dtype) if on == "input" else part))
        start += n
    done = torch.cat(outputs) if outputs else rows.new_empty(0, x.shape[-1])
    back = torch.empty_like(done)
    back[order] = done
    back = back.view(*ids.shape, -1)
    return (back.sum(1) if on == "input" else (back * w.unsqueeze(-1)).sum(1)).to(x.dtype)


def sort_cumsum(bank, x, ids, w, E, on):
    """One loop over the ends of the groups; scatter_add into the result."""
    K, y = ids.shape[1], torch.zeros_like(x)
    order = ids.flatten().argsort()
    ends = ids.flatten().bincount(minlength=E).cumsum(0).tolist()
    token = order // K
    for e, end in enumerate(ends):
        start = 0 if e == 0 else ends[e - 1]
        if start == end:
            continue
        tok, at = token[start:end], order[start:end]
        out = weighted(bank, e, x[tok], w.flatten()[at, None], on).to(y.dtype)
        y.scatter_add_(0, tok.view(-1, 1).expand(-1, x.shape[-1]), out)
    return y


def split(bank, x, ids, w, E, on):
    K = ids.shape[1]
    _, order = torch.sort(ids.reshape(-1), dim=0)
    counts = torch.bincount(ids.reshape(-1), minlength=E).tolist()
    token, row_w = torch.div(order, K, rounding_mode="floor"), w.reshape(-1)[order].unsqueeze(-1)
    rows = (x[token] * row_w).to(x.dtype) if on == "input" else x[token]
    out = torch.cat([bank.run(e, part) for e, part in enumerate(rows.split(counts, dim=0))], dim=0)
    if on == "output":
        out = (out * row_w).to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, out)


def unique_loop(bank, x, ids, w, E, on):
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        tok, slot = (ids == e).nonzero(as_tuple=True)
        y[tok] += weighted(bank, e, x[tok], w[tok, slot][:, None], on).to(y.dtype)
    return y


def token_loop(bank, x, ids, w, E, on):
    rows = []
    for t in range(x.shape[0]):
        parts = [weighted(bank, int(ids[t, k]), x[t : t + 1], w[t, k], on) for k in range(ids.shape[1])]
        rows.append(sum(parts).to(x.dtype))
    return torch.cat(rows) if rows else torch.zeros_like(x)


def gather(bank, x, ids, w, E, on):
    """The weights are gathered per chosen row: W[ids]."""
    K = ids.shape[1]
    rows = x.repeat_interleave(K, dim=0)
    if on == "input":
        rows = (rows * w.reshape(-1, 1)).to(x.dtype)
    out = bank.run_all(rows.unsqueeze(1), ids.reshape(-1)).squeeze(1).view(*ids.shape, -1)
    return (out.sum(1) if on == "input" else (out * w.unsqueeze(-1)).sum(dim=1)).to(x.dtype)


def take_outputs(bank, x, ids, w, E, on):
    """All experts on all tokens, then the chosen outputs are taken out."""
    out = torch.stack([bank.run(e, x) for e in range(E)], dim=1)
    chosen = out.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return (chosen * w.unsqueeze(-1)).sum(1).to(x.dtype)


def stack_dense(bank, x, w, E, on):
    out = torch.stack([bank.run(e, x) for e in range(E)], dim=-2)
    return (out * w.unsqueeze(-1)).sum(-2).to(x.dtype)


def stack_einsum(bank, x, w, E, on):
    out = torch.stack([bank.run(e, x) for e in range(E)], dim=-2)
    return torch.einsum("...eh,...e->...h", out.to(w.dtype), w).to(x.dtype)


def dense_loop(bank, x, w, E, on):
    y = 0
    for e in range(E):
        y = y + weighted(bank, e, x, w[..., e].unsqueeze(-1), on)
    return y.to(x.dtype)


def bmm_dense(bank, x, w, E, on):
    rows = x.unsqueeze(0).expand(E, -1, -1)
    if on == "input":
        return bank.run_all((rows * w.t().unsqueeze(-1)).to(x.dtype)).sum(0)
    return (bank.run_all(rows) * w.transpose(0, 1)[..., None]).sum(dim=0).to(x.dtype)


def einsum_dense(bank, x, w, E, on):
    out = bank.run_all(x.repeat(E, 1).view(E, -1, x.shape[-1]))
    return torch.einsum("eth,te->th", out.to(w.dtype), w).to(x.dtype)


def loops_over_dense(bank, x, w, E, on):
    """A (T, E) matrix of weights, mostly zero; each expert runs where its column is not."""
    y = torch.zeros_like(x)
    for e in range(E):
        rows = w[:, e] != 0
        y[rows] += weighted(bank, e, x[rows], w[rows, e].unsqueeze(1), on).to(y.dtype)
    return y


SPARSE = {
    f.__name__: f
    for f in (
        all_where,
        all_if,
        hit_loop,
        bool_mask,
        slot_loop,
        slot_where,
        unique_loop,
        token_loop,
        sort_slice,
        sort_cumsum,
        split,
        gather,
        take_outputs,
    )
}
DENSE = {f.__name__: f for f in (dense_loop, stack_dense, stack_einsum, bmm_dense, einsum_dense, loops_over_dense)}
STACKED = ("gather", "bmm_dense", "einsum_dense")
"""Forms that need the whole stack of weights."""
ANY_RANK = ("dense_loop", "stack_dense", "stack_einsum")
"""Forms that take (batch, length, H) as it is."""
ALL_ROWS = ("slot_where", "dense_loop", "stack_dense", "stack_einsum", "bmm_dense", "einsum_dense", "take_outputs")
"""Forms that run every expert on every token."""
MULTIPLIES_BY_ZERO = ("dense_loop", "stack_dense", "stack_einsum", "bmm_dense", "einsum_dense", "bool_mask")
"""Forms in which a token meets zero times the weight or the output of an expert that it did not choose."""
