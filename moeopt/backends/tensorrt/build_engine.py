"""From an optimised model to a directory with ``model.onnx`` and ``engine.plan``: trace, convert, lower, build.

model.onnx      what TensorRT parses, in the model's own dtypes
fallback.onnx   the same graph for ONNX Runtime's CPU, where that cannot run model.onnx: 16-bit floats widened
engine.plan     what TensorRT made of model.onnx for the target
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from moeopt.backends.onnxrt import build as onnx_build
from moeopt.backends.onnxrt.session import GRAPH
from moeopt.backends.tensorrt import build as builder
from moeopt.backends.tensorrt.causal_profiles import causal_sizes
from moeopt.backends.tensorrt.engine import PLAN, OfflineTensorRTEngine, TensorRTEngine, open_built, provider_of
from moeopt.backends.tensorrt.engine_plan import CPUFallbackPlan
from moeopt.backends.tensorrt.graph_check import check_graph
from moeopt.backends.tensorrt.layers import counted, format_counts, in_block
from moeopt.backends.tensorrt.plan import TensorRTPlan
from moeopt.backends.tensorrt.product import product
from moeopt.backends.tensorrt.profiles import Profile, default_sizes, profiles_for
from moeopt.backends.tensorrt.runtime import Needs
from moeopt.backends.tensorrt.sums import matmuls_as_sums, sums_for
from moeopt.backends.tensorrt.target import Target
from moeopt.bundle.io_names import KEY
from moeopt.causal_lm.flat_signature import add_conditions, flat_signature
from moeopt.causal_lm.lm import export_causal_lm, is_causal_lm, without_wrapper
from moeopt.errors import Declined, EngineBuildError, NotSaveableError, UsageError
from moeopt.lower.onnx.assemble import one_op
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.export import emitting, export_with_sites, to_onnx
from moeopt.lower.onnx.plan import kind
from moeopt.lower.onnx.upcast import upcast_graph, upcast_node
from moeopt.lower.signature import describe_call
from moeopt.lower.size_one import avoid_size_one, export_widened
from moeopt.lower.specialization_guards import counted_sizes
from moeopt.lower.unexpected_errors import unexpected_errors_as
from moeopt.options import Options
from moeopt.patches import quiet
from moeopt.sizes import in_words
from moeopt.value_types import PyObject
from moeopt.verification.language import find_ids


@dataclass
class BuiltEngine:
    """A written engine.

    Attributes:
        graph: its ONNX form: folder, signature, lowerings, and the CPU fallback graph where there is one.
        plan: what the builder says of ``engine.plan``.
        needs: what it runs on.
    """

    graph: onnx_build.BuiltGraph
    plan: builder.BuiltPlan
    target: Target
    needs: Needs

    @property
    def directory(self) -> Path:
        return self.graph.directory

    def opened(self) -> TensorRTEngine | OfflineTensorRTEngine:
        """As an engine."""
        return open_built(self.directory, self.graph.signature, self.needs, self.plan.profiles, self.graph.folder)

    def lowering_of(self, block: str) -> str:
        """What runs a block, in a line for reports; "" where the engine does not hold it."""
        reasons = {why for name, why in self.graph.reasons.items() if name.split("#")[0] == block}
        layers = in_block(self.plan.layers, block)
        count = f"; {len(layers)} layers" if layers else ""
        return f"{provider_of(self.needs)} {'; '.join(sorted(reasons))}{count}" if reasons else ""

    def summary(self) -> str:
        """The engine in a sentence."""
        plan = self.plan
        activations = "an unknown amount" if plan.activation_bytes is None else in_words(plan.activation_bytes)
        made_by = f"{self.needs.product} {self.needs.version}"
        return (
            f"{PLAN} for {self.target} by {made_by}: {in_words(plan.bytes)}, {len(plan.layers)} layers "
            f"({format_counts(counted(plan.layers))}), {activations} of activations at most"
        )


def build_trt(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: TensorRTPlan, options: Options
) -> BuiltEngine:
    """Export ``model``, whose blocks were rewritten, and build its engine for ``plan.target``.

    Raises:
        NotSaveableError: torch.export or ONNX cannot hold the model.
        EngineBuildError: TensorRT does not build it; the message names the block where it is known.
    """
    with unexpected_errors_as(f"building {type(model).__name__} for TensorRT", onnx_build.INSTEAD, NotSaveableError):
        return _build(model, args, kwargs, plan, options)


def _build(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: TensorRTPlan, options: Options
) -> BuiltEngine:
    started = time.perf_counter()
    graph, sites, signature = _exported(model, args, kwargs, plan, options)
    portable, differs, sums = graph.clone(), upcast_graph(graph.clone()), 0

    def adapt(model: PyObject) -> None:
        nonlocal sums
        sums = matmuls_as_sums(model) if sums_for(plan.target) else 0

    try:
        built = onnx_build.write_graph(graph, sites, signature, plan, options.say, started, adapt=adapt)
    except Declined as err:
        raise UsageError(err.reason) from None
    differs |= sums > 0 or any(
        upcast_node(s) is not s or plan.cpu_lowering(s).name != plan.lowering(s).name for s in sites
    )
    if differs:
        options.say("writing its CPU fallback graph")
        form = CPUFallbackPlan(plan)
        built.cpu_fallback = onnx_build.write_graph(
            portable, sites, built.signature, form, options.say, started, built.folder
        )
    if problems := check_graph(graph, plan.target):
        raise NotSaveableError(
            f"the graph is not one that TensorRT builds for {plan.target}: {problems[0]}; use backend='torch' or "
            "'onnxruntime', or write that part of the model with other ops"
        )
    job = builder.Job(
        built.directory / GRAPH,
        built.directory / PLAN,
        plan.target,
        _profiles(graph, built.signature, args, kwargs, options),
        sorted({site.name for site in sites}, key=len, reverse=True),
        tf32=options.tf32,
        timing_cache=None if options.timing_cache is None else Path(options.timing_cache),
        seconds=options.build_seconds,
        bytes=None if options.build_gigabytes is None else int(options.build_gigabytes * 1e9),
    )
    try:
        done = builder.build_plan(job, options.say)
    except EngineBuildError as err:
        raise err if err.block or len(sites) < 2 else bisect_failing_block(err, sites, plan, job) from None
    built.facts |= {"layers": float(len(done.layers)), "build_seconds": done.seconds}
    made_by = product(plan.target.product)
    needs = Needs(made_by.name, done.version, plan.target.sm, made_by.cuda)
    return BuiltEngine(built, done, plan.target, needs)


def _exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: TensorRTPlan, options: Options
) -> tuple[Any, list[ExpertsNode], dict[str, Any]]:
    """The whole model as an ``onnx_ir.Model``, with a key/value cache where it has one; its sites and signature."""
    if is_causal_lm(without_wrapper(model)):
        model = without_wrapper(model)
        try:
            found = export_causal_lm(model, args, kwargs, options.say, "tensorrt", without_states="a TensorRT engine")
            add_conditions(found.program, found.signature)
        except Declined as err:
            plan.remarks.append(onnx_build.without_cache(model, kwargs, err.reason))
        else:
            return found.model, found.sites, flat_signature(found.model.graph, found.signature)
    options.say("tracing the whole model")
    wider = avoid_size_one(model, args, kwargs)
    with emitting(model) as sites, quiet():
        export = functools.partial(export_with_sites, model, sites=sites)
        program = export_widened((args, kwargs), wider, export)
    plan.remarks += counted_sizes(program)
    options.say("converting it to ONNX")
    return to_onnx(program), sites, describe_call(program)


def _profiles(
    model: PyObject, signature: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> list[Profile]:
    """The user's profiles, completed from the example call; for a causal language model a prompt's and a decode's."""
    ends = {value.name: [getattr(dim, "value", dim) for dim in value.shape] for value in model.graph.inputs}
    if KEY in signature:
        ids = find_ids(args, kwargs)
        assert ids is not None, "a causal language model was called with token ids"
        every = causal_sizes(ends, signature[KEY], (ids.shape[0], ids.shape[1]), options.tokens)
        if options.profile is None:
            return [profiles_for(ends, sizes)[0] for sizes in every]
        return profiles_for(ends, every[0], options.profile)
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    pairs = zip(signature["inputs"], leaves, strict=True)
    example = {e["onnx"]: tuple(leaf.shape) for e, leaf in pairs if "onnx" in e and isinstance(leaf, torch.Tensor)}
    sizes = default_sizes(ends, example, signature["sizes"], options.tokens)
    return profiles_for(ends, sizes, options.profile)


def bisect_failing_block(
    err: EngineBuildError, sites: list[ExpertsNode], plan: TensorRTPlan, job: builder.Job
) -> EngineBuildError:
    """The same error with the first block that does not build alone either; as it is where all of them do."""
    import onnx_ir as ir

    tried = set()
    for site in sites:
        known = kind(site)
        if known in tried:
            continue
        tried.add(known)
        with tempfile.TemporaryDirectory(prefix="moeopt-") as name:
            path = Path(name) / GRAPH
            alone = one_op(site, plan.lowering(site))
            ir.save(alone, path, external_data=f"{GRAPH}.data")
            ends = {value.name: [getattr(dim, "value", dim) for dim in value.shape] for value in alone.graph.inputs}
            max_tokens = max(plan.tokens or (256,))
            profile = profiles_for(ends, {"T": (1, max_tokens, max_tokens)})
            part = dataclasses.replace(job, model=path, plan=Path(name) / PLAN, profiles=profile, blocks=(site.name,))
            try:
                builder.build_plan(part)
            except EngineBuildError as again:
                return EngineBuildError(f"block {site.name}: {err}; it fails alone too: {again}", site.name, err.log)
    return err
