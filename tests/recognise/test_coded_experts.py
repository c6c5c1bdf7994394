"""Experts that a module holds as codes and scales and makes floats of in its own forward, in several styles."""

import math

import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

import moeopt
from moeopt.errors import NotSaveableError

H, I, E, K = 32, 48, 4, 2


class Coded(nn.Module):
    """Codes of gate over up, and of down; ``floats`` says what they mean."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.gate = nn.Linear(H, E, bias=False)
        for name, (out, into) in (("up", (2 * I, H)), ("down", (H, I))):
            self.register_buffer(f"{name}_q", self.codes((E, out, into), g))
            self.register_buffer(f"{name}_s", self.scales((E, out, into), g))

    def codes(self, shape, g):
        return torch.randint(-127, 128, shape, generator=g, dtype=torch.int8)

    def scales(self, shape, g):
        return torch.rand((*shape[:2], 1), generator=g) / 500 + 1e-4

    def floats(self, q, s):
        return q.float() * s

    def forward(self, x):
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            g, u = (x[t] @ self.floats(self.up_q[e], self.up_s[e]).t()).chunk(2, -1)
            y = (F.silu(g) * u) @ self.floats(self.down_q[e], self.down_s[e]).t()
            out = out.index_add(0, t, y * w[t, k, None])
        return out


class Fp8(Coded):
    def codes(self, shape, g):
        return torch.randn(shape, generator=g).mul(40).to(torch.float8_e4m3fn)


class Blocks(Coded):
    """A scale for each 16 weights of a row."""

    def scales(self, shape, g):
        return torch.rand((*shape[:2], shape[2] // 16, 1), generator=g) / 500 + 1e-4

    def floats(self, q, s):
        return (q.float().unflatten(-1, (-1, 16)) * s).flatten(-2)


class Nibbles(Coded):
    """Two codes in a byte, the low nibble first, less 8."""

    def codes(self, shape, g):
        return torch.randint(0, 256, (*shape[:2], shape[2] // 2), generator=g, dtype=torch.uint8)

    def scales(self, shape, g):
        return torch.rand((*shape[:2], 1), generator=g) / 50 + 1e-3

    def floats(self, q, s):
        return (torch.stack([q & 15, q >> 4], -1).flatten(-2).float() - 8) * s


class Words(Nibbles):
    """Eight codes in an int32."""

    def codes(self, shape, g):
        return torch.randint(-(2**31), 2**31 - 1, (*shape[:2], shape[2] // 8), generator=g, dtype=torch.int32)

    def floats(self, q, s):
        return (torch.stack([(q >> (4 * i)) & 15 for i in range(8)], -1).flatten(-2).float() - 8) * s


class Tiles(Fp8):
    """A scale for each 20 x 20 weights, partial ones at both edges."""

    def scales(self, shape, g):
        return torch.rand((shape[0], -(-shape[1] // 20), -(-shape[2] // 20)), generator=g) / 500 + 1e-4

    def floats(self, q, s):
        wide = s.repeat_interleave(20, 0)[: q.shape[0]].repeat_interleave(20, 1)
        return q.float() * wide[:, : q.shape[1]]


STYLES = (Coded, Fp8, Blocks, Nibbles, Words, Tiles)


def float_sizes(directory, backend):
    """Elements of each float weight in a bundle."""
    if backend == "torch":
        return [t.numel() for t in load_file(directory / "weights.safetensors").values() if t.dtype == torch.float32]
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    return [math.prod(w.dims) for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT]


@pytest.mark.sample(2)
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.parametrize("style", STYLES, ids=lambda c: c.__name__)
def test_codes_stay_codes(style, backend, tmp_path):
    torch.manual_seed(0)
    model, x = style().eval(), torch.randn(7, H)
    opt = moeopt.optimize(model, x, backend=backend, verify="fast")
    (block,) = opt.report.blocks
    assert (block.status, block.reason, block.experts) == ("rewritten", "", E)
    coded = style not in (Fp8, Tiles) or backend == "onnxruntime"  # FP8 is in no kernel in C++
    assert ("silu GLU, rows gate|up" if coded else "4 weights an expert") in block.spec and opt.certificate.passed
    opt.save(tmp_path / "b")
    loaded = moeopt.load(tmp_path / "b")
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(loaded(x), want, rtol=1e-4, atol=1e-5)
    assert max(float_sizes(tmp_path / "b", backend)) < H * I  # no matrix is there as floats
    with torch.no_grad():
        model.up_q.view(torch.uint8)[0, 0, 0] += 1
    if backend == "torch":  # the rewritten block reads the codes where they live
        torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5)


class Int8Linear(nn.Module):
    """int8 by int8: the row is rounded at each call, and all that it holds are buffers."""

    def __init__(self, into, out):
        super().__init__()
        self.register_buffer("q", torch.randint(-127, 128, (out, into), dtype=torch.int8))
        self.register_buffer("s", torch.rand(out) / 500 + 1e-4)

    def forward(self, x):
        step = x.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
        return F.linear((x / step).round(), self.q.float()) * step * self.s


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(Int8Linear(H, I), nn.SiLU(), Int8Linear(I, H)) for _ in range(E)
        )  # fmt: skip

    def forward(self, x):
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out = out.index_add(0, t, expert(x[t]) * w[t, k, None])
        return out


def test_modules_that_round_rows_and_hold_only_buffers():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(H, H), Experts()).eval(), torch.randn(7, H)
    opt = moeopt.optimize(model, x, backend="onnxruntime", verify="fast")
    (block,) = opt.report.blocks
    assert (block.name, block.status, block.reason, block.experts) == ("1", "rewritten", "", E)
    with torch.no_grad():
        torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_buffer_of_8_bit_floats_that_the_runtime_has_no_kernel_for():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(9, H).to(torch.float8_e4m3fn))
            self.lin = nn.Linear(H, H)

        def forward(self, ids):
            return self.lin(self.table[ids].float())

    with pytest.raises(NotSaveableError) as err:
        moeopt.optimize(Table().eval(), torch.arange(5), backend="onnxruntime")
    for text in ("reads 8-bit floats with Gather", "has no kernel", "Hold the codes as int8", "backend='torch'"):
        assert text in str(err.value)
    assert "INVALID_GRAPH" not in str(err.value)


_LIB = torch.library.Library("moeopt_tests_coded", "DEF")
_LIB.define("dequantize(Tensor q, Tensor scale, int[] shape) -> Tensor")


def expanded(q, scale, shape):
    nibbles = torch.stack([q.reshape(-1) >> 4, q.reshape(-1) & 15], -1).reshape(-1)
    return ((nibbles.float() - 8).reshape(-1, 64) * scale[:, None]).reshape(shape)


_LIB.impl("dequantize", expanded, "CPU")
torch.library.register_fake("moeopt_tests_coded::dequantize", lambda q, s, shape: torch.empty(shape), lib=_LIB)


class Expand(nn.Module):
    """A parametrisation with an op of another library, as bitsandbytes has it."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.register_buffer("scale", torch.rand(shape[0] * shape[1] * shape[2] // 64) / 50)

    def forward(self, q):
        return torch.ops.moeopt_tests_coded.dequantize(q, self.scale, self.shape)


class Plainly(Expand):
    """The same in PyTorch's own ops."""

    def forward(self, q):
        return expanded(q, self.scale, self.shape)


class Parametrised(nn.Module):
    """Fused experts in one uint8 column each, all expanded where the attribute is read."""

    def __init__(self, how):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        for name, shape in (("up", [E, 2 * I, H]), ("down", [E, H, I])):
            q = torch.randint(0, 256, (shape[0] * shape[1] * shape[2] // 2, 1), dtype=torch.uint8)
            setattr(self, name, nn.Parameter(q, requires_grad=False))
            parametrize.register_parametrization(self, name, how(shape), unsafe=True)

    def forward(self, x):
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            g, u = (x[t] @ self.up[e].t()).chunk(2, -1)
            out = out.index_add(0, t, ((F.silu(g) * u) @ self.down[e].t()) * w[t, k, None])
        return out


@pytest.mark.parametrize("how", [Expand, Plainly])
@pytest.mark.parametrize("inside", [False, True])
def test_parametrised_experts_are_in_the_report(how, inside):
    torch.manual_seed(0)
    block = Parametrised(how).eval()
    model = nn.Sequential(nn.Linear(H, H), block) if inside else block
    (found,) = moeopt.explain(model, torch.randn(7, H), verify="fast").blocks
    assert (found.kind, found.status, found.experts) == ("moe", "declined", E)
    for text in (
        f"codes that a parametrisation ({how.__name__} on the block) makes floats of, all experts at each call",
        "load the model without that quantiser", "remove_parametrizations", "quantize='int4' or 'int8'",
    ):  # fmt: skip
        assert text in found.reason, found.reason


def test_indices_are_no_codes():
    """64-bit integers that weights are picked by stay what they were: no slots of a function."""

    class Picked(Coded):
        def codes(self, shape, g):
            return torch.randint(0, 16, shape, generator=g)

        def floats(self, q, s):
            return torch.linspace(-1, 1, 16)[q] * s

    (found,) = moeopt.explain(Picked().eval(), torch.randn(7, H), verify="fast").blocks
    assert found.status == "declined" and found.reason
