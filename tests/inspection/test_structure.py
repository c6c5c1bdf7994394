"""Experts, routers and shared networks are found in home-made models, from shapes and what is seen to choose."""

import pytest
import torch
from torch import nn

import moeopt
from tests.toy_moe import Block, E, H, K, build
from tests.zoo import CASES


def look(model, **options):
    return moeopt.inspect(model, device="H100", **options)


class Stacked(nn.Module):
    """The router is a bare (E, H) parameter beside stacked experts whose bias has its shape too."""

    def __init__(self, top_k: int = 3):
        super().__init__()
        self.router = nn.Parameter(torch.zeros(6, 8))
        self.w1, self.b1 = nn.Parameter(torch.zeros(6, 10, 8)), nn.Parameter(torch.zeros(6, 10))
        self.w2, self.b2 = nn.Parameter(torch.zeros(6, 8, 10)), nn.Parameter(torch.zeros(6, 8))
        self.count = top_k

    def forward(self, x):
        w, ids = torch.sigmoid(x @ self.router.t()).topk(self.count, -1)
        return torch.stack([x @ self.w1[i].t() @ self.w2[i].t() for i in ids.flatten().tolist()])


class Shared(Block):
    def __init__(self):
        super().__init__()
        self.always = nn.Sequential(nn.Linear(H, 2 * H), nn.ReLU(), nn.Linear(2 * H, H))

    def forward(self, x):
        return super().forward(x) + self.always(x)


class Language(nn.Module):
    """Two layers, the second with experts; the head is tied to the embedding where ``tied``."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.words = nn.Embedding(50, H)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(H, H), "ffn": ffn}) for ffn in (self.dense(), build())
        )
        self.head = nn.Linear(H, 50, bias=False)
        if tied:
            self.head.weight = self.words.weight

    @staticmethod
    def dense():
        return nn.Sequential(nn.Linear(H, 4 * H), nn.GELU(), nn.Linear(4 * H, H))

    def forward(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = x + layer["ffn"](layer["mix"](x))
        return self.head(x)


def test_a_list_of_experts():
    found = look(build())
    (kind,) = found.kinds
    assert (kind.experts, kind.top_k, kind.shared, kind.hidden, kind.inner, kind.gated) == (E, K, 0, H, H, True)
    assert kind.router == "softmax, top-2 of 4, renormalised"
    assert found.counts.total == {"experts": E * 3 * H * H, "router": E * H}
    assert found.counts.active == {"experts": K * 3 * H * H, "router": E * H}


def test_a_bare_router_beside_stacked_experts():
    found = look(Stacked())
    (kind,) = found.kinds
    assert (kind.experts, kind.top_k, kind.router) == (6, 3, "sigmoid, top-3 of 6")
    assert found.counts.total == {"experts": 6 * (2 * 80 + 10 + 8), "router": 48}


def test_a_network_for_every_token_is_shared():
    found = look(Shared())
    assert found.kinds[0].shared == 2  # twice as wide as an expert
    assert found.counts.total["shared"] == found.counts.active["shared"] == 4 * H * H + 3 * H


def test_a_whole_model_in_three_conventions():
    found = look(Language())
    experts, rest = E * 3 * H * H, E * H + 8 * H * H + 5 * H + 2 * (H * H + H)
    assert (found.layers, found.moe_layers) == (2, 1)
    assert found.counts.all == experts + rest + 2 * 50 * H
    used = experts * K // E + rest
    assert found.counts.by_convention() == {
        "all": used + 100 * H, "no_input_embedding": used + 50 * H, "no_embeddings": used,
    }  # fmt: skip
    assert found.counts.total["ffn"] == 8 * H * H + 5 * H


def test_a_tied_table_counts_once_and_is_the_head():
    counts = look(Language(tied=True)).counts
    used = counts.by_convention()
    assert used["all"] == used["no_input_embedding"] == used["no_embeddings"] + 50 * H
    assert counts.total["tied"] == 50 * H and "head" not in counts.total


def test_a_list_that_nothing_chooses_from_is_no_moe_unless_the_user_says_so():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(Language.dense() for _ in range(4))
            self.last = nn.Linear(H, 4)

        def forward(self, x):
            return self.last(sum(p(x) for p in self.parts))

    found = look(Heads())
    assert not found.kinds and found.counts.by_convention()["all"] == found.counts.all
    assert "parts holds 4 networks alike, and nothing was seen to choose" in found.notes[0]
    assert look(Heads(), top_k=2).kinds[0].top_k == 2


def test_stacks_of_an_unknown_form_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.zeros(9, 8, 4)), nn.Parameter(torch.zeros(6, 4, 8))

    found = look(Odd())
    assert not found.kinds and "480 parameters in stacked matrices such as w1 belong to no experts" in found.notes[0]


def test_unknown_top_k_is_said_and_not_guessed():
    class TopP(Stacked):
        def forward(self, x):
            p = (x @ self.router.t()).softmax(-1).sort(descending=True)[0]
            return (p.cumsum(-1) < 0.9).nonzero()

    found = look(TopP())
    assert found.kinds[0].top_k is None and set(found.counts.by_convention().values()) == {None}
    assert "give top_k" in found.notes[0] and "an unknown number of them" in str(found)
    assert found.to_dict()["top_k"] is None


def test_the_model_is_left_as_it_was():
    model = Stacked()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = set(vars(model))
    look(model)
    assert set(vars(model)) == attributes and model.training
    assert all(torch.equal(v, before[k]) and type(v) is torch.Tensor for k, v in model.state_dict().items())


FORMS = ("layout_gate_up", "layout_dbrx", "layout_parameter_lists", "hand_named_experts", "router_zero_experts",
         "capacity_tutel", "split_transformers_style", "dense_einsum")  # fmt: skip


@pytest.mark.parametrize("name", [n for n in FORMS if n in CASES])
def test_written_forms(name):
    case = CASES[name]
    (kind,) = look(case.build()).kinds
    assert (kind.blocks, kind.experts) == (case.moe, case.experts) and kind.top_k


@pytest.mark.parametrize("name", sorted(n for n in CASES if n.startswith("plain_")))
def test_no_experts_where_there_are_none(name):
    assert not look(CASES[name].build()).kinds
