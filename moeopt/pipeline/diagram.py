"""A rewritten block as a picture shows it: what was captured, and what runs now, in names and counts.

Everything is read off the probe call that the rewrite came from: the calls that lead to the experts' sum, those of them
that choose (router), those of the experts themselves, and the rest (dispatch). ``detach`` computes nothing and is
left out.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx, nn

from moeopt.capture.op_kinds import op_name
from moeopt.pipeline.block import Rewrite
from moeopt.recognise.recognition import Recognition
from moeopt.rewrite.block_graph import CONSTANT, EXPERTS

_QUIET = ("detach", "getitem")
NAMES = 4
"""Kinds of dispatch calls that are named."""


def block_diagram(name: str, rewrite: Rewrite, module: nn.Module) -> dict[str, Any]:
    """Plain values: ``block``, ``experts``, ``top_k``, ``captured`` (counts and names) and ``rewritten`` (steps)."""
    found = rewrite.found[0]
    return {
        "block": name,
        "experts": len(found.experts),
        "top_k": found.routing.per_token,
        "function": str(found.spec),
        "captured": _captured(found),
        "rewritten": _steps(rewrite, module),
    }


def _captured(recognition: Recognition) -> dict[str, Any]:
    sources = [*recognition.routing.weights.nodes, *(recognition.routing.ids.nodes if recognition.routing.ids else [])]
    before = _leading_to([recognition.combine.node])
    router = _leading_to(sources)
    inside = [n for n in _ordered(recognition.interior) if n in before]
    dispatch = [n for n in _ordered(before) if n not in router and n not in recognition.interior]
    names = [op_name(n) for n in inside]
    period = _period(names)
    return {
        "calls": len(_ordered(before)),
        "router": len(_ordered(router)),
        "dispatch": len(dispatch),
        "dispatch_names": [op for op, _ in Counter(op_name(n) for n in dispatch).most_common(NAMES)],
        "branches": -(-len(names) // period) if names else 0,
        "branch": names[:period],
    }


def _leading_to(ends: list[fx.Node]) -> set[fx.Node]:
    """The nodes that ``ends`` are computed from, themselves included."""
    seen, stack = set(ends), list(ends)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return seen


def _ordered(nodes: set[fx.Node]) -> list[fx.Node]:
    calls = [n for n in nodes if n.op == "call_function" and op_name(n) not in _QUIET]
    return sorted(calls, key=lambda n: n.meta["index"])


def _period(names: list[str]) -> int:
    """The length of the shortest beginning that repeats until the end; the last repeat may break off."""
    return next((p for p in range(1, len(names)) if names[p:] == names[: len(names) - p]), len(names))


def _steps(rewrite: Rewrite, module: nn.Module) -> list[str]:
    """What runs now by name, in order."""
    told = []
    for node in rewrite.program.block.graph.nodes:
        if node.op == "call_module":
            told.append(f"{node.target} ({type(module.get_submodule(str(node.target))).__name__})")
        elif node.target is EXPERTS:
            told.append("moeopt::experts")
        elif node.op == "call_function" and node.meta.get("source") is not None:  # sizes and constants have no source
            word = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", None)
            if node.target is not CONSTANT and word not in _QUIET:
                told.append(str(word or node.target))
    return told
