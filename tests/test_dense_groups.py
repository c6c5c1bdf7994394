"""Groups of neurons end to end: unequal ones, given ones, those active together; on torch and as engines."""

import dataclasses

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import UsageError
from moeopt.pipeline import dense as drive_dense
from tests.capture.tiny import rand
from tests.helpers import assert_same, run
from tests.recognise.test_dense_ffn import Packed
from tests.recognise.tiny import GLU, H, I, ffn, seeded
from tests.test_dense import Around, Glu, Two, forwards, split

X = rand(3, 7, H)
ODD = [[11, 0, 5], [1, 2, 3, 4, 6], [7, 8, 9, 10]]
FORMS = {
    "plain": lambda: ffn(bias=True),
    "separate": GLU,
    "gate|up": lambda: Packed(bias=True),
    "up|gate": lambda: Glu("up|gate", nn.functional.silu, True),
    "interleaved": lambda: Packed("interleaved", bias=True),
}


@pytest.mark.parametrize("groups", [None, "coactivation", {"block": ODD}], ids=["unequal", "coactivation", "given"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, groups):
    model = seeded(lambda: Around(FORMS[form]()))
    count = 3 if isinstance(groups, dict) else 5
    opt = split(model, experts=count, groups=groups)
    (block,) = opt.report.blocks
    assert (block.status, block.experts) == ("rewritten", count), block.reason
    for x in (X, X[:1, :1]):  # one row takes the kernel's way for decode
        assert_same(run(opt, ((x,), {})), run(model, ((x,), {})))
    assert forwards(opt.model)[0].fallbacks == 0
    assert {p.data_ptr() for p in opt.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert block.lowering.startswith("moeopt::experts (split, every group active; groups of ")
    assert ("picked at each call" in block.lowering) == (groups is not None)


def test_what_picking_costs_is_in_the_report():
    (block,) = split(seeded(lambda: Around(GLU())), experts=3, groups={"*": ODD}).report.blocks
    picked = 8 * 3 * H * 4 / 1e6  # the second group and the third are not of neighbours only in part: 5 + 3 neurons
    assert block.lowering == (
        f"moeopt::experts (split, every group active; groups of 3 to 5 neurons; {picked:.3g} MB of weights picked at "
        "each call)"
    )


def test_sizes_that_are_equal_and_neighbours_need_no_words():
    (block,) = split(seeded(lambda: Around(GLU())), experts=3, groups={"block": [range(4), range(4, 8), range(8, 12)]})\
        .report.blocks  # fmt: skip
    assert block.lowering == "moeopt::experts (split, every group active)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_picked_weights_are_read_anew(dtype):
    make = lambda: Around(Packed(bias=True)).to(dtype)  # noqa: E731
    model, x = seeded(make), X.to(dtype)
    opt = split(model, x, experts=3, groups={"block": ODD})
    with torch.no_grad():
        model.block.w13.weight.mul_(2)
        model.block.w2.weight.data.neg_()  # no version counter sees this
    assert_same(run(opt, ((x,), {})), run(model, ((x,), {})))
    opt.load_state_dict(seeded(make, seed=5).state_dict())
    assert_same(run(opt, ((x,), {})), run(model, ((x,), {})))


def test_gradients_reach_the_users_parameters():
    model = seeded(lambda: Around(Packed("interleaved", bias=True)))
    opt = split(model, experts=3, groups={"block": ODD})
    opt(X).square().sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(X).square().sum().backward()
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-5)  # sums of 21 rows in another order
    assert not forwards(opt.model)[0].fallbacks


class Halves(nn.Module):
    """Neurons that answer the first half of the features stand between those that answer the second."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(H, I, bias=False), nn.Linear(I, H)
        with torch.no_grad():
            self.a.weight[::2, H // 2 :] = 0
            self.a.weight[1::2, : H // 2] = 0

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_coactive_neurons_come_together():
    x = rand(64, H)
    x[::2, H // 2 :] = 0
    x[1::2, : H // 2] = 0
    opt = split(seeded(Halves, seed=3), x, experts=2, groups="coactivation", verify="fast")
    ((bank, _),) = forwards(opt.model)[0].banks
    weight = opt.model.a.weight
    for e in range(2):
        own = bank.w_in(e)[0]
        assert torch.equal(own, weight[e::2])


def test_two_in_one_home_and_saved(tmp_path):
    model = seeded(Two)
    opt = split(model, experts=5, groups="coactivation")
    assert [b.status for b in opt.report.blocks] == ["rewritten"] * 2
    loaded = moeopt.load(opt.save(tmp_path / "bundle"))
    assert_same(run(loaded, ((X,), {})), run(model, ((X,), {})))
    assert moeopt.verify(tmp_path / "bundle").passed


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"groups": {"blok": ODD}}, "groups['blok'] matches no dense FFN; they are in 'block'"),
        ({"groups": {"*": [[0], [1], [2]]}}, "groups['*']: block has neurons 0 to 11; each must be in one group"),
        ({"groups": {"*": [[0, 99], [1], [2]]}}, "groups['*']: block has neurons 0 to 11; each must be in one group"),
        ({"experts": 13}, "experts=13: the widest dense FFN of the model has 12 neurons; give at most that"),
    ],
)
def test_usage_errors(options, text):
    with pytest.raises(UsageError) as caught:
        split(seeded(lambda: Around(ffn())), **({"experts": 3} | options))
    assert text in str(caught.value)


@pytest.mark.parametrize("groups", [None, "coactivation"])
def test_too_few_neurons(groups):
    opt = split(seeded(lambda: nn.Sequential(Around(ffn()), Around(ffn(inner=10)))), experts=11, groups=groups)
    first, second = opt.report.blocks
    assert first.status == "rewritten"
    assert second.reason == "it has 10 neurons, too few for 11 groups; give experts=10 or less"


def same_neurons_twice(found):
    first, second, *rest = found.experts
    return dataclasses.replace(found, experts=[first, dataclasses.replace(second, neurons=first.neurons), *rest])


def order_lost(found):
    """The rows of a group's W_in are counted from the end, the columns of its W_out are not."""
    first, *rest = found.experts
    w_in = tuple(dataclasses.replace(w, dm=tuple(-s for s in w.dm), origin=_last(w)) for w in first.w_in)
    return dataclasses.replace(found, experts=[dataclasses.replace(first, w_in=w_in), *rest])


def neuron_lost(found):
    """The first group forgets its last neuron."""
    first, *rest = found.experts
    short = dataclasses.replace(
        first,
        w_in=tuple(dataclasses.replace(w, m=w.m - 1) for w in first.w_in),
        b_in=tuple(dataclasses.replace(b, m=b.m - 1) for b in first.b_in),
        w_out=dataclasses.replace(first.w_out, k=first.w_out.k - 1),
    )
    return dataclasses.replace(found, experts=[short, *rest])


def _last(ref):
    return tuple(o + (ref.m - 1) * s for o, s in zip(ref.origin, ref.dm, strict=True))


@pytest.mark.parametrize("damage", [same_neurons_twice, order_lost, neuron_lost])
def test_damage_is_caught(damage, monkeypatch):
    honest = drive_dense.split
    monkeypatch.setattr(drive_dense, "split", lambda ffn, groups: damage(honest(ffn, groups)))
    lists = {"*": [[0, 5, 9], [1, 3, 11], [2, 4, 6, 7, 8, 10]]}
    model = seeded(lambda: Around(Packed(bias=True)))
    unequal = damage is neuron_lost
    (block,) = split(model, verify="fast", experts=5 if unequal else 3, groups=None if unequal else lists).report.blocks
    assert block.status == "declined" and block.reason.startswith("it was rewritten, verified and reverted"), block


class Both(nn.Module):
    """A gated FFN, and a plain one of another size."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Around(Packed(bias=True)), Around(ffn(inner=10))

    def forward(self, x):
        return self.second(self.first(x))


def test_as_an_engine(tmp_path):
    """Groups of 5, 4 and 3 picked neurons, and of 4, 3 and 3 neighbours: saved, loaded, verified."""
    pytest.importorskip("onnxruntime")
    model = seeded(Both)
    opt = split(model, backend="onnxruntime", experts=3, groups={"first.block": ODD}, verify="fast")
    assert [(b.status, b.experts) for b in opt.report.blocks] == [("rewritten", 3)] * 2
    assert all(b.lowering.startswith("onnxruntime ") for b in opt.report.blocks)
    want = run(model, ((X,), {}))
    assert_same(run(opt, ((X,), {})), want)
    loaded = moeopt.load(opt.save(tmp_path / "bundle"))
    assert_same(run(loaded, ((X,), {})), want)
    certificate = moeopt.verify(tmp_path / "bundle")
    assert certificate.passed and certificate.executed
