"""Whole language models on a CPU: moeopt's ONNX Runtime engine beside five other ways to run them.

    python -m benchmarks.onnx_models --model qwen3-like --threads 2 --save

Prompts of 128 and 512 tokens (batch 1), one decode step after 128 cached tokens at batch 1, 4 and 16, and one after
2048, called as ``generate`` calls the model (logits of the last token). Each peer has a process of its own
(``model_peers.py``) and takes turns with transformers' default on the same ids, one call at a time, the others gone.
Cells are medians in milliseconds, and in brackets how many times faster than transformers' default (median of paired
calls): wall time, and with one thread CPU time. ``estimate`` reads each weight and cached number that the step needs
once, or multiplies, whichever takes longer, at the fastest rates of probes of the same run. Memory is the peak of the
process while the engine is made, in multiples of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

import torch

from benchmarks.blocks import RESULTS, gemm_rate, read_rate
from benchmarks.model_peers import MODELS, PEERS, peer
from benchmarks.processes import PAUSE, Peer
from moeopt.ops.measured import cpu_model

CASES = {"prefill 128": (1, 128, 0), "prefill 512": (1, 512, 0)}
CASES |= {f"decode batch {batch}": (batch, 1, 128) for batch in (1, 4, 16)} | {"decode after 2048": (1, 1, 2048)}


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


def compare(base: Peer, other: Peer, cases: list[str], repeats: int, warm: int = 3) -> dict[str, dict[str, float]]:
    """The cells of one peer, in turns with ``base``."""
    cells = {}
    for label in cases:
        batch, new, past = CASES[label]
        times: dict[Peer, list[float]] = {base: [], other: []}
        worst = 0.0
        for turn in range(repeats + warm):
            logits = {}
            for one in (base, other) if turn % 2 else (other, base):
                took, logits[one] = one.ask(batch, new, past, turn)
                if turn >= warm:
                    times[one].append(took)
                time.sleep(PAUSE)
            worst = max(worst, float((logits[other] - logits[base]).norm() / logits[base].norm()))
        cells[label] = {
            "ms": 1e3 * statistics.median(times[other]),
            "fastest_ms": 1e3 * min(times[other]),
            "default_ms": 1e3 * statistics.median(times[base]),
            "ratio": statistics.median(b / o for b, o in zip(times[base], times[other], strict=True)),
            "relative_difference": worst,
        }
    return cells


def run(name: str, base: Peer | None, options: argparse.Namespace) -> tuple[dict, dict] | None:
    """Facts and cells of one peer, which is gone at the end; None for one that does not run."""
    try:
        one = Peer(options.threads, peer, name, options.model)
        print(f"{name}: " + (", ".join(f"{k} {v:.1f}" for k, v in one.facts.items()) or "ready"), flush=True)
        cells = {} if base is None else compare(base, one, options.cases, options.repeats)
        one.close()
    except RuntimeError as err:
        print(f"{name}: left out, {err}", flush=True)
        return None
    for label, cell in cells.items():
        print(f"  {label:<18}{cell['ms']:8.1f} ms, transformers {cell['default_ms']:8.1f} ({cell['ratio']:.2f}x)"
              f"   at best {cell['fastest_ms']:.1f}", flush=True)  # fmt: skip
    return one.facts, cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-like")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=15)
    others = [name for name in PEERS if name != "transformers"]
    parser.add_argument("--peers", nargs="*", choices=others, default=others, help="beside transformers' default")
    parser.add_argument("--cost-only", action="store_true", help="moeopt's export, load and memory only")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = round(os.getloadavg()[0], 1)
    print(f"{options.model}, float32, {options.threads} threads", flush=True)
    result: dict[str, object] = {}
    if options.cost_only:
        found = {"moeopt": run("moeopt", None, options)}
    else:
        flush = torch.ones(200 << 20, dtype=torch.uint8)
        rates = [(read_rate(flush), gemm_rate(torch.float32))]
        base = Peer(options.threads, peer, "transformers", options.model)
        found = {}
        for name in options.peers:
            found[name] = run(name, base, options)
            rates.append((read_rate(flush), gemm_rate(torch.float32)))
        base.close()
        read, gemm = (max(column) for column in zip(*rates, strict=True))
        result = {
            "read_gb_s": read / 1e9,
            "gemm_gflop_s": gemm / 1e9,
            "estimate": estimate(options.model, (read, gemm)),
        }
        cells = ", ".join(f"{label} {ms:.1f}" for label, ms in result["estimate"].items())
        print(f"estimate, ms ({read / 1e9:.1f} GB/s, {gemm / 1e9:.0f} GFLOP/s): {cells}")
    result["facts"] = {name: one[0] for name, one in found.items() if one}
    result["peers"] = {name: one[1] for name, one in found.items() if one}
    if options.save:
        part = "" if len(options.cases) == len(CASES) else "-" + "-".join(options.cases).replace(" ", "-")
        path = RESULTS / f"onnx-model-{options.model}-{options.threads}t{part}.json"
        meta = {
            "torch": torch.__version__,
            "machine": cpu_model(),
            "clock": "CPU time of the process" if options.threads == 1 else "wall time",
            "load average, before and after": [began, round(os.getloadavg()[0], 1)],
            "command": " ".join(["python -m benchmarks.onnx_models", *sys.argv[1:]]),
        }
        path.write_text(json.dumps({**result, **meta}, indent=1) + "\n")


if __name__ == "__main__":
    main()
