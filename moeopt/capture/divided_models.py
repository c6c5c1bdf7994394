"""Models of which this process has a part only: another library has divided their Parameters over processes."""

from __future__ import annotations

import sys

from torch import nn

from moeopt.value_types import PyObject


def divided_parameter(model: nn.Module) -> str:
    """The first Parameter of which this process has a part only, by name; "" where all are here whole."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):  # a DTensor, whose shape is that of the whole
            return name
    return flattened_parameter(model)


def flattened_parameter(model: nn.Module) -> str:
    """The first Parameter whose own shape is gone, by name: ``FullyShardedDataParallel`` lays many in one vector, of
    which each process has a part."""
    kind: PyObject = getattr(
        sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel"), "FullyShardedDataParallel", None
    )
    for path, module in model.named_modules() if kind is not None else ():
        handle = getattr(module, "_handle", None)
        if not isinstance(module, kind) or handle is None:
            continue
        flat = getattr(handle, "flat_param", None)
        if handle.uses_sharded_strategy or any(parameter is flat for parameter in module.parameters()):
            inside = next(iter(getattr(flat, "_fqns", ())), "_flat_param")
            return f"{path}.{inside}" if path else inside
    return ""
