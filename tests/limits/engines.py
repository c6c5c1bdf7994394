"""Lines of docs/limits.md on ONNX Runtime engines and on bundles."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from tests.limits import limit, tested_in
from tests.toy_moe import Block, H, X, build, close, far, seeded


class After(nn.Module):
    """A mixture, and a function of its result."""

    def __init__(self, fn=lambda y: y, block=Block):
        super().__init__()
        self.block, self.fn = build(block), fn

    def forward(self, x):
        return self.fn(self.block(x))


def engine(model, x=X, **options):
    pytest.importorskip("onnxruntime")
    return moeopt.optimize(model.eval(), x, backend="onnxruntime", **{"verify": "off"} | options)


def no_engine(model, text, x=X, **options):
    with pytest.raises(moeopt.NotSaveableError, match=text):
        engine(model, x, **options)


@limit("It is the model when it was built")
def as_built(_):
    model = After()
    opt = engine(model)
    before = opt(X)
    with torch.no_grad():
        model.block.experts[0].w1.weight.mul_(3)
    model.block.top_k = 1
    assert torch.equal(opt(X), before) and far(model(X), before)


class LongerThan(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = build()

    def forward(self, x):
        y = self.block(x)
        return y * 2 if x.shape[1] > 20 else y


tested_in(
    "It holds for the sizes that its trace allows",
    "test_report_certificate_and_bundle_say_which_sizes_an_engine_holds_for",
)


@limit("It holds for the sizes that its trace allows")
@limit("A branch on the length")
def sizes(folder):
    opt = engine(LongerThan())
    said = "the engine holds for calls where x.shape[1] <= 20"
    assert any(said in note for note in opt.report.notes) and any(said in note for note in opt.certificate.notes)
    with pytest.raises(moeopt.UsageError, match="x has size 30 in dimension 1; .* may be 1 to 20"):
        opt(seeded(1, 30, H))
    assert moeopt.load(opt.save(folder / "b"))(X).shape == X.shape


class WritesArgument(Block):
    def forward(self, x):
        y = super().forward(x)
        x.mul_(2)
        return y


class WritesBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = build()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.block(x) * self.calls


@limit("Refused")
def refused(_):
    opt = engine(After())
    with pytest.raises(moeopt.UsageError, match="x has size 0 in dimension 0"):
        opt(X[:0])
    no_engine(build(WritesArgument), "the model writes to its argument 'x' as it runs, and an engine keeps no state")
    no_engine(WritesBuffer(), "the model writes to its buffer 'calls' as it runs, and an engine keeps no state")
    no_engine(After(lambda y: y + torch.rand_like(y)), "the model draws random numbers .*rand_like")


class Branching(Block):
    def forward(self, x):
        return super().forward(x) * (2.0 if x.sum() > 0 else 1.0)


@limit("A declined block whose Python depends on the data")
def branching(_):
    no_engine(After(block=Branching), "Its Python there depends on the values of tensors, which no graph repeats")


tested_in("A branch on weights or buffers", "test_a_question_about_constants_is_answered_with_their_values")
tested_in("A branch on weights or buffers", "test_what_a_call_writes_cannot_be_asked")
tested_in("Encoder-decoders", "test_a_mask_that_tracing_needs_is_asked_for")
tested_in(
    "Jamba",
    "test_several_tokens_after_a_cache_are_refused_where_the_model_forgets",
)


@limit("Rows with equal router scores")
def tied_rows(_):
    x = copy.deepcopy(X)
    x[0, :4] = 0
    model = build()
    opt = engine(model, x, verify="fast")
    (note,) = [n for n in opt.report.notes if n.startswith("tied rows")]
    assert "may go to other experts on ONNX Runtime than in PyTorch" in note and "4 are such ties" in note
    assert note in opt.certificate.notes


@limit("Scores that tie on ordinary rows")
def tied_scores(_):
    model = build(experts=8)
    model.top_k = 3
    with torch.no_grad():
        model.gate.weight[4:] = model.gate.weight[:4]
    with pytest.raises(moeopt.errors.NotEquivalentError, match="equal scores to several experts on .* ordinary rows"):
        engine(model, verify="strict")


@limit("Functions without an accurate form")
def inaccurate(_):
    for fn in (torch.erfc, torch.special.erfcx, torch.special.log_ndtr):
        no_engine(After(fn), f"{fn.__name__.removeprefix('special_')} has no form in ONNX .*engines.py")
    no_engine(After(lambda y: (y > 0).long().repeat(1, 1, 5).prod(-1)), "a product of 80 integers .*engines.py")


@limit("LayerNorm of rows beyond 1e19")
def large_rows(_):
    model = After(lambda y: F.layer_norm(y * 1e25, (H,)))
    assert model(X).isnan().all() and not engine(model)(X).any()


# -- bundles ------------------------------------------------------------------------------------------


@limit("One device and one structure of arguments")
def one_structure(folder):
    loaded = moeopt.load(moeopt.optimize(After().eval(), X, verify="off").save(folder / "b"))
    close(loaded(X), After()(X))
    for call, text in (
        ((X, X), "the bundle takes x; it was given 2"),
        ((X[0],), "x has 2 dimensions, and the bundle takes 3"),
    ):
        with pytest.raises(moeopt.UsageError, match=text):
            loaded(*call)
    with pytest.raises(moeopt.UsageError, match="this machine has no device"):
        moeopt.load(folder / "b", device="xpu:3")


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(H, H, batch_first=True)

    def forward(self, y):
        packed = nn.utils.rnn.pack_padded_sequence(y, torch.tensor([y.shape[1]] * len(y)), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]


def ctc(y):
    return F.ctc_loss(
        y.log_softmax(-1), torch.ones(8, 2, dtype=torch.long), torch.tensor([2] * 8), torch.tensor([2] * 8)
    )


@limit("Ops of a list only")
def listed_ops(folder):
    for fn, text in (
        (lambda y: torch.linalg.svd(y)[1], "the op 'aten.linalg_svd.default' is not one that a bundle may call"),
        (lambda y: torch.linalg.inv(y[..., :8]), "'aten.linalg_inv.default' is not one that a bundle may call"),
        (
            lambda y: F.embedding_bag(torch.zeros(2, 3, dtype=torch.long), torch.ones(4, 3)) + y.sum(),
            "'aten.embedding_bag.padding_idx' is not one that a bundle may call",
        ),
        (ctc, "torch.export stops at: aten._ctc_loss.Tensor"),
        (Packed(), "After cannot be saved: torch.export stops at"),
    ):
        opt = moeopt.optimize(After(fn).eval(), X, verify="off")
        with pytest.raises(moeopt.NotSaveableError, match=text):
            opt.save(folder / "b")


@limit("Time and memory")
def time_and_memory(folder):
    path = moeopt.optimize(After().eval(), X, verify="fast").save(folder / "b")
    for limits in (moeopt.LoadLimits(bytes=16), moeopt.LoadLimits(seconds=1e-9)):
        with pytest.raises(moeopt.BundleError, match="LoadLimits"):
            moeopt.verify(path, limits=limits)


tested_in("A branch on weights or buffers", "test_a_question_about_constants_is_answered_with_their_values")
tested_in("A branch on weights or buffers", "test_what_a_call_writes_cannot_be_asked")
