"""Experts whose features are not the last dimension: which are functions of a row, and which are refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.capture.replay import between
from moeopt.capture.tape import record
from moeopt.errors import Declined
from moeopt.ops.row_function import function_of
from moeopt.recognise.row_flow import features_axis
from moeopt.recognise.row_graph import RowGraphReader
from tests.zoo import CASES

C, K = 6, 10


class Expert(nn.Module):
    """One expert on images; ``body(self, x)`` is what the test is about."""

    def __init__(self, body, rank=2):
        super().__init__()
        conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[rank - 1]
        self.up, self.down, self.wide = conv(C, K, 1), conv(K, C, 1), conv(C, K, 3, padding=1)
        self.norm, self.first = norm(K), norm(C)
        self.scale, self.gain = nn.Parameter(torch.randn(C, *[1] * rank)), nn.Parameter(torch.randn(()))
        self.places = nn.Parameter(torch.randn(1, 1, *[3] * rank))
        self.body = body
        for norm in (self.norm, self.first):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight)

    def forward(self, x):
        return self.body(self, x)


def graph_of(expert, x):
    tape = record(expert, (x,), {})
    (start,) = [n for n in tape.nodes if n.op == "placeholder"]
    inside = set(between(tape, [start], tape.output))
    axis = features_axis(start, inside, [u for u in start.users if u in inside])
    return RowGraphReader(tape, start, tape.output, inside, axis=axis)


def rows_of(images):
    return images.movedim(1, -1).reshape(-1, images.shape[1])


IMAGES = {
    "a norm between": lambda s, x: s.down(F.relu(s.norm(s.up(x)))),
    "a norm first": lambda s, x: s.down(s.up(F.silu(s.first(x)))),
    "what goes past": lambda s, x: x + s.scale * s.first(s.down(F.gelu(s.up(x)))),
    "a number for all": lambda s, x: s.down(s.gain * s.norm(s.up(x)).relu()),
    "a gate of one channel": lambda s, x: s.down(s.norm(s.up(x)) * s.up(x).sigmoid()),
    "turned for a norm of features": lambda s, x: s.down(
        F.layer_norm(s.up(x).permute(0, 2, 3, 1), (K,)).permute(0, 3, 1, 2)
    ),
}


@pytest.mark.parametrize("what", IMAGES)
def test_each_place_of_an_image_is_a_row(what):
    torch.manual_seed(0)
    expert = Expert(IMAGES[what]).eval()
    graph = graph_of(expert, torch.randn(2, C, 3, 3))
    assert graph.out_axis == 1
    images = torch.randn(4, C, 5, 2)
    held = {**dict(expert.named_parameters()), **dict(expert.named_buffers())}
    slots = [p.read(held[p.path]) for p in graph.slots]
    with torch.no_grad():
        got, want = function_of(graph.text)(rows_of(images), *slots), rows_of(expert(images))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_rows_with_features_last_that_are_turned_for_convolutions():
    """(N, L, C), turned to (N, C, L) for the convolutions alone."""
    torch.manual_seed(0)
    expert = Expert(lambda s, x: s.down(F.relu(s.norm(s.up(x.transpose(1, 2))))).transpose(1, 2), rank=1).eval()
    graph = graph_of(expert, torch.randn(2, 5, C))
    assert graph.out_axis == -1
    x = torch.randn(3, 4, C)
    held = {**dict(expert.named_parameters()), **dict(expert.named_buffers())}
    with torch.no_grad():
        got = function_of(graph.text)(x.reshape(-1, C), *(p.read(held[p.path]) for p in graph.slots))
        torch.testing.assert_close(got, expert(x).reshape(-1, C), rtol=1e-5, atol=1e-5)


REFUSED = {
    "a wide kernel": (lambda s, x: s.down(s.wide(x)), "convolution is wider than 1x1, steps, pads or has groups"),
    "weights of places": (
        lambda s, x: s.down(s.norm(s.up(x)) * s.places), "mul gives rows different weights by their place",
    ),
    "the mean of an image": (
        lambda s, x: s.down(s.up(x) * s.up(x).mean((2, 3), keepdim=True)),
        "mean is not known to work on each row by itself where channels are not the last dimension",
    ),
    "the rows turned": (
        lambda s, x: s.down(s.up(x).transpose(2, 3)),
        "transpose is not known to work on each row by itself where channels are not the last dimension",
    ),
    "a kernel of the rows": (
        lambda s, x: s.down(F.conv2d(s.up(x), s.up(x)[:1, :, :1, :1].expand(K, K, 1, 1))), "not known to work",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_function_of_several_places_is_refused(what):
    torch.manual_seed(0)
    body, said = REFUSED[what]
    with pytest.raises(Declined, match=said):
        graph_of(Expert(body).eval(), torch.randn(2, C, 3, 3))


def test_statistics_of_the_batch_are_refused():
    expert = Expert(IMAGES["a norm between"]).train()
    with pytest.raises(Declined, match="takes statistics of the batch, so a row's result depends on other rows"):
        graph_of(expert, torch.randn(2, C, 3, 3))


@pytest.mark.parametrize("wide", [False, True], ids=["as they are", "channels last in memory"])
def test_an_engine_runs_them_where_an_image_chose_them(wide):
    case = CASES["whole_image_routed_convolutions_with_norms"]
    model, form = case.build(), torch.channels_last if wide else torch.contiguous_format
    engine = moeopt.optimize(
        model, torch.randn(5, 8, 3, 4).to(memory_format=form), backend="onnxruntime", verify="fast"
    )
    (block,) = engine.report.blocks
    assert (block.kind, block.status, block.experts) == ("moe", "rewritten", 4), block.reason
    for x in (torch.randn(1, 8, 2, 2), torch.randn(6, 8, 5, 3).to(memory_format=form), torch.ones(3, 8, 4, 4)):
        with torch.no_grad():
            torch.testing.assert_close(engine(x), model(x), rtol=1e-4, atol=1e-5)
