"""Example inputs in the forms that users have them: optimise, then call with other values, live and loaded: equal."""

import collections
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import moeopt
from moeopt.errors import MoeoptError, NotSaveableError, UsageError

B, T, D = 2, 5, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 12), nn.GELU(), nn.Linear(12, D)) for _ in range(4))

    def forward(self, x):
        flat = x.reshape(-1, D)
        weights, pick = self.router(flat).softmax(-1).topk(2, -1)
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(pick == number)
            if token.numel():
                y.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return y.view(x.shape)


class Pair(NamedTuple):
    hidden: Any
    mask: Any


@dataclasses.dataclass
class Batch:
    hidden: torch.Tensor
    mask: torch.Tensor | None = None
    scale: float = 1.0


class Model(nn.Module):
    """A block, and around it one of the functions below, which say how it is called."""

    def __init__(self, forward):
        super().__init__()
        self.block = Block()
        self.__class__ = type("Model", (Model,), {"forward": forward})


def optional(self, x, mask=None, scale=1.0):
    y = self.block(x) * scale
    return y if mask is None else y * mask


def of_batch(self, batch):
    return optional(self, batch.hidden, batch.mask, batch.scale)


def of_pair(self, pair):
    return Pair(optional(self, pair.hidden, pair.mask), pair.mask)


def of_dict(self, batch):
    return {"y": self.block(batch["x"]) + batch["bias"], "mask": batch["mask"]}


def of_two(self, x, y):
    return self.block(x) + y


def of_list(self, xs):
    return [self.block(x) for x in xs]


def of_any(self, *xs, **more):
    return self.block(xs[0]) + xs[1] * more.get("gain", 1.0)


class Draw:
    """Random tensors of one seed."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape):
        return torch.randn(shape, generator=self.generator)


def in_inference_mode(r):
    with torch.inference_mode():
        return r(T, B, D).transpose(0, 1)


def twice(t):
    return t, t


FORMS = {
    "strided": (optional, lambda r: ((r(B, T, D, 2)[..., 0],), {})),
    "transposed": (optional, lambda r: ((r(T, B, D).transpose(0, 1),), {})),
    "sliced": (optional, lambda r: ((r(B, 2 * T + 3, D)[:, 1 : 2 * T + 1 : 2],), {})),
    "expanded": (optional, lambda r: ((r(1, T, D).expand(B, T, D), r(1, 1, 1).expand(B, T, D)), {})),
    "overlapping": (optional, lambda r: ((r(T + D - 1).unfold(0, D, 1),), {})),
    "negated view": (optional, lambda r: ((torch.view_as_complex(r(B, T, D, 2)).conj().imag,), {})),
    "one strided token": (optional, lambda r: ((r(1, 1, D, 2)[..., 0],), {})),
    "wants gradients": (optional, lambda r: ((r(B, T, D).requires_grad_() * 2,), {})),
    "inference mode": (optional, lambda r: ((in_inference_mode(r),), {})),
    "mask of size 1": (optional, lambda r: ((r(B, T, D), r(B, T, 1)), {})),
    "0-dim mask": (optional, lambda r: ((r(T, B, D).transpose(0, 1), r()), {})),
    "None and a number": (optional, lambda r: ((r(B, T, D, 2)[..., 1], None), {"scale": 0.5})),
    "a whole number": (optional, lambda r: ((r(B, T, D),), {"scale": 2, "mask": None})),
    "keywords in another order": (optional, lambda r: ((), {"mask": r(B, T, 2)[..., :1], "x": r(B, T, D)})),
    "positions and keywords": (optional, lambda r: ((r(B, T, D),), {"mask": r(B, 1, 1).expand(B, T, 1)})),
    "named tuple": (of_pair, lambda r: ((Pair(r(T, B, D).transpose(0, 1), r(B, T, D)),), {})),
    "dict": (of_dict, lambda r: (({"mask": r(B, T), "bias": r(2 * D)[::2], "x": r(B, T, D, 2)[..., 0]},), {})),
    "ordered dict": (of_dict, lambda r: ((collections.OrderedDict(x=r(B, T, D), bias=r(D), mask=None),), {})),
    "dataclass": (of_batch, lambda r: ((Batch(r(T, B, D).transpose(0, 1), r(B, T, 1)),), {})),
    "dataclass by keyword": (of_batch, lambda r: ((), {"batch": Batch(r(B, T, D), scale=2.0)})),
    "the same tensor twice": (of_two, lambda r: (twice(r(T, B, D).transpose(0, 1)), {})),
    "views of one storage": (of_two, lambda r: (tuple(r(B, T, 2 * D).split(D, -1)), {})),
    "list": (of_list, lambda r: (([r(B, T, D), r(T, B, D).transpose(0, 1)],), {})),
    "star": (of_any, lambda r: ((r(B, T, D, 2)[..., 0], r(B, T, D)), {"gain": r(D)})),
}


def assert_equal(got, want):
    (got, spec), (want, wanted) = pytree.tree_flatten(got), pytree.tree_flatten(want)
    assert spec == wanted
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.sample(3)
def each_in_one():
    """Each form for both backends; of every day is each form for one of them, the two by turns."""
    for number, name in enumerate(FORMS):
        for backend in ("torch", "onnxruntime"):
            of_every_day = (backend == "torch") == (number % 2 == 0)
            yield pytest.param(backend, name, marks=() if of_every_day else pytest.mark.nightly, id=f"{backend}-{name}")


@pytest.mark.parametrize(("backend", "name"), each_in_one())
def test_every_form_of_a_call(backend, name, tmp_path):
    forward, made = FORMS[name]
    torch.manual_seed(0)
    model = Model(forward).eval()
    optimized = moeopt.optimize(model, made(Draw(0)), backend=backend, verify="fast")
    assert [b.status for b in optimized.report.blocks if b.kind == "moe"] == ["rewritten"] * (
        2 if forward is of_list else 1
    )
    loaded = moeopt.load(optimized.save(tmp_path / "bundle"))
    for seed in (1, 2):
        args, kwargs = made(Draw(seed))
        with torch.no_grad():
            want = model(*args, **kwargs)
            assert_equal(optimized(*args, **kwargs), want)
            assert_equal(loaded(*args, **kwargs), want)


def test_a_field_that_was_none_stays_none(tmp_path):
    torch.manual_seed(0)
    engine = moeopt.optimize(
        Model(of_batch).eval(), (Batch(torch.randn(B, T, D)),), backend="onnxruntime", verify="fast"
    )
    with pytest.raises(UsageError, match=r"\.mask must be None, as in the call that the engine was exported with"):
        engine(Batch(torch.randn(B, T, D), torch.ones(B, T, 1)))
    assert Batch not in pytree.SUPPORTED_NODES, "what the owner's other code makes of the class is theirs"


def with_dtype(self, x, dtype=torch.float32):
    return self.block(x).to(dtype)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_an_argument_that_no_graph_takes_is_named(backend, tmp_path):
    torch.manual_seed(0)
    call = (torch.randn(B, T, D), torch.float64)
    with pytest.raises(NotSaveableError, match="its argument dtype is a dtype .torch.float64., and a graph takes"):
        moeopt.optimize(Model(with_dtype).eval(), call, backend=backend, verify="fast").save(tmp_path / "bundle")


def test_weights_that_were_made_in_inference_mode():
    with torch.inference_mode():
        torch.manual_seed(0)
        model, x = Model(optional).eval(), torch.randn(B, T, D)
        engine = moeopt.optimize(model, x, backend="onnxruntime", verify="fast")
    with torch.no_grad():
        assert_equal(moeopt.optimize(model, x, verify="fast")(x), model(x))
        assert_equal(engine(x), model(x))
    with pytest.raises(
        NotSaveableError, match="block.router.weight was made under torch.inference_mode.*inside it too"
    ):
        moeopt.optimize(model, x, backend="onnxruntime", verify="fast")


@pytest.mark.parametrize(
    ("backend", "where"),
    [
        ("torch", "torch.export.ExportedProgram.run_decompositions"),
        ("onnxruntime", "torch.export.ExportedProgram.run_decompositions"),
        ("onnxruntime", "torch.onnx.export"),
        ("onnxruntime", "onnx_ir.save"),
        ("onnxruntime", "onnxruntime.InferenceSession"),
    ],
)
def test_what_an_exporter_raises_is_a_reason(backend, where, monkeypatch, tmp_path):
    def boom(*args, **kwargs):
        raise LookupError("boom\nand its second line")

    monkeypatch.setattr(where, boom)
    model = nn.Sequential(nn.Linear(D, D), nn.GELU())
    with pytest.raises(MoeoptError, match="boom.*backend='torch'") as caught:
        moeopt.optimize(model, torch.randn(B, T, D), backend=backend, verify="off").save(tmp_path / "bundle")
    assert "second line" not in str(caught.value)


def test_a_call_that_the_runtime_stops_at_names_the_node():
    def rows(self, x, ids):
        return self.block(x) + self.block.router.weight[ids].mean()

    torch.manual_seed(0)
    ids = torch.tensor([0, 3])
    engine = moeopt.optimize(Model(rows).eval(), (torch.randn(B, T, D), ids), backend="onnxruntime", verify="off")
    with pytest.raises(
        UsageError, match=r"stops at the node '[^']+' \(GatherND\): invalid index found, index = 40, with x \(2, 5, 8\)"
    ):
        engine(torch.randn(B, T, D), ids + 40)
