"""All experts' weights as constants with the expert first, and the experts that an index names applied to rows.

    W_EHO[index] -> (..., H, O);  h = x @ W + b;  a = gate(h);  o = a @ W_out[index] + b_out;  norm

Nothing here is per expert: a form has the same nodes for 4 experts and for 400. Shape legend: E experts, M rows
of one expert, H hidden, O columns of W_in (gate, then up), I intermediate, D output width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings import middle
from moeopt.lower.onnx.lowerings import weights as banks
from moeopt.lower.onnx.lowerings.types import types_of, wide
from moeopt.value_types import OnnxValue


class Stacked:
    """The constants of one site; made once, outside any loop that reads them."""

    def __init__(self, graph: Builder, site: ExpertsNode) -> None:
        self.graph, self.site = graph, site
        bank, spec, size, compute = site.bank, site.spec, banks.sizes_of(site), types_of(site).compute
        self.size = size
        self.w_in = self._whole("gate_up.weight", lambda e: banks.w_in_HO(bank, e, spec), size.H, size.O)
        self.w_out = self._whole("down.weight", lambda e: banks.w_out_ID(bank, e, spec), size.I, size.D)
        self.b_in = self.b_out = self.norm = None
        if banks.has_b_in(bank):
            self.b_in = self._whole("gate_up.bias", lambda e: banks.b_in_O(bank, e, spec, size.O, compute), 1, size.O)
        if banks.has_b_out(bank):
            nothing = torch.zeros(size.D)
            self.b_out = self._whole("down.bias", lambda e: default_if_none(bank.b_out(e), nothing), 1, size.D)
        if spec.out_norm_eps is not None and any(bank.norm(e) is not None for e in range(size.E)):
            one = torch.ones(size.D)
            self.norm = self._whole(
                "norm.weight", lambda e: default_if_none(bank.norm(e), one).to(compute), 1, size.D, dtype=wide(compute)
            )

    def experts(self, x: OnnxValue, index: OnnxValue, *, rank: int) -> OnnxValue:
        """The experts that ``index`` names on ``x``, in the compute dtype.

        Args:
            x: (M, H) for one expert, or (N, M, H) with an expert for each of N; in the compute dtype.
            index: int64, a scalar or (N,), each within 0..E-1.
            rank: of ``x``.
        """
        graph, site = self.graph, self.site
        h = self._added(graph.op("MatMul", [x, self._of(self.w_in, index)], name="gate_up"), self.b_in, index)
        a = middle.gate(graph, site, h, self.size.O)
        o = self._added(graph.op("MatMul", [a, self._of(self.w_out, index)], name="down"), self.b_out, index)
        if site.spec.out_norm_eps is None:
            return o
        norm = None if self.norm is None else self._of(self.norm, index)
        return middle.rms_norm(graph, site, o, norm, axis=rank - 1)

    def _of(self, stack: OnnxValue, index: OnnxValue) -> OnnxValue:
        return self.graph.op("Gather", [stack, index], axis=0)

    def _added(self, value: OnnxValue, stack: OnnxValue, index: OnnxValue) -> OnnxValue:
        return value if stack is None else self.graph.op("Add", [value, self._of(stack, index)])

    def _whole(self, name: str, read: OnnxValue, *shape: int, dtype: torch.dtype | None = None) -> OnnxValue:
        kept, E = dtype or types_of(self.site).compute, self.size.E

        def whole() -> Tensor:
            return torch.stack([read(e).detach().to(kept).cpu() for e in range(E)]).reshape(E, *shape)

        return self.graph.weight(name, whole, kept, (E, *shape))


def default_if_none(given: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if given is None else given
