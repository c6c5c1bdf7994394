"""Whether the Triton kernels can be used on a device: triton is there, the device fits, small blocks come out right."""

from __future__ import annotations

import functools
import importlib.util
import itertools

import torch

from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ListExpertWeights
from moeopt.ops.reference import experts_reference
from moeopt.ops.unfit import Unfit

OLDEST = (8, 0)
"""bfloat16 and asynchronous copies; what no GPU of ours was tried on is left to torch."""


@functools.cache
def why_not(device: torch.device) -> str:
    """Why the kernels can't be used on ``device``; "" where they can. Compiles and runs them once a process."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (torch brings it along on Linux): pip install triton"
    if torch.version.hip is not None:
        return "the Triton kernels were made for NVIDIA GPUs, and this torch is built for AMD's"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"the Triton kernels need compute capability 8.0; {device} has {capability[0]}.{capability[1]}"
    try:
        return self_check(device)
    except Unfit as err:
        return str(err)
    except Exception as err:  # noqa: BLE001  a compiler or driver that fails is a reason, whatever it raises
        return f"the Triton kernels do not run here ({type(err).__name__}: {str(err).splitlines()[0]:.200})"


def self_check(device: torch.device) -> str:
    """Two small blocks in three dtypes, both ways, against the reference; what differs, or ""."""
    from moeopt.ops.triton.launch import experts_triton

    for dtype, spec in itertools.product((torch.float32, torch.float16, torch.bfloat16), _SPECS):
        bank = _bank(spec, dtype, device)
        x = torch.linspace(-2, 2, 9 * 24, device=device, dtype=torch.float32).reshape(9, 24).sin().to(dtype)
        ids = torch.tensor([[0, 2], [2, 1], [1, 0], [2, 0], [-1, 1], [0, 7], [1, 1], [2, 2], [0, 1]], device=device)
        weights = torch.linspace(0.1, 0.9, 18, device=device).reshape(9, 2).to(dtype)
        with torch.no_grad():
            want = experts_reference(x.double(), ids, weights.double(), _bank(spec, torch.float64, device, dtype), spec)
            for few in (0, 1 << 20):
                got = experts_triton(x, ids, weights, bank, spec, few=few)
                # products of 24 and 40 roundings at most, TF32 where torch's setting allows it in float32
                eps = 2**-10 if dtype == torch.float32 else torch.finfo(dtype).eps
                if not (got.double() - want).norm() <= 8 * eps * want.norm():
                    return f"the Triton kernels give wrong numbers here in {str(dtype).removeprefix('torch.')}"
    return ""


_SPECS = (
    ExpertsSpec(rows="separate", out_of_range="nothing"),
    ExpertsSpec(rows="interleaved", w_in_layout="io", activation="gelu", combine="expert", out_of_range="identity"),
)


def _bank(
    spec: ExpertsSpec, dtype: torch.dtype, device: torch.device, rounded_to: torch.dtype | None = None
) -> ListExpertWeights:
    """Three experts of 24 and 40 features, the same numbers in each dtype up to its rounding."""

    def matrix(out: int, into: int, layout: str, phase: float) -> list[torch.Tensor]:
        shape = (out, into) if layout == "oi" else (into, out)
        steps = torch.arange(out * into, device=device, dtype=torch.float32).reshape(shape)
        found = [torch.sin(steps * (0.7 + e) + phase) / 4 for e in range(3)]
        return [t.to(rounded_to or dtype).to(dtype) for t in found]

    if spec.rows == "separate":
        w_in = [matrix(40, 24, spec.w_in_layout, 0.1), matrix(40, 24, spec.w_in_layout, 0.2)]
    else:
        w_in = [matrix(80, 24, spec.w_in_layout, 0.1)]
    return ListExpertWeights(w_in, matrix(24, 40, spec.w_out_layout, 0.3))
