"""The steps of an interpreted part of a graph, without its weights.

Layers of a model are the same steps over other weights. Their programs are one object: names are counted instead of
taken from the file, and a program that was made before is found again. Whoever compares two modules then sees it.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moeopt.onnx_in.dtypes import FLOATS
from moeopt.onnx_in.free_names import FreeNames
from moeopt.onnx_in.operators.table import shown
from moeopt.onnx_in.values import SizeValue
from moeopt.value_types import PyObject

MOST_NUMBERS = 64
"""Of a constant of whole numbers that may be a shape: longer ones are data."""


TAKEN = frozenset(
    (*dir(torch.nn.Module), *dir(torch.nn.Module()), "program", "coded", "names", "example", "chains_of_regions")
    + ("region_slots",)
)
"""Attributes that the modules of files and regions have: no weight and no submodule is called so."""


@dataclass(frozen=True)
class NodeStep:
    """One node: operator, names of what it reads and makes ("" for none), and its attributes as Python values."""

    domain: str
    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def described(self) -> str:
        """For messages."""
        return f"the node {self.name!r} ({shown(self.domain, self.op_type)})"


@dataclass(frozen=True)
class SizeTerm:
    """A size as a product: a number times sizes of inputs, each given as (number of the input, dimension)."""

    factor: int
    dims: tuple[tuple[int, int], ...] = ()

    def of(self, inputs: Sequence[Tensor]) -> PyObject:
        """Its value for these inputs."""
        product: PyObject = None if self.dims and self.factor == 1 else self.factor
        for number, dim in self.dims:
            size = inputs[number].shape[dim]
            product = size if product is None else product * size
        return product


SizeTerms = Mapping[str, tuple[SizeTerm, ...] | SizeTerm]


@dataclass(frozen=True, eq=False)
class GraphProgram:
    """What :class:`moeopt.onnx_in.interpreter.InterpretedGraph` runs.

    Attributes:
        steps: nodes in topological order. inputs, outputs: names of values.
        numbers: constants that are known as numbers, by name of value.
        constants: the attribute that holds each other constant.
        sizes: values that are sizes of the inputs. opset: the version of ONNX's own operators.
        frees: the values that are read for the last time by each step.
    """

    steps: tuple[NodeStep, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: Mapping[str, SizeValue]
    constants: Mapping[str, str]
    sizes: SizeTerms
    opset: int
    frees: tuple[tuple[str, ...], ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphProgram:
        return self


_made: weakref.WeakValueDictionary[str, GraphProgram] = weakref.WeakValueDictionary()


def program_of(
    steps: Sequence[NodeStep], inputs: Sequence[str], outputs: Sequence[str], constants: Mapping[str, Tensor],
    opset: int, sizes: SizeTerms | None = None, prefix: str | None = None,
) -> tuple[GraphProgram, dict[str, Tensor]]:  # fmt: skip
    """A program and the tensors of its constants by attribute.

    Args:
        prefix: given, names are counted, but for those of weights, which keep what follows the prefix. A step's
            name is then its number.
    """
    names = _names(steps, inputs, outputs, constants, prefix) if prefix is not None else {}
    if prefix is not None:
        steps = [
            replace(
                step, name=f"#{n}", inputs=tuple(names.get(i, i) for i in step.inputs),
                outputs=tuple(names.get(o, o) for o in step.outputs),
            )
            for n, step in enumerate(steps)
        ]  # fmt: skip
    last = {name: number for number, step in enumerate(steps) for name in step.inputs}
    ends = {names.get(o, o) for o in outputs}
    frees = tuple(
        tuple(sorted(n for n in {*step.inputs, *step.outputs} if n not in ends and last.get(n, number) == number))
        for number, step in enumerate(steps)
    )
    numbers: dict[str, SizeValue] = {}
    held: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    weights = _weights_of_one(steps)
    for value, tensor in constants.items():
        name = names.get(value, value)
        if is_number(tensor) and not (name in weights and tensor.dim() > 0):
            numbers[name] = SizeValue(_meant(tensor), tensor.dtype, tensor.clone())
            continue
        held[name] = _attribute(name, tensors)
        tensors[held[name]] = tensor
    program = GraphProgram(
        tuple(steps), tuple(names.get(i, i) for i in inputs), tuple(names.get(o, o) for o in outputs), numbers, held,
        {names.get(n, n): term for n, term in (sizes or {}).items()}, opset, frees,
    )  # fmt: skip
    return _made.setdefault(_key(program), program), tensors


_ROUNDED = {torch.tensor(c).item(): c for c in (math.sqrt(2), math.sqrt(0.5), math.sqrt(2 / math.pi), 0.044715)}
"""The numbers of GELU, by what they are rounded to in float32."""


def _meant(tensor: Tensor) -> PyObject:
    """The numbers of a constant; one of float32 that is a rounding of GELU's is GELU's.

    In float32 that is the same number to the bit. In float64, where a rewritten block is held against this one, the
    file's rounding of the number would else be told as another function, by rows that nearly cancel.
    """
    found = tensor.tolist()
    return _ROUNDED.get(found, found) if tensor.dtype == torch.float32 and isinstance(found, float) else found


_PRODUCTS = ("MatMul", "Gemm", "Einsum", "FusedMatMul", "FusedGemm")
_WITH_BIAS = ("Gemm", "FusedGemm", "Conv")


def _weights_of_one(steps: Sequence[NodeStep]) -> set[str]:
    """What is added to products, and slopes of a ``PRelu``: of experts that give one number each, or have one slope
    each, these are one number too, and weights."""
    products = {name for step in steps if step.op_type in _PRODUCTS for name in step.outputs}
    of_products = {name for step in steps if step.op_type in _WITH_BIAS for name in step.inputs[2:3]}
    sums = [set(step.inputs) for step in steps if step.op_type == "Add" and not products.isdisjoint(step.inputs)]
    slopes = {name for step in steps if step.op_type == "PRelu" for name in step.inputs[1:2]}
    return of_products.union(slopes, *sums) - products


def is_number(tensor: Tensor) -> bool:
    """Whether a constant is known as a number, or as a few whole ones."""
    whole = tensor.dtype in (torch.int64, torch.int32, torch.bool) and tensor.numel() <= MOST_NUMBERS
    return whole or (tensor.numel() == 1 and tensor.dtype in FLOATS)


def _names(
    steps: Sequence[NodeStep],
    inputs: Sequence[str],
    outputs: Sequence[str],
    constants: Mapping[str, Tensor],
    prefix: str,
) -> dict[str, str]:
    """Counted names for the values of a program, in the order in which its steps speak of them.

    Weights of one shape are told from others by a letter: whoever reads names takes those that differ in a number for
    weights of alike experts.
    """
    spoken = dict.fromkeys(name for step in steps for name in (*step.inputs, *step.outputs) if name)
    kept = {n: n.removeprefix(f"{prefix}.") for n in spoken if n.startswith(f"{prefix}.") and n not in inputs}
    free = FreeNames(kept.values())
    names = {name: free.new(f"x{n}") for n, name in enumerate(inputs)} | kept
    letters: dict[tuple[int, ...], str] = {}
    for number, name in enumerate(spoken):
        if name not in names:
            kind = "v"
            if name in constants:
                kind = "c" + letters.setdefault(tuple(constants[name].shape), _letters(len(letters)))
            names[name] = free.new(f"{kind}{number}")
    return names | {name: free.new(f"y{n}") for n, name in enumerate(outputs) if name not in names}


def _letters(number: int) -> str:
    """A number in letters: a, b, ..., z, ba, bb, ..."""
    rest, last = divmod(number, 26)
    return (_letters(rest) if rest else "") + chr(ord("a") + last)


def _attribute(name: str, taken: Mapping[str, Tensor]) -> str:
    made = re.sub(r"\W", "_", name)
    made = made if made[:1].isalpha() and made not in TAKEN else f"c_{made}"
    while made in taken:
        made += "_"
    return made


def _key(program: GraphProgram) -> str:
    """Text that is equal for equal programs."""

    def told(value: PyObject) -> str:
        if isinstance(value, Tensor):
            return f"{value.dtype}{tuple(value.shape)}{value.tolist()!r}"
        return repr(value)

    steps = [
        (s.domain, s.op_type, s.name, s.inputs, s.outputs, sorted((k, told(v)) for k, v in s.attributes.items()))
        for s in program.steps
    ]
    numbers = [(name, str(n.dtype), n.array.tolist()) for name, n in program.numbers.items()]
    return repr((steps, program.inputs, program.outputs, numbers, program.constants, program.sizes, program.opset))
