"""Dense FFNs on a CPU: a decoder with its FFNs fused, beside the dense original, torch.compile and ONNX Runtime.

    python -m benchmarks.dense --dtype bfloat16 --threads 1 --save
    python -m benchmarks.dense --products                  # why an engine's FFN is left alone

A Llama of random weights, one call without a cache for each number of tokens; peers take turns within one run on the
same ids, and an array as large as the caches is written before each call. Cells are ratios to the dense original in
PyTorch (above 1 is faster): the median of paired calls, which a machine shared with others disturbs least. "fused"
has every FFN fused, whatever was measured; the line below the table says what dense="fuse" decides for these tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

import moeopt
from benchmarks.model_peers import exporter

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "llama-small": dict(layers=4, hidden=1024, inner=3584, vocab=2000),
    "llama-tiny": dict(layers=2, hidden=256, inner=768, vocab=500),
}
TOKENS = (1, 4, 16, 128)
Peer = Callable[[torch.Tensor], object]


def make(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    m = MODELS[name]
    config = LlamaConfig(
        hidden_size=m["hidden"], intermediate_size=m["inner"], num_hidden_layers=m["layers"], vocab_size=m["vocab"],
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().to(dtype)


def fused(model: torch.nn.Module, ids: torch.Tensor, tokens: tuple[int, ...], always: bool) -> moeopt.Optimized:
    """``dense="fuse"``; with ``always`` also where it was measured to be slower."""
    from moeopt.pipeline import dense

    with mock.patch.object(dense, "pays", lambda timings: True) if always else mock.MagicMock():
        return moeopt.optimize(
            model, {"input_ids": ids, "use_cache": False}, dense="fuse", tokens=tokens, verify="fast"
        )


def exporter_engine(model: torch.nn.Module) -> Peer:
    """transformers' own ONNX exporter with its fusions, in ONNX Runtime: a prompt on an empty cache."""
    from transformers import DynamicCache

    step = exporter(model, {})

    def call(ids: torch.Tensor) -> object:
        return step(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(ids.shape[1])[None],
            past_key_values=DynamicCache(config=model.config),
            use_cache=True,
        )

    return call


def peers_of(model: torch.nn.Module, ids: torch.Tensor, given: argparse.Namespace) -> dict[str, Peer]:
    """Everything that is compared; ONNX Runtime's CPU provider has no bfloat16, so its peers are float32 only."""
    always = fused(model, ids, (1,), always=True)
    peers: dict[str, Peer] = {
        "dense": lambda ids: model(input_ids=ids, use_cache=False),
        "fused": lambda ids: always(input_ids=ids, use_cache=False),
    }
    if given.compile:
        compiled = torch.compile(model, dynamic=True)
        peers["compiled"] = lambda ids: compiled(input_ids=ids, use_cache=False)
    if given.onnx and given.dtype == "float32":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = given.threads
        engine = moeopt.optimize(
            model, {"input_ids": ids, "use_cache": False}, backend="onnxruntime", dense="fuse", verify="off",
            session_options=options,
        )  # fmt: skip
        peers["engine"] = lambda ids: engine(input_ids=ids, use_cache=False)
        peers["exporter"] = exporter_engine(model)
    return peers


def clock() -> float:
    """Wall time; with one thread its CPU time, which leaves out the turns of a machine's other tenants."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure(peers: dict[str, Peer], vocab: int, tokens: list[int], repeats: int) -> dict[str, dict[str, float]]:
    """For each number of tokens the ratio of each peer, and the original's milliseconds."""
    scratch, table = torch.zeros(16 << 20), {}
    for count in tokens:
        times: dict[str, list[float]] = {name: [] for name in peers}
        for turn in range(repeats + 2):
            ids, names = torch.randint(0, vocab, (1, count)), list(peers)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                scratch.add_(1)
                began = clock()
                peers[name](ids)
                if turn > 1:  # the first two warm up and compile
                    times[name].append(clock() - began)
        base = times.pop("dense")
        table[str(count)] = {"dense, ms": 1e3 * statistics.median(base)} | {
            name: statistics.median(b / t for b, t in zip(base, ts, strict=True)) for name, ts in times.items()
        }
    return table


def product_session(hidden: int, inner: int, packed: bool, threads: int) -> object:
    """A gated FFN alone in ONNX Runtime: gate and up as two products, or as one and a Split."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    gate, up = (random.standard_normal((hidden, inner), dtype=np.float32) / 50 for _ in range(2))
    weights = {"down": random.standard_normal((inner, hidden), dtype=np.float32) / 50}
    if packed:
        weights |= {"both": np.concatenate([gate, up], 1), "sizes": np.array([inner, inner])}
        first = [("MatMul", ["x", "both"], ["h"]), ("Split", ["h", "sizes"], ["g", "u"])]
    else:
        weights |= {"gate": gate, "up": up}
        first = [("MatMul", ["x", "gate"], ["g"]), ("MatMul", ["x", "up"], ["u"])]
    rest = [("Sigmoid", ["g"], ["s"]), ("Mul", ["g", "s"], ["a"]), ("Mul", ["a", "u"], ["m"])]
    nodes = [
        helper.make_node(op, ins, outs, **({"axis": -1} if op == "Split" else {}))
        for op, ins, outs in (*first, *rest, ("MatMul", ["m", "down"], ["y"]))
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", hidden]) for name in ("x", "y")]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "ffn", ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def products(tokens: list[int], repeats: int, threads: int) -> dict[str, dict[str, float]]:
    """How many times as fast one product for gate and up is as two, by sizes and tokens."""
    table: dict[str, dict[str, float]] = {}
    for hidden, inner in ((256, 768), (768, 2048), (1024, 3584), (2048, 5504)):
        sessions = [product_session(hidden, inner, packed, threads) for packed in (False, True)]
        for count in tokens:

            def run(session: object, x: object) -> Callable[[torch.Tensor], object]:
                return lambda ids: session.run(None, {"x": x})  # type: ignore[attr-defined]

            x = torch.randn(count, hidden).numpy()
            peers = {"dense": run(sessions[0], x), "one product": run(sessions[1], x)}
            ratio = measure(peers, 2, [count], repeats)[str(count)]["one product"]
            table.setdefault(f"{hidden} x {inner}", {})[str(count)] = ratio
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="llama-small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-onnx", dest="onnx", action="store_false")
    parser.add_argument("--products", action="store_true", help="ONNX Runtime: one product for gate and up, or two")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    decided: dict[str, str] = {}
    with torch.no_grad():
        if given.products:
            name, table = "products", products(given.tokens, given.repeats, given.threads)
        else:
            name = f"{given.model}-{given.dtype}"
            vocab = MODELS[given.model]["vocab"]
            model, ids = make(given.model, getattr(torch, given.dtype)), torch.randint(0, vocab, (2, 8))
            table = measure(peers_of(model, ids, given), vocab, given.tokens, given.repeats)
            for count in given.tokens:
                (first, *_) = fused(model, ids, (count,), always=False).report.blocks
                decided[str(count)] = first.lowering or first.reason
    print(f"{name}, {given.threads} threads")
    for label, row in table.items():
        print(f"  {label:>12}  " + "   ".join(f"{k} {v:.2f}" for k, v in row.items()))
    for count, words in decided.items():
        print(f"  {count} tokens: {words}")
    if given.save:
        path = RESULTS / f"dense-{name}-{given.threads}t.json"
        meta = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "command": " ".join(["python -m benchmarks.dense", *sys.argv[1:]]),
        }
        path.write_text(json.dumps({"table": table, "decided": decided, **meta}, indent=1) + "\n")


if __name__ == "__main__":
    main()
