"""What a bundle may take: measured before it is taken, refused with the limit's name, and settable."""

import math

import pytest
import torch
from torch import nn

import moeopt
from moeopt.backends.torch.bundle import load_torch_bundle, verify_torch_bundle
from moeopt.bundle import memory
from moeopt.bundle.memory import Meter, needed
from moeopt.bundle.op_allowlist import guarded, op_named
from moeopt.errors import BundleError, LimitError, UsageError
from moeopt.limits import LoadLimits
from tests.backends.torch.toys import H, rows, save

MIB = 1 << 20


@pytest.mark.parametrize("value", [0, -1, math.nan, "9", True, []])
@pytest.mark.parametrize("name", ["seconds", "bytes"])
def test_a_limit_is_a_positive_number(name, value):
    with pytest.raises(UsageError, match=f"LoadLimits.{name} is .*: give a positive number, or None for the default"):
        moeopt.LoadLimits(**{name: value})


def test_the_defaults_grow_with_the_bundle():
    default = LoadLimits()
    assert default.seconds_for(0) == 10 and default.seconds_for(500_000_000) == 20
    assert default.bytes_for(0) == 2 << 30 and default.bytes_for(MIB, MIB) == (2 << 30) + 16 * MIB
    assert LoadLimits(seconds=3, bytes=MIB).seconds_for(1 << 40) == 3
    assert LoadLimits(seconds=3, bytes=MIB).bytes_for(1 << 40, 1 << 40) == MIB


class Outer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, None, :] * x[None, :, :]).sum((1, 2))


def test_a_call_beyond_the_limit_is_refused_before_it_is_made(tmp_path):
    bundle = save(tmp_path / "b", Outer().eval())
    engine = load_torch_bundle(bundle, limits=LoadLimits(bytes=MIB))
    assert engine(rows(9)).shape == (9,)
    text = (
        r"the graph stops at 'mul.*' \(aten.mul.Tensor\): .* asks for 3.4e\+07 bytes.*limits="
        r"moeopt.LoadLimits\(bytes=...\)\) or `moeopt verify --bytes`"
    )
    with pytest.raises(LimitError, match=text):
        engine(rows(1024))
    assert load_torch_bundle(bundle)(rows(1024)).shape == (1024,)
    assert isinstance(LimitError(""), BundleError)


def test_verify_has_the_limit_too(tmp_path):
    bundle = save(tmp_path / "b", Outer().eval())
    with pytest.raises(LimitError, match="LoadLimits"):
        verify_torch_bundle(bundle, limits=LoadLimits(bytes=16))
    with pytest.raises(LimitError, match=r"longer than 1e-09 s.*LoadLimits\(seconds=...\)"):
        verify_torch_bundle(bundle, limits=LoadLimits(seconds=1e-9))


def test_what_is_dropped_counts_no_more(tmp_path):
    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(50):
                x = x.sin()
            return x

    size = rows(1000).numel() * 4
    engine = load_torch_bundle(save(tmp_path / "b", Chain().eval()), limits=LoadLimits(bytes=3 * size))
    assert engine(rows(1000)).shape == (1000, H)


def test_a_view_holds_what_it_is_a_view_of():
    x = torch.zeros(1000)
    meter = Meter(1e9, [x])
    made = torch.ones(1000)
    view = made[:1]
    for value in (x, made, view):
        meter.add(value)
    assert meter.held == 4000
    meter.drop(made)
    assert meter.held == 4000
    meter.drop(view)
    assert meter.held == 0


def test_sizes_are_measured_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(memory.Meter, "check", lambda self, op, *rest: asked.append(str(op)))
    engine = load_torch_bundle(save(tmp_path / "b"))
    engine(rows(3))
    first = len(asked)
    engine(rows(3))
    assert first and len(asked) == first
    engine(rows(4))
    assert len(asked) == 2 * first


T = torch.zeros
SIZED = {
    "aten.mm.default": ([T(8, 2), T(2, 16)], 512),
    "aten.linear.default": ([T(3, 8, 2), T(16, 2)], 1536),
    "aten.add.Tensor": ([T(8, 1), T(1, 16)], 512),
    "aten.full.default": ([[4, 4], 1.0], 64),
    "aten.new_empty.default": ([T(1), [4, 4]], 64),
    "aten.softmax.int": ([T(4, 4), -1], 64),
    "aten.topk.default": ([T(4, 4), 4], 192),
    "aten.sym_size.int": ([T(4, 4), 0], 0),
    "aten.expand.default": ([T(1), [1 << 40]], 0),
    "aten.repeat.default": ([T(4), [3, 2]], 96),
    "aten.cat.default": ([[T(4), T(4)]], 32),
    "aten.index.Tensor": ([T(8, 4), [torch.zeros(16, dtype=torch.int64)]], 256),
    "aten.nonzero.default": ([T(8, 4)], 512),
    "aten.one_hot.default": ([torch.tensor([1, 2]), 100], 1600),
    "aten.bincount.default": ([torch.tensor([100])], 808),
    "aten.einsum.default": (["a,b->ab", [T(8), T(16)]], 512),
    "aten.arange.default": ([100], 800),
}


@pytest.mark.parametrize("name", SIZED)
def test_what_an_op_takes_is_told_before(name):
    """At least what its result has, and not an order more."""
    args, least = SIZED[name]
    assert least <= needed(op_named(name), args, {}) <= 8 * least


def test_parts_are_counted():
    wide = torch.zeros(1).expand(1 << 40)
    for name, args in (("unbind.int", [wide]), ("split.Tensor", [wide, 2]), ("chunk.default", [T(4), 1 << 62])):
        with pytest.raises(LimitError, match="parts of a tensor, and 65536 is the most"):
            needed(op_named(f"aten.{name}"), args, {})
    assert needed(op_named("aten.split.Tensor"), [wide, 1 << 39], {}) == 0


@pytest.mark.parametrize(("name", "value"), [("layout", 99), ("dtype", 99), ("memory_format", 3)])
def test_an_integer_is_no_dtype(tmp_path, name, value):
    from tests.backends.torch.test_damage import edit, reseal

    bundle = save(tmp_path / "b")
    node = {"op": "aten._to_copy.default", "args": [{"node": "input"}], "kwargs": {name: value}, "out": "zz"}
    edit(
        bundle / "graph.json",
        lambda data: data["nodes"].insert(0, {**node, "args": [{"node": data["inputs"][0]["name"]}]}),
    )
    reseal(bundle)
    with pytest.raises(BundleError, match=f"is given {value} for {name}, which is no {name}"):
        load_torch_bundle(bundle)


def test_an_op_that_stops_is_named(tmp_path):
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(x[:, 0].long())

    engine = load_torch_bundle(save(tmp_path / "b", Looks().eval(), golden_inputs=(), golden_outputs=()))
    with pytest.raises(
        BundleError, match=r"the graph stops at 'embedding' \(aten.embedding.default\): index out of range"
    ):
        engine(rows() * 0 + 9)


def test_guarded_is_the_op_where_nothing_is_to_be_checked():
    assert guarded("aten.add.Tensor") is torch.ops.aten.add.Tensor
