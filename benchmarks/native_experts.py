"""One MoE block on one CPU thread: moeopt's kernels beside those of others, in paired turns.

    OMP_NUM_THREADS=1 python -m benchmarks.native_experts --block mixtral-small --dtype bfloat16
    OMP_NUM_THREADS=1 python -m benchmarks.native_experts --dtype int4                    (peers: coded_peers.py)
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MOEOPT_NATIVE_ISA=avx2 python -m ...     (plays a lesser CPU)

All peers run in one process on the same tensors, one after the other in an order that rotates from turn to turn and
runs backwards in every second one, the caches written over before each call. The clock is the CPU time of the process,
which leaves out the turns of a machine's other tenants (not what they take of its caches and memory bandwidth). Cells
are medians in milliseconds; a ratio is the median, over the turns, of the peer's time divided by that of ``moeopt`` in
the same turn: above 1, moeopt is faster.
``moeopt`` is the op as a model calls it; ``torch kernel`` is its path without native code; ``ORT native`` is the same
kernel as an operator of ONNX Runtime, on the weights as ``ORT unrolled`` stores them; ``OpenVINO`` is there where its
package is, and ``ggml`` where ``ggml_peer.py`` built it; ``distance`` is that of each from ``eager``, which has the
floats that codes stand for. ``ORT MoE`` is that runtime's own node on ready logits, which no model has. On floats
``bound`` is what reading the weights of the experts that are hit takes, and their products, each at the fastest rate of
probes or peers of the same run, one added to the other; ``times the bound`` is the time of ``moeopt`` divided by it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.blocks import BLOCKS, RESULTS, TOKENS, Rates, peers_of, transformers_experts
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops import StackedExpertWeights
from moeopt.ops.kernels.cpu import experts_cpu
from moeopt.ops.measured import cpu_model
from moeopt.ops.native.library import describe

CODED = ("int8", "int4")
FLUSH = 64 << 20
"""Bytes written before each call: twice the last-level cache of the machines that this ran on."""


def peers(
    module: torch.nn.Module, K: int, dtype: torch.dtype, only: list[str] | None
) -> dict[str, Callable[..., Tensor]]:
    found = peers_of(module, compiled=True)
    bank = StackedExpertWeights([module.gate_up_proj.detach()], module.down_proj.detach())
    found["torch kernel"] = lambda x, ids, weights: experts_cpu(x, ids, weights, bank, ExpertsSpec())
    if dtype == torch.float32 and (only is None or "ORT unrolled" in only or "ORT native" in only):
        try:
            from benchmarks.block_peers import _lowering

            found["ORT unrolled"] = _lowering("unrolled", module, K)
            found["ORT native"] = _lowering("native", module, K)
        except ImportError as err:
            print(f"ONNX Runtime: left out, {err}", flush=True)
    for name, make in (("ORT MoE", _moe_node), ("OpenVINO", _openvino), ("ggml", functools.partial(_ggml, K))):
        if dtype == torch.float32 and (only is None or name in only):
            try:
                found[name] = make(module)
            except ImportError as err:
                print(f"{name}: left out, {err}", flush=True)
    return found


def _moe_node(module: torch.nn.Module) -> Callable[..., Tensor]:
    from benchmarks.block_peers import PEERS

    return PEERS["MoE kernel alone"](module)


def _openvino(module: torch.nn.Module) -> Callable[..., Tensor]:
    from benchmarks.block_peers import PEERS

    return PEERS["openvino"](module)


def _ggml(K: int, module: torch.nn.Module) -> Callable[..., Tensor]:
    from benchmarks.ggml_peer import GgmlExperts

    return GgmlExperts(module.gate_up_proj.detach(), module.down_proj.detach(), K, "F32")


def calls_of(block: str, dtype: str, only: list[str] | None) -> dict[str, Callable[..., Tensor]]:
    """The peers of a dtype, or of "int8" and "int4" codes; ``eager`` on the weights that these stand for."""
    E, K, H, I = BLOCKS[block]
    if dtype not in CODED:
        floats = getattr(torch, dtype)
        return peers(transformers_experts(E, K, H, I, floats), K, floats, only)
    from benchmarks import coded_peers

    module = transformers_experts(E, K, H, I, torch.float32)
    found = coded_peers.peers(module, K, dtype, only)
    return found | {"eager": peers_of(module, compiled=False)["eager"]}


def measure(
    block: str, dtype: str, tokens: list[int], turns: int, only: list[str] | None
) -> tuple[dict[str, dict], dict[str, float]]:
    """What each token count took, and the rates of this machine."""
    E, K, H, _ = BLOCKS[block]
    calls = {n: c for n, c in calls_of(block, dtype, only).items() if only is None or n in only or n == "moeopt"}
    floats = torch.float32 if dtype in CODED else getattr(torch, dtype)
    flush, rng = torch.ones(FLUSH, dtype=torch.uint8), torch.Generator().manual_seed(0)
    rows: dict[str, dict] = {}
    rates = None if dtype in CODED else Rates(torch.ones(200 << 20, dtype=torch.uint8), floats)
    if "ORT native" in calls:  # its weights are mapped from a file: no cell pays for the first touch of a page
        visit = torch.arange(E)[:, None].expand(E, K).contiguous()
        calls["ORT native"](torch.zeros(E, H, dtype=floats), visit, torch.ones(E, K, dtype=floats))
    for T in tokens:
        # batched_mm copies the weights of every row
        times: dict[str, list[float]] = {n: [] for n in calls if n != "batched_mm" or T * K <= 32}
        distance, hit = dict.fromkeys(times, 0.0), []
        for turn in range(turns + 1):
            x = torch.randn(T, H, generator=rng).to(floats)
            weights, ids = torch.rand(T, E, generator=rng).topk(K)
            weights, outputs, names = weights.to(floats), {}, list(times)
            for name in (names[turn % len(names) :] + names[: turn % len(names)])[:: -1 if turn % 2 else 1]:
                flush.add_(1)
                start = time.process_time()
                outputs[name] = calls[name](x, ids, weights)
                took = time.process_time() - start
                if turn:  # the first turn warms up
                    times[name].append(took)
            hit.append(ids.unique().numel())
            if "eager" in outputs:
                want = outputs["eager"].double()
                for name, y in outputs.items():
                    distance[name] = max(distance[name], ((y.double() - want).norm() / want.norm()).item())
        mine = times["moeopt"]
        rows[str(T)] = {
            "ms": {n: round(1e3 * statistics.median(t), 3) for n, t in times.items()},
            "ratio": {
                n: round(statistics.median(a / b for a, b in zip(t, mine, strict=True)), 3)
                for n, t in times.items()
                if n != "moeopt"
            },
            "distance": {n: float(f"{d:.2g}") for n, d in distance.items() if "eager" in times},
            "experts hit": statistics.mean(hit[1:]),
        }
        if rates:
            rates.probe()
        cells = "  ".join(f"{n} {rows[str(T)]['ms'][n]:.2f} ({r:.2f})" for n, r in rows[str(T)]["ratio"].items())
        print(f"  T={T:<4d} moeopt {rows[str(T)]['ms']['moeopt']:.2f}  {cells}", flush=True)
    if rates is None:
        return rows, {}
    return rows, beside_the_bound(rows, rates, block)


def beside_the_bound(rows: dict[str, dict], rates: Rates, block: str) -> dict[str, float]:
    """Write to each row its bound and how many times that the op took; the rates of this machine.

    A library's large product is no bound where a peer multiplied faster than that: the fastest of all counts.
    """
    for T, row in rows.items():
        reading, multiplying = rates.milliseconds(block, int(T), row["experts hit"])
        fastest = min(row["ms"].values())
        rates.read *= max(1, reading / fastest)
        rates.gemm *= max(1, multiplying / fastest)
    for T, row in rows.items():
        reading, multiplying = rates.milliseconds(block, int(T), row["experts hit"])
        row["bound"] = {"reading": round(reading, 3), "multiplying": round(multiplying, 3)}
        row["times the bound"] = round(row["ms"]["moeopt"] / (reading + multiplying), 3)
        print(f"  T={T:<4s} {row['times the bound']:.2f} times {reading:.2f} + {multiplying:.2f}", flush=True)
    return {"read GB/s": round(rates.read / 1e9, 1), "product GFLOP/s": round(rates.gemm / 1e9, 1)}


def _versions() -> dict[str, str]:
    from benchmarks import ggml_peer

    found = {name: version(name) for name in ("transformers", "onnxruntime", "openvino") if find_spec(name)}
    try:
        return found | {"ggml": ggml_peer.version()}
    except ggml_peer.Missing:
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block", choices=BLOCKS, default="mixtral-small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", *CODED), default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="these peers, beside moeopt")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    E, K, H, I = BLOCKS[args.block]
    if args.dtype in CODED:
        from benchmarks.coded_peers import ACTIVATIONS
    limits = (
        "ATEN_CPU_CAPABILITY",
        "ONEDNN_MAX_CPU_ISA",
        "MKL_ENABLE_INSTRUCTIONS",
        "MOEOPT_NATIVE",
        "MOEOPT_NATIVE_ISA",
    )
    about = {
        "command": " ".join(["python -m benchmarks.native_experts", *sys.argv[1:]]),
        "environment": {name: os.environ[name] for name in limits if name in os.environ},
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernel": describe().split(" ")[0],
        "clock": "CPU time of the process, one thread",
        "versions": {"torch": torch.__version__, "python": platform.python_version(), **_versions()},
        "block": {"name": args.block, "E": E, "K": K, "H": H, "I": I, "dtype": args.dtype},
        "turns": args.turns,
        **({"activations": ACTIVATIONS} if args.dtype in CODED else {}),
    }  # fmt: skip
    print(
        f"{args.block} (E={E} K={K} H={H} I={I}) {args.dtype}, {about['capability']} {about['environment']}", flush=True
    )
    load = [round(os.getloadavg()[0], 1)]
    rows, rates = measure(args.block, args.dtype, args.tokens, args.turns, args.only)
    load.append(round(os.getloadavg()[0], 1))
    if args.save:
        text = json.dumps({**about, "load average, before and after": load, "rates": rates, "tokens": rows}, indent=1)
        (RESULTS / f"{args.save}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
