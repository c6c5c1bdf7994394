"""Loops over experts as torch's tracing exporter sees them: unrolled for all experts, or for a sample's."""

import torch
import torch.nn.functional as F
from torch import nn

H, I, E, K = 16, 24, 8, 2


class HitLoop(nn.Module):
    """(T, H) -> (T, H). ``over`` "all" experts; those that are "hit"; "rows": each one's rows as Python numbers;
    "any": asks each mask; "slices" or "splits": sorts the rows and cuts them by Python numbers."""

    def __init__(self, over):
        super().__init__()
        self.over = over
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H)) for _ in range(E)])

    def forward(self, x):
        weights, ids = torch.softmax(self.gate(x), -1).topk(K, -1)
        y = torch.zeros_like(x)
        if self.over == "any":
            return self.by_masks(x, weights, ids, y)
        if self.over in ("slices", "splits"):
            return self.by_counts(x, weights, ids, y)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        hit = (mask.sum((-1, -2)) > 0).nonzero().flatten().tolist()
        for e in range(E) if self.over == "all" else hit:
            slot, row = torch.where(mask[e])
            if self.over == "rows":
                slot, row = torch.tensor(slot.tolist()), torch.tensor(row.tolist())
            y = y.index_add(0, row, self.experts[e](x[row]) * weights[row, slot, None])
        return y

    def by_masks(self, x, weights, ids, y):
        for e in range(E):
            mask = (ids == e).any(-1)
            if mask.any():
                y[mask] += self.experts[e](x[mask]) * ((ids == e) * weights).sum(-1)[mask].unsqueeze(-1)
        return y

    def by_counts(self, x, weights, ids, y):
        order = ids.flatten().sort()[1]
        rows, counts = x[order // K], torch.bincount(ids.flatten(), minlength=E).tolist()
        if self.over == "slices":
            ends = [sum(counts[: e + 1]) for e in range(E)]
            parts = [rows[end - count : end] for end, count in zip(ends, counts, strict=True)]
        else:
            parts = rows.split(counts)
        out = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return y.index_add(0, order // K, out * weights.flatten()[order].unsqueeze(-1))


def hit_loop(over, path, tokens):
    """The file at ``path``, traced on ``tokens`` tokens; returns the path as text."""
    torch.manual_seed(0)
    model, x = HitLoop(over).eval(), torch.randn(tokens, H)
    torch.onnx.export(
        model, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "tokens"}}, opset_version=17
    )
    return str(path)


class FrozenChoice(nn.Module):
    """(T, H) -> (T, H) with every expert in the file and the sample's choice as constants, by ``how``: "ids" of each
    token, "table" of its weights, "places" in the list of hits, "one" expert alone, the "capacity", or not:
    "none", a threshold chooses; "groups", the sums of groups' highest scores choose a group first; "theirs", the
    experts choose among all tokens."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H)) for _ in range(E)])
        self.up, self.down = nn.Parameter(torch.randn(E, H, I)), nn.Parameter(torch.randn(E, I, H))

    def forward(self, x):
        scores = torch.softmax(self.gate(x), -1)
        weights, ids = scores.topk(K, -1)
        table, y = torch.zeros_like(scores).scatter(1, ids, weights), torch.zeros_like(x)
        if self.how == "places":
            hits = (table > 0).sum(0).nonzero().flatten()
            for place in range(int(hits.shape[0])):
                each = F.gelu(x @ self.up[hits[place]]) @ self.down[hits[place]]
                y = y + each * table.index_select(1, hits[place].view(1))
            return y
        if self.how in ("capacity", "theirs"):
            most = int((table > 0).sum(0).max())
            for e, expert in enumerate(self.experts):
                best, rows = (table if self.how == "capacity" else scores)[:, e].topk(most)
                y = y.index_add(0, rows, expert(x[rows]) * best[:, None])
            return y
        if self.how == "one":
            return self.experts[int(ids[0, 0])](x) * weights[:, :1]
        if self.how == "ids":
            table = torch.zeros_like(scores).scatter(1, torch.tensor(ids.tolist()), weights)
        if self.how == "table":
            table = torch.tensor(table.tolist())
        if self.how == "none":
            table = scores * (scores >= weights[:, -1:])
        if self.how == "groups":
            sums = scores.view(-1, 2, E // 2).topk(2, -1)[0].sum(-1)
            best = torch.zeros_like(sums).scatter(1, sums.topk(1, -1)[1], 1.0)
            kept = self.gate(x).softmax(-1) * best[..., None].expand(-1, 2, E // 2).reshape(-1, E)
            weights, ids = kept.topk(K, -1)
            table = torch.zeros_like(scores).scatter(1, ids, weights)
        return sum(table[:, e, None] * expert(x) for e, expert in enumerate(self.experts))


def frozen_choice(how, path, tokens=12, free=True):
    """The file at ``path``, traced on ``tokens`` tokens; returns the path as text, and the sample.

    ``free``: the file takes any number of tokens.
    """
    torch.manual_seed(0)
    model, x = FrozenChoice(how).eval(), torch.randn(tokens, H)
    torch.onnx.export(
        model,
        (x,),
        path,
        dynamo=False,
        input_names=["x"],
        dynamic_axes={"x": {0: "tokens"}} if free else None,
        opset_version=17,
    )
    return str(path), x
