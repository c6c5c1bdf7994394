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


@dataclass(frozen=True)
class PartRef:
    """A region of a Parameter or buffer of any rank: element (i, j, ..) is ``parameter[origin + i*steps[0] + ..]``."""

    path: str
    origin: Index
    steps: tuple[Index, ...]
    shape: Index

    def steps_from(self, whole: Index) -> tuple[tuple[int | slice, ...] | None, list[int] | None, list[int]]:
        """How a view of a tensor of shape ``whole`` is taken: its index, the order of axes, and axes of size 1 to add.

        None where there is nothing to do.
        """
        at: list[int | slice] = list(self.origin)
        axes: list[int | None] = []
        for step, size in zip(self.steps, self.shape, strict=True):
            axis = next((a for a, s in enumerate(step) if s), None)
            axes.append(axis)
            if axis is not None:
                first = self.origin[axis]
                at[axis] = slice(first, first + (size - 1) * step[axis] + 1, step[axis])
        found = [a for a in axes if a is not None]
        order = [sorted(found).index(a) for a in found]
        everything = all(a == slice(0, n, 1) for a, n in zip(at, whole, strict=True))
        new = [dim for dim, axis in enumerate(axes) if axis is None]
        return None if everything else tuple(at), order if order != sorted(order) else None, new

    def read(self, tensor: Tensor) -> Tensor:
        """The region of ``tensor``, as a view."""
        at, order, new = self.steps_from(tuple(tensor.shape))
        part = tensor if at is None else tensor[at]
        part = part if order is None else part.permute(order)
        for dim in new:
            part = part.unsqueeze(dim)
        return part


@dataclass(frozen=True)
class SlotRefs:
    """What one expert has in the slots of a :class:`~moeopt.ir.row_function.RowFunction`, by reference.

    ``own``: the number of the first slot that is this expert's alone.
    """

    slots: tuple[PartRef, ...]
    own: int = 0

    @property
    def w_in(self) -> tuple[PartRef, ...]:
        """The first region of its own: experts are ordered by where it lies."""
        return (self.slots[self.own],)

    @property
    def w_out(self) -> PartRef:
        """The same region: all of an expert's regions go together."""
        return self.slots[self.own]


def parts_of(ref: ExpertRef | SlotRefs) -> list[MatrixRef | VectorRef | PartRef]:
    """Every region that one expert reads."""
    if isinstance(ref, SlotRefs):
        return list(ref.slots)
    return [p for p in (*ref.w_in, *ref.b_in, ref.w_out, ref.b_out) if p is not None]


def tensor_at(root: nn.Module, path: str) -> Tensor:
    """The Parameter, buffer or plain tensor attribute at a dotted ``path``."""
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(root.get_submodule(owner), name)
    return tensor


def expert_paths(experts: Iterable[ExpertRef | SlotRefs]) -> set[str]:
    """Every Parameter path that the experts read."""
    return {p.path for e in experts for p in parts_of(e)}
