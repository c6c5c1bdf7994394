"""Quantised experts on the CPU beside float32 ones: ``python benchmarks/quantised.py [threads [file.json]]``.

One block, E=8, K=2, 1024 x 3584, by the op; the least of some calls, by the thread's CPU time.
"""

import json
import sys
import time
from pathlib import Path

import torch

from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_format import INT4_BLOCK32, INT8_CHANNEL
from moeopt.ops import ListExpertWeights, experts
from moeopt.ops.native.library import describe
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices

E, K, H, I = 8, 2, 1024, 3584


def main(threads: int = 1, out: str = "") -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    w_in, w_out = [torch.randn(2 * I, H) / 32 for _ in range(E)], [torch.randn(H, I) / 60 for _ in range(E)]
    banks = {"float32": ListExpertWeights([w_in], w_out)}
    for format in (INT8_CHANNEL, INT4_BLOCK32):
        matrices = [QuantizedMatrices.of([quantize(w, format) for w in ws]) for ws in (w_in, w_out)]
        banks[format.name] = QuantizedExpertWeights(matrices[:1], matrices[1])
    print(f"torch {torch.__version__}, {threads} thread(s), native kernel: {describe()}")
    found = {}
    for T in (1, 4, 16, 64, 256):
        x, weights = torch.randn(T, H), torch.rand(T, K)
        ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
        times = {}
        with torch.no_grad():
            for name, bank in banks.items():
                taken = []
                for _ in range(7):
                    started = time.process_time()
                    experts(x, ids, weights, bank, ExpertsSpec())
                    taken.append(time.process_time() - started)
                times[name] = 1e3 * min(taken)
        found[str(T)] = {name: round(ms, 2) for name, ms in times.items()}
        print(f"T={T:<4}", "  ".join(f"{name} {ms:7.2f} ms" for name, ms in times.items()))
    if out:
        Path(out).write_text(json.dumps({"milliseconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
