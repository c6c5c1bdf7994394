"""Rows that data choose: none, one or more of them, through layers whose kernels or traces fail on none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeopt
from moeopt.errors import NotSaveableError, UsageError
from moeopt.lower.traced_forms import traced_form
from tests.toy_moe import seeded

NONE, ONE, SOME = (torch.tensor(mask) for mask in ([False] * 4, [False, True, False, False], [True, False, True, True]))


class Sequences(nn.Module):
    """What layers make of the chosen sequences, and statistics of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.GRU(6, 5, batch_first=True), nn.LSTM(6, 5, bidirectional=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x, mask):
        rows = x[torch.where(mask)[0]]
        places, last = self.first(rows)
        second, (_, cell) = self.second(rows.transpose(0, 1))
        spread, mean = torch.var_mean(rows, 0)
        return (
            places, last, second, cell, self.attention(rows, rows, rows, need_weights=False)[0], rows.mean(0),
            rows.mean((0, 2), keepdim=True), rows.var(0), spread, mean, rows.var((0, 1), unbiased=False),
            torch.cdist(rows, rows),
        )  # fmt: skip


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))

    def forward(self, x, mask):
        rows = x[torch.where(mask)[0]]
        statistics = torch.native_group_norm(rows, None, None, rows.shape[0], 4, 25, 2, 1e-5)
        return self.layers(rows), F.unfold(rows, 3), F.instance_norm(rows.permute(1, 2, 3, 0)), *statistics


class LeftEarly(nn.Module):
    """torch's code asks of these whether there is nothing, and its general way fails on nothing."""

    def forward(self, x, mask):
        rows = x[torch.where(mask)[0]]
        sums = rows.logsumexp(0), torch.logsumexp(rows, (0, -1), True), rows.logsumexp(1)
        return *sums, F.local_response_norm(rows, 2), F.local_response_norm(rows.flatten(2), 3, 0.5, k=2.0)


class Means(nn.Module):
    """Means that the exporter's translations write: for losses, deviations, pools; of 16 bits, in another dtype."""

    def forward(self, x, mask):
        rows = x[torch.where(mask)[0]]
        flat, other = rows.flatten(1), rows.flatten(1) + 1
        losses = F.mse_loss(rows, rows + 1), F.l1_loss(flat, 2 * other)
        losses += (F.triplet_margin_loss(flat, other, -flat), F.mse_loss(rows.half(), rows.half() + 1))
        best = rows[:, 0].argmax(-1)
        losses += (F.cross_entropy(flat, best), F.cross_entropy(flat, best, flat[0:0].sum(0) + 2, reduction="sum"))
        losses += (F.cross_entropy(flat, best, ignore_index=1, reduction="none"),)
        deviation, mean = torch.std_mean(rows, 0)
        pooled = F.adaptive_avg_pool1d(flat.t(), 1)
        return *losses, deviation, mean, pooled, rows.mean(0, dtype=torch.float64), x.mean(0), rows.mean(-1)


class Counted(nn.Module):
    """Rows in the order of their experts, cut by how many each has; a sparse matrix adds them up."""

    def __init__(self):
        super().__init__()
        self.gate, self.weight = nn.Linear(6, 4), nn.Parameter(seeded(4, 6, 6))

    def forward(self, x, mask):
        rows = x[:, 0]
        ids = torch.where(mask, self.gate(rows).argmax(-1), 2)
        order = ids.argsort(stable=True)
        parts = rows[order].split(torch.bincount(ids, minlength=4).tolist())
        done = torch.cat([part @ weight for part, weight in zip(parts, self.weight, strict=True)])
        at = torch.where(mask)[0]
        combine = torch.sparse_coo_tensor(torch.stack([at, torch.arange(len(at))]), x[at, 0, 0], (len(rows), len(at)))
        return torch.zeros_like(rows).index_add(0, order, done), combine @ done[at]


SEQUENCES, IMAGES = seeded(4, 3, 6), seeded(4, 4, 5, 5)
CHOOSING = [(Sequences, SEQUENCES), (Images, IMAGES), (LeftEarly, IMAGES), (Means, SEQUENCES), (Counted, SEQUENCES)]


@pytest.mark.filterwarnings("ignore:.*degrees of freedom", "ignore:The tensor attributes")
@pytest.mark.parametrize(
    ("kind", "x", "backend"),
    [
        *[(kind, x, "onnxruntime") for kind, x in CHOOSING],
        *[
            pytest.param(kind, x, "torch", marks=() if kind in (Sequences, Counted) else pytest.mark.nightly)
            for kind, x in CHOOSING
        ],
    ],
)
@torch.no_grad()
def test_rows_that_data_choose_may_be_none(tmp_path, kind, x, backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = kind().eval()
    moeopt.optimize(model, (x, SOME), backend=backend, verify="off").save(tmp_path / "saved")
    loaded = moeopt.load(tmp_path / "saved")
    for mask in (SOME, ONE, NONE):
        for got, want in zip(loaded(x, mask), model(x, mask), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)
    if kind is Counted:  # a row that no entry reads stays by itself
        spoilt = x.clone()
        spoilt[3] = torch.nan
        for got, want in zip(loaded(spoilt, ONE), model(spoilt, ONE), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


class NormedPlaces(nn.Module):
    """PyTorch raises where this layer with a weight gets no rows."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(3, affine=True)

    def forward(self, x, mask):
        return self.norm(x[torch.where(mask)[0]])


@torch.no_grad()
def test_an_engine_stops_at_no_rows_where_the_model_does():
    pytest.importorskip("onnxruntime")
    model = NormedPlaces().eval()
    engine = moeopt.optimize(model, (SEQUENCES, SOME), backend="onnxruntime", verify="off")
    for mask in (SOME, ONE):
        torch.testing.assert_close(engine(SEQUENCES, mask), model(SEQUENCES, mask))
    with pytest.raises(IndexError):
        model(SEQUENCES, NONE)
    with pytest.raises(UsageError, match="the graph does not take"):
        engine(SEQUENCES, NONE)


class Transposed(Counted):
    def forward(self, x, mask):
        at = torch.where(mask)[0]
        entries = torch.sparse_coo_tensor(torch.stack([at, torch.arange(len(at))]), x[at, 0, 0], (len(x), len(at)))
        return entries.t() @ x[:, 0]


@torch.no_grad()
def test_another_use_of_a_sparse_matrix_is_refused(tmp_path):
    fast = moeopt.optimize(Transposed(), (SEQUENCES, SOME), verify="off")
    with pytest.raises(NotSaveableError, match="own code raised AttributeError: '_Entries' object has no"):
        fast.save(tmp_path / "transposed")
    forms = traced_form(torch.sparse_coo_tensor, (torch.zeros(2, 1).long(), torch.ones(1), (2, 2)), {})
    with pytest.raises(NotSaveableError, match="holds the product with a dense matrix of rows, and nothing else"):
        torch.mm(torch.ones(2, 2), forms)


class Layered(nn.Module):
    """What layers make of the features of each row: planes, places, norms, sums."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.GroupNorm(2, 12)
        self.mixed, self.wide = nn.Conv2d(2, 2, 3, padding=1), nn.ConvTranspose1d(3, 3, 2, stride=2)
        self.pair, self.table = nn.Bilinear(6, 6, 12), nn.Embedding(12, 12)

    def forward(self, x):
        h = self.norm(self.up(x))
        planes, places = h.view(-1, 2, 2, 3), h.view(-1, 3, 4)
        spread, mean = torch.var_mean(h, -1, keepdim=True)
        found = [
            F.avg_pool1d(places, 3, 1, 1), F.max_pool2d(planes, 3, 1, 1), F.adaptive_avg_pool2d(planes, (2, 3)),
            F.adaptive_max_pool1d(places, 2).repeat(1, 1, 2), F.fold(F.unfold(planes, 1), (2, 3), 1), h.cumsum(-1),
            F.pad(places, (1, 1), mode="reflect")[:, :, :4],
            F.interpolate(places, scale_factor=2, mode="linear")[:, :, ::2],
            self.mixed(planes), self.wide(places[:, :, ::2]), self.pair(h[:, :6], h[:, 6:]), self.table(h.argmax(-1)),
            torch.bmm(torch.bmm(places, places.transpose(1, 2)), places), h.roll(1, -1), (h - mean) / (spread + 1),
            places.logsumexp(-1).repeat(1, 4), places.prod(-1).repeat(1, 4), h.sort(-1)[0],
            F.normalize(h), h.softmax(-1),
        ]  # fmt: skip
        return self.down(sum(part.reshape(-1, 12) for part in found))


class Routed(nn.Module):
    """Experts that are graphs, each for the rows that chose it."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 3), nn.ModuleList(Layered() for _ in range(3))

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(ids == number)[0]
            y = y.index_add(0, rows, expert(x[rows]) * weights[rows, None])
        return y


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@torch.no_grad()
def test_an_expert_that_is_a_graph_may_have_no_rows():
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = Routed().eval()
    engine = moeopt.optimize(model, seeded(12, 8), backend="onnxruntime", verify="off")
    assert [block.status for block in engine.report.blocks] == ["rewritten"]
    for rows in (1, 12):
        torch.testing.assert_close(engine(seeded(rows, 8)), model(seeded(rows, 8)), rtol=1e-5, atol=1e-5)


class Loop(nn.Module):
    """Indices as Python numbers, one by one."""

    def forward(self, x):
        total = torch.zeros_like(x)
        for number in x[:, 0].topk(max(1, len(x) // 2))[1].tolist():
            total[number] += x[number]
        return total


@torch.no_grad()
def test_what_can_be_saved_is_said_wherever_the_export_stops(tmp_path):
    fast = moeopt.optimize(Loop(), seeded(4, 6), verify="off")
    with pytest.raises(NotSaveableError, match=r"What can be saved: the whole model with its code, torch\.save"):
        fast.save(tmp_path / "loop")
