"""What Triton's launcher and compiler make of whole calls, for a GPU that is not here: one JSON line a call.

    python -m tests.ops.triton.launched 120 fixed
    python -m tests.ops.triton.launched 120 fixed 3
    python -m tests.ops.triton.launched 90 random 40
    python -m tests.ops.triton.launched 90 twice 0 8

A process of its own: Triton must not be in its interpreter here. A driver stands in for NVIDIA's: kernels are bound to
their arguments, specialised and compiled to machine code as on a GPU, and those that would not fit are refused; none is
loaded or started. ``fixed 3`` takes every third activation: each is a compilation of its own, and differs in one line.
The last number of ``twice`` is the shared memory of the GPU in KiB, instead of what it has.
"""

import itertools
import json
import sys

import torch
from hypothesis import HealthCheck, given, settings
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from moeopt.ir.specs import ACTIVATIONS, ExpertsSpec
from moeopt.ops import StackedExpertWeights
from moeopt.ops.triton.launch import experts_triton, launches
from moeopt.ops.triton.tiles import tiles_for
from moeopt.ops.unfit import Unfit
from tests.ops.cases import Case, cases, make
from tests.ops.triton.test_compiled import SHARED_MEMORY

FEW, MANY = 1 << 30, 0


class Driver:
    """Stands in for ``triton.backends.nvidia.driver``."""

    def __init__(self, capability, shared):
        self.capability, self.shared, self.started, self.utils = capability, shared, [], self

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_device_properties(self, device):
        return {"max_shared_mem": self.shared * 1024}

    def load_binary(self, name, kernel, shared, device):
        return object(), object(), 32, 0, 1024

    def unload_module(self, module):
        pass

    def launcher_cls(self, src, metadata):
        return lambda *args: self.started.append(metadata.name)


def fixed(each):
    """Calls that take every branch of the kernels, and those that need the most shared memory."""
    for name in ACTIVATIONS[::each]:
        alpha = {"swish": 1.702, "softcap": 2.0, "leaky_relu": 0.1, "elu": 1.5}.get(name)
        yield make(ExpertsSpec(rows="plain", activation=name, alpha=alpha), dtype=torch.bfloat16, biases=False), (FEW,)
    every = {"gate_min": -1.0, "gate_max": 1.0, "up_min": -1.0, "up_max": 1.0, "act_min": -1.0, "act_max": 1.0}
    gpt_oss = ExpertsSpec(
        rows="interleaved", w_in_layout="io", w_out_layout="io", activation="swish", alpha=1.702, up_offset=1.0,
        combine="expert", out_of_range="identity", accum_dtype="float32", **every,
    )  # fmt: skip
    yield make(gpt_oss, dtype=torch.bfloat16, seed=1), (FEW, MANY)
    on_input = ExpertsSpec(rows="separate", weight_on="input", act_dtype="float32", out_norm_eps=1e-6)
    yield make(on_input, dtype=torch.float16, stacked=False, K=1, E=1, T=1), (FEW, MANY)
    yield make(on_input, dtype=torch.float16, seed=3, biases=False), (MANY,)
    for held, compute in itertools.product((torch.float32, torch.bfloat16), ("float32", "bfloat16")):
        yield wide(held, compute), (MANY,)


def wide(held, compute):
    """Experts of 64 x 64, so that no dimension is cut off, in ``held``; products in ``compute``."""

    def weight():
        return torch.zeros(2, 64, 64, dtype=held)

    bank = StackedExpertWeights([weight(), weight()], weight())
    ids = torch.zeros(3, 1, dtype=torch.int64)
    spec = ExpertsSpec(rows="separate", compute_dtype=compute)
    return Case(torch.zeros(3, 64), ids, torch.zeros(3, 1), bank, spec)


def call(device, case, few, rows_per_expert):
    compute = getattr(torch, case.spec.compute_dtype) if case.spec.compute_dtype else case.x.dtype
    sizes = compute.itemsize, case.bank.w_out(0).dtype.itemsize
    device.started.clear()
    said = ""
    try:
        experts_triton(*case.args, few=few, tiles=tiles_for(rows_per_expert, *sizes, device.capability))
    except Unfit as err:
        said = str(err)
    wanted = launches(case.spec)[few == MANY] if case.ids.numel() else 0
    print(json.dumps({"case": repr(case.spec), "started": device.started, "wanted": wanted, "refused": said}))


def main(capability, which, count=0, shared=None):
    device = Driver(capability, shared or SHARED_MEMORY[capability])
    driver.set_active(device)
    if which == "fixed":
        for case, ways in fixed(count or 1):
            # one height of tile where the dtypes are all that counts, each of them where the memory does
            for few, rows in itertools.product(ways, (4, 64, 512) if case.x.shape[1] == 64 else (64,)):
                call(device, case, few, rows)
        return

    if which == "twice":
        case = make(ExpertsSpec(rows="separate", activation="swish", alpha=1.0), dtype=torch.float16, biases=False)
        for few in (FEW, MANY, MANY):
            call(device, case, few, 512)
        return

    @settings(max_examples=count, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(cases(dtypes=True))
    def random(case):
        for few in (FEW, MANY):
            call(device, case, few, 64)

    random()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
