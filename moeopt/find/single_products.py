"""Places of mixtures whose experts are one product each, which no pair of matrices shows.

    weights   y = x W[ids]                 rows of a stack of matrices or kernels, picked by ids that a router chose
    rows      y[rows] += x[rows] W_e       one product for each expert, on rows that an index picked
    numbers   y[b] = experts[int(ids[b])]  one of a list or a stack for each sample, named by a number that was chosen
    sums      y = x (sum of g_e W_e)       the matrices are weighed, and no expert runs by itself
    gates     y = sum(gate_e * f_e(x))     all run, and a gate weighs them (``find.gated_products``)
    compared  y = sum((n == e) * f_e(x))   all run, and a comparison keeps one (``find.compared_products``)
    vectors   y = f(x) * (sum of g_e V_e)  no expert is a product (``find.mixed_vectors``)
    neurons   y = (f(x W1) * mask) W2      groups of neurons, all computed, and masked (``find.neuron_groups``)
    trees     n = 2 n + 1 + (x . W1[n] > 0)  single neurons, one after another (``find.walked_neurons``)
    parts     y = sum(gate_k * f(x W)[k])  parts of one product, or heads of an attention (``find.gated_parts``)
    own       y[rows] += f(x[rows]) * v_e  all matrices are shared, or there is none (``find.own_vectors``)
    kinds     y[rows] += f_e(x[rows])      modules of one list that are not alike (``find.mixed_kinds``)

Projections of an attention are experts so (SwitchHead), and kernels of a convolution. What every token passes is no
mixture: something must choose, or weigh.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from torch import fx

from moeopt.capture.op_kinds import is_matmul, moves_rows, op_name, picks_rows
from moeopt.capture.replay import ancestors, descendants
from moeopt.capture.tape import Call
from moeopt.find.block_candidates import BlockCandidate, identity_of
from moeopt.find.compared_products import compared_products
from moeopt.find.gated_parts import gated_parts
from moeopt.find.gated_products import gated_products
from moeopt.find.light_sites import leaf_of
from moeopt.find.mixed_kinds import mixed_kinds
from moeopt.find.mixed_vectors import mixed_vectors
from moeopt.find.module_lists import alike_lists, made_by
from moeopt.find.neuron_groups import neuron_groups
from moeopt.find.own_vectors import own_vectors
from moeopt.find.unread_blocks import UnreadBlocks, calls_of_blocks, weights_of
from moeopt.find.walked_neurons import walked_neurons
from moeopt.recognise.gemm_sites import weight_and_operand
from moeopt.recognise.weights_for_rows import stacked_tables, summed_matrices

_CHOICES = ("topk", "argmax", "argmin", "sort", "argsort", "max", "min", "multinomial")


_CARRIED = (
    "its experts run one after another, each for one row and on what the one before gave (a state that is carried from "
    "row to row), and Python code chooses each by a number; the op's experts all read the same tokens, so this block "
    "stays as it is"
)


def single_products(unread: UnreadBlocks, places: list[BlockCandidate]) -> list[BlockCandidate]:
    """The mixtures of single products in the run of ``unread``, outside the calls of ``places``."""
    found: list[BlockCandidate] = []
    for search in (_picked_weights, _picked_rows, _named_by_python, _summed_weights, gated_products, compared_products):
        taken = calls_of_blocks([*places, *found])
        known = {weight for p in (*places, *found) for weight in p.weights}
        found += [p for p in search(unread) if p.call.index not in taken and known.isdisjoint(p.weights)]
    found += unread.by_choice([*places, *found])
    for search in (neuron_groups, mixed_vectors, walked_neurons, gated_parts):  # parts of what reads as a dense FFN
        known = {weight for p in (*places, *found) if p.kind == "moe" for weight in p.weights}
        found += [p for p in search(unread) if known.isdisjoint(p.weights)]
    for last in (own_vectors, mixed_kinds):
        found += list(last(unread, [*places, *found]))
    return found


def _picked_weights(unread: UnreadBlocks) -> Iterator[BlockCandidate]:
    """Calls that pick matrices or kernels out of a stack by what was chosen, and multiply by them."""
    homes: dict[int, list[fx.Node]] = {}
    for node in unread.tape.nodes:
        if op_name(node) not in ("index", "index_select", "embedding"):
            continue
        stack = node.args[0]
        sizes: tuple[int, ...] = stack.meta.get("shape") or () if isinstance(stack, fx.Node) else ()
        axis = _picked_axis(node)
        if len(sizes) < 3 or axis is None or min(sizes[axis], *sizes[-2:]) < 2:
            continue
        if _tables(unread, node) and _is_chosen(node) and _multiplies(node):
            homes.setdefault(node.meta["call"], []).append(node)
    for index, nodes in homes.items():
        weights = {id(unread.named[path]) for node in nodes for path in _tables(unread, node)}
        count = nodes[0].args[0].meta["shape"][_picked_axis(nodes[0]) or 0]  # type: ignore[union-attr]
        yield unread.place(unread.tape.calls[index], nodes[0].meta["index"], count, weights)


def _tables(unread: UnreadBlocks, lookup: fx.Node) -> list[str]:
    """The stack of matrices that is looked up in, or the matrices that the code stacks at this call, by their names."""
    tables = stacked_tables(lookup.args[0])
    paths = [str(t.target) for t in tables] if len(tables) > 1 else [leaf_of(unread.tape, lookup)[0]]
    least = 2 if len(tables) > 1 else 3
    return paths if all(p in unread.named and unread.named[p].dim() >= least for p in paths) else []


def _picked_axis(lookup: fx.Node) -> int | None:
    """Along which axis of a stack a choice picks: the only one that is indexed, or the only one of several (a head for
    each place, and an expert) whose indices were chosen."""
    if op_name(lookup) != "index":
        return 0 if len(lookup.all_input_nodes) == 2 else None
    given = [(axis, a) for axis, a in enumerate(lookup.args[1]) if isinstance(a, fx.Node)]  # type: ignore[arg-type]
    if len(given) > 1:
        given = [(axis, a) for axis, a in given if made_by(a, _CHOICES)]
    return given[0][0] if len(given) == 1 else None


def _is_chosen(lookup: fx.Node) -> bool:
    ids = [n for n in lookup.all_input_nodes[1:] if not getattr(n.meta.get("dtype"), "is_floating_point", True)]
    return any(op_name(n) in _CHOICES for n in ancestors(ids))


def _multiplies(lookup: fx.Node) -> bool:
    """Whether what was looked up, moved or not, is multiplied with something that is computed from the input."""
    stack, seen = [lookup], set[fx.Node]()
    while stack:
        node = stack.pop()
        for user in node.users:
            others = [a for a in user.all_input_nodes if a is not node]
            if is_matmul(user) and any(n.op == "placeholder" for n in ancestors(others)):
                return True
            if moves_rows(user) and user not in seen and len(seen) < 64:
                seen.add(user)
                stack.append(user)
    return False


def _picked_rows(unread: UnreadBlocks) -> Iterator[BlockCandidate]:
    """Calls that multiply rows picked for each expert by a matrix of its own: a part of a stack, or a Parameter of a
    numbered name; several, or one of several of which the others had no rows."""
    memo: dict[fx.Node, bool] = {}
    homes: dict[tuple[int, str], list[tuple[fx.Node, str]]] = {}
    stacks: set[str] = set()
    for node in unread.tape.nodes:
        found = weight_and_operand(node, memo) if is_matmul(node) else None
        path = leaf_of(unread.tape, found[0])[0] if found is not None and picks_rows(found[1]) else ""
        if found is None or path not in unread.named:
            continue
        if unread.named[path].dim() > len(found[0].meta["shape"]):
            stacks.add(path)
        if path in stacks or re.search(r"\d", path):
            homes.setdefault((node.meta["call"], re.sub(r"\d+", "#", path)), []).append((node, path))
    for (index, _), products in homes.items():
        first, path = products[0]
        hit = len({identity_of(node) for node, _ in products})
        count = len(unread.named[path]) if path in stacks else hit
        if count > 1:
            weights = {id(unread.named[p]) for _, p in products}
            yield unread.place(unread.tape.calls[index], first.meta["index"], count, weights)


def _named_by_python(unread: UnreadBlocks) -> Iterator[BlockCandidate]:
    """Calls in which Python read a number that was chosen, and which ran some modules of a list, or multiplied by some
    parts of a stack, one after another on parts of their input."""
    numbers = [r for r in unread.tape.reads if not getattr(r.node.meta.get("dtype"), "is_floating_point", True)]
    choices = [n for n in unread.tape.nodes if op_name(n) in _CHOICES]
    depending = {*choices, *(descendants(unread.tape, choices) if choices else ())}  # once, not for each number
    chosen = {r.call for r in numbers if r.node in depending}
    read = [r.node.meta["index"] for r in numbers if r.node in depending]
    for index in sorted(chosen):
        yield from _of_lists(unread, unread.tape.calls[index], read)
    memo: dict[fx.Node, bool] = {}
    for node in unread.tape.nodes:
        found = weight_and_operand(node, memo) if is_matmul(node) and node.meta["call"] in chosen else None
        path, whole = leaf_of(unread.tape, found[0]) if found is not None else ("", None)
        parts = [n for n in ancestors([found[0]]) if op_name(n) == "select"] if found is not None else []
        if parts and path in unread.named and whole is not None and whole.dim() > 2:
            yield unread.place(unread.tape.calls[node.meta["call"]], node.meta["index"], len(whole), {id(whole)})


def _of_lists(unread: UnreadBlocks, call: Call, read: list[int]) -> Iterator[BlockCandidate]:
    """The lists of a ``call`` of which Python ran some modules; ``read``: the indices of the numbers that it read."""
    for alike in alike_lists(call.module):
        ran = [c for c in unread.children(call) if c.module in alike]
        if not ran:
            continue
        place = unread.place(call, ran[0].first, len(alike), weights_of(ran))
        if not unread.sequential(ran):
            yield place
        elif any(ran[0].first <= at < ran[-1].first for at in read):
            yield dataclasses.replace(place, reason=_CARRIED)


def _summed_weights(unread: UnreadBlocks) -> Iterator[BlockCandidate]:
    """Calls that multiply by sums of their matrices, one sum for each sample or token."""
    homes: dict[int, list[tuple[fx.Node, tuple[str, ...]]]] = {}
    for node, names in summed_matrices(unread.tape):
        homes.setdefault(node.meta["call"], []).append((node, names))
    for index, products in homes.items():
        (first, names), weights = products[0], {id(unread.named[name]) for _, own in products for name in own}
        count = len(names) if len(names) > 1 else len(unread.named[names[0]])
        yield unread.place(unread.tape.calls[index], first.meta["index"], count, weights)
