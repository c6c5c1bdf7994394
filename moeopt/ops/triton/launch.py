"""One call of the Triton kernels: shapes, buffers, grids. No value on the device is read by the host.

Shape legend: T tokens, E experts, K chosen per token, R = T*K pairs, H hidden, I intermediate, D out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.reference import check, dtypes, out_features
from moeopt.ops.triton.addresses import Weights, weights_of
from moeopt.ops.triton.constants import Function, WeightTypes, function
from moeopt.ops.triton.tiles import TOGETHER, Tiles, few_pairs, tiles_for
from moeopt.ops.unfit import Unfit

COLUMNS, DEPTH = 16, 128
"""Columns and depth of the tile of a matrix-vector product: 16-byte loads, one row of 256 bytes of 16-bit weights."""

ENOUGH = 256
"""Programs that keep a GPU of today busy, two for each SM; a wider tile that leaves fewer of them gains nothing."""


def tile_of_token(K: int) -> tuple[int, int]:
    """Columns and depth of ``gemv_out``, which holds a tile of each of a token's K experts: 4096 numbers or less.

    Few columns make many programs, even of one token: what they ask for at once is what a GPU's memory can bring.
    """
    return 4, max(16, min(512, 1024 // _power(K)))


FUSED = {"enable_fp_fusion": True}
"""A product and its sum are rounded once. Triton's own default, which 3.10 changes and 3.9 warns of at each start."""


def launches(spec: ExpertsSpec) -> tuple[int, int]:
    """Kernels of one call with up to ``few_pairs`` pairs of token and expert, and with more."""
    return (2, 4) if spec.out_norm_eps is None else (3, 4)


def experts_triton(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    bank: ExpertWeights,
    spec: ExpertsSpec,
    *,
    few: int | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """``experts_reference`` in the launches that :func:`launches` counts; same arguments and result, no gradient.

    Args:
        few: pairs up to which nothing is sorted; None is what :func:`few_pairs` says.
        tiles: the tile of both products; None is the table's.

    Raises:
        Unfit: dtypes or weights that the kernels do not take, or Triton refused the kernels; no result was written.
    """
    check(x_TH, ids_TK, weights_TK, bank, spec)
    (T, K), device = ids_TK.shape, x_TH.device
    if ids_TK.device != device or weights_TK.device != device:
        raise Unfit(f"x is on {device}, ids on {ids_TK.device} and routing weights on {weights_TK.device}")
    compute, accum, out = dtypes(x_TH, spec)
    if not T * K:
        return x_TH.new_zeros(T, out_features(bank, spec), dtype=out)
    from moeopt.ops.triton import kernels

    weights = weights_of(bank, spec, x_TH.shape[1], device)
    call = spec, x_TH.dtype, weights_TK.dtype, weights.held, device
    if why := refused(*call):
        raise Unfit(why)
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    F = function(*call[:4], tf32, kernels.INTERPRETED)
    y_TD = x_TH.new_empty(T, weights.D, dtype=out)
    a_RI = x_TH.new_empty(T * K, weights.I, dtype=compute)
    pairs, normed = T * K, spec.out_norm_eps is not None
    with _current(device), _reasons(call):
        if pairs <= (few_pairs(bank.num_experts) if few is None else few):
            _few_pairs(x_TH, ids_TK, weights_TK, weights, F, normed, a_RI, y_TD)
        else:
            major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
            sizes = compute.itemsize, weights.held.dtype.itemsize
            tiles = tiles or tiles_for(pairs / bank.num_experts, *sizes, 10 * major + minor)
            _many_pairs(x_TH, ids_TK, weights_TK, weights, F, normed, tiles, a_RI, y_TD, accum)
    return y_TD


LaunchKey = tuple[ExpertsSpec, torch.dtype, torch.dtype, WeightTypes, torch.device]

_refused: dict[LaunchKey, str] = {}
"""Calls that Triton would not compile or start in this process, and why: to be refused again takes seconds."""


def refused(spec: ExpertsSpec, x: torch.dtype, weights: torch.dtype, held: WeightTypes, device: torch.device) -> str:
    """Why Triton did not take a call with these dtypes before; "" where it did, or was not asked."""
    return _refused.get((spec, x, weights, held, device), "") if _refused else ""


@contextlib.contextmanager
def _reasons(call: LaunchKey) -> Iterator[None]:
    """Makes an error of Triton's own ``Unfit``: whoever called has another way. A buffer may have been written to."""
    from triton.errors import TritonError

    try:
        yield
    except TritonError as err:
        said = (str(err).strip() or "no message").splitlines()[-1]
        _refused[call] = f"Triton does not compile or start the kernels here ({type(err).__name__}: {said:.200})"
        raise Unfit(_refused[call]) from err


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes ``device`` the current one: Triton launches on the current device and its stream, wherever x is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _few_pairs(x: Tensor, ids: Tensor, w: Tensor, weights: Weights, F: Function, normed: bool,
               a: Tensor, y: Tensor) -> None:  # fmt: skip
    from moeopt.ops.triton import kernels

    (T, K), E, (I, D), R = ids.shape, weights.table.shape[1], (weights.I, weights.D), ids.numel()
    id_args, w_args = (ids, *ids.stride()), (w, *w.stride())
    kernels.gemv_in[(R, _up(I, COLUMNS))](
        x, *x.stride(), *id_args, *w_args, weights.table, *weights.in_steps, weights.bias_steps[0],
        a, E, K, x.shape[1], I, F=F, BN=COLUMNS, BK=DEPTH, **FUSED,
    )  # fmt: skip
    if not normed:
        columns, depth = tile_of_token(K)
        kernels.gemv_out[(T, _up(D, columns))](
            a, x, *x.stride(), *id_args, *w_args, weights.table, *weights.out_steps, weights.bias_steps[1],
            y, E, K, I, D, F=F, BN=columns, BK=depth, KP=_power(K), **FUSED,
        )  # fmt: skip
        return
    o = x.new_empty(R, D, dtype=a.dtype)
    kernels.gemv_pair[(R, _up(D, COLUMNS))](
        a, *id_args, weights.table, *weights.out_steps, weights.bias_steps[1], o, E, K, I, D,
        F=F, BN=COLUMNS, BK=DEPTH, **FUSED,
    )  # fmt: skip
    _combine_normed(x, ids, w, weights, F, o, y)


def _many_pairs(x: Tensor, ids: Tensor, w: Tensor, weights: Weights, F: Function, normed: bool,
                tiles: Tiles, a: Tensor, y: Tensor, accum: torch.dtype) -> None:  # fmt: skip
    from moeopt.ops.triton import kernels

    K, E, (I, D), R = ids.shape[1], weights.table.shape[1], (weights.I, weights.D), ids.numel()
    order, ends = ids.new_empty(R, dtype=torch.int32), ids.new_empty(E, dtype=torch.int32)
    kernels.sort_pairs[(E,)](ids, *ids.stride(), order, ends, R, K, E, **sorting(R), **FUSED)
    # each expert has at most one tile that is not full; a tile past the last one ends at once
    most = min(_up(R, tiles.rows) + E, R)
    shape = {"F": F, "BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth, "EP": _power(E), "TOGETHER": TOGETHER}
    how = {"num_warps": tiles.warps, "num_stages": tiles.stages, **FUSED}
    kernels.tile_in[(most * _up(I, tiles.columns),)](
        x, *x.stride(), w, *w.stride(), order, ends, weights.table, *weights.in_steps, weights.bias_steps[0],
        a, E, K, x.shape[1], I, most, **shape, **how,
    )  # fmt: skip
    term = x.new_empty(R, D, dtype=a.dtype if normed else accum)
    columns = tiles.columns_out if most * _up(D, tiles.columns_out) >= ENOUGH else tiles.columns
    kernels.tile_out[(most * _up(D, columns),)](
        a, order, ends, weights.table, *weights.out_steps, weights.bias_steps[1], w, *w.stride(),
        term, E, K, I, D, most, **shape | {"BN": columns}, **how,
    )  # fmt: skip
    if normed:
        _combine_normed(x, ids, w, weights, F, term, y)
    else:
        _combine(x, ids, w, E, F, term, y)


def sorting(R: int) -> dict[str, int]:
    """How ``sort_pairs`` reads R ids: a program waits for memory once a block."""
    block = min(4096, max(16, _power(R)))
    return {"BLOCK": block, "num_warps": 8 if block > 1024 else 4}


def _combine_normed(x: Tensor, ids: Tensor, w: Tensor, weights: Weights, F: Function, o: Tensor, y: Tensor) -> None:
    from moeopt.ops.triton import kernels

    (T, K), (E, D) = ids.shape, (weights.table.shape[1], y.shape[1])
    block = max(16, _power(D))
    kernels.combine_normed[(T,)](
        o, x, *x.stride(), ids, *ids.stride(), w, *w.stride(), weights.table, weights.bias_steps[2], y, E, K, D,
        F=F, BN=block, KP=_power(K), num_warps=max(4, min(16, block // 512)), **FUSED,
    )  # fmt: skip


def _combine(x: Tensor, ids: Tensor, w: Tensor, E: int, F: Function, term: Tensor, y: Tensor) -> None:
    from moeopt.ops.triton import kernels

    (T, K), D = ids.shape, y.shape[1]
    block = min(512, max(16, _power(D)))
    kernels.combine[(T, _up(D, block))](
        term, x, *x.stride(), ids, *ids.stride(), w, *w.stride(), y, E, K, D, F=F, BN=block, KP=_power(K), **FUSED
    )


def _up(n: int, by: int) -> int:
    return -(-n // by)


def _power(n: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << (n - 1).bit_length()
