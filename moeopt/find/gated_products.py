"""Places of mixtures whose experts are one matrix each, which every row passes: a gate weighs them, and picks none.

    y = sum over e of gate(x)[e] * f(x W_e)        f is element-wise, or nothing
    y = (gate(x) outer x) W                        the same in one einsum: W holds all matrices, one behind the other
    y = stack(f(x W_e))[ids(x)]                    all run, and a choice picks one result or a few
    y = sum over e of table[e] * f(x W_e)          the table is zeros, but where a choice puts its weights
    y = sum over e of gate(x)[e] * ifft(fft(x) W_e)    a complex matrix for every frequency

Such are mixed adapters that share their matrix down, one-layer experts of recommenders, blended projections. Looked for
from the gate, which has one number for each product and row: a softmax over heads or places weighs something else.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Iterable, Iterator

from torch import fx

from moeopt.capture.op_kinds import CHOICES_AMONG, WEIGH, is_matmul, is_pointwise, moves_rows, op_name
from moeopt.capture.replay import ancestors, descendants
from moeopt.find.block_candidates import BlockCandidate, identity_of, laid_out_flat, len_of_stack
from moeopt.find.forward_walk import ForwardWalk
from moeopt.find.gates import choice_of_table, chooser_of, chosen_among, leaves_out, size_of
from moeopt.find.light_sites import leaf_of
from moeopt.find.unread_blocks import UnreadBlocks
from moeopt.recognise.gemm_sites import weight_and_operand
from moeopt.recognise.product_of_all import ONE_MATRIX_EACH

_TRANSFORMS = ("_fft_c2r", "_fft_c2c", "copy", "slice_scatter", "_softmax", "softmax")
"""On the way from a product of frequencies, or from scores of an expert's own, to what is weighed."""
_FOURIER = (
    "its experts are Fourier layers, one complex matrix each for every frequency, and every row passes all of them, "
    "weighed by a gate: the op groups two real matrices for each expert and would leave no product out, so this block "
    "stays as it is"
)
_OF_ONE_STACK = (
    "its experts are matrices of one stack ({}), and one product multiplies every row by all of them, of which the "
    "chosen results are kept: such a product is read where each expert has another one behind it, and not alone; to "
    "run the chosen alone, loop over the experts with the rows that chose them (row, slot = torch.where(ids == e); "
    "y.index_add_(0, row, (x[row] @ W[e]) * weights[row, slot, None]))"
)
_STEPS = 256
"""Calls that are looked at on the way from a gate to its products."""
_BEHIND = 4096
"""Calls that are looked at on the way back from joined results to all products that gave these: several each."""


def gated_products(unread: UnreadBlocks) -> Iterator[BlockCandidate]:
    """The mixtures that the gates in the run of ``unread`` weigh; those of one call that share products are one."""
    memo: dict[fx.Node, bool] = {}
    mixtures: list[tuple[int, dict[fx.Node, None]]] = []
    chosen = set[fx.Node]()  # all run, and a choice leaves some out of the sum: a reader may take them
    inputs = [n for n in unread.tape.nodes if n.op == "placeholder"]
    for gate in descendants(unread.tape, inputs):  # a blend that is the same for all inputs routes nothing
        choice = chooser_of(gate)
        width, rows = size_of(gate if choice is None else choice)
        reached, some = _reached(gate, choice, width, memo) if width > 1 else ([], False)
        some = some or (bool(reached) and leaves_out(gate))
        chosen.update(p for p in reached if some and not _of_cubes(p))
        for products in _sets(unread, reached, memo):
            if not _one_each(products, width, rows) or any(
                _path(unread, p, memo) not in unread.named for p in products
            ):
                continue
            inside = [set(unread.tape.stack(p.meta["call"])) for p in (gate, *products)]
            home = max(set.intersection(*inside))
            shared = next(
                (held for call, held in mixtures if call == home and not held.keys().isdisjoint(products)), {}
            )
            if not shared:
                mixtures.append((home, shared))
            shared.update(dict.fromkeys(products))
    for home, held in mixtures:
        yield _place(unread, home, list(held), not chosen.isdisjoint(held), memo)


def _place(
    unread: UnreadBlocks, home: int, held: list[fx.Node], picked: bool, memo: dict[fx.Node, bool]
) -> BlockCandidate:
    """The place of the products ``held`` in a call. ``picked``: a choice leaves some of their results out."""
    weights = {id(unread.named[path]) for p in held if (path := _path(unread, p, memo)) in unread.named}
    place = unread.place(unread.tape.calls[home], min(p.meta["index"] for p in held), _count(held), weights)
    if _by_frequency(held[0]):
        return dataclasses.replace(place, experts=len(weights), reason=_FOURIER)
    if _behind_own_products(held, memo):
        return place
    if not picked:
        each = _of_heads(held[0])[1] if len(held) == 1 and _count(held) == _of_heads(held[0])[0] else 0
        return dataclasses.replace(place, experts=each or place.experts, reason=ONE_MATRIX_EACH)
    of_a_stack = _OF_ONE_STACK.format(_path(unread, held[0], memo)) if len(held) == 1 else ""
    return dataclasses.replace(place, unread=of_a_stack)


def _sets(unread: UnreadBlocks, reached: list[fx.Node], memo: dict[fx.Node, bool]) -> list[list[fx.Node]]:
    """The products of each stack, or of names that differ by a number; and all together, where there are several such:
    some of a gate's own, and some that others share."""
    by_name: dict[str, list[fx.Node]] = {}
    for product in reached:
        path = _path(unread, product, memo)
        stack = path in unread.named and unread.named[path].dim() > 2
        by_name.setdefault(path if stack else re.sub(r"\d+", "#", path), []).append(product)
    together = [[p for same in by_name.values() for p in same]]
    return [*by_name.values(), *(together if len(by_name) > 1 else [])]


def _behind_own_products(products: list[fx.Node], memo: dict[fx.Node, bool]) -> bool:
    """Whether the ``products`` are the last of experts that have more: each reads rows of a product of its own, or one
    of a stack reads those of another stack of as many."""
    behind = [_nearest_product(weight_and_operand(p, memo), memo) for p in products]
    if None in behind:
        return False
    own = {identity_of(b) for b in behind if b is not None}
    return _count(products) == (len(own) if len(products) > 1 else _count([b for b in behind if b is not None]))


def _nearest_product(found: tuple[fx.Node, fx.Node, bool] | None, memo: dict[fx.Node, bool]) -> fx.Node | None:
    """The first product with a weight on the way back from the rows of another."""
    queue, seen = [found[1]] if found is not None else [], set[fx.Node]()
    while queue and len(seen) < _STEPS:
        node = queue.pop(0)
        if is_matmul(node) and weight_and_operand(node, memo) is not None:
            return node
        if node not in seen:
            seen.add(node)
            queue.extend(node.all_input_nodes)
    return None


def _path(unread: UnreadBlocks, product: fx.Node, memo: dict[fx.Node, bool]) -> str:
    found = weight_and_operand(product, memo)
    return "" if found is None else leaf_of(unread.tape, found[0])[0]


def _count(products: Iterable[fx.Node]) -> int:
    """How many matrices they multiply by."""
    return sum(len_of_stack(p) for p in {identity_of(p): p for p in products}.values())


def _of_heads(product: fx.Node) -> tuple[int, int, int]:
    """Heads, experts of each and outputs of one, where a product multiplies by a whole stack (heads, experts, inputs,
    outputs); (0, 0, 1) of another."""
    read = weight_and_operand(product, {})
    whole = math.prod(read[0].meta["shape"]) if read is not None else 0
    held = ancestors([read[0]]) if read is not None else set()
    leaves: list[tuple[int, ...]] = [n.meta["shape"] for n in held if n.op == "get_attr"]
    rows = read[1].meta["shape"][-1] if read is not None else 0
    stacks = (s for s in leaves if len(s) == 4 and math.prod(s) == whole and s[2] == rows != s[1])
    return next(((s[0], s[1], s[3]) for s in stacks), (0, 0, 1))


def _by_frequency(product: fx.Node) -> bool:
    """Whether it is by complex matrices, one for each frequency of a Fourier transform."""
    return getattr(product.meta.get("dtype"), "is_complex", False) and len_of_stack(product) > 1


def _one_each(products: list[fx.Node], width: int, rows: int) -> bool:
    """Whether the ``products`` are by ``width`` different matrices of one shape, of as many ``rows`` as the gate has,
    or of several for each of the gate's."""
    if products and all(map(_by_frequency, products)):  # of a Parameter each
        return len({identity_of(p) for p in products}) == width
    shape: tuple[int, ...] = products[0].meta["shape"] if products else ()
    heads, experts, size = _of_heads(products[0]) if len(products) == 1 else (0, 0, 1)
    if experts == width and rows * experts * size == math.prod(shape):  # the gate has a row for each head
        return heads > 1
    if not products or _count(products) != width or len({p.meta["shape"][-1] for p in products}) > 1:
        return False
    if len({math.prod(p.meta["shape"]) for p in products}) > 1:  # of rows that a choice picked for each
        return False
    if op_name(products[0]) == "convolution":  # one number for an image, or for each place of one: else for channels
        return rows in (shape[0], math.prod(shape) // shape[1])
    weight, _, _ = weight_and_operand(products[0], {}) or (products[0], None, None)
    side_by_side = laid_out_flat(weight) > 1  # else a stack's rows lie one matrix behind the other
    each = math.prod(shape[:-1]) // (1 if side_by_side else len_of_stack(products[0]))
    return rows > 0 and each > 0 and each % rows == 0


def _reached(
    gate: fx.Node, choice: fx.Node | None, width: int, memo: dict[fx.Node, bool]
) -> tuple[list[fx.Node], bool]:
    """The products that the ``gate`` weighs or picks from, and whether it leaves some of them out."""
    if choice is not None:
        return _picked(gate, memo), True
    weighed = _weighed(gate, memo)
    found = weighed or _weighed(gate, memo, choices=True)
    if not found:
        return _of_weighed_rows(gate, width, memo), False
    return found, not weighed or chosen_among(gate) > 0


def _picked(lookup: fx.Node, memo: dict[fx.Node, bool]) -> list[fx.Node]:
    """The products whose results ``lookup`` picks from: joined, or given by one product of a stack."""
    node = lookup.all_input_nodes[0]
    while moves_rows(node) and op_name(node) not in ("cat", "stack") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return _products_behind(node, memo) if op_name(node) in ("cat", "stack") or is_matmul(node) else []


def _weighed(gate: fx.Node, memo: dict[fx.Node, bool], choices: bool = False) -> list[fx.Node]:
    """The products whose results the ``gate``, moved and cast, is multiplied with; or with ``choices`` what a choice
    left of it."""
    found: dict[fx.Node, None] = {}
    table = choice_of_table(gate) is not None
    own = set(_products_behind(gate, memo))  # a mask of the scores is no expert's result
    for node, user in (walk := ForwardWalk(gate, _STEPS)):
        if op_name(node) in CHOICES_AMONG and user.target is operator.getitem and user.args[1] == 1:
            continue  # the ids of a choice: its values alone are followed
        others = [a for a in user.all_input_nodes if a is not node]
        behind = (
            [p for a in others for p in _products_behind(a, memo) if p not in own] if op_name(user) in WEIGH else []
        )
        found.update(dict.fromkeys(behind))
        more = ("topk", "sort") if choices else ("sum",) if table else ()
        if not behind and (moves_rows(user) or is_pointwise(user) or op_name(user) in more):
            walk.follow(user)
    return list(found)


def _of_cubes(product: fx.Node) -> bool:
    """Whether it multiplies by a stack of more than matrices, laid out: no reader takes one expert out of it."""
    read = weight_and_operand(product, {})
    return read is not None and any(
        len(n.meta.get("shape") or ()) > 3 for n in ancestors([read[0]]) if n.op == "get_attr"
    )


def _of_weighed_rows(gate: fx.Node, width: int, memo: dict[fx.Node, bool]) -> list[fx.Node]:
    """Products by a whole stack of ``width`` matrices that lie one behind the other, of what the ``gate``, moved, was
    multiplied with."""
    found: dict[fx.Node, None] = {}
    for node, user in (walk := ForwardWalk(gate, _STEPS)):
        read = weight_and_operand(user, memo) if is_matmul(user) else None
        if read is not None and read[1] is node and not read[2] and len(read[0].meta["shape"]) > 1:
            k, m = read[0].meta["shape"][-2:]
            if node.meta["shape"][-1] == k and k % width == 0 and k > width and laid_out_flat(read[0]) == width:
                found[user] = None
        elif moves_rows(user) or op_name(user) in ("topk", "sort") or (is_pointwise(user) and _repeats(user, node)):
            walk.follow(user)
    return list(found)


def _repeats(weighing: fx.Node, weights: fx.Node) -> bool:
    """Whether what ``weights`` weigh is repeated for each of them, as rows are, or is no more than they; heads of an
    attention have a part for each."""
    size = math.prod(weighing.meta["shape"])
    others = [a for a in weighing.all_input_nodes if a is not weights]
    return size == math.prod(weights.meta["shape"]) or all(_unrepeated(a) < size for a in others)


def _unrepeated(node: fx.Node) -> int:
    """How many elements ``node`` has before it was repeated."""
    size: int = math.prod(node.meta["shape"])
    while moves_rows(node) and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
        size = min(size, math.prod(node.meta.get("shape") or (size,)))
    return size


def _products_behind(node: fx.Node, memo: dict[fx.Node, bool]) -> list[fx.Node]:
    """The products with weights that ``node`` holds the results of: moved, or through something element-wise."""
    found: dict[fx.Node, None] = {}
    stack, seen = [node], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if len(seen) > _BEHIND:
            return []
        if is_matmul(node):
            if weight_and_operand(node, memo) is None:
                return []
            found[node] = None
        elif moves_rows(node) or is_pointwise(node) or op_name(node) in _TRANSFORMS:
            stack.extend(node.all_input_nodes)
    return list(found)
