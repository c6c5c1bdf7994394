"""The routing weights that the rows of the experts show: on input, hidden neurons or output; and their dtype."""

from __future__ import annotations

import math

import torch
from torch import fx

from moeopt.capture.op_kinds import is_factory, moves_rows, op_name
from moeopt.capture.replay import ancestors, descendants
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.recognise.combine import Combine, Labels
from moeopt.recognise.ffn_candidates import FFNCandidate
from moeopt.recognise.ffn_groups import source_of
from moeopt.recognise.gemm_sites import GemmSite
from moeopt.recognise.ids_of_masks import one_beyond
from moeopt.recognise.routing_types import Routing
from moeopt.recognise.token_rows import Tokens, rows_of


def input_weights(
    group: list[FFNCandidate], tokens: Tokens, labels: Labels, combine: Combine, linear: bool
) -> torch.Tensor:
    """(T, C) factor on each expert's input row; the outputs must then be summed as they are, or all be scaled by one
    number if the experts are ``linear``: for these it is a factor of the input as well."""
    visits = labels.visits()
    after = combine.weights[visits > 0].double()
    scale = float(after[0]) if linear and len(after) else 1.0
    if not bool((after == scale).all()):
        raise Declined("routing weights act on both the experts' inputs and their outputs", source_of(group[0]))
    weights = torch.zeros(visits.shape, dtype=torch.float64)
    for candidate in group:
        factor, token = tokens.scale[candidate.ins[0]], tokens.token[candidate.ins[0]]
        out_token, out_chain = labels.token[candidate.out], labels.candidate[candidate.out]
        if out_token.shape == token.shape and torch.equal(out_token, token):
            keep = token >= 0
            weights[token[keep], out_chain[keep]] = factor[keep] * scale
        else:
            raise Declined("weighted input rows are reordered inside the experts", source_of(group[0]))
    return weights.to(candidate.ins[0].operand.meta["dtype"])


def hidden_weights(labels: Labels, combine: Combine) -> torch.Tensor:
    """(T, C) factor on each expert's activated row, times that on its output."""
    weights = torch.zeros(combine.weights.shape, dtype=torch.float64)
    for site, token in labels.token.items():
        keep = token >= 0
        factor = labels.hidden[site][keep] if site in labels.hidden else torch.ones(int(keep.sum()))
        weights[token[keep], labels.candidate[site][keep]] = factor.double()
    values = weights[labels.visits() > 0]
    if bool((values == values[:1]).all()) or not bool((combine.weights[labels.visits() > 0] == 1).all()):
        raise Declined(
            "a factor on the rows between an expert's matmuls is not its routing weight, or not the only one"
        )
    return (weights * combine.weights).to(combine.node.meta["dtype"])


def weight_dtype(tape: Tape, group: list[FFNCandidate]) -> torch.dtype | None:
    """dtype of whatever first multiplies an expert's output on its way to the sum."""
    node, steps = group[0].out.node, 0
    while steps < 8:
        users = [u for u in node.users if "index" in u.meta]
        if not users:
            return None
        node, steps = users[0], steps + 1
        if op_name(node) == "mul":
            others = [a for a in node.all_input_nodes if a is not node.args[0]] or node.all_input_nodes
            return others[-1].meta.get("dtype")
        if not moves_rows(node):
            return None
    return None


def passes_through(
    tape: Tape, combine: Combine, tokens: Tokens, routing: Routing, ids: torch.Tensor | None, experts: int
) -> bool:
    """True where a token that no expert serves (capacity) keeps its own value, unweighted."""
    if combine.base is None or ids is None or ids.shape[1] != 1 or not bool((ids >= experts).any()):
        return False
    x = rows_of(tape.value(tokens.node), tokens.axis)
    known = any(op is one_beyond for op, _ in routing.weights.steps)
    return not known and torch.equal(torch.where(ids >= experts, x, 0.0).to(combine.base.dtype), combine.base)


def is_identity(
    tape: Tape, combine: Combine, tokens: Tokens, routing: Routing, ids: torch.Tensor | None, experts: int
) -> bool:
    """True where the sum starts from each token times its weights for ids beyond the experts (LongCat)."""
    if combine.base is None or ids is None or not bool((ids >= experts).any()):
        return False
    weights = torch.where(ids >= experts, routing.weights.run(tape, ids).double(), 0.0).sum(-1, keepdim=True)
    x = rows_of(tape.value(tokens.node), tokens.axis).double()
    want, eps = weights * x, torch.finfo(combine.base.dtype).eps
    return want.shape == combine.base.shape and bool(
        ((combine.base.double() - want).abs() <= 8 * eps * want.abs().amax(-1, keepdim=True)).all()
    )


def factors(tape: Tape, combine: Combine, sites: list[GemmSite]) -> tuple[float, ...]:
    """Constants by which the experts' outputs, or the weights beside them, are multiplied on the way to their sum, and
    their product."""
    between = set(descendants(tape, [s.node for s in sites])) & ancestors([combine.node])
    found: dict[float, None] = {}
    for node in (*between, *_moved_beside(between)):
        scalar = node.args[1] if op_name(node) in ("mul", "div") and len(node.args) > 1 else None
        if op_name(node) == "mean" and (terms := math.prod(node.all_input_nodes[0].meta["shape"])):
            found[math.prod(node.meta["shape"]) / terms] = None
        if isinstance(scalar, (int, float)) and scalar not in (0, 1) and math.isfinite(scalar):
            found[float(scalar) if op_name(node) == "mul" else 1 / scalar] = None
    return tuple(dict.fromkeys([*sorted(found), *([math.prod(found)] if len(found) > 1 else [])]))


def numbers_of_experts(tape: Tape, combine: Combine, sites: list[GemmSite]) -> Declined | None:
    """The reason where each expert's result is multiplied by a number of its own, a Python one or a learned one."""
    scaled: dict[float, fx.Node] = {}
    for site in sites:
        node, number, last = site.node, 1.0, site.node
        for _ in range(8):
            user = next((u for u in node.users if "index" in u.meta), None)
            if user is None or user is combine.node:
                break
            if (factor := _number_of(tape, user, node)) is not None:
                number, last = number * factor, user
            elif not (moves_rows(user) or op_name(user) == "add"):
                break
            node = user
        scaled.setdefault(number, last)
    line = next((n for n in scaled.values() if op_name(n) in ("mul", "div")), None)
    if len(scaled) < 2 or line is None:
        return None
    return Declined(
        f"its experts' results are multiplied by a number of each expert's own ({op_name(line)}), "
        "and the op takes one weight for each token and expert; multiply the weights by these numbers before the "
        "experts run (weights * scale[ids]), or each expert's last matrix and bias by its own",
        line.meta.get("source", ""),
    )


def _number_of(tape: Tape, product: fx.Node, rows: fx.Node) -> float | None:
    """The one number, given or learned, by which ``product`` multiplies or divides all ``rows``; else None."""
    if op_name(product) not in ("mul", "div"):
        return None
    others = [a for a in product.args[:2] if a is not rows]
    by = others[0] if others else rows
    if isinstance(by, fx.Node):
        learned = all(n.op != "placeholder" for n in ancestors([by]))
        if not learned or math.prod(by.meta.get("shape") or ()) != 1:
            return None
        by = float(tape.value(by))
    value = float(by)  # type: ignore[arg-type]
    return value if op_name(product) == "mul" else 1 / value if value else None


def _moved_beside(between: set[fx.Node]) -> set[fx.Node]:
    """What becomes the other factor of a product in ``between``: rows of weights, picked, shaped and scaled."""
    stack = [a for node in between if op_name(node) == "mul" for a in node.all_input_nodes]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        scaled = op_name(node) in ("mul", "div") and len(node.all_input_nodes) == 1
        if node not in between and node not in seen and (scaled or moves_rows(node)):
            seen.add(node)
            stack.extend(node.all_input_nodes[:1])
    return seen


_ONTO = ("index_put", "index_put_", "index_add", "index_add_", "scatter_add", "scatter_add_", "index_copy",
         "index_copy_", "masked_scatter", "masked_scatter_")  # fmt: skip
"""They write rows into their first operand."""


def weighed(tape: Tape, combine: Combine, outs: list[GemmSite]) -> bool:
    """True where a float that depends on the input enters the sum by another way than the experts, and is not what the
    experts are added onto."""
    stack, seen = [combine.node], {s.node for s in outs}
    below = {combine.node, *seen, *descendants(tape, list(seen), combine.node.meta["index"])}
    while stack:
        node = stack.pop()
        dtype = node.meta.get("dtype")
        if node in seen or is_factory(node) or (dtype is not None and not dtype.is_floating_point):
            continue
        seen.add(node)
        if node.op == "placeholder":
            return True
        based = combine.base is not None and node in below
        onto = node.all_input_nodes if op_name(node) == "add" else node.args[:1] if op_name(node) in _ONTO else ()
        stack.extend(a for a in node.all_input_nodes if not based or a in below or a not in onto)
    return False
