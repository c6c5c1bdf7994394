"""Linear sites of a whole model from a tape without values: by the leaf that each matmul's matrix comes from."""

from __future__ import annotations

import torch
from torch import fx

from moeopt.capture.op_kinds import is_matmul, op_name
from moeopt.capture.tape import Tape
from moeopt.ir.weight_refs import MatrixRef
from moeopt.recognise.gemm_sites import GemmSite, is_computed_weight, is_weight, weight_and_operand


def light_sites(tape: Tape) -> tuple[list[GemmSite], dict[GemmSite, tuple[str, bool]]]:
    """Sites by shape alone; with each, (Parameter path, whether the weight is one slice of a stack)."""
    memo: dict[fx.Node, bool] = {}
    sites, leaves = [], {}
    for node in tape.nodes:
        if is_computed_weight(node, memo):
            memo[node] = True
        if not is_matmul(node):
            continue
        found = weight_and_operand(node, memo)
        if found is None:
            continue
        weight, operand, left = found
        shape = weight.meta["shape"]
        if len(shape) < 2:  # a product with one vector
            continue
        if op_name(node) == "convolution":
            if any(s != 1 for s in shape[2:]):
                continue
            m, k, count = shape[0], shape[1], 1
        elif op_name(node) == "linear":
            m, k, count = shape[0], shape[1], 1
        else:
            k, m = (shape[-1], shape[-2]) if left else (shape[-2], shape[-1])
            count = shape[0] if len(shape) == 3 else 1
        if not k or not m:
            continue
        path, leaf = leaf_of(tape, weight)
        matrices = [MatrixRef(path, (i,), (), (), k, m) for i in range(min(count, 2))]
        site = GemmSite(_biased(node, memo), node, operand, 0, 0, matrices, torch.zeros(0, dtype=torch.long))
        sites.append(site)
        sliced = leaf is not None and leaf.dim() >= 3 and len(leaf) > 1 and op_name(node) != "convolution"
        leaves[site] = (path, sliced and (len(shape) == 2 or shape[0] == 1))
    return sites, leaves


def leaf_of(tape: Tape, node: fx.Node) -> tuple[str, torch.Tensor | None]:
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    if node.op != "get_attr" or "constant" in node.meta:
        return "", None
    path = str(node.target)
    owner, _, name = path.rpartition(".")
    return path, getattr(tape.root.get_submodule(owner), name)


def _biased(node: fx.Node, memo: dict[fx.Node, bool]) -> fx.Node:
    """The ``add`` of a bias that alone reads the matmul, else the matmul."""
    current = node
    for _ in range(3):
        users = [u for u in current.users if "index" in u.meta]
        if len(users) != 1:
            return node
        user = users[0]
        if op_name(user) == "add":
            others = [a for a in user.args if a is not current]
            return user if len(others) == 1 and isinstance(others[0], fx.Node) and is_weight(others[0], memo) else node
        if op_name(user) not in ("view", "_unsafe_view", "squeeze", "unsqueeze", "reshape"):
            return node
        current = user
    return node
