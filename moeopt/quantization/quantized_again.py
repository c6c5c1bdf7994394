"""A model quantised again as a certificate says that it was: what an engine, which has no modules, is compared with."""

from __future__ import annotations

import dataclasses

from torch import nn

from moeopt.capture.shared_copy import shared_copy
from moeopt.capture.tree import ArgsKwargs
from moeopt.options import Options
from moeopt.pipeline.run import run
from moeopt.quantization.calibration import calibrate
from moeopt.quantization.quantized_model import plan_of, quantized_original
from moeopt.quantization.quantized_products import quantize_products
from moeopt.verification.certificate import Certificate


def quantized_again(original: nn.Module, call: ArgsKwargs, certificate: Certificate, options: Options) -> nn.Module:
    """``original`` in its own code on rounded floats, itself where none are.

    ``options``: those that the engine was made with: what is an expert, like a group of a dense FFN, is theirs to say.
    """
    if not certificate.lossy:
        return original
    options = dataclasses.replace(
        options, verify="off", quantize=plan_of(certificate), limit=None, data=None, device=None, dtype=None, dump=None,
        inplace=False, print_passes=False, fuel=None, progress=None,
    )  # fmt: skip
    calls, rows = calibrate(original, call, options)
    twin = shared_copy(original)
    products = quantize_products(original, twin, run(twin, call, options, rows=rows), call, options, calls)
    return quantized_original(original, twin, products)
