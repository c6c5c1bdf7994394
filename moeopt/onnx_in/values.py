"""What flows between the steps of an interpreted graph: tensors, and numbers that are known without a look at one.

ONNX computes shapes with the same operators as data. ``Shape`` of a tensor gives a :class:`SizeValue` here, and
arithmetic on these stays in Python, where a size may be a symbol of ``torch.export``: a reshape then depends on no
value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeopt.value_types import PyObject


class SizeValue:
    """Whole numbers or flags that come of shapes and constants alone, or a constant number with a fraction.

    Attributes:
        array: of Python numbers or symbols, with dtype ``object``.
        dtype: as the graph says.
        constant: the tensor of a constant of the graph, which holds the same numbers.
    """

    def __init__(self, array: PyObject, dtype: torch.dtype = torch.int64, constant: Tensor | None = None) -> None:
        self.array: PyObject = np.asarray(array, dtype=object)
        self.dtype, self.constant = dtype, constant

    @property
    def number(self) -> PyObject:
        """The only number, where there is one and it is no symbol; else None."""
        alone = self.array.item() if self.array.size == 1 else None
        return None if isinstance(alone, (torch.SymInt, torch.SymBool)) else alone

    def tensor(self) -> Tensor:
        """The same as a tensor, which is new where this is no constant."""
        if self.number is not None:
            return torch.full(self.array.shape, self.number, dtype=self.dtype)
        if self.constant is not None:
            return self.constant
        numbers = self.array.tolist()
        if any(isinstance(n, torch.SymInt) for n in self.array.flat):
            made = [torch.scalar_tensor(n, dtype=self.dtype) for n in self.array.flat]
            return torch.stack(made).reshape(self.array.shape)
        return torch.tensor(numbers, dtype=self.dtype)


GraphValue = Tensor | SizeValue


def tensor(value: PyObject) -> Tensor:
    """A value as a tensor."""
    made: Tensor = value.tensor() if isinstance(value, SizeValue) else value
    return made


def numbers(value: GraphValue) -> list[Any]:
    """The whole numbers of a value in one dimension.

    Of a tensor they are read: a shape may depend on how many rows a mask has chosen, and a reader of modules sees what
    leaves tensors for Python.
    """
    return list(value.array.reshape(-1)) if isinstance(value, SizeValue) else value.reshape(-1).tolist()


def all_known(values: Sequence[Any]) -> bool:
    """Whether each of the values, but at least one, is known without looking at a tensor."""
    there = [v for v in values if v is not None]
    return bool(there) and all(isinstance(v, SizeValue) for v in there)
