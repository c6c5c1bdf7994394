"""Which tensors of a checkpoint are quantised matrices, told by their names and the config's ``quantization_config``.

    X.weight f8e4m3 + X.weight_scale_inv         FP8 in blocks (DeepSeek-V3, Qwen3-FP8, MiniMax-M2)
    X.weight f8e4m3 or i8 + X.weight_scale       compressed-tensors float-quantized, int-quantized
    X f8e4m3 (E, N, K) + X_scale_inv             the first, of experts in one stack
    X.weight_packed i32 + X.weight_scale         compressed-tensors pack-quantized, 4 and 8 bits
    X_blocks u8 + X_scales u8                    MXFP4 as GPT-OSS has it, (E, N, K / 32, 16)
    X.qweight i32 + X.qzeros + X.scales          GPTQ, or AWQ, whichever ``quant_method`` says
    X.weight u8 + X.weight.quant_state...        bitsandbytes, 4 bits: see ``normal_floats``

Sizes are read here, and zero points of GPTQ and AWQ; a matrix is read when it is asked for. Blocks at the edges may be
partial, and have whole scales. Sources: ``Fp8Dequantize`` and ``mxfp4`` of transformers 5.23 for the first and fourth,
``compressors`` of compressed-tensors 0.20 for the second and third, ``unpack_awq`` of AutoAWQ and the torch kernels of
GPTQModel for the last.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moeopt.errors import CheckpointError
from moeopt.ir.weight_format import Block, WeightFormat
from moeopt.published.integer_packings import UnreadLayout, awq, gptq, pack_quantized, weights_of
from moeopt.published.normal_floats import STATE, normal_floats
from moeopt.published.stored_matrix import CodeTensors, StoredMatrix
from moeopt.published.tensor_files import TensorFiles

_FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}
_CODES = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8"}
_TWO_IN_A_BYTE = {
    torch.float8_e4m3fn: "NVFP4, two 4-bit floats in a byte with FP8 scales, which is not read",
    torch.uint8: "MXFP4 under the name of a weight; MXFP4 is read as ..._blocks and ..._scales",
}
"""What bytes under the name of a weight are, by the dtype of their scales."""
_SCALE = re.compile(r"(weight|qweight)?_?scales?$|qscale_weight$")
"""Names under which other libraries keep the scales of a module's weight (EETQ: weight_scales; Mistral's own files)."""
_IN_STACKS = ("", "fp8", "compressed-tensors", "modelopt", "quark", "fbgemm_fp8")
"""Methods whose experts may be one tensor of codes under a name of its own, with scales beside it."""
_BY_GROUP = (True, "group", "dynamic")
"""What compressed-tensors calls an order of columns that is stored beside the codes."""
_NEVER_SET = (
    " (compressed-tensors also leaves out an order never set, as of an expert that no calibration row reaches, "
    "which files do not tell from a loss: then quantise with rows for each expert, or with actorder 'weight')"
)
_E8M0 = (torch.uint8, torch.float8_e8m0fnu)


@dataclass
class QuantisedTensors:
    """What of a checkpoint is quantised.

    Attributes:
        matrices: by :attr:`StoredMatrix.label`.
        unread: matrices in a format that is not read, and why, by name.
        method: ``quant_method`` of the config; "" where it names none.
    """

    matrices: dict[str, StoredMatrix] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    method: str = ""


def quantised_tensors(files: TensorFiles, config: Mapping[str, Any]) -> QuantisedTensors:
    """The quantised matrices of ``files``.

    Args:
        files: the tensors, of which only names and sizes are read.
        config: the ``quantization_config`` of ``config.json``; {} where there is none.

    Raises:
        CheckpointError: scales that are not of the sizes that their weights need; the message names both.
    """
    found = QuantisedTensors(method=str(config.get("quant_method") or ""))
    scales = {name.rpartition(".")[0]: name for name in files if _SCALE.match(name.rpartition(".")[2])}
    for name in files:
        module, _, last = name.rpartition(".")
        scale = next((f"{name}{end}" for end in ("_scale_inv", "_scale") if f"{name}{end}" in files), None)
        try:
            if f"{name}{STATE}nf4" in files or f"{name}{STATE}fp4" in files:
                made = [normal_floats(files, name)]
            elif scale is not None and (last == "weight" or files.dtype(name) in _CODES):
                made = _scaled(files, module if last == "weight" else name, name, scale, config)
            elif _lacks_a_scale(files, name, config):
                if last == "weight" and (other := scales.get(module)):
                    raise UnreadLayout(
                        f"{name} holds codes ({files.dtype(name)}), and {other} may be their scale; 8-bit weights are "
                        f"read with {name}_scale_inv or {name}_scale"
                    )
                raise CheckpointError(
                    f"{name} holds codes ({files.dtype(name)}), and no file has a scale for them ({name}_scale_inv or "
                    f"{name}_scale): a file is missing, or of another version; fetch the files again"
                )
            elif last == "weight_packed":
                made = [pack_quantized(files, module, config)]
            elif last == "qweight":
                made = [_packed_down(files, module, config, found.method)]
            elif name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in files:
                made = _mxfp4(files, name.removesuffix("_blocks"))
            else:
                continue
        except UnreadLayout as err:
            found.unread[module or name] = str(err)
            continue
        found.matrices |= {m.label: m for m in made}
    _check_beside(files, found, config)
    return found


def _check_beside(files: TensorFiles, found: QuantisedTensors, config: Mapping[str, Any]) -> None:
    """``CheckpointError`` where a matrix lacks the tensor beside its codes that the others, or the config, say it has.

    Without its zero points or the order of its columns a matrix can be read all the same, as another one.
    """
    settings = weights_of(config)
    by_module = len(settings) > 1 or bool(config.get("dynamic"))
    ordered = bool(settings) and all(w.get("actorder") in _BY_GROUP for w in settings)
    ordered |= config.get("desc_act") is True and not by_module
    for codes, beside, stated in (
        ("weight_packed", "weight_zero_point", False), ("weight", "weight_zero_point", False),
        ("weight_packed", "weight_g_idx", ordered), ("qweight", "g_idx", ordered),
    ):  # fmt: skip
        modules = [m.name for m in found.matrices.values() if m.tensors[0] == f"{m.name}.{codes}"]
        absent = [name for name in modules if f"{name}.{beside}" not in files]
        if absent and (stated or (not by_module and len(absent) < len(modules))):
            says = "config.json says that there is one" if stated else "other matrices have one"
            never_set = beside == "weight_g_idx" and len(absent) < len(modules)
            raise CheckpointError(
                f"{absent[0]}.{beside} is in no file, and {says}: a file is missing, or the index that names it is of "
                f"another version; fetch the files again{_NEVER_SET if never_set else ''}"
            )


def _lacks_a_scale(files: TensorFiles, name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor of a quantised checkpoint is 8-bit codes that would be taken for numbers as they are."""
    module, _, last = name.rpartition(".")
    weight = last == "weight" or (len(files.shape(name)) == 3 and "scale" not in last)
    if last == "weight" and files.dtype(name) in _CODES and f"{module}.SCB" in files:
        raise UnreadLayout(
            f"{name} is of bitsandbytes' 8 bits (LLM.int8), whose products round rows of x too and take columns with "
            "large numbers apart; formats of weights alone are read"
        )
    found = bool(config) and weight and files.dtype(name) in _CODES
    method = str(config.get("quant_method") or "")
    if found and last != "weight" and method not in _IN_STACKS:
        raise UnreadLayout(f"{name} holds codes ({files.dtype(name)}) as {method} has them, which is not read")
    return found


def _packed_down(files: TensorFiles, module: str, config: Mapping[str, Any], method: str) -> StoredMatrix:
    """Numbers that are packed along K or across N, which tensors of one name and kind may be."""
    readers = {"gptq": gptq, "awq": awq}
    if method not in readers:
        raise UnreadLayout(f"{module}.qweight is packed as {method or 'no quant_method'} has it; gptq and awq are read")
    return readers[method](files, module, config)


def _scaled(files: TensorFiles, module: str, weight: str, scale: str, config: Mapping[str, Any]) -> list[StoredMatrix]:
    """8-bit codes as they are, and scales: of the whole tensor, of each row, or of blocks."""
    kind = _CODES.get(files.dtype(weight))  # type: ignore[arg-type]
    if files.dtype(weight) == torch.uint8 and (two := _TWO_IN_A_BYTE.get(files.dtype(scale))):  # type: ignore[arg-type]
        raise UnreadLayout(f"{weight} is {two}")
    if kind is None:
        raise UnreadLayout(f"{weight} is {files.dtype(weight)}; 8-bit weights are read as float8_e4m3fn and int8")
    shape, dtype = files.shape(weight), files.dtype(scale)
    held = "e8m0" if dtype in _E8M0 else _FLOATS.get(dtype)  # type: ignore[arg-type]
    zeros = f"{weight}_zero_point" if f"{weight}_zero_point" in files else None
    if held is None or len(shape) not in (2, 3):
        raise UnreadLayout(f"{weight} is {len(shape)}-D with scales of {dtype}")
    N, K = shape[-2:]
    block = _block_of(files, weight, scale, (N, K), config)
    name = {(None, None): "tensor", (1, None): "channel"}.get(block, f"{block[0]}x{block[1]}")  # type: ignore[arg-type]
    format = WeightFormat(f"{'fp8' if kind == 'e4m3' else 'int8'}-{name}", kind, block, held, symmetric=zeros is None)
    grid = format.scale_shape((N, K))

    def load(expert: int | None) -> CodeTensors:
        def one(name: str) -> torch.Tensor:
            tensor = files.tensor(name)
            return tensor if expert is None or tensor.dim() < 3 else tensor[expert]

        scales = one(scale)
        scales = (scales.view(torch.uint8) if held == "e8m0" else scales).reshape(grid)
        return one(weight), scales, None if zeros is None else one(zeros).reshape(grid)

    tensors = (weight, scale) if zeros is None else (weight, scale, zeros)
    stack: list[int | None] = list(range(shape[0])) if len(shape) == 3 else [None]
    return [StoredMatrix(module, e, (N, K), format, lambda e=e: load(e), tensors) for e in stack]  # type: ignore[misc]


def _block_of(files: TensorFiles, weight: str, scale: str, shape: tuple[int, int], config: Mapping[str, Any]) -> Block:
    """Which weights share a scale, from the config's block where it gives the grid that the scales have."""
    N, K = shape
    sizes = files.shape(scale)
    if (
        len(files.shape(weight)) == 3
        and math.prod(sizes) > 1
        and (len(sizes) != 3 or sizes[0] != files.shape(weight)[0])
    ):
        raise UnreadLayout(
            f"{scale} is {sizes}, and the stack {weight} of {files.shape(weight)} is read with scales of each expert's "
            "rows or blocks, (experts, ...)"
        )
    grid = sizes[-2:] if len(sizes) >= 2 else (sizes[0] if sizes else 1, 1)
    if len(sizes) > 3 or (len(sizes) == 3 and len(files.shape(weight)) == 2):
        raise UnreadLayout(
            f"{scale} is {sizes}; scales of a matrix are read as one, as rows, or as blocks (rows, columns)"
        )
    blocks = _stated_blocks(config)
    if grid == (1, 1) and not (blocks and scale.endswith("_inv")):
        return None, None
    if grid == (N, 1) and not scale.endswith("_inv"):
        return 1, None
    for rows, columns in blocks or [(128, 128)]:  # of 192 rows those of 96 and of 128 have as many scales
        if (-(-N // rows), -(-K // columns)) == grid:
            if not blocks and config.get("quant_method", "fp8") != "fp8" and (N % rows or K % columns):
                raise UnreadLayout(
                    f"{scale} has scales for {grid[0]} x {grid[1]} blocks of {weight} of {N} x {K}, and config.json "
                    "does not say of which size: where blocks are partial, several sizes have as many scales"
                )
            return rows, columns
    stated = " or ".join(f"{rows} x {columns}" for rows, columns in blocks) or "128 x 128"
    raise CheckpointError(
        f"{scale} has scales for {grid[0]} x {grid[1]} blocks, and {weight} of {N} x {K} in blocks of {stated} has "
        "another number of them: the files and config.json are of two versions; fetch both again"
    )


def _stated_blocks(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The blocks that a config states, as [rows, columns], "128x128", or columns of a group."""
    stated: list[Any] = [config.get("weight_block_size"), *(w.get("block_structure") for w in weights_of(config))]
    stated = [[int(n) for n in re.findall(r"\d+", one)] if isinstance(one, str) else one for one in stated]
    stated += [[1, w["group_size"]] for w in weights_of(config) if w.get("group_size")]
    pairs = [one for one in stated if isinstance(one, list) and len(one) == 2]
    return [(rows, columns) for rows, columns in pairs if all(type(n) is int and n > 0 for n in (rows, columns))]


def _mxfp4(files: TensorFiles, name: str) -> list[StoredMatrix]:
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    shape = files.shape(blocks)
    if files.dtype(blocks) != torch.uint8 or len(shape) != 4 or shape[-1] != 16:
        raise UnreadLayout(
            f"{blocks} is {files.dtype(blocks)} {shape}; MXFP4 is read as uint8 (experts, out, in / 32, 16)"
        )
    if files.dtype(scales) not in _E8M0 or files.shape(scales) != shape[:3]:
        raise CheckpointError(
            f"{scales} is {files.dtype(scales)} {files.shape(scales)}, and {blocks} of {shape} has a uint8 scale for "
            "each 16 bytes: fetch the file again"
        )
    E, N, G, _ = shape
    format = WeightFormat("mxfp4", "e2m1", (1, 32), "e8m0")

    def load(expert: int) -> CodeTensors:
        codes = files.tensor(blocks)[expert].reshape(N, G * 16)
        return codes, files.tensor(scales)[expert].view(torch.uint8), None

    return [
        StoredMatrix(name, e, (N, 32 * G), format, lambda e=e: load(e), (blocks, scales))  # type: ignore[misc]
        for e in range(E)
    ]
