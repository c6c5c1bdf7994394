"""Routers that read more than the token: its id, another tensor, the caller's choice, the layer before."""

import torch
from torch import nn

from tests.zoo.case import case, made_by, seq
from tests.zoo.routers import D, E, K, Routed


class HashRouted(Routed):
    """Hash layers: the expert is a fixed function of the token id, given beside x."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randint(E, (50, K)))

    def forward(self, x, input_ids):
        ids = self.table[input_ids].reshape(-1, K)
        flat_x = x.reshape(-1, D)
        w = self.gate(flat_x).sigmoid().gather(1, ids)
        return self.dispatch(flat_x, ids, w).view_as(x)


@case(made_by(lambda s, g: ((torch.randn(*s, D, generator=g), torch.randint(50, s, generator=g)), {})), experts=E)
def router_hash_of_token_id():
    return HashRouted()


class ModuloRouted(Routed):
    """Top-1 by ``input_ids % E`` with weight one."""

    def forward(self, x, input_ids):
        out = torch.zeros_like(x)
        for e in range(E):
            mine = input_ids % E == e
            out[mine] = self.ffs[e](x[mine])
        return out


@case(
    made_by(lambda s, g: ((torch.randn(*s, D, generator=g),), {"input_ids": torch.randint(99, s, generator=g)})),
    experts=E,
)
def router_modulo_of_token_id():
    return ModuloRouted()


class GivenIds(Routed):
    """The caller routed already."""

    def forward(self, x, topk_ids, topk_weights):
        return self.dispatch(x, topk_ids, topk_weights)


def _given(s, g):
    t = s[0] * s[1]
    ids = torch.rand(t, E, generator=g).topk(K).indices
    return (torch.randn(t, D, generator=g), ids), {"topk_weights": torch.rand(t, K, generator=g)}


@case(made_by(_given), experts=E)
def router_outside():
    return GivenIds()


class OtherTensor(Routed):
    """The router reads another tensor than the experts do."""

    def forward(self, x, context):
        w, ids = self.gate(context.reshape(-1, D)).softmax(-1).topk(K)
        return self.dispatch(x.reshape(-1, D), ids, w).view_as(x)


@case(made_by(lambda s, g: ((torch.randn(*s, D, generator=g), torch.randn(*s, D, generator=g)), {})), experts=E)
def router_reads_another_tensor():
    return OtherTensor()


class Sequence(Routed):
    """The whole sequence goes to the experts that its mean asks for."""

    def forward(self, x):
        w, ids = self.gate(x.mean(1)).softmax(-1).topk(K)
        n = x.shape[1]
        ids, w = ids.repeat_interleave(n, 0), w.repeat_interleave(n, 0)
        return self.dispatch(x.reshape(-1, D), ids, w).view_as(x)


@case(seq(D), experts=E)
def router_per_sequence():
    return Sequence()


class SequencesPicked(Routed):
    """Each sequence is picked whole by the one expert that its mean asks for."""

    def forward(self, x):
        w, ids = self.gate(x.mean(1)).softmax(-1).topk(1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.ffs):
            mine = torch.where(ids[:, 0] == number)[0]
            y[mine] = expert(x[mine]) * w[mine, :, None]
        return y


@case(seq(D), experts=E)
def sequences_picked_and_weighed():
    return SequencesPicked()


class WithState(Routed):
    """The router mixes its hidden state with that of the layer before."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(D, 12)
        self.gate = nn.Linear(12, E)

    def forward(self, x, state=None):
        s = self.cell(x)
        s = s if state is None else s + 0.5 * state
        w, ids = self.gate(s.flatten(0, 1)).softmax(-1).topk(K)
        return self.dispatch(x.flatten(0, 1), ids, w).view_as(x), s


class TwoLayersWithState(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([WithState(), WithState(), WithState()])

    def forward(self, x):
        state = None
        for layer in self.layers:
            y, state = layer(x, state)
            x = x + y
        return x


@case(seq(D), experts=E, moe=3)
def router_state_of_previous_layer():
    return TwoLayersWithState()


class GivenMask(Routed):
    """The caller routed already and gives a mask over the experts, as integers or booleans."""

    def forward(self, x, mask, weights):
        out = torch.zeros_like(x)
        for e in range(E):
            (rows,) = torch.where(mask[:, e] != 0)
            out.index_add_(0, rows, self.ffs[e](x[rows]) * weights[rows])
        return out


class GivenSlots(Routed):
    """A mask for each of a token's slots, and a weight for each slot: the experts of Switch."""

    def forward(self, x, mask, weights):
        out = torch.zeros_like(x)
        for e in mask.sum((0, 1)).nonzero():
            rows, slot = torch.where(mask[:, :, e[0]] != 0)
            out.index_add_(0, rows, self.ffs[e[0]](x[rows]) * weights[rows, slot, None])
        return out


def _masks(dtype, *slots):
    """The example names one expert for each token or slot, or none; the later calls any number of them."""

    def make(i):
        g = torch.Generator().manual_seed(4000 + i)
        t = (6, 1, 9, 14)[i % 4]
        mask = torch.nn.functional.one_hot(torch.randint(E, (t, *slots), generator=g), E)
        mask[t // 2] = 0
        if i:
            mask |= torch.rand(mask.shape, generator=g) > 0.6
        weights = torch.rand(t, *(slots or (1,)), generator=g)
        return (torch.randn(t, D, generator=g), mask.to(dtype), weights), {}

    return make


@case(_masks(torch.int64), experts=E)
def router_outside_gives_a_mask():
    return GivenMask()


@case(_masks(torch.bool), experts=E)
def router_outside_gives_a_boolean_mask():
    return GivenMask()


@case(_masks(torch.int64, 2), experts=E)
def router_outside_gives_a_mask_for_each_slot():
    return GivenSlots()


class RemembersItsDtype(Routed):
    """Switch's router notes the dtype that it was called with, for a cast at the end."""

    def forward(self, x):
        self.input_dtype = x.dtype
        h = x.reshape(-1, D).float()
        w, ids = self.gate(h).softmax(-1).topk(K)
        return self.dispatch(h, ids, w).to(self.input_dtype).view_as(x)


@case(seq(D), experts=E)
def router_remembers_its_dtype():
    return RemembersItsDtype()


class AnyNumber(Routed):
    """A mask of zeros and ones: which experts a token may use, any number of them; the router weighs those."""

    def forward(self, x, mask):
        weights = self.gate(x).softmax(-1) * mask
        out = torch.zeros_like(x)
        for e in range(E):
            rows = mask[:, e].nonzero().flatten()
            out.index_add_(0, rows, self.ffs[e](x[rows]) * weights[rows, e, None])
        return out


class SlotsWeighedByExpert(Routed):
    """A mask for each slot, and the weight is the expert's, whatever the slot."""

    def forward(self, x, mask):
        weights = self.gate(x).softmax(-1)
        out = torch.zeros_like(x)
        for e, hit in enumerate(mask.permute(2, 1, 0)):
            _, rows = torch.where(hit)
            out.index_add_(0, rows, self.ffs[e](x[rows]) * weights[rows, e, None])
        return out


def _without_weights(*slots, density=0.0):
    def make(i):
        g = torch.Generator().manual_seed(5000 + i)
        t = (9, 1, 6, 14)[i % 4]
        mask = torch.nn.functional.one_hot(torch.randint(E, (t, *slots), generator=g), E)
        return (torch.randn(t, D, generator=g), mask | (torch.rand(mask.shape, generator=g) < density).long()), {}

    return make


@case(_without_weights(density=0.4), experts=E)
def router_weighs_what_a_mask_allows():
    return AnyNumber()


@case(_without_weights(2), experts=E)
def router_weighs_the_slots_of_a_mask():
    return SlotsWeighedByExpert()


class SeveralHashes(nn.Module):
    """Two hashes of a token's id, which may meet; the mean of what they name, by weights picked for each token."""

    def __init__(self):
        super().__init__()
        self.register_buffer("primes", torch.tensor([31, 37]))
        self.w_in = nn.Parameter(torch.randn(E, D, 24) * 0.3)
        self.w_out = nn.Parameter(torch.randn(E, 24, D) * 0.3)

    def forward(self, x, input_ids):
        ids = (input_ids[..., None] * self.primes + 7) % E
        hidden = torch.einsum("bth,btkhi->btki", x, self.w_in[ids]).relu()
        return torch.einsum("btki,btkih->btkh", hidden, self.w_out[ids]).mean(2)


@case(made_by(lambda s, g: ((torch.randn(*s, D, generator=g), torch.randint(97, s, generator=g)), {})), experts=E)
def router_several_hashes_of_token_id():
    return SeveralHashes()


class Buckets(Routed):
    """The phase of each row, a column beside it, falls into the interval of an expert."""

    def __init__(self):
        super().__init__()
        self.register_buffer("edges", torch.linspace(0, 1, E + 1)[1:-1])

    def forward(self, x, phase):
        bucket, out = torch.bucketize(phase.squeeze(-1), self.edges), torch.zeros_like(x)
        for number in bucket.unique():
            out[bucket == number] = self.ffs[int(number)](x[bucket == number])
        return out


def rows_with_a_phase(shape, generator):
    count = shape[0] * shape[1] + E
    phase = (torch.arange(count).remainder(E) + torch.rand(count, generator=generator)) / E
    return (torch.randn(count, D, generator=generator), phase[:, None]), {}


@case(made_by(rows_with_a_phase), experts=E)
def router_buckets_of_a_column():
    return Buckets()
