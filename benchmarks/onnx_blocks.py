"""MoE blocks in ONNX Runtime on a CPU: each lowering, and five other ways, beside an estimate.

    python -m benchmarks.onnx_blocks --block mixtral-small --threads 2 --save

Each peer runs in a process of its own (``block_peers.py``) and takes turns with transformers' default (grouped_mm) on
the same tensors, caches flushed before each call: cells are medians in milliseconds, and in brackets default / peer
(median of paired calls). ``MoE kernel alone`` is ``com.microsoft::MoE`` fed with ready logits, which no model has;
``MatMuls alone`` is the experts' products on rows that are sorted already (its output is not compared).
``estimate`` reads each expert that is hit once, or multiplies, at the fastest rates of probes of the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time

import torch

from benchmarks.block_peers import PEERS, inputs, peer
from benchmarks.blocks import BLOCKS, RESULTS, TOKENS, gemm_rate, read_rate
from benchmarks.processes import PAUSE, Peer

LOWERINGS = ("unrolled", "moe-expand", "dense")


def compare(name: str, base: Peer, block: str, threads: int, tokens: list[int], repeats: int) -> dict[str, dict]:
    """The cells of one peer; it is gone at the end, for two copies of a block's weights are enough for a machine."""
    other = Peer(threads, peer, name, block)
    cells: dict[str, dict] = {"load": other.facts["load"]}
    for T in tokens:
        times: dict[str, list[float]] = {"base": [], "other": []}
        worst = 0.0
        for turn in range(repeats + 2):
            found = {}
            for which, one in ((("base", base), ("other", other)), (("other", other), ("base", base)))[turn % 2]:
                took, found[which] = one.ask(T, turn)
                if turn > 1:  # the first turns warm up
                    times[which].append(took)
                time.sleep(PAUSE)
            worst = max(worst, float((found["other"] - found["base"]).norm() / found["base"].norm()))
        cells[T] = {
            "ms": 1e3 * statistics.median(times["other"]),
            "fastest_ms": 1e3 * min(times["other"]),
            "default_ms": 1e3 * statistics.median(times["base"]),
            "ratio": statistics.median(b / o for b, o in zip(times["base"], times["other"], strict=True)),
            "relative_difference": worst,
        }
    other.close()
    return cells


def estimates(block: str, tokens: list[int], repeats: int, rates: list[tuple[float, float]]) -> dict[int, float]:
    E, K, H, I = BLOCKS[block]
    read, gemm = (max(column) for column in zip(*rates, strict=True))
    found = {}
    for T in tokens:
        hit = statistics.mean(inputs(block, T, turn)[1].unique().numel() for turn in range(2, repeats + 2))
        found[T] = 1e3 * max(hit * 3 * H * I * 4 / read, T * K * 6 * H * I / gemm)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block", choices=BLOCKS, default="mixtral-small")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--only", nargs="*", default=[*LOWERINGS, *list(PEERS)[1:]], help="lowerings and peers")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    flush = torch.ones(200 << 20, dtype=torch.uint8)
    rates = [(read_rate(flush), gemm_rate(torch.float32))]
    base = Peer(options.threads, peer, "transformers", options.block)
    print(f"{options.block}, float32, {options.threads} threads", flush=True)
    print(f"{'':<18}" + "".join(f"{f'T={T}':>16}" for T in options.tokens), flush=True)
    table = {}
    for name in options.only:
        try:
            cells = compare(name, base, options.block, options.threads, options.tokens, options.repeats)
        except RuntimeError as err:
            print(f"{name}: left out, {err}", flush=True)
            continue
        table[name] = cells
        row = "".join(f"{cells[T]['ms']:>9.1f} ({cells[T]['ratio']:.2f}x)" for T in options.tokens)
        print(f"{name:<18}{row}   load {cells['load']:.1f} s", flush=True)
        rates.append((read_rate(flush), gemm_rate(torch.float32)))
        time.sleep(PAUSE)
    base.close()
    estimate = estimates(options.block, options.tokens, options.repeats, rates)
    read, gemm = (max(column) for column in zip(*rates, strict=True))
    print(f"{'estimate':<18}" + "".join(f"{estimate[T]:>9.1f}{'':7}" for T in options.tokens)
          + f"   {read / 1e9:.1f} GB/s, {gemm / 1e9:.0f} GFLOP/s")  # fmt: skip
    if options.save:
        import onnxruntime

        found = {"estimate": estimate, "peers": table, "read_gb_s": read / 1e9, "gemm_gflop_s": gemm / 1e9}
        about = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "machine": platform.machine()}
        path = RESULTS / f"onnx-{options.block}-float32-{options.threads}t.json"
        path.write_text(
            json.dumps(
                {**found, **about, "command": " ".join(["python -m benchmarks.onnx_blocks", *sys.argv[1:]])}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
