"""Steer a probe call so that every expert is chosen, whatever the router prefers.

Some experts no input reaches (a small router row inside the hull of the others). To see what they
compute, the choice itself is replaced: a top-k, arg-max or max over exactly E scores answers ids that
take all experts in turn, with the scores gathered there. Everything downstream follows that choice.
"""

from __future__ import annotations

from typing import Any

import torch

from moeopt.value_types import FxTarget, PyObject

aten = torch.ops.aten


class ForceAllExperts:
    """A ``steer`` for :func:`moeopt.capture.tape.record`: choices over ``experts`` scores cover all of them."""

    def __init__(self, experts: int, seed: int) -> None:
        self.experts = experts
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, func: FxTarget, args: tuple[Any, ...], out: PyObject) -> PyObject:
        if func is aten.topk.default:
            dim = args[2] if len(args) > 2 else -1
            return self._steered(args[0], dim, args[1], out) if args[0].shape[dim] == self.experts else out
        if func is aten.max.dim and args[0].shape[args[1]] == self.experts:
            keep = len(args) > 2 and args[2]
            values, ids = self._steered(args[0], args[1], 1, out)
            return (values, ids) if keep else (values.squeeze(args[1]), ids.squeeze(args[1]))
        if func is aten.argmax.default and len(args) > 1 and args[1] is not None:
            if args[0].shape[args[1]] == self.experts and not (len(args) > 2 and args[2]):
                return self._steered(args[0], args[1], 1, out)[1].squeeze(args[1])
        return out

    def _steered(self, scores: torch.Tensor, dim: int, k: int, out: PyObject) -> tuple[torch.Tensor, torch.Tensor]:
        del out
        rows = scores.movedim(dim, -1)
        count = rows[..., 0].numel()
        turns = -(-count * k // self.experts) + 1
        order = torch.cat([torch.randperm(self.experts, generator=self.generator) for _ in range(turns)])
        ids = order[: count * k].reshape(count, k)
        for row in ids:  # where a turn ends inside a row, an expert could stand in it twice
            if row.unique().numel() < k:
                row.copy_(torch.randperm(self.experts, generator=self.generator)[:k])
        ids = ids.reshape(*rows.shape[:-1], k).movedim(-1, dim).to(scores.device)
        return scores.gather(dim, ids), ids
