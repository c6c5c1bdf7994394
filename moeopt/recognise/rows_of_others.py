"""Experts whose result for one token is made of the rows of others: neighbours in a graph, attention.

    y = a @ e(x)                        a made before the experts: rows of neighbours are added up
    y = softmax(q(x) @ k(x).T) @ v(x)   products of the rows with each other

    (m(x) / s(x)).sum(0)                results of experts weigh those of others
    scores(x).topk(4, dim=tokens)       the tokens are compared with each other, and the best are picked

Looked for only to say why a block is left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import fx, nn

from moeopt.capture.op_kinds import CHOICES_AMONG, is_matmul, moves_rows, op_name
from moeopt.capture.replay import ancestors, descendants
from moeopt.capture.tape import Call, Tape
from moeopt.capture.tree import leaves_of
from moeopt.errors import Declined
from moeopt.recognise.gemm_sites import weight_and_operand
from moeopt.value_types import FxArg

_STEPS = 128
"""Calls that are looked at on the way from a product to what picked its rows."""
_JOINS = ("sum", "index_add", "scatter_add", "index_put", "scatter")
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


def adds_up_neighbours(tape: Tape, experts: Mapping[nn.Module, nn.Module]) -> Declined | None:
    """The reason for ``experts``, modules of lists whose Parameters have the same shapes, where a product inside of a
    single one, or on its result alone, adds up rows, by a matrix that is no weight and was made before them."""
    memo: dict[fx.Node, bool] = {}
    for first, node in _products_of_one(tape, experts):
        if weight_and_operand(node, memo) is not None:
            continue
        by, rows = (_unmoved(a) for a in node.args[-2:])
        before = by.op == "placeholder" or by.meta["index"] < first
        if before and any(n.op == "placeholder" for n in ancestors([rows])) and by is not rows:
            return Declined(
                f"each of its experts adds up rows of several tokens ({op_name(node)} with a matrix that is made "
                "before the experts, as of neighbours in a graph), so that a token's result depends on the "
                "others; where that is the first thing they do, compute it once before them (h = a @ x), and let "
                "them read the rows of h; only functions of each token's own row are grouped",
                node.meta.get("source", ""),
            )
    return None


def attends_inside(tape: Tape, experts: Mapping[nn.Module, nn.Module]) -> fx.Node | None:
    """An attention inside a call of one of the ``experts``, of a list whose modules do not run one behind another."""
    homes: dict[nn.Module, list[Call]] = {}
    for call in tape.calls:
        if call.module in experts:
            homes.setdefault(experts[call.module], []).append(call)
    for ran in homes.values():
        behind = ancestors(leaves_of(fx.Node, [ran[-1].args, ran[-1].kwargs]))
        if len(ran) > 1 and behind.isdisjoint(leaves_of(fx.Node, ran[0].output)):
            for node in tape.nodes[ran[0].first : ran[0].last]:
                if "scaled_dot_product" in op_name(node):
                    return node
    return None


def _products_of_one(tape: Tape, experts: Mapping[nn.Module, nn.Module]) -> Iterator[tuple[int, fx.Node]]:
    """Products that belong to one expert, and the index of its first node: in a call of it, or behind calls of the
    layers of this one, where the code of the block calls these, with what no router's product or choice made."""
    for call in tape.calls:
        if call.module in experts:
            yield from ((call.first, n) for n in tape.nodes[call.first : call.last] if op_name(n) in _PRODUCTS)
    memo: dict[fx.Node, bool] = {}
    of_one: dict[fx.Node, nn.Module | None] = {}
    starts: dict[nn.Module, int] = {}
    for call, expert in _layers(tape, experts):
        starts.setdefault(expert, call.first)
        of_one.update(dict.fromkeys(tape.nodes[call.first : call.last], expert))
    for node in tape.nodes if starts else ():
        if node in of_one:
            continue
        owners = {of_one[a] for a in node.all_input_nodes if a in of_one}
        if owners:
            of_one[node] = owners.pop() if len(owners) == 1 else None
        owner = of_one.get(node)
        if op_name(node) not in _PRODUCTS or owner is None:
            continue
        others = [a for a in node.all_input_nodes if a not in of_one]
        routes = (op_name(n) in CHOICES_AMONG or _by_a_weight(n, memo) for n in ancestors(others))
        if not any(routes):
            yield starts[owner], node


def _by_a_weight(node: fx.Node, memo: dict[fx.Node, bool]) -> bool:
    return is_matmul(node) and weight_and_operand(node, memo) is not None


def _layers(tape: Tape, experts: Mapping[nn.Module, nn.Module]) -> Iterator[tuple[Call, nn.Module]]:
    """Calls of experts, and of modules inside of an expert that is not called as a whole; with this expert."""
    inside = {part: expert for expert in experts for part in expert.modules()}
    return ((call, inside[call.module]) for call in tape.calls if call.module in inside)


def multiplied_with_each_other(tape: Tape, products: Sequence[fx.Node]) -> fx.Node | None:
    """A product of two matrices that both are made of what the ``products`` with the experts' weights give."""
    after = {*products, *descendants(tape, products)} if products else set()
    memo: dict[fx.Node, bool] = {}
    for node in tape.nodes:
        if op_name(node) in _PRODUCTS and all(a in after for a in node.args[-2:]):
            if weight_and_operand(node, memo) is None:
                return node
    return None


def weighed_by_another(results: Collection[fx.Node], after: Sequence[fx.Node]) -> Declined | None:
    """The reason where one of the ``results`` of experts, moved at most, is multiplied with what is made of another.

    Args:
        after: the nodes that depend on a result, in order.
    """
    made = {*results, *after}
    for node in after:
        inputs = node.all_input_nodes
        if op_name(node) in ("mul", "div") and len(inputs) == 2 and all(a in made for a in inputs):
            if any(_unmoved(a) in results for a in inputs):
                return Declined(
                    f"its experts' results weigh one another ({op_name(node)}, as precisions weigh means where normal "
                    "distributions are multiplied), and the op weighs them by what a router gives before they run; "
                    "this block stays as it is: each of its experts runs once",
                    node.meta.get("source", ""),
                )
    return None


def chosen_among_tokens(tape: Tape) -> Declined | None:
    """The reason where a product with a weight multiplies rows that a comparison of the tokens with each other picked:
    expert choice, a balanced assignment, a branch for the best few tokens."""
    memo: dict[fx.Node, bool] = {}
    for node in tape.nodes:
        found = weight_and_operand(node, memo) if is_matmul(node) else None
        choice = None if found is None else _choice_of_rows(found[1])
        if choice is not None:
            return Declined(
                "which rows its experts see is chosen by a comparison of the tokens with each other "
                f"({op_name(choice)} over the tokens, as in expert choice, a balanced assignment or a branch for the "
                "best tokens), so that a token's experts depend on the other tokens; the op routes each token by "
                "itself",
                choice.meta.get("source", ""),
            )
    return None


def _choice_of_rows(rows: fx.Node) -> fx.Node | None:
    """The top-k or sort over the tokens by which a product's ``rows`` were picked; None where none picked them."""
    stack, seen = [rows], set[fx.Node]()
    while stack and len(seen) < _STEPS:
        node = stack.pop()
        if node in seen or is_matmul(node) or op_name(node) in _JOINS:
            continue
        seen.add(node)
        for axis, places in _picks(node):
            choice = _unmoved(places)
            if op_name(choice) in ("topk", "sort") and not _joined(node):
                scores, size = choice.all_input_nodes[0].meta, node.all_input_nodes[0].meta["shape"][axis]
                if scores["dtype"].is_floating_point and scores["shape"][_dim_of(choice)] == size:
                    return choice
        stack.extend(node.all_input_nodes)
    return None


def _picks(node: fx.Node) -> Iterator[tuple[int, fx.Node]]:
    """The axes along which ``node`` picks rows, not features, each with the places that it picks there."""
    if op_name(node) in ("gather", "index_select"):
        pairs = [(int(node.args[1]), node.args[2])]  # type: ignore[arg-type]
    elif op_name(node) == "index":
        pairs = list(enumerate(node.args[1]))  # type: ignore[arg-type]
    else:
        return
    rank = len(node.all_input_nodes[0].meta["shape"])
    yield from ((axis, p) for axis, p in pairs if isinstance(p, fx.Node) and axis % rank < rank - 1)


def _joined(pick: fx.Node) -> bool:
    """Whether what is picked from was put together of several parts, such as the results of experts."""
    node = pick.all_input_nodes[0]
    while moves_rows(node) and node.all_input_nodes:
        if op_name(node) in ("cat", "stack"):
            return True
        node = node.all_input_nodes[0]
    return is_matmul(node)


def _dim_of(choice: fx.Node) -> int:
    names = [a.name for a in choice.target._schema.arguments]  # type: ignore[union-attr]
    at = names.index("dim")
    dim: FxArg = choice.args[at] if len(choice.args) > at else choice.kwargs.get("dim", -1)
    return int(dim)


def _unmoved(node: FxArg) -> fx.Node:
    """What a matrix was before it was moved."""
    assert isinstance(node, fx.Node)
    moved: fx.Node = node
    while moves_rows(moved) and moved.all_input_nodes:
        moved = moved.all_input_nodes[0]
    return moved
