"""``profile`` as its users call it: counts equal the model's own routing, nothing is silently absent."""

import json
import warnings

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import StaleModelWarning
from tests.toy_moe import Block, Expert, H, K, build, optimized, seeded


class Two(nn.Module):
    """A block that runs twice a call, another that runs once, and a dense FFN."""

    def __init__(self):
        super().__init__()
        self.again, self.once, self.ffn = Block(), Block(6), Expert()

    def forward(self, x, twice=True):
        x = self.again(x) if not twice else self.again(self.again(x))
        return self.ffn(self.once(x))


class PerSequence(Block):
    """Experts choose tokens: declined."""

    def route(self, x):
        w, tokens = self.gate(x).softmax(-1).t().topk(2, dim=-1)
        return tokens, w

    def loop(self, x, tokens, w):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y.index_add_(0, tokens[e], expert(x[tokens[e]]) * w[e, :, None])
        return y


def chosen(model, batches):
    """Loads by the model's own router: its ``route`` is listened to while the original runs."""
    loads = {name: torch.zeros(len(m.experts), dtype=torch.int64) for name, m in model.named_modules() if is_moe(m)}
    for name, m in model.named_modules():
        if is_moe(m):
            m.route = listening(m.route, loads[name])
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for m in filter(is_moe, model.modules()):
        del m.route
    return {name: load.tolist() for name, load in loads.items()}


def is_moe(module):
    return isinstance(module, Block)


def listening(route, load):
    def listen(x):
        ids, w = route(x)
        load.add_(torch.bincount(ids.flatten(), minlength=load.numel()))
        return ids, w

    return listen


BATCHES = [seeded(2, 8, H), seeded(1, 3, H, seed=6), seeded(5, H, seed=7)[None], torch.zeros(0, 4, H)]


@pytest.fixture(scope="module")
def two():
    return build(Two)


@pytest.fixture(scope="module")
def profiled(two):
    return moeopt.profile(two, iter(BATCHES))


def test_counts_equal_the_models_own_routing(two, profiled):
    want = chosen(two, BATCHES)
    assert {layer.name: layer.fired for layer in profiled.layers} == want
    again, once = profiled.layers
    assert (again.calls, once.calls) == (8, 4) and (again.tokens, once.tokens) == (48, 24)
    assert all(sum(x.fired) == x.slots == K * x.tokens and x.top_k == K for x in profiled.layers)
    assert profiled.batches == 4 and not profiled.unread


def test_the_model_is_not_changed(two, profiled):
    assert all("forward" not in m.__dict__ for m in two.modules())


def test_weights_that_are_renormalised_have_mass_one(profiled):
    mass = profiled.layers[0].confidence["mass"]
    assert mass["min"] > 1 - 1e-6 and mass["max"] < 1 + 1e-6


def test_the_json_has_fixed_keys_and_a_matrix_of_pairs(profiled):
    data = json.loads(profiled.to_json())
    assert set(data) == {"schema", "model", "batches", "seconds", "thresholds", "layers", "unread", "notes"}
    assert set(data["layers"][0]) == {
        "experts", "name", "fired", "calls", "tokens", "slots", "negative", "beyond", "zero_weight", "without", "top_k",
        "unseen", "why_unseen", "imbalance", "pairs", "together", "confidence", "cost", "together_above_diagonal",
    }  # fmt: skip
    together = torch.tensor(data["layers"][0]["together"])
    assert together.diagonal().tolist() == profiled.layers[0].fired and torch.equal(together, together.t())
    assert sum(p["tokens"] for p in data["layers"][0]["pairs"]) <= profiled.layers[0].tokens


def test_the_text_fits_80_columns_and_names_every_block(profiled):
    text = str(profiled)
    assert max(map(len, text.splitlines())) <= 80
    assert "4 batches, 48 tokens; 2 blocks profiled, 0 not" in text
    for layer in profiled.layers:
        assert layer.name in text and f"{layer.imbalance['cv']:.2f}" in text


def test_an_optimized_model_is_taken_as_it_is_and_called_once_without_data():
    opt = optimized(build())
    found = moeopt.profile(opt, measure=False)
    assert found.layers[0].tokens == 16 and found.layers[0].cost is None
    assert found.notes == ("the inputs are those that the model was optimised with",)
    assert moeopt.profile(opt, {"x": seeded(1, 2, H)}).layers[0].tokens == 2


def test_inputs_are_made_up_where_that_is_possible():
    class Rows(Block):
        def forward(self, x):
            return self.loop(x, *self.route(x))

    found = moeopt.profile(build(Rows), measure=False)
    assert found.layers[0].tokens > 0 and "random tokens" in found.notes[0]


def test_a_declined_block_is_listed_with_its_reason():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.odd = Block(), PerSequence()

        def forward(self, x):
            return self.odd(self.good(x))

    found = moeopt.profile(build(Both), BATCHES[0])
    (unread,) = found.unread
    assert [x.name for x in found.layers] == ["good"] and unread.name == "odd" and unread.reason
    assert f"not profiled: odd\n    why     {unread.reason[:20]}" in str(found)


def test_calls_that_run_the_original_code_are_said_to_be_missing():
    opt = optimized(build())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleModelWarning)
        found = moeopt.profile(opt, [BATCHES[0], BATCHES[1], seeded(4, H)], measure=False)
    assert (found.layers[0].calls, found.layers[0].unseen) == (2, 1)
    assert "1 call not counted, it ran its original code: " in " ".join(str(found).split())
    assert found.layers[0].why_unseen in " ".join(str(found).split())


def test_a_block_that_is_no_longer_rewritten_is_not_silently_absent():
    from moeopt.rewrite.install import uninstall

    opt = optimized(build())
    uninstall(opt.model)
    (unread,) = moeopt.profile(opt).unread
    assert unread.name == "Block" and "no longer has this module in rewritten form; optimize it again" in unread.reason


def test_two_groups_of_experts_in_one_module_and_one_module_of_two_names():
    class Pair(Block):
        def __init__(self):
            super().__init__()
            self.second = nn.ModuleList(Expert() for _ in range(4))

        def forward(self, x):
            rows = x.reshape(-1, H)
            ids, w = self.route(rows)
            first, y = self.loop(rows, ids, w), torch.zeros_like(rows)
            for e, expert in enumerate(self.second):
                token, slot = torch.where(ids == e)
                y.index_add_(0, token, expert(first[token]) * w[token, slot, None])
            return y.view(x.shape)

    class Names(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.other = Pair()

        def forward(self, x):
            return self.other(x)

    found = moeopt.profile(build(Names), BATCHES[0], measure=False)
    first, second = found.layers
    assert {first.name[-3:], second.name[-3:]} == {"[0]", "[1]"} and not found.unread
    assert first.fired == second.fired and sum(first.fired) == K * 16


def test_no_call_keeps_an_activation():
    import weakref

    alive = []

    model = build(Block)
    model.gate.register_forward_pre_hook(lambda module, args: alive.append(weakref.ref(args[0])))
    found = moeopt.profile(model, [seeded(2, 8, H)])
    assert found.layers and alive and all(ref() is None for ref in alive)
