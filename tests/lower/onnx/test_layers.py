"""Whole layers in an emitted graph beside PyTorch's: rows of many scales, of zeros, with a NaN or an infinity, and more
or fewer rows than were traced."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("onnxruntime")

from moeopt.backends.onnxrt.accuracy_known import LAYERS
from moeopt.errors import NotSaveableError
from moeopt.lower.onnx import accurate, exporter_gaps
from tests.lower.onnx.emitted import graph_of, session_of, together

aten = torch.ops.aten
EPS = 2.0**-24
torch.manual_seed(11)
SHIFT, SCALE, SMALL = torch.randn(8), torch.rand(8) + 0.5, torch.rand(8) * 1e-12
FILTER, BACK = torch.randn(6, 8, 3, 3), torch.randn(8, 6, 3, 3)
AT = torch.tensor([0, 3, 3, 1, 2, 0, 5, 3])[:, None].expand(8, 8)
HIDDEN = torch.ones(4, 4, dtype=torch.bool).tril(-1)
"""A mask whose first query sees no key."""


def image(x):
    return x.view(-1, 8, 4, 4)


def rows(x):
    return image(x).flatten(2).mT


def heads(x):
    return rows(x).view(-1, 4, 4, 8)


def attention(mask=None, keys=4, **how):
    def f(x):
        q, given = heads(x), mask
        if given is not None and given.is_floating_point():
            given = given.to(x.dtype)
        return F.scaled_dot_product_attention(q, q[:, :keys], q[:, :keys], given, enable_gqa=keys < 4, **how)

    return f


def scattered(reduce, **how):
    return lambda x: rows(x)[0].scatter_reduce(0, AT, rows(x)[1, :8].flip(1), reduce, **how)


GAPS = {
    "max pool": lambda x: F.max_pool2d(image(x), 2),
    "max pool, padded": lambda x: F.max_pool2d(image(x), 3, 1, 1),
    "max pool, rounded up": lambda x: F.max_pool2d(image(x), 3, 2, ceil_mode=True),
    "max pool of rows": lambda x: F.max_pool1d(rows(x), 2),
    "largest of all": lambda x: F.adaptive_max_pool2d(image(x), 1),
    "diagonal": lambda x: torch.diagonal(rows(x)[:, :8], dim1=1, dim2=2),
    "diagonal above": lambda x: torch.diagonal(rows(x)[:, :5], 1, 2, 1),
    "diagonal below": lambda x: torch.diagonal(rows(x)[:, :5], -2, 1, 2),
    "diagonal outside": lambda x: torch.diagonal(rows(x)[:, :5], 9, 2, 1),
    "diag": lambda x: torch.diag(rows(x)[1]),
    "trace": lambda x: torch.einsum("nii->n", rows(x)[:, :8]),
    **{f"scatter {how}": scattered(how) for how in ("sum", "prod", "mean", "amax", "amin")},
    **{f"scatter {how} anew": scattered(how, include_self=False) for how in ("sum", "prod", "mean", "amax", "amin")},
    "scatter a part": lambda x: rows(x)[0].scatter_reduce(0, AT[:4], rows(x)[1, :8], "amax", include_self=False),
    "logcumsumexp": lambda x: rows(x).logcumsumexp(1),
    "logaddexp2": lambda x: torch.logaddexp2(rows(x), rows(x).flip(1)),
    "cummax": lambda x: rows(x).cummax(1)[0],
    "place of cummax": lambda x: rows(x).cummax(2)[1].to(x.dtype),
    "cummin": lambda x: rows(x).cummin(-1)[0],
    "cummax of flags": lambda x: (rows(x) > 1).cummax(1)[0].to(x.dtype),
    "place of cummin": lambda x: rows(x).cummin(1)[1].to(x.dtype),
    "a window of -inf": lambda x: F.max_pool2d(image(x).masked_fill(image(x) < 2.5, -math.inf), 2),
    "a window of -inf, padded": lambda x: F.max_pool2d(image(x).masked_fill(image(x) < 2.5, -math.inf), 3, 1, 1),
    "heaviside": lambda x: torch.heaviside(rows(x), x.new_tensor(0.5)),
    "logit": lambda x: torch.logit(rows(x), eps=1e-6),
    "logit with bounds that cross": lambda x: torch.logit(rows(x), eps=0.7),
    "distance of order 0": lambda x: torch.cdist(rows(x), rows(x).flip(1), p=0),
    "mean with a divisor": lambda x: F.avg_pool2d(image(x), (2, 3), 1, 1, divisor_override=7),
    "mean with a divisor, named": lambda x: aten.avg_pool2d(image(x), [2, 2], [2, 2], divisor_override=3),
    "attention": attention(),
    "attention, causal": attention(is_causal=True),
    "attention of a query that sees nothing": attention(HIDDEN),
    "attention, -inf for what is hidden": attention(torch.zeros(4, 4).masked_fill(~HIDDEN, -math.inf)),
    "attention of groups, masked": attention(HIDDEN, keys=2),
    "attention of groups, causal": attention(keys=1, is_causal=True),
    "attention with its own scale": attention(scale=0.1),
    "attention to what is unlike": attention(scale=-0.4),
    "attention of 2 dimensions": lambda x: F.scaled_dot_product_attention(rows(x)[0], rows(x)[1], rows(x)[1]),
    "attention of 3 dimensions": lambda x: F.scaled_dot_product_attention(rows(x), rows(x), rows(x), is_causal=True),
    "attention of 5 dimensions": lambda x: F.scaled_dot_product_attention(*[heads(x)[:, None]] * 3),
}
"""What torch's exporter has no form for, or one that is another function for some of the inputs."""


def of_dtype(layer):
    wide = copy.deepcopy(layer).double()
    return lambda x: (wide if x.dtype == torch.float64 else layer)(rows(x))[0]


def norm(x, mean=SHIFT, variance=SCALE, weight=SCALE, bias=SHIFT, eps=1e-5):
    given = [None if v is None else v.to(x.dtype) for v in (mean, variance, weight, bias)]
    return F.batch_norm(image(x), *given, False, eps=eps)


USUAL = {
    "mean pool": lambda x: F.avg_pool2d(image(x), 2),
    "mean pool without its frame": lambda x: F.avg_pool2d(image(x), 3, 1, 1, count_include_pad=False),
    "mean of all": lambda x: F.adaptive_avg_pool2d(image(x), 1),
    "mean of areas": lambda x: F.interpolate(image(x), size=(2, 2), mode="area"),
    "batch norm": norm,
    "batch norm, small variance": lambda x: norm(x, 0 * SHIFT, SMALL, None, None, eps=1e-12),
    "instance norm": lambda x: F.instance_norm(image(x), weight=SCALE.to(x.dtype), bias=SHIFT.to(x.dtype), eps=1e-9),
    "group norm": lambda x: F.group_norm(image(x), 2, SCALE.to(x.dtype), SHIFT.to(x.dtype)),
    "group norm, small epsilon": lambda x: F.group_norm(image(x), 4, eps=1e-12),
    "rms norm": lambda x: F.rms_norm(rows(x), (8,), SCALE.to(x.dtype), 1e-6),
    "local response norm": lambda x: F.local_response_norm(image(x), 3),
    "convolution": lambda x: F.conv2d(image(x), FILTER.to(x.dtype), padding="same"),
    "convolution, dilated": lambda x: F.conv2d(image(x), FILTER.to(x.dtype), None, 2, 2, 2),
    "transposed convolution": lambda x: F.conv_transpose2d(image(x), BACK.to(x.dtype), None, 2, 1, 1),
    "fold of unfold": lambda x: F.fold(F.unfold(image(x), 2), (4, 4), 2),
    "nearest": lambda x: F.interpolate(image(x), scale_factor=1.7, mode="nearest"),
    "bilinear": lambda x: F.interpolate(image(x), size=(7, 9), mode="bilinear"),
    "bicubic": lambda x: F.interpolate(image(x), size=(7, 9), mode="bicubic"),
    "prelu": lambda x: F.prelu(image(x), SHIFT.to(x.dtype)),
    "LSTM": of_dtype(nn.LSTM(8, 8, batch_first=True).eval()),
    "GRU": of_dtype(nn.GRU(8, 8, batch_first=True).eval()),
    "masked softmax": lambda x: rows(x).masked_fill(rows(x) < 1, -math.inf).softmax(-1),
    "masked logsumexp": lambda x: rows(x).masked_fill(rows(x) < 1, -math.inf).logsumexp(-1),
    "deviation": lambda x: rows(x).std(-1),
    "scattered by index": lambda x: rows(x)[0].index_add(0, AT[:, 0], rows(x)[1, :8], alpha=0.5),
}
"""What torch's exporter has a right form for."""
INFINITE = ("infinity", "-infinity")
LEFT_OUT = {
    # their sums are taken in another order, and are NaN at other places beside an infinity
    **dict.fromkeys(("bilinear", "bicubic", "group norm", "deviation"), INFINITE),
    # PyTorch multiplies by a negative scale after the sums, the engine before
    "attention to what is unlike": INFINITE,
    # a note of the engine says it
    **dict.fromkeys(("LSTM", "GRU"), ("NaN",)),
}
"""Inputs on which a layer is not PyTorch's, with the reason."""
LOOSE = {"bilinear": 64.0, "bicubic": 64.0}
"""Coordinates are rounded otherwise: how many times PyTorch's own error is allowed."""


def inputs():
    base = torch.randn(8, 128, generator=torch.Generator().manual_seed(3))
    zero = base.clone()
    zero[3] = 0
    found = {f"times {s:g}": base * s for s in (1.0, 1e-30, 1e-12, 30.0, 1e4, 1e12, 1e18)}
    found |= {"ties": (base * 2).round() / 2, "a row of zeros": zero}
    found |= {"3 rows": base[:3], "12 rows": torch.cat([base, 2 * base[:4]])}
    for name, value in (("NaN", math.nan), ("infinity", math.inf), ("-infinity", -math.inf)):
        found[name] = base.clone()
        for at in ((1, 3), (2, 50), (5, 127)):
            found[name][at] = value
    return found


def differs(f, x, got, times=8.0):
    """How ``got`` of float32 ``x`` is not what PyTorch gives, in a few words; "" where it is."""
    ours, want = f(x), f(x.double())
    if got.shape != ours.shape:
        return f"shape {tuple(got.shape)} and not {tuple(ours.shape)}"
    got, ours = got.double(), ours.double()
    if not torch.equal(got.isnan(), ours.isnan()):
        return f"{int(got.isnan().sum())} NaN and not {int(ours.isnan().sum())}"
    infinite = ours.isinf()
    if not torch.equal(got[infinite], ours[infinite]) or not torch.equal(got.isinf(), infinite):
        return f"{int(got.isinf().sum())} infinities and not {int(infinite.sum())}"
    finite = ours.isfinite() & want.isfinite()
    error, own = (got - want)[finite].abs(), (ours - want)[finite].abs()
    wrong = error > torch.maximum(16 * EPS * want[finite].abs(), times * own.max() if len(own) else own)
    wrong &= (got - ours)[finite].abs() > 1e-44
    return f"{int(wrong.sum())} of {wrong.numel()} numbers off" if wrong.any() else ""


def compared(functions):
    """What differs, by function and input."""
    session = session_of(together(functions.values()), inputs()["times 1"])
    found = {}
    for name, x in inputs().items():
        for (function, f), got in zip(functions.items(), session.run({"x": x}), strict=True):
            if name in LEFT_OUT.get(function, ()):
                continue
            if what := differs(f, x, got, LOOSE.get(function, 8.0)):
                found[f"{function}, {name}"] = what
    return found


@pytest.mark.parametrize("part", range(4))
def test_layers_with_a_form_of_their_own(part):
    names = list(GAPS)[part::4]
    assert compared({name: GAPS[name] for name in names}) == {}


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(3))
def test_layers_with_the_exporters_form(part):
    names = list(USUAL)[part::3]
    assert compared({name: USUAL[name] for name in names}) == {}


def test_every_layer_that_the_list_of_operators_names_is_measured():
    names = {"mean pool", "batch norm", "instance norm", "prelu", "bilinear", "fold of unfold"}
    graph = graph_of(together([USUAL[name] for name in sorted(names)] + [GAPS["scatter amax"]]), inputs()["times 1"])
    assert LAYERS - {node.op_type for node in graph.graph.all_nodes()} == set()


def test_without_its_form_a_pool_passes_over_nan(monkeypatch):
    monkeypatch.delitem(accurate.FORMS, "MaxPool")
    found = compared({"max pool": GAPS["max pool"]})
    assert set(found) == {"max pool, NaN"} and found["max pool, NaN"].endswith("NaN and not 3")


REFUSED = {
    "of a free size with the places of its maxima has no ONNX form; use backend='torch', or fix that size": lambda x: (
        F.adaptive_max_pool1d(x.mT[None], 3, return_indices=True)[1]
    ),
    "scatter_reduce of integers with reduce='mean' has no form in ONNX": lambda x: x.long().scatter_reduce(
        1, x.long() * 0, x.long(), "mean"
    ),
    "logcumsumexp over a dimension of free size has no form in ONNX: fix that size": lambda x: x.logcumsumexp(0),
    "cummax over a dimension of free size has no form in ONNX: fix that size": lambda x: x.cummax(0)[0],
    "aten.avg_pool2d.default with divisor_override and ceil_mode has no ONNX form; use backend='torch', or pad the "
    "input": lambda x: F.avg_pool2d(x[None, None], 3, 2, 1, ceil_mode=True, divisor_override=5),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_has_no_form_names_the_way_out(sentence):
    with pytest.raises(NotSaveableError, match=re.escape(sentence)):
        graph_of(REFUSED[sentence], torch.randn(6, 8))


def windows(x):
    return x.mT[None]


FREE_SIZES = {
    "chunk": lambda x: x.chunk(3)[1] + 1,
    "chunk, all parts": lambda x: torch.cat([part * n for n, part in enumerate(x.chunk(3))]),
    "chunk as results": lambda x: x.chunk(2)[0],
    "split of half": lambda x: x.split((x.shape[0] + 1) // 2)[1] * 2,
    "adaptive mean": lambda x: F.adaptive_avg_pool1d(windows(x), 4),
    "adaptive mean of images": lambda x: F.adaptive_avg_pool2d(windows(x)[..., None].expand(-1, -1, -1, 3), (4, 2)),
    "adaptive maximum": lambda x: F.adaptive_max_pool1d(windows(x), 3) * 2,
    "adaptive maximum of images": lambda x: F.adaptive_max_pool2d(windows(x)[..., None].expand(-1, -1, -1, 3), (4, 2)),
    "mean of areas": lambda x: F.interpolate(windows(x), size=3, mode="area"),
}
"""Ops that torch takes apart by the size of the call that is traced."""


def test_parts_and_windows_of_a_free_size():
    x = torch.randn(6, 4)
    session = session_of(together(FREE_SIZES.values()), x)
    for size in (6, 5, 7, 8, 9, 12):
        x = torch.randn(size, 4)
        for (name, f), got in zip(FREE_SIZES.items(), session.run({"x": x}), strict=True):
            torch.testing.assert_close(got, f(x), msg=f"{name} of {size}")


ROLLS = {
    "rows": lambda x: x[x[:, 0] > 0].roll(1, 0),
    "rows, further than there are": lambda x: x[x[:, 0] > 0].roll(-7, -2),
    "both": lambda x: x[x[:, 0] > 0].roll((2, -3), (0, 1)),
    "as they lie": lambda x: x[x[:, 0] > 0].roll(5),
    "flags": lambda x: (x[x[:, 0] > 0] > 0).roll(1, 0),
}


def test_no_rows_roll_to_no_rows():
    """As an expert has that no token chose: torch's exporter divides by their number."""
    x = torch.randn(6, 4)
    session = session_of(together(ROLLS.values()), x)
    for given in (x, x[:1].abs(), x.abs(), -x.abs()):
        for (name, f), got in zip(ROLLS.items(), session.run({"x": given}), strict=True):
            assert torch.equal(got, f(given)), name


def test_a_number_that_is_made_of_a_free_size_is_refused(monkeypatch):
    monkeypatch.setattr(exporter_gaps, "ADAPTIVE_POOLS", {})
    sentence = r"no ONNX form for other sizes: .* makes a plain number of a free size"
    with pytest.raises(NotSaveableError, match=sentence):
        graph_of(lambda x: F.adaptive_avg_pool1d(windows(x), 3), torch.randn(6, 4))


def test_logarithms_of_float64():
    x = torch.randn(5, 6, dtype=torch.float64)
    functions = (lambda x: torch.logaddexp2(x, 2 * x), lambda x: x.view(-1, 6).logcumsumexp(1))
    for f, got in zip(functions, session_of(together(functions), x).run({"x": x}), strict=True):
        torch.testing.assert_close(got, f(x), rtol=1e-14, atol=1e-14)


def test_attention_with_a_mask_of_another_dtype():
    mask = torch.zeros(4, 4).masked_fill(~HIDDEN, -math.inf)
    f = lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), mask)  # noqa: E731
    x = torch.randn(2, 128, dtype=torch.float64)
    torch.testing.assert_close(session_of(f, x).run({"x": x})[0], f(x))


class Settled(nn.Module):
    """The weight settles the size of ``x``, after a function that needs the size."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x.logcumsumexp(-1) * self.weight, x.cummax(-1)[0]


def test_a_size_that_is_settled_later_is_known():
    model, x = Settled(), torch.randn(5, 6)
    session = session_of(model, x)
    for got, want in zip(session.run({"x": x[:3]}), model(x[:3]), strict=True):
        torch.testing.assert_close(got, want)
