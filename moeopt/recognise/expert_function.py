"""Which function stands between W_in and W_out: fitted by what it computes, not by how it is written.

The nodes between the two matmuls are replayed in float64 on random values (small, ordinary and
large, so that clamps act) and compared with every ``ExpertsSpec`` that the constants seen there
allow. ``x*sigmoid(x)``, ``F.silu(x)`` and a hand-written ``x/(1+exp(-x))`` are the same to it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from moeopt.capture.op_kinds import is_factory, op_name
from moeopt.capture.replay import replay
from moeopt.capture.tape import Tape
from moeopt.capture.tree import tree_leaves
from moeopt.errors import Declined
from moeopt.ir.activations import ACTIVATION_TABLE
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.activations import apply_gate
from moeopt.recognise.ffn_candidates import FFNCandidate
from moeopt.recognise.gemm_sites import GemmSite
from moeopt.recognise.limits import magnitudes
from moeopt.value_types import PyObject

_TOLERANCE = 1e-6
"""Relative. Float64 has 1e-16; hand-written constants such as 0.7978845608 for sqrt(2/pi) have 1e-10;
gelu and its tanh form differ by 1e-4."""


class OtherFunction(Declined):
    """No function of the grouped op's; any function of a row is the other op's question."""


def fit_function(
    tape: Tape,
    candidate: FFNCandidate,
    out: GemmSite,
    labels_out: torch.Tensor,
    assume: ExpertsSpec | None = None,
    instead: dict[fx.Node, torch.Tensor] | None = None,
) -> tuple[ExpertsSpec, bool]:
    """The spec (rows, activation, clamps, offset, dtypes) of the function between the candidate's sites.

    Also says whether, of two in-sites, the second is the gate.

    Args:
        out: one of the candidate's out-sites, with rows on this probe call.
        labels_out: (R,) for each of its operand's rows, the row of the in-sites that it comes from
            (the rows of all in-sites of one role, end to end), or -1.
        assume: a user's hint: it is the answer, with the dtypes seen here, and nothing is fitted.
        instead: values between the matmuls that are another's part (routing weights), and ones in their place.

    Raises:
        Declined: no member of the family computes it; the text names the ops that were seen. Or the experts'
            matrices have other sizes than the hint says.
    """
    if assume is not None:
        _check_sizes(assume, candidate, out)
        return dataclasses.replace(assume, **_dtypes(candidate)), False
    samples = _observe(tape, candidate, out, labels_out, instead or {})
    for flip in (False, True) if len(candidate.roles()) == 2 else (False,):
        seen = [(h[::-1] if flip else h, mid) for h, mid in samples]
        for spec in _possible_specs(tape, candidate):
            if all(_agrees(spec, h, mid) for h, mid in seen):
                return dataclasses.replace(spec, **_dtypes(candidate)), flip
    ops = ", ".join(
        dict.fromkeys(op_name(n) for n in candidate.mid if op_name(n) not in ("view", "getitem", "_to_copy"))
    )
    line = next((n.meta.get("source", "") for n in candidate.mid if n.meta.get("source")), "")
    raise OtherFunction(
        f"the function between the expert's two matmuls ({ops or 'none'}) is none that the op carries "
        f"({', '.join(ACTIVATION_TABLE)}, gated or plain, with clamps); pass hints= to name it",
        line or None,
    )


def _check_sizes(hint: ExpertsSpec, candidate: FFNCandidate, out: GemmSite) -> None:
    """``Declined`` where the ``rows`` of a hint ask for first matrices of another number or size."""
    firsts, inner = [role[0].matrices[0].m for role in candidate.roles()], out.matrices[0].k
    halves = 1 if hint.rows in ("plain", "separate") else 2
    wanted = [halves * inner] * (2 if hint.rows == "separate" else 1)
    if firsts != wanted:
        raise Declined(
            f"the hint says rows={hint.rows!r}, for which the first matrices of an expert have "
            f"{' and '.join(map(str, wanted))} outputs, and here they have {' and '.join(map(str, firsts))}, before a "
            f"second matrix with {inner} inputs: give rows='plain' for one matrix of that size, 'separate' for two, "
            "'gate|up' or another for one of twice the size"
        )


def _observe(
    tape: Tape, candidate: FFNCandidate, out: GemmSite, labels_out: torch.Tensor, instead: dict[fx.Node, torch.Tensor]
) -> list[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
    """[(pre-activation rows of each role, resulting rows)], matched by row label: at three magnitudes, and beyond
    each number that the function reads."""
    generator = torch.Generator().manual_seed(0)
    keep = (labels_out >= 0).nonzero().flatten()[:32]
    samples = []
    for scale in (0.5, 3.0, 30.0, *(4 * size for size in magnitudes(tape, candidate.mid))):
        given: dict[fx.Node, Any] = dict(instead)
        rows = tuple(_probe(tape, role, labels_out[keep], scale, generator, given) for role in candidate.roles())
        operand = replay(tape, candidate.mid, given, torch.float64, only=out.operand)[out.operand]
        samples.append((rows, out.rows_in(operand)[keep]))
        del operand
    return samples


def _probe(
    tape: Tape, role: list[GemmSite], labels: torch.Tensor, scale: float, generator: torch.Generator,
    given: dict[fx.Node, Any],
) -> torch.Tensor:  # fmt: skip
    """Put random pre-activations of a role's sites into ``given``; the rows of them that ``labels`` name."""
    rows = torch.empty(len(labels), role[0].matrices[0].m, dtype=torch.float64)
    start = 0
    for site in role:
        h = torch.randn(site.matrix.numel(), site.matrices[0].m, generator=generator, dtype=torch.float64)
        h *= scale
        here = (labels >= start) & (labels < start + len(h))
        rows[here] = h[labels[here] - start]
        start += len(h)
        given[site.node] = site.from_rows(h, tape.value(site.node))
    return rows


def _agrees(spec: ExpertsSpec, rows: tuple[torch.Tensor, ...], want: torch.Tensor) -> bool:
    got = apply_gate(rows if spec.rows == "separate" else rows[0], spec)
    if got.shape != want.shape:
        return False
    scale = want[want.isfinite()].abs().max().clamp_min(1e-30) if want.isfinite().any() else 1.0
    near = (got - want).abs() <= _TOLERANCE * (want.abs() + 1e-3 * scale)
    return bool((near | ~want.isfinite()).all())  # far out, exp(x) by hand is infinite where the activation is not


def learned_numbers(tape: Tape, candidate: FFNCandidate) -> tuple[float, ...]:
    """The one-element Parameters, buffers and tensors made at the call that the function reads: a slope, a scale that
    each expert has its own value of, though its calls are those of the others."""
    operands = (a for node in candidate.mid for a in node.all_input_nodes if a.op == "get_attr" or is_factory(a))
    one = (a for a in operands if a.meta.get("shape") is not None and math.prod(a.meta["shape"]) == 1)
    return tuple(tape.value(a).item() for a in one)


def _constants(tape: Tape, candidate: FFNCandidate) -> list[float]:
    """Python scalars and one-element tensors among the operands of the nodes between."""
    found: dict[float, None] = {}
    for a in tree_leaves([[node.args, node.kwargs] for node in candidate.mid]):
        if isinstance(a, fx.Node):
            if a not in candidate.mid and a.meta.get("shape") in ((), (1,)) and tape.value(a).is_floating_point():
                found[float(tape.value(a))] = None
        elif isinstance(a, (int, float)) and not isinstance(a, bool):
            found[float(a)] = None
    return list(found)


def _clamps(tape: Tape, candidate: FFNCandidate) -> list[tuple[float | None, float | None]]:
    """(low, high) of each distinct clamp between the matmuls."""
    found: dict[tuple[float | None, float | None], None] = {}

    def number(a: PyObject) -> float | None:
        if isinstance(a, fx.Node):
            return float(tape.value(a)) if a.meta.get("shape") in ((), (1,)) else None
        return None if a is None else float(a)

    for node in candidate.mid:
        name, args = op_name(node), [*node.args, None, None]
        low, high = args[1], args[2]
        low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
        if name in ("clamp", "hardtanh"):
            found[number(low), number(high)] = None
        elif name in ("clamp_min", "maximum"):
            found[number(args[1]), None] = None
        elif name in ("clamp_max", "minimum"):
            found[None, number(args[1])] = None
    return [c for c in found if c != (None, None)]


def _possible_specs(tape: Tape, candidate: FFNCandidate) -> Iterator[ExpertsSpec]:
    m, k = candidate.ins[0].matrices[0].m, candidate.out.matrices[0].k
    if len(candidate.roles()) == 2:
        layouts = ["separate"]
    elif m == k:
        layouts = ["plain"]
    else:
        layouts = ["gate|up", "up|gate", "interleaved", "interleaved_up"]
    constants = _constants(tape, candidate)
    clamps = _clamps(tape, candidate)
    offsets = [0.0] + [c for c in constants if c == 1.0]
    positive = [c for c in constants if c != 0.0]
    activations: list[tuple[str, float | None]] = [(a, None) for a, e in ACTIVATION_TABLE.items() if e.alpha is None]
    for name, entry in ACTIVATION_TABLE.items():
        if entry.alpha is not None:
            activations += [(name, alpha) for alpha in dict.fromkeys([*entry.alpha, *positive])]
    for places in _placements(clamps):
        for rows, (activation, alpha), offset in itertools.product(layouts, activations, offsets):
            if rows == "plain" and offset:
                continue
            yield ExpertsSpec(rows=rows, activation=activation, alpha=alpha, up_offset=offset, **places)  # type: ignore[arg-type]


def _placements(clamps: list[tuple[float | None, float | None]]) -> Iterator[dict[str, float | None]]:
    """Every way to give each seen clamp a place: on the gate, on up, on both, after the activation, or nowhere."""
    seen = []
    for choice in itertools.product(("none", "gate", "up", "act", "both"), repeat=len(clamps)):
        places: dict[str, float | None] = {}
        for (low, high), where in zip(clamps, choice, strict=True):
            for role in {"none": (), "both": ("gate", "up")}.get(where, (where,)):
                places |= {f"{role}_min": low, f"{role}_max": high}
        if places not in seen:
            seen.append(places)
            yield places


def _dtypes(candidate: FFNCandidate) -> dict[str, Any]:
    """compute_dtype of the matmuls and act_dtype of the nodes between, where they differ from one another."""
    compute = candidate.out.operand.meta["dtype"]
    moves = ("view", "getitem", "split", "_to_copy", "slice")
    acting = [n.meta["dtype"] for n in candidate.mid if op_name(n) not in moves
              and n.meta.get("dtype") is not None and n.meta["dtype"].is_floating_point]  # fmt: skip
    widest = max(acting, key=lambda d: torch.finfo(d).bits, default=compute)
    short = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return {
        "compute_dtype": short.get(compute),
        "act_dtype": short.get(widest) if widest != compute else None,
    }
