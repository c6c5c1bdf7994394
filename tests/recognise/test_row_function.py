"""Experts of any function of a row: which graph and slots are read, and which functions are refused."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeopt.capture.replay import between
from moeopt.capture.tape import record
from moeopt.errors import Declined
from moeopt.ir.row_function import RowFunction
from moeopt.ops.row_function import function_of
from moeopt.pipeline.pays import words
from moeopt.recognise.any_experts import recognize
from moeopt.recognise.experts_hit import ExpertsNotHit
from moeopt.recognise.row_function import _experts, recognize_functions
from moeopt.recognise.row_graph import RowGraphReader

D, HID, N = 8, 12, 4


class Loop(nn.Module):
    """``guarded``: an expert that no token chose is not called."""

    def __init__(self, make, n=N, guarded=False):
        super().__init__()
        self.router, self.experts = nn.Linear(D, n), nn.ModuleList(make() for _ in range(n))
        self.guarded = guarded

    def forward(self, x):
        w, ids = self.router(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if len(t) or not self.guarded:
                y = y.index_add(0, t, expert(x[t]) * w[t, k, None])
        return y


class Function(nn.Module):
    """One expert; ``body(self, x)`` is what the test is about."""

    def __init__(self, body):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(D, HID), nn.Linear(HID, D), nn.LayerNorm(HID)
        nn.init.normal_(self.norm.weight)
        self.kernel, self.table = nn.Parameter(torch.randn(2, 2, 2, 2)), nn.Parameter(torch.randn(HID, HID))
        self.register_buffer("turned", torch.arange(HID).flip(0)[None])
        self.register_buffer("odd", torch.arange(HID) % 2 == 1)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def read(module, tokens=40, **options):
    torch.manual_seed(0)
    x = torch.randn(tokens, D)
    tape = record(module, (x,), {})
    return recognize_functions(tape, **options), tape, x


def of(body):
    torch.manual_seed(0)
    return Loop(lambda: Function(body)).eval()


def test_graph_and_slots_of_each_expert():
    module = of(lambda s, x: s.down(F.gelu(s.norm(s.up(x)))))
    (found,), _, x = read(module)
    assert isinstance(found.spec, RowFunction) and found.spec.body.names() == ["linear", "native_layer_norm", "gelu"]
    for e, ref in enumerate(found.experts):
        names = ["up.weight", "up.bias", "norm.weight", "norm.bias", "down.weight", "down.bias"]
        assert [p.path for p in ref.slots] == [f"experts.{e}.{n}" for n in names]
        slots = [p.read(module.get_parameter(p.path)) for p in ref.slots]
        got = function_of(found.spec.graph)(x, *slots)
        torch.testing.assert_close(got, module.experts[e](x), rtol=1e-5, atol=1e-6)


def test_the_graph_holds_for_any_number_of_rows():
    """Heads inside a row: a view, a norm over each head, a softmax over heads."""

    def heads(s, x):
        h = s.up(x).view(x.shape[0], 3, 4)
        h = h / h.norm(dim=-1, keepdim=True)
        return s.down((h * h.softmax(1)).transpose(1, 2).reshape(x.shape[0], HID))

    module = of(heads)
    (found,), _, _ = read(module)
    for rows in (1, 3, 12, 40):
        x = torch.randn(rows, D)
        slots = [p.read(module.get_parameter(p.path)) for p in found.experts[1].slots]
        torch.testing.assert_close(function_of(found.spec.graph)(x, *slots), module.experts[1](x), rtol=1e-5, atol=1e-6)


def images(s, x):
    """Layers of images and sequences, of what each row holds by itself."""
    h = s.up(x)
    planes, places = h.view(-1, 2, 2, 3), h.view(-1, 3, 4)
    spread, mean = torch.var_mean(h, -1, keepdim=True)
    found = [
        F.avg_pool1d(places, 3, 1, 1), F.max_pool2d(planes, 3, 1, 1), F.adaptive_avg_pool2d(planes, (2, 3)),
        F.adaptive_max_pool1d(places, 2).repeat(1, 1, 2), F.unfold(planes, 1), F.fold(F.unfold(planes, 1), (2, 3), 1),
        F.pad(places, (1, 1), mode="reflect")[:, :, :4],
        F.interpolate(places, scale_factor=2, mode="linear")[:, :, ::2],
        F.interpolate(planes, size=(2, 3), mode="bicubic"),
        F.conv2d(F.pad(planes, (0, 1, 0, 1), mode="replicate"), s.kernel),
        torch.bmm(torch.bmm(places, places.transpose(1, 2)), places), h.roll(1, -1), (h - mean) / (spread + 1),
        places.logsumexp(-1).repeat(1, 4), places.prod(-1).repeat(1, 4), s.table[h.topk(2)[1]].sum(1),
    ]  # fmt: skip
    return s.down(sum(part.reshape(-1, HID) for part in found))


def test_layers_of_images_within_a_row():
    module = of(images)
    (found,), _, _ = read(module)
    for rows in (1, 3, 40):
        x = torch.randn(rows, D)
        slots = [p.read(module.get_parameter(p.path)) for p in found.experts[1].slots]
        torch.testing.assert_close(function_of(found.spec.graph)(x, *slots), module.experts[1](x), rtol=1e-5, atol=1e-5)


def test_a_function_without_products_is_told_by_its_calls():
    (found,), _, _ = read(of(lambda s, x: F.conv1d(x[:, None], s.table[:1, None, :3], padding=1)[:, 0].tanh()))
    assert words(found.spec.body) == "convolution, select, tanh"


def test_a_clamp_of_weights_is_no_limit_of_rows():
    """Experts of three values each, as their Parameters are rounded at each call."""

    def rounded(s, x):
        size = s.up.weight.abs().mean()
        return s.down(F.relu(F.linear(x, (s.up.weight / size).round().clamp(-1, 1) * size, s.up.bias)))

    torch.manual_seed(0)
    (found,) = recognize(record(of(rounded), (torch.randn(40, D),), {}))
    assert isinstance(found.spec, RowFunction) and "clamp" in found.spec.body.names()


def test_experts_of_two_products_are_not_taken_from_the_grouped_op():
    module = of(lambda s, x: s.down(F.gelu(s.up(x))))
    torch.manual_seed(0)
    tape = record(module, (torch.randn(40, D),), {})
    (found,) = recognize(tape)
    assert not isinstance(found.spec, RowFunction)


def test_a_slice_of_a_bank_is_a_slot_and_not_the_bank():
    class Bank(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(D, N)
            self.w = nn.Parameter(torch.randn(N, D, D))
            self.gamma = nn.Parameter(torch.rand(N, D) + 0.5)

        def forward(self, x):
            w, ids = self.router(x).softmax(-1).max(-1)
            y = torch.zeros_like(x)
            for e in range(N):
                t = (ids == e).nonzero()[:, 0]
                y[t] = w[t, None] * (F.layer_norm(x[t] @ self.w[e], (D,)) * self.gamma[e]).sin()
            return y

    torch.manual_seed(0)
    (found,), _, _ = read(Bank().eval())
    assert [{p.path for p in ref.slots} for ref in found.experts] == [{"w", "gamma"}] * N
    assert [sorted(p.origin[0] for p in ref.slots) for ref in found.experts] == [[e, e] for e in range(N)]


REFUSED = {
    "statistics of the batch": lambda s, x: s.down(s.up(x) - s.up(x).mean(0, keepdim=True)),
    "attention among an expert's tokens": lambda s, x: s.down((s.up(x) @ s.up(x).t()).softmax(-1) @ s.up(x)),
    "the largest of all rows": lambda s, x: s.down(s.up(x) / s.up(x).abs().max()),
    "a running sum over rows": lambda s, x: s.down(s.up(x).cumsum(0)),
    "the order of its rows": lambda s, x: s.down(F.relu(s.norm(s.up(x))).flip(0)),
    "features of two rows joined": lambda s, x: s.down(F.pad(s.up(x), (0, 0, 1, 0))[:-1]),
    "features of the first row": lambda s, x: s.down(s.up(x) + s.up(x).gather(1, s.turned)),
    "as many features as a mask has": lambda s, x: s.down(in_halves(s.up(x), s.odd)),
    "rows as the channels of an image": lambda s, x: s.down(F.unfold(s.up(x).view(-1, 3, 4), 1)[: len(x)]),
    "rows in a ring": lambda s, x: s.down(s.up(x).roll(1)),
    "rows once more": lambda s, x: s.down(s.up(x).repeat(2, 1)[: len(x)]),
    "a matrix for each place": lambda s, x: s.down(
        torch.bmm(s.up(x)[:, None], s.table[: len(x), :, None])[:, 0] + s.up(x)
    ),
    "a window of a row's own": lambda s, x: s.down(F.conv1d(s.up(x)[:, None], s.up(x)[:1, None, :1])[:, 0]),
    "all rows as windows": lambda s, x: s.down(F.conv1d(h := s.up(x)[:, None], h)[:, :, 0].sum(1)[:, None] + s.up(x)),
    "images of all rows": lambda s, x: s.down(F.avg_pool2d(s.up(x).view(1, -1, HID), (3, 1), 1, (1, 0))[0]),
}


def in_halves(h, mask):
    return torch.cat([h[:, mask], h[:, ~mask]], -1)


@pytest.mark.parametrize("what", REFUSED)
def test_a_function_of_several_rows_is_refused(what):
    with pytest.raises(Declined):
        read(of(REFUSED[what]))


WHY = {
    "statistics of the batch": "mean works across rows",
    "attention among an expert's tokens": "t turns rows into features",
    "the largest of all rows": "max works across rows",
    "a running sum over rows": "cumsum works across rows",
    "the order of its rows": "flip works across rows",
    "features of two rows joined": "constant_pad_nd works across rows",
    "features of the first row": "gather picks by indices of other rows",
    "as many features as a mask has": "index picks by a mask, so that its values decide a size",
    "rows as the channels of an image": "im2col works across rows",
    "rows in a ring": "roll works across rows",
    "rows once more": "repeat repeats rows",
    "a matrix for each place": "bmm multiplies all rows by several matrices at once (a matrix of blocks, or",
    "a window of a row's own": "slice works across rows",
    "all rows as windows": "convolution is not known to work on each row by itself",
    "images of all rows": "avg_pool2d works across rows",
}


@pytest.mark.parametrize("what", WHY)
def test_the_refusal_names_the_call(what):
    expert = Function(REFUSED[what])
    tape = record(expert, (torch.randn(5, D),), {})
    (start,) = [n for n in tape.nodes if n.op == "placeholder"]
    inside = set(between(tape, [start], tape.output))
    with pytest.raises(Declined, match=re.escape(f"an expert's {WHY[what]}")) as caught:
        RowGraphReader(tape, start, tape.output, inside)
    assert "test_row_function.py" in (caught.value.where or "")


def test_batch_norm_is_a_function_of_a_row_in_evaluation_mode_only():
    module = nn.Sequential(nn.Linear(D, HID), nn.BatchNorm1d(HID))
    for training, want in (
        (False, None),
        (True, "takes statistics of the batch, so a row's result depends on other rows"),
    ):
        tape = record(module.train(training), (torch.randn(5, D),), {})
        (start,) = [n for n in tape.nodes if n.op == "placeholder"]
        inside = set(between(tape, [start], tape.output))
        if want is None:
            assert len(RowGraphReader(tape, start, tape.output, inside).slots) == 6
            continue
        with pytest.raises(Declined, match=want):
            RowGraphReader(tape, start, tape.output, inside)


def test_experts_that_differ_are_refused():
    module = of(lambda s, x: s.down(F.gelu(s.norm(s.up(x)))))
    module.experts[2].body = lambda s, x: s.down(F.relu(s.norm(s.up(x))))
    with pytest.raises(Declined):
        read(module)


def test_an_expert_that_no_token_reached_is_counted():
    module = of(lambda s, x: s.down(F.gelu(s.norm(s.up(x)))))
    with torch.no_grad():
        module.router.bias[2] = -100.0
    with pytest.raises(ExpertsNotHit) as caught:
        read(module)
    assert caught.value.num_named == N
    assert re.search(r"no probe token reached 1 of its experts", caught.value.reason)


def within(self, x):
    """A sort, and the largest of a row put back in their places."""
    h = self.up(x)
    values, places = h.topk(5, -1)
    kept = torch.zeros_like(h).scatter(-1, places, values.sin())
    return self.down(kept + h.sort(-1, descending=True).values)


def within_by_name(self, x):
    """A stable sort takes its dimension by name alone."""
    h = self.up(x)
    values, places = torch.topk(h, k=5, dim=-1)
    kept = torch.zeros_like(h).scatter(dim=-1, index=places, src=values.sin())
    return self.down(kept + h.sort(dim=-1, descending=True, stable=True).values)


@pytest.mark.parametrize("within", [within, within_by_name])
def test_sorts_and_picks_within_a_row(within):
    module = of(within)
    (found,), _, _ = read(module)
    assert isinstance(found.spec, RowFunction) and len(found.experts) == N
    assert {"sort", "topk", "scatter"} <= set(found.spec.body.names())
    rows, expert = torch.randn(9, D), module.experts[0]
    slots = {tuple(p.shape): p.detach() for p in (*expert.up.parameters(), *expert.down.parameters())}
    with torch.no_grad():
        got = function_of(found.spec.graph)(rows, *(slots[tuple(shape)] for _, shape in found.spec.body.slots))
        torch.testing.assert_close(got, expert(rows))


ACROSS = {
    "sort": lambda h: h.sort(0).values,
    "stable sort": lambda h: h.sort(dim=0, stable=True).values,
    "kthvalue": lambda h: h.kthvalue(1, 0, keepdim=True).values + h,
    "median": lambda h: h - h.median(0).values,
    "median of all": lambda h: h - h.median(),
    "argmax": lambda h: h + h.argmax(0),
    "index": lambda h: h[h[:, 0].argsort()],
    "index by a buffer": lambda h: h[torch.zeros(len(h), dtype=torch.long)],
    "a code of all rows": lambda h: h + h.flatten().argmax() / 9,
}


@pytest.mark.parametrize("what", ACROSS)
def test_a_choice_among_rows_is_refused(what):
    with pytest.raises(Declined):
        read(of(lambda self, x: self.down(ACROSS[what](self.up(x)))))


@pytest.mark.parametrize("places", [torch.tensor([3, 1, 1, 0, 11, 5, 7, 2, 2, 9, 4, 6]), torch.arange(HID) % 3 == 1])
def test_a_buffer_of_places_is_a_slot(places):
    """Integers and flags that an expert holds are read like its weights, each expert's own."""

    def body(self, x):
        kept = self.up(x).sin()
        return self.down(kept[:, self.places] if self.places.dtype == torch.long else kept * self.places)

    module = of(body)
    for number, expert in enumerate(module.experts):
        expert.register_buffer("places", places.roll(number))
    (found,), _, x = read(module)
    for expert, ref in zip(module.experts, found.experts, strict=True):
        held = dict(expert.named_parameters()) | dict(expert.named_buffers())
        slots = [p.read(held[p.path.split(".", 2)[2]]) for p in ref.slots]
        assert any(s is expert.places or torch.equal(s, expert.places) for s in slots if s.dtype == places.dtype)
        torch.testing.assert_close(function_of(found.spec.graph)(x, *slots), expert(x), rtol=1e-5, atol=1e-6)


def test_experts_that_a_second_call_reads_from_other_weights_are_told_so():
    (found,), *_ = read(of(lambda self, x: self.down(self.up(x).sin())))
    other = dataclasses.replace(found, experts=found.experts[:2])
    with pytest.raises(Declined, match="read other weights than on the first.*several tokens for each expert"):
        _experts([ref.slots for ref in found.experts[2:]], [other], None)
