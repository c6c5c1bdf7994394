"""Weights that are made for each row or sample: looked up by ids, or summed over the experts.

neurons    x . W1[ids] ...        an expert is one row of each table
memory     sum of V[ids]          no product at all
matrices   x @ W[ids]             a copy for each token, of experts of one matrix
kernels    conv(x, K[ids])        a group for each sample
sums       x @ (sum of g_e W_e)   no expert runs by itself
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import fx

from moeopt.capture.op_kinds import GATES, is_matmul, is_pointwise, moves_rows, op_name, picks_rows
from moeopt.capture.replay import ancestors, descendants
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.listed import listed
from moeopt.obstacles import Rank
from moeopt.recognise.gemm_sites import weight_and_operand
from moeopt.recognise.router_steers import CHOICES

_STEPS = 64
"""Element-wise calls that are looked at behind a matrix."""
_GATE_STEPS = 8
"""Calls between a gate and the sum of what it weighs."""


def single_neurons(tape: Tape) -> Declined | None:
    """Rows of a table, picked by the router for each token: experts of one neuron where they are multiplied with the
    token, values of a memory where they are only added up."""
    names = ("embedding", "_embedding_bag", "_embedding_bag_forward_only")
    picked = [n for n in tape.nodes if op_name(n) in names and is_table(n.args[0])]
    picked = picked or _rows_of_tables(tape)
    picked = [n for n in picked if any(op_name(a) in CHOICES for a in ancestors(n.all_input_nodes[1:]))]
    picked = [n for n in picked if not _holds_matrices(n)]
    behind = {*picked, *descendants(tape, picked)} if picked else set()
    if len(picked) == 1 and not any(_meets(n, picked[0]) or _meets_features(n, picked[0], behind) for n in behind):
        return Declined(
            f"it is a memory: each id that the router picks is one row of {_path(picked[0])}, which is weighed and "
            "added as it is and is no function of the token, so there is no product to group; this block stays as it "
            "is",
            picked[0].meta.get("source"),
        )
    if len(picked) < 2:
        return None
    return Declined(
        f"its experts are single neurons: each id that the router picks is one row of {_path(picked[0])}, not a "
        "matrix; the op groups experts of two matrices, so this block stays as it is",
        picked[0].meta.get("source"),
    )


def _rows_of_tables(tape: Tape) -> list[fx.Node]:
    """Rows that an index picks out of tables, as files do; none where it picks matrices too, whose biases these are, or
    the scales of their codes, which the block makes floats of before."""
    names = ("index", "index_select")
    picks = [n for n in tape.nodes if op_name(n) in names and len(n.all_input_nodes) == 2]
    lookups = [n for n in picks if is_table(n.args[0])]
    made = [n for n in picks if n not in lookups and not of_rows(n.all_input_nodes[0])]
    if any(len(n.all_input_nodes[0].meta.get("shape") or ()) > 2 for n in (*lookups, *made)):
        return []
    return [n for n in lookups if len(n.all_input_nodes[0].meta["shape"]) == 2]


def of_rows(node: fx.Node) -> bool:
    return any(n.op == "placeholder" for n in ancestors([node]))


def _meets(product: fx.Node, lookup: fx.Node) -> bool:
    """Whether it multiplies the features of the rows that were looked up with those of a token: no weighed sum of
    rows, which has their features still, and no layer behind one."""
    if not is_matmul(product) or weight_and_operand(product, {}) is not None or lookup.meta.get("shape") is None:
        return False
    return bool(product.meta["shape"][-1] != lookup.meta["shape"][-1])


def _meets_features(product: fx.Node, lookup: fx.Node, behind: Collection[fx.Node]) -> bool:
    """Whether it multiplies what was looked up, feature by feature, with what is computed from the token, as a score of
    the two is, (c[id] * x).sum(-1): no routing weight, which is one number."""
    sides = [a for a in product.all_input_nodes if a in behind]
    if op_name(product) != "mul" or len(sides) != 1 or lookup.meta.get("shape") is None:
        return False
    side = sides[0]
    while moves_rows(side) and side is not lookup:
        side = side.all_input_nodes[0]
    width = lookup.meta["shape"][-1]
    others = [a for a in product.all_input_nodes if a not in behind and a.meta.get("shape", ())[-1:] == (width,)]
    read = any(n.op == "placeholder" for a in others for n in (a, *ancestors([a])))
    return side is lookup and width > 1 and read


def _holds_matrices(lookup: fx.Node) -> bool:
    """Whether each row that is looked up is laid out as a matrix."""
    if lookup.meta.get("shape") is None:  # a bag of rows is a sum of them
        return False
    width = lookup.meta["shape"][-1]
    shapes = [
        user.meta.get("shape", ()) for user in lookup.users if op_name(user) in ("view", "reshape", "_unsafe_view")
    ]
    return any(len(s) > 1 and s[-1] != width and s[-2] > 1 and s[-1] > 1 and s[-2] * s[-1] == width for s in shapes)


def _path(lookup: fx.Node) -> str:
    """What is looked up: a Parameter, or several that the code stacks, by their common name."""
    tables = stacked_tables(lookup.args[0])
    names = dict.fromkeys(re.sub(r"\d+", "#", str(t.target)) if len(tables) > 1 else str(t.target) for t in tables)
    return f"torch.stack({listed(names)})" if len(tables) > 1 else next(iter(names))


def stacked_tables(node: object) -> list[fx.Node]:
    """The Parameters that ``node`` is, or that it stacks along a first dimension; none where it is anything else."""
    if isinstance(node, fx.Node) and op_name(node) == "stack" and node.args[1:] in ((), (0,)):
        return list(node.all_input_nodes) if all(map(is_table, node.all_input_nodes)) else []
    return [node] if isinstance(node, fx.Node) and is_table(node) else []


def is_table(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and "constant" not in node.meta


def mixed_kernels(tape: Tape) -> Declined | None:
    """A convolution whose kernel is computed from the input: picked, or a sum of the experts' kernels, for each
    sample."""
    for node in tape.nodes:
        if op_name(node) == "convolution" and isinstance(node.args[1], fx.Node):
            before = ancestors([node.args[1]])
            if not any(n.op == "placeholder" for n in before):
                continue
            kernel = node.args[1]
            while moves_rows(kernel) and not picks_rows(kernel) and kernel.all_input_nodes:
                kernel = kernel.all_input_nodes[0]
            if picks_rows(kernel):
                return Declined(
                    "it picks its experts' kernels for each sample and runs one convolution with them, a group for "
                    "each sample; the op multiplies each token's row by a matrix, so this block stays as it is",
                    node.meta.get("source"),
                )
            return Declined(
                "it adds up its experts' kernels for each sample and runs one convolution with the sum, so no "
                "expert runs by itself and there is nothing to group; this block stays as it is",
                node.meta.get("source"),
                rank=Rank.FORBIDS,
            )
    return None


def summed_matrices(tape: Tape) -> Iterator[tuple[fx.Node, tuple[str, ...]]]:
    """Products of activations with a matrix, or a kernel, that is a sum of several, weighed by something that is
    computed from the input; and the name of the stack that holds these, or their own names."""
    names = dict(tape.root.named_parameters(remove_duplicate=False))
    for node in tape.nodes:
        if op_name(node) not in ("bmm", "baddbmm", "convolution"):
            continue
        for whole in node.all_input_nodes[1:2] if op_name(node) == "convolution" else node.all_input_nodes:
            side = whole
            while moves_rows(side) and side.all_input_nodes:
                side = side.all_input_nodes[0]
            stack = _blended_stack(side, names) or _blended_list(side, names)
            if stack := stack or _summed_by_a_product(side, whole, names):
                yield node, stack


def _summed_by_a_product(side: fx.Node, whole: fx.Node, names: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """The names of what a product of a gate, computed from the input, and of matrices adds up to ``side``; ``whole`` is
    how the sum is used."""
    found = weight_and_operand(side, {}) if is_matmul(side) and op_name(side) != "convolution" else None
    if found is None:  # a convolution adds up channels, whatever its last axis is as long as
        return ()
    before = ancestors([found[0]])
    held = [str(n.target) for n in before if n.op == "get_attr" and str(n.target) in names]
    stacks = tuple(name for name in held if names[name].dim() > 2 or _is_bank(found, whole))[:1]
    count = len(names[stacks[0]]) if stacks else len(held)
    if not stacks and any(op_name(n) == "stack" for n in before):
        stacks = tuple(held) if min(names[name].dim() for name in held) > 1 else ()
    weighs = found[1].meta["shape"][-1] == count > 1 and any(n.op == "placeholder" for n in ancestors([found[1]]))
    return stacks if weighs else ()


def _is_bank(found: tuple[fx.Node, fx.Node, bool], used: fx.Node) -> bool:
    """Whether a table's rows are matrices or kernels laid out flat: a gate weighs them as they are stored, and the sum
    is ``used`` as one of more axes. What a layer computes of hidden numbers is no sum of experts."""
    table, gate, left = found
    shape = used.meta["shape"]
    flat = len(shape) > 2 and math.prod(shape[-2:]) > max(shape[-2:]) and shape[-1] != table.meta["shape"][-1]
    for _ in range(_GATE_STEPS):
        if op_name(gate) in GATES:
            return flat and table.op == "get_attr" and not left
        if not (moves_rows(gate) or is_pointwise(gate)) or not gate.all_input_nodes:
            return False
        gate = gate.all_input_nodes[-1 if op_name(gate) == "scatter" else 0]
    return False


def _blended_list(matrix: fx.Node, names: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """The names of the matrices, alike but for a number, that ``matrix`` is the sum of, each weighed by what the input
    gives; else ()."""
    parts: dict[str, None] = {}
    stack, seen = [matrix], set[fx.Node]()
    adds, weighs = False, False
    while stack and len(seen) < _STEPS:
        node = stack.pop()
        name = str(node.target)
        if node.op == "get_attr" and name in names and names[name].dim() > 1:
            parts[name] = None
        elif node not in seen and (moves_rows(node) or is_pointwise(node) or op_name(node) in ("sum", "mean")):
            seen.add(node)
            stack.extend(node.all_input_nodes)
            adds = adds or op_name(node) in ("add", "addcmul", "lerp", "sum", "mean")
            weighs = weighs or op_name(node) in ("mul", "addcmul", "lerp")
        elif not any(n.op == "placeholder" for n in (node, *ancestors([node]))):
            return ()
    alike = len({(names[name].shape, re.sub(r"\d+", "#", name)) for name in parts}) == 1
    of_input = any(n.op == "placeholder" for n in ancestors([matrix]))
    return tuple(parts) if alike and len(parts) > 1 and adds and weighs and of_input else ()


def _blended_stack(matrix: fx.Node, names: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """The name of the one stack whose matrices, looked up by what the input says, ``matrix`` is several of: added up,
    element by element, by weights that the input gives (a phase between four poses); else ()."""
    stack, seen = [matrix], set[fx.Node]()
    lookups, adds, weighs = set[fx.Node](), False, False
    while stack and len(seen) < _STEPS:
        node = stack.pop()
        if node in seen or not is_pointwise(node):
            continue
        seen.add(node)
        for inner in node.all_input_nodes:
            while moves_rows(inner) and not picks_rows(inner) and inner.all_input_nodes:
                inner = inner.all_input_nodes[0]
            if picks_rows(inner) and any(n.op == "placeholder" for n in ancestors(inner.all_input_nodes[1:])):
                lookups.add(inner)
            else:
                stack.append(inner)
        adds = adds or op_name(node) in ("add", "addcmul", "lerp", "sub")
        weighs = weighs or op_name(node) in ("mul", "addcmul", "lerp")
    held = {str(n.target) for n in ancestors(lookups) if n.op == "get_attr"} & names.keys() if lookups else set()
    stacks = [name for name in held if names[name].dim() > 2]
    return (stacks[0],) if len(stacks) == 1 and len(lookups) > 1 and adds and weighs else ()


def mixed_matrices(tape: Tape) -> Declined | None:
    """The first of :func:`summed_matrices`."""
    for node, names in summed_matrices(tape):
        own = listed(dict.fromkeys(re.sub(r"\d+", "#", name) if len(names) > 1 else name for name in names))
        return Declined(
            f"it adds up its experts' matrices ({own}) for each sample or token and multiplies by the sum, so no "
            "expert runs by itself and there is nothing to group; this block stays as it is",
            node.meta.get("source"),
            rank=Rank.FORBIDS,
        )
    return None


def picked_matrices(tape: Tape) -> Declined | None:
    """Products by matrices that are looked up for each row, of experts that are one matrix each."""
    for node in tape.nodes:
        if op_name(node) not in ("index", "index_select") or not stacked_tables(node.args[0]):
            continue
        stack: fx.Node = node.args[0]  # type: ignore[assignment]
        chosen = any(op_name(n) in CHOICES for n in ancestors(node.all_input_nodes[1:]))
        rank = len(stack.meta["shape"])
        if rank == 4 and any(op_name(n) == "convolution" for n in descendants(tape, [node])):
            continue
        if chosen and rank in (3, 4):
            each = "one matrix each" if rank == 3 else "one matrix each for every part of a row (a head)"
            return Declined(
                f"its experts are {each}, and each token multiplies by a copy of its own ({_path(node)}[ids]);"
                " the op takes such experts, in engines, where each runs on the rows that chose it: loop over the "
                "experts (row, slot = torch.where(ids == e); y.index_add_(0, row, x[row] @ W[e] * ...))",
                node.meta.get("source"),
            )
    return None
