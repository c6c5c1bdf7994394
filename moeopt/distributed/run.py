"""``distribute``: the experts of an optimised model on several ranks. Called on each of them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import nn

from moeopt.backends.base import Made
from moeopt.capture.shared_copy import shared_copy
from moeopt.distributed.agreement import agree
from moeopt.distributed.channel import BytesSent, Channel
from moeopt.distributed.dispatch import DispatchForm
from moeopt.distributed.install import ExpertOp, divide, expert_ops
from moeopt.distributed.mesh import ranks_of
from moeopt.distributed.optimized import DistributedOptimized
from moeopt.distributed.placements import placements_of
from moeopt.distributed.proof import prove
from moeopt.distributed.samples import sampled
from moeopt.errors import UsageError
from moeopt.optimized import Optimized
from moeopt.planning.placement import Placement
from moeopt.report import BlockReport
from moeopt.value_types import PyObject


def distribute(
    opt: Optimized,
    mesh: PyObject,
    *,
    placement: PyObject = None,
    tokens: Literal["split", "replicated"] = "split",
    exact: bool = True,
    timeout: float = 60.0,
) -> DistributedOptimized:
    """Divide the experts of every rewritten MoE block over the ranks of ``mesh``. Call it on each of them alike.

    Args:
        opt: what :func:`moeopt.optimize` returned for backend "torch". It keeps working, with all its weights: drop it
            and the original model to free them.
        mesh: a ``DeviceMesh`` of one dimension, or a process group.
        placement: which ranks hold each expert: None (neighbours on one rank), a :class:`moeopt.ClusterPlan` with a
            measured load, a :class:`moeopt.LoadProfile` (balanced by it), their JSON, one list for all blocks, or
            ``{block: list}``. A list has for each expert the ranks that hold it, several for copies.
        tokens: whether each rank calls the model on tokens of its own ("split", of any number, also none), or all ranks
            on the same tokens ("replicated").
        exact: sum each token's terms in the order of one process: the same bits, and more bytes. Otherwise partial sums
            travel: the fewest bytes, and sums in another order.
        timeout: seconds after which a rank that does not answer is lost, one that comes later to this call included:
            call ``torch.distributed.barrier()`` before it where ranks load or optimise for different times.

    Returns:
        an :class:`Optimized`: called like the model, on every rank, the same number of times.

    Raises:
        UsageError: a wrong argument; no block with experts that can be divided.
        RankLostError: a rank exited, stopped, raised, did not come, or has another model or other arguments.
        NotEquivalentError: across the ranks the experts do not compute what they do in one process.
    """
    model = _model_of(opt, tokens, exact, timeout)
    where = ranks_of(mesh)
    notes: list[str] = []
    twin = shared_copy(model)
    ops = _ops_of(twin, opt, notes)
    placed, more = placements_of(placement, [(op.name, op.experts) for op in ops], len(where.ranks))
    notes += more
    form: DispatchForm = "rows" if exact else "reduce" if tokens == "replicated" else "ranks"
    channel = Channel(where.ranks, where.backend, timeout, where.mesh.device_type)
    try:
        asked = {"tokens": tokens, "exact": exact, "timeout": timeout}
        agree(channel, opt, twin, ops, placed, asked)
        samples = sampled(twin, opt._call, ops)
        divided = divide(twin, ops, placed, channel, where.mesh, form, tokens == "replicated")
        proofs = prove(channel, divided, samples, tokens == "replicated")
    except BaseException as err:
        channel.lifeline.say(f"raised {type(err).__name__}: {str(err):.300}")
        raise
    channel.traffic = BytesSent()
    blocks = tuple(_told(block, ops, placed, channel, form) for block in opt.report.blocks)
    report = dataclasses.replace(opt.report, blocks=blocks, notes=(*opt.report.notes, *notes))
    made = Made(twin, report, proofs.certificate(opt.certificate), opt._source, None)
    return DistributedOptimized(made, opt._call, channel)


def _model_of(opt: PyObject, tokens: PyObject, exact: PyObject, timeout: PyObject) -> nn.Module:
    if isinstance(opt, DistributedOptimized):
        raise UsageError("this model is distributed already; distribute what moeopt.optimize returned")
    if not isinstance(opt, Optimized):
        raise UsageError(
            f"moeopt.distribute takes what moeopt.optimize returned, not a {type(opt).__name__}: optimise it first"
        )
    if not isinstance(opt.model, nn.Module):
        raise UsageError(
            f"this model is an engine of backend {opt.report.backend!r}, which runs in one process; optimise with "
            "backend='torch' to distribute it"
        )
    if tokens not in ("split", "replicated"):
        raise UsageError(f"tokens={tokens!r} must be 'split' or 'replicated'")
    if not isinstance(exact, bool):
        raise UsageError(f"exact={exact!r} must be True or False")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 1 <= timeout < float("inf"):
        raise UsageError(f"timeout={timeout!r} must be a number of seconds, 1 or more")
    model: nn.Module = opt.model
    return model


def _ops_of(model: nn.Module, opt: Optimized, notes: list[str]) -> list[ExpertOp]:
    ops = list(expert_ops(model, notes))
    if not ops:
        why = next((b.reason for b in opt.report.declined if b.kind == "moe"), notes[0] if notes else "")
        raise UsageError(
            "there is nothing to distribute: no rewritten block has experts that can be divided"
            + (f" ({why})" if why else "")
        )
    return ops


def _told(
    block: BlockReport, ops: list[ExpertOp], placed: list[Placement], channel: Channel, form: DispatchForm
) -> BlockReport:  # fmt: skip
    """The block's report with where its experts went."""
    homes = [p for op, p in zip(ops, placed, strict=True) if (op.name, op.experts) == (block.name, block.experts)]
    if block.status != "rewritten" or block.kind != "moe" or not homes:
        return block
    counts = [sum(rank in ranks for ranks in homes[0]) for rank in range(channel.size)]
    held = ", ".join(map(str, counts)) if len(counts) <= 8 else f"{min(counts)} to {max(counts)}"
    how = f"experts on {channel.size} ranks ({held}), reached by {form}; here: "
    return dataclasses.replace(block, lowering=how + block.lowering)
