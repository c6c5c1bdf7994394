"""Where an expert's weights are: regions of the module's own Parameters, never copies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

Index = tuple[int, ...]


@dataclass(frozen=True)
class MatrixRef:
    """A (K, M) matrix inside a Parameter: K the contracted axis, M the output axis.

    Element (k, m) is ``parameter[origin + k*dk + m*dm]``.
    """

    path: str
    origin: Index
    dk: Index
    dm: Index
    k: int
    m: int

    def offset_and_strides(self, stride: Index) -> tuple[int, int, int]:
        """Storage offset of the origin and element strides along K and M, for a parameter's ``stride``."""

        def dot(a: Index) -> int:
            return sum(x * y for x, y in zip(a, stride, strict=True))

        return dot(self.origin), dot(self.dk), dot(self.dm)


@dataclass(frozen=True)
class VectorRef:
    """An (M,) bias inside a Parameter: element m is ``parameter[origin + m*dm]``."""

    path: str
    origin: Index
    dm: Index
    m: int


@dataclass(frozen=True)
class ExpertRef:
    """One expert's weights, as regions of Parameters.

    ``neurons``: which of the regions' neurons the expert has; None means all of them. Those are picked at each
    read, a copy that lives as long as the call, so that later changes of the weights show.
    """

    w_in: tuple[MatrixRef, ...]
    b_in: tuple[VectorRef | None, ...]
    w_out: MatrixRef
    b_out: VectorRef | None
    neurons: tuple[int, ...] | None = None


def tensor_at(root: nn.Module, path: str) -> Tensor:
    """The Parameter, buffer or plain tensor attribute at a dotted ``path``."""
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(root.get_submodule(owner), name)
    return tensor


def expert_paths(experts: Iterable[ExpertRef]) -> set[str]:
    """Every Parameter path that the experts read."""
    return {p.path for e in experts for p in (*e.w_in, *e.b_in, e.w_out, e.b_out) if p is not None}
