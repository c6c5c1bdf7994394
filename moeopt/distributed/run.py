"""``distribute``: the experts of an optimised model on several ranks. Called on each of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Literal

from torch import nn

from moeopt.backends.base import Made
from moeopt.bundle.mapped_file import give_back
from moeopt.capture.shared_copy import shared_copy
from moeopt.distributed.agreement import agree, tensors_of
from moeopt.distributed.channel import BytesSent, Channel
from moeopt.distributed.dispatch import DispatchForm
from moeopt.distributed.from_directory import DirectoryCall, optimized_directory
from moeopt.distributed.install import ExpertOp, divide, expert_ops
from moeopt.distributed.mesh import Ranks, ranks_of
from moeopt.distributed.optimized import DistributedOptimized
from moeopt.distributed.own_experts import expert_parameters, leave_to_each_rank
from moeopt.distributed.placements import placements_of
from moeopt.distributed.proof import prove
from moeopt.distributed.samples import Sample, sampled
from moeopt.errors import NotSaveableError, UsageError
from moeopt.optimized import Optimized
from moeopt.options import Options
from moeopt.pipeline.accept import refuse_divided
from moeopt.planning.placement import Placement
from moeopt.report import BlockReport
from moeopt.rewrite.whole_model import check_as_verified, without_original_calls
from moeopt.value_types import PyObject


def distribute(
    opt: Optimized | str | os.PathLike[str],
    mesh: PyObject,
    *,
    placement: PyObject = None,
    tokens: Literal["split", "replicated"] = "split",
    exact: bool = True,
    timeout: float = 60.0,
    example_inputs: PyObject = None,
    workspace: str | os.PathLike[str] | None = None,
    task: str | None = None,
    trust_remote_code: bool = False,
    options: Options | None = None,
    **fields: PyObject,
) -> DistributedOptimized:
    """Divide the experts of every rewritten MoE block over the ranks of ``mesh``. Call it on each of them alike.

    Args:
        opt: what :func:`moeopt.optimize` returned for backend "torch". It keeps working, with all its weights: drop it
            and the original model to free them. Or a Hugging Face directory with safetensors files, of which each rank
            holds in memory its own experts and, while it reads, two layers.
        mesh: a ``DeviceMesh`` of one dimension, or a process group.
        placement: which ranks hold each expert: None (neighbours on one rank), a :class:`moeopt.ClusterPlan` with a
            measured load, a :class:`moeopt.LoadProfile` (balanced by it), their JSON, one list for all blocks, or
            ``{block: list}``. A list has for each expert the ranks that hold it, several for copies.
        tokens: whether each rank calls the model on tokens of its own ("split", of any number, also none), or all ranks
            on the same tokens ("replicated").
        exact: sum each token's terms in the order of one process: the same bits, and more bytes, wherever the kernel
            gives a row the same bits beside other rows (PyTorch's products in float64 do not: a last bit may differ).
            Otherwise partial sums travel: the fewest bytes, and sums in another order. Of one expert a token there are
            none, and the exact form is taken.
        timeout: seconds after which a rank that does not answer is lost, one that comes later to this call included:
            call ``torch.distributed.barrier()`` before it where ranks load or optimise for different times. Ranks that
            read a directory wait for each other, however long that takes, as long as all of them live.
        example_inputs, task, trust_remote_code, options, fields: of a directory, as in :func:`moeopt.optimize`.
        workspace: of a directory, a folder on each machine that its ranks share: there the first of them writes the
            weights in the model's form (experts that are apart in the files become one Parameter) and what it has
            verified, and the others map them. It stays, and the next start goes on from it. None where the files have
            all weights as the model has them.

    Returns:
        an :class:`Optimized`: called like the model, on every rank, the same number of times.

    Raises:
        UsageError: a wrong argument; no block with experts that can be divided.
        CheckpointError: files of a directory are missing, damaged, or of another model.
        RankLostError: a rank exited, stopped, raised, did not come, or has another model or other arguments.
        NotEquivalentError: across the ranks the experts do not compute what they do in one process.
    """
    _check(tokens, exact, timeout)
    call = DirectoryCall(example_inputs, workspace, task, trust_remote_code, options, fields)
    path = opt if isinstance(opt, (str, os.PathLike)) else None
    if path is None:
        _check_optimized(opt, call)
    return _distributed(opt, path, call, ranks_of(mesh), placement, tokens, exact, timeout)


def _distributed(
    opt: Optimized | str | os.PathLike[str], path: str | os.PathLike[str] | None, call: DirectoryCall, where: Ranks,
    placement: PyObject, tokens: str, exact: bool, timeout: float,
) -> DistributedOptimized:  # fmt: skip
    """:func:`distribute` with arguments that were checked; ``path`` is that of a directory."""
    channel = Channel(where.ranks, where.backend, timeout, where.mesh.device_type)
    with _told_to_others(channel):  # also what one rank alone refuses; ranks that read for hours see each other
        if path is not None:
            opt = optimized_directory(path, channel, call)
        assert isinstance(opt, Optimized)
        _check_unchanged(opt, where.mesh.device_type)
        notes: list[str] = []
        twin = shared_copy(opt.model)
        without_original_calls(twin)  # it has all experts here, and each rank measured for itself
        ops = _ops_of(twin, opt, notes)
        placed, more = placements_of(placement, [(op.name, op.experts) for op in ops], len(where.ranks))
        notes += more
        agree(channel, opt, twin, ops, placed, {"tokens": tokens, "exact": exact, "timeout": timeout})
        give_back()  # what comparing weights took, before this rank's own are laid beside it
        samples = sampled(twin, opt._call, ops)
        forms = [_form(exact, tokens, sample) for sample in samples]
        divided = divide(twin, ops, placed, channel, where.mesh, forms, tokens == "replicated")
        held = expert_parameters(twin, ops)
        leave_to_each_rank(twin, [*held])
        proofs = prove(channel, divided, samples, tokens == "replicated")
    channel.traffic = BytesSent()
    blocks = tuple(_told(block, ops, placed, channel, forms) for block in opt.report.blocks)
    report = dataclasses.replace(opt.report, blocks=blocks, notes=(*opt.report.notes, *notes))
    made = Made(twin, report, proofs.certificate(opt.certificate), opt._source, None)
    return DistributedOptimized(made, opt._call, channel, [*held])


@contextlib.contextmanager
def _told_to_others(channel: Channel) -> Iterator[None]:
    """What is raised inside is told to the other ranks."""
    try:
        yield
    except BaseException as err:
        channel.lifeline.say(f"raised {type(err).__name__}: {str(err):.300}")
        raise


def _check(tokens: PyObject, exact: PyObject, timeout: PyObject) -> None:
    if tokens not in ("split", "replicated"):
        raise UsageError(f"tokens={tokens!r} must be 'split' or 'replicated'")
    if not isinstance(exact, bool):
        raise UsageError(f"exact={exact!r} must be True or False")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 1 <= timeout < float("inf"):
        raise UsageError(f"timeout={timeout!r} must be a number of seconds, 1 or more")


def _check_optimized(opt: PyObject, call: DirectoryCall) -> None:
    if isinstance(opt, DistributedOptimized):
        raise UsageError("this model is distributed already; distribute what moeopt.optimize returned")
    if not isinstance(opt, Optimized):
        if isinstance(opt, nn.Module):
            refuse_divided(opt)  # which optimise would refuse, too
        raise UsageError(
            f"moeopt.distribute takes what moeopt.optimize returned, not a {type(opt).__name__}: optimise it first, or "
            "give the directory of a Hugging Face checkpoint"
        )
    if not isinstance(opt.model, nn.Module):
        raise UsageError(
            f"this model is an engine of backend {opt.report.backend!r}, which runs in one process; optimise with "
            "backend='torch' to distribute it"
        )
    refuse_divided(opt.model)
    if call.given:
        raise UsageError(
            f"{call.given[0]}= is for a directory, and this model is optimised already: give it to moeopt.optimize, or "
            "leave it out"
        )


def _check_unchanged(opt: Optimized, device: str) -> None:
    """``UsageError`` where the model is not what was verified, or lies where ranks of ``device`` exchange nothing."""
    model = opt.model
    try:
        check_as_verified(model, "the ranks")
    except NotSaveableError as err:
        raise UsageError(str(err)) from None
    elsewhere = next(((n, t.device.type) for n, t in tensors_of(model) if t.device.type != device), None)
    if elsewhere is None:
        return
    name, here = elsewhere
    if here == "meta":
        raise UsageError(
            f"{name} of {type(model).__name__} is on the meta device (offloaded?) and has no values: load the whole "
            "model, then optimise it; or give the checkpoint's directory, of which each rank reads its own experts"
        )
    raise UsageError(
        f"{name} of {type(model).__name__} is on {here!r}, and the ranks of the mesh exchange tensors on {device!r}: "
        f"give a mesh of the model's device, as init_device_mesh({here!r}, ...) makes it, or move the model before it "
        "is optimised (device=)"
    )


def _ops_of(model: nn.Module, opt: Optimized, notes: list[str]) -> list[ExpertOp]:
    ops = list(expert_ops(model, notes))
    if not ops:
        why = next((b.reason for b in opt.report.declined if b.kind == "moe"), notes[0] if notes else "")
        raise UsageError(
            "there is nothing to distribute: no rewritten block has experts that can be divided"
            + (f" ({why})" if why else "")
        )
    return ops


def _form(exact: bool, tokens: str, sample: Sample) -> DispatchForm:
    """The form that gives what is asked for with the fewest bytes, whatever the numbers of tokens and ranks are.

    Where a token chooses one expert, there are no partial sums, and the exact form sends no more than the others.
    """
    if exact or sample.ids_TK.shape[1] == 1:
        return "rows"
    return "reduce" if tokens == "replicated" else "ranks"


def _told(
    block: BlockReport, ops: list[ExpertOp], placed: list[Placement], channel: Channel, forms: list[DispatchForm]
) -> BlockReport:  # fmt: skip
    """The block's report with where its experts went."""
    found = zip(ops, placed, forms, strict=True)
    homes = [(p, form) for op, p, form in found if (op.name, op.experts) == (block.name, block.experts)]
    if block.status != "rewritten" or block.kind != "moe" or not homes:
        return block
    placement, form = homes[0]
    counts = [sum(rank in ranks for ranks in placement) for rank in range(channel.size)]
    held = ", ".join(map(str, counts)) if len(counts) <= 8 else f"{min(counts)} to {max(counts)}"
    how = f"experts on {channel.size} ranks ({held}), reached by {form}; here: "
    return dataclasses.replace(block, lowering=how + block.lowering)
