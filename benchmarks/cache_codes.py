"""What a key/value cache of codes is worth on ONNX Runtime's CPU: ``python -m benchmarks.cache_codes [file.json]``.

One decode step of ``GroupQueryAttention``, the only operator there that reads such a cache (8 query heads on 2 of 64,
random numbers, one thread): the least of 50 calls in CPU time, the distance from float64 attention on what the codes
mean, and from the float cache. Scales are constants that the graph must know; here they are those of this very cache.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

HEADS, KV, D = 8, 2, 64


def session(kind: str, bits: int) -> Any:
    """A graph of the one operator; ``kind`` is "" for a float cache."""
    code = {0: TensorProto.FLOAT, 8: TensorProto.INT8, 4: TensorProto.UINT8}[bits]
    width, floats = D // 2 if bits == 4 else D, TensorProto.FLOAT
    given: list[tuple[str, int, list[Any]]] = [
        ("q", floats, [1, 1, HEADS * D]), ("k", floats, [1, 1, KV * D]), ("v", floats, [1, 1, KV * D]),
        ("past_k", code, [1, KV, "P", width]), ("past_v", code, [1, KV, "P", width]),
        ("before", TensorProto.INT32, [1]), ("total", TensorProto.INT32, []),
    ]  # fmt: skip
    names, fields = [name for name, *_ in given], dict[str, Any]()
    if bits:
        size = [1] if kind == "PER_TENSOR" else [KV * D]
        given += [("k_scale", floats, size), ("v_scale", floats, size)]
        names += [*[""] * 5, "k_scale", "v_scale"]
        fields = {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": bits}
    node = helper.make_node(
        "GroupQueryAttention", names, ["y", "all_k", "all_v"], domain="com.microsoft", num_heads=HEADS,
        kv_num_heads=KV, **fields,
    )  # fmt: skip
    made = [
        ("y", floats, [1, 1, HEADS * D]),
        ("all_k", code, [1, KV, "A", width]),
        ("all_v", code, [1, KV, "A", width]),
    ]
    values = [[helper.make_tensor_value_info(*one) for one in part] for part in (given, made)]
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "step", *values), opset_imports=sets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def coded(x: Any, scale: Any, bits: int) -> Any:
    codes = np.clip(np.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int8)
    if bits == 8:
        return codes
    nibbles = (codes + 8).astype(np.uint8)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def floats(codes: Any, scale: Any, bits: int) -> Any:
    if bits == 8:
        return codes * scale.astype(np.float64)
    pairs = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], D)
    return (pairs.astype(np.float64) - 8) * scale


def attention(q: Any, k: Any, v: Any) -> Any:
    """(1, 1, HEADS * D) in float64; k and v (1, KV, P, D)."""
    out = []
    for head, row in enumerate(q.reshape(HEADS, D).astype(np.float64)):
        scores = k[0, head // (HEADS // KV)] @ row / D**0.5
        weights = np.exp(scores - scores.max())
        out.append(weights @ v[0, head // (HEADS // KV)] / weights.sum())
    return np.concatenate(out)[None, None]


def distance(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def milliseconds(step: Any, feeds: dict[str, Any]) -> float:
    taken = []
    for _ in range(50):
        started = time.process_time()
        step.run(None, feeds)
        taken.append(time.process_time() - started)
    return round(1e3 * min(taken), 3)


def main(out: str = "") -> None:
    rng, found = np.random.default_rng(0), []
    for past in (127, 1023, 4095):
        q, k, v = (rng.standard_normal((1, 1, n * D)).astype(np.float32) for n in (HEADS, KV, KV))
        past_k, past_v = (rng.standard_normal((1, KV, past, D)).astype(np.float32) for _ in range(2))
        feeds = {"q": q, "k": k, "v": v, "before": np.array([past], np.int32), "total": np.array(past + 1, np.int32)}
        step, given = session("", 0), {**feeds, "past_k": past_k, "past_v": past_v}
        plain = step.run(None, given)[0]
        found.append({"past": past, "cache": "float32", "ms": milliseconds(step, given)})
        for kind in ("PER_TENSOR", "PER_CHANNEL"):
            for bits in (8, 4):
                axes = None if kind == "PER_TENSOR" else (0, 2)
                scales = [
                    np.abs(x).max(axes, keepdims=True).astype(np.float32) / (2 ** (bits - 1) - 1)
                    for x in (past_k, past_v)
                ]
                codes = [coded(x, s, bits) for x, s in zip((past_k, past_v), scales, strict=True)]
                given = {**feeds, "past_k": codes[0], "past_v": codes[1]}
                given |= {"k_scale": scales[0].reshape(-1), "v_scale": scales[1].reshape(-1)}
                step = session(kind, bits)
                y, all_k, all_v = step.run(None, given)
                want = attention(q, floats(all_k, scales[0], bits), floats(all_v, scales[1], bits))
                row = {"past": past, "cache": f"{bits} bits {kind.lower()}", "ms": milliseconds(step, given)}
                row |= {"of_codes": float(f"{distance(y, want):.2g}"), "of_floats": float(f"{distance(y, plain):.2g}")}
                found.append(row)
    for row in found:
        print(row)
    if out:
        Path(out).write_text(json.dumps({"onnxruntime": ort.__version__, "steps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
