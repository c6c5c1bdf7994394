"""Weights to safetensors and back: each byte once, whatever shares it.

Tied parameters are one tensor; overlapping views of one storage (a stack and the experts that are slices of it) are one
flat block that each of them is a view of. What shares nothing is saved as it is. Strides come back as they were, so
that a kernel which looks at them makes the same choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moeopt.bundle.values import DTYPES
from moeopt.errors import BundleError, NotSaveableError
from moeopt.value_types import JsonValue


@dataclass(frozen=True)
class Extent:
    """The bytes of its storage that a tensor's elements lie in: [start, stop)."""

    name: str
    tensor: torch.Tensor
    start: int
    stop: int


def pack(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """``(blocks, table)``: what safetensors stores, and for each name the view of a block that it is."""
    by_storage: dict[Any, list[Extent]] = {}
    for name, tensor in tensors.items():
        extent = _extent(name, tensor.detach())
        key = (str(tensor.device), tensor.untyped_storage().data_ptr()) if tensor.numel() else name
        by_storage.setdefault(key, []).append(extent)
    blocks: dict[str, torch.Tensor] = {}
    table: dict[str, dict[str, Any]] = {}
    for extents in by_storage.values():
        for cluster in _overlapping(extents):
            block_name = cluster[0].name
            block, dtype, start = _block(cluster)
            blocks[block_name] = block
            for e in cluster:
                offset, odd = divmod(e.start - start, e.tensor.element_size())
                if odd:
                    raise NotSaveableError(f"the weight {e.name!r} shares memory at an offset that its dtype lacks")
                table[e.name] = {
                    "block": block_name,
                    "dtype": str(e.tensor.dtype).removeprefix("torch."),
                    "shape": list(e.tensor.shape),
                    "stride": list(_strides(e.tensor, block, dtype)),
                    "offset": offset,
                }
    return blocks, table


def unpack(name: str, entry: JsonValue, blocks: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The tensor that ``entry`` describes, as a view of its block; ``BundleError`` when it reaches outside."""
    try:
        dtype, shape, stride = DTYPES[entry["dtype"]], list(entry["shape"]), list(entry["stride"])
        offset, block = entry["offset"], blocks(entry["block"])
        whole = all(type(n) is int and n >= 0 for n in [*shape, *stride, offset]) and len(shape) == len(stride)
    except (KeyError, TypeError) as err:
        raise BundleError(f"the weight {name!r} is not described as moeopt does it ({err!r})") from None
    if not whole:
        raise BundleError(f"the weight {name!r} has a shape, stride or offset that is not a list of whole numbers")
    flat = block.reshape(-1)
    if flat.dtype != dtype:
        if flat.dtype != torch.uint8 or flat.numel() % dtype.itemsize:
            raise BundleError(f"the weight {name!r} should be {dtype}, and its block is {flat.dtype}")
        flat = flat.view(dtype)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if 0 not in shape and last >= flat.numel():
        raise BundleError(f"the weight {name!r} reaches element {last} of a block that has {flat.numel()}")
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device=flat.device)
    return flat.as_strided(shape, stride, flat.storage_offset() + offset)


def _extent(name: str, tensor: torch.Tensor) -> Extent:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_quantized or tensor.is_meta:
        what = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__} of layout {tensor.layout}"
        raise NotSaveableError(f"the weight {name!r} is {what}: a bundle holds plain dense tensors")
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    size = tensor.element_size()
    start = int(tensor.storage_offset()) * size
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    reach = int(sum((n - 1) * s for n, s in steps)) if tensor.numel() else -1
    return Extent(name, tensor, start, start + (reach + 1) * size)


def _overlapping(extents: list[Extent]) -> list[list[Extent]]:
    clusters: list[list[Extent]] = []
    stop = -1
    for e in sorted(extents, key=lambda e: (e.start, -e.stop)):
        if not clusters or e.start >= stop:
            clusters.append([])
        clusters[-1].append(e)
        stop = max(stop, e.stop)
    return clusters


def _block(cluster: list[Extent]) -> tuple[torch.Tensor, torch.dtype, int]:
    """The tensor that holds a cluster's bytes, the dtype it is seen as, and its first byte in the storage."""
    first = cluster[0].tensor
    start, stop = cluster[0].start, max(e.stop for e in cluster)
    sparse = stop - start > 2 * max(e.tensor.numel() * e.tensor.element_size() for e in cluster)
    same = all(
        (e.start, e.tensor.shape, e.tensor.stride(), e.tensor.dtype)
        == (start, first.shape, first.stride(), first.dtype)
        for e in cluster
    )
    if same and (first.is_contiguous() or sparse):
        return first.contiguous(), first.dtype, start
    dtypes = {e.tensor.dtype for e in cluster}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.uint8
    flat = torch.empty(0, dtype=dtype, device=first.device)
    flat.set_(first.untyped_storage(), start // dtype.itemsize, ((stop - start) // dtype.itemsize,), (1,))
    return flat, dtype, start


def _strides(tensor: torch.Tensor, block: torch.Tensor, dtype: torch.dtype) -> tuple[int, ...]:
    """A tensor that was saved as a contiguous copy of itself has the copy's strides."""
    return block.stride() if block.shape == tensor.shape and block.dim() > 1 else tensor.stride()
