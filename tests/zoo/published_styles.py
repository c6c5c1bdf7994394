"""Routers of published mixtures, and networks of the experts' own shape that every token passes beside them."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, made_by, seq, token_ids

D, HID, N = 16, 24, 4


def ffn():
    return nn.Sequential(nn.Linear(D, HID), nn.GELU(), nn.Linear(HID, D))


class Routed(nn.Module):
    """Experts in a loop; ``route`` is what differs below."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(ffn() for _ in range(N))

    def mix(self, t, weights, ids):
        y = torch.zeros_like(t)
        for i, expert in enumerate(self.experts):
            row, slot = torch.where(ids == i)
            y.index_add_(0, row, expert(t[row]) * weights[row, slot, None])
        return y

    def forward(self, x):
        t = x.reshape(-1, D)
        return self.mix(t, *self.route(t)).view_as(x)


class TwoWinners(Routed):
    """Two rounds of an argmax; each weight is a softmax over the scores that are near the winner's."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, N, bias=False)

    @staticmethod
    def winner(scores, among, jitter=0.01):
        best, ids = among.max(-1, keepdim=True)
        far = (best - scores) / scores.abs().clamp(min=best) > 2 * jitter
        return among.masked_fill(far, float("-inf")).softmax(-1).gather(-1, ids), ids

    def route(self, t):
        scores = self.gate(t)
        first, one = self.winner(scores, scores)
        second, two = self.winner(scores, scores.scatter(-1, one, float("-inf")))
        return torch.cat((first, second), -1), torch.cat((one, two), -1)


@case(seq(D), experts=N)
def style_winners_in_two_rounds():
    return TwoWinners()


class NullExperts(Routed):
    """Three of the choices compute nothing; the weights of the others are renormalised."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, N + 3, bias=False)

    def route(self, t):
        weights, ids = self.gate(t).softmax(-1).topk(3)
        weights = weights * (ids < N)
        return weights / (weights.sum(-1, keepdim=True) + 1e-6), ids


@case(seq(D), experts=N)
def style_null_experts():
    return NullExperts()


class TopPWithNullExperts(Routed):
    """As many choices as hold 60 % of the probability, two of them of nothing; shared experts behind a gate of their
    own."""

    def __init__(self):
        super().__init__()
        self.gate, self.shared_gate = nn.Linear(D, N + 2, bias=False), nn.Linear(D, 2, bias=False)
        self.shared = nn.ModuleList(ffn() for _ in range(2))

    def forward(self, x):
        t = x.reshape(-1, D)
        probs = self.gate(t).softmax(-1)
        ordered, order = probs.sort(-1, descending=True)
        first = ordered.cumsum(-1) - ordered < 0.6
        chosen = torch.zeros_like(first).scatter(-1, order, first)
        weights = probs * chosen
        weights, y = weights / (weights.sum(-1, keepdim=True) + 1e-9), torch.zeros_like(t)
        for i, expert in enumerate(self.experts):
            row = chosen[:, i].nonzero().squeeze(-1)
            y.index_add_(0, row, expert(t[row]) * weights[row, i, None])
        for part, expert in zip(self.shared_gate(t).softmax(-1).split(1, -1), self.shared, strict=True):
            y = y + expert(t) * part
        return y.view_as(x)


@case(seq(D), experts=N)
def style_top_p_with_null_experts():
    return TopPWithNullExperts()


class Thresholds(Routed):
    """As many experts as are similar enough, and their plain mean; the nearest where none is."""

    def __init__(self):
        super().__init__()
        self.directions, self.thresholds = nn.Parameter(torch.randn(D, N)), nn.Parameter(torch.randn(N) * 0.1)

    def forward(self, x):
        t = x.reshape(-1, D)
        near = torch.sigmoid(F.normalize(t, dim=1) @ F.normalize(self.directions, dim=0))
        on = (near > self.thresholds.sigmoid()).float()
        on = torch.where(on.sum(1, keepdim=True) == 0, F.one_hot(near.argmax(1), N).float(), on)
        count, y = on.sum(1, keepdim=True), torch.zeros_like(t)
        for i, expert in enumerate(self.experts):
            row = on[:, i].nonzero().squeeze(1)
            y[row] += expert(t[row]) / count[row]
        return y.view_as(x)


@case(seq(D), experts=N)
def style_mean_of_those_above_a_threshold():
    return Thresholds()


class Centroids(Routed):
    """The two nearest centroids of a buffer, each with half the weight."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centroids", torch.randn(N, D))

    def route(self, t):
        ids = torch.cdist(t, self.centroids).square().topk(2, largest=False).indices
        return torch.full(ids.shape, 0.5), ids


@case(seq(D), experts=N)
def style_nearest_centroids():
    return Centroids()


class Distilled(nn.Module):
    """The second stage of a router that was distilled: a small embedding of the token chooses."""

    def __init__(self, vocabulary=40, small=6):
        super().__init__()
        self.embed, self.small = nn.Embedding(vocabulary, D), nn.Embedding(vocabulary, small)
        self.centroids = nn.Parameter(torch.randn(N, small))
        self.experts = nn.ModuleList(ffn() for _ in range(N))

    def forward(self, ids):
        x, features = self.embed(ids).view(-1, D), self.small(ids).view(-1, self.small.embedding_dim)
        top = (F.normalize(features, dim=-1) @ F.normalize(self.centroids, dim=-1).t()).argmax(-1)
        share = torch.sigmoid((features * self.centroids[top]).sum(-1, keepdim=True))
        order = top.argsort(stable=True)
        parts = x[order].split(torch.bincount(top, minlength=N).tolist())
        out = torch.cat([f(part) for f, part in zip(self.experts, parts, strict=True)])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return (share * out[back] + (1 - share) * x).view(*ids.shape, D)


@case(token_ids(40), experts=N)
def style_distilled_router():
    return Distilled()


class Hashed(nn.Module):
    """The expert is a hash of the token's number."""

    def __init__(self):
        super().__init__()
        self.embed, self.experts = nn.Embedding(40, D), nn.ModuleList(ffn() for _ in range(N))

    def forward(self, ids):
        x, bucket = self.embed(ids), (ids * 2654435761) % N
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = bucket == i
            if mine.any():
                y[mine] = expert(x[mine])
        return x + y


@case(token_ids(40), experts=N)
def style_hashed_tokens():
    return Hashed()


class ResidualNetwork(Routed):
    """One expert each, and a network of their shape that a second gate mixes in; the load is returned too."""

    def __init__(self):
        super().__init__()
        self.gate, self.own, self.share = nn.Linear(D, N, bias=False), ffn(), nn.Linear(D, 2)

    def forward(self, x):
        t = x.reshape(-1, D)
        scores = self.gate(t.float()).softmax(1)
        ids = scores.argmax(1)
        chosen, y = F.one_hot(ids, N), torch.zeros_like(t)
        outs = [f(t[ids == i]) for i, f in enumerate(self.experts)]
        for i, out in enumerate(outs):
            y[ids == i] = out.type_as(y)
        y = (y * (scores * chosen).sum(1)[:, None]).view_as(x)
        share = self.share(x).softmax(-1)
        return y * share[..., :1] + self.own(x) * share[..., 1:], chosen.sum(0)


@case(seq(D), experts=N)
def style_network_of_the_experts_shape():
    return ResidualNetwork()


class SharedLast(nn.Module):
    """Weights on the experts' rows; a shared network of their shape runs after them, and their sum is added onto it."""

    def __init__(self):
        super().__init__()
        self.first, self.gates = (nn.Parameter(torch.randn(N, HID, D) * 0.2) for _ in range(2))
        self.last = nn.Parameter(torch.randn(N, D, HID) * 0.2)
        self.router, self.shared = nn.Linear(D, N, bias=False), nn.ModuleList()
        self.shared.extend(
            (nn.Linear(D, HID, bias=False), nn.Linear(D, HID, bias=False), nn.Linear(HID, D, bias=False))
        )
        self.register_buffer("bias", torch.randn(N) * 0.1)

    def forward(self, x):
        t = x.reshape(-1, D)
        scores = self.router(t).sigmoid()
        ids = (scores + self.bias).topk(2)[1]
        order = ids.flatten().argsort(stable=True)
        counts = torch.histc(ids.flatten().float(), bins=N, min=0, max=N).int().tolist()
        rows = t[order // 2] * scores.gather(1, ids).flatten()[order, None]
        outs = []
        for i, part in enumerate(rows.split(counts)):
            outs.append((F.silu(part @ self.gates[i].T) * (part @ self.first[i].T)) @ self.last[i].T)
        up, gate, down = self.shared
        y = down(F.silu(gate(t)) * up(t))
        return y.index_add(0, order // 2, torch.cat(outs)).view_as(x)


@case(seq(D), experts=N)
def style_shared_network_that_runs_last():
    return SharedLast()


class Cells(nn.Module):
    """Points in space go to the network of their cell."""

    def __init__(self, side=2):
        super().__init__()
        self.side, cells = side, side**3
        self.first, self.first_bias = nn.Parameter(torch.randn(cells, 3, HID)), nn.Parameter(torch.randn(cells, 1, HID))
        self.last = nn.Parameter(torch.randn(cells, HID, 4) * 0.3)
        self.last_bias = nn.Parameter(torch.randn(cells, 1, 4))

    def forward(self, points):
        at = ((points.tanh() / 2 + 0.5) * self.side).long().clamp(0, self.side - 1)
        cell = (at[:, 0] * self.side + at[:, 1]) * self.side + at[:, 2]
        hidden = torch.baddbmm(self.first_bias[cell], points[:, None], self.first[cell]).relu()
        return torch.baddbmm(self.last_bias[cell], hidden, self.last[cell])[:, 0]


@case(made_by(lambda s, g: ((torch.randn(s[0] * s[1] + 40, 3, generator=g),), {})), experts=8)
def style_cells_of_space():
    return Cells()


class Residual(nn.Module):
    """The experts add their row, and there is no norm."""

    def __init__(self):
        super().__init__()
        self.net = ffn()

    def forward(self, x):
        return x + 0.5 * self.net(x)


class Residuals(Routed):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, N), nn.ModuleList(Residual() for _ in range(N))

    def route(self, t):
        return self.gate(t).softmax(-1).topk(2)


@case(
    seq(D), experts=N, expect="declined", reason="two matmuls with the row itself added.*would not pay.*'onnxruntime'"
)
def style_their_own_rows():
    return Residuals()
