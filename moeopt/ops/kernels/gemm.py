"""One expert's matmul on a CPU: the same product has four spellings, and the obvious one is often the slow one.

Shape legend: M rows of x, I in, O out.  y_MO = x_MI @ w_OI.t() + b_O

Which spelling is the fastest depends on the CPU: with AMX ``mm(W, x.T)`` multiplies bfloat16 in half the time of
``F.linear``, without AVX-512 it takes twice as long. So ``choose_gemm`` measures, once for each machine
(:mod:`moeopt.ops.measured`), dtype, layout, size class and power of two of rows; ``benchmarks/gemm.py`` prints all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moeopt.errors import UsageError
from moeopt.ops.measured import Way, fastest

Gemm = Literal["mv", "linear", "mm_t", "onednn"]

LARGE = 1 << 20
"""Elements from which W streams from memory; a smaller W stays in cache."""

MOST_ROWS = 256
"""Rows beyond which the answer does not change any more."""

WORK = 1 << 25
"""Products and sums of one measured call: a few milliseconds for the slowest spelling on the slowest CPU."""


def choose_gemm(rows: int, dtype: torch.dtype, row_major: bool, elements: int) -> Gemm:
    """The fastest spelling for ``rows`` rows and a W (O, I) of ``elements``; ``row_major``: I is contiguous."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "linear"
    return _choose(power_of_two(rows), dtype, row_major, elements >= LARGE, torch.get_num_threads())


def power_of_two(rows: int, most: int = MOST_ROWS) -> int:
    """The smallest power of two that holds ``rows``, at most ``most``."""
    return min(1 << (rows - 1).bit_length(), most)


def pays_to_fill(rows: int, dtype: torch.dtype) -> bool:
    """Whether ``rows`` rows of a 16-bit dtype (2, 4, 8 or 16s) take no longer than few more than half of them.

    So it is where the product works in tiles of 16 rows (AMX), and where reading W is all that counts.
    """
    return _filled(min(power_of_two(rows), 32), dtype, torch.get_num_threads())


def spellings(x_MI: Tensor, w_OI: Tensor, b_O: Tensor | None = None) -> dict[Gemm, Callable[[], Tensor]]:
    """Every spelling of ``F.linear(x_MI, w_OI, b_O)`` that works here, by name."""
    found: dict[Gemm, Callable[[], Tensor]] = {
        "linear": lambda: F.linear(x_MI, w_OI, b_O),
        "mm_t": lambda: _mm_t(x_MI, w_OI, b_O),
    }
    if x_MI.shape[0] == 1:
        found["mv"] = lambda: _mv(x_MI, w_OI, b_O)
    if onednn_linear_works(w_OI.dtype):
        found["onednn"] = lambda: _onednn(x_MI, w_OI, b_O)
    return found


def linear(x_MI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
    """``F.linear``, spelled the fast way; any strides of ``w_OI``; the result may be a transposed view."""
    kind = choose_gemm(x_MI.shape[0], w_OI.dtype, w_OI.stride(1) == 1, w_OI.numel())
    if kind == "mm_t":
        return _mm_t(x_MI, w_OI, b_O)
    if kind == "mv" and x_MI.shape[0] == 1:
        return _mv(x_MI, w_OI, b_O)
    if kind == "onednn" and onednn_linear_works(w_OI.dtype):
        return _onednn(x_MI, w_OI, b_O)
    return F.linear(x_MI, w_OI, b_O)


def linear_into(y_MO: Tensor, x_MI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> None:
    """:func:`linear`, written to the rows ``y_MO``; a ``UsageError`` where they are of another width."""
    check_width(y_MO, w_OI.shape[0])
    kind = choose_gemm(x_MI.shape[0], w_OI.dtype, w_OI.stride(1) == 1, w_OI.numel())
    if kind == "mv" and b_O is None:
        torch.mv(w_OI, x_MI[0], out=y_MO[0])
    elif kind != "linear":
        y_MO.copy_(linear(x_MI, w_OI, b_O))
    elif b_O is None:
        torch.mm(x_MI, w_OI.t(), out=y_MO)
    else:
        torch.addmm(b_O, x_MI, w_OI.t(), out=y_MO)


def check_width(y_MO: Tensor, width: int) -> None:
    """Raise where ``width`` numbers are to be written to each row: torch's ``out=`` would take other memory for it."""
    if y_MO.shape[1] != width:
        raise UsageError(
            f"experts: a product of one expert is {width} wide, and that of another {y_MO.shape[1]}; all experts of a "
            "bank have weights of the same sizes"
        )


def _mm_t(x_MI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
    x_IM = x_MI.t()
    return (torch.mm(w_OI, x_IM) if b_O is None else torch.addmm(b_O.unsqueeze(1), w_OI, x_IM)).t()


def _mv(x_1I: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
    x_I = x_1I[0]
    return (torch.mv(w_OI, x_I) if b_O is None else torch.addmv(b_O, w_OI, x_I)).unsqueeze(0)


def _onednn(x_MI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
    y_MO: Tensor = torch.ops.mkldnn._linear_pointwise(x_MI, w_OI, b_O, "none", [], "")
    return y_MO


@functools.cache
def _choose(rows: int, dtype: torch.dtype, row_major: bool, large: bool, threads: int) -> Gemm:
    del threads  # a part of the machine that the answer is for
    layout, size = "rows" if row_major else "columns", "large" if large else "small"
    question = f"product of {rows} rows, {str(dtype).removeprefix('torch.')}, W in {layout}, {size}"
    return fastest(question, lambda: _ways(rows, dtype, row_major, large), default="linear")  # type: ignore[return-value]


@functools.cache
def _filled(rows: int, dtype: torch.dtype, threads: int) -> bool:
    del threads
    question = f"filling up to {rows} rows, {str(dtype).removeprefix('torch.')}"

    def ways() -> dict[str, Way]:
        few = rows // 2 + 1
        w_OI = _weight(rows, dtype, large=True)
        chosen = {}
        for name, count in (("leave", few), ("fill", rows)):
            x_MI = torch.full((count, w_OI.shape[1]), 0.5, dtype=dtype)
            chosen[name] = spellings(x_MI, w_OI)[choose_gemm(count, dtype, True, LARGE)]
        # so that "fill" wins where it takes at most 2 % longer: ADVANTAGE (1.12) is for real gains, and 8 / 7 is 1.14
        fill = chosen["fill"]
        return {"leave": lambda: [chosen["leave"]() for _ in range(8)], "fill": lambda: [fill() for _ in range(7)]}

    return fastest(question, ways, default="leave") == "fill"


def _ways(rows: int, dtype: torch.dtype, row_major: bool, large: bool) -> dict[str, Way]:
    w_OI = _weight(rows, dtype, large)
    w_OI = w_OI if row_major else w_OI.t().contiguous().t()
    x_MI = torch.full((rows, w_OI.shape[1]), 0.5, dtype=dtype)

    def way(name: Gemm, offset: int) -> Way:
        calls = itertools.count()

        def run() -> Tensor:
            # Experts get any number of rows, not the powers of two that libraries are quickest at. Beyond a few, each
            # prompt has numbers of its own, for which oneDNN compiles a kernel: then no two calls have the same.
            turn = next(calls)
            fewer = 0 if rows < 8 else (5 * turn + 3) % (rows // 2) if rows <= 32 else (4 * turn + offset) % (rows // 4)
            return spellings(x_MI[: rows - fewer], w_OI)[name]()

        return run

    return {name: way(name, offset) for offset, name in enumerate(spellings(x_MI, w_OI))}


def _weight(rows: int, dtype: torch.dtype, large: bool) -> Tensor:
    """A W (O, I) of that size class; for many rows O is cut, so that a call stays a few milliseconds."""
    O, I = (2048, 1024) if large else (512, 512)
    return torch.full((max(64, min(O, WORK // (rows * I))), I), 0.5, dtype=dtype)


@functools.cache
def onednn_linear_works(dtype: torch.dtype) -> bool:
    """Whether oneDNN's private linear exists in this torch and agrees with ``F.linear`` here, on both layouts."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    w_OI = torch.linspace(-1, 1, 24 * 40).reshape(24, 40).to(dtype)
    b_O = torch.linspace(-1, 1, 24).to(dtype)
    x_MI = torch.linspace(1, 2, 5 * 40).reshape(5, 40).to(dtype)
    for w, b in ((w_OI, b_O), (w_OI.t().contiguous().t(), None)):
        want = F.linear(x_MI.double(), w.double(), None if b is None else b.double())
        try:
            got = torch.ops.mkldnn._linear_pointwise(x_MI, w, b, "none", [], "")
        except (RuntimeError, TypeError):  # another schema, or no kernel for this dtype on this CPU
            return False
        # one rounding of the result plus 40 float32 roundings inside: 2 eps of the largest value covers both
        if got.dtype != dtype or (got - want).abs().max() > 2 * max(torch.finfo(dtype).eps, 4e-7) * want.abs().max():
            return False
    return True
