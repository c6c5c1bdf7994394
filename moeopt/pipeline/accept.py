"""What a user gives, as the pipeline takes it: a module without earlier rewrites, a call on the right device."""

from __future__ import annotations

import torch
from torch import nn

from moeopt.capture.divided_models import divided_parameter
from moeopt.capture.shared_copy import shared_copy
from moeopt.capture.tree import ArgsKwargs
from moeopt.capture.unreadable_models import refuse_no_values, refuse_scripted
from moeopt.errors import UsageError
from moeopt.options import Options
from moeopt.pipeline.no_model import model_hint
from moeopt.rewrite.install import rewritten_forward, uninstall
from moeopt.rewrite.replaced_floats import floats_of
from moeopt.value_types import PyObject


def as_model(model: PyObject) -> nn.Module:
    """The model as a module.

    Raises:
        UsageError: it is of another kind, or holds TorchScript; new tensors have no values here.
    """
    refuse_no_values()
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model is a {type(model).__name__}; give an nn.Module, an fx.GraphModule or an ExportedProgram"
            f"{model_hint(model)}"
        )
    refuse_scripted(model)
    refuse_divided(model)
    return model


def refuse_divided(model: nn.Module) -> None:
    """``UsageError`` where this process has a part of the model's weights only."""
    if part := _divided(model):
        raise UsageError(
            f"{part} of {type(model).__name__} is divided over processes already (a DTensor of its own expert "
            "or tensor parallelism, FSDP, or moeopt.distribute), and an expert's code is read from whole weights: "
            "load the model whole (no tp_plan, no device_mesh, no DistributedConfig, before fully_shard or "
            "FullyShardedDataParallel), optimise it, and divide its experts with moeopt.distribute(optimized, mesh)"
        )


def _divided(model: nn.Module) -> str:
    """The name of a Parameter, or of a block's experts, of which this process has a part only; "" where it has all."""
    if name := divided_parameter(model):
        return name
    for path, module in model.named_modules():  # experts that are apart are here whole, or not at all
        forward = rewritten_forward(module)
        if forward is not None and forward.divided:
            return path or "the list of experts"
    return ""


def without_rewrites(model: nn.Module, inplace: bool) -> nn.Module:
    """``model`` if it was not optimised before; else itself or a copy on the same weights, with its original code.

    Raises:
        UsageError: its experts were quantised, so that the floats which its original code computes with are gone.
    """
    coded = next((name for name, m in model.named_modules() if floats_of(m)), None)
    if coded is not None:
        raise UsageError(
            f"the experts of {coded or type(model).__name__} are codes already: this model was quantised by moeopt, "
            "and their floats are gone; optimise the original model instead, with the format and backend that you want"
        )
    if not any(rewritten_forward(m) is not None for m in model.modules()):
        return model
    twin = model if inplace else shared_copy(model)
    for module in twin.modules():
        uninstall(module)
    return twin


def moves(model: nn.Module, options: Options) -> bool:
    """Whether the device and dtype that ``options`` ask for are not those of the model: then it is copied first."""
    for tensor in (*model.parameters(), *model.buffers()):
        if options.device is not None and tensor.device != options.device:
            return True
        if options.dtype is not None and tensor.is_floating_point() and tensor.dtype != options.dtype:
            return True
    return False


def moved(call: ArgsKwargs, options: Options) -> ArgsKwargs:
    """The call on the device, and its floating-point tensors in the dtype, that ``options`` ask for."""

    def move(t: torch.Tensor) -> torch.Tensor:
        return t.to(device=options.device, dtype=options.dtype if t.is_floating_point() else None)

    moved: ArgsKwargs = torch.utils._pytree.tree_map_only(torch.Tensor, move, call)
    return moved
