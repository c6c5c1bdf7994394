"""``verify`` of what ``optimize`` returned."""

from __future__ import annotations

import contextlib

from torch import nn

from moeopt.backends import registry
from moeopt.capture.isolated_run import run_quietly
from moeopt.errors import UsageError
from moeopt.find.example_inputs import as_call
from moeopt.optimized import Optimized
from moeopt.quantization.measure_loss import whole_loss
from moeopt.quantization.rounded_rows import reading_floats
from moeopt.value_types import PyObject
from moeopt.verification.certificate import Certificate
from moeopt.verification.loss import Loss
from moeopt.verification.model import end_to_end


def check_original(original: PyObject) -> None:
    """``UsageError`` where something else than a model was given to compare with; None is nothing given."""
    if original is not None and not isinstance(original, (nn.Module, Optimized)):
        raise UsageError(
            f"original= is a {type(original).__name__}: give the model itself, or the .onnx file that the engine was "
            "made of"
        )


def verify_optimized(subject: Optimized, original: PyObject, inputs: PyObject) -> Certificate:
    """``subject`` beside ``original`` on ``inputs``, or on those that it was optimised with."""
    if subject._why_not_verified:
        raise UsageError(subject._why_not_verified)
    if original is None:
        raise UsageError("verify(optimized) needs original=, the model to compare with")
    asked = subject._call if inputs is None else as_call(inputs)
    if isinstance(original, nn.Module):
        run_quietly(original, *asked)  # which says what is odd about the model or its inputs
    backend = registry.get(subject.report.backend)
    runner, executed = backend.runner(subject.model)
    args, kwargs = backend.comparable(runner, asked)
    noise = backend.noisy(original, [block.name for block in subject.report.rewritten])
    before = subject.certificate
    ties = None
    if not before.lossy:  # other floats choose other experts
        ties = backend.tie_comparison(original, runner, (args, kwargs), noise, subject._built)
    judge = backend.judge(original, subject._made, (args, kwargs))
    with _verified_form(runner) if before.activations else contextlib.nullcontext(runner) as form:
        end = end_to_end(judge, form, args, kwargs, noise_blocks=noise, otherwise=ties)
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


def _verified_form(runner: PyObject) -> contextlib.AbstractContextManager[PyObject]:
    """What was verified of a model or engine whose products round what they read."""
    return reading_floats(runner) if isinstance(runner, nn.Module) else contextlib.nullcontext(runner.verified_form())
