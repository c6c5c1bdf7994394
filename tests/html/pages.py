"""A report, a certificate and a load profile with every kind of entry, hostile texts among them."""

import functools

import torch

from moeopt.profiling.result import LoadProfile, Unread, layer_load
from moeopt.profiling.tally import Tally
from moeopt.report import BlockReport, Report
from moeopt.verification.certificate import Certificate
from moeopt.verification.model import EndToEnd
from moeopt.verification.results import BlockCheck, CaseResult

HOSTILE = 'layers.<script>alert("1")</script>&amp;.mlp'
REASON = '</script><img src=http://evil.example/x onerror=alert(2)> it\'s "odd"'
GRAPH = {
    "block": HOSTILE,
    "experts": 512,
    "top_k": 2,
    "function": "plain gelu " * 9,
    "captured": {"calls": 900, "router": 5, "dispatch": 6, "dispatch_names": ["index", HOSTILE], "branches": 512,
                 "branch": ["addmm", "gelu", "addmm"] * 4},
    "rewritten": ["reshape", f"{HOSTILE} (Linear)", *["mul"] * 20, "moeopt::experts", "reshape"],
}  # fmt: skip


def certificate():
    cases = [
        CaseResult("one token", tokens=1, distance_original=1e-7, distance_rewritten=2e-7, distance_exact=0.0,
                   required=0.25, ids_compared=8, ties=1),
        CaseResult("broken", "failed", REASON, distance_original=0.0, distance_rewritten=float("inf"),
                   required=float("inf"), flips=2, notes=["a note"]),
    ]  # fmt: skip
    checks = [
        BlockCheck(HOSTILE, False, cases, REASON, "float32"),
        BlockCheck("layers.1.mlp", True, cases[:1], dtype="float32"),
        BlockCheck("layers.2.mlp", None),
    ]
    end = EndToEnd(True, tokens=9, distance=1e-6, budget=4e-6, language={"KL divergence, max": 1e-9}, notes=["end"])
    return Certificate(checks, end, executed=False, dtype="float32", notes=[REASON])


@functools.cache
def report():
    blocks = (
        BlockReport(HOSTILE, "moe", "rewritten", experts=512, top_k=2, router="softmax", lowering="moeopt::experts",
                    error=float("inf"), source="<b>.py:1"),
        *(BlockReport(f"layers.{i}.mlp", "moe", "rewritten", experts=8, lowering="moeopt::experts", error=(i + 1) / 1e7)
          for i in range(3)),
        BlockReport("ffn", "dense_ffn", "declined", REASON, nearest="none", source=HOSTILE),
    )  # fmt: skip
    return Report(blocks, "Toy<i>", "torch", 1.5, (REASON,), GRAPH, certificate())


def load(layers=2, experts=8, tokens=64):
    generator = torch.Generator().manual_seed(0)
    tallies = []
    for i in range(layers):
        tallies.append(Tally(f"layers.{i}.mlp" if i else HOSTILE, experts))
        weights, ids = (torch.randn(tokens, experts, generator=generator) * 2).softmax(-1).topk(min(4, experts))
        tallies[-1].add(ids, weights)
    tallies.append(Tally("idle", experts))
    tallies[-1].unseen, tallies[-1].why_unseen = 2, REASON
    cost = tallies[0].cost
    cost.calls, cost.tokens, cost.observed, cost.balanced, cost.noise = 1, tokens, 0.003, 0.002, 0.1
    return LoadProfile(
        "Toy<i>", 3, tuple(map(layer_load, tallies)), (Unread("odd", REASON, "x.py:1"),), notes=(REASON,)
    )
