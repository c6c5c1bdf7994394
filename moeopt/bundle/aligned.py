"""Tensors that are read from a file, put where PyTorch itself would have put them.

A tensor of a safetensors file is a view of the mapped file and begins wherever the file has it. A matmul adds
in an order that depends on the address (MKL's matrix times vector on AMD and AVX2 CPUs looks at it modulo 16 bytes), so
the last bits of one row's result differ from those of the model that was saved.
"""

from __future__ import annotations

import torch

ALIGNMENT = 64
"""Bytes: PyTorch begins each CPU allocation at a multiple of them (``c10::gAlignment``)."""


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, copied where it does not begin at a multiple of :data:`ALIGNMENT`; any dtype, shape and device."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
