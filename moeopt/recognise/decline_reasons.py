"""Why a block that looks as if it held experts has none that the op could run."""

from __future__ import annotations

import math
import re

from torch import fx, nn

from moeopt.capture.op_kinds import is_matmul, moves_rows, op_name, picks_rows
from moeopt.capture.replay import ancestors, descendants
from moeopt.capture.tape import Tape
from moeopt.capture.tree import leaves_of
from moeopt.errors import Declined
from moeopt.obstacles import Rank
from moeopt.recognise.codes_for_rows import ONE_AT_A_TIME, codes_behind
from moeopt.recognise.ffn_candidates import FFNCandidate
from moeopt.recognise.ffn_groups import source_of
from moeopt.recognise.gemm_sites import is_computed_weight, weight_and_operand
from moeopt.recognise.named_obstacles import between_products, complex_products, expert_products, named_obstacle
from moeopt.recognise.product_of_all import ONE_MATRIX_EACH, one_product_of_all
from moeopt.recognise.rows_of_others import chosen_among_tokens
from moeopt.recognise.unnamed import Unnamed
from moeopt.recognise.weights_for_rows import mixed_kernels, mixed_matrices, picked_matrices


def no_experts(tape: Tape, candidates: list[FFNCandidate]) -> Declined:
    """The reason for a block in which no experts stand side by side."""
    alike: dict[object, list[FFNCandidate]] = {}
    for candidate in candidates:
        if not candidate.merged and picks_rows(candidate.ins[0].operand):
            paths = [re.sub(r"\d+", "#", s.matrices[0].path) for s in (*candidate.ins, *candidate.outs)]
            alike.setdefault((candidate.shape, *paths), []).append(candidate)
    for first, *others in alike.values():
        times = [c for c in others if c.ins[0].matrices == first.ins[0].matrices]
        if times and len(times) == len(others):
            return Declined(
                f"one FFN ({first.ins[0].matrices[0].path}) runs several times, each time on the rows that a router "
                "keeps, and reads what the time before gave (a mixture of recursions): there are no several experts to "
                "group, so this block stays as it is",
                source_of(first),
            )
        if others and others[0].ins[0].operand in set(descendants(tape, [first.out.node])):
            return Declined(
                "each of its experts writes into the tensor that the next one reads its rows from, so they run one "
                "after another, where the op's experts all read the same tokens; sum their results in another tensor",
                source_of(first),
            )
    for look in (mixed_kernels, mixed_matrices, _wide_convolution, named_obstacle, complex_products):
        if (reason := look(tape)) is not None:
            return reason
    for look in (_computed_at_each_call, _one_of_many, one_product_of_all, between_products, picked_matrices):
        if (reason := look(tape)) is not None:
            return reason
    if (reason := _one_matrix_each(tape)) is not None:
        return reason
    return Unnamed(
        "between its experts' matmuls stands something that is not element-wise on each token's row (it mixes rows, "
        "depends on the whole batch, or weighs the hidden neurons), which the op does not carry",
        rank=Rank.READING,
    )


def _one_matrix_each(tape: Tape) -> Declined | None:
    """Experts of which none has a second product: where they read several tensors, or are weighed in another way than
    the readings before this one know."""
    products = expert_products(tape)
    if len(products) < 2 or not set(products).isdisjoint(descendants(tape, products)):
        return None
    if (chosen := chosen_among_tokens(tape)) is not None:
        return chosen
    rows: set[fx.Node] = set()
    for node in products:
        found = weight_and_operand(node, {})
        operand = node if found is None else found[1]
        while moves_rows(operand) and not picks_rows(operand) and operand.all_input_nodes:
            operand = operand.all_input_nodes[0]
        rows.add(operand)
    line = products[0].meta.get("source", "")
    if len(rows) == 1:
        return Declined(ONE_MATRIX_EACH, line)
    if any(map(picks_rows, rows)):
        return None
    return Declined(
        f"its experts are one matrix each, and they read {len(rows)} different tensors (as of several hops or scales), "
        "where the op's experts all read rows of one; this block stays as it is",
        line,
    )


def _computed_at_each_call(tape: Tape) -> Declined | None:
    """Weights that the block computes of others, in products of picked rows, or in several that are alike."""
    memo: dict[fx.Node, bool] = {}
    alike: dict[tuple[int, ...], list[fx.Node]] = {}
    for node in tape.nodes:
        if is_computed_weight(node, memo):
            memo[node] = True
        elif is_matmul(node) and (read := weight_and_operand(node, memo)) is not None:
            if weight_and_operand(node, {}) is None:
                alike.setdefault(tuple(read[0].meta["shape"]), []).append(node)
                if picks_rows(read[1]) or len(alike[tuple(read[0].meta["shape"])]) > 1:
                    coded = codes_behind(read[0]) is not None
                    return Declined(
                        "its experts' weights are computed at each call (from integers and scales, from low-rank "
                        "factors, or from shared weights and own ones), and the op reads weights as they are stored; "
                        + (ONE_AT_A_TIME if coded else "compute them once, and keep the results"),
                        node.meta.get("source", ""),
                    )
    return None


def _wide_convolution(tape: Tape) -> Declined | None:
    for node in tape.nodes:
        if op_name(node) != "convolution" or not isinstance(node.args[1], fx.Node):
            continue
        kernel, groups = node.args[1].meta["shape"][2:], node.args[8]
        if any(size != 1 for size in kernel) or groups != 1:
            what = "x".join(map(str, kernel)) + (f" in {groups} groups" if groups != 1 else "")
            way_out = ""
            if _rows_as_images(node):
                way_out = (
                    ", or any function of a row: where each row is an image of its own, let the experts take rows and "
                    "reshape them inside (x.view(-1, c, h, w) before, .flatten(1) behind)"
                )
            return Declined(
                f"it computes convolutions of {what}; the op multiplies each token's row by a matrix, so that it "
                f"carries 1x1 convolutions in one group only{way_out}",
                node.meta.get("source", ""),
            )
    return None


def _rows_as_images(convolution: fx.Node) -> bool:
    """Whether what is convolved was made of rows of one axis, each of which became an image."""
    before = ancestors(convolution.all_input_nodes[:1])
    moves = [n for n in before if moves_rows(n)]
    shapes = [tuple(tuple(one.meta.get("shape") or ()) for one in (n.all_input_nodes[0], n)) for n in moves]
    return any(
        len(rows) == 2 and len(images) > 2 and rows[0] == images[0] and math.prod(rows) == math.prod(images)
        for rows, images in shapes
    )


def _one_of_many(tape: Tape) -> Declined | None:
    """One of several modules that are alike ran, and no index picked rows for it: Python code named it."""
    for module in tape.root.modules():
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or len(module) < 2:
            continue
        if len({tuple(p.shape for p in child.parameters()) for child in module.children()}) > 1:
            continue
        ran = [call for call in tape.calls if call.module in set(module.children())]
        if len({id(call.module) for call in ran}) != 1:
            continue
        if not any(picks_rows(a) for call in ran for a in leaves_of(fx.Node, [call.args, call.kwargs])):
            return Declined(
                f"Python code chooses one of {len(module)} modules that are alike for all tokens (as in "
                "experts[int(i)]), and the op takes each token's choice as a tensor of ids; pass ids, or optimise each",
                tape.nodes[ran[0].first].meta.get("source", "") if ran[0].first < len(tape.nodes) else "",
            )
    return None
