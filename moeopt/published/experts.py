"""The codes of a checkpoint for the experts of a loaded block: found by numbers and sizes, and proved by values.

    W_in (2I, H), gate over up       gate_proj and up_proj, one over the other
    W_in (2I, H), rows in turn       the same, rows in turn; or one matrix that lies so in the file
    W_in (I, H), W_out (H, I)        one matrix each

Every expert's codes must stand for the floats that the block holds, row by row; nothing is expanded but one matrix at a
time. Shape legend: E experts, N out, K in.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeopt.codes_in_files import room_for
from moeopt.errors import CheckpointError, UsageError
from moeopt.ir.bank_format import MatrixFormat
from moeopt.ops.quantized_bank import QuantizedExpertWeights, QuantizedMatrices
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.published.directory_of import directory_of, stated_by
from moeopt.published.loaded_matrix import kind_of, numbers_of, same_weights
from moeopt.published.quantised_tensors import quantised_tensors
from moeopt.published.stored_matrix import StoredMatrix
from moeopt.published.tensor_files import SafetensorsDirectory
from moeopt.value_types import PyObject


class Unbound(Exception):
    """The experts of a block cannot have the checkpoint's codes; the message says why."""


@dataclass(frozen=True)
class _Recipe:
    """Which stored matrices of an expert make one of its matrices, and whether their rows lie in turn."""

    kinds: tuple[str, ...]
    in_turn: bool = False


class PublishedExperts:
    """The quantised matrices of a model's checkpoint, by the numbers of layer and expert.

    Raises:
        UsageError: the model is from no quantised checkpoint on this machine.
        CheckpointError: a file is damaged.
    """

    def __init__(self, model: PyObject) -> None:
        directory = directory_of(model)
        config = stated_by(directory) if directory is not None else {}
        if directory is None or not config:
            name = getattr(getattr(model, "config", None), "_name_or_path", None)
            raise UsageError(
                "quantize='checkpoint' takes the codes of the quantised checkpoint that the model was loaded from, and "
                f"{name!r:.200} is no directory with a quantization_config in its config.json: give "
                "quantize='int8' or another format, or load the model from its directory"
            )
        self.directory, self.found = directory, quantised_tensors(SafetensorsDirectory(directory), config)
        self._by_numbers: dict[tuple[int, ...], list[StoredMatrix]] = defaultdict(list)
        for matrix in self.found.matrices.values():
            numbers = numbers_of(matrix.name)
            self._by_numbers[numbers if matrix.expert is None else (*numbers, matrix.expert)].append(matrix)

    def bank(
        self, block: str, experts: int, floats: Callable[[int], Sequence[Tensor]]
    ) -> tuple[QuantizedExpertWeights, bool]:
        """The codes of ``experts`` experts.

        Args:
            block: the module path of the block.
            floats: what an expert holds now: its W_in, one or two, and its W_out, each (N, K).

        Returns:
            the bank, each part one stacked tensor; and whether its floats have the same bits as those that are held.

        Raises:
            Unbound: the files have no such matrices, or others; the message says which.
            CheckpointError: a scale is no number.
        """
        layer, first = numbers_of(block), floats(0)
        recipes = [self._recipe(block, (*layer, 0), w) for w in first]
        asymmetric = [self._has_zero_points(layer, experts, recipe) for recipe in recipes]
        stacks = [BankStack(experts) for _ in recipes]
        exact = True
        for e in range(experts):
            for recipe, zeros, stack, w in zip(recipes, asymmetric, stacks, floats(e), strict=True):
                weight = self._made(block, (*layer, e), recipe, zeros)
                bits = weight.shape == w.shape and torch.equal(weight.dequantize(w.dtype), w)
                if not bits and not _near(weight, w):
                    raise Unbound(
                        f"expert {e} holds other weights than {_names(recipe)} of the checkpoint {self.directory} for "
                        "it: load the checkpoint anew, or give quantize= another format"
                    )
                exact = exact and bits
                stack.put(e, weight)
        *ins, out = [stack.matrices() for stack in stacks]
        return QuantizedExpertWeights(ins, out), exact

    def _recipe(self, block: str, numbers: tuple[int, ...], held: Tensor) -> _Recipe:
        """How ``held`` of the first expert is made of stored matrices, told by its values."""
        stored = self._by_numbers.get(numbers, [])
        N, K = held.shape
        for m in stored:
            if m.shape == (N, K) and same_weights(held, m.read().dequantize(torch.float64), m.format):
                return _Recipe((kind_of(m.name),))
        halves = [(m, m.read().dequantize(torch.float64)) for m in stored if m.shape == (N // 2, K) and N % 2 == 0]
        for in_turn, parts in ((False, held.chunk(2)), (True, (held[::2], held[1::2]))):
            found = [next((m for m, w in halves if same_weights(part, w, m.format)), None) for part in parts]
            if all(found):
                return _Recipe(tuple([kind_of(m.name) for m in found if m is not None]), in_turn)
        unread = next((f": {n} is not read, {why}" for n, why in self.found.unread.items()), "")
        told = ", ".join(f"{m.label} of {m.shape[0]} x {m.shape[1]}" for m in stored[:3]) or "no quantised matrix"
        raise Unbound(
            f"the checkpoint {self.directory} has {told} for layer and expert {numbers}, and none of that makes the "
            f"{N} x {K} weight that {block} holds there{unread}"
        )

    def _stored(self, numbers: tuple[int, ...]) -> dict[str, StoredMatrix]:
        return {kind_of(m.name): m for m in self._by_numbers.get(numbers, [])}

    def _has_zero_points(self, layer: tuple[int, ...], experts: int, recipe: _Recipe) -> bool:
        """Whether one of the experts has zero points; those of another may all be the plain one, as if it had none."""
        stored = (self._stored((*layer, e)) for e in range(experts))
        return any(not m[kind].format.symmetric for m in stored for kind in recipe.kinds if kind in m)

    def _made(self, block: str, numbers: tuple[int, ...], recipe: _Recipe, zeros: bool) -> QuantizedWeight:
        stored = self._stored(numbers)
        missing = [kind for kind in recipe.kinds if kind not in stored]
        if missing:
            raise Unbound(f"the checkpoint {self.directory} has no {missing[0]} for {block}, expert {numbers[-1]}")
        grouped = next((stored[kind] for kind in recipe.kinds if stored[kind].grouped is not None), None)
        if grouped is not None:
            raise Unbound(
                f"{grouped.label} has its columns grouped by their activations (desc_act, actorder), and codes of a "
                "bank have scales for columns in order: quantise without it, or give quantize= another format"
            )
        parts = [with_zero_points(stored[kind].read(), zeros) for kind in recipe.kinds]
        return parts[0] if len(parts) == 1 else joined(parts, recipe.in_turn)


def with_zero_points(weight: QuantizedWeight, wanted: bool) -> QuantizedWeight:
    """``weight`` itself, or where zero points are ``wanted`` and it has none, with the plain one of each block."""
    if not wanted or not weight.format.symmetric or weight.format.codes not in ("int8", "uint8", "uint4"):
        return weight
    assert weight.scales is not None
    plain = torch.full(weight.scales.shape, weight.format.zero, dtype=weight.format.code_dtype)
    format = replace(weight.format, symmetric=False)
    return QuantizedWeight(weight.codes, weight.scales, plain, format, weight.shape)


def joined(parts: Sequence[QuantizedWeight], in_turn: bool) -> QuantizedWeight:
    """Matrices of one shape as one, one over the other or with rows in turn; scales are repeated where blocks need it.

    Raises:
        CheckpointError: their formats differ.
    """
    first = parts[0]
    if any(p.format != first.format or p.shape != first.shape for p in parts):
        raise CheckpointError(f"gate and up are stored in two formats: {', '.join(str(p.format) for p in parts)}")
    N, K = first.shape
    height = first.format.block[0] or N
    rows = 1 if in_turn else math.gcd(height, N)
    format = replace(first.format, block=(rows, first.format.block[1]))

    def together(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors), 1).flatten(0, 1) if in_turn else torch.cat(list(tensors))

    def spread(tensor: Tensor) -> Tensor:
        """One row for each block of ``rows`` rows."""
        return tensor.index_select(0, torch.arange(0, N, rows) // height)

    scales = together([spread(p.scales) for p in parts if p.scales is not None])
    zeros = [spread(p.zeros) for p in parts if p.zeros is not None]
    codes = together([p.codes.view(torch.uint8) for p in parts]).view(format.code_dtype)
    return QuantizedWeight(codes, scales, together(zeros) if zeros else None, format, (len(parts) * N, K))


class BankStack:
    """One matrix of all experts, written into stacked tensors one expert at a time."""

    def __init__(self, experts: int) -> None:
        self.experts, self.tensors = experts, list[Tensor]()
        self.matrix: MatrixFormat | None = None

    def put(self, e: int, weight: QuantizedWeight) -> None:
        matrix = MatrixFormat(weight.format, weight.shape, stacked=True)
        if self.matrix is None:
            self.matrix = matrix
            self.tensors = [room_for((self.experts, *t.shape), t.dtype) for t in _held(weight)]
        elif matrix != self.matrix:
            raise Unbound(f"expert {e} is stored in {weight.format}, and expert 0 in {self.matrix.format}")
        for stack, tensor in zip(self.tensors, _held(weight), strict=True):
            stack[e].copy_(tensor)

    def matrices(self) -> QuantizedMatrices:
        assert self.matrix is not None
        return QuantizedMatrices(self.matrix, self.experts, [[t] for t in self.tensors])


def _near(weight: QuantizedWeight, held: Tensor) -> bool:
    """Whether ``held`` is what the codes stand for, but for roundings."""
    return weight.shape == held.shape and same_weights(held, weight.dequantize(torch.float64), weight.format)


def _held(weight: QuantizedWeight) -> Iterator[Tensor]:
    return (t for t in (weight.codes, weight.scales, weight.zeros) if t is not None)


def _names(recipe: _Recipe) -> str:
    return " and ".join(recipe.kinds)
