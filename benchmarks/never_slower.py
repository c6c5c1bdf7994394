"""Where is a rewritten block slower than no rewrite at all? Every form of ``forms.py`` at every size and dtype.

    OMP_NUM_THREADS=1 python -m benchmarks.never_slower --save
    OMP_NUM_THREADS=1 python -m benchmarks.never_slower --dtypes float64 --hidden 64 --forms every

A cell is the median, over turns in both orders, of the original's time divided by the rewritten block's, guards, router
and call included, in CPU time of the thread; ``--threads 2`` is by the clock, so for a quiet machine. ``--isa avx2``
keeps torch, oneDNN and the kernel to that instruction set.
What is below ``--least`` is told again at the end, worst first. A declined block is its own original, and has no cell.
A call left to the original code (``moeopt.pipeline.quicker_original``) has one: ``MOEOPT_MEASURE=off`` leaves none.
``--gradients`` records what a backward pass would need, as a model does that runs without ``torch.no_grad()``.
``--training`` times that and the backward pass of a weighted sum, to the tokens and all Parameters.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import moeopt
from benchmarks.forms import FORMS, SEQUENCES
from benchmarks.original_blocks import ratio
from moeopt.ops.measured import cpu_model
from moeopt.rewrite.install import rewritten_forward

RESULTS = Path(__file__).parent / "results"


def cells(name: str, dtype: torch.dtype, hidden: int, asked: argparse.Namespace) -> dict[int, float] | str:
    """By the number of tokens; a reason where the block is left alone."""
    torch.manual_seed(0)
    E, K, I = asked.experts, asked.top, hidden
    block: nn.Module = FORMS[name](E, K, hidden, I).to(dtype).eval()
    sequence = name.startswith(SEQUENCES)
    x = torch.randn(max(24, *asked.tokens), hidden).to(dtype)

    def tokens(T: int) -> torch.Tensor:
        return x[None, :T] if sequence else x[:T]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            block(tokens(24))
        except (RuntimeError, ValueError, NotImplementedError) as err:  # an op that has no kernel for the dtype
            return f"runs nowhere: {str(err).splitlines()[0][:90]}"
        # which experts have a gradient is found by verification
        verify = "fast" if torch.is_grad_enabled() else "off"
        fast = moeopt.optimize(copy.deepcopy(block), tokens(24), verify=verify, progress=False)
    if not any(rewritten_forward(m) is not None for m in fast.model.modules()):
        return f"declined: {fast.report.blocks[0].reason[:90] if fast.report.blocks else 'no block'}"
    calls = [step_of(model.train()) if asked.training else model for model in (block, fast.model)]
    return {T: ratio(*calls, tokens(T), asked.seconds) for T in asked.tokens}


def step_of(block: nn.Module) -> Callable[[torch.Tensor], None]:
    """One training step of ``block``, without an optimizer's."""
    weights = list(block.parameters())

    def step(x: torch.Tensor) -> None:
        for weight in weights:
            weight.grad = None
        found = block(x.detach().requires_grad_())
        y = found[0] if isinstance(found, tuple) else found
        y.backward(x.view_as(y))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top", type=int, default=2, help="experts of a token")
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 256, 1024], help="also the experts' width")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float64"])
    parser.add_argument("--forms", nargs="+", help="beginnings of the names in forms.py")
    parser.add_argument("--seconds", type=float, default=0.05, help="CPU time of a cell")
    parser.add_argument("--least", type=float, default=0.95)
    parser.add_argument("--gradients", action="store_true", help="with gradients recorded")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--training", action="store_true", help="with gradients recorded, and the backward pass")
    parser.add_argument("--isa", choices=["avx2"], help="play a lesser instruction set")
    parser.add_argument("--save", nargs="?", const="", metavar="SUFFIX", help="of the file's name")
    asked = parser.parse_args()
    if asked.isa and "ATEN_CPU_CAPABILITY" not in os.environ:  # read when torch is loaded: begin anew
        limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
        os.environ.update(limits, MOEOPT_NATIVE_ISA="avx2")
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.never_slower", *sys.argv[1:]])
    torch.set_num_threads(asked.threads)
    torch.set_grad_enabled(asked.gradients or asked.training)
    chosen = [n for n in FORMS if asked.forms is None or n.startswith(tuple(asked.forms))]
    rows: list[dict[str, object]] = []
    low: list[tuple[float, str]] = []
    for dtype in asked.dtypes:
        for hidden in asked.hidden:
            for name in chosen:
                found = cells(name, getattr(torch, dtype), hidden, asked)
                where = f"{dtype} H={hidden} {name}"
                if isinstance(found, str):
                    print(f"{where}: {found}", flush=True)
                    continue
                print(f"{where}: {'  '.join(f'T={T} {r:.2f}' for T, r in found.items())}", flush=True)
                rounded = {T: round(r, 2) for T, r in found.items()}
                rows.append({"form": name, "dtype": dtype, "hidden": hidden, "ratios": rounded})
                low += [(r, f"{where} T={T}") for T, r in found.items() if r < asked.least]
    count = sum(len(row["ratios"]) for row in rows)  # type: ignore[arg-type]
    print(f"{len(low)} of {count} cells below {asked.least}")
    for r, where in sorted(low):
        print(f"  {r:.2f} {where}")
    if asked.save is not None:
        isa = torch.backends.cpu.get_cpu_capability()
        about = {
            "command": " ".join(["python -m benchmarks.never_slower", *sys.argv[1:]]), "cpu": cpu_model(), "isa": isa,
            "torch": torch.__version__, "moeopt": moeopt.__version__, "python": platform.python_version(),
            "load": os.getloadavg(), "experts": asked.experts, "top": asked.top, "rows": rows,
        }  # fmt: skip
        suffix = f"-{asked.save}" if asked.save else ""
        path = RESULTS / f"never-slower-{isa.lower()}-{asked.threads}t{suffix}.json"
        path.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
