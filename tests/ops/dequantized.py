"""What codes and scales mean, weight by weight in numpy: shares nothing with the package but the format's fields."""

import numpy as np
import torch

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], dtype=np.float64)  # fmt: skip


def value(byte: int, column: int, format) -> float:
    if format.codes == "int8":
        return byte - 256 if byte > 127 else byte
    if format.codes == "uint8":
        return byte
    if format.codes == "e4m3":
        sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        return -size if sign else size
    low_first = format.packing == "low nibble first"
    nibble = byte & 15 if (column % 2 == 0) == low_first else byte >> 4
    if format.codes == "uint4":
        return nibble
    if format.codes == "nf4":
        return NF4[nibble]
    if format.codes == "fp4":
        size = float(np.float32([0, 1 / 16, 8, 12, 4, 6, 2, 3][nibble & 7]) / np.float32(12))
        return -size if nibble >> 3 else size
    return -E2M1[nibble & 7] if nibble >> 3 else E2M1[nibble]


def dequantized(weight) -> np.ndarray:
    """The exact (N, K) float64 weight of a ``QuantizedWeight``."""
    format, (N, K) = weight.format, weight.shape
    raw = weight.codes.contiguous().view(torch.uint8).numpy()
    if weight.scales.dtype == torch.bfloat16:
        upper = weight.scales.contiguous().view(torch.int16).numpy().astype(np.int32) << 16
        scales = upper.view(np.float32).astype(np.float64)
    elif format.scale == "e8m0":
        scales = 2.0 ** (weight.scales.numpy().astype(np.float64) - 127)
    else:
        scales = weight.scales.numpy().astype(np.float64)
    height, width = format.block[0] or N, format.block[1] or K
    symmetric = {"uint8": 128, "uint4": 8}.get(format.codes, 0)
    out = np.zeros((N, K))
    for n in range(N):
        for k in range(K):
            block = n // height, k // width
            zero = symmetric if weight.zeros is None else int(weight.zeros[block])
            code = value(int(raw[n, k // 2 if format.bits == 4 else k]), k, format)
            out[n, k] = (code - zero) * scales[block]
    return out
