"""From a tape to one grouped-expert op: all of a block's experts, or a reason.

    x[T,H] --dispatch--> W_in[e] -> f -> W_out[e] --combine--> y[T,H]
    ==  experts(x, ids[T,K], weights[T,K], W_in, W_out, spec)

Four questions, each answered from values and dataflow: which tokens did each expert see (``rows``),
what function is between its matmuls (``fit_function``), by what does it enter the sum (``combine``),
and where in the model do those choices and weights stand (``routing``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from moeopt.capture.op_kinds import is_factory, moves_rows, op_name, picks_rows
from moeopt.capture.replay import CONFLICT, ancestors, descendants, row_labels
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_refs import ExpertRef, MatrixRef, VectorRef, tensor_at
from moeopt.obstacles import Obstacle, Rank, Stage
from moeopt.recognise.combine import Combine, Labels, read_combine
from moeopt.recognise.expert_function import fit_function
from moeopt.recognise.ffn_candidates import FFNCandidate, find_candidates, group_candidates, source_of
from moeopt.recognise.gemm_sites import GemmSite, find_sites
from moeopt.recognise.hidden_weight import row_factors, row_weights
from moeopt.recognise.limits import check_limits
from moeopt.recognise.named_obstacles import certain_obstacle, single_neurons
from moeopt.recognise.routing import FixedShares, NoIds, Routing, Table, find_routing, one_beyond
from moeopt.recognise.slot_vectors import by_slots
from moeopt.recognise.token_rows import Tokens, match_tokens, rows_of, token_readings
from moeopt.recognise.weight_position import WeightPosition, weight_position
from moeopt.recognise.why_not import no_experts


@dataclass
class Recognition:
    """Everything needed to replace ``combine.node`` by the op; ``experts[v]`` is what id v runs.

    ``experts`` are ``ExpertRef`` and ``spec`` an ``ExpertsSpec``; or ``SlotRefs`` and a ``RowFunction``.
    """

    tokens: Tokens
    routing: Routing
    combine: Combine
    base: fx.Node | None
    experts: list[Any]
    spec: Any
    interior: set[fx.Node]
    source: str
    functions: dict[object, tuple[ExpertsSpec, bool]]
    unmatched_reason: str = ""


_STAGES = (Stage.EXPERTS, Stage.FUNCTION, Stage.SUM, Stage.ROUTING, Stage.ROUTING)
"""By how many questions were answered before the attempt failed."""


class ExpertsNotHit(Declined):
    """Some experts were never chosen on this probe call: try another before deciding.

    ``num_named`` is how many experts there seem to be.
    """

    rank = Rank.PROBE
    stage = Stage.EXPERTS
    num_named = 0


def recognize(
    tape: Tape,
    known: list[Recognition] | None = None,
    *,
    idle: bool = False,
    assume: ExpertsSpec | None = None,
) -> list[Recognition]:
    """Every group of experts in the block, each as one op, in execution order.

    Args:
        known: what an earlier probe call with every expert showed; then some may be missing on this one.
        idle: accept weights that no token reached, if ids did name them: they are no experts.
        assume: a user's hint, taken for the function of every expert, unfitted; verification judges it.

    Raises:
        Declined: no group was recognised; the reason is that of the attempt that came furthest, and ``others`` has
            those of all attempts.
    """
    candidates = find_candidates(tape, find_sites(tape))
    found: list[Recognition] = []
    best = no_experts(tape, candidates)
    best_progress = -1
    met: list[Obstacle] = []
    for group in group_candidates(tape, candidates):
        if any(c.out.node in r.interior or c.out.matmul in r.interior for c in group for r in found):
            continue
        subsets = _subsets(tape, group)
        while (members := next(subsets, None)) is not None:
            progress = [0]
            try:
                found.append(_recognize_group(tape, members, known, idle, assume, progress))
                break
            except ExpertsNotHit as reason:
                if len(members) > 1 or members[0].merged or _in_a_flat_parameter(tape, members[0]):
                    met.append(reason.obstacle)
                    best, best_progress = reason.with_traceback(None), 10
                break
            except Declined as reason:
                if len(members) > 1 or members[0].merged:
                    said = _several_times(reason, members, candidates).with_traceback(None)
                    said.stage = _STAGES[progress[0]]
                    met.append(said.obstacle)
                    if progress[0] > best_progress:
                        best, best_progress = said, progress[0]
                    del said
    for recognition in found:
        recognition.unmatched_reason = best.reason if best_progress >= 0 else ""
    if not found or isinstance(best, ExpertsNotHit):
        named = single_neurons(tape) or (certain_obstacle(tape) if best.rank == Rank.READING else None)
        best, named = named or best, None
        best.others = tuple(met)
        try:
            raise best
        finally:
            del best  # an error that its own frame holds would keep the tape until the next collection
    return sorted(found, key=lambda r: r.combine.node.meta["index"])


def _in_a_flat_parameter(tape: Tape, lone: FFNCandidate) -> bool:
    """Whether it reads picked rows, and its second matrix is a part of a Parameter that would hold another like it."""
    matrix = lone.out.matrices[0]
    whole = tensor_at(tape.root, matrix.path)
    return picks_rows(lone.ins[0].operand) and whole.dim() <= 2 and whole.numel() >= 2 * matrix.k * matrix.m


def _several_times(reason: Declined, members: list[FFNCandidate], candidates: list[FFNCandidate]) -> Declined:
    """``reason``, and what may be behind it where the same experts are called again and again."""
    runs = Counter((m.path, m.origin) for c in candidates for m in c.out.matrices)
    if not isinstance(reason, NoIds) or all(runs[m.path, m.origin] < 2 for c in members for m in c.out.matrices):
        return reason
    return Declined(
        f"{reason.reason}; its experts run several times in one forward (for each slot, sequence or chunk in a Python "
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
        tokens = match_tokens(tape, _ins(group))
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


def _ins(group: list[FFNCandidate]) -> list[GemmSite]:
    return list(dict.fromkeys(s for c in group for s in c.ins))


def _recognize_group(
    tape: Tape,
    group: list[FFNCandidate],
    known: list[Recognition] | None,
    idle: bool,
    assume: ExpertsSpec | None,
    progress: list[int],
) -> Recognition:
    nearest: Declined | None = None
    for tokens in token_readings(tape, _ins(group)):
        here = [1]
        try:
            return _recognize_rows(tape, group, tokens, known, idle, assume, here)
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
    progress: list[int],
) -> Recognition:
    """As :func:`_recognize_group`, with the tensor of tokens chosen."""
    keys: dict[tuple[object, ...], int] = {}
    experts: list[ExpertRef] = []
    labels = Labels({}, {}, tokens.count, 0)
    specs: dict[object, tuple[ExpertsSpec, bool]] = {}
    for recognition in known or []:
        _seed(recognition, group, keys, experts, specs)
    for candidate in group:
        _label_chain(tape, candidate, tokens, labels, keys, experts, specs, assume)
    labels.candidates = len(experts)
    progress[0] = 2
    missing = 0
    if known is None:
        try:
            _check_all_hit(tape, experts, group)
        except ExpertsNotHit as err:
            if not idle:
                raise
            missing = err.num_named - len(experts)
    spec = _one_function(specs, group)
    combine = read_combine(tape, labels)
    progress[0] = 3
    return with_frontier(tape, group, tokens, labels, experts, spec, combine, specs, known, missing, progress)


def _label_chain(
    tape: Tape, candidate: FFNCandidate, tokens: Tokens, labels: Labels, keys: dict[tuple[object, ...], int],
    experts: list[ExpertRef], specs: dict[object, tuple[ExpertsSpec, bool]], assume: ExpertsSpec | None,
) -> None:  # fmt: skip
    """Follow the candidate's rows from its in-sites to its out-sites and enter what each is into ``labels``."""
    roles = candidate.roles()
    if not roles:
        raise Declined(
            "an expert's second matmul reads more than two earlier matmuls", source_of(candidate), rank=Rank.READING
        )
    token, given = _start_rows(tape, roles, tokens, candidate)
    moved = row_labels(tape, candidate.mid, given, only={out.operand for out in candidate.outs})
    for out in candidate.outs:
        rows = moved.get(out.operand)
        if rows is None:
            raise Declined(
                "between an expert's matmuls rows are mixed or normalised, which the op does not carry",
                source_of(candidate),
            )
        rows = out.rows_in(rows)
        label = rows[:, 0]
        if bool((rows != label[:, None]).any()) or bool((label == CONFLICT).any()):
            raise Declined("between an expert's matmuls features of different rows are mixed", source_of(candidate))
        if not bool((label >= 0).any()):
            labels.token[out] = labels.candidate[out] = torch.full_like(label, -1)
            continue
        factors = row_factors(tape, candidate, out)
        if factors and (weights := row_weights(tape, candidate, out, factors)) is not None:
            labels.hidden[out] = weights
        if candidate.signature not in specs:
            specs[candidate.signature] = fit_function(
                tape, candidate, out, label, assume, factors if out in labels.hidden else None
            )
        ordered = roles[::-1] if specs[candidate.signature][1] else roles
        _enter_rows(ordered, out, label, token, labels, keys, experts)


def _start_rows(
    tape: Tape, roles: list[list[GemmSite]], tokens: Tokens, candidate: FFNCandidate
) -> tuple[torch.Tensor, dict[fx.Node, torch.Tensor]]:
    """The token of each in-row, and the row's number as a label on every element of the in-sites' outputs."""
    token = torch.cat([tokens.token[s] for s in roles[0]])
    given = {}
    for role in roles:
        if not torch.equal(torch.cat([tokens.token[s] for s in role]), token):
            raise Declined(
                "an expert's gate and up matmuls see different tokens", source_of(candidate), rank=Rank.READING
            )
        start = 0
        for site in role:
            count = site.matrix.numel()
            ids = torch.arange(start, start + count)[:, None].expand(-1, site.matrices[0].m)
            given[site.node] = site.from_rows(ids, tape.value(site.node))
            start += count
    return token, given


def _enter_rows(
    roles: list[list[GemmSite]], out: GemmSite, label: torch.Tensor, token: torch.Tensor, labels: Labels,
    keys: dict[tuple[object, ...], int], experts: list[ExpertRef],
) -> None:  # fmt: skip
    """Enter the token and the expert of each row of ``out``; new experts are numbered as they appear."""
    where = [[(s, m) for s in role for m in s.matrix.tolist()] for role in roles]
    row_token = torch.where(label >= 0, token[label.clamp_min(0)], -1)
    candidates = [-1] * label.numel()
    known: dict[tuple[int, ...], int] = {}
    for r, (at, seen, last) in enumerate(zip(label.tolist(), row_token.tolist(), out.matrix.tolist(), strict=True)):
        if seen < 0:
            continue
        picks = [role[at] for role in where]
        which = (*(id(s) for s, _ in picks), *(m for _, m in picks), last)
        if which not in known:
            ref = _expert([s for s, _ in picks], [m for _, m in picks], out, last)
            if ref is None:
                known[which] = -1
            else:
                key = (ref.w_in, ref.w_out)
                if key not in keys:
                    keys[key] = len(experts)
                    experts.append(ref)
                known[which] = keys[key]
        candidates[r] = known[which]
    row_chain = torch.tensor(candidates, dtype=torch.long)
    row_token[row_chain < 0] = -1
    labels.token[out], labels.candidate[out] = row_token, row_chain


def _seed(
    known: Recognition, group: list[FFNCandidate], keys: dict[tuple[object, ...], int], experts: list[ExpertRef],
    specs: dict[object, tuple[ExpertsSpec, bool]],
) -> None:  # fmt: skip
    """Number the experts as an earlier probe call did, if this group is the same one."""
    paths = {m.path for c in group for m in c.out.matrices}
    if paths & {e.w_out.path for e in known.experts}:
        specs.update(known.functions)
        for ref in dict.fromkeys(known.experts):
            keys[ref.w_in, ref.w_out] = len(experts)
            experts.append(ref)


def _check_all_hit(tape: Tape, experts: list[ExpertRef], group: list[FFNCandidate]) -> None:
    """Raise ``ExpertsNotHit`` if Parameters that are like the experts' own were not used by any of them.

    One that multiplied rows elsewhere is something else than an idle expert.
    """
    sites = find_sites(tape)
    active = {m.path for s in sites if s.matrix.numel() for m in s.matrices}
    own = {s.node for c in group for s in (*c.ins, *c.outs)}
    named = {**dict(tape.root.named_parameters(remove_duplicate=False)), **dict(tape.root.named_buffers())}
    for part in (lambda e: e.w_in[0], lambda e: e.w_out):
        refs = [part(e) for e in experts]
        used = {r.path for r in refs}
        names = set() if len(used) == 1 and len(experts) > 1 else siblings(used, named)
        held = {id(tensor_at(tape.root, p)) for p in used}
        shapes = {tensor_at(tape.root, p).shape for p in used}
        missing = sorted(
            name
            for name in names
            if id(named[name]) not in held and _like(named[name].shape, shapes, len(used)) and name not in active
        )
        for path in used:
            whole = tensor_at(tape.root, path)
            here = {r.origin[0] for r in refs if r.path == path}
            if whole.dim() > 2 and len(here) < whole.shape[0] and all(r.dk[0] == r.dm[0] == 0 for r in refs):
                missing += [f"{path}[{i}]" for i in range(whole.shape[0]) if i not in here]
            else:
                missing += _rest_of(path, whole, experts, [s for s in sites if s.node not in own])
        if missing:
            shown = list(dict.fromkeys(missing))
            some = ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
            error = ExpertsNotHit(
                f"no probe token reached the expert weights {some}, so what they compute could not be checked; "
                "pass example inputs that reach every expert",
                source_of(group[0]),
            )
            error.num_named = len(experts) + len(missing)
            raise error


def _like(shape: torch.Size, shapes: set[torch.Size], known: int) -> bool:
    """Whether a Parameter of ``shape`` may be another expert's; of several experts each may have neurons of its own."""
    if shape in shapes or known < 2:
        return shape in shapes
    return any(len(shape) == len(s) and sum(a != b for a, b in zip(shape, s, strict=True)) == 1 for s in shapes)


def _rest_of(path: str, whole: torch.Tensor, experts: list[ExpertRef], others: list[GemmSite]) -> list[str]:
    """A name for each expert that fits into those numbers of ``whole`` which neither experts nor ``others`` read."""
    read: dict[MatrixRef | VectorRef, int] = {}
    holders = 0
    for expert in experts:
        here = [r for r in (*expert.w_in, *expert.b_in, expert.w_out, expert.b_out) if r is not None and r.path == path]
        holders += bool(here)
        read |= {r: r.m * (r.k if isinstance(r, MatrixRef) else 1) for r in here}
    each = sum(read.values()) // holders
    for site in others:
        used = [site.matrices[i] for i in site.matrix.unique().tolist() if i >= 0]
        read |= {r: r.k * r.m for r in used if r.path == path}
    held = sum(read.values())
    return [f"{path} beyond {held:,} of its {whole.numel():,} numbers"] * ((whole.numel() - held) // each)


def _universe(tape: Tape, experts: list[ExpertRef]) -> int:
    """How many experts the module's names count, those that share Parameters with another included."""
    named = dict(tape.root.named_parameters(remove_duplicate=False))
    used = {e.w_in[0].path for e in experts}
    return len(siblings(used, named)) if len(used) > 1 else len(experts)


def siblings(used: set[str], named: Mapping[str, torch.Tensor]) -> set[str]:
    """Names that differ from a used one in just the number that the used ones differ in (or any, for one)."""
    patterns: dict[Any, list[str]] = {}
    for path in used:
        parts = path.split(".")
        for i, part in enumerate(parts):
            if re.search(r"\d", part):
                patterns.setdefault((i, tuple(parts[:i]), re.sub(r"\d+", "#", part), tuple(parts[i + 1 :])), []).append(
                    path
                )
    if not patterns:
        return set()
    (i, head, middle, tail), members = max(patterns.items(), key=lambda p: (len(p[1]), p[0][0]))
    del members
    return {
        name
        for name in named
        if len(parts := name.split(".")) == len(head) + 1 + len(tail)
        and tuple(parts[:i]) == head
        and re.sub(r"\d+", "#", parts[i]) == middle
        and tuple(parts[i + 1 :]) == tail
    }


def _expert(ins: list[GemmSite], picks: list[int], out: GemmSite, out_matrix: int) -> ExpertRef | None:
    if out_matrix < 0 or any(p < 0 for p in picks):
        return None
    return ExpertRef(
        tuple(s.matrices[p] for s, p in zip(ins, picks, strict=True)),
        tuple(s.biases[p] if s.biases else None for s, p in zip(ins, picks, strict=True)),
        out.matrices[out_matrix],
        out.biases[out_matrix] if out.biases else None,
    )


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


def _natural(experts: list[ExpertRef]) -> list[int]:
    def key(i: int) -> tuple[object, ...]:
        ref = experts[i].w_in[0]
        path = [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", ref.path)]
        return ([(isinstance(p, str), p) for p in path], ref.origin)

    return sorted(range(len(experts)), key=key)  # type: ignore[arg-type]


def with_frontier(
    tape: Tape, group: list[FFNCandidate], tokens: Tokens, labels: Labels, experts: list[Any],
    spec: Any, combine: Combine,
    functions: dict[object, tuple[ExpertsSpec, bool]], known: list[Recognition] | None, missing: int,
    progress: list[int],
) -> Recognition:  # fmt: skip
    ins = _ins(group)
    inside = _inside(tape, ins, combine)
    last = max(s.node.meta["index"] for s in labels.token)
    before = [n for n in tape.nodes[: last + 1] if n not in inside and n.meta.get("shape") is not None]
    if len(experts) == 1:
        raise Declined(
            "only one of its experts could be read; all of a block's experts or none are rewritten",
            source_of(group[0]),
            rank=Rank.READING,
        )
    flow = _flow(tape, combine, ins, inside)
    weights, visits = combine.weights, labels.visits()
    if tokens.weighted:
        weights = _input_weights(group, tokens, labels, combine)
    elif labels.hidden:
        weights = _hidden_weights(labels, combine)
    natural = list(range(len(experts))) if known else _natural(experts)
    table = Table(weights, visits, natural, _universe(tape, experts), _weighed(combine, list(labels.token)),
                  _factors(tape, combine, list(labels.token)))  # fmt: skip
    tables = _routing_tables(tape, flow, table)
    prior = next((k for k in known or [] if list(dict.fromkeys(k.experts)) == experts), None)
    again = None if prior is None else (prior.routing, [experts.index(e) for e in prior.experts])
    dispatch = [n for n in tape.nodes[: combine.node.meta["index"]] if n in flow and n.meta.get("shape") is not None]

    place: WeightPosition = "output"

    def accept(reading: Routing) -> None:
        nonlocal place
        _only_the_router_steers(tape, reading, tables, set(dispatch), tokens.node)
        if not labels.hidden:
            place = weight_position(tape, reading, table, tokens, labels, combine, group)

    try:
        routing = find_routing(tape, dispatch, table, _weight_dtype(tape, group), again, accept, (by_slots,))
    except FixedShares as err:
        if tokens.node.op == "placeholder":  # the slots are filled outside: what fills them may dispatch by ids
            err.rank = Rank.READING
        raise
    progress[0] = 4
    ids = routing.ids.run(tape) if routing.ids is not None else None
    if missing and (ids is None or not set(range(len(experts), len(experts) + missing)) <= set(ids.unique().tolist())):
        raise ExpertsNotHit(
            "some of the weights that look like experts were never reached by a probe", source_of(group[0])
        )
    if _passes_through(tape, combine, tokens, routing, ids, len(experts)):
        routing.weights.steps = [*routing.weights.steps, (one_beyond, ("@ids", len(experts)))]
    identity = _is_identity(tape, combine, tokens, routing, ids, len(experts))
    if prior is not None and (ids is None or not bool((ids >= len(experts)).any())):
        identity = prior.spec.out_of_range == "identity"  # no such id on this probe call: nothing speaks against it
    base = None if identity else _base(tape, combine, before, experts)
    sources = [tokens.node, base, *routing.weights.nodes, *([] if routing.ids is None else routing.ids.nodes)]
    fitted = {n for c in group for n in c.mid}
    check_limits(tape, combine.node, [n for n in sources if n is not None], fitted, source_of(group[0]))
    ordered = [experts[c] for c in routing.experts]
    layouts: dict[str, Any] = {}
    if isinstance(spec, ExpertsSpec):
        _same_layout(ordered, group)
        first = ordered[0]
        layouts = {"w_in_layout": layout_of(tape, first.w_in[0]), "w_out_layout": layout_of(tape, first.w_out)}
    spec = dataclasses.replace(
        spec, weight_on=place, out_of_range="identity" if identity else "nothing", **layouts, **_accumulation(combine)
    )
    return Recognition(
        tokens, routing, combine, base, ordered, spec, inside, min(source_of(c) or "~" for c in group), functions
    )


def _inside(tape: Tape, ins: list[GemmSite], combine: Combine) -> set[fx.Node]:
    """What depends on single experts, but not on their sum alone: that is what the rewrite leaves out."""
    inside = {s.matmul for s in ins}
    passed_on = set(inside)
    for node in tape.nodes[min(n.meta["index"] for n in inside) :]:
        if any(a in passed_on for a in node.all_input_nodes):
            inside.add(node)
            if node is not combine.node:
                passed_on.add(node)
    return inside


_CHOICES = ("topk", "argmax", "argmin", "sort", "argsort", "max", "min", "kthvalue", "multinomial")


def _routing_tables(tape: Tape, flow: set[fx.Node], table: Table) -> set[fx.Node]:
    """Dense (T, E) forms of the routing among the nodes that dispatch reads."""
    want = table.weights[:, torch.tensor(table.natural)].double()
    found = set()
    for node in flow:
        shape = node.meta.get("shape") or ()
        if math.prod(shape) == want.numel() and shape[-1:] == want.shape[-1:] and node.op == "call_function":
            value = tape.value(node).reshape(want.shape).double()
            if torch.equal(value, want) or torch.equal(value, (want != 0).double()):
                found.add(node)
    return found


def _only_the_router_steers(
    tape: Tape, routing: Routing, tables: set[fx.Node], dispatch: set[fx.Node], tokens: fx.Node
) -> None:
    """Values that Python reads, and which rows dispatch picks, may depend on the input through the routing alone.

    Raises:
        Declined: the forward turns another value into a Python number, so it may branch on it.
    """
    cut = {node for r in (routing.ids, routing.weights) if r is not None for node in r.nodes} | tables
    steered: dict[fx.Node, bool] = {}
    for node in tape.nodes:
        chosen = op_name(node) in _CHOICES or (node.target is operator.getitem and op_name(node.args[0]) in _CHOICES)  # type: ignore[arg-type]
        integer = not getattr(node.meta.get("dtype"), "is_floating_point", True)
        if node in cut or (chosen and integer):
            steered[node] = False
        else:
            steered[node] = node.op == "placeholder" or any(steered.get(a, False) for a in node.all_input_nodes)
    for node, line, _ in tape.reads:
        dtype = node.meta.get("dtype")
        if steered.get(node, False) or (dtype is not None and dtype.is_floating_point and _varies(tape, node)):
            raise Declined(
                f"its forward turns a value computed from the input into a Python number ({op_name(node)}) and may "
                "branch on it, which a graph cannot repeat; keep it in a tensor (torch.where)",
                line or None,
            )

    before = ancestors([tokens, *cut])
    for node in dispatch - before:
        if op_name(node) in ("nonzero", "masked_select", "unique_consecutive", "_unique2") and steered.get(node, False):
            raise Declined(
                f"which rows its experts see depends on more than the tensors that hold the routing ({op_name(node)})",
                node.meta.get("source"),
            )


def _varies(tape: Tape, node: fx.Node) -> bool:
    return any(n.op == "placeholder" for n in ancestors([node]))


def _input_weights(group: list[FFNCandidate], tokens: Tokens, labels: Labels, combine: Combine) -> torch.Tensor:
    """(T, C) factor on each expert's input row; the outputs must then be summed as they are."""
    visits = labels.visits()
    if not bool((combine.weights[visits > 0] == 1).all()):
        raise Declined("routing weights act on both the experts' inputs and their outputs", source_of(group[0]))
    weights = torch.zeros(visits.shape, dtype=torch.float64)
    for candidate in group:
        scale, token = tokens.scale[candidate.ins[0]], tokens.token[candidate.ins[0]]
        out_token, out_chain = labels.token[candidate.out], labels.candidate[candidate.out]
        if out_token.shape == token.shape and torch.equal(out_token, token):
            keep = token >= 0
            weights[token[keep], out_chain[keep]] = scale[keep]
        else:
            raise Declined("weighted input rows are reordered inside the experts", source_of(group[0]))
    return weights.to(candidate.ins[0].operand.meta["dtype"])


def _hidden_weights(labels: Labels, combine: Combine) -> torch.Tensor:
    """(T, C) factor on each expert's activated row, times that on its output."""
    weights = torch.zeros(combine.weights.shape, dtype=torch.float64)
    for site, token in labels.token.items():
        keep = token >= 0
        factor = labels.hidden[site][keep] if site in labels.hidden else torch.ones(int(keep.sum()))
        weights[token[keep], labels.candidate[site][keep]] = factor.double()
    values = weights[labels.visits() > 0]
    if bool((values == values[:1]).all()) or not bool((combine.weights[labels.visits() > 0] == 1).all()):
        raise Declined(
            "a factor on the rows between an expert's matmuls is not its routing weight, or not the only one"
        )
    return (weights * combine.weights).to(combine.node.meta["dtype"])


def _weight_dtype(tape: Tape, group: list[FFNCandidate]) -> torch.dtype | None:
    """dtype of whatever first multiplies an expert's output on its way to the sum."""
    node, steps = group[0].out.node, 0
    while steps < 8:
        users = [u for u in node.users if "index" in u.meta]
        if not users:
            return None
        node, steps = users[0], steps + 1
        if op_name(node) == "mul":
            others = [a for a in node.all_input_nodes if a is not node.args[0]] or node.all_input_nodes
            return others[-1].meta.get("dtype")
        if not moves_rows(node):
            return None
    return None


def _passes_through(
    tape: Tape, combine: Combine, tokens: Tokens, routing: Routing, ids: torch.Tensor | None, experts: int
) -> bool:
    """True where a token that no expert serves (capacity) keeps its own value, unweighted."""
    if combine.base is None or ids is None or ids.shape[1] != 1 or not bool((ids >= experts).any()):
        return False
    x = rows_of(tape.value(tokens.node), tokens.axis)
    known = any(op is one_beyond for op, _ in routing.weights.steps)
    return not known and torch.equal(torch.where(ids >= experts, x, 0.0).to(combine.base.dtype), combine.base)


def _is_identity(
    tape: Tape, combine: Combine, tokens: Tokens, routing: Routing, ids: torch.Tensor | None, experts: int
) -> bool:
    """True where the sum starts from each token times its weights for ids beyond the experts (LongCat)."""
    if combine.base is None or ids is None or not bool((ids >= experts).any()):
        return False
    weights = torch.where(ids >= experts, routing.weights.run(tape, ids).double(), 0.0).sum(-1, keepdim=True)
    x = rows_of(tape.value(tokens.node), tokens.axis).double()
    want, eps = weights * x, torch.finfo(combine.base.dtype).eps
    return want.shape == combine.base.shape and bool(
        ((combine.base.double() - want).abs() <= 8 * eps * want.abs().amax(-1, keepdim=True)).all()
    )


def _flow(tape: Tape, combine: Combine, ins: list[GemmSite], inside: set[fx.Node]) -> set[fx.Node]:
    """What dispatch and combine read: ancestors of the sum and of the experts' inputs, and what left the tape."""
    stack = [combine.node, *(s.operand for s in ins), *(r.node for r in tape.reads)]
    seen: set[fx.Node] = set()
    matmuls = {s.matmul for s in ins}
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if node not in matmuls:
                stack.extend(node.all_input_nodes)
    return seen - inside


def _factors(tape: Tape, combine: Combine, sites: list[GemmSite]) -> tuple[float, ...]:
    """Constants by which the experts' outputs are multiplied on the way to their sum, and their matmul."""
    between = set(descendants(tape, [s.node for s in sites])) & ancestors([combine.node])
    found: dict[float, None] = {}
    for node in between:
        scalar = node.args[1] if op_name(node) in ("mul", "div") and len(node.args) > 1 else None
        if isinstance(scalar, (int, float)) and scalar not in (0, 1) and math.isfinite(scalar):
            found[float(scalar) if op_name(node) == "mul" else 1 / scalar] = None
    return tuple(dict.fromkeys([*sorted(found), *([math.prod(found)] if len(found) > 1 else [])]))


def _weighed(combine: Combine, outs: list[GemmSite]) -> bool:
    """True where a float that depends on the input enters the sum by another way than the experts."""
    stack, seen = [combine.node], {s.node for s in outs}
    while stack:
        node = stack.pop()
        dtype = node.meta.get("dtype")
        if node in seen or is_factory(node) or (dtype is not None and not dtype.is_floating_point):
            continue
        seen.add(node)
        if node.op == "placeholder":
            return True
        stack.extend(node.all_input_nodes)
    return False


def _base(tape: Tape, combine: Combine, before: list[fx.Node], experts: list[ExpertRef]) -> fx.Node | None:
    """The tensor that the experts' sum is added onto, when there is one."""
    if combine.base is None:
        return None
    want = combine.base
    names = dict(tape.root.named_parameters(remove_duplicate=False))
    others = siblings({e.w_in[0].path for e in experts}, names) | siblings({e.w_out.path for e in experts}, names)
    for node in reversed(before):
        shape = node.meta["shape"]
        if node.op != "get_attr" and node.meta["dtype"] == want.dtype and shape == combine.node.meta["shape"]:
            value = tape.value(node).movedim(combine.axis, -1).reshape(want.shape)
            if torch.equal(value, want):
                if others & {str(a.target) for a in ancestors([node]) if a.op == "get_attr"}:
                    raise Declined(
                        "other experts of the same block are computed in another way and added to these; all of a "
                        "block's experts or none are rewritten",
                        combine.node.meta.get("source"),
                    )
                return node
    raise Declined(
        "tokens that no expert serves keep another value (a pass-through of dropped tokens, or a sum that starts "
        "from something computed on the way), which the op does not carry",
        combine.node.meta.get("source"),
    )


def layout_of(tape: Tape, ref: MatrixRef) -> Literal["oi", "io"]:
    """Whether a matrix lies in its Parameter as (out, in) or as (in, out)."""
    _, along_k, along_m = ref.offset_and_strides(tuple(tensor_at(tape.root, ref.path).stride()))
    return "oi" if along_k <= along_m else "io"


def _same_layout(experts: list[ExpertRef], group: list[FFNCandidate]) -> None:
    """They may differ in their number of neurons alone."""
    sizes = {tuple((w.k, w.m) for w in (*e.w_in, e.w_out)) for e in experts}
    ends = {(e.w_in[0].k, e.w_out.m, e.w_in[0].m // e.w_out.k) for e in experts}
    if len(ends) > 1 or any(w.m != e.w_in[0].m for e in experts for w in e.w_in):
        raise Declined(f"its experts have different shapes ({sorted(sizes)})", source_of(group[0]))


def _accumulation(combine: Combine) -> dict[str, Any]:
    """dtype and order of the sum, from the op that makes it."""
    name = op_name(combine.node)
    short = str(combine.node.meta["dtype"]).removeprefix("torch.")
    one_by_one = name in ("index_add", "add", "index_put", "index_copy", "copy", "slice_scatter", "scatter_add")
    accum = short if one_by_one or short in ("float32", "float64") else "float32"
    return {"accum_dtype": accum, "out_dtype": short, "combine": "expert" if one_by_one else "slot"}
