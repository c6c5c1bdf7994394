"""Whole language models on a CPU: moeopt's ONNX Runtime engine beside five other ways to run them.

    python -m benchmarks.onnx_models --model qwen3-like --threads 2 --save

Prompts of 128 and 512 tokens (batch 1), one decode step after 128 cached tokens at batch 1, 4 and 16, and one after
2048, called as ``generate`` calls the model (logits of the last token). Each peer has a process of its own
(``model_peers.py``); they take turns on the same ids, one call at a time. Cells are medians in milliseconds, and in
brackets how many times faster than transformers' default (median of paired calls). ``estimate`` reads each weight and
cached number that the step needs once, or multiplies, whichever takes longer, at the fastest rates of probes of the
same run. Memory is the peak of the process while the engine is made, in multiples of the weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time

import torch

from benchmarks.blocks import RESULTS, gemm_rate, read_rate
from benchmarks.model_peers import MODELS, PEERS, peer
from benchmarks.processes import PAUSE, Peer

CASES = {"prefill 128": (1, 128, 0), "prefill 512": (1, 512, 0)} | {
    f"decode batch {b}": (b, 1, 128) for b in (1, 4, 16)
}


def estimate(name: str, rates: tuple[float, float]) -> dict[str, float]:
    """Milliseconds that reading the touched weights, or the products, take; attention's own products left out."""
    m = MODELS[name]
    H, I, E, K, V = m["hidden"], m["inner"], m["experts"], m["top_k"], m["vocab"]
    attention, expert = H * H * 3, 3 * H * I  # 8 heads of queries and output, 4 of keys and of values
    found = {}
    for label, (batch, new, past) in CASES.items():
        tokens = batch * new
        hit = E * (1 - (1 - K / E) ** tokens)
        cache = batch * past * H  # half the query heads' width for keys, and for values
        weights = m["layers"] * (attention + hit * expert + E * H + cache) + H * V
        products = m["layers"] * (attention + K * expert + E * H) + H * V / new  # logits of one token
        found[label] = 1e3 * max(4 * weights / rates[0], 2 * tokens * products / rates[1])
    return found


def start(name: str, model: str, threads: int) -> Peer | None:
    try:
        one = Peer(threads, peer, name, model)
    except RuntimeError as err:
        print(f"  {name}: left out, {err}", flush=True)
        return None
    print(f"  {name}: " + (", ".join(f"{k} {v:.1f}" for k, v in one.facts.items()) or "ready"), flush=True)
    return one


def measure(peers: dict[str, Peer], repeats: int, warm: int = 3) -> dict[str, dict[str, dict[str, float]]]:
    table: dict[str, dict[str, dict[str, float]]] = {}
    for label, (batch, new, past) in CASES.items():
        times: dict[str, list[float]] = {name: [] for name in peers}
        worst = dict.fromkeys(peers, 0.0)
        for turn in range(repeats + warm):
            names, logits = list(peers), {}
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                took, logits[name] = peers[name].ask(batch, new, past, turn)
                if turn >= warm:
                    times[name].append(took)
                time.sleep(PAUSE)
            want = logits["transformers"]
            for name, found in logits.items():
                worst[name] = max(worst[name], float((found - want).norm() / want.norm()))
        base = times["transformers"]
        table[label] = {
            name: {
                "ms": 1e3 * statistics.median(ts),
                "fastest_ms": 1e3 * min(ts),
                "ratio": statistics.median(b / t for b, t in zip(base, ts, strict=True)),
                "relative_difference": worst[name],
            }
            for name, ts in times.items()
        }
        cells = "   ".join(f"{name} {cell['ms']:.1f} ({cell['ratio']:.2f}x)" for name, cell in table[label].items())
        print(f"  {label:<16}{cells}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-like")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="beside transformers' default")
    parser.add_argument("--cost-only", action="store_true", help="moeopt's export, load and memory only")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.model}, float32, {options.threads} threads", flush=True)
    peers = ["moeopt"] if options.cost_only else list(dict.fromkeys(["transformers", *options.peers]))
    started = {name: found for name in peers if (found := start(name, options.model, options.threads))}
    result: dict[str, object] = {"facts": {name: one.facts for name, one in started.items()}}
    if not options.cost_only:
        flush = torch.ones(200 << 20, dtype=torch.uint8)
        rates = read_rate(flush), gemm_rate(torch.float32)
        result["table"] = measure(started, options.repeats)
        again = read_rate(flush), gemm_rate(torch.float32)
        rates = max(rates[0], again[0]), max(rates[1], again[1])
        result |= {"read_gb_s": rates[0] / 1e9, "gemm_gflop_s": rates[1] / 1e9}
        result["estimate"] = estimate(options.model, rates)
        cells = ", ".join(f"{label} {ms:.1f}" for label, ms in result["estimate"].items())
        print(f"  estimate, ms ({rates[0] / 1e9:.1f} GB/s, {rates[1] / 1e9:.0f} GFLOP/s): {cells}")
    for one in started.values():
        one.close()
    if options.save:
        path = RESULTS / f"onnx-model-{options.model}-{options.threads}t.json"
        meta = {"torch": torch.__version__, "machine": platform.machine(), "command": " ".join(sys.argv)}
        path.write_text(json.dumps({**result, **meta}, indent=1) + "\n")


if __name__ == "__main__":
    main()
