"""From an optimised model to a directory with ``model.onnx``: trace, convert, lower, write."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeopt.backends.onnxrt.accuracy import coarse
from moeopt.backends.onnxrt.accuracy_known import kernel_notes
from moeopt.backends.onnxrt.fallback_graph import FALLBACK
from moeopt.backends.onnxrt.id_guards import name_id_guards
from moeopt.backends.onnxrt.label_nodes import deduplicate, describe_sites, label_nodes
from moeopt.backends.onnxrt.missing_kernels import lines_of_float64
from moeopt.backends.onnxrt.native_graph import write_native
from moeopt.backends.onnxrt.plan import OrtPlan
from moeopt.backends.onnxrt.portable import check_portable
from moeopt.backends.onnxrt.product_nodes import lower_products, take_products
from moeopt.backends.onnxrt.providers import available, provider_named, runtime
from moeopt.backends.onnxrt.replay import ReplayPlan, check_emitted
from moeopt.backends.onnxrt.session import GRAPH, data_of
from moeopt.backends.onnxrt.size_guards import guard_sizes
from moeopt.bundle.io_names import name_ends
from moeopt.bundle.temp_folder import TemporaryFolder
from moeopt.causal_lm.attention import cache_left_in_place
from moeopt.causal_lm.flat_signature import add_conditions, flat_signature
from moeopt.causal_lm.lm import export_causal_lm, is_causal_lm, without_wrapper
from moeopt.errors import Declined, NotSaveableError, UsageError
from moeopt.lower.distances import DirectDistances
from moeopt.lower.onnx.accurate import accurate_graph
from moeopt.lower.onnx.assemble import replace_sites
from moeopt.lower.onnx.experts_node import DOMAIN, OP, ExpertsNode
from moeopt.lower.onnx.export import emitting, export_with_sites, own_outputs, to_onnx
from moeopt.lower.onnx.lowerings.base import Lowering
from moeopt.lower.onnx.names import name_by_module
from moeopt.lower.onnx.narrow_numbers import cast_narrow
from moeopt.lower.onnx.plan import BlockPlan
from moeopt.lower.onnx.simplify import simplify
from moeopt.lower.onnx.upcast import upcast_and_tell
from moeopt.lower.signature import describe_call
from moeopt.lower.size_one import avoid_size_one, export_widened
from moeopt.lower.specialization_guards import counted_sizes
from moeopt.lower.unexpected_errors import unexpected_errors_as
from moeopt.options import Options
from moeopt.patches import quiet
from moeopt.value_types import PyObject

INSTEAD = "write that line of the model with other ops, use backend='torch', or report this with the model's code"


@dataclass
class BuiltGraph:
    """A written graph: its folder, how it is called, and what was chosen for each site.

    ``sites`` are records of :mod:`moeopt.backends.onnxrt.site_records`, ``probes`` one of
    :mod:`moeopt.backends.onnxrt.known_answer` for each kind of site. ``cpu_fallback`` is the same graph lowered
    for CPU where the graph itself cannot run here. ``native`` is what a manifest says of the graph with moeopt's own
    operator, {} where there is none. ``float64``: by op, the model's line of a node that reads float64.
    ``products``: the lowering of quantised experts that each quantised product outside of them is like, by its name.
    ``variables``: those of the process that changed its numbers as it was verified (``process_variables``).
    ``options``: those that it was built with, to quantise the original in the same way again.
    """

    folder: TemporaryFolder
    signature: dict[str, Any]
    lowerings: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    sites: list[dict[str, Any]] = field(default_factory=list)
    probes: list[tuple[dict[str, torch.Tensor], float]] = field(default_factory=list)
    cpu_fallback: BuiltGraph | None = None
    native: dict[str, Any] = field(default_factory=dict)
    float64: dict[str, str] = field(default_factory=dict)
    products: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    options: Options = field(default_factory=Options)

    @property
    def directory(self) -> Path:
        return Path(self.folder.name)


def onnx_plan(options: Options) -> OrtPlan:
    """The plan that ``options.target``, else ``options.device``, asks for.

    Raises:
        UsageError: a device that is not here; ``tune`` for a target that is not here.
    """
    runtime()
    device = None if options.device is None else options.device.type
    provider = provider_named(options.target or device)
    there = ", ".join(available())
    rounds = options.quantize is not None and options.quantize.activations == "int8"
    if rounds and (provider != "cpu" or options.portable):
        raise UsageError(
            "QuantPlan(activations='int8') is for ONNX Runtime's own products of codes on a CPU: leave it out, or "
            "leave " + ("portable=True" if provider == "cpu" else f"the provider {provider}") + " out"
        )
    if device is not None and provider_named(device) not in available():
        raise UsageError(
            f"provider {provider_named(device)!r} is not on this machine; it has: {there}. "
            f"target={provider!r} instead of device builds the engine here, to be run where the provider is"
        )
    if provider in available():
        return OrtPlan(provider, options.tokens, options.tune, options.portable, options.mapped, rounds)
    if options.tune:
        raise UsageError(
            f"tune=True measures on this machine, which has: {there}; build for target={provider!r} without it"
        )
    return ReplayPlan(OrtPlan(provider, options.tokens, portable=options.portable))


def build_onnx(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: OrtPlan, say: Callable[[str], None]
) -> BuiltGraph:
    """Export ``model``, whose blocks were rewritten, for ``plan.provider``.

    Raises:
        NotSaveableError: torch.export or ONNX cannot hold the model; the message names what is in the way.
    """
    with unexpected_errors_as(f"writing {type(model).__name__} as an ONNX graph", INSTEAD, NotSaveableError):
        return _build(model, args, kwargs, plan, say)


def _build(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: OrtPlan, say: Callable[[str], None]
) -> BuiltGraph:
    started = time.perf_counter()
    if is_causal_lm(without_wrapper(model)):
        model = without_wrapper(model)
        try:
            found = export_causal_lm(model, args, kwargs, say, plan.provider, fuse=not plan.portable)
            add_conditions(found.program, found.signature)
            target = None
            if isinstance(plan, ReplayPlan):  # fused for its own provider
                target = export_causal_lm(model, args, kwargs, say, plan.target.provider, fuse=not plan.portable)
                add_conditions(target.program, target.signature)
        except Declined as err:
            plan.remarks.append(without_cache(model, kwargs, err.reason))
        else:
            if target is None or not isinstance(plan, ReplayPlan):
                signature = flat_signature(found.model.graph, found.signature)
                return _with_native(
                    write_graph(found.model, found.sites, signature, plan, say, started), found.sites, plan
                )
            signature = flat_signature(target.model.graph, target.signature)
            built = write_graph(target.model, target.sites, signature, plan.target, say, started)
            return _with_cpu_fallback(built, target.model, found.model, found.sites, plan, say)
    graph, sites, signature = trace(model, args, kwargs, plan, say)
    if not isinstance(plan, ReplayPlan):
        return _with_native(write_graph(graph, sites, signature, plan, say, started), sites, plan)
    portable = graph.clone()
    built = write_graph(graph, sites, signature, plan.target, say, started)
    return _with_cpu_fallback(built, graph, portable, sites, plan, say)


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: OrtPlan, say: Callable[[str], None]
) -> tuple[Any, list[Any], dict[str, Any]]:
    """A model, or one rewritten block, as ``(onnx_ir.Model, sites, signature)``, its experts not lowered yet."""
    say("tracing the whole model")
    wider = avoid_size_one(model, args, kwargs)
    with emitting(model) as sites, quiet(), _attention(plan), DirectDistances():
        export = functools.partial(export_with_sites, model, sites=sites)
        program = export_widened((args, kwargs), wider, export)
    plan.remarks += counted_sizes(program)
    signature = describe_call(program)
    if not any("tensor" in entry for entry in signature["outputs"]):
        raise NotSaveableError(
            f"{type(model).__name__} returns no tensor, and an engine gives nothing else: return one from its forward, "
            "or use backend='torch'"
        )
    say("converting it to ONNX")
    return to_onnx(program), sites, signature


def _attention(plan: OrtPlan) -> contextlib.AbstractContextManager[None]:
    """transformers' attention in a form whose padded rows are zeros in ONNX too, where a CPU runs it."""
    here = plan.provider == "cpu" and "transformers.modeling_utils" in sys.modules
    return cache_left_in_place() if here else contextlib.nullcontext()


def without_cache(model: nn.Module, kwargs: dict[str, Any], reason: str) -> str:
    """A remark on an engine of a causal language model that has no cache.

    Raises:
        NotSaveableError: the example call would return a cache, which such an engine cannot give.
    """
    config = getattr(model, "config", None)
    asked = kwargs.get("use_cache")
    if asked or (asked is None and getattr(config, "use_cache", False)):
        raise NotSaveableError(
            f"an engine of {type(model).__name__} has no key/value cache ({reason}), and this call returns one: add "
            "use_cache=False to the example inputs, and to the calls of the engine"
        )
    return f"the engine has no key/value cache: {reason}"


def _with_native(built: BuiltGraph, sites: list[Any], plan: OrtPlan) -> BuiltGraph:
    """``built`` with a second graph, where moeopt's own operator is the faster for some of its blocks."""
    built.native = write_native(built.directory, sites, built.sites, plan)
    return built


def _with_cpu_fallback(
    built: BuiltGraph,
    written: PyObject,
    portable: PyObject,
    sites: list[Any],
    plan: ReplayPlan,
    say: Callable[[str], None],
) -> BuiltGraph:
    """``built`` with its CPU fallback graph, which has the same ends, once the graph itself was checked."""
    check_emitted(written, str(built.directory / GRAPH), plan.target.provider)
    say("writing its CPU fallback graph")
    built.cpu_fallback = write_graph(portable, sites, built.signature, plan, say, time.perf_counter(), built.folder)
    return built


def _check_kernels(model: PyObject, plan: BlockPlan) -> None:
    """Refuse a graph with a kernel that loses digits, and remark on what else is known of its kernels."""
    if lost := coarse(model, plan.provider):
        raise NotSaveableError(
            f"{lost[0]} on {plan.provider}, and has no other form here; use backend='torch', or write that function "
            "with exp and log"
        )
    if plan.provider == "cpu":
        plan.remarks += [note for note in kernel_notes(model) if note not in plan.remarks]


def write_graph(
    model: PyObject,
    sites: list[Any],
    signature: dict[str, Any],
    plan: BlockPlan,
    say: Callable[[str], None],
    started: float,
    beside: TemporaryFolder | None = None,
    adapt: Callable[[Any], Any] = lambda model: None,
) -> BuiltGraph:
    """Lower the sites of an ``onnx_ir.Model`` and write it with its weights beside it.

    ``beside``: the folder of the graph whose CPU fallback graph this is; it then has that form's name.
    ``adapt``: changes the lowered model before it is written.
    """
    import onnx_ir as ir

    say(f"lowering {len(sites)} expert blocks")
    name_by_module(model, [site.name for site in sites])  # what passes make of a node begins with its name
    products = take_products(model)
    if plan.provider == "cpu":
        upcast_and_tell(model, sites, plan.remarks)
    accurate_graph(model)
    if "tensorrt" not in plan.provider:
        cast_narrow(model)
    _check_kernels(model, plan)
    float64 = lines_of_float64(model)
    if plan.provider == "cpu":
        simplify(model)  # before guards: their Reshape to a tensor's own sizes is meant to fail
    name_id_guards(model)
    guard_sizes(model, signature, doubles="tensorrt" not in plan.provider)
    legalized = [plan.legalize(site) for site in sites]
    calls = {
        n.attributes["site"].as_int(): (*n.inputs, n.outputs[0])
        for n in model.graph
        if (n.domain, n.op_type) == (DOMAIN, OP)
    }
    names = replace_sites(model, legalized, lambda site: _written(plan, site))
    lowered = lower_products(model, products, plan)
    own_outputs(model.graph)
    deduplicate(model.graph)
    name_ends(model.graph, signature)
    made = label_nodes(model, [site.name for site in legalized])
    records, probes = describe_sites(legalized, names, plan, calls, made)
    adapt(model)
    if plan.portable:
        check_portable(model)
    folder, graph = (TemporaryFolder(), GRAPH) if beside is None else (beside, FALLBACK)
    say("writing the engine")
    ir.save(model, f"{folder.name}/{graph}", external_data=data_of(graph))
    built = BuiltGraph(folder, signature, dict(zip([s.name for s in sites], names, strict=True)))
    built.sites, built.probes, built.float64 = records, probes, float64
    built.reasons, built.products = {site.name: plan.why(site) for site in sites}, lowered
    size = float(sum(p.stat().st_size for p in built.directory.glob(f"{graph}*")))
    built.facts = {"nodes": float(len(model.graph)), "bytes": size, "export_seconds": time.perf_counter() - started}
    return built


def _written(plan: BlockPlan, site: ExpertsNode) -> Lowering:
    lowering = plan.written(site).lowering
    assert lowering is not None
    return lowering
