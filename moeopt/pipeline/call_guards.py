"""The guard of a block's calls, made of the calls that were recorded: what they have in common holds for later ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moeopt.capture.tree import ArgsKwargs, tree_leaves
from moeopt.errors import Declined
from moeopt.recognise.id_bounds import IdBounds
from moeopt.rewrite.call_guard import BoundArguments
from moeopt.rewrite.install import OPAQUE, TENSOR, CallGuard
from moeopt.rewrite.symbolic_shapes import tied_sizes
from moeopt.value_types import PyObject


def guard_of(bounds: Sequence[BoundArguments], training: bool | None, kept: tuple[IdBounds, ...]) -> CallGuard:
    """The guard of calls like those of ``bounds``.

    Args:
        bounds: the arguments of each recorded call.
        training: the mode that the block must be in; None where it computes the same in both.
        kept: of each tensor argument the bounds that some of the experts' ids rely on.
    """
    first = bounds[0]
    shapes = [[tuple(t.shape) for t in bound.tensors()] for bound in bounds]
    return CallGuard(
        [_template(leaf) for leaf in tree_leaves(list(first.values))], _fixed(shapes),
        [t.dtype for t in first.tensors()], training, False, kept=kept, tied=tied_sizes(shapes),
    )  # fmt: skip


def tensors_of(call: ArgsKwargs) -> list[torch.Tensor]:
    """The tensors of a call, in the order in which they are given."""
    return [leaf for leaf in tree_leaves(list(call)) if isinstance(leaf, torch.Tensor)]


def check_order(call: ArgsKwargs, ordered: list[torch.Tensor]) -> None:
    """Input steps were recorded in call order; the program takes tensors in signature order.

    Raises:
        Declined: the two differ.
    """
    at = {id(t): i for i, t in enumerate(ordered)}
    if [at[id(t)] for t in tensors_of(call)] != list(range(len(ordered))):
        raise Declined("its tensor arguments are passed in another order than its signature names them")


def _template(leaf: PyObject) -> PyObject:
    if isinstance(leaf, torch.Tensor):
        return TENSOR
    return leaf if isinstance(leaf, (int, float, str, bool, type(None), torch.dtype, torch.device)) else OPAQUE


def _fixed(shapes: list[list[tuple[int, ...]]]) -> list[tuple[int | None, ...]]:
    """Each input's sizes, None where they varied between the probe calls."""
    return [
        tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*versions, strict=True))
        for versions in zip(*shapes, strict=True)
    ]
