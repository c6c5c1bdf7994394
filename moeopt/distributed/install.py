"""The distributed form of a rewritten model: for each op with experts where they go, and the forward that knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from moeopt.distributed.channel import Channel
from moeopt.distributed.dispatch import Dispatch, DispatchForm
from moeopt.distributed.forward import DistributedForward, RankExperts, Sharded
from moeopt.distributed.homes import ExpertHomes
from moeopt.distributed.own_experts import OwnExperts
from moeopt.distributed.parts import DividedWeight, WholeWeight, vectors_of, weights_of
from moeopt.distributed.shards import drop, local_refs
from moeopt.distributed.state import ExpertState
from moeopt.ir.weight_refs import parts_of, tensor_at
from moeopt.ops.reference import out_features
from moeopt.planning.placement import Placement
from moeopt.rewrite.install import RewrittenForward, rewritten_forward
from moeopt.rewrite.live_codes import LiveCodes
from moeopt.value_types import PyObject


@dataclass
class ExpertOp:
    """One op whose experts can be divided: number ``index`` of the block ``name``.

    ``weights`` are its Parameters, by who reads them.
    """

    name: str
    module: nn.Module
    forward: RewrittenForward
    index: int
    weights: list[DividedWeight]

    @property
    def key(self) -> str:
        """Which attribute of the module holds its forward."""
        return next(k for k in ("forward", "_old_forward") if self.module.__dict__.get(k) is self.forward)

    @property
    def bank(self) -> PyObject:
        """All its experts, while they are here."""
        return self.forward.banks[self.index][0]

    @property
    def spec(self) -> PyObject:
        """Their function."""
        return self.forward.program.block.weights[self.index].spec

    @property
    def experts(self) -> int:
        """How many there are."""
        return len(self.forward.program.block.weights[self.index][0])


def expert_ops(model: nn.Module, notes: list[str]) -> Iterator[ExpertOp]:
    """The ops of ``model`` whose experts can be divided; of the others a note."""
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    several = [key for key, count in names.items() if count > 1]
    for path, module in model.named_modules():
        forward = rewritten_forward(module)
        for index, (refs, _) in enumerate(forward.program.block.weights if forward is not None else ()):
            assert forward is not None
            if len(refs) < 2:
                continue
            name = path or type(model).__name__
            weights = weights_of(module, forward.program, index, several, _codes_of(forward.banks[index][0]))
            whole = [w for w in weights if isinstance(w, WholeWeight)]
            if len(whole) == len(weights):
                notes.append(f"{name} is not divided: {whole[0].path}: {whole[0].reason}")
                continue
            for reason in dict.fromkeys(w.reason for w in whole):
                alike = [w.path for w in whole if w.reason == reason]
                more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
                notes.append(f"{name}: every rank keeps {alike[0]}{more} whole: {reason}")
            yield ExpertOp(name, module, forward, index, weights)


def _codes_of(bank: PyObject) -> list[str]:
    """The buffers of a bank of codes; [] of floats."""
    return bank.names if isinstance(bank, LiveCodes) else []


def divide(
    model: nn.Module, ops: list[ExpertOp], placements: Sequence[Placement], channel: Channel, mesh: PyObject,
    forms: Sequence[DispatchForm], replicated: bool,
) -> list[tuple[ExpertOp, RankExperts]]:  # fmt: skip
    """Drop the experts of other ranks from ``model`` and install what reaches them."""
    rank = channel.rank
    divided: list[tuple[ExpertOp, RankExperts]] = []
    of_module: dict[int, list[tuple[int, ExpertOp]]] = {}
    for number, op in enumerate(ops):
        of_module.setdefault(id(op.module), []).append((number, op))
    for found in of_module.values():
        first = found[0][1]
        before = set(dict(first.module.named_parameters()))
        sharded, shards = {}, []
        for number, op in found:
            homes = ExpertHomes(placements[number], channel.size)
            refs, spec = first.forward.program.block.weights[op.index]
            coded = isinstance(op.bank, LiveCodes)
            paths = {part.path for ref in refs for part in (vectors_of(ref) if coded else parts_of(ref))}
            trained = any(tensor_at(op.module, path).requires_grad for path in paths)
            width = out_features(op.bank, spec)
            apart = OwnExperts(op.module, op.weights, homes, rank)
            dispatch = Dispatch(channel, homes, op.name, number, forms[number], replicated, width, trained, apart)
            own = homes.experts_of(rank)
            format = op.bank.format if coded else None
            sharded[op.index] = Sharded(dispatch, own, local_refs(refs, op.weights, own), format)
            shards += drop(op.module, op.weights, homes, rank, mesh)
        absent = before - set(dict(first.module.named_parameters()))
        ExpertState(channel, shards, absent, first.name, mesh).install(first.module)
        program = replace(first.forward.program, weights=None)  # those of a rank are others than the model's
        forward = DistributedForward(first.module, program, sharded)
        first.module.__dict__[first.key] = forward
        divided += [(op, forward.banks[op.index][0]) for _, op in found]
    return divided
