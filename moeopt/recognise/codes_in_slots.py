"""How a matrix is made of codes and scales in slots: read off what comes out, whatever calls make it.

    w[n, k] = (value(code[n, k]) - zero[b]) * scale[b]          b = the block that (n, k) lies in

The calls are made with numbers in the slots that tell where they stand: the digits of each code's place as codes, with
scales of one, show which code a weight is made of; codes of one and the places of scales as scales show the blocks.
What that says must then give the same bits as the calls on random codes and on scales of every size and sign, of one
sign alone, on zeros and on numbers that are none, so that a clamp, another table of codes, another rounding or a scale
that is replaced is seen.

Shape legend: N out, K in; B a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moeopt.ir.coded_function import CodedMatrix, SlotPart
from moeopt.ir.weight_format import WeightFormat
from moeopt.ir.weight_refs import PartRef
from moeopt.ops.quantized_weight import QuantizedWeight

Slots = Mapping[int, tuple[torch.dtype, tuple[int, ...]]]
"""By its number, the dtype and shape of each slot that a matrix is made of."""
MadeOfSlots = Callable[[dict[int, Tensor]], Tensor]
"""The (N, K) matrix of what is in these slots."""

_SCALES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}


@dataclass(frozen=True)
class _Guess:
    """What codes could mean; ``packing``: where two share a byte, which nibble is the first."""

    codes: str
    packing: str = ""

    @property
    def packed(self) -> bool:
        return bool(self.packing)


def read_codes(made: MadeOfSlots, slots: Slots, shape: tuple[int, int]) -> CodedMatrix | None:
    """The codes, scales and zero points of which ``made`` makes an (N, K) matrix; None where they are of no format."""
    for code, scale, zero in _roles(slots):
        for guess in _guesses(slots[code][0]):
            found = _read(_SlotProbe(made, slots, shape, code, scale, zero, guess))
            if found is not None:
                return found
    return None


def _roles(slots: Slots) -> Iterator[tuple[int, int, int | None]]:
    """Which slot could hold the codes, the scales and the zero points."""
    floats = [n for n, (dtype, _) in slots.items() if dtype in _SCALES]
    others = [n for n in slots if n not in floats]
    if len(floats) != 1 or len(others) not in (1, 2):
        return
    for codes in sorted(others, key=lambda n: -torch.Size(slots[n][1]).numel()):
        yield codes, floats[0], next((n for n in others if n != codes), None)


def _guesses(dtype: torch.dtype) -> list[_Guess]:
    """The likeliest first: codes are stored in their own dtype, or as bits that the module reads as another."""
    if dtype is torch.float8_e4m3fn:
        return [_Guess("e4m3")]
    whole = [_Guess("int8"), _Guess("uint8"), _Guess("e4m3")]
    halves = [_Guess("uint4", packing) for packing in ("low nibble first", "high nibble first")]
    if dtype is torch.int8:
        return [*whole, *halves]
    return [whole[1], *halves, whole[0], whole[2]] if dtype in (torch.uint8, torch.int32, torch.int16) else []


@dataclass(frozen=True)
class _SlotProbe:
    """The calls, and what is put into the slots."""

    made: MadeOfSlots
    slots: Slots
    shape: tuple[int, int]
    code: int
    scale: int
    zero: int | None
    guess: _Guess

    def __call__(self, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
        """The matrix; ``codes`` are bytes, or floats of 8 bits."""
        (dtype, shape) = self.slots[self.code]
        given = {self.code: codes.view(dtype).reshape(shape), self.scale: scales}
        if self.zero is not None:
            kind, size = self.slots[self.zero]
            given[self.zero] = torch.zeros(size, dtype=kind) if zeros is None else zeros
        return self.made(given)

    @property
    def bytes(self) -> int:
        dtype, shape = self.slots[self.code]
        return torch.Size(shape).numel() * dtype.itemsize

    def ones(self) -> Tensor:
        dtype, shape = self.slots[self.scale]
        return torch.ones(shape, dtype=dtype)

    def uniform(self, value: int) -> Tensor:
        """Every code ``value``, as bytes."""
        if self.guess.packed:
            return torch.full((self.bytes,), value | value << 4, dtype=torch.uint8)
        if self.guess.codes == "e4m3":
            return torch.full((self.bytes,), float(value), dtype=torch.float8_e4m3fn)
        return torch.full((self.bytes,), value, dtype=torch.int16).to(torch.uint8)


def _read(probe: _SlotProbe) -> CodedMatrix | None:
    zero = _zero_point(probe)
    places = None if zero is None else _code_places(probe, zero)
    blocks = None if zero is None else _blocks(probe, zero, probe.scale)
    if zero is None or places is None or blocks is None:
        return None
    block, scales = blocks
    guess, symmetric = probe.guess, probe.zero is None
    if symmetric and zero != {"uint8": 128, "uint4": 8}.get(guess.codes, 0):
        return None
    format = WeightFormat(
        _name(guess, block, symmetric), guess.codes, block, _SCALES[probe.slots[probe.scale][0]], symmetric,
        guess.packing or "low nibble first",  # type: ignore[arg-type]
    )  # fmt: skip
    zeros = None
    if probe.zero is not None:
        found = _blocks(probe, zero, probe.zero)
        if found is None or zero or (found[1].shape != (1, 1) and found[0] != block):
            return None
        zeros = SlotPart(probe.zero, found[1], format.scale_shape(probe.shape), format.code_dtype)
    held = SlotPart(probe.scale, scales, format.scale_shape(probe.shape), format.scale_dtype)
    codes = SlotPart(probe.code, places, format.code_shape(probe.shape), format.code_dtype, bits=True)
    matrix = CodedMatrix(format, probe.shape, codes, held, zeros)
    return matrix if all(_same_bits(probe, matrix, *tried) for tried in _trials(probe)) else None


def _name(guess: _Guess, block: tuple[int | None, int | None], symmetric: bool) -> str:
    """What the format is called in reports."""
    bits = {"uint4": "int4", "e4m3": "fp8"}.get(guess.codes, guess.codes)
    rows, columns = (n or "all" for n in block)
    size = "" if block == (1, None) else str(columns) if rows == 1 else f"{rows}x{columns}"
    return f"{bits}-asymmetric{size}" if not symmetric else f"{bits}-block{size}" if size else bits


def _zero_point(probe: _SlotProbe) -> int | None:
    """What codes of zero stand for with scales of one and zero points of zero, less; None where they differ, or where
    no code stands for zero."""
    value = probe(probe.uniform(0), probe.ones())
    first = -float(value.flatten()[0])
    most = 14 if probe.guess.packed else 254  # another code is one more
    known = first.is_integer() and 0 <= first <= most and bool((value == -first).all())
    return int(first) if known else None


def _code_places(probe: _SlotProbe, zero: int) -> PartRef | None:
    """The region of the codes' slot, of bytes where two codes share one, that the matrix is made of."""
    base = 16 if probe.guess.packed else 8 if probe.guess.codes == "e4m3" else 100
    count = probe.bytes * (2 if probe.guess.packed else 1)
    place = torch.arange(count, dtype=torch.int32)
    found = torch.zeros(probe.shape, dtype=torch.int32)
    for power in itertools.takewhile(lambda p: base**p < max(count, 2), itertools.count()):
        digit = place // base**power % base
        made = probe(_as_bytes(probe, digit), probe.ones()).float() + zero
        if bool((made != made.round()).any()) or bool(((made < 0) | (made >= base)).any()):
            return None
        found += made.int() * base**power
    dtype, shape = probe.slots[probe.code]
    stored = (*shape[:-1], shape[-1] * dtype.itemsize)
    if not probe.guess.packed:
        return _region(found, stored, (1, 1))
    first, second = (0, 1) if probe.guess.packing == "low nibble first" else (1, 0)
    low = found[:, ::2]
    pairs = bool((low % 2 == first).all()) and probe.shape[1] % 2 == 0
    if not pairs or not torch.equal(found[:, 1::2], low // 2 * 2 + second):
        return None
    return _region(low // 2, stored, (1, 1))


def _as_bytes(probe: _SlotProbe, digit: Tensor) -> Tensor:
    if probe.guess.packed:
        return (digit[::2] | digit[1::2] << 4).to(torch.uint8)
    return digit.to(torch.float8_e4m3fn) if probe.guess.codes == "e4m3" else digit.to(torch.uint8)


def _blocks(probe: _SlotProbe, zero: int, slot: int) -> tuple[tuple[int | None, int | None], PartRef] | None:
    """The block of codes that share a number of ``slot``, and the region of the slot that holds these numbers."""
    dtype, shape = probe.slots[slot]
    count = torch.Size(shape).numel()
    found = torch.zeros(probe.shape, dtype=torch.int32)
    base = 100 if slot == probe.zero else 128
    for power in itertools.takewhile(lambda p: base**p < max(count, 2), itertools.count()):
        numbers = (torch.arange(count, dtype=torch.int32) // base**power % base).reshape(shape).to(dtype)
        if slot == probe.zero:
            made = -probe(probe.uniform(0), probe.ones(), numbers).float()
        else:
            made = probe(probe.uniform(zero + 1), numbers).float()
        if bool((made != made.round()).any()) or bool(((made < 0) | (made >= base)).any()):
            return None
        found += made.int() * base**power
    rows, columns = _run(found[:, 0]), _run(found[0])
    part = _region(found, tuple(shape), (rows, columns))
    if part is None:
        return None
    N, K = probe.shape
    if columns == K and rows == N:
        rows = 1  # one number for all is that of each row too
    block = (None if rows == N and N > 1 else rows, None if columns == K else columns)
    return block, part


def _run(places: Tensor) -> int:
    """How many places at the beginning are the same."""
    other = (places != places[0]).nonzero()
    return int(other[0]) if len(other) else len(places)


def _region(places: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> PartRef | None:
    """The region of a tensor of ``shape`` that holds ``places``, of which each stands for a ``block``; None if none."""
    starts = places[:: block[0], :: block[1]]
    whole = starts.repeat_interleave(block[0], 0)[: len(places)]
    if not torch.equal(whole.repeat_interleave(block[1], 1)[:, : places.shape[1]], places):
        return None
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]

    def index(flat: int) -> tuple[int, ...]:
        return tuple(flat // stride % size for stride, size in zip(strides, shape, strict=True))

    origin = index(int(starts[0, 0]))
    steps = []
    for axis, size in enumerate(starts.shape):
        nxt = index(int(starts[min(1, size - 1), 0] if axis == 0 else starts[0, min(1, size - 1)]))
        steps.append(tuple(a - b for a, b in zip(nxt, origin, strict=True)))
    part = PartRef("", origin, tuple(steps), tuple(starts.shape))
    along = [[a for a, s in enumerate(step) if s] for step in steps]
    if any(len(a) > 1 or any(step[b] < 0 for b in a) for a, step in zip(along, steps, strict=True)):
        return None
    if any(not a and size > 1 for a, size in zip(along, starts.shape, strict=True)) or along[0] == along[1] != []:
        return None
    every = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)
    ends = [o + sum((n - 1) * s[d] for n, s in zip(part.shape, steps, strict=True)) for d, o in enumerate(origin)]
    if any(end >= size for end, size in zip(ends, shape, strict=True)):
        return None
    return part if torch.equal(part.read(every), starts) else None


def _trials(probe: _SlotProbe) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
    """Codes and scales on which the calls and the format must agree, and what makes zero points for them."""
    dtype, shape = probe.slots[probe.scale]
    info, count = torch.finfo(dtype), torch.Size(shape).numel()
    odd = torch.tensor([0.0, info.tiny / 4, -info.tiny / 4, info.max, -info.max, *map(float, ("inf", "-inf", "nan"))])
    scales = [torch.zeros(shape, dtype=dtype)]  # all of them: a maximum of zero is a case of its own
    # a few of the odd numbers at a time where there are fewer scales than these
    scales += [odd[torch.arange(n, n + count) % len(odd)].to(dtype).reshape(shape) for n in range(0, len(odd), count)]
    for seed in range(3 + len(scales)):
        rng = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 256, (probe.bytes,), generator=rng, dtype=torch.uint8)
        if seed >= 3 and probe.guess.codes != "e4m3":  # the codes about zero: only of these is the largest scale seen
            step = (codes % 3).to(torch.int16) - 1
            middle = {"uint8": 128, "uint4": 8}.get(probe.guess.codes, 0)
            codes = (middle + step).to(torch.uint8) * (17 if probe.guess.packed else 1)
        if probe.guess.codes == "e4m3":
            if seed < 3:  # 127 and 255 are no numbers
                codes = codes.clamp(max=254).where(codes != 127, 0)
            codes = codes.view(torch.float8_e4m3fn)
        if seed < 3:
            low, high = (
                (-2.0, 2.0) if seed == 0 else (torch.tensor(v).log2().item() for v in (info.tiny, info.max / 512))
            )
            exponent = torch.rand(shape, generator=rng) * (high - low) + low
            # of both signs, of each alone: what a maximum or a sum of the scales decides is seen too
            sign = torch.randint(0, 2, shape, generator=rng) * 2 - 1 if seed == 0 else 2 * seed - 3
            yield codes, (torch.exp2(exponent.double()) * sign).to(dtype), rng
        else:
            yield codes, scales[seed - 3], rng


def _same_bits(probe: _SlotProbe, matrix: CodedMatrix, codes: Tensor, scales: Tensor, rng: torch.Generator) -> bool:
    """Whether the calls give the bits of the format."""
    zeros = None
    if probe.zero is not None and matrix.zeros is not None:
        kind, size = probe.slots[probe.zero]
        least, most = (0, 16) if matrix.format.packed else (0, 256) if matrix.format.codes == "uint8" else (-128, 128)
        zeros = torch.randint(least, most, size, generator=rng).to(kind)
    want = probe(codes, scales, zeros)
    given = {probe.code: codes.view(probe.slots[probe.code][0]).reshape(probe.slots[probe.code][1])}
    given |= {probe.scale: scales} | ({} if probe.zero is None or zeros is None else {probe.zero: zeros})
    held = [part.read(given[part.slot]) for part in matrix.parts]
    weight = QuantizedWeight(held[0], held[1], held[2] if len(held) > 2 else None, matrix.format, matrix.shape)
    got = weight.dequantize(want.dtype)
    return bool(((got == want) | (got.isnan() & want.isnan())).all())
