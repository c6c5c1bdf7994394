"""Is a loaded model what its quantised checkpoint says? Sampled matrices of each kind, against the files themselves.

Whoever loads a quantised checkpoint expands it, and may do so wrongly without a word; the loaded model is what moeopt
verifies against, so that a wrong weight there would be certified. A kind is a name without its numbers, and sizes: what
one loader's code treats alike.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from moeopt.ir.weight_format import WeightFormat
from moeopt.ops.quantized_weight import QuantizedWeight
from moeopt.published.directory_of import directory_of, stated_by
from moeopt.published.loaded_matrix import LoadedMatrix, LoadedParameters, kind_of, same_weights
from moeopt.published.quantised_tensors import QuantisedTensors, quantised_tensors
from moeopt.published.stored_matrix import StoredMatrix
from moeopt.published.tensor_files import SafetensorsDirectory

SAMPLE = 6
"""Matrices of each kind that are compared."""


@dataclass(frozen=True, eq=False)
class KindOfMatrix:
    """Matrices of one kind.

    Args:
        label: of one of them, in the files.
        shape: (N, K).
        format: in the files.
        loaded: where the model holds that one; None where it was not found.
        wrong: what is wrong with it, a sentence; "" where it is as in the files.
        stored_bytes, count: of all of them in the files.
    """

    label: str
    shape: tuple[int, int]
    format: WeightFormat
    loaded: LoadedMatrix | None
    wrong: str
    stored_bytes: int
    count: int


@dataclass(eq=False)
class Comparison:
    """A loaded model beside its checkpoint."""

    directory: Path
    method: str
    kinds: list[KindOfMatrix] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def wrong(self) -> dict[str, str]:
        """By the kind of the Parameter's name, what is wrong with it."""
        return {kind_of(k.loaded.parameter): k.wrong for k in self.kinds if k.wrong and k.loaded is not None}


def compare(model: nn.Module) -> Comparison | None:
    """``model`` beside the quantised checkpoint that it was loaded from; None where there is none on this machine.

    Raises:
        CheckpointError: a file is damaged, or its sizes do not fit each other.
    """
    directory = directory_of(model)
    config = stated_by(directory) if directory is not None else {}
    if directory is None or not config:
        return None
    stored = quantised_tensors(SafetensorsDirectory(directory), config)
    found = Comparison(directory, stored.method, unread=stored.unread)
    parameters = LoadedParameters(model)
    with torch.no_grad():
        for alike in _kinds(stored).values():
            found.kinds.append(_compared(alike, parameters, directory))
    return found


def _kinds(stored: QuantisedTensors) -> dict[tuple[str, tuple[int, int], WeightFormat], list[StoredMatrix]]:
    kinds = defaultdict(list)
    for matrix in stored.matrices.values():
        kinds[kind_of(matrix.name), matrix.shape, matrix.format].append(matrix)
    return kinds


def _compared(alike: list[StoredMatrix], parameters: LoadedParameters, directory: Path) -> KindOfMatrix:
    first, loaded, wrong = alike[0], None, ""
    for at in sorted({round(i * (len(alike) - 1) / (SAMPLE - 1)) for i in range(SAMPLE)}):
        weight = alike[at].read()
        here = parameters.find(alike[at], weight)
        if here is None or wrong:
            continue
        if loaded is None or not here.same:
            first, loaded = alike[at], here
        if not here.same:
            wrong = _what_is_wrong(alike[at], weight, here, directory)
    total = sum(m.nbytes for m in alike)
    return KindOfMatrix(first.label, first.shape, first.format, loaded, wrong, total, len(alike))


def _what_is_wrong(matrix: StoredMatrix, weight: QuantizedWeight, here: LoadedMatrix, directory: Path) -> str:
    N, K = matrix.shape
    why = _other_blocks(weight, here) or "the loader computed other weights, or they were changed since"
    return (
        f"its weights are not those of its checkpoint: {here.parameter}{here.place} differs by {here.distance:.2g} of "
        f"its size from {matrix.label} of {N} x {K} in {directory}, {matrix.format}: {why}. All like it were left "
        "alone. Load the checkpoint with another version or on another device, or, where the weights were changed on "
        'purpose, say so with model.config._name_or_path = ""'
    )


def _other_blocks(weight: QuantizedWeight, here: LoadedMatrix) -> str:
    """Whether the loaded values are what blocks of equal parts give, as some loaders take partial blocks."""
    (N, K), scales = weight.shape, weight.scales
    if scales is None or weight.zeros is not None or N % scales.shape[0] or K % scales.shape[1]:
        return ""
    rows, columns = N // scales.shape[0], K // scales.shape[1]
    other = WeightFormat("", weight.format.codes, (rows, columns), weight.format.scale)
    if (rows, columns) == weight.format.block or other.packed:
        return ""
    guess = QuantizedWeight(weight.codes, scales, None, other, weight.shape).dequantize(torch.float64)
    if not same_weights(here.values, guess, weight.format):
        return ""
    stated = f"{weight.format.block[0]} x {weight.format.block[1]}"
    return (
        f"it was loaded as blocks of {rows} x {columns}, the sizes divided by the number of scales, and the checkpoint "
        f"has blocks of {stated} with partial ones at the edge"
    )
