"""Lines of docs/limits.md on changes that are not seen, on the model that was given, and on what verification tries."""

import copy
import math
import os
import pathlib
import pickle
import tempfile
import time
import types

import numpy as np
import pytest
import torch
from torch import nn

import moeopt
from tests.limits import limit, tested_in, told
from tests.limits.living import Reads, runs_the_original
from tests.toy_moe import Block, Expert, H, X, build, close, far, optimized, seeded


@limit("After `torch.compile`")
def after_compiling(_):
    for change in (
        lambda m: m.experts[1].register_forward_hook(lambda e, args, out: out * 2),
        lambda m: setattr(m.experts[1].act, "__class__", nn.ReLU),
    ):
        torch._dynamo.reset()
        model, opt = build(), optimized(build())
        compiled = torch.compile(opt.model, backend="eager")
        before, _ = told(lambda compiled=compiled: compiled(X))
        change(model), change(opt.model)
        (after, warned), (want, _) = told(lambda compiled=compiled: compiled(X)), told(lambda model=model: model(X))
        assert torch.equal(after, before) and not warned and far(want, before)


LIBRARY: dict = {}
exec(compile("def library(v, by=1.0):\n    return v * by", "/lib/site-packages/library.py", "exec"), LIBRARY)
library = LIBRARY["library"]


class Far(Block):
    """Reads what is not followed."""

    def __init__(self):
        super().__init__()
        self.cfg = types.SimpleNamespace(long=[1.5] * 2000)
        self.array = np.ones(1025, dtype=np.float32)
        self.large, self.chosen = {f"key {i}": float(i) for i in range(100)}, 7

    def loop(self, x, ids, w):
        w = w * math.sqrt(2.0) * library(self.cfg.long[1500]) * float(self.array[500])
        w = w * self.large[f"key {self.chosen}"] * torch.sigmoid(torch.tensor(1.0))
        return super().loop(x, ids, w)


def unseen(*changes):
    """Each change, made to the model and its optimised copy, is one that the copy does not tell of."""
    for change in changes:
        model, opt = build(Far), optimized(build(Far))
        before, _ = told(lambda opt=opt: opt(X))
        with pytest.MonkeyPatch.context() as patch:

            def both(model=model, opt=opt, change=change, patch=patch):
                for m in (model, opt.model):
                    change(m, patch)
                return told(lambda: (model(X), opt(X)))

            (want, got), warned = both()
        assert far(want, before) and torch.equal(got, before) and not warned


@limit("Replaced functions of PyTorch and Python")
def replaced_functions(_):
    unseen(
        lambda m, patch: patch.setattr(math, "sqrt", lambda v: 9.0),
        lambda m, patch: patch.setattr(torch, "sigmoid", torch.tan),
    )


class Outside(Block):
    """Asks whether a file is there, and for the time."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def loop(self, x, ids, w):
        return super().loop(x, ids, w * (1.0 + os.path.exists(self.file) + 2 * (time.monotonic() > 1e12)))


@limit("Clocks and files")
def clocks_and_files(_):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        file = pathlib.Path(folder) / "there"
        model = build(Outside, file=str(file))
        opt = optimized(model)
        before, _ = told(lambda: opt(X))
        for change in (file.touch, lambda: patch.setattr(time, "monotonic", lambda: 1e15)):  # as it will be one day
            change()
            (want, got), warned = told(lambda: (model(X), opt(X)))
            assert far(want, before) and torch.equal(got, before) and not warned


@limit("Large containers")
def large_containers(_):
    unseen(
        lambda m, patch: m.cfg.long.__setitem__(1500, 3.0),
        lambda m, patch: m.array.__setitem__(500, 3.0),
        lambda m, patch: m.large.__setitem__("key 7", 30.0),
    )


@limit("Functions of installed packages")
def installed_packages(_):
    unseen(
        lambda m, patch: patch.setattr(library, "__code__", (lambda v, by=1.0: 9.0).__code__),
        lambda m, patch: patch.setattr(library, "__defaults__", (9.0,)),
    )
    with pytest.MonkeyPatch.context() as patch:
        runs_the_original(Far, lambda m: patch.setitem(globals(), "library", lambda v: v * 3), "library")


# -- the model that was given -------------------------------------------------------------------------


@limit("Values")
def shared_values(_):
    model = build()
    opt = optimized(model)
    before, _ = told(lambda: opt(X))
    with torch.no_grad():
        model.experts[0].w1.weight.mul_(3)
    (got, warned), (want, _) = told(lambda: opt(X)), told(lambda: model(X))
    close(got, want)
    assert far(got, before) and not warned


@limit("Anything else")
def source(_):
    for change in (
        lambda m: setattr(m.gate, "weight", nn.Parameter(seeded(4, H))),
        lambda m: m.experts.__setitem__(2, Expert()),
        lambda m: m.gate.register_forward_hook(lambda m, args, out: -out),
        lambda m: setattr(m.cfg, "scale", 5.0),
    ):
        model = build(Reads)
        opt = optimized(model)
        before, _ = told(lambda opt=opt: opt(X))
        change(model)
        got, warned = told(lambda opt=opt: [opt(X) for _ in range(40)])
        assert all(torch.equal(y, before) for y in got) and len(warned) == 1
        assert "the Reads that was optimised has changed since" in warned[0]


@limit("Copies and pickles")
def copies(_):
    model = build()
    opt = optimized(model)
    before, _ = told(lambda: opt(X))
    twins = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    with torch.no_grad():
        model.experts[0].w1.weight.mul_(3)
    model.top_k = 1
    for twin in twins:
        got, warned = told(lambda twin=twin: [twin(X) for _ in range(40)])
        assert all(torch.equal(y, before) for y in got) and not warned


# -- verification -------------------------------------------------------------------------------------


@limit("It measures the cases that the certificate lists")
def measured(_):
    for level, cases in (("off", 0), ("fast", 3)):
        certificate = moeopt.optimize(build(), X, verify=level).certificate
        listed = [case for block in certificate.blocks for case in block.cases]
        assert len(listed) >= cases and (certificate.passed is None) == (not listed)


class Padding(Block):
    """Token ids in; rows of the padding id go to the experts as zeros."""

    def __init__(self, padding):
        super().__init__()
        self.embed, self.padding = nn.Embedding(30, H), padding

    def forward(self, ids):
        rows = self.embed(ids).reshape(-1, H)
        chosen, w = self.route(rows)
        return self.loop(rows * (ids != self.padding).reshape(-1, 1), chosen, w).view(*ids.shape, H)


@limit("Values that neither the example nor a zero reaches")
def padding_id(_):
    ids = torch.arange(8, 30).view(2, 11)
    padded = torch.where(ids == 9, 7, ids)
    model = build(Padding, padding=7)
    opt = optimized(model, ids, verify="strict")
    assert far(opt(padded), model(padded))
    for made, given in ((model, padded), (build(Padding, padding=0), ids)):  # the example or a zero reaches it
        opt = moeopt.optimize(made, given)
        for x in (ids, padded, ids - 8):
            close(opt(x), made(x))


class Longer(Block):
    side = 26

    def forward(self, x):
        y = super().forward(x)
        return y * 2 if y.shape[0] * y.shape[1] > sum([self.side] * self.side) else y


@limit("Long calls")
def long_calls(_):
    (block,) = optimized(build(), verify="strict").certificate.blocks
    assert max(case.tokens for case in block.cases) == 521
    for x in (X, seeded(1, 700, H)):  # what more tokens decide is found by how the code computes with their number
        (block,) = moeopt.optimize(build(Longer), x).report.blocks
        assert block.status == "declined" and block.reason


tested_in("Long calls", "test_a_large_block_is_not_asked_for_many_tokens")


@limit("The mode")
def mode(_):
    model = build(dropout=0.5).train()
    (block,) = moeopt.optimize(model, X, verify="fast").report.blocks
    assert block.status == "declined" and "call model.eval() before optimising" in block.reason
