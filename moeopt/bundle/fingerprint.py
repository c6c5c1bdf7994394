"""Which model a bundle came from: its class and a sha256 over names, shapes, dtypes and values of its state."""

from __future__ import annotations

import hashlib

import torch

from moeopt.ir.element_bytes import element_bytes


def fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """``{"class": ..., "sha256": ...}``; two models agree when their class and every parameter and buffer do."""
    digest = hashlib.sha256()
    seen: dict[tuple[object, ...], bytes] = {}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        if tensor.is_meta or tensor.layout != torch.strided:
            continue
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if key not in seen:  # tied tensors are read once
            seen[key] = hashlib.sha256(element_bytes(tensor.cpu()).numpy().data).digest()
        digest.update(seen[key])
    return {"class": f"{type(model).__module__}.{type(model).__qualname__}", "sha256": digest.hexdigest()}
