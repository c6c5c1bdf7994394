"""The spellings of one expert's matrix product on this CPU: what ``choose_gemm`` in the CPU kernel measures, at length.

    python benchmarks/gemm.py --dtype float32 --threads 1

W is (O, I); the spellings take turns over enough copies of W that none stays in cache. Cells are medians
in microseconds; ``*`` marks the spelling that the kernel chose by its own short measurement.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from moeopt.ops.kernels.gemm import choose_gemm, spellings

SHAPES = ((7168, 1024), (1024, 3584), (1536, 2048), (2048, 768), (768, 512))
ROWS = (1, 2, 3, 4, 8, 16, 32, 48, 64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--column-major", action="store_true", help="W lies with O contiguous (the `io` layout)")
    parser.add_argument("--megabytes", type=int, default=400, help="copies of W to cycle through")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    dtype = getattr(torch, args.dtype)
    for O, I in SHAPES:
        copies = max(3, args.megabytes * 10**6 // (O * I * dtype.itemsize))
        first = torch.randn(O, I).to(dtype)
        weights = [first.t().contiguous().t() if args.column_major else first.clone() for _ in range(copies)]
        print(f"\nW ({O}, {I}) {args.dtype}, {args.threads} threads, torch {torch.__version__}, microseconds")
        for rows in ROWS:
            x = torch.randn(rows, I).to(dtype)
            names = list(spellings(x, weights[0]))
            times: dict[str, list[float]] = {name: [] for name in names}
            for turn in range(7 * len(names)):
                name = names[turn % len(names)]
                call = spellings(x, weights[turn % copies])[name]
                start = time.perf_counter()
                call()
                times[name].append(1e6 * (time.perf_counter() - start))
            chosen = choose_gemm(rows, dtype, not args.column_major, O * I)
            cells = (f"{n}{'*' if n == chosen else ''} {statistics.median(ts):.0f}" for n, ts in times.items())
            print(f"  M={rows:<4d}" + "  ".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
