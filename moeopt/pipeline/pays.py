"""Whether experts that are a function of a row would run quicker one by one than in the block's own code.

Such experts have no grouped kernel in PyTorch: the op makes the calls of each expert that was hit, as the block does.
What it saves is the dispatch around them, experts that nobody chose, and rows that are thrown away. Both sides are
counted on the recorded call that reached every expert: small calls, and rows of products. Where one side has no more of
either, the counts decide. Where it has fewer calls and more rows, or the other way round, this machine is asked which
of the two differences takes longer (``ops.measured``: milliseconds, once, remembered). Where it may not be asked the
calls decide: such experts see few rows each, and a call costs the same for one row as for many.

Experts that are codes which the kernel in C++ reads have a grouped kernel (``passes/read_codes``) and are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from moeopt.capture.op_kinds import op_name
from moeopt.capture.replay import ancestors
from moeopt.errors import Declined
from moeopt.ir.row_function import GETITEM, RowBody, RowFunction, Value
from moeopt.ops.measured import Way, fastest
from moeopt.passes.read_codes import why_no_kernel
from moeopt.recognise.coded_function import coded_function
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.routing_by_sum import NO_ONE_TENSOR, ONE_TENSOR, SumOfCodes

NODE, EXPERT, AROUND = 0.5, 3, 40
"""In calls of the block's own code: one call of the graph (no module and no Python around it), what is done for each
expert (its rows, the look-up of its weights), and what is done once (the sort, the sum, the guard of the rewritten
block)."""
MOST = 2**26
"""Multiply-adds of the largest product that is timed; larger ones are compared in proportion."""
_FREE = ("detach", "getitem", "alias", "t")


TAKEN = "backend='onnxruntime' takes it"
"""How a reason ends that an engine does not have."""


class WouldNotPay(Declined):
    """The block was read, and the op would be no quicker than its own code. ``found``: as what it was read."""

    found: list[Recognition] = []


def check_pays(recognitions: list[Recognition]) -> None:
    """Raise :class:`WouldNotPay` where one of the ``recognitions`` is better left alone."""
    for one in recognitions:
        if kept := _dispatch_stays(one):  # a module around this one may hold the routing
            raise Declined(kept, one.source or None)
        if isinstance(one.spec, RowFunction) and not _in_kernel(one.spec) and (reason := _reason(one, one.spec)):
            error = WouldNotPay(reason, one.source or None)
            error.found = recognitions
            raise error


def _in_kernel(spec: RowFunction) -> bool:
    """Whether the kernel in C++ reads the codes that ``spec`` makes floats of: the block's own code makes them anew."""
    coded = coded_function(spec)
    return coded is not None and not why_no_kernel(coded)


def _dispatch_stays(recognition: Recognition) -> str:
    """Why a block whose own dispatch would stay around the op is left alone; "" where it would not stay."""
    if not isinstance(recognition.routing.weights, SumOfCodes):
        return ""
    return (
        f"{NO_ONE_TENSOR}, so the block's own dispatch would stay around the op, which PyTorch would run no quicker; "
        f"backend='onnxruntime' takes it as it is; for PyTorch {ONE_TENSOR}"
    )


def _reason(recognition: Recognition, spec: RowFunction) -> str:
    body, work = spec.body, work_of(recognition, spec)
    per_row = sum(shape[0] * shape[1] for _, shape in body.slots if len(shape) == 2)
    calls_new = AROUND + work.experts * (NODE * len(body.nodes) + EXPERT)
    if _quicker(work.calls - calls_new, work.rows - work.rows_grouped, body.features, per_row):
        return ""
    if recognition.kept_from_grouped:
        return recognition.kept_from_grouped
    what = words(body)
    if what == _COUNTS[2] and recognition.unmatched_reason:  # what the grouped op has: what kept it from that decides
        return recognition.unmatched_reason
    return (
        f"its experts are {what}, a function of a row that no grouped kernel has; PyTorch would run it expert "
        "by expert, which would not pay here: the block's own code makes as few calls on as few rows; " + TAKEN
    )


@dataclass(frozen=True)
class CountedWork:
    """What a block's own code does on a recorded call that reached every expert.

    Attributes:
        calls: ops between what the experts read and their sum.
        rows: on which an expert ran; ``rows_grouped``: on which the op would run one, a row for each choice.
        experts: that were hit.
    """

    calls: int
    rows: float
    rows_grouped: int
    experts: int


def work_of(recognition: Recognition, spec: RowFunction) -> CountedWork:
    """The counts of a block whose experts are ``spec``."""
    body = spec.body
    sources = [recognition.tokens.node, recognition.routing.weights.source, recognition.base]
    sources += recognition.tokens.beside
    sources += [recognition.routing.ids.source] if recognition.routing.ids is not None else []
    before = ancestors([n for n in sources if n is not None])
    own = [
        n for n in ancestors([recognition.combine.node]) - before if n.op == "call_function" and op_name(n) not in _FREE
    ]
    hit = len(set(recognition.experts))
    rows = Value(1 + len(body.slots)) if recognition.tokens.beside else Value(0)  # the first part of a row, or all
    readers = sum(rows in args for _, args, _ in body.nodes)  # each is a site with all rows of its expert
    ran = sum(len(t) for t in recognition.tokens.token.values()) / max(readers, 1)
    return CountedWork(len(own), ran, recognition.tokens.count * (recognition.routing.per_token or hit), hit)


def _quicker(calls: float, rows: float, features: int, per_row: int) -> bool:
    """Whether saving ``calls`` small calls and ``rows`` rows of products, of which one may be negative, saves time.

    Args:
        features: the length of a row.
        per_row: multiply-adds of the products of one row.
    """
    if calls * rows >= 0:
        return calls + rows > 0
    parts = max(1.0, abs(rows) * per_row / MOST)
    many, long, width = (
        2 ** round(math.log2(max(1.0, n))) for n in (abs(calls) / parts, abs(rows) / parts, per_row / features)
    )
    question = f"{many} small calls, or {long} rows of {features} x {width}"
    lost = "rows" if calls > 0 else "calls"
    return fastest(question, lambda: _ways(many, long, width, features), default="rows", advantage=1.0) == lost


def _ways(calls: int, rows: int, width: int, features: int) -> dict[str, Way]:
    """So many calls of an op on one row, and one product of so many rows."""
    row, x, w = torch.zeros(1, features), torch.zeros(rows, features), torch.zeros(features, width)

    def small() -> None:
        for _ in range(calls):
            row.add(row)

    return {"calls": small, "rows": lambda: x @ w}


def words(body: RowBody) -> str:
    """What stands in a function of a row: "three matmuls (three layers) with native_layer_norm"."""
    products, layers = body.products(), body.layers()
    what = "a gated pair of matmuls" if (products, layers) == (3, 2) else _COUNTS.get(products, f"{products} matmuls")
    others = [n for n in body.names() if n not in _USUAL]
    if body.tensors > 1:
        inside = sum(op is torch.ops.aten.slice.Tensor for op, _, _ in body.nodes)
        others = [f"rows of {body.tensors} tensors", *(n for n in others if n != "slice" or inside > body.tensors)]
    sums = _calls_of(body, "add")
    if any(Value(0) in args for _, args, _ in sums):
        others.append("the row itself added")
    if sums and sums[-1] is body.nodes[-1] and type(sums[-1][1][1]) in (int, float):
        others.append("a number added")
    vectors = {Value(1 + at) for at, (_, shape) in enumerate(body.slots) if len(shape) == 1 and shape[0] > 1}
    for name, does in (("mul", "multiplied"), ("add", "added")):
        if any(not vectors.isdisjoint(_slots_of(args)) for _, args, _ in _calls_of(body, name)):
            others.append(f"a vector {does}")
    if not products:
        return ", ".join(others) or "element-wise functions of the row"
    return what + (f" with {', '.join(others)}" if others else "")


def _calls_of(body: RowBody, name: str) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    return [n for n in body.nodes if n[0] != GETITEM and n[0]._schema.name == f"aten::{name}"]


def _slots_of(args: tuple[Any, ...]) -> set[Value]:
    return {a for a in args if isinstance(a, Value)}


_USUAL = ("mm", "addmm", "linear", "relu", "gelu", "silu", "mul", "add")
_COUNTS = {1: "one matmul", 2: "two matmuls", 3: "three matmuls (three layers)"}
