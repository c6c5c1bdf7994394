"""Experts that share one product: a first layer of all of them that is cut into parts, or a last one that adds them up.

    h_TF = gelu(x @ W1_DF)          F = E * I: expert e has the neurons e * I to (e + 1) * I
    y = sum_e  w_te * (h_T[e] @ W2_eID)
    y = sum_e  w_te * ((x @ A) @ B_e)   one product by all B_e, behind one that they share

Every token meets every expert's neurons in one product, so no expert has a first matrix, or rows, of its own to group.
Looked for only to say why a block is left alone.
"""

from __future__ import annotations

import math

from torch import fx

from moeopt.capture.op_kinds import WEIGH, is_matmul, is_pointwise, moves_rows, op_name, picks_rows
from moeopt.capture.replay import ancestors, descendants
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.recognise.gemm_sites import weight_and_operand


def one_product_of_all(tape: Tape) -> Declined | None:
    """The reason for a block whose experts are one product of all of them; None where there is no such product."""
    memo: dict[fx.Node, bool] = {}
    reads = {n: found for n in tape.nodes if is_matmul(n) and (found := weight_and_operand(n, memo)) is not None}
    for last, (weight, operand, _) in reads.items():
        first = _product_before(operand, reads)
        if first is None:
            continue
        wide, own = first.meta["shape"][-1], operand.meta["shape"][-1]
        path, experts = _path(reads[first][0]), wide // max(own, 1)
        line = first.meta.get("source", "")
        if wide == experts * own and experts > 1 and _matrices(reads, first) == experts:
            return Declined(
                f"the first layer of its experts is one product of all of them ({path}: {wide} = {experts} x {own} "
                "neurons), cut into the experts' parts behind it, so no expert has a matrix of its own; keep those "
                f"weights as a Parameter of shape ({experts}, {own}, {reads[first][1].meta['shape'][-1]}), and "
                "multiply each expert's rows by its own part",
                line,
            )
        stack = _stack(weight)
        if wide == own and stack > 1 and stack == _stack(reads[first][0]):
            return Declined(
                "between its experts' matmuls stands something that is not element-wise on each token's row (a weight "
                "for each expert, which weighs the hidden neurons inside one product that adds up all experts, "
                f"{_path(weight)}: {own} = {stack} x {own // stack} neurons); multiply each expert's neurons by its "
                "own matrix (einsum('tei,eid->ted')), then weigh and add up the results",
                last.meta.get("source", ""),
            )
    return None


ONE_MATRIX_EACH = (
    "its experts are one matrix each, and every row passes all of them, weighed by a gate: the op would leave no "
    "product out, so this block stays as it is; to run a few experts for each row, choose them (topk of the gate's "
    "scores) and loop over the experts with the rows that chose them"
)


def matrices_behind_one(tape: Tape) -> Declined | None:
    """The reason for a stack of matrices that one product multiplies by the rows, or by the result of another product,
    which all share, if the input weighs what it gives; None where there is none, or where other stacks follow."""
    memo: dict[fx.Node, bool] = {}
    reads = {n: found for n in tape.nodes if is_matmul(n) and (found := weight_and_operand(n, memo)) is not None}
    for last, (weight, operand, _) in reads.items():
        first, count = _product_before(operand, reads), _stack(weight)
        if count < 2 or (first is not None and _stack(reads[first][0]) > 1) or last.meta["shape"][-1] % count:
            continue
        if picks_rows(operand):  # rows of one expert
            continue
        near = {*ancestors([operand]), *descendants(tape, [last])}
        if any(n in reads and _stack(reads[n][0]) > 1 for n in near):
            continue
        node = last
        while len(node.users) == 1 and moves_rows(next(iter(node.users))):
            node = next(iter(node.users))
        for user in node.users:
            others = [a for a in user.all_input_nodes if a is not node]
            each = any(count in (a.meta.get("shape") or ()) for a in others)
            if op_name(user) in WEIGH and each and any(n.op == "placeholder" for n in ancestors(others)):
                return Declined(ONE_MATRIX_EACH, last.meta.get("source", ""))
    return None


def layers_of_all_before(tape: Tape, rows: fx.Node, experts: int) -> Declined | None:
    """The reason where the ``rows`` that experts read are what one product of as many matrices gave: a layer of theirs
    before the two that were read."""
    memo: dict[fx.Node, bool] = {}
    reads = {n: found for n in tape.nodes if is_matmul(n) and (found := weight_and_operand(n, memo)) is not None}
    first = _product_before(rows, reads)
    if first is None or _stack(reads[first][0]) != experts:
        return None
    return Declined(
        f"its experts have more than two layers and are computed together, in products of all of them "
        f"({op_name(first)} by {_path(reads[first][0])}), and such experts are carried one by one only; call each "
        "expert on its own rows (a loop over the experts, x @ w[e])",
        first.meta.get("source", ""),
    )


def _product_before(operand: fx.Node, reads: dict[fx.Node, tuple[fx.Node, fx.Node, bool]]) -> fx.Node | None:
    """The one product that ``operand`` is made of, by element-wise calls and movement."""
    stack, seen = [operand], set[fx.Node]()
    found = set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in reads:
            found.add(node)
        elif node not in seen and (is_pointwise(node) or moves_rows(node)):
            seen.add(node)
            widest = max((math.prod(a.meta.get("shape") or ()) for a in node.all_input_nodes), default=0)
            stack.extend(a for a in node.all_input_nodes if math.prod(a.meta.get("shape") or ()) == widest)
    return found.pop() if len(found) == 1 else None


def _matrices(reads: dict[fx.Node, tuple[fx.Node, fx.Node, bool]], first: fx.Node) -> int:
    """How many matrices the products behind ``first`` have."""
    behind = [weight for weight, operand, _ in reads.values() if _product_before(operand, reads) is first]
    return sum(int(w.meta["shape"][0]) if len(w.meta["shape"]) == 3 else 1 for w in behind)


def _stack(weight: fx.Node) -> int:
    """E of a matrix that is a whole Parameter of E matrices, laid out; else 1."""
    shapes = [n.meta["shape"] for n in ancestors([weight]) if n.op == "get_attr"]
    whole = math.prod(weight.meta["shape"])
    return next((int(s[0]) for s in shapes if len(s) == 3 and math.prod(s) == whole), 1)


def _path(weight: fx.Node) -> str:
    return next((str(n.target) for n in ancestors([weight]) if n.op == "get_attr"), "its weights")
