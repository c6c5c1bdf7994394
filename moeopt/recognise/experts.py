"""From a tape to one grouped-expert op: all of a block's experts, or a reason.

    x[T,H] --dispatch--> W_in[e] -> f -> W_out[e] --combine--> y[T,H]
    ==  experts(x, ids[T,K], weights[T,K], W_in, W_out, spec)

Four questions, each answered from values and dataflow: which tokens did each expert see (``rows``),
what function is between its matmuls (``fit_function``), by what does it enter the sum (``combine``),
and where in the model do those choices and weights stand (``routing``).
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator

from torch import fx

from moeopt.capture.op_kinds import picks_rows
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_refs import ExpertRef, tensor_at
from moeopt.obstacles import Obstacle, Rank, Stage
from moeopt.recognise.changed_rows import changed_rows
from moeopt.recognise.codes_for_rows import codes_for_rows
from moeopt.recognise.column_products import column_products
from moeopt.recognise.combine import Labels, SeveralSums, SumsOfGates, read_combine
from moeopt.recognise.decline_reasons import no_experts
from moeopt.recognise.expert_function import OtherFunction
from moeopt.recognise.expert_rows import label_chain, seed_rows, sites_in
from moeopt.recognise.experts_hit import ExpertsNotHit, check_all_hit
from moeopt.recognise.ffn_candidates import FFNCandidate, find_candidates
from moeopt.recognise.ffn_groups import group_candidates, source_of
from moeopt.recognise.gemm_sites import find_sites
from moeopt.recognise.named_obstacles import certain_obstacle
from moeopt.recognise.product_of_all import matrices_behind_one
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.routing_of_experts import with_frontier
from moeopt.recognise.routing_types import NoIds
from moeopt.recognise.token_rows import Tokens, match_tokens, token_readings
from moeopt.recognise.weights_for_rows import single_neurons

_STAGES = (Stage.EXPERTS, Stage.FUNCTION, Stage.SUM, Stage.ROUTING, Stage.ROUTING)
"""By how many questions were answered before the attempt failed."""


def recognize(
    tape: Tape, known: list[Recognition] | None = None, *, idle: bool = False, assume: ExpertsSpec | None = None,
    levels: bool = False,
) -> list[Recognition]:  # fmt: skip
    """Every group of experts in the block, each as one op, in execution order.

    Args:
        known: what an earlier probe call with every expert showed; then some may be missing on this one.
        idle: accept weights that no token reached although ids named them: such weights are no experts.
        assume: a user's hint, taken for the function of every expert, unfitted; verification judges it.
        levels: read routing that no tensor holds off the sum itself (``routing_by_sum``).

    Raises:
        Declined: no group was recognised; the reason is that of the attempt that came furthest, and ``others`` has
            those of all attempts.
    """
    candidates = find_candidates(tape, find_sites(tape))
    found: list[Recognition] = []
    best: Declined | None = None
    best_progress = -1
    met: list[Obstacle] = []
    groups = list(group_candidates(tape, candidates))
    for group in groups:  # it grows: mixtures side by side may be alike
        if any(c.out.node in r.interior or c.out.matmul in r.interior for c in group for r in found):
            continue
        subsets = _subsets(tape, group)
        while (members := next(subsets, None)) is not None:
            progress = [0]
            try:
                found.append(_recognize_group(tape, members, known, idle, assume, levels, progress))
                break
            except ExpertsNotHit as reason:
                if len(members) > 1 or members[0].merged or _in_a_flat_parameter(tape, members[0]):
                    met.append(reason.obstacle)
                    best, best_progress = reason.with_traceback(None), 10
                break
            except Declined as reason:
                groups += _by_home(group, members)
                if isinstance(reason, NoIds):
                    fewer = [some for some in reason.routed if 1 < len(some) < len(members)]
                    subsets = itertools.chain(fewer, subsets)
                    reason.routed = ()  # an error outlives the tape
                if len(members) > 1 or members[0].merged:
                    said = changed_rows(group, members) or _several_times(reason, members, candidates)
                    said = said.with_traceback(None)
                    said.stage = _STAGES[progress[0]]
                    met.append(said.obstacle)
                    if progress[0] > best_progress:
                        best, best_progress = said, progress[0]
                    del said
    for recognition in found:
        recognition.unmatched_reason = best.reason if best is not None else ""
    if not found or isinstance(best, ExpertsNotHit):
        best = _by_its_name(tape, best or no_experts(tape, candidates))
        best.others = tuple(met)
        try:
            raise best
        finally:
            del best  # the error's traceback holds this frame, and with it the tape, until the garbage collector runs
    return sorted(found, key=lambda r: r.combine.node.meta["index"])


def _by_its_name(tape: Tape, best: Declined) -> Declined:
    """``best``, or what the code shows where that says no more than that a reading failed."""
    unsure = best.rank == Rank.READING or isinstance(best, (OtherFunction, SumsOfGates))
    named = single_neurons(tape) or codes_for_rows(tape)
    if named is None and unsure:
        named = certain_obstacle(tape) or column_products(tape) or matrices_behind_one(tape)
    return named or best


def _by_home(group: list[FFNCandidate], tried: list[FFNCandidate]) -> list[list[FFNCandidate]]:
    """The experts of each list or stack that holds several of a ``group``, where there are several such: two mixtures
    side by side may be alike."""
    homes: dict[str, list[FFNCandidate]] = {}
    for candidate in group:
        homes.setdefault(re.sub(r"\d+", "#", candidate.out.matrices[0].path), []).append(candidate)
    several = [held for held in homes.values() if len(held) > 1]
    return several if len(several) > 1 and tried == group else []


def _in_a_flat_parameter(tape: Tape, lone: FFNCandidate) -> bool:
    """Whether it reads picked rows, and its second matrix is a part of a Parameter that would hold another like it."""
    matrix = lone.out.matrices[0]
    whole = tensor_at(tape.root, matrix.path)
    return picks_rows(lone.ins[0].operand) and whole.dim() <= 2 and whole.numel() >= 2 * matrix.k * matrix.m


def _several_times(reason: Declined, members: list[FFNCandidate], candidates: list[FFNCandidate]) -> Declined:
    """``reason``, or what is behind it where the same experts are called again and again."""
    runs = Counter((m.path, m.origin) for c in candidates for m in c.out.matrices)
    again = any(runs[m.path, m.origin] > 1 for c in members for m in c.out.matrices)
    if not again or not isinstance(reason, (NoIds, SeveralSums)):
        return reason
    return Declined(
        "its experts run several times in one forward (for each slot, sequence, chunk or task in a Python "
        "loop, in several rounds, or in two blocks that share them), and the op runs them once on all tokens: route "
        "all tokens at once, or give each round a module of its own",
        source_of(members[0]),
    )


def _subsets(tape: Tape, group: list[FFNCandidate]) -> Iterator[list[FFNCandidate]]:
    """The group; then without candidates that see every token while others do not (shared experts); then,
    where they do not all read the same tensor, those that do."""
    yield group
    if len(group) < 2:
        return
    try:
        tokens = match_tokens(tape, sites_in(group))
    except Declined:
        if len(group) > 256:
            return
        by_source: dict[fx.Node, list[FFNCandidate]] = {}
        for candidate in group:
            with contextlib.suppress(Declined):
                by_source.setdefault(match_tokens(tape, candidate.ins).node, []).append(candidate)
        yield from (m for m in by_source.values() if 1 < len(m) < len(group))
        return
    routed = [c for c in group if tokens.token[c.ins[0]].unique().numel() < tokens.count]
    if 1 < len(routed) < len(group):
        yield routed


def _recognize_group(
    tape: Tape,
    group: list[FFNCandidate],
    known: list[Recognition] | None,
    idle: bool,
    assume: ExpertsSpec | None,
    levels: bool,
    progress: list[int],
) -> Recognition:
    nearest: Declined | None = None
    for tokens in token_readings(tape, sites_in(group)):
        here = [1]
        try:
            return _recognize_rows(tape, group, tokens, known, idle, assume, levels, here)
        except ExpertsNotHit:
            raise
        except Declined as err:
            if nearest is None or here[0] > progress[0]:
                nearest, progress[0] = err.with_traceback(None), here[0]
    assert nearest is not None
    try:
        raise nearest
    finally:
        del nearest


def _recognize_rows(
    tape: Tape,
    group: list[FFNCandidate],
    tokens: Tokens,
    known: list[Recognition] | None,
    idle: bool,
    assume: ExpertsSpec | None,
    levels: bool,
    progress: list[int],
) -> Recognition:
    """As :func:`_recognize_group`, with the tensor of tokens chosen."""
    keys: dict[tuple[object, ...], int] = {}
    experts: list[ExpertRef] = []
    labels = Labels({}, {}, tokens.count, 0)
    specs: dict[object, tuple[ExpertsSpec, bool]] = {}
    for recognition in known or []:
        seed_rows(recognition, group, keys, experts, specs)
    for candidate in group:
        label_chain(tape, candidate, tokens, labels, keys, experts, specs, assume)
    labels.candidates = len(experts)
    progress[0] = 2
    missing = 0
    if known is None:
        try:
            check_all_hit(tape, experts, group)
        except ExpertsNotHit as err:
            if not idle:
                raise
            missing = err.num_named - len(experts)
    spec = _one_function(specs, group)
    combine = read_combine(tape, labels)
    progress[0] = 3
    return with_frontier(tape, group, tokens, labels, experts, spec, combine, specs, known, missing, progress, levels)


def _one_function(specs: dict[object, tuple[ExpertsSpec, bool]], group: list[FFNCandidate]) -> ExpertsSpec:
    found = {spec for spec, _ in specs.values()}
    if not found:
        raise Declined("no token reached any of its experts", source_of(group[0]), rank=Rank.PROBE)
    if len(found) > 1:
        words = " and ".join(sorted(str(s).split(";")[0] for s in found))
        raise Declined(
            f"its experts do not all compute the same function ({words}); only alike experts can be grouped",
            source_of(group[0]),
        )
    return next(iter(found))
