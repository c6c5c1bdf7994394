"""A backend in eighty lines: each expert's two matmuls in NumPy."""

import contextlib

import numpy as np
import torch

from moeopt.backends.base import Backend, Made
from moeopt.capture.shared_copy import shared_copy
from moeopt.errors import Declined, UsageError
from moeopt.ops.activations import apply_gate
from moeopt.ops.override import override_experts_impl
from moeopt.pipeline.report_of import report_of
from moeopt.pipeline.run import run
from moeopt.verification.certificate import Certificate
from moeopt.verification.model import end_to_end


def numpy_experts(x_TH, ids_TK, weights_TK, bank, spec):
    """What ``moeopt::experts`` returns; None leaves the call to the op's own kernels."""
    if x_TH.dtype == torch.float64:  # the float64 oracle asks for the op's own definition
        return None
    if spec.weight_on != "output" or spec.out_norm_eps is not None or x_TH.dtype != torch.float32:
        raise Declined("the NumPy backend carries float32 experts that are weighed at their output and not normalised")
    width = bank.w_out(0).shape[0 if spec.w_out_layout == "oi" else 1]
    y_TH = np.zeros((len(x_TH), width), np.float32)
    for e in sorted({e for e in ids_TK.unique().tolist() if 0 <= e < bank.num_experts}):
        token_M, slot_M = torch.where(ids_TK == e)
        pairs = zip(bank.w_in(e), bank.b_in(e), strict=True)
        h = tuple(product(x_TH[token_M], w, b, spec.w_in_layout) for w, b in pairs)
        o_MH = product(apply_gate(h, spec), bank.w_out(e), bank.b_out(e), spec.w_out_layout)
        np.add.at(y_TH, token_M.numpy(), (o_MH * weights_TK[token_M, slot_M, None]).numpy())
    return torch.from_numpy(y_TH)


def product(x, w, b, layout):
    w = w.detach().numpy()
    with np.errstate(all="ignore"):  # verification sends rows of NaN and infinity too
        y = x.detach().numpy() @ (w.T if layout == "oi" else w)
    return torch.from_numpy(y if b is None else y + b.detach().numpy())


class NumpyRuntime:
    """What the pipeline asks of a runtime while it verifies a block."""

    @contextlib.contextmanager
    def run_through_backend(self, routers):
        with override_experts_impl(numpy_experts):
            yield

    def demote(self, reason):
        return False  # there is one form, and no other to try


class NumpyEngine:
    def __init__(self, model):
        self.model = model

    def __call__(self, *args, **kwargs):
        with torch.no_grad(), override_experts_impl(numpy_experts):
            return self.model(*args, **kwargs)


class NumpyBackend(Backend):
    name = "numpy"

    def _plan_impl(self, options):
        if options.device is not None and options.device.type != "cpu":
            raise UsageError(f"device={str(options.device)!r}: NumPy computes on the CPU; leave device out")
        return NumpyRuntime()

    def _optimize_impl(self, source, call, options, plan):
        twin = shared_copy(source)
        outcome = run(twin, call, options, plan)
        engine = NumpyEngine(twin)
        end = end_to_end(source, engine, *call, noise_blocks=list(outcome.rewrites)) if outcome.rewrites else None
        certificate = Certificate(outcome.checks, end, options.verify, device=f"numpy {np.__version__}")
        report = report_of(source, outcome.blocks, self.name, outcome, certificate, options)
        return Made(engine, report, certificate, built=engine)
