"""Matrices of codes that a block makes floats of for every token, or for all experts at once: why, and the way out."""

from __future__ import annotations

from torch import fx

from moeopt.capture.op_kinds import op_name
from moeopt.capture.replay import ancestors
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.row_function import CODES
from moeopt.recognise.router_steers import CHOICES
from moeopt.recognise.weights_for_rows import is_table, of_rows

ONE_AT_A_TIME = "make floats of the codes of one expert where its rows are multiplied: such experts run on the codes"


def codes_for_rows(tape: Tape) -> Declined | None:
    """Matrices of codes, picked by the router for each token and made floats, before or after: gpt-fast's form."""
    for node in tape.nodes:
        if op_name(node) not in ("index", "index_select") or len(node.all_input_nodes) != 2:
            continue
        of, ids = node.all_input_nodes
        codes = codes_behind(of)
        if codes is None or of_rows(of) or len(of.meta.get("shape") or ()) < 3:
            continue
        if any(op_name(a) in CHOICES for a in (ids, *ancestors([ids]))):
            return Declined(
                f"its experts' weights are codes ({codes.target}), and each token gets a copy of the matrices of its "
                f"experts as floats; loop over the experts that are hit, and {ONE_AT_A_TIME}",
                node.meta.get("source"),
            )
    return None


def codes_behind(made: fx.Node) -> fx.Node | None:
    """A stored tensor of codes that ``made`` is, or is computed of."""
    return next((n for n in (made, *ancestors([made])) if is_table(n) and n.meta.get("dtype") in CODES), None)
