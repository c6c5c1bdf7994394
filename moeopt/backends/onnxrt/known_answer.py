"""Probes: a block's own small question with the answer known in float64, asked again on every machine.

For each kind of lowered block a bundle holds tokens, expert ids, routing weights and what the definition in
float64 makes of them with the experts of the first block of that kind. The block's nodes are cut out of the
graph, with its weights where they lie, and run alone. An answer may be 4 times as far from the truth as the
definition in the block's own dtype is, plus 8 eps: the budget that every block is verified with.

The ids name the first and the last expert, and at most ``MOST`` in all; no token names one twice, as top-k does
not. Shape legend: T tokens, K chosen per token, E experts, H hidden.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeopt.backends.onnxrt.providers import runtime
from moeopt.backends.onnxrt.session import Prepare, Session, no_change
from moeopt.backends.onnxrt.site_records import ENDS, blank_site, function_of
from moeopt.bundle.values import DTYPES
from moeopt.errors import BundleError
from moeopt.ir.row_function import RowFunction
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.ops.reference import dtypes, experts_reference
from moeopt.ops.row_function import expert_by_expert, in_float64
from moeopt.value_types import FxArg, OnnxModel, PyObject
from moeopt.verification.distance import finiteness, token_distance
from moeopt.verification.judge import EPS_ALLOWANCE, FACTOR

FILE = "probes.safetensors"
TOKENS, MOST = 9, 12
BLOCK = "moeopt.block"
"""The key in a node's metadata_props that names its block."""


def make_probe(site: ExpertsNode, seed: int = 0) -> tuple[dict[str, Tensor], float]:
    """``(x, ids, weights, y)`` of a probe, y in float64, and the relative L2 distance per token that is allowed."""
    generator = torch.Generator().manual_seed(seed)
    E, K = site.bank.num_experts, site.top_k
    x_TH = torch.randn(TOKENS, site.features, generator=generator).to(site.dtype)
    some = torch.linspace(0, E - 1, min(E, max(K, MOST))).round().to(torch.int64)
    ids_TK = torch.stack([some[torch.arange(t, t + K) % len(some)] for t in range(TOKENS)])
    if site.spec.out_of_range == "identity":
        ids_TK[2, -1] = E
    weights_TK = (torch.rand(TOKENS, K, generator=generator) + 0.1).to(site.weights_dtype)
    if site.router is not None:
        weights_TK = (weights_TK.double() / weights_TK.double().sum(-1, keepdim=True)).to(site.weights_dtype)
    with torch.no_grad():
        own, y_TH = _answers(site, x_TH, ids_TK, weights_TK)
    eps = torch.finfo(own.dtype).eps
    budget = FACTOR * float(token_distance(own, y_TH).nan_to_num().max()) + EPS_ALLOWANCE * eps
    return {"x": x_TH, "ids": ids_TK, "weights": weights_TK, "y": y_TH}, budget


def _answers(site: ExpertsNode, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What the definition gives in the block's own dtypes, and in float64."""
    bank, spec = site.bank, site.spec
    if isinstance(spec, RowFunction):
        first = bank.slots(0)
        x, ids, weights = (t.to(first[0].device if len(first) else "cpu") for t in (x, ids, weights))
        flat = [t for e in range(bank.num_experts) for t in bank.slots(e)]
        own = expert_by_expert(x, ids, weights, bank, spec)
        return own.cpu(), in_float64(x, ids, weights, flat, spec.encode()).cpu()
    x, ids, weights = (t.to(bank.w_out(0).device) for t in (x, ids, weights))
    own = experts_reference(x, ids, weights, bank, spec)
    return own.cpu(), experts_reference(x.double(), ids, weights.double(), bank, _exact(spec)).cpu()


def block_of(node: FxArg) -> str | None:
    """The name of the lowered block that a node of a protobuf graph belongs to."""
    return next((p.value for p in node.metadata_props if p.key == BLOCK), None)


def cut_out(proto: OnnxModel, record: Mapping[str, Any]) -> bytes:
    """One block of a graph as a model of its own: from x, ids and weights to y. ``BundleError`` if it is not there."""
    import onnx

    inside = [n for n in proto.graph.node if block_of(n) == record.get("name")]
    ends = [record.get(end) for end in ENDS]
    made, read = {o for n in inside for o in n.output}, {i for n in inside for i in n.input if i}
    weights = [t for t in proto.graph.initializer if t.name in read]
    loose = read - made - {t.name for t in weights} - set(ends[:3])
    if not inside or loose or ends[3] not in made:
        raise BundleError(f"block {record.get('name')!r} is not in the graph as the manifest says")
    model = onnx.ModelProto()
    model.ir_version, model.producer_name = proto.ir_version, proto.producer_name
    model.opset_import.extend(proto.opset_import)
    graph = model.graph
    graph.name = "block"
    graph.node.extend(inside)
    graph.initializer.extend(weights)
    kinds = (record["dtype"], "int64", record["weights_dtype"])
    for name, kind in zip(ends[:3], kinds, strict=True):
        if name not in [v.name for v in graph.input]:
            graph.input.append(onnx.helper.make_tensor_value_info(name, _element(kind), [None, None]))
    graph.output.append(onnx.helper.make_tensor_value_info(ends[3], _element(_out(record)), [None, None]))
    return bytes(model.SerializeToString())


def session_of(model: bytes, folder: Path, provider: str, prepare: Prepare = no_change) -> Session:
    """A session of a model whose weights lie in ``folder``; ``prepare`` changes its options."""
    options = runtime().SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    return Session(model, provider, options, prepare=prepare)


def known_answer_test(
    session: Session, probe: Mapping[str, Tensor], names: Sequence[str], budget: float, seconds: float | None = None
) -> str:
    """What is wrong with a block's answer, in words; "" when it is right. ``names``: of x, ids and weights.

    ``LimitError`` when the answer takes longer than ``seconds``.
    """
    with contextlib.nullcontext() if seconds is None else session.within(seconds):
        got = session.run(feeds_of(probe, names))[0].cpu()
    want = probe["y"]
    if got.shape != want.shape:
        return f"its result is {tuple(got.shape)}, not {tuple(want.shape)}"
    pattern = finiteness(want, got)
    if pattern.leaked:
        return "its result is not finite"
    far = float(token_distance(got, want)[pattern.both].max()) if pattern.both.any() else 0.0
    return "" if far <= budget else f"it is {far:.2e} from the float64 result, and {budget:.2e} is allowed"


def feeds_of(probe: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """A probe's inputs under the names that the graph has for them."""
    return dict(zip(names, (probe["x"], probe["ids"], probe["weights"]), strict=True))


def _exact(spec: PyObject) -> PyObject:
    return dataclasses.replace(spec, compute_dtype=None, act_dtype=None, accum_dtype=None, out_dtype=None)


def _out(record: Mapping[str, Any]) -> str:
    if (function := function_of(record)) is not None:
        return function.out_dtype or str(record["dtype"])
    site = blank_site({**record, "experts": 1, "b_in": [False] * len(record["w_in"]), "b_out": False, "norm": False})
    return str(dtypes(torch.empty(0, dtype=site.dtype), site.spec)[2]).removeprefix("torch.")


def _element(name: str) -> int:
    from onnx_ir.tensor_adapters import from_torch_dtype

    return int(from_torch_dtype(DTYPES[name]))
