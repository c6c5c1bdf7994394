"""A damaged kernel does not pass the check of the first load: one damage for each field, and for what it computes."""

import ctypes

import pytest
import torch

from moeopt.ir.specs import ACTIVATIONS
from moeopt.ops.native import call as calls
from moeopt.ops.native import library
from moeopt.ops.native.selfcheck import first_difference, specs

ROWS, ACTIVATION, CLAMPS, ON_INPUT, IDENTITY, BY_EXPERT, NORM, COMPUTE, ACT, ACCUM, TERM, ROUNDS = range(12)


def damaged(kernel, damage):
    """The kernel behind a damage of its ``moeopt_spec``."""

    def run(address):
        words = (ctypes.c_int64 * 2).from_address(address.value)  # abi, and where the spec is
        given = calls._Spec.from_address(words[1])
        copy = calls._Spec.from_buffer_copy(given)
        damage(copy)
        words[1] = ctypes.addressof(copy)
        return kernel.library.run(address)

    return run


def whole(index, value):
    def damage(spec):
        spec.whole[index] = value(spec.whole[index]) if callable(value) else value

    return damage


def number(name, value):
    return lambda spec: setattr(spec, name, value(getattr(spec, name)))


def limit(i):
    def damage(spec):
        spec.limits[i] *= 0.5

    return damage


DAMAGES = {
    "gate for up": whole(ROWS, lambda r: {0: 1, 1: 0, 2: 3, 3: 2}.get(r, r)),
    "interleaved as halves": whole(ROWS, lambda r: {2: 0}.get(r, r)),
    **{f"{name} is another": whole(ACTIVATION, lambda a, i=i: (i + 1) % 14 if a == i else a)
       for i, name in enumerate(ACTIVATIONS)},
    "no alpha": number("alpha", lambda a: 1.0 if a else a),
    **{f"no {name}": whole(CLAMPS, lambda c, i=i: c & ~(1 << i)) for i, name in enumerate(calls._LIMITS)},
    **{f"another {name}": limit(i) for i, name in enumerate(calls._LIMITS)},
    "no offset": number("up_offset", lambda a: 0.0),
    "weight on the other side": whole(ON_INPUT, lambda a: 1 - a),
    "no identity": whole(IDENTITY, 0),
    "identity always": whole(IDENTITY, 1),
    "no norm": whole(NORM, 0),
    "another epsilon": number("norm_eps", lambda e: e * 100),
    "rounding of float32": whole(COMPUTE, 1),
    "activation in bfloat16": whole(ACT, 1),
    "sum in bfloat16": whole(ACCUM, 1),
    "rows of 8 bits as floats": whole(ROUNDS, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_field_is_found(best, name):
    assert first_difference(damaged(best, DAMAGES[name]), best.library.bit), name


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("scaled", lambda y: y.mul_(1.01)),
        ("last column lost", lambda y: y[:, -1:].zero_()),
        ("last token lost", lambda y: y[-1:].zero_()),
        ("rows shifted", lambda y: y.copy_(y.roll(1, 1))),
        ("a NaN", lambda y: y[0, :1].fill_(torch.nan)),
    ],
)
def test_a_damaged_result_is_found(best, name, damage, monkeypatch):
    from moeopt.ops.native import selfcheck

    honest = selfcheck.call

    def wrong(*args):
        y = honest(*args)
        damage(y)
        return y

    monkeypatch.setattr(selfcheck, "call", wrong)
    assert first_difference(best.library.run, best.library.bit), name


def test_the_undamaged_kernel_passes(kernel):
    assert first_difference(kernel.library.run, kernel.library.bit) == ""


def test_the_check_has_every_value_of_every_field():
    seen = specs()
    assert {s.activation for s in seen} == set(ACTIVATIONS)
    for field, values in {
        "rows": 6,
        "w_in_layout": 2,
        "w_out_layout": 2,
        "weight_on": 2,
        "out_of_range": 2,
        "combine": 2,
    }.items():
        assert len({getattr(s, field) for s in seen}) == values, field
    for field in (*calls._LIMITS, "out_norm_eps", "compute_dtype", "act_dtype", "accum_dtype", "out_dtype"):
        assert any(getattr(s, field) is not None for s in seen), field


def test_a_kernel_that_fails_the_check_is_not_used(best, monkeypatch):
    monkeypatch.setattr(library, "first_difference", lambda run, isa: "silu: 1.0e+00 apart")
    with pytest.raises(library.NoLibrary, match=r"computes something else than the reference here \(silu: .*report it"):
        library.checked(best.library)
