"""The CPU kernel for calls in which every token goes to every expert, against the reference; and what it leaves."""

import pytest
import torch

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ListExpertWeights
from moeopt.ops.kernels import every_expert
from moeopt.ops.native import dispatch
from moeopt.ops.native.dispatch import experts_on_cpu
from moeopt.ops.reference import experts_reference

T, E, H, O = 9, 3, 10, 14
EPS = torch.finfo(torch.float32).eps


def bank_of(spec, sizes=(2, 2, 2), bias=True, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)

    def tensor(*shape, turn=False):
        made = torch.randn(shape, generator=rng) / shape[-1] ** 0.5
        return (made.t().contiguous() if turn else made).to(dtype)

    widths = {"separate": (1, 1), "plain": (1,)}.get(spec.rows, (2,))
    w_in = [[tensor(n * I, H, turn=spec.w_in_layout == "io") for I in sizes] for n in widths]
    w_out = [tensor(O, I, turn=spec.w_out_layout == "io") for I in sizes]
    b_in = [[tensor(n * I) for I in sizes] for n in widths] if bias else None
    return ListExpertWeights(w_in, w_out, b_in, [tensor(O) for _ in sizes] if bias else None)


def call(spec, bank):
    rng = torch.Generator().manual_seed(1)
    x, weights = torch.randn(T, H, generator=rng), torch.randn(T, E, generator=rng).softmax(-1)
    return x, torch.arange(E).repeat(T, 1), weights, bank, spec


SPECS = [
    ExpertsSpec(rows="plain", activation="identity"),
    ExpertsSpec(rows="plain", activation="gelu", combine="expert"),
    ExpertsSpec(rows="separate"),
    ExpertsSpec(rows="gate|up", w_in_layout="io", w_out_layout="io"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 5, 3)], ids=str)
def test_it_is_the_reference(spec, bias, sizes):
    args = call(spec, bank_of(spec, sizes, bias))
    assert every_expert.fits(args[0], args[2], spec) and every_expert.in_float32(args[3])
    got, want = every_expert.every_expert(args[0], args[2], *args[3:]), experts_reference(*args)
    assert got.shape == want.shape == (T, O)
    # the same products, their sums in another order and the weight before the second: 8 roundings of a row's size
    assert (got - want).norm(dim=-1).le(8 * EPS * want.norm(dim=-1)).all()


@pytest.mark.parametrize("quicker", ["neurons", "native", "torch"])
def test_a_call_takes_it_where_it_is_the_quicker(monkeypatch, quicker):
    spec = SPECS[1]
    args, taken, honest = call(spec, bank_of(spec)), [], every_expert.every_expert
    monkeypatch.setattr(dispatch, "_of_every", lambda *args: quicker)
    monkeypatch.setattr(every_expert, "every_expert", lambda *a: (taken.append(1), honest(*a))[1])
    got, want = experts_on_cpu(*args), experts_reference(*args)
    assert bool(taken) is (quicker == "neurons")
    torch.testing.assert_close(got, want, rtol=16 * EPS, atol=16 * EPS)  # entries that cancel lose what the row has


def test_a_bias_of_another_dtype_is_seen_before_it_runs(monkeypatch):
    spec = SPECS[1]
    args = call(spec, bank_of(spec))
    args[3].b_in_l[0][1] = args[3].b_in_l[0][1].bfloat16()
    monkeypatch.setattr(dispatch, "_of_every", lambda *args: "neurons")
    monkeypatch.setattr(every_expert, "every_expert", lambda *args: pytest.fail("it takes float32 alone"))
    torch.testing.assert_close(experts_on_cpu(*args), experts_reference(*args), rtol=16 * EPS, atol=16 * EPS)


def test_what_it_leaves_to_the_others(monkeypatch):
    spec, offered = SPECS[0], []
    monkeypatch.setattr(dispatch, "_of_every", lambda *args: offered.append(args[-2]) or "torch")
    x, ids, weights, bank, _ = call(spec, bank_of(spec))
    one_dropped, turned = ids.clone(), ids.flip(1)
    one_dropped[4, 2] = E  # a weight of zero names no expert
    experts_on_cpu(x, ids, weights, bank, spec)
    assert offered == [True]
    for other in (one_dropped, turned):
        experts_on_cpu(x, other, weights, bank, spec)
    experts_on_cpu(x, ids[:, :2], weights[:, :2], bank, spec)
    assert offered == [True], "not every row names every expert"
    experts_on_cpu(x[:1], ids[:1], weights[:1], bank, spec)
    experts_on_cpu(x, ids, weights.bfloat16(), bank, spec)
    experts_on_cpu(x, ids, weights, bank_of(spec, dtype=torch.bfloat16), spec)
    on_input = ExpertsSpec(rows="plain", activation="identity", weight_on="input")
    experts_on_cpu(x, ids, weights, bank_of(on_input), on_input)
    assert offered == [True] + [False] * 4
