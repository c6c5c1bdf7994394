"""The weights of a block's experts as codes and scales, in place of its floats.

While a block is verified, its :class:`LiveCodes` hold the rounded weights beside the module's floats. ``store_codes``
then makes the codes buffers of the module and removes the floats, so that ``state_dict``, ``.to(device)`` and copies
carry the codes, and no weight is held twice. The block's original code reads floats: it runs in :func:`dequantized`.

Shape legend: E experts, N out, K in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moeopt.errors import UsageError
from moeopt.ir.bank_format import BankFormat, MatrixFormat
from moeopt.ir.specs import ExpertsSpec
from moeopt.ir.weight_format import WeightFormat
from moeopt.ir.weight_refs import ExpertRef, tensor_at
from moeopt.ops.expert_weights import how_they_lie
from moeopt.ops.quantize import quantize
from moeopt.ops.quantized_bank import QuantizedExpertWeights, from_tensors
from moeopt.rewrite.block_graph import GivenCodes
from moeopt.rewrite.codes_at_calls import CodesReadAtCalls
from moeopt.rewrite.live_weights import LiveExpertWeights, Place
from moeopt.rewrite.replaced_floats import floats_of, places_of
from moeopt.rewrite.same_layout import Remembered
from moeopt.rewrite.spare_floats import SpareFloats
from moeopt.rewrite.weight_regions import region
from moeopt.value_types import PyObject

PREFIX = "moeopt_experts"
"""The beginning of the buffers' names: ``moeopt_experts_0_w_in_0_codes`` on the module of the block."""

_PLAIN = {Tensor, nn.Parameter}


class LiveCodes(CodesReadAtCalls):
    """One bank of quantised experts of ``module``; codes, scales and biases are looked up at each read.

    Args:
        module: the block.
        index: the bank's number in the block.
        experts, spec: where the floats are, or were, and the function of an expert.
        format: the format to which matrices are rounded, where the module holds no codes yet; else that of the codes.
        given, place: codes of a checkpoint, in place of rounded ones; the class that finds and reads a bias.
    """

    def __init__(
        self, module: nn.Module, index: int, experts: list[ExpertRef], spec: ExpertsSpec,
        format: WeightFormat | BankFormat, given: GivenCodes | None = None, place: type[Place] = Place,
    ) -> None:  # fmt: skip
        self.module, self.experts, self.spec = module, experts, spec
        self.layouts, self.dtype, self.num_experts = ("oi", "oi"), torch.float32, len(experts)
        self.prefix = f"{PREFIX}_{index}_"
        self.exact, self.few = (given.exact, given.few) if given is not None else (False, 0)
        if isinstance(format, WeightFormat):
            *ins, out = [MatrixFormat(format, shape, True) for shape in shapes_of(experts[0])]
            format = BankFormat(len(experts), tuple(ins), out)
        self.format = format
        matrices = [*((f"w_in_{i}", m) for i, m in enumerate(format.w_in)), ("w_out", format.w_out)]
        self.names = [f"{self.prefix}{words}_{part}" for words, m in matrices for part in m.parts]
        self._biases = _Biases(module, experts, place)
        self._bank: tuple[tuple[int, ...], QuantizedExpertWeights] | None = None
        self._known: tuple[Any, dict[Any, Any]] | None = None
        self.handed = {(self.layouts, self.dtype): self}
        stored = all(name in module._buffers for name in self.names)
        self.held: dict[str, Any] = module._buffers
        if not stored and given is not None:
            self.held = {self.prefix + name: tensor for name, tensor in given.tensors.items()}
        elif not stored:
            self.held = self._rounded(matrices)

    def _rounded(self, matrices: list[tuple[str, MatrixFormat]]) -> dict[str, Any]:
        """The codes of the module's floats, one stacked tensor for each part of each matrix."""
        floats, found = LiveExpertWeights(self.module, self.experts, ("oi", "oi")), dict[str, Any]()
        for number, (words, matrix) in enumerate(matrices):
            parts: list[Tensor] = []
            for e in range(len(self.experts)):
                w_NK = floats.w_out(e) if words == "w_out" else floats.w_in(e)[number]
                one = quantize(w_NK.detach(), matrix.format, f"{words} of expert {e}")
                given: list[Tensor] = [getattr(one, name) for name in matrix.parts]
                parts = parts or [t.new_empty((len(self.experts), *t.shape)) for t in given]
                for part, t in zip(parts, given, strict=True):
                    part[e].copy_(t)
            found |= {f"{self.prefix}{words}_{n}": part for n, part in zip(matrix.parts, parts, strict=True)}
        return found

    def forget(self) -> None:
        """As the base class has it."""
        self._bank, self._known = None, None

    def read(self, activations: str) -> None:
        """Set ``BankFormat.activations``: the format in which later products read their rows."""
        for one in self.handed.values():  # this bank too
            one.format = dataclasses.replace(self.format, activations=activations)
            one.forget()

    def remembered(self, rows: int) -> Remembered | None:
        """A dict in which a kernel caches what it derives from the present addresses, and the tensors to keep alive.

        None where a tensor is of a subclass, or biases are copied: a copy has another address at each call.
        """
        del rows
        if self._biases.copied:
            return None
        tensors: list[Any] = [*map(self.held.get, self.names), *self._biases.read()]
        if not _PLAIN.issuperset(map(type, tensors)):
            return None
        # the cache is keyed by addresses and keeps no tensor alive, so that codes moved to another device are freed
        lie = how_they_lie(tensors)
        known = self._known  # read once: another thread may replace the attribute
        if known is None or known[0] != lie:
            known = self._known = lie, {}
        return known[1], tuple(tensors)

    def now(self) -> QuantizedExpertWeights:
        """The bank as it is now, for one call.

        Raises:
            UsageError: the codes were cast to another dtype or taken away.
        """
        tensors = [self.held.get(name) for name in self.names]
        biases = self._biases.read()
        key = tuple(map(id, (*tensors, *biases)))
        recorded = bool(biases) and torch.is_grad_enabled()  # a view made without gradients passes no gradient on
        if recorded or self._biases.copied or torch.compiler.is_compiling():
            return self._checked(tensors)
        known = self._bank  # read once: another thread may replace the attribute
        if known is None or known[0] != key:
            for other in list(self.handed.values()):  # they would keep codes on the former device alive
                assert isinstance(other, LiveCodes), "copies of this bank"
                other._bank = None
            known = self._bank = key, self._checked(tensors)
        return known[1]

    def of_one_call(self, rows: int) -> QuantizedExpertWeights:
        """The bank read once for a call, where each read copies biases; else this bank itself."""
        del rows
        return self.now().handed_out(self.layouts, self.dtype) if self._biases.copied else self

    def _checked(self, tensors: list[Any]) -> QuantizedExpertWeights:
        by_name = dict(zip(self.names, tensors, strict=True))
        try:
            bank = from_tensors(self.format, lambda name: by_name[self.prefix + name], *self._biases.lists())
            for matrices in (*bank.w_in_q, bank.w_out_q):
                matrices[0]  # raises where dtypes or shapes are wrong
        except (UsageError, AttributeError) as err:
            raise UsageError(
                f"the codes of {type(self.module).__name__}'s quantised experts are no longer what they were ({err}): "
                "codes and scales keep their own dtypes, so cast the model before it is optimised, with dtype="
            ) from err
        return bank

    @property
    def float_bytes(self) -> int:
        """Bytes of the floats that the codes replace, in the module's dtype."""
        sizes = sum(math.prod(m.shape) for m in (*self.format.w_in, self.format.w_out))
        return int(self.num_experts * sizes * self.float_dtype.itemsize)

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of the floats that the codes replace."""
        path = self.experts[0].w_out.path
        held = tensor_at(self.module, path)
        return held.dtype if isinstance(held, Tensor) else floats_of(self.module)[path][1]

    def paths(self) -> set[str]:
        """The paths of the tensors that hold, or held, the floats of the matrices."""
        return {w.path for ref in self.experts for w in (*ref.w_in, ref.w_out)}

    def fill(self, module: nn.Module) -> None:
        """Write the dequantised weights to the floats of ``module``, the block or a copy of it."""
        bank = self.now()
        for e, ref in enumerate(self.experts):
            inside = [matrices[e] for matrices in bank.w_in_q]
            for one, quantized, axis in (
                *((w, q, 0) for w, q in zip(ref.w_in, inside, strict=True)), (ref.w_out, bank.w_out_q[e], 1)
            ):  # fmt: skip
                floats = region(tensor_at(module, one.path), one)
                values = quantized.dequantize(floats.dtype)
                if ref.neurons is None:
                    floats.copy_(values)
                else:
                    floats.index_copy_(axis, torch.tensor(ref.neurons, device=floats.device), values)


def shapes_of(ref: ExpertRef) -> list[tuple[int, int]]:
    """(N, K) of an expert's matrices, W_out last."""
    if ref.neurons is None:
        return [(w.m, w.k) for w in (*ref.w_in, ref.w_out)]
    return [*((len(ref.neurons), w.k) for w in ref.w_in), (ref.w_out.m, len(ref.neurons))]


class _Biases:
    """The biases of a bank, read from the module at each call.

    Attributes:
        copied: whether a read copies picked neurons, so that it does not follow later writes to the bias.
    """

    def __init__(self, module: nn.Module, experts: list[ExpertRef], place: type[Place]) -> None:
        paths = {b.path for ref in experts for b in (*ref.b_in, ref.b_out) if b is not None}
        self.live = LiveExpertWeights(module, experts, ("oi", "oi"), place=places_of(paths, place)) if paths else None
        self.experts = experts
        self.copied = self.live is not None and any(ref.neurons is not None for ref in experts)
        self.places = [place(module, path) for path in sorted(paths)]

    def read(self) -> list[Tensor]:
        return [place.read() for place in self.places]

    def lists(self) -> tuple[Any, Any]:
        """``b_in`` and ``b_out`` of a bank."""
        if self.live is None:
            return None, None
        every = [self.live.b_in(e) for e in range(len(self.experts))]
        b_in = [[one[i] for one in every] for i in range(len(every[0]))]
        return b_in, [self.live.b_out(e) for e in range(len(self.experts))]


@contextlib.contextmanager
def dequantized(module: nn.Module, banks: Iterable[object], spare: SpareFloats | None = None) -> Iterator[None]:
    """While open, the experts' weights of ``module`` are the dequantised floats of the codes among ``banks``.

    For that time they take the memory of the block's floats; ``spare`` has it afterwards.
    """
    spare = SpareFloats() if spare is None else spare
    taken: list[Tensor] = []
    codes = [bank for bank in banks if isinstance(bank, LiveCodes)]
    before: list[tuple[dict[str, Any], str, Any]] = []
    with torch.no_grad():
        for path in sorted({path for one in codes for path in one.paths()}):
            owner, _, key = path.rpartition(".")
            home = module.get_submodule(owner)
            registry = next(r for r in (home._parameters, home._buffers, home.__dict__) if key in r)
            old = registry[key]
            before.append((registry, key, old))
            if isinstance(old, Tensor):
                floats = old.detach()
                new = spare.take(floats, floats.device).copy_(floats)
            else:
                shape, dtype = floats_of(codes[0].module)[path]
                like = torch.empty(shape, dtype=dtype, device="meta")
                new = spare.take(like, codes[0].tensors()["w_out_codes"].device).zero_()
            taken.append(new)
            place: dict[str, Any] = registry
            place[key] = nn.Parameter(new, requires_grad=False) if registry is home._parameters else new
        try:
            for one in codes:
                one.fill(module)
        except BaseException:
            _restore(before)
            raise
    try:
        yield
    finally:
        _restore(before)
        for new in taken:
            spare.give(new)


def _restore(before: list[tuple[dict[str, Any], str, Any]]) -> None:
    for registry, key, old in before:
        registry[key] = old


class DequantizedForward:
    """A block's original forward on the dequantised weights of its rewritten twin.

    ``spare``: memory that blocks share which run one after another; None where gradients are taken of what it returns.
    """

    def __init__(
        self, module: nn.Module, original: Callable[..., Any], codes: list[LiveCodes], spare: SpareFloats | None = None
    ) -> None:
        self.module, self.original, self.codes, self.spare = module, original, codes, spare

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        with dequantized(self.module, self.codes, self.spare):
            return self.original(*args, **kwargs)
