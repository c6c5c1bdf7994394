"""Whether experts that are a function of a row would run quicker one by one than in the block's own code.

Such experts have no grouped kernel in PyTorch: the op makes the calls of each expert that was hit, as the block does.
What it saves is the dispatch around them, experts that nobody chose, and rows that are thrown away. Both sides are
counted on the recorded call that reached every expert:

    seconds = calls * CALL + FLOPs of the products / FLOPS

Only the sign of the difference counts. The constants are round figures of one core of a server CPU.
"""

from __future__ import annotations

from moeopt.capture.op_kinds import op_name
from moeopt.capture.replay import ancestors
from moeopt.errors import Declined
from moeopt.ir.row_function import RowBody, RowFunction, Value
from moeopt.recognise.recognition import Recognition

CALL, FLOPS = 4e-6, 1e11
"""Seconds of one small call of the block's own code, and products' FLOPs in a second."""
NODE, EXPERT, AROUND = 0.5, 3, 40
"""In such calls: one call of the graph (no module and no Python around it), what is done for each expert (its rows, the
look-up of its weights), and what is done once (the sort, the sum, the guard of the rewritten block)."""
_FREE = ("detach", "getitem", "alias", "t")


class WouldNotPay(Declined):
    """The block was read, and the op would be no quicker than its own code. ``found``: as what it was read."""

    found: list[Recognition] = []


def check_pays(recognitions: list[Recognition]) -> None:
    """Raise :class:`WouldNotPay` where one of the ``recognitions`` is better left alone."""
    for one in recognitions:
        if isinstance(one.spec, RowFunction) and (reason := _reason(one, one.spec)):
            error = WouldNotPay(reason, one.source or None)
            error.found = recognitions
            raise error


def _reason(recognition: Recognition, spec: RowFunction) -> str:
    body = spec.body
    sources = [recognition.tokens.node, recognition.routing.weights.source, recognition.base]
    sources += [recognition.routing.ids.source] if recognition.routing.ids is not None else []
    before = ancestors([n for n in sources if n is not None])
    own = [
        n for n in ancestors([recognition.combine.node]) - before if n.op == "call_function" and op_name(n) not in _FREE
    ]
    per_row = 2.0 * sum(shape[0] * shape[1] for _, shape in body.slots if len(shape) == 2)
    hit = len(set(recognition.experts))
    readers = sum(Value(0) in args for _, args, _ in body.nodes)  # each is a site with all rows of its expert
    rows_own = sum(len(t) for t in recognition.tokens.token.values()) / max(readers, 1)
    rows_new = recognition.tokens.count * (recognition.routing.per_token or hit)
    calls_new = AROUND + hit * (NODE * len(body.nodes) + EXPERT)
    saved = (len(own) - calls_new) * CALL + (rows_own - rows_new) * per_row / FLOPS
    if saved > 0:
        return ""
    if recognition.kept_from_grouped:
        return recognition.kept_from_grouped
    what = words(body)
    if what == _COUNTS[2] and recognition.unmatched_reason:  # what the grouped op has: what kept it from that decides
        return recognition.unmatched_reason
    return (
        f"its experts are {what}, a function of a row that no grouped kernel has; PyTorch would run it expert "
        "by expert, which would not pay here: the block's own code makes as few calls on as few rows; "
        "backend='onnxruntime' takes it"
    )


def words(body: RowBody) -> str:
    """What stands in a function of a row: "three matmuls (three layers) with native_layer_norm"."""
    products, layers = body.products(), body.layers()
    what = "a gated pair of matmuls" if (products, layers) == (3, 2) else _COUNTS.get(products, f"{products} matmuls")
    others = [n for n in body.names() if n not in _USUAL]
    return what + (f" with {', '.join(others)}" if others else "")


_USUAL = ("mm", "addmm", "linear", "relu", "gelu", "silu", "mul", "add")
_COUNTS = {1: "one matmul", 2: "two matmuls", 3: "three matmuls (three layers)"}
