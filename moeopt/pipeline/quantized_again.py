"""A model quantised again as a certificate says that it was: what an engine, which has no modules, is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moeopt.capture.shared_copy import shared_copy
from moeopt.capture.tree import ArgsKwargs
from moeopt.options import Options
from moeopt.pipeline.calibration import calibration_rows
from moeopt.pipeline.quantized_model import plan_of, quantized_original
from moeopt.pipeline.quantized_products import quantize_products
from moeopt.pipeline.run import run
from moeopt.verification.certificate import Certificate


def quantized_again(
    original: nn.Module, call: ArgsKwargs, certificate: Certificate, calibration: Sequence[ArgsKwargs]
) -> nn.Module:
    """``original`` in its own code on rounded floats, itself where none are; ``calibration``: the calls that its codes
    were found with."""
    if not certificate.lossy:
        return original
    options = Options(verify="off", quantize=plan_of(certificate), calibration=list(calibration) or None)
    rows = calibration_rows(original, call, calibration, options)
    twin = shared_copy(original)
    products = quantize_products(original, twin, run(twin, call, options, rows=rows), call, options)
    return quantized_original(original, twin, products)
