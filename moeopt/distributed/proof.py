"""What is shown across the ranks before a distributed model is returned.

    dispatch    with tagged experts: expert e answers a token with the token's own number, in column e; every sum must
                be exact, on ids that dispatch gets wrong first, with uneven and with no tokens
    weights     each rank's expert number i has the weights of the expert that the placement says
    numbers     each op beside the float64 oracle, of which each rank computes its own experts, within the usual budget
    ids         the routers' choices on every rank, and on a part of the tokens

Shape legend: T tokens, K chosen per token, E experts, P ranks, D width of the result, N rows that arrive.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeopt.bundle.mapped_file import give_back
from moeopt.distributed.agreed_ids import flips
from moeopt.distributed.agreement import digest_of_expert
from moeopt.distributed.channel import Channel
from moeopt.distributed.combine import identity_sum
from moeopt.distributed.forward import RankExperts
from moeopt.distributed.install import ExpertOp
from moeopt.distributed.oracle import required_factor, true_sums
from moeopt.distributed.samples import Sample, SampledCase
from moeopt.distributed.tags import tag_cases, tag_difference
from moeopt.errors import NotEquivalentError
from moeopt.verification.certificate import Certificate
from moeopt.verification.distance import token_distance
from moeopt.verification.judge import FACTOR
from moeopt.verification.results import BlockCheck, CaseResult


@dataclass
class OpProof:
    """What was shown of one op; ``bitwise`` counts the cases that had the bits of one process, on all ranks.

    ``looks_around``: tokens that the router sends elsewhere when it is given a part of them: it looks at others too.
    """

    block: str
    form: str
    tags: int = 0
    cases: list[CaseResult] = field(default_factory=list)
    bitwise: int = 0
    ids: int = 0
    ties: int = 0
    looks_around: int = 0


@dataclass
class Proofs:
    """Of all ops, on ``ranks`` ranks."""

    ops: list[OpProof]
    ranks: int

    def certificate(self, before: Certificate) -> Certificate:
        """``before`` with what was shown across ranks: a case for each, and notes."""
        made = copy.deepcopy(before)
        of_name = {block.name: block for block in made.blocks}
        for proof in self.ops:
            if before.level != "off":
                block = of_name.get(proof.block) or BlockCheck(proof.block, True)
                if proof.block not in of_name:
                    made.blocks.append(block)
                    of_name[proof.block] = block
                block.cases += proof.cases
        forms = ", ".join(sorted({proof.form for proof in self.ops}))
        tags, cases = sum(p.tags for p in self.ops), sum(len(p.cases) for p in self.ops)
        made.notes += [
            f"across {self.ranks} ranks ({forms}): program, placement, versions and weights agree; dispatch is exact "
            f"in {tags} of {tags} calls with tagged experts; {cases} calls of {len(self.ops)} ops are within the "
            f"budget of the float64 oracle, {sum(p.bitwise for p in self.ops)} of them with the bits of one process",
            f"across {self.ranks} ranks: {sum(p.ids for p in self.ops)} expert choices of the example compared between "
            f"ranks and with a part of the tokens at a time, {sum(p.ties for p in self.ops)} of them near ties",
        ]
        made.notes += [
            f"across {self.ranks} ranks: {proof.block} sends {proof.looks_around} tokens to other experts when it gets "
            "a part of the tokens, so its router looks at more than one: each rank computes what the model computes of "
            "that rank's own tokens"
            for proof in self.ops
            if proof.looks_around
        ]
        return made


def prove(
    channel: Channel, divided: Sequence[tuple[ExpertOp, RankExperts]], samples: Sequence[Sample], replicated: bool
) -> Proofs:
    """All of it; a collective call.

    Raises:
        NotEquivalentError: something differs; on every rank.
        RankLostError: a rank is gone.
    """
    proofs = []
    with torch.no_grad():
        for op, bank in divided:
            sample = samples[bank.dispatch.number]
            proof = OpProof(op.name, bank.dispatch.form)
            _tags(channel, bank, op, proof)
            _weights(channel, bank, op, sample)
            for number, case in enumerate(sample.cases):
                _numbers(channel, bank, op, case, number, replicated, proof)
            _ids(channel, op, sample, replicated, proof)
            proofs.append(proof)
            give_back()
    return Proofs(proofs, channel.size)


def _all_or_none(channel: Channel, op: ExpertOp, what: str, wrong: str) -> None:
    """Raise on every rank where one found something ``wrong``."""
    told = channel.hear("comparing what was shown", wrong)
    if rank := next((r for r, text in enumerate(told) if text), None):
        wrong = told[rank]
    elif told[0]:
        rank, wrong = 0, told[0]
    else:
        return
    raise NotEquivalentError(
        f"{op.name} on {channel.size} ranks is not what it is in one process: {what} differ on rank "
        f"{channel.ranks[rank]}: {wrong}. The model was not distributed; please report this with the model's code"
    )


def _tags(channel: Channel, bank: RankExperts, op: ExpertOp, proof: OpProof) -> None:
    wrong = ""
    for case in tag_cases(channel.rank, channel.size, bank.dispatch.homes, bank.dispatch.replicated):
        different = tag_difference(bank, op.spec, case)  # also after one that was: the other ranks call it too
        wrong = wrong or different
        proof.tags += 1
    _all_or_none(channel, op, "tokens that were sent to tagged experts", wrong)


def _weights(channel: Channel, bank: RankExperts, op: ExpertOp, sample: Sample) -> None:
    wrong = next(
        (f"its number {i} is not expert {e}" for i, e in enumerate(bank.own)
         if digest_of_expert(bank.local, i, op.spec) != sample.digests[e]), "",
    )  # fmt: skip
    _all_or_none(channel, op, "the weights of its experts", wrong)


def _numbers(
    channel: Channel, bank: RankExperts, op: ExpertOp, case: SampledCase, number: int, replicated: bool, proof: OpProof
) -> None:
    spec, eps = op.spec, torch.finfo(case.y_TD.dtype).eps
    mine = slice(None) if replicated else part_of(len(case.ids_TK), channel.rank, channel.size, number)
    y_TD = bank.run(case.x_TH[mine], case.ids_TK[mine], case.weights_TK[mine], spec, False)
    homes = bank.dispatch.homes
    true_TD = channel.add("adding the float64 oracle", true_sums(bank, case, spec, channel.rank))
    true_TD += identity_sum(
        case.x_TH.double(), case.ids_TK, case.weights_TK.double(), spec, len(homes.ranks), true_TD.shape[1],
        torch.float64,
    )  # fmt: skip
    one = token_distance(case.y_TD, true_TD, eps=eps)
    here = token_distance(y_TD, true_TD[mine], eps=eps)
    factor, wrong = required_factor(one, one[mine], here, eps)
    same = torch.equal(y_TD.isfinite(), case.y_TD[mine].isfinite())
    wrong = wrong if same else "other results are finite"
    told = channel.hear(
        "comparing distances", [factor, float(here.nan_to_num().max()) if len(here) else 0.0,
                                torch.equal(y_TD, case.y_TD[mine])]
    )  # fmt: skip
    _all_or_none(
        channel, op, f"numbers of the case '{case.name}' ({FACTOR:g} times the distance of one process)", wrong
    )
    proof.bitwise += all(line[2] for line in told)
    proof.cases.append(
        CaseResult(
            f"{channel.size} ranks: {case.name}", "passed", "", len(case.ids_TK), float(one.nan_to_num().max()),
            max(line[1] for line in told), required=max(line[0] for line in told),
        )
    )  # fmt: skip


def part_of(T: int, rank: int, size: int, number: int) -> slice:
    """The tokens of one rank: evenly, all on the first, all on the last, or ever more."""
    even = [T * r // size for r in range(size + 1)]
    more = [T * r * r // (size * size) for r in range(size + 1)]
    ends = (even, [0] + [T] * size, more, [0] * size + [T])[number % 4]
    return slice(ends[rank], ends[rank + 1])


def _ids(channel: Channel, op: ExpertOp, sample: Sample, replicated: bool, proof: OpProof) -> None:
    eps = torch.finfo(sample.weights_TK.dtype).eps
    ids_PTK = channel.everyones("comparing the routers' choices", sample.ids_TK.long())
    weights_PTK = channel.everyones("comparing the routers' choices", sample.weights_TK.double())
    wrong = ""
    for ids, weights in zip(ids_PTK[1:], weights_PTK[1:], strict=True):
        flipped = _compared(proof, (ids_PTK[0], weights_PTK[0]), (ids, weights), eps)
        if flipped.any():
            wrong = f"token {int(flipped.nonzero()[0])} goes to other experts, and no near tie explains that"
    _all_or_none(channel, op, "the routers' choices", wrong)
    if sample.split is not None and not replicated:
        proof.looks_around = int(_compared(proof, *sample.split, eps).sum())
    proof.cases[0] = dataclasses.replace(proof.cases[0], ids_compared=proof.ids, ties=proof.ties)


def _compared(proof: OpProof, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """Which tokens (T,) chose otherwise beyond a near tie; ids and ties are counted."""
    (ids_TK, weights_TK), (others_TK, other_weights_TK) = one, other
    flipped_T = flips(ids_TK, others_TK, weights_TK, other_weights_TK, eps)
    differ_T = (ids_TK.sort(1).values != others_TK.sort(1).values).any(1)
    proof.ids += others_TK.numel()
    proof.ties += int((differ_T & ~flipped_T).sum())
    return flipped_T
