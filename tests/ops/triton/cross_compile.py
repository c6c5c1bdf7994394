"""Compile the kernels for GPUs that are not here, with Triton's compiler and NVIDIA's ptxas: one JSON line a kernel.

    python -m tests.ops.triton.cross_compile 90 fp16 bf16
    python -m tests.ops.triton.cross_compile 90 tf32

A process of its own: Triton must not be in its interpreter here. The signature is what its launcher would make of
tensors that start at multiples of 16 bytes and of widths that are multiples of 16.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.triton import kernels
from moeopt.ops.triton.constants import WeightTypes, function
from moeopt.ops.triton.launch import COLUMNS, DEPTH, sorting, tile_of_token
from moeopt.ops.triton.tiles import TOGETHER, tiles_for

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROWS_PER_EXPERT = (4, 64, 512)
FLOATS = {"x", "a", "y", "o", "term", "weights"}
INTEGERS = {"order": "*i32", "ends": "*i32", "ids": "*i64", "table": "*i64"}
MULTIPLES_OF_16 = FLOATS | set(INTEGERS) | {"x_t", "out_step", "H", "I", "D"}
FOUR = {"num_warps": 4}
SPEC = ExpertsSpec(rows="separate")


def compiled(kernel: str, dtype: str, capability: int, constants: dict, options: dict, tf32: bool = False) -> dict:
    fn = getattr(kernels, kernel)
    held = WeightTypes(DTYPES[dtype], DTYPES[dtype], False, False, False, True)
    spec = dataclasses.replace(SPEC, out_norm_eps=1e-6) if kernel == "combine_normed" else SPEC
    F = function(spec, DTYPES[dtype], DTYPES[dtype], held, tf32=tf32, interpreted=False)
    constants = {**constants, "F": F, "x_h": 1, "in_step": 1, "ids_k": 1, "weights_k": 1}
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}
    signature = {name: "constexpr" if name in constants else _type(name, dtype) for name in fn.arg_names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(fn.arg_names) if name in MULTIPLES_OF_16}
    source = ASTSource(fn, signature, {(fn.arg_names.index(n),): v for n, v in constants.items()}, divisible)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = built.asm["ptx"]
    spilled = re.search(r"(\d+) bytes spill stores", _ptxas(ptx, capability))
    return {
        "kernel": kernel, "dtype": dtype, "capability": capability, **options,
        "tile": [v for name, v in constants.items() if name in ("BM", "BN", "BK")],
        "shared": built.metadata.shared,
        "spilled": int(spilled.group(1)) if spilled else None,
        "mma": [op for op in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if op in ptx],
        "vector_loads": len(re.findall(r"(ld\.global|cp\.async)[^;\n]*(v4\.b32|, 0x10|, 16)", ptx)),
    }  # fmt: skip


def _type(name: str, dtype: str) -> str:
    return f"*{dtype}" if name in FLOATS else INTEGERS.get(name, "i32")


def _ptxas(ptx: str, capability: int) -> str:
    tool = get_ptxas(capability)
    arch = re.search(r"\.target (\S+)", ptx).group(1).split(",")[0]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [getattr(tool, "path", tool), "-v", "--gpu-name", arch, file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def in_tf32(capability: int) -> None:
    """The products of float32 as torch's setting ``allow_tf32`` has them made."""
    tile = tiles_for(64, 4, 4, capability)
    shape = {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "EP": 128, "TOGETHER": TOGETHER}
    how = {"num_warps": tile.warps, "num_stages": tile.stages}
    for kernel in ("tile_in", "tile_out"):
        print(json.dumps(compiled(kernel, "fp32", capability, shape, how, tf32=True)), flush=True)


def main(capability: int, dtypes: list[str]) -> None:
    if dtypes == ["tf32"]:
        return in_tf32(capability)
    for dtype in dtypes:
        tiles = {
            tiles_for(rows, DTYPES[dtype].itemsize, DTYPES[dtype].itemsize, capability) for rows in ROWS_PER_EXPERT
        }
        for tile in sorted(tiles):
            shape = {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "EP": 128, "TOGETHER": TOGETHER}
            how = {"num_warps": tile.warps, "num_stages": tile.stages}
            for kernel, columns in (("tile_in", tile.columns), ("tile_out", tile.columns_out)):
                shape["BN"] = columns
                print(json.dumps(compiled(kernel, dtype, capability, shape, how)), flush=True)
        for kernel in ("gemv_in", "gemv_out", "gemv_pair"):
            columns, depth = tile_of_token(8) if kernel == "gemv_out" else (COLUMNS, DEPTH)
            shape = {"BN": columns, "BK": depth, "KP": 8}
            print(json.dumps(compiled(kernel, dtype, capability, shape, FOUR)), flush=True)
        blocks = sorting(4096)
        for kernel, shape, how in (
            ("sort_pairs", {"BLOCK": blocks.pop("BLOCK")}, blocks), ("combine_normed", {"BN": 2048, "KP": 8}, FOUR),
            ("combine", {"BN": 512, "KP": 8}, FOUR),
        ):  # fmt: skip
            print(json.dumps(compiled(kernel, dtype, capability, shape, how)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] or list(DTYPES))
