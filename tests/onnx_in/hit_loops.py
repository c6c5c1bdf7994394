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
