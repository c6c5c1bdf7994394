"""Where the numbers lie: packed, interleaved, square, transposed, ParameterLists, biases here but not there."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import case, flat, seq


def rand(*shape, scale=0.25):
    return nn.Parameter(torch.randn(*shape) * scale)


class Layout(nn.Module):
    """Stacked weights in a loop; a subclass says how expert ``e`` reads its own."""

    def __init__(self, H=24, inter=16, E=4, K=2):
        super().__init__()
        self.E, self.K = E, K
        self.router = rand(H, E)
        self.setup(E, H, inter)

    def setup(self, E, H, inter):
        self.w1 = rand(E, 2 * inter, H)
        self.w2 = rand(E, H, inter)

    def expert(self, e, x):
        g, u = F.linear(x, self.w1[e]).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.w2[e])

    def forward(self, x):
        weights, ids = torch.softmax(x @ self.router, dim=-1).topk(self.K)
        y = torch.zeros_like(x)
        for e in range(self.E):
            tok, slot = torch.where(ids == e)
            y.index_add_(0, tok, self.expert(e, x[tok]) * weights[tok, slot].unsqueeze(-1))
        return y


class UpGate(Layout):
    def expert(self, e, x):
        u, g = F.linear(x, self.w1[e]).chunk(2, -1)
        return F.linear(u * F.gelu(g), self.w2[e])


class Interleaved(Layout):
    def expert(self, e, x):
        h = F.linear(x, self.w1[e])
        return F.linear(F.silu(h[:, 0::2]) * h[:, 1::2], self.w2[e])


class InterleavedUp(Layout):
    def expert(self, e, x):
        u, g = F.linear(x, self.w1[e]).unflatten(-1, (-1, 2)).unbind(-1)
        return F.linear(F.silu(g) * u, self.w2[e])


class InOut(Layout):
    """(E, H, 2I) and (E, I, H): ``x @ w``."""

    def setup(self, E, H, inter):
        self.w1, self.w2 = rand(E, H, 2 * inter), rand(E, inter, H)

    def expert(self, e, x):
        g, u = (x @ self.w1[e]).split(self.w1.shape[-1] // 2, dim=-1)
        return (F.silu(g) * u) @ self.w2[e]


class Dbrx(Layout):
    """One flat (E*I, H) matrix each; W_in is (out, in), W_out is used as (in, out)."""

    def setup(self, E, H, inter):
        self.inter, self.hidden = inter, H
        self.w1, self.v1, self.w2 = rand(E * inter, H), rand(E * inter, H), rand(E * inter, H)

    def expert(self, e, x):
        w1 = self.w1.view(self.E, self.inter, self.hidden)[e]
        v1 = self.v1.view(self.E, self.inter, self.hidden)[e]
        w2 = self.w2.view(self.E, self.inter, self.hidden)[e]
        return (F.silu(x.matmul(w1.t())) * x.matmul(v1.t())).matmul(w2)


class FlatSlices(Dbrx):
    """One stacked parameter sliced by hand in the loop."""

    def expert(self, e, x):
        rows = slice(e * self.inter, (e + 1) * self.inter)
        return torch.mm(F.relu(torch.mm(x, self.w1[rows].T)), self.w2[rows])

    def setup(self, E, H, inter):
        super().setup(E, H, inter)
        del self.v1


class HalvesByHand(Layout):
    """No chunk: two slices of the weight itself, one linear each."""

    def expert(self, e, x):
        half = self.w1.shape[1] // 2
        return F.linear(F.silu(F.linear(x, self.w1[e, :half])) * F.linear(x, self.w1[e, half:]), self.w2[e])


class OneParameterForAll(Layout):
    """Gate, up and down live in a single (E, 3, I, H) parameter."""

    def setup(self, E, H, inter):
        self.w = rand(E, 3, inter, H)

    def expert(self, e, x):
        g, u, d = self.w[e]
        return (F.silu(x @ g.T) * (x @ u.T)) @ d


class Lists(Layout):
    """Functional weights in ParameterLists."""

    def setup(self, E, H, inter):
        self.w1 = nn.ParameterList([rand(2 * inter, H) for _ in range(E)])
        self.w2 = nn.ParameterList([rand(H, inter) for _ in range(E)])


class FlippedBank(Layout):
    """Expert e owns slice E-1-e: order comes from the dataflow, not from the storage."""

    def expert(self, e, x):
        return super().expert(self.E - 1 - e, x)


class Permuted(Layout):
    """The bank is shuffled by a buffer of physical slots."""

    def setup(self, E, H, inter):
        super().setup(E, H, inter)
        self.register_buffer("slot_of", torch.tensor([2, 0, 3, 1]))

    def expert(self, e, x):
        return super().expert(self.slot_of[e].item(), x)


class Biased(Layout):
    """Biases in and out, in only, out only, or on the gate half only."""

    where = "both"

    def setup(self, E, H, inter):
        super().setup(E, H, inter)
        self.b1 = rand(E, 2 * inter, scale=1.0) if self.where in ("both", "in") else None
        self.b2 = rand(E, H, scale=1.0) if self.where in ("both", "out") else None
        self.bg = rand(E, inter, scale=1.0) if self.where == "gate" else None

    def expert(self, e, x):
        g, u = F.linear(x, self.w1[e], None if self.b1 is None else self.b1[e]).chunk(2, -1)
        g = g if self.bg is None else g + self.bg[e]
        return F.linear(F.silu(g) * u, self.w2[e], None if self.b2 is None else self.b2[e])


class BiasIn(Biased):
    where = "in"


class BiasOut(Biased):
    where = "out"


class BiasGate(Biased):
    where = "gate"


class BiasOfGateLinear(Layout):
    """Separate Linear modules; only the gate projection has a bias."""

    def setup(self, E, H, inter):
        self.gate = nn.ModuleList([nn.Linear(H, inter) for _ in range(E)])
        self.up = nn.ModuleList([nn.Linear(H, inter, bias=False) for _ in range(E)])
        self.down = nn.ModuleList([nn.Linear(inter, H, bias=False) for _ in range(E)])

    def expert(self, e, x):
        return self.down[e](torch.sigmoid(self.gate[e](x)) * self.up[e](x))


class Wider(Layout):
    """Experts map H to another width."""

    def setup(self, E, H, inter):
        self.w1, self.w2 = rand(E, 2 * inter, H), rand(E, 40, inter)

    def forward(self, x):
        weights, ids = torch.softmax(x @ self.router, dim=-1).topk(self.K)
        y = x.new_zeros(x.shape[0], 40)
        for e in range(self.E):
            tok, slot = torch.where(ids == e)
            y.index_add_(0, tok, self.expert(e, x[tok]) * weights[tok, slot].unsqueeze(-1))
        return y


def register(name, build, **options):
    build.__name__ = name
    case(flat(24), experts=4, **options)(build)


register("layout_gate_up", lambda: Layout())
register("layout_up_gate", lambda: UpGate())
register("layout_interleaved", lambda: Interleaved())
register("layout_interleaved_up_first", lambda: InterleavedUp())
register("layout_in_out", lambda: InOut())
register("layout_square_w_out", lambda: Layout(inter=24))
register("layout_square_w_out_in_out", lambda: InOut(inter=24))
register("layout_square_dbrx", lambda: Dbrx(inter=24))
register("layout_hidden_is_twice_inter", lambda: Layout(inter=12))
register("layout_hidden_is_twice_inter_in_out", lambda: InOut(inter=12))
register("layout_dbrx", lambda: Dbrx())
register("layout_flat_slices", lambda: FlatSlices())
register("layout_halves_by_hand", lambda: HalvesByHand())
register("layout_one_parameter_for_all", lambda: OneParameterForAll())
register("layout_parameter_lists", lambda: Lists())
register("layout_flipped_bank", lambda: FlippedBank())
register("layout_permuted_bank", lambda: Permuted())
register("layout_bias_both", lambda: Biased())
register("layout_bias_in_only", lambda: BiasIn())
register("layout_bias_out_only", lambda: BiasOut())
register("layout_bias_on_gate_half", lambda: BiasGate(), expect="either")
register("layout_bias_of_gate_linear", lambda: BiasOfGateLinear())
register("layout_wider_output", lambda: Wider())
register("layout_square_everything", lambda: Dbrx(H=24, inter=24, E=4, K=4))


class StrKeys(nn.Module):
    """A ModuleDict with str keys, in an order that is not the routing order."""

    def __init__(self):
        super().__init__()
        self.route = nn.Linear(16, 3)
        names = ["2", "0", "1"]
        self.experts = nn.ModuleDict({n: self.net() for n in names})

    @staticmethod
    def net():
        return nn.Sequential(
            nn.Sequential(nn.Linear(16, 24), nn.SiLU()), nn.Sequential(nn.Identity(), nn.Linear(24, 16))
        )

    def forward(self, x):
        p = self.route(x).softmax(-1)
        w, i = p.max(-1)
        out = torch.empty_like(x)
        for e in range(3):
            hit = i == e
            out[hit] = self.experts[str(e)](x[hit])
        return out * w.unsqueeze(-1)


@case(seq(16), experts=3)
def layout_module_dict_str_keys():
    return StrKeys()
