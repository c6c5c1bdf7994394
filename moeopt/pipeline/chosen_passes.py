"""The pass manager that a user's options ask for, and where ``quantize_experts`` finds codes that were published."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moeopt.onnx_in.coded import coded_weights
from moeopt.options import Options, QuantPlan
from moeopt.passes.base import Pass
from moeopt.passes.manager import PassManager, check_names
from moeopt.passes.pipeline import PIPELINE
from moeopt.passes.quantize_experts import BankRows, QuantizeExperts
from moeopt.passes.read_codes import ReadCodes
from moeopt.published.experts import PublishedExperts
from moeopt.published.file_codes import FileExperts


def pass_manager(
    options: Options, runtime: object, model: nn.Module | None = None, rows: BankRows | None = None
) -> PassManager:
    """The manager that ``options`` ask for.

    Args:
        model: the model that is optimised; a quantising plan may take the codes of its checkpoint.
        rows: the rows of calibration data by which the plan's method weighs.

    Raises:
        UsageError: ``options`` name an unknown pass, or codes of a checkpoint where the model was read from none.
    """
    plan = options.quantize
    published = _codes_for(model) if model is not None and plan is not None and plan.takes_checkpoint else None
    chosen = PIPELINE if options.passes is None else options.passes
    if runtime is not None:
        chosen = tuple([ReadCodes(any_format=True) if isinstance(one, ReadCodes) else one for one in chosen])
    passes = with_plan(chosen, plan, published, rows)
    check_names(options.skip_passes, (*passes, *PIPELINE), "skip_passes")
    if not isinstance(options.print_passes, bool):
        check_names(options.print_passes, (*passes, *PIPELINE), "print_passes")
    here = {one.name for one in passes}
    return PassManager(
        passes,
        [name for name in options.skip_passes if name in here],  # MOEOPT_SKIP_PASSES also holds for other pass lists
        options.only_passes,
        options.fuel,
        runtime is not None,
        options.dump is not None,
    )


def _codes_for(model: nn.Module) -> PublishedExperts | FileExperts:
    """The source of the codes of a model's experts: the ONNX file or the checkpoint that the model was read from."""
    coded = coded_weights(model)
    return FileExperts(coded) if coded else PublishedExperts(model)


def with_plan(
    passes: Sequence[Pass], plan: QuantPlan | None, published: PublishedExperts | FileExperts | None = None,
    rows: BankRows | None = None,
) -> tuple[Pass, ...]:  # fmt: skip
    """``passes`` in which ``quantize_experts`` follows ``plan``; appended where ``passes`` lack it."""
    if plan is None:
        return tuple(passes)
    asked = QuantizeExperts(plan, published, rows)
    if not any(one.name == asked.name for one in passes):
        return (*passes, asked)
    return tuple([asked if one.name == asked.name else one for one in passes])
