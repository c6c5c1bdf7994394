"""Rewrites damaged on purpose: verification must catch every one, and the model must stay right.

Each damage is done between recognition and the program, where a bug of the compiler would be. The
block must end declined with "reverted" in its reason, and the model must run its own code.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.pipeline import coverage as mixture
from tests.toy_moe import Block, E, H, X, build, close, seeded


class BiasedExpert(nn.Module):
    """Two biases, one activation that has a twin in tanh form."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Loop(Block):
    """Home-made: plain gelu experts with biases; weights of a token do not add up to one before they are scaled."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(BiasedExpert() for _ in range(E))

    def forward(self, x):
        rows = x.reshape(-1, H)
        ids, w = self.route(rows)
        return self.loop(rows, ids, w * 1.5).view(x.shape)


class DenseBmm(nn.Module):
    """GPT-OSS's function in dense form: every expert on every token, interleaved rows, clamps, biases."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, E)
        self.w_in, self.b_in = nn.Parameter(torch.randn(E, H, 2 * H) / 4), nn.Parameter(torch.randn(E, 2 * H) / 4)
        self.w_out, self.b_out = nn.Parameter(torch.randn(E, H, H) / 4), nn.Parameter(torch.randn(E, H) / 4)

    def forward(self, x):
        rows = x.reshape(-1, H)
        top, ids = torch.topk(self.router(rows), 2, -1)
        weights = torch.zeros(rows.shape[0], E, dtype=x.dtype).scatter_(1, ids, F.softmax(top, -1))
        h = torch.bmm(rows.repeat(E, 1).view(E, -1, H), self.w_in) + self.b_in[:, None]
        gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
        y = torch.bmm((up + 1) * gate * torch.sigmoid(1.702 * gate), self.w_out) + self.b_out[:, None]
        return (y * weights.t()[..., None]).sum(0).view(x.shape)


def hf_mixtral() -> nn.Module:
    pytest.importorskip("transformers")
    from transformers.models.mixtral import modeling_mixtral as source

    config = source.MixtralConfig(hidden_size=H, intermediate_size=H, num_local_experts=E, num_experts_per_tok=2)
    model = source.MixtralSparseMoeBlock(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.25)
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {"mixtral": hf_mixtral, "loop": Loop, "bmm": DenseBmm}


# -- damages to what was recognised, then to what the op is given --------------------------------------


def experts(change: Callable[[list[Any]], list[Any]]) -> Any:
    return lambda found: dataclasses.replace(found, experts=change(found.experts))


def spec(**fields: Any) -> Any:
    return lambda found: dataclasses.replace(found, spec=dataclasses.replace(found.spec, **fields))


def swap_rows(found: Any) -> Any:
    other = {"gate|up": "up|gate", "interleaved": "interleaved_up", "separate": "separate", "plain": "plain"}
    if found.spec.rows == "separate":
        return experts(lambda all_: [dataclasses.replace(e, w_in=e.w_in[::-1]) for e in all_])(found)
    return spec(rows=other[found.spec.rows])(found)


def transpose(ref: Any) -> Any:
    return dataclasses.replace(ref, w_out=dataclasses.replace(ref.w_out, dk=ref.w_out.dm, dm=ref.w_out.dk))


RECOGNITION: dict[str, Any] = {
    "swap two experts": experts(lambda e: [e[1], e[0], *e[2:]]),
    "off-by-one expert": experts(lambda e: [*e[1:], e[0]]),
    "one expert twice": experts(lambda e: [e[1], *e[1:]]),
    "swap gate and up": swap_rows,
    "transpose W_out": experts(lambda e: [transpose(x) for x in e]),
    "transpose one expert": experts(lambda e: [*e[:-1], transpose(e[-1])]),
    "forget output bias": experts(lambda e: [dataclasses.replace(x, b_out=None) for x in e]),
    "forget input bias": experts(lambda e: [dataclasses.replace(x, b_in=tuple(None for _ in x.b_in)) for x in e]),
    "gelu for gelu_tanh and back": lambda f: spec(activation="gelu_tanh" if f.spec.activation == "gelu" else "gelu")(f),
    "relu": spec(activation="relu"),
    "weight on input": spec(weight_on="input"),
    "no offset on up": spec(up_offset=0.0),
    "no upper clamp": spec(gate_max=0.1),
}


KERNEL: dict[str, Any] = {
    "drop renormalisation": lambda x, ids, w: (x, ids, w * (0.6 + 0.4 * torch.sigmoid(w))),
    "an epsilon where it matters": lambda x, ids, w: (x, ids, w / (w.sum(-1, keepdim=True) + 1e-4)),
    "wrong scale": lambda x, ids, w: (x, ids, w * 1.01),
    "drop the last token": lambda x, ids, w: (x, ids, torch.cat([w[:-1], w[-1:] * 0])),
    "drop a slot": lambda x, ids, w: (x, ids, torch.cat([w[:, :-1], w[:, -1:] * 0], 1)),
    "shift tokens": lambda x, ids, w: (x.roll(1, 0), ids, w),
    "weights in float16": lambda x, ids, w: (x, ids, w.half().to(w.dtype)),
    "ids plus one": lambda x, ids, w: (x, (ids + 1) % E, w),
    "weights of another slot": lambda x, ids, w: (x, ids, w.flip(-1)),
    "last expert is dead": lambda x, ids, w: (x, ids, torch.where(ids == E - 1, 0, w)),
    "many tokens lose one": lambda x, ids, w: (x, ids, torch.cat([w[:16], w[16:] * 0])),
}

NOT_A_DAMAGE = {
    ("mixtral", "forget output bias"), ("mixtral", "forget input bias"), ("mixtral", "no offset on up"),
    ("loop", "swap gate and up"), ("loop", "no offset on up"), ("loop", "no upper clamp"),
}  # fmt: skip
"""Pairs in which the damage changes nothing: there is no bias, gate or offset to damage."""


def optimise(family: str, level: str) -> tuple[nn.Module, moeopt.Optimized]:
    model = build(FAMILIES[family])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, moeopt.optimize(model, X, verify=level)


def caught(model: nn.Module, opt: moeopt.Optimized) -> bool:
    (block,) = [b for b in opt.report.blocks if b.kind == "moe"]
    if block.status != "declined" or "reverted" not in block.reason:
        return False
    x = seeded(3, 7, H)
    with torch.no_grad():
        assert torch.equal(opt(x), model(x)), "a declined block must run the original code"
    assert opt.certificate.passed is not False
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_undamaged_is_rewritten(family):
    model, opt = optimise(family, "strict")
    assert len(opt.report.rewritten) == 1, str(opt.report)
    with torch.no_grad():
        close(opt(X), model(X))


# Which damages are done to which family: all of them at night, and on every day each damage to one family. The tests of
# every day take turns, so that each family meets damages of all kinds. Strict verification does all that the fast one
# does, and more: a part of one family shows that.
EACH = [(family, level, "all") for family in FAMILIES for level in ("fast", "strict")]
OF_EVERY_DAY = [*((family, "fast", "its turn") for family in FAMILIES), ("loop", "strict", "its turn")]
DAMAGED = pytest.mark.parametrize(
    ("family", "level", "which"), [*OF_EVERY_DAY, *(pytest.param(*one, marks=pytest.mark.nightly) for one in EACH)]
)


def damages_of(all_of_them: dict[str, Any], family: str, which: str) -> dict[str, Any]:
    """The damages that change something of ``family``; on every day, those whose turn it is."""
    chosen = {}
    for number, (name, damage) in enumerate(all_of_them.items()):
        able = [f for f in FAMILIES if (f, name) not in NOT_A_DAMAGE]
        if family in (able if which == "all" else [able[number % len(able)]]):
            chosen[name] = damage
    return chosen


def test_each_damage_is_done_on_every_day():
    for damages in (RECOGNITION, KERNEL):
        turns = [damages_of(damages, family, "its turn") for family in FAMILIES]
        assert sorted(name for turn in turns for name in turn) == sorted(damages)
        assert min(map(len, turns)) >= 3


@DAMAGED
def test_damaged_recognition_is_caught(family, level, which, monkeypatch):
    recognize = mixture.recognize
    missed, damages = [], damages_of(RECOGNITION, family, which)
    for name, damage in damages.items():

        def damaged(tape, known=None, *rest, damage=damage, **kwargs):
            found = recognize(tape, None if known is None else damaged.honest, *rest, **kwargs)
            damaged.honest = found if known is None else damaged.honest
            return [damage(f) for f in found]

        monkeypatch.setattr(mixture, "recognize", damaged)
        if not caught(*optimise(family, level)):
            missed.append(name)
    print(f"{family}, {level}: {len(damages) - len(missed)} of {len(damages)} damages caught")
    assert not missed and len(damages) >= (8 if which == "all" else 3)


@DAMAGED
def test_damaged_op_is_caught(family, level, which, monkeypatch):
    from moeopt.rewrite import install as program

    honest = program.experts
    missed, damages = [], damages_of(KERNEL, family, which)
    for name, damage in damages.items():
        monkeypatch.setattr(
            program, "experts", lambda x, ids, w, bank, spec, damage=damage: honest(*damage(x, ids, w), bank, spec)
        )
        if not caught(*optimise(family, level)):
            missed.append(name)
    print(f"{family}, {level}: {len(damages) - len(missed)} of {len(damages)} damages caught")
    assert not missed


def test_duplicate_ids_ignored_is_caught(monkeypatch):
    """A token may name one expert twice; a rewrite that adds it once must fail."""
    from moeopt.rewrite import install as program

    class Given(Block):
        def forward(self, x, ids, w):
            return self.loop(x, ids, w)

    ids = torch.randint(0, E, (12, 2), generator=torch.Generator().manual_seed(0))
    ids[:3, 1] = ids[:3, 0]
    call = (seeded(12, H), ids, seeded(12, 2).abs())
    honest = program.experts

    def once(x, ids, w, bank, spec):
        again = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)
        return honest(x, ids, torch.where(again, 0, w), bank, spec)

    model = build(Given)
    assert len(moeopt.optimize(model, call).report.rewritten) == 1
    monkeypatch.setattr(program, "experts", once)
    opt = moeopt.optimize(model, call)
    (block,) = opt.report.blocks
    assert block.status == "declined" and "reverted" in block.reason
    close(opt(*call), model(*call))


def test_a_damage_past_the_blocks_is_caught_end_to_end(monkeypatch):
    """A rewrite that was right when its block was verified, and wrong once installed."""
    from moeopt.backends.torch import backend
    from moeopt.rewrite import install as program

    honest, run = program.experts, backend.end_to_end

    def wrong_now(*args, **kwargs):
        monkeypatch.setattr(program, "experts", lambda x, ids, w, b, s: honest(x, ids, w * 1.01, b, s))
        return run(*args, **kwargs)

    monkeypatch.setattr(backend, "end_to_end", wrong_now)
    model = build()
    opt = moeopt.optimize(model, X)
    (block,) = opt.report.blocks
    assert block.status == "declined" and block.reason.startswith("reverted: the whole model was not equivalent")
    assert opt.certificate.passed and not opt.certificate.blocks, "what is left is the model as it was"
    (note,) = opt.certificate.notes
    assert f"{block.name} was rewritten and reverted, for the whole model was not equivalent: " in note
    with torch.no_grad():
        assert torch.equal(opt(X), model(X))
