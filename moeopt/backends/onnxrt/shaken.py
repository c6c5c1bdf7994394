"""An engine's graph in which each product's result is rounded otherwise: what another session of it may compute.

    y = product(x, W)    ->    y = product(x, W) * (1 + eps * n)        n normal, other numbers at each run

Kernels add up a product's terms in an order that depends on the CPU, on the number of rows and on whether weights were
packed, and so two right sessions of one graph differ. How far rounding moves a call shows here, also where all that the
call gives are token ids, which nothing could nudge.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch

from moeopt.backends.onnxrt.check_bytes import graphs_of, parse
from moeopt.backends.onnxrt.custom_op import register
from moeopt.backends.onnxrt.engine import GraphEngine, OnnxEngine
from moeopt.backends.onnxrt.providers import runtime
from moeopt.backends.onnxrt.session import NATIVE, VERIFIED_NATIVE, Session, no_change
from moeopt.value_types import OnnxModel, OnnxNode

PRODUCTS = frozenset(
    (
        "MatMul Gemm Conv ConvTranspose Einsum FusedMatMul FusedGemm FusedConv MatMulNBits MoE QMoE Experts Attention "
        "MultiHeadAttention GroupQueryAttention"
    ).split()
)
"""Operators whose first result is a sum of products."""


def session_beside(engine: GraphEngine, proto: OnnxModel, graph: str) -> Session:
    """A session of ``proto`` over the weights of an engine's own ``graph``, of which no copies are packed."""
    options = runtime().SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    folder = os.fspath(engine.directory.resolve())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    prepare = register if graph in (NATIVE, VERIFIED_NATIVE) else no_change
    return Session(proto.SerializeToString(), engine.provider, options, prepare=prepare)


@contextlib.contextmanager
def shaken(engine: GraphEngine) -> Iterator[bool]:
    """Have ``engine`` run its graph with the noise of rounding inside; yields whether it does.

    It does not where the engine runs no ONNX graph, or where ONNX Runtime has no kernel for the noise.
    """
    session = _session_of(engine) if isinstance(engine, OnnxEngine) else None
    own = engine.session
    try:
        engine.session = session or own
        yield session is not None
    finally:
        engine.session = own


def _session_of(engine: OnnxEngine) -> Session | None:
    proto = parse(engine.directory / engine.graph)
    if not _shake(proto):
        return None
    try:
        return session_beside(engine, proto, engine.graph)
    except Exception:  # ONNX Runtime's own: a provider or a dtype without a kernel for what was added
        return None


def _shake(proto: OnnxModel) -> int:
    """Put noise behind each product of ``proto``; how many there are."""
    count = 0
    for graph in list(graphs_of(proto.graph)):
        eps_of = {w.name: eps for w in graph.initializer if (eps := _eps(w.data_type)) is not None}
        nodes = []
        for node in graph.node:
            nodes.append(node)
            if node.op_type in PRODUCTS:
                nodes += _noise(node, eps_of, count)
                count += 1
        kept = [type(node).FromString(node.SerializeToString()) for node in nodes]  # clearing a list frees what it held
        del graph.node[:]
        graph.node.extend(kept)
    return count


def _noise(node: OnnxNode, eps_of: Mapping[str, float], number: int) -> list[OnnxNode]:
    """Nodes that give a product's result its old name again, times 1 + eps * n."""
    from onnx import TensorProto, helper

    said, name = node.output[0], f"moeopt/shaken.{number}"
    quiet, noise, cast = f"{name}/quiet", f"{name}/noise", f"{name}/cast"
    eps = max((eps_of[i] for i in node.input if i in eps_of), default=torch.finfo(torch.float32).eps)
    node.output[0] = quiet
    normal = {"dtype": TensorProto.FLOAT, "mean": 1.0, "scale": eps, "seed": float(number)}
    return [
        helper.make_node("RandomNormalLike", [quiet], [noise], noise, **normal),
        helper.make_node("CastLike", [noise, quiet], [cast], cast),
        helper.make_node("Mul", [quiet, cast], [said], name),
    ]


def _eps(kind: int) -> float | None:
    """Of a float dtype by ONNX's number; None of any other, and of float64, which the noise has no digits for."""
    from onnx import TensorProto

    dtypes = {
        TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16,
    }  # fmt: skip
    return torch.finfo(dtypes[kind]).eps if kind in dtypes else None
