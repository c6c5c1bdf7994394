"""Tensors bound to a session's inputs and outputs by address, and bound anew only where an address changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moeopt.value_types import OrtObject

TensorPlace = tuple[torch.device, torch.dtype, torch.Size, int]


def placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` as a session reads it: contiguous, on ``device``; but for integers and booleans that are on the CPU.

    ONNX Runtime itself copies what a node needs elsewhere, and only that: sizes are often read on the CPU.
    """
    tensor = tensor.detach()
    if tensor.device != device and (tensor.is_floating_point() or tensor.device.type != "cpu"):
        tensor = tensor.to(device)
    return tensor.contiguous().resolve_conj().resolve_neg()


class BoundTensors:
    """One binding of one thread. Inputs stay bound from call to call while they lie where they lay.

    The binding knows addresses and owns no input, so each call compares them with those of its own live tensors.

    Attributes:
        binding: the ``onnxruntime.IOBinding``.
    """

    def __init__(self, session: OrtObject) -> None:
        self.binding = session.io_binding()
        self._bound: dict[str, TensorPlace] = {}

    def bind_input(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Bind a contiguous tensor; the result must live until the run is over."""
        # ONNX Runtime refuses the null pointer of an empty tensor
        buffer = tensor if tensor.numel() else tensor.new_empty(1)
        place = (tensor.device, tensor.dtype, tensor.shape, buffer.data_ptr())
        if self._bound.get(name) != place:
            self._bound.pop(name, None)
            self.binding.bind_input(name, *_device(tensor.device), *_described(tensor), buffer.data_ptr())
            self._bound[name] = place
        return buffer

    def free_outputs(self, names: Sequence[str], device: torch.device) -> None:
        """Have ONNX Runtime make the outputs of the next run on ``device``.

        At each run: outputs that stayed bound would be written into again, under whoever holds them.
        """
        for name in names:
            self.binding.bind_output(name, *_device(device))

    def bind_output(self, name: str, tensor: torch.Tensor) -> None:
        """Have the runs that follow write one output into ``tensor``, contiguous and not empty."""
        self.binding.bind_output(name, *_device(tensor.device), *_described(tensor), tensor.data_ptr())

    def outputs(self, is_bool: Sequence[bool]) -> list[torch.Tensor]:
        """The outputs of the last run, on the memory that ONNX Runtime made for them, which the binding lets go of."""
        values = [torch.utils.dlpack.from_dlpack(v._ortvalue.to_dlpack()) for v in self.binding.get_outputs()]
        self.binding.clear_binding_outputs()
        return [v.view(torch.bool) if b else v for v, b in zip(values, is_bool, strict=True)]


def _device(device: torch.device) -> tuple[str, int]:
    return device.type, device.index or 0


def _described(tensor: torch.Tensor) -> tuple[int, list[int]]:
    """The number of ONNX's element type, and the shape."""
    from onnx_ir.tensor_adapters import from_torch_dtype

    return int(from_torch_dtype(tensor.dtype)), list(tensor.shape)
