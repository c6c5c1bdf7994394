"""The weights of one expert as references into Parameters, and the order, layout and dtypes that all experts share."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from moeopt.capture.op_kinds import op_name
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_refs import ExpertRef, MatrixRef, tensor_at
from moeopt.recognise.combine import Combine
from moeopt.recognise.ffn_candidates import FFNCandidate
from moeopt.recognise.ffn_groups import source_of
from moeopt.recognise.gemm_sites import GemmSite


def expert_ref(ins: list[GemmSite], picks: list[int], out: GemmSite, out_matrix: int) -> ExpertRef | None:
    if out_matrix < 0 or any(p < 0 for p in picks):
        return None
    return ExpertRef(
        tuple(s.matrices[p] for s, p in zip(ins, picks, strict=True)),
        tuple(s.biases[p] if s.biases else None for s, p in zip(ins, picks, strict=True)),
        out.matrices[out_matrix],
        out.biases[out_matrix] if out.biases else None,
    )


def natural_order(tape: Tape, experts: list[ExpertRef]) -> list[int]:
    """By the numbers in their Parameters' names; where the names differ in words, as those of a dict's keys, in the
    order in which they were registered."""
    paths = [e.w_in[0].path for e in experts]
    if len({re.sub(r"\d+", "#", path) for path in paths}) > 1:
        places = {name: n for n, (name, _) in enumerate(tape.root.named_parameters(remove_duplicate=False))}
        return sorted(range(len(experts)), key=lambda i: (places.get(paths[i], len(places)), experts[i].w_in[0].origin))

    def key(i: int) -> tuple[object, ...]:
        return ([int(part) for part in re.findall(r"\d+", paths[i])], experts[i].w_in[0].origin)

    return sorted(range(len(experts)), key=key)


def layout_of(tape: Tape, ref: MatrixRef) -> Literal["oi", "io"]:
    """Whether a matrix lies in its Parameter as (out, in) or as (in, out)."""
    _, along_k, along_m = ref.offset_and_strides(tuple(tensor_at(tape.root, ref.path).stride()))
    return "oi" if along_k <= along_m else "io"


def same_layout(experts: list[ExpertRef], group: list[FFNCandidate]) -> None:
    """They may differ in their number of neurons alone."""
    sizes = {tuple((w.k, w.m) for w in (*e.w_in, e.w_out)) for e in experts}
    ends = {(e.w_in[0].k, e.w_out.m, e.w_in[0].m // e.w_out.k) for e in experts}
    if len(ends) > 1 or any(w.m != e.w_in[0].m for e in experts for w in e.w_in):
        raise Declined(f"its experts have different shapes ({sorted(sizes)})", source_of(group[0]))


def accumulation(combine: Combine) -> dict[str, Any]:
    """dtype and order of the sum, from the op that makes it."""
    name = op_name(combine.node)
    short = str(combine.node.meta["dtype"]).removeprefix("torch.")
    one_by_one = name in ("index_add", "add", "index_put", "index_copy", "copy", "slice_scatter", "scatter_add")
    accum = short if one_by_one or short in ("float32", "float64") else "float32"
    return {"accum_dtype": accum, "out_dtype": short, "combine": "expert" if one_by_one else "slot"}


def with_layouts(tape: Tape, spec: ExpertsSpec, expert: ExpertRef) -> ExpertsSpec:
    """``spec`` with the layouts in which ``expert``'s matrices are stored."""
    return dataclasses.replace(
        spec, w_in_layout=layout_of(tape, expert.w_in[0]), w_out_layout=layout_of(tape, expert.w_out)
    )
