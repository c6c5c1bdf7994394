"""Calls on parts of each row that an expert may make: each is read, and gives what the code gives for any number of
rows, in PyTorch and in ONNX Runtime; those that would mix rows are refused by their name."""

import functools
import re

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.capture.op_kinds import op_name
from moeopt.capture.replay import between
from moeopt.capture.tape import record
from moeopt.errors import Declined
from moeopt.ir.row_function import RowFunction
from moeopt.ops.row_function import function_of
from moeopt.recognise.kept_rows import keeps_rows
from moeopt.recognise.named_obstacles import alike_children
from moeopt.recognise.recurrences import recurrence
from moeopt.recognise.row_function import recognize_functions
from moeopt.recognise.row_graph import RowGraphReader
from tests.recognise.test_row_function import Loop

D, H = 8, 24


def planes(h):
    return h.view(-1, 2, 3, 4)


def parts(h):
    return h.view(-1, 4, 6)


def written(h, places, value):
    h = h.clone()
    h[places] = value
    return h


def recurrent(s, h):
    """A loop over the places of each row, as of a small recurrent cell."""
    z, found = torch.zeros(len(h), 6), []
    for part in parts(h).unbind(1):
        z = torch.tanh(z @ s.lu * 0.3 + part)
        found.append(z)
    return torch.stack(found, 1)


def attended(h, **options):
    q, k, v = (torch.stack([h, h.flip(-1), h.roll(1, -1)], 1) * 0.5).view(-1, 3, 2, 4, 3).unbind(1)
    return F.scaled_dot_product_attention(q, k, v, **options)


READ = {
    # layers of images and sequences within a row
    "local_response_norm of images": lambda s, h: F.local_response_norm(planes(h), 2),
    "local_response_norm of sequences": lambda s, h: F.local_response_norm(parts(h), 3),
    "grid_sample at fixed places": lambda s, h: F.grid_sample(
        planes(h), s.grid.expand(len(h), -1, -1, -1), align_corners=False
    ),
    "grid_sample at places of its own": lambda s, h: F.grid_sample(
        planes(h), h.tanh().view(-1, 3, 4, 2), align_corners=True
    ),
    "instance_norm": lambda s, h: F.instance_norm(parts(h)) + s.norm(parts(h)),
    "grid_sample by an affine map": lambda s, h: F.grid_sample(
        planes(h), F.affine_grid(h[:, :6].view(-1, 2, 3), [len(h), 2, 3, 4], align_corners=False), align_corners=False
    ),
    "pixel_shuffle": lambda s, h: F.pixel_unshuffle(F.pixel_shuffle(h.view(-1, 4, 2, 3), 2), 2),
    "channel_shuffle": lambda s, h: F.channel_shuffle(parts(h), 2),
    "unfold": lambda s, h: h.unfold(1, 6, 3).mean(-1) + parts(h).unfold(-1, 3, 1).sum(-1)[:, :1, :1].squeeze(-1),
    "pad": lambda s, h: F.pad(parts(F.pad(h, (-1, 1))), (1, 0, 0, 1)),
    "circular pad": lambda s, h: F.pad(parts(h), (1, 1), mode="circular"),
    "pools of volumes": lambda s, h: F.avg_pool3d(h.view(-1, 1, 2, 3, 4), 2, 1, 1)
    + F.max_pool3d(h.view(-1, 1, 2, 3, 4), 2, 1, 1),
    "causal convolution": lambda s, h: F.conv1d(F.pad(parts(h), (2, 0)), s.kernel),
    "rot90": lambda s, h: torch.rot90(planes(h), 1, (2, 3)) + torch.rot90(planes(h), -1, (3, 2)),
    # attention and recurrence among the parts of a row
    "attention of heads": lambda s, h: attended(h) + attended(h, is_causal=True, scale=0.3),
    "attention, a mask": lambda s, h: attended(h, attn_mask=s.grid.view(-1)[:16].view(4, 4)),
    "attention, a row's own mask": lambda s, h: attended(h, attn_mask=h[:, :16].view(-1, 1, 4, 4)),
    "a loop over places": recurrent,
    # distances, ranks
    "cdist to centers": lambda s, h: torch.exp(-torch.cdist(h, s.centers)),
    "cdist of parts": lambda s, h: torch.cdist(parts(h), parts(h)) + torch.cdist(parts(h), s.lu)[:, :, :4],
    "cosine_similarity to centers": lambda s, h: F.cosine_similarity(h[:, None], s.centers[None], dim=-1),
    "searchsorted": lambda s, h: h * (torch.searchsorted(h.sort(-1).values, h) + torch.searchsorted(s.edges, h)),
    "bucketize": lambda s, h: s.table[torch.bucketize(h[:, 0], s.edges)] + torch.bucketize(h, s.edges),
    "tril": lambda s, h: torch.tril(parts(h) @ parts(h).transpose(1, 2)),
    "diagonal": lambda s, h: (parts(h) @ parts(h).transpose(1, 2)).diagonal(dim1=1, dim2=2),
    "cross": lambda s, h: torch.linalg.cross(h.view(-1, 8, 3), h.flip(-1).view(-1, 8, 3))
    + torch.linalg.cross(h.view(-1, 8, 3), s.lu[None, :1, :3]),
    "nansum, aminmax": lambda s, h: (h - h.nansum(-1, keepdim=True)) / sum(h.abs().aminmax(dim=-1, keepdim=True)),
    # blocks of features, each with a matrix and a bias of its own
    "bmm, a bias added": lambda s, h: (torch.bmm(parts(h).transpose(0, 1), s.blocks) + s.bias).transpose(0, 1),
    "baddbmm": lambda s, h: torch.baddbmm(s.bias, parts(h).transpose(0, 1), s.blocks).transpose(0, 1),
    "baddbmm of itself": lambda s, h: torch.baddbmm(
        z := parts(h).transpose(0, 1), z, s.blocks, beta=0.5, alpha=2
    ).transpose(0, 1),
    "baddbmm, a repeated bias": lambda s, h: torch.baddbmm(
        s.bias.expand(4, len(h), 6), parts(h).transpose(0, 1), s.blocks
    ).transpose(0, 1),
    "matmul of turned rows": lambda s, h: (
        torch.matmul(parts(h).permute(1, 0, 2), s.blocks) + s.bias[:, 0][:, None]
    ).permute(1, 0, 2),
    "parts joined before the rows": lambda s, h: torch.einsum(
        "btk,bkn->tn", torch.stack([h[:, :6].cos(), h[:, 6:12], h[:, 12:18], h[:, 18:].sin()], 0), s.blocks
    ),
    "parts joined before the rows, and added": lambda s, h: torch.stack([h, h.cos(), h.sin()]).sum(0)
    + torch.stack([h, h.cos()]).mean([0], keepdim=True)[0],
    "parts joined before the rows by cat": lambda s, h: torch.einsum(
        "btk,bkn->btn", torch.cat([part.reshape(1, -1, 6) for part in h.split(6, -1)]), s.blocks
    ).sum(0),
    "matmul of each part": lambda s, h: torch.matmul(parts(h)[:, :, None], s.blocks)[:, :, 0],
    # what the code makes at each call
    "eye": lambda s, h: parts(h) @ (torch.eye(6) + s.lu),
    "arange, ones": lambda s, h: h * torch.arange(1, H + 1) + torch.ones(H),
    "arange in steps": lambda s, h: h * torch.arange(5, 5 - 2 * H, -2),
    "numbers of Python": lambda s, h: h[:, [0, 2, 5]] @ torch.tensor([[1.0], [2.0], [4.0]]),
    "zeros beside": lambda s, h: torch.cat([torch.zeros(len(h), 2), h[:, :-4], h.new_ones(len(h), 2)], -1),
    "a weight beside": lambda s, h: torch.cat(
        [s.table[:1].expand(len(h), -1), s.gain.repeat(len(h), 1), h], -1
    )[:, 20:],
    "queries of a weight": lambda s, h: F.scaled_dot_product_attention(
        s.lu[None].expand(len(h), -1, -1), parts(h), parts(h)
    ),
    "one_hot": lambda s, h: F.one_hot(h.argmax(-1), H) * h,
    # picked and written parts
    "several indices": lambda s, h: parts(h)[:, [0, 2, 3], [1, 4, 5]],
    "pairs of parts": lambda s, h: (parts(h) @ parts(h).transpose(1, 2))[(slice(None), *torch.triu_indices(4, 4, 1))],
    "index_add": lambda s, h: torch.zeros(len(h), 6).index_add(1, torch.arange(H) % 6, h),
    "a slice written": lambda s, h: written(h, (slice(None), slice(0, 12)), h[:, 12:]),
    "a place written": lambda s, h: written(h, (slice(None), 3), h[:, 1]),
    "places written": lambda s, h: written(h, (slice(None), [1, 3]), 0.5) + written(h, (slice(None), [1, 3]), h[:, :2]),
    "a slice turned around": lambda s, h: written(h, (slice(None), slice(None, None, 2)), -h[:, ::2]),
    # complex numbers
    "pairs as complex numbers": lambda s, h: torch.view_as_real(
        torch.view_as_complex(h.view(-1, 12, 2)) * torch.polar(torch.ones(12), torch.arange(12.0))
    ),
    "rfft, irfft": lambda s, h: torch.fft.irfft(torch.fft.rfft(h) * torch.fft.rfft(s.table[0]), n=H),
    "fft2": lambda s, h: torch.fft.fft2(parts(h)).real,
}  # fmt: skip


class Expert(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(D, H), nn.Linear(H, D), nn.InstanceNorm1d(4, affine=True)
        self.centers, self.table, self.lu, self.gain, self.bias = (
            nn.Parameter(torch.randn(shape)) for shape in [(5, H), (10, H), (6, 6), (1, 1), (4, 1, 6)]
        )
        self.blocks, self.kernel = nn.Parameter(torch.randn(4, 6, 6)), nn.Parameter(torch.randn(4, 4, 3))
        nn.init.normal_(self.norm.weight)
        self.register_buffer("grid", torch.rand(1, 3, 4, 2) * 2 - 1)
        self.register_buffer("edges", torch.linspace(-2, 2, 9))
        self.body = body

    def forward(self, x):
        h = self.body(self, self.up(x)).reshape(len(x), -1)
        return self.down(h[:, :H] if h.shape[1] >= H else F.pad(h, (0, H - h.shape[1])))


def read(expert, rows=13, **options):
    tape = record(expert, (torch.randn(rows, D),), {})
    (start,) = [n for n in tape.nodes if n.op == "placeholder"]
    graph = RowGraphReader(tape, start, tape.output, set(between(tape, [start], tape.output)), **options)
    held = {**dict(expert.named_parameters()), **dict(expert.named_buffers())}
    return graph, [ref.read(held[ref.path]).detach() for ref in graph.slots]


def made(body):
    torch.manual_seed(0)
    return Expert(body).eval()


@pytest.mark.parametrize("what", READ)
def test_a_call_on_parts_of_a_row_is_read_for_any_number_of_rows(what):
    expert = made(READ[what])
    graph, slots = read(expert)
    assert read(expert, rows=9)[0].text == graph.text
    for rows in (1, 4, 6, 40):
        x = torch.randn(rows, D)
        with torch.no_grad():
            torch.testing.assert_close(function_of(graph.text)(x, *slots), expert(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", range(4))
def test_onnx_runtime_has_each_of_them(part):
    """A quarter of them in one graph, as a sum: four conversions."""
    import onnx_ir

    from moeopt.lower.onnx.lowerings.row_graph import _converted

    def every(s, h):
        found = (body(s, h).flatten(1).float() for body in list(READ.values())[part::4])
        return sum(F.pad(one, (0, 3 * H - one.shape[1])) for one in found)

    expert = made(every)
    graph, slots = read(expert)
    model = onnx_ir.to_proto(_converted(RowFunction(graph.text, "float32"))).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    for rows in (0, 1, 5, 30):
        x = torch.randn(rows, D)
        (got,) = session.run(None, {n: v.numpy() for n, v in zip(names, [x, *slots], strict=True)})
        want = expert(x).detach() if rows else x
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-3)


REFUSED = {
    "rot90 works across rows": lambda s, h: torch.rot90(h),
    "linalg_cross works across rows": lambda s, h: torch.linalg.cross(h, h.flip(-1), dim=0),
    "cross without dim runs along the first dimension of size 3, which is that of the rows": lambda s, h: torch.cross(
        h[:, :3], h[:, 3:6]
    ).repeat(1, 8),
    "linalg_cross gives rows different weights by their place": lambda s, h: torch.linalg.cross(
        h.view(-1, 8, 3), s.table[: len(h)].view(-1, 8, 3)
    ),
    "scaled_dot_product_attention is not known to work on each row": lambda s, h: F.scaled_dot_product_attention(
        *[planes(h).transpose(0, 1)] * 3
    ).transpose(0, 1),
    "scaled_dot_product_attention gives rows different weights": lambda s, h: attended(
        h, attn_mask=s.table[: len(h), :16].detach().reshape(-1, 1, 4, 4)
    ),
    "scaled_dot_product_attention compares rows with one another": lambda s, h: F.scaled_dot_product_attention(
        *[h.view(1, 1, -1, H)] * 3
    )[0, 0],
    "sum is not known to work on each row by itself": lambda s, h: torch.stack([h, h.cos()]).sum((0, 1))[None] + h,
    "constant_pad_nd works across rows": lambda s, h: F.pad(h, (0, 0, 1, 0))[1:],
    "unfold works across rows": lambda s, h: h.unfold(0, 1, 1),
    "grid_sampler_2d reads images at places of other rows": lambda s, h: F.grid_sample(
        planes(h), s.grid.repeat(9, 1, 1, 1)[: len(h)], align_corners=True
    ),
    "cdist compares rows with one another": lambda s, h: torch.cdist(h, h)[:, :1],
    "searchsorted ranks rows among numbers of other rows": lambda s, h: torch.searchsorted(
        s.table.sort(-1).values[: len(h)], h
    ).float(),
    "bucketize ranks rows among numbers of other rows": lambda s, h: h * torch.bucketize(h[:, 0], h[:, 1])[:, None],
    "index_put writes values of other rows": lambda s, h: written(h, (slice(None), [1, 3]), s.table[: len(h), :2]),
    "copy writes values of other rows": lambda s, h: written(h, (slice(None), 3), s.table[: len(h), 1]),
    "index picks by several indices in dimensions that do not": lambda s, h: planes(h)[:, [0, 1], :, [1, 2]],
    "_fft_r2c works across rows": lambda s, h: torch.fft.fft(h, dim=0).real,
    "diagonal works across rows": lambda s, h: h + h.diagonal()[:, None],
    "baddbmm gives rows different weights by their place": lambda s, h: torch.baddbmm(
        s.table[: len(h), :6], parts(h).transpose(0, 1), s.blocks
    ).transpose(0, 1),
    "add gives rows different weights by their place": lambda s, h: (
        torch.bmm(parts(h).transpose(0, 1), s.blocks) + s.table[None, : len(h), :6]
    ).transpose(0, 1),
    "arange is a tensor of more than 64 numbers": lambda s, h: h + torch.arange(100.0)[:H],
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_call_on_several_rows_is_refused_by_its_name(why):
    with pytest.raises(Declined, match=re.escape(f"an expert's {why}")):
        read(made(REFUSED[why]), rows=3 if "cross works" in why else 7)


@pytest.mark.parametrize("what", READ)
@pytest.mark.sample(12)
def test_experts_with_several_numbers_of_rows_are_read_as_one_function(what):
    torch.manual_seed(0)
    found = recognize_functions(record(Loop(lambda: Expert(READ[what])).eval(), (torch.randn(40, D),), {}))
    assert [len(block.experts) for block in found] == [4]


def test_what_a_loop_makes_of_zeros_is_alike_for_several_numbers_of_rows():
    torch.manual_seed(0)
    found = recognize_functions(record(Loop(lambda: Expert(recurrent)).eval(), (torch.randn(40, D),), {}))
    assert [len(block.experts) for block in found] == [4]


WITHIN = {
    "scaled_dot_product_attention gives rows different weights by their place": lambda s, h: attended(
        h, attn_mask=torch.arange(len(h)).float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    ),
    "mean works across rows": lambda s, h: attended(h, attn_mask=h.mean(0)[:16].view(4, 4)),
}


@pytest.mark.parametrize("why", WITHIN)
def test_attention_within_a_row_is_no_obstacle_where_a_call_beside_it_is(why):
    torch.manual_seed(0)
    (entry,) = moeopt.explain(Loop(lambda: Expert(WITHIN[why])).eval(), torch.randn(40, D)).blocks
    assert entry.reason == f"an expert's {why}"


def test_a_stack_of_single_rows_picks_rows_and_one_of_several_keeps_them():
    tape = record(Expert(lambda s, h: h + torch.stack([h[1], h[0]]) + torch.stack([h, h]).sum(0)), (torch.randn(2, D),))
    assert [keeps_rows(n) for n in tape.nodes if op_name(n) == "stack"] == [False, True]


def over_tokens(s, h):
    z, found = torch.zeros(H), []
    for place in range(len(h)):
        z = torch.tanh(z * 0.3 + h[place])
        found.append(z)
    return torch.stack(found)


def test_a_loop_over_the_places_of_a_row_is_not_told_as_one_over_tokens():
    torch.manual_seed(0)
    for body, why in ((recurrent, None), (over_tokens, "a token's result depends on the tokens before it")):
        module = Loop(lambda body=body: Expert(body)).eval()
        found = recurrence(record(module, (torch.randn(40, D),), {}), alike_children(module))
        assert found is None if why is None else why in found.reason


SEEDS = [(what, experts, seed) for what in READ for experts, seed in ((16, 0), (16, 7), (32, 3))]


@pytest.mark.parametrize(
    ("what", "experts", "seed"),
    [
        *[(what, 16, 0) for what in ("baddbmm", "queries of a weight", "cosine_similarity to centers")],
        *[pytest.param(*case, marks=pytest.mark.nightly) for case in SEEDS],
    ],
)
def test_a_single_row_of_one_of_many_experts_does_not_hide_them(what, experts, seed):
    """Calls of few tokens give some of them one row, and skip others: the verdict must not depend on which."""
    torch.manual_seed(seed)
    model = Loop(lambda: Expert(READ[what]), experts, guarded=True).eval()
    (block,) = moeopt.optimize(model, torch.randn(40, D), verify="off").report.blocks
    assert (block.status, block.experts, block.reason) == ("rewritten", experts, "")


def ones_of_a_fixed_size(counts):
    """The size is the number of rows of one of the experts."""
    return lambda s, h: h + (torch.ones(counts[0], H) * s.gain).mean(0)


def test_a_fixed_size_that_is_by_chance_the_number_of_rows():
    torch.manual_seed(0)
    module, x = Loop(lambda: Expert(None)).eval(), torch.randn(40, D)
    counts = module.router(x).topk(2)[1].flatten().bincount(minlength=4).tolist()
    assert len(set(counts)) > 1
    for expert in module.experts:
        expert.body = ones_of_a_fixed_size(counts)
    (found,) = recognize_functions(record(module, (x,), {}))
    assert [n for n in found.spec.body.nodes if f"{counts[0]}, {H}" in str(n[1])]


class Layer(nn.Module):
    """``body(self, x)``, where the first thing done to the rows may be a call without weights."""

    def __init__(self, body):
        super().__init__()
        self.body, self.norm = body, nn.InstanceNorm1d(4, affine=True)
        self.wide, self.narrow, self.short = (nn.Linear(n, D) for n in (3 * D, D, 6))
        self.a, self.b = nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(4, 4))
        self.c, self.cubes = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D, D, 3) * 0.2)

    def forward(self, x):
        return self.body(self, x)


def polynomials(x):
    found = torch.ones(len(x), D, 3)
    found[:, :, 1] = x
    found[:, :, 2] = 1.5 * x * x - 0.5
    return found


FIRST_WITHOUT_WEIGHTS = {
    "joined with ones": lambda s, x: s.wide(torch.cat([torch.ones_like(t := x.tanh()), t, 1.5 * t * t - 0.5], -1)),
    "written into ones": lambda s, x: torch.einsum("bid,iod->bo", polynomials(x.tanh()), s.cubes),
    "joined with zeros": lambda s, x: s.narrow(F.relu(torch.cat([x[:, 1:], torch.zeros(len(x), 1)], -1) * s.c)),
    "transformed": lambda s, x: torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(s.c)).real.tanh() if len(x) else x,
    "pairs of parts": lambda s, x: s.short(
        ((z := s.narrow(x).view(-1, 4, 2)) @ z.transpose(1, 2))[(slice(None), *torch.triu_indices(4, 4, 1))]
    ),
    "multiplied from the left": lambda s, x: (s.b @ x.view(-1, 4, 2) @ s.a).reshape(-1, D).relu(),
    "instance_norm": lambda s, x: s.narrow(s.norm(s.narrow(x).view(-1, 4, 2)).flatten(1)) if len(x) else x,
}


class OneBehindAnother(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Loop(functools.partial(Layer, body)) for body in FIRST_WITHOUT_WEIGHTS.values())

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def test_an_engine_takes_experts_that_begin_without_weights():
    torch.manual_seed(0)
    model = OneBehindAnother().eval()
    fast = moeopt.optimize(model, torch.randn(40, D), backend="onnxruntime", verify="fast")
    found = [(b.status, b.experts, b.reason) for b in fast.report.blocks]
    assert found == [("rewritten", 4, "")] * len(FIRST_WITHOUT_WEIGHTS)
    for rows in (1, 17):
        x = torch.randn(rows, D)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
