"""The formats and sizes of a bank of quantised experts, as one word of an op's schema."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from moeopt.errors import BundleError, UsageError
from moeopt.ir.weight_format import WeightFormat
from moeopt.options.quant_plan import ACTIVATIONS
from moeopt.untrusted import parse_json

_MAX = 1 << 40


@dataclass(frozen=True)
class MatrixFormat:
    """One matrix of every expert: its format, its sizes, and whether all experts lie in one tensor.

    Args:
        format: how each is stored.
        shape: (N out, K in), whatever the bytes are.
        stacked: whether codes, scales and zero points are each one tensor whose first dimension is the expert.
    """

    format: WeightFormat
    shape: tuple[int, int]
    stacked: bool = False

    def __post_init__(self) -> None:
        ok = isinstance(self.shape, tuple) and len(self.shape) == 2
        if not ok or any(type(n) is not int or not 1 <= n < _MAX for n in self.shape) or type(self.stacked) is not bool:
            raise UsageError(f"MatrixFormat.shape is {self.shape!r:.60}; it must be (out, in), two positive integers")

    @property
    def parts(self) -> tuple[str, ...]:
        """The kinds of tensors that hold it: codes, then scales, then zero points, where there are any."""
        if self.format.is_float:
            return ("codes",)
        return ("codes", "scales") if self.format.symmetric else ("codes", "scales", "zeros")


@dataclass(frozen=True)
class BankFormat:
    """The matrices of ``experts`` experts: one or two of W_in (gate, up), and W_out.

    ``activations``: what the products of these codes read, a name of ``moeopt.options.quant_plan.ACTIVATIONS``:
    the floats that they are given, or these rounded to 8 bits (``moeopt.ops.rounded_rows``).
    """

    experts: int
    w_in: tuple[MatrixFormat, ...]
    w_out: MatrixFormat
    activations: str = ACTIVATIONS[0]

    text = ""
    """:meth:`encode`'s, of each instance; not annotated, so no field: torch.compile reads a plain attribute only."""

    def __post_init__(self) -> None:
        if type(self.experts) is not int or not 1 <= self.experts < _MAX or len(self.w_in) not in (1, 2):
            raise UsageError(
                f"BankFormat: {self.experts!r:.60} experts with {len(self.w_in)} first matrices each; it must be a "
                "positive number of experts with one or two"
            )
        if self.activations not in ACTIVATIONS:
            raise UsageError(
                f"BankFormat.activations is {self.activations!r:.60}; it must be one of {', '.join(ACTIVATIONS)}"
            )
        object.__setattr__(self, "text", self.encode())

    def encode(self) -> str:
        """A compact JSON string; ``activations`` is in it where they are not floats."""
        data = dataclasses.asdict(self)
        if self.activations == ACTIVATIONS[0]:
            del data["activations"]
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> BankFormat:
        """The inverse of :meth:`encode`; anything else is a ``UsageError``."""
        try:
            data = parse_json(text, "the formats of the experts")
            if not isinstance(data, dict) or set(data) - {"activations"} != {"experts", "w_in", "w_out"}:
                raise ValueError("its keys are not experts, w_in and w_out")
            matrices = [_matrix(m) for m in [*data["w_in"], data["w_out"]]]
            return cls(data["experts"], tuple(matrices[:-1]), matrices[-1], data.get("activations", ACTIVATIONS[0]))
        except (BundleError, LookupError, TypeError, ValueError) as err:  # a UsageError is a ValueError
            raise UsageError(f"not a BankFormat: {text!r:.200} ({err})") from err

    def nbytes(self) -> int:
        """Bytes of all codes, scales and zero points."""
        return self.experts * sum(m.format.nbytes(m.shape) for m in (*self.w_in, self.w_out))

    def __str__(self) -> str:
        names = list(dict.fromkeys(str(m.format) for m in (*self.w_in, self.w_out)))
        read = "" if self.activations == ACTIVATIONS[0] else f", activations in {self.activations}"
        return f"{self.experts} experts in {' and '.join(names)}{read}"


def _matrix(data: dict[str, object]) -> MatrixFormat:
    shape, stacked = data["shape"], data["stacked"]
    if not isinstance(shape, list) or type(stacked) is not bool or set(data) != {"format", "shape", "stacked"}:
        raise ValueError("a matrix has a format, a shape and a flag, and nothing else")
    return MatrixFormat(WeightFormat.of(data["format"]), tuple(shape), stacked)
