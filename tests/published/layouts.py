"""Tiny matrices in the layouts of published checkpoints, packed number by number from their formats' descriptions.

Nothing here is shared with the package. Each packer gives the file's tensors and the exact float64 weight that they
stand for, (N out, K in).
"""

from __future__ import annotations

import json

import numpy as np
import torch

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def _rng(seed):
    return np.random.default_rng(seed)


FP4 = [v / 12 for v in (0, 1 / 16, 8, 12, 4, 6, 2, 3, 0, -1 / 16, -8, -12, -4, -6, -2, -3)]
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def fp8_value(byte):
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def _fp8_codes(rng, N, K):
    codes = rng.integers(0, 256, (N, K)).astype(np.uint8)
    codes[(codes & 127) == 127] = 0x38  # NaN is no weight
    return codes, np.array([fp8_value(byte) for byte in range(256)])[codes]


def fp8_block(name, N, K, seed=0, block=(128, 128)):
    """X.weight and X.weight_scale_inv, with whole scales for partial blocks at the edges."""
    rng = _rng(seed)
    codes, values = _fp8_codes(rng, N, K)
    scales = (rng.random((-(-N // block[0]), -(-K // block[1]))) / 1000 + 1e-4).astype(np.float32)
    exact = values * scales.astype(np.float64)[np.arange(N)[:, None] // block[0], np.arange(K)[None] // block[1]]
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    return {f"{name}.weight": weight, f"{name}.weight_scale_inv": torch.from_numpy(scales)}, exact


def fp8_rows(name, N, K, seed=0):
    """compressed-tensors float-quantized: one scale a row."""
    rng = _rng(seed)
    codes, values = _fp8_codes(rng, N, K)
    scales = (rng.random((N, 1)) / 100 + 1e-3).astype(np.float32)
    tensors = {f"{name}.weight": torch.from_numpy(codes).view(torch.float8_e4m3fn)}
    return {**tensors, f"{name}.weight_scale": torch.from_numpy(scales)}, values * scales.astype(np.float64)


def mxfp4(name, E, N, K, seed=0):
    """GPT-OSS: (E, N, K / 32, 16) bytes, the low nibble is the first of two, and (E, N, K / 32) exponents."""
    rng = _rng(seed)
    nibbles, exponents = rng.integers(0, 16, (E, N, K)), rng.integers(110, 130, (E, N, K // 32))
    blocks = np.zeros((E, N, K // 32, 16), dtype=np.uint8)
    exact = np.zeros((E, N, K))
    for e in range(E):
        for n in range(N):
            for k in range(K):
                group, inside = divmod(k, 32)
                blocks[e, n, group, inside // 2] |= nibbles[e, n, k] << (4 * (inside % 2))
                exact[e, n, k] = E2M1[nibbles[e, n, k]] * 2.0 ** (int(exponents[e, n, group]) - 127)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": exponents.astype(np.uint8)}
    return {k: torch.from_numpy(v) for k, v in tensors.items()}, exact


def _int32(words):
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def pack_quantized(name, N, K, bits, group, seed=0, zeros=False, dtype=torch.bfloat16, order=None):
    """compressed-tensors: signed numbers plus 2^(bits - 1), the first in the lowest bits of an int32, along K."""
    rng, offset, each = _rng(seed), 1 << (bits - 1), 32 // bits
    q = rng.integers(-offset, offset, (N, K))
    G = 1 if group is None else -(-K // group)
    scales = torch.from_numpy((rng.random((N, G)) / 100 + 1e-3).astype(np.float32)).to(dtype)
    z = rng.integers(-offset, offset, (N, G)) if zeros else np.zeros((N, G), dtype=np.int64)
    words = np.zeros((N, -(-K // each)), dtype=np.uint64)
    for k in range(K):
        words[:, k // each] |= (q[:, k] + offset).astype(np.uint64) << np.uint64(bits * (k % each))
    of_column = np.arange(K) // (group or K) if order is None else order
    exact = (q - z[:, of_column]) * scales.double().numpy()[:, of_column]
    tensors = {
        f"{name}.weight_packed": _int32(words), f"{name}.weight_scale": scales,
        f"{name}.weight_shape": torch.tensor([N, K]),
    }  # fmt: skip
    if order is not None:
        tensors[f"{name}.weight_g_idx"] = torch.from_numpy(order.astype(np.int32))
    if zeros:
        packed = np.zeros((-(-N // each), G), dtype=np.uint64)
        for n in range(N):
            packed[n // each] |= (z[n] + offset).astype(np.uint64) << np.uint64(bits * (n % each))
        tensors[f"{name}.weight_zero_point"] = _int32(packed)
    return tensors, exact


def gptq(name, N, K, bits, group, seed=0, symmetric=False, v2=False, order=None):
    """GPTQ: numbers packed along K, first in the lowest bits; zero points along N, less 1 but in gptq_v2."""
    rng, each = _rng(seed), 32 // bits
    q = rng.integers(0, 1 << bits, (K, N))
    G = 1 if group is None else -(-K // group)
    z = np.full((G, N), 1 << (bits - 1)) if symmetric else rng.integers(1, 1 << bits, (G, N))
    scales = torch.from_numpy((rng.random((G, N)) / 100 + 1e-3).astype(np.float16))
    of_column = np.arange(K) // (group or K) if order is None else order
    words, points = np.zeros((K // each, N), dtype=np.uint64), np.zeros((G, N // each), dtype=np.uint64)
    for k in range(K):
        words[k // each] |= q[k].astype(np.uint64) << np.uint64(bits * (k % each))
    for n in range(N):
        points[:, n // each] |= (z[:, n] - (0 if v2 else 1)).astype(np.uint64) << np.uint64(bits * (n % each))
    exact = ((q - z[of_column]) * scales.double().numpy()[of_column]).T
    tensors = {
        f"{name}.qweight": _int32(words), f"{name}.qzeros": _int32(points), f"{name}.scales": scales,
        f"{name}.g_idx": torch.from_numpy(of_column.astype(np.int32)),
    }  # fmt: skip
    return tensors, exact


def awq(name, N, K, group, seed=0):
    """AWQ: eight columns in an int32, columns 0 2 4 6 1 3 5 7 from the lowest bits up."""
    rng, order = _rng(seed), (0, 2, 4, 6, 1, 3, 5, 7)
    G = K // group
    q, z = rng.integers(0, 16, (K, N)), rng.integers(0, 16, (G, N))
    scales = torch.from_numpy((rng.random((G, N)) / 100 + 1e-3).astype(np.float16))

    def packed(numbers):
        words = np.zeros((numbers.shape[0], N // 8), dtype=np.uint64)
        for c in range(N // 8):
            for i in range(8):
                words[:, c] |= numbers[:, 8 * c + order[i]].astype(np.uint64) << np.uint64(4 * i)
        return _int32(words)

    of_row = np.arange(K) // group
    exact = ((q - z[of_row]) * scales.double().numpy()[of_row]).T
    return {f"{name}.qweight": packed(q), f"{name}.qzeros": packed(z), f"{name}.scales": scales}, exact


def nf4(name, N, K, block=64, nested=0, seed=0, kind="nf4"):
    """bitsandbytes' 4 bits; nested: how many scales share one, 0 where scales are floats."""
    table_of_codes = {"nf4": NF4, "fp4": FP4}[kind]
    rng = _rng(seed)
    codes = rng.integers(0, 16, (N, K))
    scales = rng.uniform(0.01, 0.05, N * K // block).astype(np.float32)
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [N, K]}
    tensors = {f"{name}.weight.absmax": torch.from_numpy(scales)}
    if nested:
        of_codes = rng.integers(0, 256, len(scales)).astype(np.uint8)
        table = np.linspace(-1, 1, 256).astype(np.float32)
        wide = rng.uniform(0.01, 0.02, -(-len(scales) // nested)).astype(np.float32)
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.0302734375}
        scales = table[of_codes] * np.repeat(wide, nested)[: len(scales)] + np.float32(0.0302734375)
        tensors = {
            f"{name}.weight.absmax": torch.from_numpy(of_codes),
            f"{name}.weight.nested_absmax": torch.from_numpy(wide),
            f"{name}.weight.nested_quant_map": torch.from_numpy(table),
        }
    flat = codes.reshape(-1, 2)
    tensors |= {
        f"{name}.weight": torch.from_numpy((flat[:, :1] << 4 | flat[:, 1:]).astype(np.uint8)),
        f"{name}.weight.quant_map": torch.tensor(table_of_codes),
        f"{name}.weight.quant_state.bitsandbytes__{kind}": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    exact = np.array(table_of_codes, np.float32).astype(np.float64)[codes]
    return tensors, exact * scales.astype(np.float64).repeat(block).reshape(N, K)
