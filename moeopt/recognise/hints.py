"""``hints={name pattern: ExpertsSpec or callable}``: the expert user's word on what an expert computes.

A hint replaces the fitting of the function between an expert's matmuls; everything else (rows,
weights, routing) is still read off the probe call, and the block is verified like any other, so a wrong
hint is declined and never believed.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from moeopt.errors import UsageError
from moeopt.ir.specs import ExpertsSpec

_EXAMPLE = 'moeopt.ExpertsSpec(rows="plain", activation="gelu")'


def hint_for(hints: Mapping[str, Any], path: str, block: nn.Module, weights: Collection[int]) -> ExpertsSpec | None:
    """The spec of the first hint whose pattern matches ``path``; None where none does.

    Args:
        path: that of ``block``, a module around experts; a pattern is matched with the whole of it (fnmatch).
        weights: ids of the Parameters of the experts.

    Raises:
        UsageError: a hint is neither an ExpertsSpec nor a callable that returns one for the module of an expert.
    """
    for pattern, hint in hints.items():
        if not fnmatch.fnmatch(path, pattern):
            continue
        spec, of = hint, ""
        if callable(hint):
            expert = expert_module(block, weights)
            of = f" for the {type(expert).__name__} that it was called with"
            try:
                spec = hint(expert)
            except Exception as err:
                raise UsageError(
                    f"hints[{pattern!r}] raised {type(err).__name__}{of} at {path}: {err}; a callable is given the "
                    f"module of an expert and returns what it computes, such as {_EXAMPLE}"
                ) from err
        if not isinstance(spec, ExpertsSpec):
            raise UsageError(f"hints[{pattern!r}] gave {spec!r}{of} at {path}; it must be an ExpertsSpec: {_EXAMPLE}")
        return spec
    return None


def expert_module(block: nn.Module, weights: Collection[int]) -> nn.Module:
    """The module of the first expert; where no module is one expert's, the module that holds the experts' weights."""
    for home in block.modules():
        children = [child for child in home.children() if len(_held(child, weights)) > 1]
        alike = len({type(child) for child in children}) == 1
        if len(children) > 1 and alike and not isinstance(children[0], (nn.ModuleList, nn.ModuleDict)):
            return children[0]
    return next((m for m in block.modules() if _held(m, weights, recurse=False)), block)


def _held(module: nn.Module, weights: Collection[int], recurse: bool = True) -> set[int]:
    return {id(p) for p in module.parameters(recurse)} & set(weights)
