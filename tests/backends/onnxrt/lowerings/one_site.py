"""One site as a whole ONNX model, run by ONNX Runtime, and the reference it must agree with.

Shape legend: T tokens, E experts, K chosen per token, H hidden, I intermediate, D output width.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from moeopt.backends.onnxrt.lowerings import by_name
from moeopt.ir.specs import ExpertsSpec
from moeopt.lower.onnx.build import Builder
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.ops.expert_weights import ExpertWeights, ListExpertWeights
from moeopt.ops.reference import experts_reference, out_features


def make_site(
    spec=None, *, E=5, K=2, H=12, I=6, D=None, seed=0, dtype=torch.float32, bias=True, router=None, **changes
) -> ExpertsNode:
    """A site with random weights, scaled so that outputs are about 1."""
    spec = dataclasses.replace(spec or ExpertsSpec(), **changes)
    rng = torch.Generator().manual_seed(seed)
    D = D or H

    def tensor(*shape, fan=1):
        return (torch.randn(shape, generator=rng) / fan**0.5).to(dtype)

    widths = [I, I] if spec.rows == "separate" else [2 * I if spec.gated else I]
    w_in = [[tensor(*((O, H) if spec.w_in_layout == "oi" else (H, O)), fan=H) for _ in range(E)] for O in widths]
    w_out = [tensor(*((D, I) if spec.w_out_layout == "oi" else (I, D)), fan=I) for _ in range(E)]
    b_in = b_out = None
    if bias:
        b_in = [[tensor(O) for _ in range(E)] for O in widths]
        b_out = [None if e == 1 else tensor(D) for e in range(E)]
    norm = [1 + tensor(D) / 4 for _ in range(E)] if spec.out_norm_eps is not None else None
    return ExpertsNode("layers.0.mlp", ListExpertWeights(w_in, w_out, b_in, b_out, norm), spec, dtype, K, dtype, router)


def renamed(spec: dict) -> str:
    """A spec's changes as a test id."""
    return ",".join(f"{key}={value}" for key, value in spec.items()) or "defaults"


def tokens(site: ExpertsNode, T: int, *, seed=1, beyond=0.0, negative=0.0):
    """Random x (T, H), ids and weights (T, K); ``beyond`` and ``negative`` are shares of ids outside 0..E-1."""
    rng = torch.Generator().manual_seed(seed)
    E, K = site.bank.num_experts, site.top_k
    w = site.bank.w_in(0)[0]
    H = w.shape[1 if site.spec.w_in_layout == "oi" else 0]
    ids = torch.randint(0, E, (T, K), generator=rng)
    p = torch.rand(T, K, generator=rng)
    ids = torch.where(p < beyond, ids + E, torch.where(p > 1 - negative, -1 - ids, ids))
    x = torch.randn(T, H, generator=rng).to(site.dtype)
    return x, ids, (0.1 + torch.rand(T, K, generator=rng)).to(site.weights_dtype)


def model_of(site: ExpertsNode, lowering: str | object, opset: int = 18) -> ir.Model:
    """The model x, ids, weights -> y with a token count that is open."""
    lowering = by_name(lowering) if isinstance(lowering, str) else lowering
    spec, kinds = site.spec, {"x": site.dtype, "ids": torch.int64, "weights": site.weights_dtype}
    H = site.bank.w_in(0)[0].shape[1 if spec.w_in_layout == "oi" else 0]
    widths = {"x": H, "ids": site.top_k, "weights": site.top_k}
    inputs = [
        ir.Value(name=name, type=ir.TensorType(from_torch_dtype(kinds[name])), shape=ir.Shape(["T", widths[name]]))
        for name in kinds
    ]
    builder = Builder(site.name)
    y = lowering.emit(builder, site, *inputs)
    out = getattr(torch, spec.out_dtype) if spec.out_dtype else site.dtype
    y.type, y.shape = ir.TensorType(from_torch_dtype(out)), ir.Shape(["T", out_features(site.bank, spec)])
    graph = ir.Graph(
        inputs,
        [y],
        nodes=builder.nodes,
        initializers=builder.initializers,
        opset_imports={"": opset, **builder.domains},
        name="one_site",
    )
    return ir.Model(graph, ir_version=10)


def session_of(model: ir.Model | onnx.ModelProto) -> ort.InferenceSession:
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, x, ids, weights) -> torch.Tensor:
    feeds = {"x": x, "ids": ids, "weights": weights}
    taken = {i.name for i in session.get_inputs()}
    arrays = {name: t.numpy() for name, t in feeds.items() if name in taken}
    return torch.from_numpy(np.asarray(session.run(None, arrays)[0]))


class _Doubled:
    """A bank in float64, for the definition without rounding."""

    def __init__(self, bank: ExpertWeights) -> None:
        self.bank, self.num_experts = bank, bank.num_experts

    def __getattr__(self, name):
        read = getattr(self.bank, name)

        def doubled(e):
            got = read(e)
            if isinstance(got, tuple):
                return tuple(None if t is None else t.double() for t in got)
            return None if got is None else got.double()

        return doubled


def exact(site: ExpertsNode, x, ids, weights) -> torch.Tensor:
    """``experts_reference`` in float64 throughout, on the same numbers."""
    spec = dataclasses.replace(site.spec, compute_dtype=None, act_dtype=None, accum_dtype=None, out_dtype=None)
    return experts_reference(x.double(), ids, weights.double(), _Doubled(site.bank), spec)


def eps_off(got: torch.Tensor, want: torch.Tensor, *, floor: float = 1.0) -> float:
    """The worst error of an entry in eps of ``got``'s dtype, relative to its row's largest entry (or ``floor``)."""
    if not want.numel():
        return 0.0
    size = want.abs().amax(-1, keepdim=True).clamp_min(floor)
    return float(((got.double() - want).abs() / size).max() / torch.finfo(got.dtype).eps)
