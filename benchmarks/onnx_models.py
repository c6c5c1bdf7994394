"""Whole language models on a CPU: moeopt's ONNX Runtime engine beside transformers and its own ONNX exporter.

    python benchmarks/onnx_models.py --model qwen3-like --threads 2 --save

Prompts of 128 and 512 tokens (batch 1), and one decode step after 128 cached tokens at batch 1, 4 and 16. Peers take
turns within one run on the same ids; cells are medians in milliseconds, and in brackets how many times faster than
transformers' default (median of paired calls). Export and load are timed once each; memory is the peak of the
process while the engine is made, in multiples of the weights, as the operating system counts it.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import moeopt

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "qwen3-like": dict(layers=6, experts=32, top_k=4, hidden=512, inner=384, vocab=32000),
    "mixtral-like": dict(layers=6, experts=8, top_k=2, hidden=512, inner=1792, vocab=32000),
    "export-cost": dict(layers=12, experts=32, top_k=4, hidden=512, inner=384, vocab=32000),
    "small-but-many": dict(layers=48, experts=128, top_k=8, hidden=64, inner=32, vocab=1000),
}


def make(name: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

    m = MODELS[name]
    common = dict(
        hidden_size=m["hidden"], num_hidden_layers=m["layers"], num_experts_per_tok=m["top_k"], vocab_size=m["vocab"],
        num_attention_heads=8, num_key_value_heads=4, head_dim=m["hidden"] // 8, max_position_embeddings=4096,
    )  # fmt: skip
    if name == "mixtral-like":
        config = MixtralConfig(**common, intermediate_size=m["inner"], num_local_experts=m["experts"])
    else:
        config = Qwen3MoeConfig(
            **common, intermediate_size=4 * m["hidden"], moe_intermediate_size=m["inner"], num_experts=m["experts"],
            decoder_sparse_step=1,
        )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peer_engine(model: torch.nn.Module) -> Callable[..., object]:
    """transformers' own exporter with its fusions: one graph for prompts and single tokens, as moeopt's."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    ids = torch.arange(6).reshape(2, 3)
    exported = OnnxExporter().export_for_generation(
        model,
        {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
        OnnxConfig(dynamic=True, ort_fusions="cpu"),
        multi_token_decode=True,
    )
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    exported.to(session_options=options)
    runner = exported.runners["decode"]
    takes = set(runner.metadata.kwargs)

    def call(**kwargs: object) -> object:
        return runner(**{k: v for k, v in kwargs.items() if k in takes})

    return call


def eager_twin(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights through transformers' loop over experts."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    twin.set_experts_implementation("eager")
    return twin


def compiled(model: torch.nn.Module) -> Callable[..., object]:
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    return torch.compile(twin, dynamic=True)


def step(call: Callable[..., object], batch: int, new: int, cache: object, past: int, vocab: int) -> object:
    ids = torch.randint(0, vocab, (batch, new))
    return call(
        input_ids=ids,
        attention_mask=torch.ones(batch, past + new, dtype=torch.int64),
        position_ids=torch.arange(past, past + new).expand(batch, new),
        past_key_values=cache,
        use_cache=True,
    )


def measure(peers: dict[str, Callable[..., object]], config: object, vocab: int, repeats: int) -> dict:
    from transformers import DynamicCache

    cases = [("prefill 128", 1, 128, 0), ("prefill 512", 1, 512, 0)]
    cases += [(f"decode batch {b}", b, 1, 128) for b in (1, 4, 16)]
    table: dict[str, dict[str, dict[str, float]]] = {}
    for label, batch, new, past in cases:
        times: dict[str, list[float]] = {name: [] for name in peers}
        caches = {}
        for name, call in peers.items():
            caches[name] = DynamicCache(config=config)
            if past:
                caches[name] = step(call, batch, past, caches[name], 0, vocab).past_key_values
        for turn in range(repeats + 2):
            names = list(peers)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                cache = caches[name] if past else DynamicCache(config=config)
                began = time.perf_counter()
                result = step(peers[name], batch, new, cache, past + turn if past else 0, vocab)
                if turn > 1:
                    times[name].append(time.perf_counter() - began)
                caches[name] = result.past_key_values
        base = times["transformers"]
        table[label] = {
            name: {
                "ms": 1e3 * statistics.median(ts),
                "ratio": statistics.median(b / t for b, t in zip(base, ts, strict=True)),
            }
            for name, ts in times.items()
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-like")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-exporter", action="store_true", help="leave out transformers' exporter (slow to export)")
    parser.add_argument("--more-peers", action="store_true", help="transformers' eager experts and torch.compile too")
    parser.add_argument("--cost-only", action="store_true", help="export, load and memory only")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = make(options.model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    vocab = MODELS[options.model]["vocab"]
    ids = torch.randint(0, vocab, (2, 16), generator=torch.Generator().manual_seed(0))
    facts: dict[str, object] = {"weights_mb": weights / 1e6}

    before, began = peak_bytes(), time.perf_counter()
    opt = moeopt.optimize(model, {"input_ids": ids}, backend="onnxruntime", verify="off")
    facts["moeopt: optimize, export and load, s"] = time.perf_counter() - began
    facts["moeopt: peak beside the model, in weights"] = (peak_bytes() - before) / weights
    with tempfile.TemporaryDirectory() as folder:
        opt.save(folder + "/engine")
        began = time.perf_counter()
        moeopt.load(folder + "/engine")
        facts["moeopt: load a saved bundle, s"] = time.perf_counter() - began
    table = {}
    if not options.cost_only:
        peers: dict[str, Callable[..., object]] = {"transformers": model, "moeopt": opt}
        if options.more_peers:
            peers |= {"eager": eager_twin(model), "torch.compile": compiled(model)}
        if not options.no_exporter:
            began = time.perf_counter()
            peers["transformers' exporter"] = peer_engine(model)
            facts["transformers' exporter: export and load, s"] = time.perf_counter() - began
        with torch.inference_mode():
            table = measure(peers, model.config, vocab, options.repeats)
    print(f"{options.model}, float32, {options.threads} threads")
    for name, value in facts.items():
        print(f"  {name}: {value:.1f}")
    print(f"  lowering: {opt.report.blocks[0].lowering}")
    for label, row in table.items():
        cells = "   ".join(f"{name} {cell['ms']:.1f} ms ({cell['ratio']:.2f}x)" for name, cell in row.items())
        print(f"  {label:<16}{cells}")
    if options.save:
        path = RESULTS / f"onnx-model-{options.model}-{options.threads}t.json"
        meta = {"torch": torch.__version__, "machine": platform.machine(), "command": " ".join(sys.argv)}
        path.write_text(json.dumps({"facts": facts, "table": table, **meta}, indent=1) + "\n")


if __name__ == "__main__":
    main()
