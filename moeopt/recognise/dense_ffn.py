"""A dense feed-forward block: one FFN candidate that every row goes through, read off a tape as one expert.

    x[..., H] --> W_in -> f -> W_out --> y[..., H]
    ==  experts(x[T,H], ids = 0, weights = 1, W_in, W_out, spec)            with E = 1

Which FFN candidates of a model are worth reading is ``find/discover``'s answer. Attention never is one, because rows
mix between its projections (``ffn_candidates``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from moeopt.capture.replay import between, row_labels
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_refs import ExpertRef, VectorRef, tensor_at
from moeopt.recognise.expert_function import fit_function
from moeopt.recognise.expert_refs import layout_of
from moeopt.recognise.ffn_candidates import FFNCandidate, find_candidates
from moeopt.recognise.gemm_sites import GemmSite, find_sites


@dataclass
class DenseFFN:
    """``out`` (feature axis ``axis_out``) is the FFN of the rows of ``x`` (feature axis ``axis_in``)."""

    x: fx.Node
    axis_in: int
    out: fx.Node
    axis_out: int
    weights: ExpertRef
    spec: ExpertsSpec
    interior: set[fx.Node]
    source: str

    @property
    def inner(self) -> int:
        """I, the number of intermediate neurons."""
        return self.weights.w_out.k


def find_dense(tape: Tape, weights: Iterable[frozenset[int]]) -> list[FFNCandidate]:
    """The candidates of ``tape`` whose matmuls read exactly one of the sets ``weights`` (ids of Parameters)."""
    wanted = set(weights)
    return [c for c in find_candidates(tape, find_sites(tape)) if not c.merged and candidate_weights(tape, c) in wanted]


def candidate_weights(tape: Tape, candidate: FFNCandidate) -> frozenset[int]:
    """Identities of the Parameters that the candidate's matmuls read, biases not counted."""
    return frozenset(id(tensor_at(tape.root, m.path)) for s in (*candidate.ins, *candidate.outs) for m in s.matrices)


def recognize_dense(tape: Tape, candidate: FFNCandidate) -> DenseFFN:
    """Read one candidate.

    Raises:
        Declined: something between its matmuls is not done to each row alone, its function is none that the op
            carries, its matmuls run in different dtypes, or what is between them is used elsewhere too.
    """
    out, source = candidate.out, str(candidate.ins[0].matmul.meta.get("source") or "")
    first, *others = candidate.ins
    if any(s.matrices[0].k != first.matrices[0].k for s in others):
        raise Declined(
            "its first matmul is a sum of two (an adapter such as LoRA beside a Linear); merge the adapter into the "
            "weights, then optimise",
            source,
        )
    rows = first.rows_in(tape.value(first.operand))
    for site in others:
        if not torch.equal(site.rows_in(tape.value(site.operand)), rows):
            raise Declined("its gate and up matmuls read different rows", source)
    if any(s.blocks > 1 or s.order is not None for s in (*candidate.ins, out)):
        raise Declined("the outputs of one of its matmuls are permuted before the bias is added", source)
    label = _labels(tape, candidate, source)
    spec, flip = fit_function(tape, candidate, out, label)
    _one_dtype(tape, candidate, source)
    ins = candidate.ins[::-1] if flip else candidate.ins
    weights = ExpertRef(tuple(s.matrices[0] for s in ins), tuple(_bias(s) for s in ins), out.matrices[0], _bias(out))
    interior = set(between(tape, [s.matmul for s in candidate.ins], out.node)) | {s.matmul for s in candidate.ins}
    _only_inside(tape, interior, out.node, source)
    dtype = str(out.node.meta["dtype"]).removeprefix("torch.")
    spec = dataclasses.replace(
        spec,
        w_in_layout=layout_of(tape, weights.w_in[0]),
        w_out_layout=layout_of(tape, weights.w_out),
        accum_dtype="float64" if dtype == "float64" else "float32",
        out_dtype=dtype,
    )
    return DenseFFN(first.operand, first.axis_in, out.node, out.axis_out, weights, spec, interior, source)


def _labels(tape: Tape, candidate: FFNCandidate, source: str) -> torch.Tensor:
    """(R,) 0, 1, 2, ...: each row of the second matmul comes from the same row of the first, and no other."""
    given = {}
    for site in candidate.ins:
        ids = torch.arange(site.matrix.numel())[:, None].expand(-1, site.matrices[0].m)
        given[site.node] = site.from_rows(ids, tape.value(site.node))
    moved = row_labels(tape, candidate.mid, given, only={candidate.out.operand}).get(candidate.out.operand)
    rows = None if moved is None else candidate.out.rows_in(moved)
    want = torch.arange(candidate.ins[0].matrix.numel())
    if rows is None or rows.shape[0] != len(want) or bool((rows != want[:, None]).any()):
        raise Declined("between its matmuls rows are mixed, reordered or left out", source)
    return want


def _one_dtype(tape: Tape, candidate: FFNCandidate, source: str) -> None:
    found = dict.fromkeys(tape.value(s.operand).dtype for s in (*candidate.ins, candidate.out))
    if len(found) > 1:
        raise Declined(f"its matmuls run in different dtypes ({', '.join(map(str, found))})", source)


def _bias(site: GemmSite) -> VectorRef | None:
    return site.biases[0] if site.biases else None


def _only_inside(tape: Tape, interior: set[fx.Node], out: fx.Node, source: str) -> None:
    """Raise where a result of the block depends on what is inside by another way than through ``out``."""
    seen, stack = {out}, tape.results()
    while stack:
        node = stack.pop()
        if node in interior and node is not out:
            raise Declined("what stands between its matmuls is used outside it too, so it has to be computed", source)
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
