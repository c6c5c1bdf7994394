"""Which token each row of each expert's matmuls belongs to, followed from the block's input to the outputs."""

from __future__ import annotations

import torch
from torch import fx

from moeopt.capture.replay import CONFLICT, row_labels
from moeopt.capture.tape import Tape
from moeopt.errors import Declined
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_refs import ExpertRef
from moeopt.obstacles import Rank
from moeopt.recognise.combine import Labels
from moeopt.recognise.expert_function import fit_function, learned_numbers
from moeopt.recognise.expert_refs import expert_ref
from moeopt.recognise.ffn_candidates import FFNCandidate
from moeopt.recognise.ffn_groups import source_of
from moeopt.recognise.gemm_sites import GemmSite
from moeopt.recognise.hidden_weight import row_factors, row_weights
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.token_rows import Tokens


def sites_in(group: list[FFNCandidate]) -> list[GemmSite]:
    return list(dict.fromkeys(s for c in group for s in c.ins))


def label_chain(
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
            raise Declined(
                "between an expert's matmuls features of different rows, or of different matrices, come into one row",
                source_of(candidate),
            )
        if not bool((label >= 0).any()):
            labels.token[out] = labels.candidate[out] = torch.full_like(label, -1)
            continue
        factors = row_factors(tape, candidate, out)
        if factors and (weights := row_weights(tape, candidate, out, factors)) is not None:
            labels.hidden[out] = weights
        function = candidate.signature, learned_numbers(tape, candidate)
        if function not in specs:
            specs[function] = fit_function(
                tape, candidate, out, label, assume, factors if out in labels.hidden else None
            )
        ordered = roles[::-1] if specs[function][1] else roles
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
            ref = expert_ref([s for s, _ in picks], [m for _, m in picks], out, last)
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


def seed_rows(
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
