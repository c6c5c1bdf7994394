"""Experts that a module holds as codes, in the spellings that people use: read into a format, and run on the codes."""

import copy

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.distributed.install import expert_ops
from moeopt.distributed.parts import OwnWeight
from moeopt.errors import StaleModelWarning
from moeopt.ops.native import dispatch
from moeopt.ops.native.library import library
from moeopt.recognise.codes_in_slots import read_codes
from moeopt.rewrite import slot_codes
from moeopt.rewrite.install import rewritten_forward
from moeopt.rewrite.module_guard import Watch
from moeopt.rewrite.same_layout import SameLayout
from moeopt.rewrite.slot_codes import SlotCodes

H, I, E, K = 32, 64, 4, 2
NATIVE = pytest.mark.skipif(library() is None, reason="no kernel in C++ here")


def int8(out, into, g):
    return torch.randint(-127, 128, (out, into), generator=g, dtype=torch.int8)


def nibbles(out, into, g):
    return torch.randint(0, 256, (out, into // 2), generator=g, dtype=torch.uint8)


def scale(*shape, g, dtype=torch.float32):
    return (torch.rand(shape, generator=g) / 300 + 1e-4).to(dtype)


def low_first(q):
    return torch.stack([q & 15, q >> 4], -1).flatten(-2)


class Channel:
    """int8, a scale for each row of the weight; how ``make`` fills the buffers, and ``floats`` reads them."""

    format, kernel = "int8 (int8, one float32 scale per channel)", True

    @staticmethod
    def make(out, into, g):
        return {"q": int8(out, into, g), "s": scale(out, 1, g=g)}

    @staticmethod
    def floats(w, x):
        return w.q.float() * w.s


class VectorInHalf(Channel):
    """A vector of float16 scales, and a cast to the dtype of the input."""

    format = "int8 (int8, one float16 scale per channel)"

    @staticmethod
    def make(out, into, g):
        return {"q": int8(out, into, g), "s": scale(out, g=g, dtype=torch.float16)}

    @staticmethod
    def floats(w, x):
        return w.q.to(x.dtype).mul(w.s.unsqueeze(-1))


class Tensorwise(Channel):
    """One scale for all."""

    @staticmethod
    def make(out, into, g):
        return {"q": int8(out, into, g), "s": scale(1, g=g)[0]}


class BlocksOfRows(Channel):
    """A scale for each 16 inputs, by a view."""

    format = "int8-block16 (int8, one bfloat16 scale per 1 x 16)"

    @staticmethod
    def make(out, into, g):
        return {"q": int8(out, into, g), "s": scale(out, into // 16, g=g, dtype=torch.bfloat16)}

    @staticmethod
    def floats(w, x):
        rows = w.q.shape[0]
        return (w.q.view(rows, -1, 16).float() * w.s.float().unsqueeze(-1)).reshape(rows, -1)


class Repeated(BlocksOfRows):
    """The same by ``repeat_interleave``."""

    @staticmethod
    def floats(w, x):
        return w.q * w.s.float().repeat_interleave(16, dim=1)


class LowFirst(Channel):
    """Two codes a byte about 8."""

    format = "int4-block16 (uint4, one float32 scale per 1 x 16)"

    @staticmethod
    def make(out, into, g):
        return {"q": nibbles(out, into, g), "s": scale(out, into // 16, 1, g=g)}

    @staticmethod
    def floats(w, x):
        return ((low_first(w.q).to(torch.int8) - 8).unflatten(-1, (-1, 16)) * w.s).flatten(-2)


class HighFirst(LowFirst):
    format, kernel = LowFirst.format, False

    @staticmethod
    def floats(w, x):
        q = torch.stack([w.q >> 4, w.q & 15], -1).flatten(-2)
        return ((q.float() - 8).unflatten(-1, (-1, 16)) * w.s).flatten(-2)


class ZeroPoints(LowFirst):
    """Zero points as a buffer."""

    format, kernel = "int4-asymmetric16 (uint4, one float32 scale per 1 x 16, zero points)", False

    @staticmethod
    def make(out, into, g):
        zeros = torch.randint(0, 16, (out, into // 16, 1), generator=g, dtype=torch.uint8)
        return LowFirst.make(out, into, g) | {"z": zeros}

    @staticmethod
    def floats(w, x):
        return ((low_first(w.q).unflatten(-1, (-1, 16)).to(x.dtype) - w.z.to(x.dtype)) * w.s).flatten(-2)


class ZeroPointsOfRows(Channel):
    """Unsigned codes, a zero point in 32 bits for each row."""

    format, kernel = "uint8-asymmetric (uint8, one float32 scale per channel, zero points)", False

    @staticmethod
    def make(out, into, g):
        q = torch.randint(0, 256, (out, into), generator=g, dtype=torch.uint8)
        return {"q": q, "s": scale(out, 1, g=g), "z": torch.randint(99, 150, (out, 1), generator=g, dtype=torch.int32)}

    @staticmethod
    def floats(w, x):
        return (w.q.float() - w.z) * w.s


class Unsigned(Channel):
    """Unsigned codes about 128."""

    format = "uint8 (uint8, one float32 scale per channel)"

    @staticmethod
    def make(out, into, g):
        q = torch.randint(0, 256, (out, into), generator=g, dtype=torch.uint8)
        return {"q": q, "s": scale(out, 1, g=g)}

    @staticmethod
    def floats(w, x):
        return (w.q.to(torch.float32) - 128) * w.s


class InOut(Channel):
    """Stored (in, out), as ``x @ w`` takes it."""

    kernel = False

    @staticmethod
    def make(out, into, g):
        return {"q": int8(into, out, g), "s": scale(1, out, g=g)}

    @staticmethod
    def floats(w, x):
        return (w.q.float() * w.s).t()


class BytesOfFloats(Channel):
    """FP8 in a buffer of bytes."""

    format, kernel = "fp8 (e4m3, one float32 scale per channel)", False

    @staticmethod
    def make(out, into, g):
        q = torch.randint(0, 127, (out, into), generator=g, dtype=torch.uint8)
        return {"q": q | torch.randint(0, 2, (out, into), generator=g, dtype=torch.uint8) << 7, "s": scale(out, 1, g=g)}

    @staticmethod
    def floats(w, x):
        return w.q.view(torch.float8_e4m3fn).float() * w.s


class SignedBytes(Channel):
    """int8 in a buffer of unsigned bytes."""

    @staticmethod
    def make(out, into, g):
        return {"q": int8(out, into, g).view(torch.uint8), "s": scale(out, 1, g=g)}

    @staticmethod
    def floats(w, x):
        return w.q.view(torch.int8).float() * w.s


class Words(LowFirst):
    """The same bytes in words of 32 bits, which do not have to lie side by side."""

    @staticmethod
    def make(out, into, g):
        return LowFirst.make(out, into, g) | {"q": nibbles(out, into, g).view(torch.int32)}

    @staticmethod
    def floats(w, x):
        codes = low_first(w.q.contiguous().view(torch.uint8))
        return ((codes.to(torch.int8) - 8).unflatten(-1, (-1, 16)) * w.s).flatten(-2)


class WideZeroPoints(ZeroPoints):
    """A zero point in 32 bits for each block."""

    @staticmethod
    def make(out, into, g):
        held = ZeroPoints.make(out, into, g)
        return held | {"z": held["z"].int()}


SPELLINGS = (
    Channel, VectorInHalf, Tensorwise, BlocksOfRows, Repeated, LowFirst, HighFirst, ZeroPoints, ZeroPointsOfRows,
    Unsigned, InOut, BytesOfFloats, SignedBytes, Words, WideZeroPoints,
)  # fmt: skip


class CodedLinear(nn.Module):
    def __init__(self, how, out, into, g, bias):
        super().__init__()
        self.how = how
        for name, tensor in how.make(out, into, g).items():
            self.register_buffer(name, tensor)
        self.bias = nn.Parameter(torch.randn(out, generator=g)) if bias else None

    def forward(self, x):
        return F.linear(x, self.how.floats(self, x), self.bias)


class Listed(nn.Module):
    """A ModuleList of experts with gate, up and down."""

    def __init__(self, how, bias=False):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({n: CodedLinear(how, *size, g, bias) for n, size in sizes.items()})
            for sizes in [{"gate": (I, H), "up": (I, H), "down": (H, I)}] * E
        )

    def forward(self, x):
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e, one in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y = one["down"](F.silu(one["gate"](x[t])) * one["up"](x[t]))
            out = out.index_add(0, t, y * w[t, k, None])
        return out

    def floats(self, e, x):
        one = self.experts[e]
        return [layer.how.floats(layer, x) for layer in (one["gate"], one["up"], one["down"])]


class _At:
    """One expert of stacked buffers."""

    def __init__(self, bank, name, e):
        self.held = {part: getattr(bank, f"{name}_{part}")[e] for part in bank.parts}

    def __getattr__(self, part):
        return self.held[part]


class Stacked(nn.Module):
    """Buffers whose first dimension is the expert, gate over up."""

    def __init__(self, how):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.gate, self.how = nn.Linear(H, E, bias=False), how
        for name, size in (("up", (2 * I, H)), ("down", (H, I))):
            made = [how.make(*size, g) for _ in range(E)]
            self.parts = list(made[0])
            for part in self.parts:
                self.register_buffer(f"{name}_{part}", torch.stack([one[part] for one in made]))

    def floats(self, e, x):
        return [self.how.floats(_At(self, name, e), x) for name in ("up", "down")]

    def forward(self, x):
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e in range(E):
            t, k = torch.where(ids == e)
            up, down = self.floats(e, x)
            g, u = (x[t] @ up.t()).chunk(2, -1)
            out = out.index_add(0, t, ((F.silu(g) * u) @ down.t()) * w[t, k, None])
        return out


@pytest.fixture
def on_codes(monkeypatch):
    """How often the kernel in C++ answered a call on codes."""
    answered = []
    for name in ("call", "again"):
        own = getattr(dispatch, name)

        def counted(*args, own=own):
            found = own(*args)
            answered.extend([1] if found is not None else [])
            return found

        monkeypatch.setattr(dispatch, name, counted)
    return answered


def bank_of(opt):
    ((bank, _),) = rewritten_forward(opt.model).banks
    assert isinstance(bank, SlotCodes)
    return bank


@NATIVE
@pytest.mark.sample(2)
@pytest.mark.parametrize("form", [Listed, Stacked])
@pytest.mark.parametrize("how", SPELLINGS, ids=lambda c: c.__name__)
def test_read_into_a_format(how, form, on_codes, monkeypatch):
    if not how.kernel:
        monkeypatch.setattr("moeopt.pipeline.block.check_pays", lambda found: None)
        monkeypatch.setattr("moeopt.passes.read_codes.why_no_kernel", lambda coded: "")
    torch.manual_seed(0)
    model, x = form(how).eval(), torch.randn(9, H)
    opt = moeopt.optimize(model, x, verify="fast")
    (block,) = opt.report.blocks
    assert (block.status, block.reason, block.experts) == ("rewritten", "", E)
    assert f"weights in {how.format}, read where they are" in block.lowering
    bank, on_codes[:] = bank_of(opt), []
    with torch.no_grad():
        for e in range(E):  # the same bits as the module's own floats
            for got, want in zip((*bank.w_in(e), bank.w_out(e)), model.floats(e, x), strict=True):
                assert torch.equal(got, want)
        torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5)
        assert bool(on_codes) == how.kernel
        for name, buffer in model.named_buffers():  # codes that are written to are read anew
            if name.endswith("q"):
                buffer.copy_(buffer.flip(0))
        torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5)
    held = {t.untyped_storage().data_ptr() for t in opt.model.buffers()}
    made = {name: t for name, t in bank.tensors().items() if t.untyped_storage().data_ptr() not in held}
    copies = [t for name, t in made.items() if "zeros" not in name]  # zero points of 32 bits become bytes
    assert all(t.numel() < I for t in copies) and not opt.model.state_dict().keys() - model.state_dict().keys()


@NATIVE
@pytest.mark.parametrize(("how", "why"), [(HighFirst, "4-bit codes about 8, low nibble first"), (InOut, "(in, out)")])
def test_what_the_kernel_does_not_read_stays_a_function_of_a_row(how, why, monkeypatch):
    monkeypatch.setattr("moeopt.pipeline.block.check_pays", lambda found: None)
    torch.manual_seed(0)
    opt = moeopt.optimize(Listed(how).eval(), torch.randn(9, H), verify="fast")
    assert opt.report.blocks[0].lowering == "moeopt::row_function (expert by expert, one op)"
    (record,) = [r for r in opt.report.passes if r.name == "read_codes"]
    assert not record.fired and why in record.reason


def test_an_engine_has_products_for_zero_points(tmp_path):
    torch.manual_seed(0)
    model, x = Stacked(ZeroPoints).eval(), torch.randn(9, H)
    opt = moeopt.optimize(model, x, backend="onnxruntime", verify="fast")
    assert [(b.status, b.reason) for b in opt.report.blocks] == [("rewritten", "")]
    opt.save(tmp_path / "b")
    graph = onnx.load(tmp_path / "b/model.onnx", load_external_data=False).graph
    assert [n.op_type for n in graph.node].count("MatMulNBits") == 2 * E
    with torch.no_grad():
        torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5)


@NATIVE
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_small_blocks_pay_with_biases_and_in_bundles(backend, on_codes, tmp_path):
    torch.manual_seed(0)
    model, x = Listed(LowFirst, bias=True).eval(), torch.randn(9, H)
    opt = moeopt.optimize(model, x, backend=backend, verify="fast")
    assert [(b.status, b.reason) for b in opt.report.blocks] == [("rewritten", "")]
    opt.save(tmp_path / "b")
    loaded, on_codes[:] = moeopt.load(tmp_path / "b"), []
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    assert on_codes or backend != "torch"


@NATIVE
def test_gradients_of_biases_rows_and_scales():
    torch.manual_seed(0)
    model, x = Listed(Channel, bias=True).eval(), torch.randn(9, H)
    opt = moeopt.optimize(model, x, verify="fast")
    wanted = [model.experts[0]["up"].bias, model.gate.weight]
    for with_scales in (False, True):
        if with_scales:  # the op on codes has none for scales: the function of a row has
            scales = model.experts[0]["down"].s.requires_grad_()
            wanted.append(scales)
        given = [x.clone().requires_grad_() for _ in range(2)]
        got, want = (
            torch.autograd.grad(f(one).square().sum(), [one, *wanted])
            for f, one in zip((opt, model), given, strict=True)
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class Clamped(Channel):
    """Scales that are kept above a number: another function of the buffers than any format's."""

    @staticmethod
    def floats(w, x):
        return w.q.float() * w.s.clamp_min(1e-6)


class Wrapped(ZeroPointsOfRows):
    """The zero point is taken off in 8 bits, where it goes around."""

    @staticmethod
    def floats(w, x):
        return (w.q - w.z.to(torch.uint8)).float() * w.s


class Halves(LowFirst):
    """The low nibbles are the first half of a row."""

    @staticmethod
    def floats(w, x):
        return ((torch.cat([w.q & 15, w.q >> 4], -1).float() - 8).unflatten(-1, (-1, 16)) * w.s).flatten(-2)


class Rounded(Channel):
    """Rounded to bfloat16 before the product with the scale, and after."""

    @staticmethod
    def floats(w, x):
        return (w.q.bfloat16() * w.s.bfloat16()).float()


class FourInAWord(Channel):
    """GPTQ's 8 bits: four codes about 128 in a word, down the inputs, shifted by a buffer."""

    @staticmethod
    def make(out, into, g):
        q = torch.randint(0, 256, (into // 4, out, 4), generator=g, dtype=torch.uint8).view(torch.int32)[..., 0]
        held = {"q": q, "s": scale(into // 16, out, g=g)}
        return held | {"w": torch.arange(0, 32, 8, dtype=torch.int32)}

    @staticmethod
    def floats(w, x):
        q = ((w.q[:, None, :] >> w.w[None, :, None]) & 255).flatten(0, 1)
        return ((q.float() - 128).unflatten(0, (-1, 16)) * w.s[:, None]).flatten(0, 1).t()


@pytest.mark.parametrize("how", [Clamped, Wrapped, Halves, Rounded, FourInAWord], ids=lambda c: c.__name__)
def test_what_no_format_says_to_the_bit_stays_a_function_of_a_row(how, monkeypatch):
    monkeypatch.setattr("moeopt.pipeline.block.check_pays", lambda found: None)
    torch.manual_seed(0)
    model, x = Listed(how).eval(), torch.randn(9, H)
    opt = moeopt.optimize(model, x, verify="fast")
    (block,) = opt.report.blocks
    assert block.status == "rewritten" and block.lowering == "moeopt::row_function (expert by expert, one op)"
    with torch.no_grad():
        torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5)


SCALES = {  # another function of the scales than any format's, on few of them only
    "no numbers": torch.nan_to_num,
    "infinities": lambda s: torch.nan_to_num(s, nan=torch.nan),
    "zeros": lambda s: s.masked_fill(s == 0, 1.0),
    "below the least": lambda s: s.masked_fill(s.abs() < torch.finfo(s.dtype).tiny, 0.0),
    "the largest": lambda s: s.clamp(-torch.finfo(s.dtype).max / 2, torch.finfo(s.dtype).max / 2),
    "none above zero": lambda s: s * (s.max() > 0),
    "none below zero": lambda s: s * (s.min() < 0),
    "all zeros": lambda s: s + (s == 0).all(),
}


@pytest.mark.parametrize("shape", [(8, 1), (1,)], ids=["channel", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scales_that_some_code_replaces_are_of_no_format(dtype, shape):
    slots = {0: (torch.int8, (8, 16)), 1: (dtype, shape)}

    def read(scales):
        return read_codes(lambda held: held[0].to(dtype) * scales(held[1]), slots, (8, 16))

    assert read(lambda s: s) is not None
    assert [words for words, scales in SCALES.items() if read(scales) is not None] == []


CHANGES = {
    "in place": lambda m, name, t: t.mul_(-1),
    "at an index": lambda m, name, t: t.__setitem__(slice(0, 3), 1),
    "its memory": lambda m, name, t: setattr(t, "data", t.flip(0)),
    "another": lambda m, name, t: setattr(m, name, t.roll(1, 0)),
    "in the table": lambda m, name, t: m._buffers.update({name: t.flip(0)}),
    "turned": lambda m, name, t: setattr(m, name, t.t().contiguous().t()),
    "one for all": lambda m, name, t: setattr(m, name, t[:1].clone().expand(t.shape)),
    "assigned": lambda m, name, t: m.load_state_dict({**m.state_dict(), name: t.flip(0)}, assign=True),
}


@NATIVE
@pytest.mark.filterwarnings("error")
def test_codes_and_scales_are_read_where_they_are_now_and_looked_at_once(monkeypatch):
    torch.manual_seed(0)
    model, x = Listed(Channel).eval(), torch.randn(9, H)
    opt, looks = moeopt.optimize(copy.deepcopy(model), x, verify="off", inplace=True), []
    for cls, name in ((SameLayout, "look"), (Watch, "expert")):
        own = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda *args, own=own, name=name: (looks.append(name), own(*args))[1])
    rewritten_forward(opt.model).original_calls = None
    with torch.no_grad():
        for words, change in CHANGES.items():
            for name in ("q", "s"):
                for layer in (opt.model.experts[1]["down"], model.experts[1]["down"]):
                    change(layer, name, getattr(layer, name))
                for _ in range(2):
                    looks.clear()
                    torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5, msg=f"{name}: {words}")
                # and no expert by itself, as nothing changed since; codes that do not lie in rows are in no kernel
                assert looks == ["look"] or (words == "turned" and name == "q"), (name, words)
                if words == "turned":
                    for layer in (opt.model.experts[1]["down"], model.experts[1]["down"]):
                        setattr(layer, name, getattr(layer, name).contiguous())


def hit(model, x):
    return sorted(set(model.gate(x).topk(K, -1).indices.flatten().tolist()))


@pytest.fixture
def of_many(monkeypatch):
    """How a bank of many buffers is looked at: where few rows hit few experts, these alone. What was looked at."""
    monkeypatch.setattr(slot_codes, "FEW", 3)
    looks = []
    look, expert = SameLayout.look, Watch.expert
    monkeypatch.setattr(SameLayout, "look", lambda self: (looks.append("all"), look(self))[1])
    monkeypatch.setattr(Watch, "expert", lambda self, key: (looks.append(key[1]), expert(self, key))[1])
    return looks


def installed(how, bias=False):
    torch.manual_seed(0)
    model = Listed(how, bias).eval()
    opt = moeopt.optimize(copy.deepcopy(model), torch.randn(9, H), verify="off", inplace=True)
    rewritten_forward(opt.model).original_calls = None
    return model, opt


@NATIVE
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("grad", [False, True])
def test_a_token_looks_at_its_own_experts_alone(grad, of_many, on_codes):
    model, opt = installed(Channel, bias=True)
    x = torch.randn(1, H)
    one = hit(model, x)
    for held in (model, opt.model):
        held.requires_grad_(False)
    with torch.set_grad_enabled(grad):
        for words, change in CHANGES.items():
            for name in ("q", "s"):
                for layer in (opt.model.experts[one[0]]["down"], model.experts[one[0]]["down"]):
                    change(layer, name, getattr(layer, name))
                for _ in range(2):
                    of_many.clear(), on_codes.clear()
                    torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5, msg=f"{name}: {words}")
                assert set(of_many) == set(one), (name, words)
                assert on_codes or (words, name) == ("turned", "q")
                if words == "turned":
                    for layer in (opt.model.experts[one[0]]["down"], model.experts[one[0]]["down"]):
                        setattr(layer, name, getattr(layer, name).contiguous())


@NATIVE
def test_a_hook_is_seen_on_an_expert_that_runs(of_many):
    model, opt = installed(Channel)
    x = torch.randn(1, H)
    one = hit(model, x)
    other = next(e for e in range(E) if e not in one)
    with torch.no_grad():
        opt(x)
        for held in (model, opt.model):
            held.experts[other]["up"].register_forward_hook(lambda *a: a[2] + 1)
        torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5)
        for held in (model, opt.model):
            held.experts[one[1]]["up"].register_forward_hook(lambda *a: a[2] + 1)
        with pytest.warns(StaleModelWarning, match=r"a hook was registered on experts\.\d\.up"):
            torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5)


@NATIVE
def test_a_part_that_is_copied_is_read_at_each_call(of_many, on_codes):
    model, opt = installed(Words)
    x = torch.randn(1, H)
    down = [held.experts[hit(model, x)[0]]["down"] for held in (model, opt.model)]
    with torch.no_grad():
        opt(x)
        for layer in down:
            layer.q = layer.q.t().contiguous().t()
        for _ in range(3):
            on_codes.clear()
            torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5)
            assert on_codes
            for layer in down:
                layer.q.copy_(layer.q.roll(1, 0))


@NATIVE
def test_the_first_call_looks_no_oftener_where_there_are_more_experts(of_many, monkeypatch):
    """Each expert of the first call of all was read by looking at all of them: minutes for 256."""
    monkeypatch.setattr("tests.recognise.test_coded_formats.E", 12)
    _, opt = installed(Channel)
    of_many.clear()
    with torch.no_grad():
        opt(torch.randn(9, H))
    assert of_many.count("all") <= 3


def far(how, value):
    """The same with one zero point that no code is."""

    class Far(how):
        @staticmethod
        def make(out, into, g):
            held = how.make(out, into, g)
            held["z"].flatten()[3] = value
            return held

    return Far


@pytest.mark.parametrize(
    ("how", "value", "says"),
    [
        (ZeroPointsOfRows, -5, "a zero point is -5, and those of uint8 are from 0 to 255"),
        (ZeroPointsOfRows, 300, "a zero point is 300, and those of uint8 are from 0 to 255"),
        (ZeroPoints, 16, "a zero point is 16, and those of uint4 are from 0 to 15"),
    ],
)
def test_zero_points_that_no_code_is_are_of_no_format(how, value, says):
    """An engine held them in the bits of a code: other numbers, by nine tenths of the result."""
    torch.manual_seed(0)
    model, x = Listed(far(how, value)).eval(), torch.randn(9, H)
    opt = moeopt.optimize(model, x, backend="onnxruntime", verify="off")
    (record,) = [r for r in opt.report.passes if r.name == "read_codes"]
    assert record.reason.startswith("experts.0.gate.z: ") and says in record.reason and not record.fired
    with torch.no_grad():
        torch.testing.assert_close(opt(x), model(x), rtol=1e-4, atol=1e-5)


class OtherFloats(Channel):
    """Floats in a buffer of words: no codes."""

    @staticmethod
    def make(out, into, g):
        return {"q": torch.randn(out, into, generator=g).bfloat16().view(torch.int16)}

    @staticmethod
    def floats(w, x):
        return w.q.view(torch.bfloat16).float()


def test_bits_that_are_no_codes_are_told():
    (entry,) = moeopt.explain(Listed(OtherFloats).eval(), torch.randn(9, H)).blocks
    assert (
        entry.reason == "an expert's view reads the bits of a weight as torch.bfloat16; hold the weight in that dtype"
    )


class InItsDtype(Channel):
    """In the dtype of the rows."""

    @staticmethod
    def floats(w, x):
        return w.q.to(x.dtype) * w.s


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_products_in_float64_stay_a_function_of_a_row(backend):
    """An engine of codes was built and refused, for it computes in 32 bits; on torch the kernel refused each call."""
    torch.manual_seed(0)
    model, x = Listed(InItsDtype).double().eval(), torch.randn(9, H).double()
    opt = moeopt.optimize(model, x, backend=backend, verify="fast")
    (record,) = [r for r in opt.report.passes if r.name == "read_codes"]
    assert record.reason.startswith("its experts are codes with products or scales in float64") and not record.fired
    with torch.no_grad():
        torch.testing.assert_close(opt(x), model(x), rtol=1e-9, atol=1e-9)


@NATIVE
def test_codes_are_divided_among_ranks_where_they_are_parameters():
    torch.manual_seed(0)
    model, notes = Listed(Channel).eval(), []
    opt = moeopt.optimize(model, torch.randn(9, H), verify="off")
    says = "experts.0.gate.q: it is a buffer or an attribute; make it a Parameter (requires_grad=False for codes)"
    assert list(expert_ops(opt.model, notes)) == [] and notes == [f"Listed is not divided: {says}"]
    for layer in [layer for layer in model.modules() if isinstance(layer, CodedLinear)]:
        for name in ("q", "s"):
            held = getattr(layer, name)
            delattr(layer, name)
            setattr(layer, name, nn.Parameter(held, requires_grad=False))
    (op,) = expert_ops(moeopt.optimize(model, torch.randn(9, H), verify="off").model, notes)
    assert len(op.weights) == 6 * E and all(isinstance(w, OwnWeight) for w in op.weights)
