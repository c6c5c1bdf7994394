"""The model that was optimised changes afterwards: its optimised copy follows, or says so once."""

import copy
import gc
import pickle
import re
import types
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import moeopt
from moeopt.errors import StaleModelWarning
from tests.toy_moe import Block, Expert, H, X, build, close, far, optimized, seeded


class Configured(Block):
    def __init__(self):
        super().__init__()
        self.cfg = types.SimpleNamespace(moe={"scale": 1.5, "parts": [1.0, 2.0]}, unread=0)

    def loop(self, x, ids, w):
        return super().loop(x, ids, w * self.cfg.moe["scale"] * self.cfg.moe["parts"][1])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(H), Configured()
        self.register_buffer("shift", torch.ones(H))

    def forward(self, x):
        return self.moe(self.norm(x) + self.shift)


def twice(module, args, out):
    return out * 2


class Negative(nn.Module):
    def forward(self, w):
        return -w


def assign(m):
    m.load_state_dict({k: seeded(*v.shape, seed=i) for i, (k, v) in enumerate(m.state_dict().items())}, assign=True)


TOLD = {
    "load_state_dict with assign": (assign, "shift of the model itself and"),
    "hook on an expert": (lambda m: m.moe.experts[1].register_forward_hook(twice), "hooks of moe.experts.1"),
    "hook on the router": (lambda m: m.moe.gate.register_forward_hook(twice), "hooks of moe.gate"),
    "hook outside the block": (lambda m: m.norm.register_forward_hook(twice), "hooks of norm"),
    "pre-hook on the model": (
        lambda m: m.register_forward_pre_hook(lambda m, a: (-a[0],)),
        "hooks of the model itself",
    ),
    "parametrize": (lambda m: parametrize.register_parametrization(m.moe.experts[0].w1, "weight", Negative()), "w1"),
    "prune": (lambda m: prune.l1_unstructured(m.moe.experts[0].w2, "weight", 0.5), "moe.experts.0.w2"),
    "expert replaced": (lambda m: m.moe.experts.__setitem__(2, Expert()), "2 of moe.experts"),
    "norm replaced": (lambda m: setattr(m, "norm", nn.Identity()), "norm of the model itself"),
    "module added": (lambda m: m.moe.experts.append(Expert()), "contents of moe.experts"),
    "Parameter replaced": (lambda m: setattr(m.moe.gate, "weight", nn.Parameter(seeded(4, H))), "weight of moe.gate"),
    "buffer replaced": (lambda m: setattr(m, "shift", torch.zeros(H)), "shift of the model itself"),
    "top_k": (lambda m: setattr(m.moe, "top_k", 1), "top_k of moe"),
    "configuration": (lambda m: m.moe.cfg.moe.update(scale=3.0), r"cfg.moe\['scale'\] of moe"),
    "list in a configuration": (lambda m: m.moe.cfg.moe["parts"].append(1.0), r"cfg.moe\['parts'\] of moe"),
    "configuration replaced": (
        lambda m: setattr(m.moe, "cfg", types.SimpleNamespace(moe={"scale": 1.0, "parts": [1.0, 2.0]})),
        "cfg.moe",
    ),
    "class": (
        lambda m: setattr(m.moe.experts[1].act, "__class__", nn.ReLU),
        "contents of moe.experts.1.act",
    ),
    "forward of an expert": (
        lambda m: setattr(m.moe.experts[1], "forward", lambda x: x),
        "code or the contents of moe.experts.1",
    ),
}


TABLES = {
    f"{table} of {path} replaced whole": (
        lambda m, table=table, path=path, new=new: setattr(
            m.get_submodule(path), table, dict(getattr(m.get_submodule(path), table), **new)
        ),
        f"code or the contents of {path}",
    )
    for table, path, new in (
        ("_modules", "moe.experts", {"1": Expert()}),
        ("_modules", "moe.experts.2", {"act": nn.ReLU()}),
        ("_parameters", "moe.gate", {"weight": nn.Parameter(seeded(4, H))}),
    )
}
TOLD |= TABLES
LATER = {"class", "forward of an expert", "module added", *TABLES}
SOME = 40
"""Calls: each compares one part of the classes and contents of the source's modules."""


def stale(told):
    return [str(w.message) for w in told if w.category is StaleModelWarning]


def calls(opt, count):
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        results = [opt(X) for _ in range(count)]
    return results, stale(told)


@pytest.mark.parametrize("name", TOLD)
def test_a_change_of_the_source_is_told_once(name):
    change, text = TOLD[name]
    model = build(Model)
    opt = optimized(model)
    (before,), told = calls(opt, 1)
    assert not told
    change(model)
    soon, told = calls(opt, 1)
    assert told or name in LATER, "at the next call"
    results, more = calls(opt, SOME)
    told += more
    assert told and all("the Model that was optimised has changed since" in line for line in told)
    assert all("on the optimised model's .model, or run moeopt.optimize again" in line for line in told)
    assert re.search(text, " ".join(told)), told
    assert not calls(opt, SOME)[1], "each change is told once"
    assert all(torch.equal(r, before) for r in soon + results) and not opt.model.moe.forward.fallbacks
    copies = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    assert not any(calls(one, SOME)[1] for one in copies), "a copy has its own weights"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.train().eval(),
        lambda m: m.requires_grad_(False),
        lambda m: setattr(m.moe.cfg, "unread", 5),
        lambda m: setattr(m.moe.cfg, "new", 5),
        lambda m: m(X),
        lambda m: m.moe.gate.register_forward_hook(twice).remove(),
        lambda m: setattr(m.moe, "top_k", int("2")),
        lambda m: m.moe.cfg.moe.update(scale=float("1.5")),
    ],
    ids=["train", "frozen", "unread", "new field", "call", "hook removed", "same number", "same float"],
)
def test_what_does_not_matter_is_not_told(change):
    model = build(Model)
    opt = optimized(model)
    change(model), change(opt.model)
    results, told = calls(opt, 6)
    assert not told and not opt.model.moe.forward.fallbacks
    with torch.no_grad():
        close(results[0], model(X))


def test_values_written_to_the_source_show():
    model = build(Model)
    opt = optimized(model)
    (before,), _ = calls(opt, 1)
    with torch.no_grad():
        model.moe.experts[0].w1.weight.mul_(3)
        model.shift.add_(1)
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})
    (got,), told = calls(opt, 1)
    with torch.no_grad():
        close(got, model(X))
    assert far(got, before) and not told and not opt.model.moe.forward.fallbacks


def test_a_change_of_both_is_not_told():
    model = build(Model)
    opt = optimized(model)
    for m in (model, opt.model):
        m.norm.register_forward_hook(twice)
    (got, *_), told = calls(opt, 6)
    with torch.no_grad():
        close(got, model(X))
    assert not told


def test_the_source_may_go():
    model = build(Model)
    opt = optimized(model)
    (before,), _ = calls(opt, 1)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    (got,), told = calls(opt, 1)
    assert torch.equal(got, before) and not told and not opt.model.moe.forward.fallbacks


def test_a_converted_copy_tells_of_written_values():
    model = build(Model)
    opt = moeopt.optimize(model, X, dtype=torch.float64, verify="fast")
    x = X.double()
    with torch.no_grad():
        opt(x)
        model.moe.gate.weight.mul_(2)
        with pytest.warns(StaleModelWarning, match="the values of weight of moe.gate"):
            for _ in range(4):
                opt(x)


def test_in_place_there_is_no_copy_to_tell():
    model = build(Model)
    opt = optimized(model, inplace=True)
    model.norm.register_forward_hook(twice)
    _, told = calls(opt, 4)
    assert not told
