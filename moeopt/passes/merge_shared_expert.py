"""A shared expert of the same function and width as the routed ones is expert E, which every token chooses.

    experts(x, ids, w) + shared(x)             ==  experts(x, [ids, E], [w, 1])
    experts(x, ids, w) + g(x) * shared(x)      ==  experts(x, [ids, E], [w, g(x)])        g (T, 1), its own gate

An id that named no expert (E or more) names one further: E is taken now.

Shapes     T tokens, E experts, K chosen per token: ids (T, K) -> (T, K + 1), weights (T, K) -> (T, K + 1)
Seen in    DeepSeek, Qwen2-MoE and GLM blocks, where the shared expert is as wide as a routed one
Saves      one grouped op does the work of two
Numerics   ROUNDING: the shared expert's term joins the sum in the sum's order and dtype
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import record
from moeopt.errors import Declined
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_refs import ExpertRef
from moeopt.passes.base import Level
from moeopt.recognise.dense_ffn import candidate_weights, find_dense, recognize_dense
from moeopt.recognise.ffn_candidates import find_candidates
from moeopt.recognise.gemm_sites import find_sites
from moeopt.rewrite.block_graph import EXPERTS, BlockGraph, ExpertWeightRefs
from moeopt.rewrite.module_facts import hook_count
from moeopt.value_types import FxArg, FxTarget, PyObject

aten = torch.ops.aten

_FUNCTION = (
    "rows", "w_in_layout", "w_out_layout", "activation", "alpha", "gate_min", "gate_max", "up_min", "up_max",
    "act_min", "act_max", "up_offset", "compute_dtype", "act_dtype", "out_norm_eps",
)  # fmt: skip
"""Fields of a spec that say what one expert computes, without routing and the sum."""
_MOVES = ("reshape", "movedim", "view")
_ROWS = 6
"""Made-up tokens on which the shared expert is recorded."""


class MergeSharedExpert:
    """See the module's docstring."""

    name = "merge_shared_expert"
    level = Level.ROUNDING
    off = (
        "stacked weights cannot gain an expert without a copy; with separate ones, which are taken by their addresses, "
        "it starts as many kernels as it saves (6) and changes times on a CPU by -1 to +9 %"
    )

    def apply(self, block: BlockGraph) -> int:
        """How many shared experts became routed ones.

        Raises:
            Declined: something is added to the experts' sum that is not one more such expert.
        """
        found = list(added_modules(block))
        merged = [(one, read(block, one)) for one in found]
        for one, weights in merged:
            merge(block, one, weights)
        return len(found)


@dataclass(frozen=True)
class Added:
    """``total`` adds to the sum of ``experts`` the result of ``module``, a kept submodule, times ``gate``.

    ``routed`` are the moves from ``experts`` to ``total``; ``shared`` what is between ``module`` and ``total``.
    """

    experts: fx.Node
    total: fx.Node
    routed: list[fx.Node]
    module: fx.Node
    shared: list[fx.Node]
    gate: fx.Node | None


def added_modules(block: BlockGraph) -> Iterator[Added]:
    """Each sum of experts to which a kept submodule's result on the same tokens is added, and nothing else reads."""
    for total in block.graph.nodes:
        if op_name(total) != "add" or len(total.args) != 2 or total.kwargs:
            continue
        for here, other in (total.args, total.args[::-1]):
            experts, routed = _back(here)
            end, shared = _back(other)
            gate: FxArg = None
            if op_name(end) == "mul" and len(end.args) == 2 and len(end.users) == 1:
                for factor, rest in (end.args, end.args[::-1]):
                    source, moves = _back(factor)
                    if source.op == "call_module" and isinstance(rest, fx.Node):
                        shared, end, gate = [*shared, end, *moves], source, rest
                        break
            if experts.target is not EXPERTS or end.op != "call_module" or len(end.args) != 1 or end.kwargs:
                continue
            alone = all(len(n.users) == 1 for n in (experts, *routed, end, *shared))
            if alone and _back(end.args[0], shared=True)[0] is _back(experts.args[2], shared=True)[0]:
                yield Added(experts, total, routed, end, shared, gate)
                break


def read(block: BlockGraph, one: Added) -> ExpertRef:
    """The shared expert's weights, as regions of the block's Parameters.

    Raises:
        Declined: it is no expert like the routed ones.
    """
    root, path = block.root, str(one.module.target)
    refs, spec = block.weights[one.experts.args[1]]  # type: ignore[index]
    where = one.total.meta.get("source") or None
    assert root is not None
    if not isinstance(spec, ExpertsSpec):
        raise Declined("the routed experts are a function of a row, and no two matmuls", where)
    module = root.get_submodule(path)
    if spec.weight_on != "output":
        raise Declined("the routing weights multiply the experts' input, so an expert of weight 1 has no gate", where)
    if any(hook_count(m) or "forward" in m.__dict__ for m in module.modules()):
        raise Declined(f"{path} has a hook or another forward, which would no longer run", where)
    if one.gate is not None and (one.gate.meta.get("shape") or (0,))[-1] != 1:
        raise Declined(f"{path} is multiplied by more than one number for each token", where)
    weights, own = _function_of(module, refs[0].w_in[0].k, one, where)
    for name in _FUNCTION:
        if getattr(own, name) != getattr(spec, name):
            raise Declined(
                f"{path} is another function than the routed experts ({name} {getattr(own, name)}, not "
                f"{getattr(spec, name)})", where,
            )  # fmt: skip
    if any(ref.w_out.k != weights.w_out.k for ref in refs):
        raise Declined(f"{path} has {weights.w_out.k} neurons, the routed experts {refs[0].w_out.k}", where)
    return _below(weights, path)


def _function_of(module: nn.Module, hidden: int, one: Added, where: str | None) -> tuple[ExpertRef, ExpertsSpec]:
    """``module`` read as one dense FFN, from a call of it alone."""
    tensor = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    rank = len(one.module.meta.get("shape") or (0, 0))
    rows = torch.randn(*[1] * (rank - 2), _ROWS, hidden, generator=generator).to(tensor.device, tensor.dtype)
    tape = record(module, (rows,))
    candidates = find_candidates(tape, find_sites(tape))
    if len(candidates) != 1 or candidates[0].out.node is not tape.output:
        raise Declined(f"{one.module.target} is more than one feed-forward network", where)
    (candidate,) = find_dense(tape, [candidate_weights(tape, candidates[0])])
    ffn = recognize_dense(tape, candidate)
    return ffn.weights, ffn.spec


def merge(block: BlockGraph, one: Added, shared: ExpertRef) -> None:
    """Give the experts of ``one`` one more, and each token one more choice."""
    held, index, x, ids, weights = one.experts.args
    assert isinstance(index, int)
    refs, spec = block.weights[index]
    count, graph = len(refs), block.graph
    dtype = weights.meta.get("dtype")  # type: ignore[union-attr]

    def call(op: FxTarget, *args: PyObject, **kwargs: PyObject) -> fx.Node:
        return graph.call_function(op, args, kwargs)

    with graph.inserting_before(one.total):  # the gate may be computed after the experts
        if one.gate is None:
            column = call(aten.ones_like.default, call(aten.slice.Tensor, weights, 1, 0, 1))
        else:
            column = call(aten.reshape.default, one.gate, [-1, 1])
            if one.gate.meta.get("dtype") is not dtype:
                column = call(aten._to_copy.default, column, dtype=dtype)
        free = call(aten.add.Tensor, ids, call(aten.ge.Scalar, ids, count))  # an id that names no expert goes on to
        last = call(aten.full_like.default, call(aten.slice.Tensor, ids, 1, 0, 1), count)
        all_ids = call(aten.cat.default, [free, last], -1)
        all_weights = call(aten.cat.default, [weights, column], -1)
    for node in (one.experts, *one.routed[::-1]):
        one.total.prepend(node)
    one.experts.args = (held, index, x, all_ids, all_weights)
    one.total.replace_all_uses_with(one.routed[0] if one.routed else one.experts)
    for node in (one.total, *one.shared, one.module):
        graph.erase_node(node)
    block.weights[index] = ExpertWeightRefs([*refs, shared], spec)
    chosen = block.per_token[index]
    block.per_token[index] = None if chosen is None else chosen + 1
    block.routers[index] = None


def _back(node: FxArg, shared: bool = False) -> tuple[fx.Node, list[fx.Node]]:
    """What ``node`` is a moved form of, and the moves, last first; ``shared``: others may read what is between."""
    moves: list[fx.Node] = []
    while isinstance(node, fx.Node) and op_name(node) in _MOVES and (shared or len(node.users) == 1):
        moves.append(node)
        node = node.args[0]
    return node, moves


def _below(ref: ExpertRef, path: str) -> ExpertRef:
    """``ref`` with its Parameters named from the module that holds ``path``."""

    def named(part: PyObject) -> PyObject:
        return None if part is None else dataclasses.replace(part, path=f"{path}.{part.path}")

    return ExpertRef(tuple(map(named, ref.w_in)), tuple(map(named, ref.b_in)), named(ref.w_out), named(ref.b_out))
