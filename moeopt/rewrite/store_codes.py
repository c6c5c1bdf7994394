"""The codes of a model's quantised experts become its buffers, and the floats that they replace go."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor, nn

from moeopt.rewrite.install import rewritten_forward
from moeopt.rewrite.live_codes import LiveCodes
from moeopt.rewrite.replaced_floats import FLOATS

Holders = dict[int, set[str]]
"""By the identity of a tensor, every name that it has in a model."""


def store_codes(model: nn.Module) -> list[str]:
    """Register the codes of each quantised block of ``model`` on the block's module and drop its floats.

    A Parameter goes where the experts' matrices are all of it and nothing else of the model holds it.

    Returns:
        the names of the Parameters that stayed although experts of theirs were quantised.
    """
    blocks = {path: codes for path, module in model.named_modules() if (codes := codes_of(module))}
    spoken = {
        _joined(path, one)
        for path, codes in blocks.items()
        for bank in codes
        for one in bank.paths()
        if _whole(model.get_submodule(path), one, bank)
    }
    holders = _holders(model)
    kept: list[str] = []
    for path, codes in blocks.items():
        module = model.get_submodule(path)
        for bank in codes:
            for name in bank.names:
                module.register_buffer(name, bank.held[name])
            bank.held = module._buffers
        if (forward := rewritten_forward(module)) is not None:
            forward.program.block.codes.clear()
        gone: dict[str, Any] = {}
        for one in sorted({p for bank in codes for p in bank.paths()}):
            registry, key = _place(module, one)
            tensor = registry.get(key)
            if isinstance(tensor, Tensor) and holders.get(id(tensor), {""}) <= spoken:
                gone[one], registry[key] = (tuple(tensor.shape), tensor.dtype), None
            elif tensor is not None:
                kept.append(_joined(path, one))
        module.__dict__[FLOATS] = gone
    return kept


def codes_of(module: nn.Module) -> list[LiveCodes]:
    """The quantised banks of a rewritten block."""
    forward = rewritten_forward(module)
    return [] if forward is None else [bank for bank, _ in forward.banks if isinstance(bank, LiveCodes)]


def _holders(model: nn.Module) -> Holders:
    found: Holders = defaultdict(set)
    for path, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[id(tensor)].add(_joined(path, key))
    return found


def _place(module: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    """The table of Parameters or buffers that has ``path``, and the name there."""
    owner, _, key = path.rpartition(".")
    home = module.get_submodule(owner)
    registry: dict[str, Any] = home._parameters if key in home._parameters else home._buffers
    return registry, key


def _whole(module: nn.Module, path: str, codes: LiveCodes) -> bool:
    """Whether the experts' matrices are all that the tensor at ``path`` holds."""
    registry, key = _place(module, path)
    tensor = registry.get(key)
    matrices = [w for ref in codes.experts for w in (*ref.w_in, ref.w_out) if w.path == path]
    regions = {(w.origin, w.dk, w.dm, w.k, w.m): w.k * w.m for w in matrices}
    return isinstance(tensor, Tensor) and sum(regions.values()) == tensor.numel()


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
