"""``verify`` of what ``optimize`` returned."""

from __future__ import annotations

from moeopt.backends import registry
from moeopt.errors import UsageError
from moeopt.find.example_inputs import as_call
from moeopt.optimized import Optimized
from moeopt.pipeline.measure_loss import whole_loss
from moeopt.value_types import PyObject
from moeopt.verification.certificate import Certificate
from moeopt.verification.loss import Loss
from moeopt.verification.model import end_to_end


def verify_optimized(subject: Optimized, original: PyObject, inputs: PyObject) -> Certificate:
    """``subject`` beside ``original`` on ``inputs``, or on those that it was optimised with."""
    if subject._why_not_verified:
        raise UsageError(subject._why_not_verified)
    if original is None:
        raise UsageError("verify(optimized) needs original=, the model to compare with")
    backend = registry.get(subject.report.backend)
    runner, executed = backend.runner(subject.model)
    args, kwargs = backend.comparable(runner, subject._call if inputs is None else as_call(inputs))
    noise = backend.noisy(original, [block.name for block in subject.report.rewritten])
    before = subject.certificate
    ties = None
    if not before.lossy:  # other floats choose other experts
        ties = backend.tie_comparison(original, runner, (args, kwargs), noise, subject._built)
    judge = backend.judge(original, subject._made, (args, kwargs))
    end = end_to_end(
        judge,
        runner.verified_form() if before.activations else runner,
        args,
        kwargs,
        noise_blocks=noise,
        otherwise=ties,
    )
    loss = Loss() if not before.lossy else whole_loss(original, runner, (args, kwargs), before.loss.get("limit", {}))
    return Certificate(
        end_to_end=end,
        executed=executed,
        dtype=before.dtype,
        device=before.device,
        quantized=before.quantized,
        products=before.products,
        method=before.method,
        activations=before.activations,
        loss=loss,
    )
