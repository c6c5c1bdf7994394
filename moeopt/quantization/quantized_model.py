"""A model with quantised experts, seen from the original: its own code on the rounded floats, and what it holds."""

from __future__ import annotations

import glob
from collections.abc import Mapping

import torch
from torch import nn

from moeopt.capture.shared_copy import shared_copy
from moeopt.errors import NotEquivalentError, UsageError
from moeopt.listed import listed
from moeopt.onnx_in.coded import coded_weights
from moeopt.options import Options, QuantPlan
from moeopt.options.quant_plan import NEAREST
from moeopt.passes.quantize_experts import QuantizeExperts
from moeopt.pipeline.block_capture import original_forward
from moeopt.pipeline.block_reports import PipelineResult
from moeopt.quantization.quantized_products import QuantizedProducts
from moeopt.recognise.routing_types import RoutingForm
from moeopt.rewrite.install import RewrittenForward, rewritten_forward
from moeopt.rewrite.live_codes import DequantizedForward, LiveCodes
from moeopt.rewrite.spare_floats import SpareFloats
from moeopt.rewrite.store_codes import codes_of
from moeopt.verification.certificate import Certificate
from moeopt.verification.loss_text import few_rows_note, published_note, quantized_note


def quantized_blocks(twin: nn.Module) -> dict[str, tuple[RewrittenForward, list[LiveCodes]]]:
    """By module path, the rewritten blocks with quantised experts, and their codes."""
    found = {}
    for path, module in twin.named_modules():
        forward, codes = rewritten_forward(module), codes_of(module)
        if forward is not None and codes:
            found[path] = forward, codes
    return found


def quantized_original(source: nn.Module, twin: nn.Module, products: QuantizedProducts | None = None) -> nn.Module:
    """The quantised model in the original's own code: what the rewritten ``twin`` is compared with.

    ``source`` itself where nothing is quantised. One block at a time has its experts as floats; ``products`` have
    theirs for as long as the model that is returned lives.
    """
    blocks = quantized_blocks(twin)
    if not blocks and not (products and products.found):
        return source
    judge, spare = shared_copy(source), SpareFloats()
    if products is not None:
        products.put_floats(judge)
    for path, (_, codes) in blocks.items():
        module = judge.get_submodule(path)
        key = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
        module.__dict__[key] = DequantizedForward(module, original_forward(module), codes, spare)
    return judge


def formats_of(twin: nn.Module) -> dict[str, str]:
    """``certificate.quantized``: the format of each quantised block, by its name."""
    return {
        path or type(twin).__name__: str(codes[0].format.w_out.format)
        for path, (_, codes) in quantized_blocks(twin).items()
        if not all(one.exact for one in codes)
    }


def method_of(certificate: Certificate, options: Options) -> str:
    """``certificate.method``: how the floats of what was quantised became codes; "" where nothing was."""
    rounded = options.quantize is not None and (certificate.quantized or certificate.products)
    return str(options.quantize.method) if rounded else ""


def plan_of(certificate: Certificate) -> QuantPlan:
    """The plan that gives each block and product the format that a certificate says it has, by the same method."""

    def patterns(formats: Mapping[str, str]) -> dict[str, str]:
        return {glob.escape(name): format.partition(" ")[0] for name, format in formats.items()}

    return QuantPlan(
        patterns(certificate.quantized), products=patterns(certificate.products), method=certificate.method or NEAREST
    )


def routed_banks(outcome: PipelineResult, twin: nn.Module) -> dict[str, list[bool]]:
    """Of each bank of a quantised block, whether a router chooses its experts; groups of a dense FFN are all active."""
    told: dict[str, list[bool]] = {}
    for path, (forward, _) in quantized_blocks(twin).items():
        rewrite = outcome.rewrites.get(path)
        found = [] if rewrite is None else [f.routing.form is not RoutingForm.EVERY_GROUP for f in rewrite.found]
        told[path] = (found + [True] * len(forward.banks))[: len(forward.banks)]
    return told


def check_patterns(outcome: PipelineResult, options: Options) -> None:
    """``UsageError`` where a pattern of the plan names no block that was found."""
    names = [block.name for block in outcome.blocks]
    unused = [] if options.quantize is None else options.quantize.unmatched(names)
    if unused:
        raise UsageError(
            f"quantize names {unused[0]!r}, which matches no block; the blocks are {', '.join(names) or 'none'}"
        )


def check_codes(outcome: PipelineResult, twin: nn.Module, options: Options) -> None:
    """Whether an engine can hold the codes that were asked for.

    Raises:
        UsageError: a pattern of the plan names no block that was found.
        NotEquivalentError: the model is of float64, and would be compared.
    """
    check_patterns(outcome, options)
    for path in quantized_blocks(twin) if options.verify != "off" else ():
        if any(p.dtype == torch.float64 for p in twin.get_submodule(path).parameters()):
            raise NotEquivalentError(
                f"{path or type(twin).__name__} is of float64, and an engine's codes have scales and products of "
                "float32 at most, which is less than is computed with codes in float64; quantise model.float(), leave "
                "quantize out, or use backend='torch', which takes codes of a float64 model"
            )


def notes_of(
    outcome: PipelineResult, twin: nn.Module, options: Options, products: QuantizedProducts | None = None
) -> list[str]:
    """Sentences for the report: the memory, and each block that was to be quantised and was not.

    ``products``: those that were quantised; a block that holds some is told with them.
    """
    if options.quantize is None:
        return []
    done = quantized_blocks(twin)
    left = [
        f"{r.block}: {r.reason}" for r in outcome.passes if r.name == QuantizeExperts.name and not r.fired and r.reason
    ]
    declined = [
        b.name for b in outcome.blocks if b.status == "declined" and options.quantize.format_of(b.name) != "float"
    ]
    held = [] if products is None else [path for one in products.found for path in one.paths]
    declined = [name for name in declined if not any(f"{path}.".startswith(f"{name}.") for path in held)]
    if declined:
        left.append(f"{listed(declined)}: only experts that were rewritten into one op can be")
    lossy, sizes = formats_of(twin), dict[bool, list[tuple[int, int]]]()
    for path, (_, codes) in done.items():
        size = sum(c.nbytes for c in codes), sum(c.float_bytes for c in codes)
        sizes.setdefault((path or type(twin).__name__) in lossy, []).append(size)
    home = "file" if coded_weights(twin) else "checkpoint"
    kept = [published_note(sizes[False], home)] if False in sizes else []
    return kept + quantized_note(lossy, sizes.get(True, []), left) + _few_rows(twin)


def _few_rows(twin: nn.Module) -> list[str]:
    """A sentence on experts that were to be rounded by rows that did not reach them."""
    blocks = {path or type(twin).__name__: codes for path, (_, codes) in quantized_blocks(twin).items()}
    few = {name: count for name, codes in blocks.items() if (count := sum(one.few for one in codes))}
    return few_rows_note(few, sum(one.num_experts for codes in blocks.values() for one in codes))
