"""The quantised weights of E experts: each matrix becomes floats when an expert is looked up, and not before.

Shape legend: E experts, O rows of W_in (2I when gated, I when plain), H hidden, I intermediate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from moeopt.errors import UsageError
from moeopt.ir.bank_format import BankFormat, MatrixFormat
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import Biases, ListedVectors
from moeopt.ops.quantized_weight import QuantizedWeight


class QuantizedMatrices:
    """One matrix of every expert, all in one format and of one size.

    Args:
        matrix: the format and sizes.
        experts: how many experts there are.
        parts: for each of ``matrix.parts`` its tensors: one stacked tensor, or E.

    Raises:
        UsageError: not as many tensors as the format and the experts need.
    """

    def __init__(self, matrix: MatrixFormat, experts: int, parts: Sequence[Sequence[Tensor]]) -> None:
        self.matrix, self.num_experts = matrix, experts
        self.parts = tuple([list(part) for part in parts])
        each = 1 if matrix.stacked else experts
        counts = [len(part) for part in self.parts]
        if counts != [each] * len(matrix.parts):
            raise UsageError(
                f"{experts} experts in {matrix.format}, {'stacked' if matrix.stacked else 'separate'}, have "
                f"{each} tensors of {', of '.join(matrix.parts)}; {counts} were given"
            )
        if matrix.stacked and any(part[0].dim() != 3 or len(part[0]) != experts for part in self.parts):
            raise UsageError(
                f"stacked {', '.join(matrix.parts)} of {experts} experts have shapes "
                f"{[tuple(part[0].shape) for part in self.parts]}; each must be (E, ., .)"
            )

    @classmethod
    def of(cls, weights: Sequence[QuantizedWeight]) -> QuantizedMatrices:
        """Separate matrices, which must agree on format and size."""
        first = weights[0]
        for e, w in enumerate(weights):
            if w.format != first.format or w.shape != first.shape:
                raise UsageError(
                    f"expert {e} is {w.shape} in {w.format}, and expert 0 {first.shape} in {first.format}; the experts "
                    "of one block must agree on both"
                )
        matrix = MatrixFormat(first.format, first.shape)
        return cls(matrix, len(weights), [[getattr(w, part) for w in weights] for part in matrix.parts])

    def __getitem__(self, e: int) -> QuantizedWeight:
        """Expert ``e``'s matrix, on the same memory; its shapes are checked here."""
        held = [part[0][e] if self.matrix.stacked else part[e] for part in self.parts]
        held += [None] * (3 - len(held))  # type: ignore[list-item]
        return QuantizedWeight(held[0], held[1], held[2], self.matrix.format, self.matrix.shape)

    def flat(self) -> list[Tensor]:
        """All its tensors, part after part."""
        return [t for part in self.parts for t in part]


class QuantizedExpertWeights(ListedVectors):
    """``moeopt.ops.expert_weights.ExpertWeights`` of codes and scales; biases and norms stay floats.

    Args:
        w_in: one matrix of each expert, (O, H), or two (gate, up), each (I, H).
        w_out: (H, I) of each expert.
        b_in, b_out, norm: as in ``ListExpertWeights``: E entries each, or None.
        layouts: (W_in, W_out), each ``oi`` or ``io``: how float matrices are handed out; codes always are (out, in).
        dtype: the float dtype that matrices are handed out in.
        format: formats and sizes, where they are known: torch.compile reads them as a constant; and what products read.

    Raises:
        UsageError: the parts disagree on E.
    """

    def __init__(
        self,
        w_in: Sequence[QuantizedMatrices],
        w_out: QuantizedMatrices,
        b_in: Sequence[Biases | None] | None = None,
        b_out: Biases | None = None,
        norm: Biases | None = None,
        layouts: tuple[str, str] = ("oi", "oi"),
        dtype: torch.dtype = torch.float32,
        format: BankFormat | None = None,
    ) -> None:
        self.w_in_q, self.w_out_q = tuple(w_in), w_out
        self.b_in_l = tuple(b_in) if b_in else (None,) * len(self.w_in_q)
        self.b_out_l, self.norm_l = b_out, norm
        self.layouts, self.dtype = layouts, dtype
        self.num_experts: int = w_out.num_experts
        counts = [m.num_experts for m in self.w_in_q]
        counts += [len(part) for part in (*self.b_in_l, b_out, norm) if part is not None]
        if len(self.b_in_l) != len(self.w_in_q) or any(n != self.num_experts for n in counts):
            raise UsageError(
                f"QuantizedExpertWeights: W_out holds {self.num_experts} experts, and other parts "
                f"{sorted(set(counts))}; give every weight one entry per expert"
            )
        self.format = format or BankFormat(self.num_experts, tuple([m.matrix for m in self.w_in_q]), w_out.matrix)

    @property
    def out_features(self) -> int:
        """The width of the result."""
        return self.w_out_q.matrix.shape[0]

    @property
    def rounds(self) -> bool:
        """Whether its products read rows that are rounded to 8 bits (``moeopt.ops.rounded_rows``)."""
        return self.format.activations == "int8"

    def reading(self, activations: str) -> QuantizedExpertWeights:
        """The same codes, whose products read what ``activations`` says, a field of ``BankFormat``."""
        format = dataclasses.replace(self.format, activations=activations)
        return QuantizedExpertWeights(
            self.w_in_q, self.w_out_q, self.b_in_l, self.b_out_l, self.norm_l, self.layouts, self.dtype, format
        )

    def handed_out(self, layouts: tuple[str, str], dtype: torch.dtype) -> QuantizedExpertWeights:
        """The same codes, whose matrices are handed out in these layouts and this dtype."""
        if (layouts, dtype) == (self.layouts, self.dtype):
            return self
        return QuantizedExpertWeights(
            self.w_in_q, self.w_out_q, self.b_in_l, self.b_out_l, self.norm_l, layouts, dtype, self.format
        )

    def w_in(self, e: int) -> tuple[Tensor, ...]:
        """Expert e's first matrices as floats."""
        floats = [w.dequantize(self.dtype) for w in self.codes(e)[0]]
        return tuple(floats if self.layouts[0] == "oi" else [w.t() for w in floats])

    def codes(self, e: int) -> tuple[tuple[QuantizedWeight, ...], QuantizedWeight]:
        """Expert e's first matrices, and its second, as they are stored: (out, in) whatever the layouts are."""
        return tuple([matrices[e] for matrices in self.w_in_q]), self.w_out_q[e]

    def w_out(self, e: int) -> Tensor:
        """Expert e's second matrix as floats."""
        w = self.codes(e)[1].dequantize(self.dtype)
        return w if self.layouts[1] == "oi" else w.t()

    def stacked(self) -> None:
        """Quantised experts have no float stack."""
        return None

    @property
    def wants_gradient(self) -> bool:
        """Whether one of its tensors does."""
        floats = [t for part in (*self.b_in_l, self.b_out_l, self.norm_l) for t in part or ()]
        return any(t is not None and t.requires_grad for t in (*floats, *self.tensors().values()))

    def check_first(self) -> None:
        """``UsageError`` unless the tensors of the first expert have the sizes that the format says."""
        self.codes(0)

    def check(self, name: str = "the experts") -> None:
        """Refuse scales that are no numbers, of every expert; ``UsageError`` says which."""
        for words, matrices in self._matrices():
            for e in range(self.num_experts):
                matrices[e].check(f"{name}, {words} of expert {e}")

    def tensors(self) -> dict[str, Tensor]:
        """Codes, scales and zero points by names that a module can register: ``w_in_0_codes``, ``w_out_scales_3``."""
        found = {}
        for words, matrices in self._matrices():
            for part, held in zip(matrices.matrix.parts, matrices.parts, strict=True):
                for e, tensor in enumerate(held):
                    found[f"{words}_{part}" + ("" if matrices.matrix.stacked else f"_{e}")] = tensor
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of its codes, scales and zero points."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def _matrices(self) -> Iterator[tuple[str, QuantizedMatrices]]:
        yield from ((f"w_in_{i}", matrices) for i, matrices in enumerate(self.w_in_q))
        yield "w_out", self.w_out_q


def from_tensors(
    format: BankFormat, tensor: Callable[[str], Tensor], b_in: Sequence[Biases | None] | None = None,
    b_out: Biases | None = None, norm: Biases | None = None,
) -> QuantizedExpertWeights:  # fmt: skip
    """The inverse of :meth:`QuantizedExpertWeights.tensors`: ``tensor`` looks one up by name."""

    def matrices(words: str, matrix: MatrixFormat) -> QuantizedMatrices:
        ends = [""] if matrix.stacked else [f"_{e}" for e in range(format.experts)]
        parts = [[tensor(f"{words}_{part}{end}") for end in ends] for part in matrix.parts]
        return QuantizedMatrices(matrix, format.experts, parts)

    w_in = [matrices(f"w_in_{i}", m) for i, m in enumerate(format.w_in)]
    return QuantizedExpertWeights(w_in, matrices("w_out", format.w_out), b_in, b_out, norm, format=format)


def rounds_rows(bank: object) -> bool:
    """Whether the products of a bank, of codes or of floats, read rows that are rounded to 8 bits."""
    return isinstance(bank, QuantizedExpertWeights) and bank.rounds


def check_bank(bank: QuantizedExpertWeights, spec: ExpertsSpec) -> None:
    """Raise a ``UsageError`` where the sizes of the matrices are not those of an expert of ``spec``."""
    pairs, (_, I) = 2 if spec.rows == "separate" else 1, bank.format.w_out.shape
    rows = 2 * I if spec.gated and pairs == 1 else I
    shapes = [m.shape for m in bank.format.w_in]
    bank.check_first()
    if len(shapes) != pairs or any(shape != (rows, shapes[0][1]) for shape in shapes):
        raise UsageError(
            f"quantised experts with W_in {', '.join(map(str, shapes))} and W_out {bank.format.w_out.shape} do not "
            f"compute {spec}: rows {spec.rows!r} need {pairs} W_in of {rows} rows, (out, in) whatever the layout is"
        )
