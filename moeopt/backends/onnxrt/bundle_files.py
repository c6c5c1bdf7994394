"""The files of an ONNX bundle, and the calls that its golden runs are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeopt.backends.onnxrt import known_answer as probes
from moeopt.backends.onnxrt.engine import GraphEngine
from moeopt.backends.onnxrt.fallback_graph import FALLBACKS
from moeopt.causal_lm.flat_signature import flat_calls
from moeopt.lower.other_sizes import other_sizes
from moeopt.verification.language import find_ids

SIGNATURE, CERTIFICATE = "signature.json", "certificate.json"


def probes_of(graph: str) -> str:
    return probes.FILE if graph not in FALLBACKS else f"{graph.removesuffix('.onnx')}.{probes.FILE}"


def golden_calls(engine: GraphEngine, call: tuple[tuple[Any, ...], Mapping[str, Any]]) -> list[Any]:
    """(args, kwargs) of the graph for the given call and for the same in other sizes."""
    args, kwargs = tuple(call[0]), dict(call[1])
    if engine.causal_lm is None:
        return [(args, kwargs), *other_sizes(engine.signature, (args, kwargs))]
    ids = find_ids(args, kwargs)
    assert ids is not None, "a causal language model was called with token ids"
    return [((), feeds) for feeds in flat_calls(engine.causal_lm, ids)]


ONNX_FILE = "ONNX file"
"""What a manifest says of its source where that is a file and no model: its graph holds nodes of the file."""
