"""Row functions damaged on purpose: verification must catch each, in PyTorch and on ONNX Runtime, and tell it."""

import dataclasses
import json

import pytest
import torch

import moeopt
from moeopt.pipeline import coverage
from tests.helpers import assert_same, run
from tests.zoo import CASES


def slots(change):
    """A damage to the experts' slots; ``change(all)`` gets a list of lists of regions."""

    def damage(found):
        refs = change([list(ref.slots) for ref in found.experts])
        experts = [dataclasses.replace(ref, slots=tuple(s)) for ref, s in zip(found.experts, refs, strict=True)]
        return dataclasses.replace(found, experts=experts)

    return damage


def swap(*which):
    """Experts 0 and 1 swap the slots numbered ``which``."""

    def change(refs):
        for p in which:
            refs[0][p], refs[1][p] = refs[1][p], refs[0][p]
        return refs

    return slots(change)


def graph(change):
    """A damage to the function, the same for all experts: ``change`` edits the graph's nodes in place."""

    def damage(found):
        data = json.loads(found.spec.graph)
        change(data["nodes"])
        return dataclasses.replace(found, spec=dataclasses.replace(found.spec, graph=json.dumps(data)))

    return damage


def first(nodes, name):
    return next(n for n in nodes if n[0].startswith(f"aten.{name}."))


def without_scale(nodes):
    first(nodes, "mul")[1][1] = 1.0


def other_epsilon(nodes):
    first(nodes, "native_layer_norm")[1][4] = 1e-1


def other_activation(nodes):
    first(nodes, "gelu")[2]["approximate"] = "tanh"


def other_slope(nodes):
    first(nodes, "sin")[0] = "aten.tanh.default"


DAMAGES = {
    "two experts swap their norms": ("row_norm_inside", swap(2, 3)),
    "two experts swap one bias": ("row_norm_inside", swap(1)),
    "the norm's weight is its bias": ("row_norm_inside", slots(lambda r: [[*s[:2], s[3], s[2], *s[4:]] for s in r])),
    "an epsilon where it matters": ("row_norm_inside", graph(other_epsilon)),
    "gelu in its tanh form": ("row_norm_inside", graph(other_activation)),
    "an adapter loses its scale": ("row_adapters", graph(without_scale)),
    "two experts swap an adapter": ("row_adapters", swap(1)),
    "one expert twice": ("row_three_layers", slots(lambda r: [r[1], *r[1:]])),
    "two experts swap a middle layer": ("row_three_layers", swap(2, 3)),
    "another activation": ("row_sine", graph(other_slope)),
    "two experts swap their running mean": ("row_batch_norm_in_eval", swap(4)),
}


def damaged(monkeypatch, damage):
    """Later probes are read with what the first one showed, undamaged."""
    recognize, first_found = coverage.recognize, []

    def wrong(tape, known=None, **options):
        found = recognize(tape, None if known is None else first_found[0], **options)
        first_found.append(found)
        return [damage(f) for f in found]

    monkeypatch.setattr(coverage, "recognize", wrong)


STRICT = ("two experts swap their norms",)
"""Strict verification does all that the fast one does, and more: one damage shows that on every day."""


@pytest.mark.parametrize(
    ("name", "level"),
    [(name, "fast") for name in DAMAGES]
    + [pytest.param(name, "strict", marks=() if name in STRICT else pytest.mark.nightly) for name in DAMAGES],
)
def test_damage_is_caught(name, level, monkeypatch):
    case, damage = CASES[DAMAGES[name][0]], DAMAGES[name][1]
    model = case.build()
    damaged(monkeypatch, damage)
    opt = moeopt.optimize(model, case.inputs()[0], verify=level)
    (block,) = [b for b in opt.report.blocks if b.kind == "moe"]
    assert block.status == "declined" and "verified and reverted" in block.reason, block.reason
    assert_same(run(opt, case.fresh(1)), run(case.build(), case.fresh(1)), exact=True)


def test_damage_of_the_onnx_form_is_caught(monkeypatch):
    """The block is judged as ONNX Runtime computes it: with two experts' weights swapped there, no form is left."""
    pytest.importorskip("onnxruntime")
    from moeopt.lower.onnx.lowerings import row_graph

    honest = row_graph.RowGraph.expert
    monkeypatch.setattr(row_graph.RowGraph, "expert", lambda self, e, rows: honest(self, {0: 1, 1: 0}.get(e, e), rows))
    case = CASES["row_norm_inside"]
    opt = moeopt.optimize(case.build(), case.inputs()[0], backend="onnxruntime")
    (block,) = [b for b in opt.report.blocks if b.kind == "moe"]
    assert block.status == "declined" and "verified and reverted" in block.reason, block.reason
    assert_same(run(opt, case.fresh(1)), run(case.build(), case.fresh(1)))  # its own code, as a graph


def test_a_weight_of_one_expert_alone_moves_only_its_tokens():
    case = CASES["row_adapters"]
    model = case.build()
    opt = moeopt.optimize(model, case.inputs()[0])
    (x,), _ = case.fresh(3)
    for e in (0, 5):
        with torch.no_grad():
            for parameter in model.experts[e].parameters():
                parameter.mul_(1.5)
        assert_same(opt(x), model(x))
