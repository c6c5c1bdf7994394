"""The experts of a model while it is traced for ONNX: one ``moeopt::Experts`` node a call, and what it stands for."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn

from moeopt.ir.specs import ExpertsSpec
from moeopt.lower.onnx.experts_node import DOMAIN, OP, ExpertsNode
from moeopt.lower.onnx.pad_experts import bank_of
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.reference import dtypes, out_features
from moeopt.rewrite.install import rewritten_forward
from moeopt.value_types import FxArg


class Sites(list[ExpertsNode]):
    """The sites of one trace; the attribute ``site`` of a node is the index of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        found = ((path, rewritten_forward(module)) for path, module in model.named_modules())
        self._forwards = {path: forward for path, forward in found if forward is not None}
        self._places = {
            id(bank): (path, number)
            for path, forward in self._forwards.items()
            for number, (bank, _) in enumerate(forward.banks)
        }
        self.start()

    def start(self) -> None:
        """Forget the sites of a trace that begins again."""
        self.clear()
        self._taken: Counter[str] = Counter()
        self._place_of_site: list[tuple[str, int]] = []

    def emit(self, x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> Tensor | None:
        """A node instead of a call of ``experts``; None where ``bank`` is of no block of the model."""
        if id(bank) not in self._places:
            return None
        torch._check(ids.shape[0] == x.shape[0])  # a runtime would broadcast the choices of a single row
        number = self._add(self._places[id(bank)], x.dtype, int(ids.shape[1]), weights.dtype)
        y: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OP}",
            (x, ids.to(torch.int64), weights),
            {"site": number},
            dtype=dtypes(x, spec)[2],
            shape=(x.shape[0], out_features(bank, spec)),
            version=1,
        )
        return y

    def _add(self, place: tuple[str, int], dtype: torch.dtype, top_k: int, weights_dtype: torch.dtype) -> int:
        path, number = place
        forward = self._forwards[path]
        (bank, spec), router = forward.banks[number], forward.program.routers[number]
        self._taken[path] += 1
        name = (path or "experts") + (f"#{self._taken[path]}" if self._taken[path] > 1 else "")
        self.append(ExpertsNode(name, bank_of(bank, spec), spec, dtype, top_k, weights_dtype, router))
        self._place_of_site.append(place)
        return len(self) - 1

    def copied(self, node: fx.Node, copy: fx.Node, first: str, path: str) -> None:
        """Give the copy of a node in the layer at ``first`` the experts of the layer at ``path``."""
        if not _is_site(node):
            return
        site = self[_number(node)]
        block, bank = self._place_of_site[_number(node)]
        place = (f"{path}{block.removeprefix(first)}", bank)
        _renumber(copy, self._add(place, site.dtype, site.top_k, site.weights_dtype))

    def in_order(self, graph: fx.Graph) -> None:
        """Number the sites as their nodes stand in ``graph``, and drop those that have none."""
        nodes = [n for n in graph.nodes if _is_site(n)]
        sites, places = [self[_number(n)] for n in nodes], [self._place_of_site[_number(n)] for n in nodes]
        for number, node in enumerate(nodes):
            _renumber(node, number)
        self[:], self._place_of_site = sites, places


def _is_site(node: fx.Node) -> bool:
    return node.op == "call_function" and OP in node.args and node.kwargs.get("domain") == DOMAIN


def _number(node: fx.Node) -> int:
    numbers: FxArg = node.kwargs["attr_ints"]
    return int(numbers[0])


def _renumber(node: fx.Node, number: int) -> None:
    node.kwargs = {**node.kwargs, "attr_ints": [number]}
