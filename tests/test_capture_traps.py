"""Ways of writing a forward that mislead a trace: each is reproduced, or declined with the reason."""

import copy
import warnings

import pytest
import torch
from torch import nn

import moeopt
from moeopt.errors import CaptureError, UsageError
from tests.toy_moe import Block, E, H, X, build, close, optimized, seeded


def outcome(model, x=X):
    """(status, reason) of the model's one MoE block; the model must be right on fresh inputs either way."""
    opt = moeopt.optimize(model, x, verify="fast")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for seed in range(3):
            y = seeded(3, 5 + seed, H, seed=seed)
            close(opt(y), model(y))
    moe = [b for b in opt.report.blocks if b.kind == "moe"]
    assert len(moe) == 1, str(opt.report)
    assert bool(moe[0].reason) == (moe[0].status == "declined")
    return moe[0].status, moe[0].reason


def sorted_rows(block, x):
    ids, w = block.route(x)
    order = ids.flatten().argsort(stable=True)
    return ids, w, order, x[order // ids.shape[1]]


class ByTolist(Block):
    """Counts read with .tolist(), which records nothing."""

    read = staticmethod(lambda counts: counts.tolist())

    def forward(self, x):
        rows = x.reshape(-1, H)
        ids, w, order, moved = sorted_rows(self, rows)
        counts = self.read(torch.bincount(ids.flatten(), minlength=E))
        start, parts = 0, []
        for e, count in enumerate(counts):
            if count:
                parts.append(self.experts[e](moved[start : start + int(count)]))
            start += int(count)
        out = torch.empty_like(moved)
        out[order] = torch.cat(parts) if parts else moved
        return (out.view(*ids.shape, H) * w.unsqueeze(-1)).sum(1).view(x.shape)


class ByItem(ByTolist):
    read = staticmethod(lambda counts: [c.item() for c in counts])


class ByNumpy(ByTolist):
    read = staticmethod(lambda counts: counts.numpy())


class ByDataNumpy(ByTolist):
    read = staticmethod(lambda counts: counts.detach().cpu().numpy().tolist())


@pytest.mark.parametrize("cls", [ByTolist, ByItem, ByNumpy, ByDataNumpy], ids=lambda c: c.__name__)
def test_counts_read_into_python(cls):
    assert outcome(build(cls)) == ("rewritten", "")


class ValueFromNumpy(Block):
    """A tensor made of the input's values outside PyTorch."""

    def forward(self, x):
        shift = torch.from_numpy(x.detach().numpy().mean(-1, keepdims=True).copy())
        return super().forward(x) + shift


class ValueFromItem(Block):
    def forward(self, x):
        return super().forward(x) * float(x.abs().amax().item())


class BranchOnValue(Block):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if float(x.sum()) > 0 else y


class CapacityFromData(Block):
    """The busiest expert's count is how many tokens the others may take."""

    def forward(self, x):
        rows = x.reshape(-1, H)
        ids, w = self.route(rows)
        limit = int(torch.bincount(ids.flatten(), minlength=E).max()) - 2
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            token, slot = token[:limit], slot[:limit]
            y.index_add_(0, token, expert(rows[token]) * w[token, slot, None])
        return y.view(x.shape)


@pytest.mark.parametrize(
    "cls", [ValueFromNumpy, ValueFromItem, BranchOnValue, CapacityFromData], ids=lambda c: c.__name__
)
def test_values_read_into_python_are_declined_or_right(cls):
    status, reason = outcome(build(cls))
    assert status == "declined" and len(reason.split()) > 5, (status, reason)


class Views(Block):
    """In-place work on views of the result."""

    def forward(self, x):
        rows = x.reshape(-1, H)
        ids, w = self.route(rows)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y.index_add_(0, token, expert(rows[token]).mul_(w[token, slot, None]))
        y.view(-1)[::2].mul_(1.0).add_(0.0)
        y[:, : H // 2].mul_(2.0)
        y.t()[0].neg_()
        return y.view(x.shape)


def test_views_and_in_place_calls():
    assert outcome(build(Views)) == ("rewritten", "")


class LosingDuplicates(Block):
    """Both slots may name one expert; ``y[token] += v`` then keeps the last write only."""

    def forward(self, x):
        rows = x.reshape(-1, H)
        ids, w = self.route(rows)
        ids = torch.stack([ids[:, 0], torch.where(w[:, 1] > 0.45, ids[:, 0], ids[:, 1])], 1)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y[token] += expert(rows[token]) * w[token, slot, None]
        return y.view(x.shape)


def test_lost_duplicates_are_not_fixed():
    status, reason = outcome(build(LosingDuplicates), seeded(4, 16, H))
    assert status == "rewritten" or reason


class PlainTensor(Block):
    """A tensor attribute that is neither Parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.scale = torch.full((H,), 1.5)

    def forward(self, x):
        return super().forward(x * self.scale)


def test_an_unregistered_tensor_attribute_is_read_live():
    model = build(PlainTensor)
    opt = optimized(model)
    close(opt(X), model(X))
    opt.model.scale = model.scale = torch.full((H,), -0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(opt(X), model(X))


def test_inference_mode_and_no_grad_read_alike():
    model = build()
    with torch.inference_mode():
        inside = optimized(model)
    assert str(inside.report.blocks[0].spec) == str(optimized(model).report.blocks[0].spec)
    close(inside(X), model(X))
    with torch.enable_grad():
        assert inside(X.clone().requires_grad_()).requires_grad


# -- the model that was given is left as it was ------------------------------------------------------


class Busy(Block):
    """Mutates a buffer and an attribute, draws random numbers it does not use, flips its own flag."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(E))
        self.seen = []
        self.last = None

    def forward(self, x):
        rows = x.reshape(-1, H)
        ids, w = self.route(rows)
        self.count += torch.bincount(ids.flatten(), minlength=E)
        self.last = ids
        self.seen.append(1)
        torch.rand(3)
        return self.loop(rows, ids, w).view(x.shape)


class Counts(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(E))

    def forward(self, x):
        rows = x.reshape(-1, H)
        ids, w = self.route(rows)
        self.count += torch.bincount(ids.flatten(), minlength=E)
        return self.loop(rows, ids, w).view(x.shape)


class Remembers(Counts):
    def forward(self, x):
        y = super().forward(x)
        self.last = y.mean()
        return y


def snapshot(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [(n, list(m.__dict__), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), id(m._modules))
         for n, m in model.named_modules()],
        [(n, id(p), p.requires_grad, p._version if n == "" else 0) for n, p in model.named_parameters()],
        torch.get_rng_state(),
        nn.Module.__call__,
    )  # fmt: skip


@pytest.mark.parametrize("cls", [Block, Counts, Busy, Remembers], ids=lambda c: c.__name__)
@pytest.mark.parametrize("what", ["optimize", "explain"])
def test_the_given_model_is_left_as_it_was(cls, what):
    model, x = build(cls), X.clone()
    before = snapshot(model)
    getattr(moeopt, what)(model, x, verify="fast")
    after = snapshot(model)
    assert before[0].keys() == after[0].keys()
    assert [k for k in before[0] if not torch.equal(before[0][k], after[0][k])] == []
    assert before[1:3] == after[1:3] and torch.equal(before[3], after[3]) and before[4] is after[4]
    assert torch.equal(x, X) and (not hasattr(model, "seen") or model.seen == [])


def test_buffers_and_attributes_go_on_being_written():
    ref, opt = build(Counts), optimized(build(Counts))
    opt.model.count.zero_()
    for i in range(3):
        x = seeded(2, 5 + i, H, seed=i)
        with torch.no_grad():
            close(opt(x), ref(x))
    assert torch.equal(opt.model.count, ref.count) and ref.count.sum() > 0


def test_an_input_that_is_written_to():
    class Scales(Block):
        def forward(self, x):
            x.mul_(2.0)
            return super().forward(x)

    model, x = build(Scales), X.clone()
    opt = moeopt.optimize(model, x, verify="fast")
    assert torch.equal(x, X)
    a, b = X.clone(), X.clone()
    with torch.no_grad():
        close(opt(a), model(b))
    assert torch.equal(a, b)


# -- what a model may be ------------------------------------------------------------------------------


class Dense(nn.Module):
    """Exportable: every expert on every token."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.w1, self.w2 = nn.Parameter(torch.randn(E, H, H) / 4), nn.Parameter(torch.randn(E, H, H) / 4)

    def forward(self, x):
        rows = x.reshape(-1, H)
        w, ids = torch.topk(torch.softmax(self.gate(rows), -1), 2, -1)
        weights = torch.zeros(rows.shape[0], E).scatter_(1, ids, w)
        y = torch.bmm(torch.relu(torch.bmm(rows.expand(E, -1, H), self.w1)), self.w2)
        return (y * weights.t()[..., None]).sum(0).view(x.shape)


@pytest.mark.parametrize("form", ["GraphModule", "ExportedProgram"])
def test_graphs_are_accepted(form):
    model = build(Dense)
    sizes = ({0: torch.export.Dim("b", min=1), 1: torch.export.Dim("s", min=1)},)
    program = torch.export.export(model, (X,), dynamic_shapes=sizes)
    opt = moeopt.optimize(program if form == "ExportedProgram" else program.module(), X, verify="fast")
    (block,) = [b for b in opt.report.blocks if b.kind == "moe"]
    assert bool(block.reason) == (block.status == "declined")
    assert block.status == "rewritten", block.reason
    with torch.no_grad():
        close(opt(X), model(X))
        close(opt(X[:, :3]), model(X[:, :3]))


def test_a_shallow_copy_with_a_patched_forward_is_refused():
    """accelerate's way: the copy's forward still calls the original's children."""
    model = build()
    original = model.forward

    def patched(*args, **kwargs):
        return original(*args, **kwargs)

    twin = copy.copy(model)
    twin.forward = patched
    with pytest.raises(UsageError, match="forward of Block was replaced by a function that holds on to the original"):
        model.forward = patched
        moeopt.optimize(model, X)
    opt = moeopt.optimize(twin, X, verify="fast")
    assert all(b.status == "declined" for b in opt.report.blocks)
    close(opt(X), twin(X))


def test_meta_parameters_do_not_pass_silently():
    whole = Block().eval().to("meta")
    for model in (whole, build()):
        model.experts[1].to("meta")
        try:
            opt = moeopt.optimize(model, X.to(model.gate.weight.device), verify="fast")
        except CaptureError as err:
            assert "check that it runs on these inputs" in str(err)
        else:
            assert all(b.status == "declined" and b.reason for b in opt.report.blocks)


def test_a_model_that_raises():
    class Raises(Block):
        def forward(self, x):
            raise KeyError("no such thing")

    model = build(Raises)
    call = nn.Module.__call__
    with pytest.raises(CaptureError, match="Raises raised KeyError: 'no such thing'; check that it runs"):
        moeopt.optimize(model, X)
    assert nn.Module.__call__ is call


def test_noise_at_inference_is_declined():
    class Noisy(Block):
        def route(self, x):
            return super().route(x + 0.1 * torch.randn_like(x))

    opt = moeopt.optimize(build(Noisy), X, verify="fast")
    (block,) = [b for b in opt.report.blocks if b.kind == "moe"]
    assert block.status == "declined" and "random at inference" in block.reason and "randn" in block.reason


def test_a_fresh_model_is_in_training_mode():
    class NoisyTraining(Block):
        def route(self, x):
            return super().route(x + 0.1 * torch.randn_like(x) if self.training else x)

    torch.manual_seed(0)
    quiet, noisy = Block(), NoisyTraining()
    assert quiet.training and moeopt.optimize(quiet, X, verify="fast").report.blocks[0].status == "rewritten"
    reason = moeopt.optimize(noisy, X, verify="fast").report.blocks[0].reason
    assert "random in training mode" in reason and "model.eval()" in reason
    dropout = moeopt.optimize(Block(dropout=0.5), X, verify="fast").report.blocks[0]
    assert dropout.status == "declined" and dropout.reason
