"""Integers that are packed into int32: compressed-tensors, GPTQ and AWQ.

Shape legend: N out, K in, G groups along K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moeopt.errors import CheckpointError
from moeopt.ir.weight_format import WeightFormat
from moeopt.published.packings import awq_codes, awq_numbers, columns_of_int32, numbers_of_int32, rows_of_int32
from moeopt.published.stored_matrix import CodeTensors, StoredMatrix
from moeopt.published.tensor_files import TensorFiles

_SCALES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


_PACKED = ("pack-quantized", "mixed-precision", "int-quantized", "float-quantized", "naive-quantized", "dense")
"""Formats of compressed-tensors, of which the first is the one that has packed weights, and others stand beside it."""


class UnreadLayout(Exception):
    """A matrix in a form that is not read; the message says which."""


def whole(value: object) -> object:
    """A number of bits or columns as a config states it, 4.0 and "4" among them, as an int; anything else as it is."""
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def weights_of(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The ``weights`` entries of a compressed-tensors config's groups."""
    groups = config.get("config_groups")
    found = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    numbers = ("num_bits", "group_size")
    return [w | {key: whole(w[key]) for key in numbers if key in w} for w in found if isinstance(w, dict)]


def _check_format(packed: str, config: Mapping[str, Any]) -> None:
    """:class:`UnreadLayout` where a config of compressed-tensors says that ``packed`` is in another format."""
    groups = config.get("config_groups")
    held = groups.values() if isinstance(groups, Mapping) else ()
    stated = [config.get("format"), *(g.get("format") for g in held if isinstance(g, Mapping))]
    other = next((f for f in stated if isinstance(f, str) and f not in _PACKED), None)
    if other is not None:
        name = "NVFP4, 4-bit floats with FP8 scales," if other.startswith("nvfp4") else repr(other)
        raise UnreadLayout(f"{packed} may be of the format {name} that config.json names; pack-quantized is read")


def pack_quantized(files: TensorFiles, module: str, config: Mapping[str, Any]) -> StoredMatrix:
    """compressed-tensors "pack-quantized": int32 (N, K bits / 32), codes less 2^(bits - 1) are the numbers."""
    packed, scale, size = (f"{module}.weight_{part}" for part in ("packed", "scale", "shape"))
    _check_format(packed, config)
    (N, K), bits = _packed_sizes(files, packed, scale, size, config)
    groups = files.shape(scale)[1] if len(files.shape(scale)) == 2 else 1
    width = _width(K, groups, [w.get("group_size") for w in weights_of(config)], scale)
    zero = f"{module}.weight_zero_point"
    symmetric = zero not in files
    if symmetric and weights_of(config) and all(w.get("symmetric") is False for w in weights_of(config)):
        raise CheckpointError(f"{zero} is in no file, and config.json says that there is one: fetch both again")
    format = WeightFormat(
        f"int{bits}{'' if width is None else f'-group{width}'}",
        f"uint{bits}",
        (1, width),
        _scale(files, scale),
        symmetric,
    )

    def zeros() -> Tensor:
        held = files.tensor(zero)
        if held.dtype == torch.int32:  # packed along N
            return numbers_of_int32(held.t(), bits).t()[:N]
        return (held.reshape(N, -1).to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)

    def load() -> CodeTensors:
        codes = rows_of_int32(files.tensor(packed), K, bits)
        return codes, files.tensor(scale).reshape(N, groups), None if symmetric else zeros()

    tensors = (packed, scale, size) if symmetric else (packed, scale, size, zero)
    return _by_column(
        files, f"{module}.weight_g_idx", groups, StoredMatrix(module, None, (N, K), format, load, tensors)
    )


def _packed_sizes(
    files: TensorFiles, packed: str, scale: str, size: str, config: Mapping[str, Any]
) -> tuple[tuple[int, int], int]:
    """(N, K) and the bits of numbers that are packed along K."""
    dtype, missing = files.dtype(packed), [name for name in (scale, size) if name not in files]
    if dtype != torch.int32 or len(files.shape(packed)) != 2 or missing:
        without = f", without {' and '.join(missing)}" if missing else ""
        raise UnreadLayout(
            f"{packed} is {dtype} {files.shape(packed)}{without}; packed weights are read as 2-D int32 with "
            "weight_scale and weight_shape"
        )
    if files.shape(size) != (2,) or not files.shape(scale):
        raise CheckpointError(f"{size} or {scale} has no sizes of a matrix: fetch the file again")
    N, K = (int(n) for n in files.tensor(size).tolist())
    rows, across = files.shape(packed)
    fits = [bits for bits in (4, 8) if rows == N and across == -(-K * bits // 32)]
    if not fits or files.shape(scale)[0] != N:
        raise CheckpointError(
            f"{packed} of {rows} x {across} and {scale} of {files.shape(scale)} do not hold a {N} x {K} matrix of 4 or "
            "8 bits: fetch the file again"
        )
    wanted = {w.get("num_bits") for w in weights_of(config)}
    return (N, K), next((b for b in fits if b in wanted), fits[0])


def gptq(files: TensorFiles, module: str, config: Mapping[str, Any]) -> StoredMatrix:
    """GPTQ: int32 (K bits / 32, N); zero points are stored less 1, but in "gptq_v2"."""
    stored = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if stored not in ("gptq", "gptq_v2"):
        raise UnreadLayout(f"{module}.qweight is GPTQ of the format {stored!r}; gptq and gptq_v2 are read")
    if any(isinstance(own, Mapping) and own.keys() & {"bits", "group_size"} for own in _overrides(config)):
        raise UnreadLayout(
            f"{module}.qweight may be one of the modules with bits or groups of their own (dynamic); one setting for "
            "all is read"
        )
    names, (down, N), bits, groups = _parts(files, module, config)
    K = down * 32 // bits
    width = _width(K, groups, _stated(config), names[1])
    less = 0 if stored == "gptq_v2" else 1
    sym = config.get("sym") is True and not any(isinstance(own, Mapping) and "sym" in own for own in _overrides(config))

    def zeros() -> Tensor:
        points = numbers_of_int32(files.tensor(names[2]), bits)[:, :N]
        if less and bool((points == (1 << bits) - 1).any()):
            raise CheckpointError(
                f"{names[2]} holds a zero point of {(1 << bits) - 1}, which stands for {1 << bits} or for 0, as the "
                "reader has it: save the checkpoint in the format gptq_v2"
            )
        middle = 1 << (bits - 1)
        if sym and not bool((points + less == middle).all()):
            raise CheckpointError(
                f"config.json says that zero points are all {middle} (sym), and those of {names[2]}, read in the "
                f"format {stored}, are not: the format is another one, or the files and config.json are of two versions"
            )
        return (points + less).t()

    def codes() -> Tensor:
        return columns_of_int32(files.tensor(names[0]))

    matrix = _with_zeros(files, module, names, (N, K), bits, width, codes, zeros)
    return _by_column(files, f"{module}.g_idx", groups, matrix)


def awq(files: TensorFiles, module: str, config: Mapping[str, Any]) -> StoredMatrix:
    """AWQ in its "gemm" version: int32 (K, N / 8), columns interleaved."""
    version = str(config.get("version") or "gemm").lower()
    if version != "gemm":
        raise UnreadLayout(f"AWQ of version {version!r}; the version gemm is read")
    names, (K, across), bits, groups = _parts(files, module, config)
    if bits != 4:
        raise UnreadLayout(f"AWQ of {bits} bits; 4 are read")
    width = _width(K, groups, _stated(config), names[1])

    def codes() -> Tensor:
        return awq_codes(files.tensor(names[0]))

    def zeros() -> Tensor:
        return awq_numbers(files.tensor(names[2])).t()

    return _with_zeros(files, module, names, (across * 8, K), bits, width, codes, zeros)


def _stated(config: Mapping[str, Any]) -> list[Any]:
    """The group sizes that a config of GPTQ or AWQ states: AutoAWQ's own files say ``q_group_size``."""
    return [whole(config[key]) for key in ("group_size", "q_group_size") if key in config]


def _overrides(config: Mapping[str, Any]) -> list[Any]:
    """GPTQModel's settings for some modules."""
    dynamic = config.get("dynamic")
    return list(dynamic.values()) if isinstance(dynamic, Mapping) else []


def _parts(
    files: TensorFiles, module: str, config: Mapping[str, Any]
) -> tuple[tuple[str, str, str], tuple[int, int], int, int]:
    """The names of codes, scales and zero points, the sizes of the packed codes, bits and groups."""
    names = (f"{module}.qweight", f"{module}.scales", f"{module}.qzeros")
    missing = [n for n in names if n not in files]
    bits = whole(config.get("bits", config.get("w_bit", 4)))
    flat = not missing and all(len(files.shape(n)) == 2 for n in names)
    if not flat or files.dtype(names[0]) != torch.int32 or bits not in (4, 8):
        without = f", without {' and '.join(missing)}" if missing else ""
        raise UnreadLayout(
            f"{names[0]} is {files.dtype(names[0])} of {bits!r} bits{without}; 2-D int32 of 4 or 8 bits is read"
        )
    down, across = files.shape(names[0])
    assert isinstance(bits, int)
    return names, (down, across), bits, files.shape(names[1])[0]


def _with_zeros(
    files: TensorFiles, module: str, names: tuple[str, str, str], shape: tuple[int, int], bits: int, width: int | None,
    codes: Callable[[], Tensor], zeros: Callable[[], Tensor],
) -> StoredMatrix:  # fmt: skip
    """A matrix with scales (G, N); zero points in the middle are no zero points at all."""
    points = zeros().contiguous()
    symmetric = bool((points == 1 << (bits - 1)).all())
    scale = _scale(files, names[1])
    format = WeightFormat(
        f"int{bits}{'' if width is None else f'-group{width}'}", f"uint{bits}", (1, width), scale, symmetric
    )

    def load() -> CodeTensors:
        return codes(), files.tensor(names[1]).t(), None if symmetric else points

    return StoredMatrix(module, None, shape, format, load, names)


def _scale(files: TensorFiles, name: str) -> str:
    found = _SCALES.get(files.dtype(name))  # type: ignore[arg-type]
    if found is None:
        raise UnreadLayout(f"{name} is {files.dtype(name)}; scales are read as floats")
    return found


def _width(columns: int, groups: int, stated: list[Any], name: str) -> int | None:
    """Columns of a group, None where each row is one.

    Args:
        stated: what the config says, of which one must be so, as several sizes may have as many groups: of 200 columns
            those of 100 and of 128. What is no number above 0 stands for rows. [] where the config says nothing.
    """
    sizes = [w if isinstance(w, int) and w > 0 else None for w in stated]
    if not sizes:
        sizes = [None if groups == 1 else columns // groups]
    for width in sizes:
        if groups == (1 if width is None else -(-columns // width)):
            return width if groups > 1 else None
    raise CheckpointError(
        f"{name} has {groups} groups for {columns} columns, and config.json groups of {stated}: the files and "
        "config.json are of two versions; fetch both again"
    )


def _by_column(files: TensorFiles, order: str, groups: int, matrix: StoredMatrix) -> StoredMatrix:
    """``matrix`` where columns are grouped in their order, else with a scale for each weight: its group's.

    Args:
        order: the tensor that has the group of each column (desc_act, actorder), where there is one.
        groups: how many there are scales of.

    Raises:
        CheckpointError: the tensor names groups that there are no scales of, or of another number of columns.
    """
    if order not in files:
        return matrix
    K, found = matrix.shape[1], files.tensor(order).long()
    if found.shape != (K,) or not bool(((found >= 0) & (found < groups)).all()):
        raise CheckpointError(
            f"{order} has to name one of {groups} groups for each of {K} columns, and does not: fetch the file again"
        )
    if torch.equal(found, torch.arange(K) // (matrix.format.block[1] or K)):
        return matrix

    def load() -> CodeTensors:
        codes, scales, zeros = matrix.load()
        return codes, scales.index_select(1, found), None if zeros is None else zeros.index_select(1, found)

    format = replace(matrix.format, block=(1, 1))
    return replace(matrix, format=format, load=load, tensors=(*matrix.tensors, order), grouped=matrix.format)
