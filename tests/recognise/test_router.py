"""Routers of the softmax family are recognised by value, in whatever form; their near relatives are not."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moeopt
from moeopt.capture.tape import record
from moeopt.ir.specs import RouterSpec
from moeopt.ops.route import route
from moeopt.recognise import router_compare, router_view
from moeopt.recognise.experts import recognize
from moeopt.recognise.router import RouterReading, recognize_router, same_reading
from tests.capture.tiny import rand
from tests.families.build import FAMILIES
from tests.recognise.tiny import E, H, K, MoE, seeded, tape_of
from tests.test_zoo import example
from tests.zoo import CASES


def read(make, dtype=torch.float32, tokens=26):
    """(reading, tape, recognition) of the seeded model; the tokens are many enough to reach every expert."""
    tape = record(seeded(make).to(dtype), ((rand(tokens, H, seed=7) * 2).to(dtype),))
    (found,) = recognize(tape)
    return recognize_router(tape, found), tape, found


# -- every written form of every spec --------------------------------------------------------------------------------


def by_topk(l, s, d):
    if s.score == "topk_softmax":
        top, ids = l.topk(s.top_k)
        return top.softmax(-1, dtype=d), ids
    w, ids = l.softmax(-1, dtype=d).topk(s.top_k)
    return (w / w.sum(-1, keepdim=True) if s.renormalize else w), ids


def by_sort(l, s, d):
    keys = l.softmax(-1, dtype=d) if s.score == "softmax_topk" else l
    ids = keys.argsort(-1, descending=True)[:, : s.top_k]
    w = keys.gather(-1, ids)
    w = w if s.score == "softmax_topk" else w.softmax(-1, dtype=d)
    return (w / w.sum(-1, keepdim=True) if s.renormalize else w), ids


def by_hand(l, s, d):
    """A softmax of exponentials, the ids from the logits."""
    l = l.to(d)
    ids = l.topk(s.top_k, sorted=False).indices
    if s.score == "topk_softmax":
        l = l.gather(1, ids)
    e = (l - l.amax(-1, keepdim=True)).exp()
    p = e / e.sum(-1, keepdim=True)
    w = p if s.score == "topk_softmax" else p.gather(1, ids)
    return (w.div_(w.sum(-1, keepdim=True)) if s.renormalize else w), ids


def by_mask(l, s, d):
    """Minus infinity at the experts that are not chosen."""
    ids = l.topk(s.top_k).indices
    if s.score == "topk_softmax":
        hidden = torch.full_like(l, -math.inf).scatter(1, ids, l.gather(1, ids))
        return hidden.softmax(-1, dtype=d).gather(1, ids), ids
    p = l.softmax(-1, dtype=d)
    kept = torch.zeros_like(p).scatter(1, ids, p.gather(1, ids))
    kept = kept / kept.sum(-1, keepdim=True) if s.renormalize else kept
    return kept.gather(1, ids), ids


FORMS = {f.__name__: f for f in (by_topk, by_sort, by_hand, by_mask)}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    score=st.sampled_from(["softmax_topk", "softmax_topk renormalised", "topk_softmax"]),
    experts=st.integers(3, 6),
    k=st.integers(2, 3),
    model=st.sampled_from([torch.float32, torch.bfloat16]),
    softmax=st.sampled_from([torch.float32, None]),
    cast=st.booleans(),
)
def test_every_form_is_read_as_its_spec(form, score, experts, k, model, softmax, cast):
    k = min(k, experts - 1)
    computed = softmax or model
    if form == "by_hand" and computed != torch.float32:
        computed = torch.float32  # exponentials and their sum in bfloat16 round more than a softmax does
    dtype = None if computed == model else "float32"
    spec = RouterSpec(score.split()[0], k, experts, "renormalised" in score, dtype)

    class Router(MoE):
        top_k = k

        def route(self, x):
            w, ids = FORMS[form](self.router(x), spec, computed)
            return (w.to(x.dtype) if cast else w), ids

        def mix(self, x, w, ids):
            return super().mix(x, w.to(x.dtype), ids)

    reading, tape, found = read(lambda: Router(experts=experts), model)
    assert reading.spec == spec, (reading.text, reading.reason)
    assert reading.text == str(spec) and RouterSpec(**json.loads(reading.encode())) == spec
    agrees_with_route(tape, found, reading, model)


def agrees_with_route(tape, found, reading, dtype):
    """An independent look: the op gives, from the claimed logits, what the model's own code gave."""
    logits = tape.value(reading.logits).reshape(-1, reading.spec.num_experts)
    ids, weights = route(logits, reading.spec)
    own_ids = found.routing.ids.run(tape).long()
    own = torch.zeros(logits.shape).scatter(1, own_ids, found.routing.weights.run(tape, own_ids).float())
    want = torch.zeros(logits.shape).scatter(1, ids, weights.float())
    same = (own != 0).eq(want != 0).all(1)
    assert same.float().mean() > (0.99 if dtype == torch.float32 else 0.7)  # ties of bfloat16 may fall otherwise
    torch.testing.assert_close(own[same], want[same], rtol=4 * torch.finfo(dtype).eps, atol=0)


# -- the logits are the earliest tensor from which the claim holds ----------------------------------------------------


class Softmax(MoE):
    """Softmax, top-k; what the twins below change is on either side of the logits."""

    def before(self, l):
        return l

    def after(self, w):
        return w

    def key(self, p):
        return p

    def route(self, x):
        p = self.before(self.router(x)).softmax(-1)
        ids = self.key(p).topk(self.top_k).indices
        return self.after(p.gather(1, ids)), ids


@pytest.mark.parametrize(
    ("before", "node"),
    [
        (lambda l: l, "addmm"),
        (lambda l: l / 0.7, "div"),
        (lambda l: 5 * torch.tanh(l / 5), "mul"),
        (lambda l: l.clamp(-1, 1), "clamp"),
        (lambda l: l - torch.tensor([0.0, 1.0, 0.5, 0.25]), "sub"),
    ],
    ids=["plain", "temperature", "softcap", "clamp", "offset"],
)
def test_what_comes_before_the_logits_is_their_own_business(before, node):
    make = type("Before", (Softmax,), {"before": lambda self, l: before(l)})
    reading, _, _ = read(make)
    assert reading.spec == RouterSpec("softmax_topk", K, E)
    assert node in str(reading.logits), "the logits are what the softmax reads, not what was done to get there"


# -- near relatives that must not be claimed --------------------------------------------------------------------------


class Bias(Softmax):
    """A correction bias of zeros agrees today, and would not after one step of training."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.zeros(E))

    def key(self, p):
        return p + self.bias


class Sigmoid(Softmax):
    def route(self, x):
        w, ids = self.router(x).sigmoid().topk(self.top_k)
        return w / w.sum(-1, keepdim=True), ids


class SigmoidTopOne(Sigmoid):
    top_k = 1


class ClampedWeights(Softmax):
    def route(self, x):
        l = self.router(x)
        ids = l.topk(self.top_k).indices
        return l.clamp(-30, 30).softmax(-1).gather(1, ids), ids


class TemperatureAfter(Softmax):
    def route(self, x):
        top, ids = self.router(x).topk(self.top_k)
        return (top / 0.8).softmax(-1), ids


class PerExpert(Softmax):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(E))

    def route(self, x):
        w, ids = super().route(x)
        return w * self.scale[ids], ids


class Gated(Softmax):
    """The weights read the tokens by another way, which happens to be one here."""

    def route(self, x):
        w, ids = super().route(x)
        return w * (x.norm(dim=-1, keepdim=True) >= 0).float(), ids


class Groups(Softmax):
    def key(self, p):
        best = p.view(-1, 2, 2).amax(-1)
        kept = torch.zeros_like(best).scatter(1, best.topk(1).indices, 1.0)
        return p * kept.repeat_interleave(2, -1)


class Capacity(Softmax):
    """No token is dropped on the witness: the capacity shows when all prefer one expert."""

    top_k = 1

    def route(self, x):
        w, ids = super().route(x)
        turn = (ids == torch.arange(E)).long().cumsum(0).gather(1, ids)
        return w * (turn <= 22), ids


class Branches(Softmax):
    def route(self, x):
        w, ids = super().route(x)
        return (w * 1.5 if int(ids.max()) < E else w), ids


class NoMaximum(Softmax):
    """exp overflows on logits that a softmax takes."""

    def route(self, x):
        e = self.router(x).exp()
        w, ids = (e / e.sum(-1, keepdim=True)).topk(self.top_k)
        return w, ids


class Dense(Softmax):
    def forward(self, x):
        w = self.router(x).softmax(-1)
        return sum(expert(x) * w[:, e, None] for e, expert in enumerate(self.experts))


class Hard(Softmax):
    def route(self, x):
        ids = self.router(x).softmax(-1).argmax(-1, keepdim=True)
        return torch.ones(ids.shape), ids


class Epsilon(Softmax):
    def after(self, w):
        return w / (w.sum(-1, keepdim=True) + 1e-4)


class Scaled(Softmax):
    def after(self, w):
        return w / w.sum(-1, keepdim=True) * 2.5


class Cut(Softmax):
    def after(self, w):
        return w.clamp(min=1e-4)


class SlightlyOff(Softmax):
    def after(self, w):
        return w * (1 + 2e-5)


TWINS = [
    (Sigmoid, "sigmoid, top-2 of 4, renormalised", "no softmax leads to the weights"),
    (SigmoidTopOne, "top-1 of 4, equal weights", "no softmax leads to the weights"),
    (Bias, "softmax, top-2 of 4, with parameters of its own", "bias enters after the logits"),
    (Scaled, "softmax, top-2 of 4, renormalised, scaled by 2.5", "on other logits"),
    (SlightlyOff, "softmax, top-2 of 4, scaled by 1.00002", "on other logits"),
    (Epsilon, "opaque router, top-2 of 4", "on other logits"),
    (Cut, "opaque router, top-2 of 4", "on other logits"),
    (ClampedWeights, "nearly softmax, top-2 of 4", "on other logits"),
    (TemperatureAfter, "opaque router, top-2 of 4", "on other logits"),
    (NoMaximum, "nearly softmax, top-2 of 4", "on other logits"),
    (Groups, "softmax, top-2 of 4, chosen by another key", "on other logits"),
    (PerExpert, "softmax, top-2 of 4, with parameters of its own", "scale enters after the logits"),
    (Gated, "opaque router, top-2 of 4", "no tensor of one float per token and expert decides both"),
    (Capacity, "opaque router, top-1 of 4", "cumsum may mix tokens"),
    (Branches, "opaque router, top-2 of 4", "Python reads a value"),
    (Dense, "dense softmax over 4", "it has no top-k"),
    (Hard, "top-1 of 4, equal weights", "no softmax leads to the weights"),
]


@pytest.mark.parametrize(("make", "text", "reason"), TWINS, ids=[t[0].__name__ for t in TWINS])
def test_twins_are_not_claimed(make, text, reason):
    reading, _, _ = read(make)
    assert reading.spec is None and reading.encode() == "" and reading.logits is None
    assert reason in reading.reason, reading.reason
    assert reading.text == text


def test_a_scale_below_the_rounding_of_bfloat16_weights_is_seen():
    class Off(Softmax):
        def after(self, w):
            return w * 1.01

    reading, _, _ = read(Off, torch.bfloat16)
    assert reading.spec is None and reading.text == "softmax, top-2 of 4, scaled by 1.01"


def test_noise_is_not_claimed():
    class Noisy(Softmax):
        def before(self, l):
            return l + torch.randn_like(l) * 0.1

    reading, _, _ = read(Noisy)
    assert reading.spec is None and "random" in reading.reason


def test_noise_that_is_multiplied_by_zero_is_none():
    class Idle(Softmax):
        def before(self, l):
            return l + torch.randn_like(l) * 0.0

    reading, _, _ = read(Idle)
    assert reading.spec is not None and reading.text == "softmax, top-2 of 4"


def test_a_wrong_meaning_of_the_spec_would_be_caught(monkeypatch):
    def forgets_to_renormalise(logits, spec):
        return route(logits, RouterSpec(spec.score, spec.top_k, spec.num_experts, False, spec.dtype))

    monkeypatch.setattr(router_compare, "route", forgets_to_renormalise)
    reading, _, _ = read(MoE)
    assert reading.spec != RouterSpec("softmax_topk", K, E, True)


def test_a_router_that_cannot_be_read_stops_nothing(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such op")

    monkeypatch.setattr(router_view, "replay", broken)
    reading, _, _ = read(MoE)
    assert reading.spec is None and reading.text == "opaque router, top-2 of 4"
    assert reading.reason == "its graph does not replay (RuntimeError: no such op)"
    blocks = moeopt.optimize(seeded(MoE), rand(9, H), verify="off").report.blocks
    assert blocks[0].status == "rewritten" and blocks[0].router == "opaque router, top-2 of 4"


class Given(nn.Module):
    """The experts' side: ids and weights are arguments."""

    def __init__(self):
        super().__init__()
        self.moe = MoE()
        del self.moe.router

    def forward(self, x, ids, w):
        return self.moe.mix(x, w, ids)


class Around(nn.Module):
    """The router beside the experts; ``decide`` is what a test changes."""

    def __init__(self):
        super().__init__()
        self.router, self.inner = nn.Linear(H, E), Given()

    def decide(self, w, ids):
        return w, ids

    def forward(self, x):
        w, ids = self.decide(*self.router(x).softmax(-1).topk(K))
        return self.inner(x, ids, w)


class AroundBranching(Around):
    def decide(self, w, ids):
        return (w * 2 if bool(w.max() > 0.999) else w), ids


class AroundNoisy(Around):
    def decide(self, w, ids):
        return w * torch.rand(()).ceil(), ids


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Around, "softmax, top-2 of 4"),
        (AroundBranching, "opaque router, top-2 of 4"),
        (AroundNoisy, "opaque router, top-2 of 4"),
        (lambda: nn.Sequential(Around()), "softmax, top-2 of 4"),
    ],
    ids=["beside", "branching", "noisy", "wrapped"],
)
def test_the_module_around_is_read_with_its_python(make, words):
    block = moeopt.optimize(seeded(make), rand(9, H), verify="off").report.blocks[0]
    assert block.status == "rewritten" and "inner" in block.name, block
    assert block.router == words and bool(block.router_spec) == words.startswith("softmax")


def test_witnesses_that_disagree_claim_nothing():
    (found,) = recognize(tape_of(MoE))
    one = RouterReading("softmax, top-2 of 4", RouterSpec("softmax_topk", 2, 4))
    assert same_reading([one, one], found) == one
    got = same_reading([one, RouterReading("opaque router, top-2 of 4", None, "")], found)
    assert got.spec is None and got.reason == "two probe calls read it differently"


SIGMOID = "sigmoid, top-3 of 8, renormalised, scaled by 2.5, chosen by another key, with parameters of its own"


# -- through the pipeline ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hit_mixtral", "softmax, top-2 of 8, renormalised"),
        ("hit_olmoe_not_renormalised", "softmax, top-2 of 4"),
        ("all_where", "softmax, top-2 of 5, renormalised"),
        ("all_masked_multiply", "softmax, top-2 of 5, renormalised"),
        ("dense_gpt_oss_bmm", "top-2, softmax of 4"),
        ("dense_einsum_threshold", "softmax, top-2 of 4"),
        ("dense_stack_einsum", "top-2, softmax of 5"),
        ("router_softcap_cosine", "softmax, top-2 of 8"),
        ("router_no_aux_t_c", SIGMOID),
        ("router_sparse_mixer", "opaque router, top-2 of 8"),
        ("router_duplicate_ids", "opaque router, top-2 of 8"),
        ("router_hash_of_token_id", "opaque router, top-2 of 8"),
        ("router_zero_experts", "softmax, top-3 of 11, scaled by 2"),
        ("router_outside", "ids and weights given from outside, top-2 of 8"),
        ("dtype_bfloat16_float32_accumulator", "softmax, top-2 of 4"),
    ],
)  # fmt: skip
def test_the_zoo_is_named(name, words):
    case = CASES[name]
    model = case.build()
    report = moeopt.optimize(model, example(case, model), verify="off").report
    (block,) = [b for b in report.blocks if b.kind == "moe"]
    assert block.router == words
    spec = RouterSpec(**json.loads(block.router_spec)) if block.router_spec else None
    assert spec is None or str(spec) == words
    assert type(report).from_json(report.to_json()) == report


def test_softmax_in_float32_of_a_bfloat16_model_is_seen():
    case = CASES["dtype_bfloat16_float32_accumulator"]
    (block,) = moeopt.optimize(case.build(), case.inputs()[0], verify="off").report.blocks
    assert json.loads(block.router_spec)["dtype"] == "float32"


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("mixtral", RouterSpec("softmax_topk", 2, 8, True)),
        ("qwen3_moe", RouterSpec("softmax_topk", 3, 8)),
        ("olmoe", RouterSpec("softmax_topk", 4, 8)),
        ("gpt_oss", RouterSpec("topk_softmax", 2, 4)),
        ("granitemoe", RouterSpec("topk_softmax", 2, 6)),
        ("deepseek_v3", None),
    ],
)
def test_a_router_beside_the_experts_module_is_read_in_the_module_around_them(name, spec):
    pytest.importorskip("transformers")
    family = FAMILIES[name]
    if not family.available:
        pytest.skip(f"this transformers has no {name}")
    blocks = moeopt.optimize(family.build(), family.inputs(), verify="off").report.blocks
    blocks = [b for b in blocks if b.kind == "moe"]
    assert blocks and all(b.status == "rewritten" for b in blocks)
    for block in blocks:
        assert (RouterSpec(**json.loads(block.router_spec)) if block.router_spec else None) == spec
        assert block.router == (str(spec) if spec else SIGMOID)
