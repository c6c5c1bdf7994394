"""A causal language model as one ONNX graph with its key/value cache as inputs and outputs.

One graph serves prompts and single tokens: sequence and past lengths are free, and a first call has a past
of length 0. ``transformers``' own exporter traces it; experts stay ``moeopt::Experts`` nodes.

Shape legend: B rows, S new tokens, P cached tokens, N positions whose logits are wanted, V vocabulary,
G key/value heads, D head size::

    input_ids (B, S), attention_mask (B, P+S), position_ids (B, S), logits_to_keep (N),
    keys and values of each layer (B, G, P, D)  ->  logits (B, N, V), keys and values (B, G, P+S, D)

and the states of layers that have others (:mod:`~.layers`), which begin at zero.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from moeopt.cache_names import cache_parameter, field_named, parameter_named
from moeopt.causal_lm.attention import cache_left_in_place
from moeopt.causal_lm.carried_cache import CarriedCache
from moeopt.causal_lm.exporter import onnx_exporter, with_real_views
from moeopt.causal_lm.layers import ATTENTION, parts_of, sample_cache
from moeopt.causal_lm.lm_graph import drop_idle_squeezes, signature_of_lm, turn_batches_back
from moeopt.causal_lm.mixers import Mixer, find_mixers, stepping
from moeopt.causal_lm.stamped import stamped, written_out
from moeopt.causal_lm.steps import replace_mixers
from moeopt.causal_lm.translations import own_translations
from moeopt.compat import known_fields
from moeopt.errors import Declined
from moeopt.lower.constant_reads import ConstantReads
from moeopt.lower.distances import DirectDistances
from moeopt.lower.export import answered, asks_values
from moeopt.lower.onnx.exact import exact_rules
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.export import emitting
from moeopt.lower.onnx.sites import Sites
from moeopt.lower.stamps import Stamps
from moeopt.lower.written_state import written_by
from moeopt.patches import no_results_kept, one_trace, quicker_export, quiet
from moeopt.value_types import OnnxModel, PyObject
from moeopt.verification.model import run_plain
from moeopt.verification.state import RestoreState

B, S, P, N = 2, 3, 5, 2
"""Sizes of the traced sample: no two that are free are equal, and none is 1, which a trace would hold to be fixed."""


@dataclass
class CausalLMExport:
    """What :func:`export_causal_lm` gives.

    Attributes:
        model: ``onnx_ir.Model`` with one ``moeopt::Experts`` node for each of ``sites``.
        sites: the experts, in the order of the nodes' numbers.
        signature: a dict of JSON values; all that :class:`~.causal_runner.CausalLM` needs beside a session.
        program: the ``ExportedProgram`` that ``model`` was made of; it knows what the trace took for granted.
    """

    model: OnnxModel
    sites: list[ExpertsNode]
    signature: dict[str, Any]
    program: PyObject


def is_causal_lm(model: nn.Module) -> bool:
    """Whether ``model`` is a ``transformers`` decoder that can ``generate`` from token ids with a cache."""
    if "transformers" not in sys.modules:  # then no model is one of its classes
        return False
    from transformers import GenerationMixin, PreTrainedModel

    if not (isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin)):
        return False
    takes = inspect.signature(type(model).forward).parameters
    known = {"input_ids", "attention_mask"} <= set(takes) and parameter_named(takes)
    return bool(known and not model.config.is_encoder_decoder)


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model that a ``DistributedDataParallel`` or ``DataParallel`` without hooks wraps, which computes the same."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        if model._forward_hooks or model._forward_pre_hooks:
            break
        model = model.module
    return model


def export_causal_lm(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    say: Callable[[str], None],
    provider: str = "cpu",
    fuse: bool = True,
    without_states: str = "",
) -> CausalLMExport:
    """Export ``model``, for which :func:`is_causal_lm` holds and whose blocks were rewritten.

    Args:
        args, kwargs: the user's example call; it says only which arguments are used.
        say: told what is being done.
        provider: "cpu" and "cuda" fuse norms and rotary embeddings into that provider's own ops.
        fuse: False leaves these as ONNX's operators.
        without_states: an engine that has no form for recurrent states, in words; "" where there is one.

    Raises:
        Declined: the model's cache, arguments or results do not fit this form, or the exporter fails on it.
    """
    _check_call(model, args, kwargs)
    exporter = onnx_exporter()
    say("tracing the model with its cache")
    sample, shapes, result = _sample(model)
    wide = any(t.dtype == torch.float64 for t in model.parameters())  # of which fused ops have no kernel
    in_place = cache_left_in_place() if provider == "cpu" else contextlib.nullcontext()
    mixers = _mixers(model, sample, without_states)
    with (
        one_trace,
        RestoreState(model),  # as for other exports: torch.export leaves copies of what modules hold
        emitting(model) as sites,
        quiet(),
        _sdpa_or_eager(model),
        quicker_export(),
        exact_rules() as exact,
        own_translations(exporter),
        in_place,
        stepping(mixers),
        DirectDistances(),
    ):
        config = exporter.OnnxConfig(
            **known_fields(
                exporter.OnnxConfig,
                dynamic=True,
                dynamic_shapes=shapes,
                optimize=exact,
                ort_fusions=provider if fuse and exact and provider in ("cpu", "cuda") and not wide else None,
            )
        )
        traced = with_real_views(exporter)()
        graph = _traced_graph(model, traced, sample, config, sites, say)
    goes_on = replace_mixers(graph, mixers)
    drop_idle_squeezes(graph.graph)
    turn_batches_back(graph.graph)
    signature = signature_of_lm(model, graph, sample[cache_parameter(model)], result)
    if not goes_on:
        signature["one_at_a_time"] = True
    return CausalLMExport(graph, sites, signature, traced.program)


def _mixers(model: nn.Module, sample: dict[str, Any], without_states: str) -> list[Mixer]:
    """The layers that keep a recurrent state; ``Declined`` where the engine ``without_states`` has no form for them."""
    past = cache_parameter(model)
    if not any(name.startswith("recurrent") for layer in sample[past].layers for name in parts_of(layer)):
        return []
    with quiet(), _sdpa_or_eager(model):
        mixers = find_mixers(model, lambda cache: model(**{**sample, past: cache}), sample[past], (B, S))
    if mixers and without_states:
        raise Declined(f"{mixers[0].name} keeps a recurrent state, for which {without_states} has no form here")
    return mixers


def _traced_graph(
    model: nn.Module,
    traced: PyObject,
    sample: dict[str, Any],
    config: PyObject,
    sites: Sites,
    say: Callable[[str], None],
) -> PyObject:
    """``onnx_ir.Model`` of the model; of alike layers one is traced.

    It is traced again with constants answered where its Python asks a tensor's value.
    """

    def export(reads: ConstantReads | None, stamps: Stamps | None) -> PyObject:
        fresh = copy.copy(model)  # the exporter leaves a forward on the instance it is given
        traced.stamps = stamps
        with no_results_kept(), answered(fresh, reads), written_out(stamps, sites):
            return traced.export_program(fresh, sample, config)[0]

    try:
        try:
            run = functools.partial(run_plain, model, (), sample)
            return stamped(model, sites, CarriedCache(), lambda stamps: export(None, stamps), run, say)
        except Exception as err:
            if not asks_values(err):
                raise
            sites.start()
            graph = export(reads := ConstantReads(model), None)
            reads.refuse(written_by(traced.program))
            return graph
    except Exception as err:
        raise Declined(f"transformers' exporter stops at {_first_line(err)}") from err


def _check_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = {**dict(zip(inspect.signature(type(model).forward).parameters, (None, *args), strict=False)), **kwargs}
    known = {"self", "input_ids", "attention_mask", "position_ids", "logits_to_keep", "use_cache", "return_dict"}
    if extra := sorted(n for n, value in given.items() if n not in known and value is not None and value is not False):
        raise Declined(
            f"the example call gives {', '.join(extra)}, which an engine with a cache does not take; leave it out "
            "for one"
        )
    mask = given.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() != 2:
        raise Declined(
            f"the example's attention_mask has {mask.dim()} sizes; an engine with a cache takes one of (rows, tokens)"
        )


def _sample(model: PyObject) -> tuple[dict[str, Any], dict[str, Any], type]:
    """A call with a past and with padding, which of its sizes are free, and the class of what the model returns."""
    from torch.export import Dim
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

    takes = inspect.signature(type(model).forward).parameters
    device = model.device
    ids = torch.arange(B * S, device=device).reshape(B, S) % model.config.get_text_config().vocab_size
    try:
        with torch.no_grad():
            result = model(input_ids=ids, use_cache=True, return_dict=True)
        field = field_named(type(result))
        cache = result[field]
    except Exception as err:
        raise Declined(f"the model does not run with a cache: {_first_line(err)}") from err
    if extra := sorted(name for name in result.keys() - {"logits", field} if result[name] is not None):
        raise Declined(
            f"it returns {extra[0]} beside logits and cache; set config.output_router_logits, output_hidden_states "
            "and output_attentions to False for an engine with a cache"
        )
    past = sample_cache(cache, B, P)
    register_cache_pytrees_for_model(model)

    mask = torch.ones(B, P + S, dtype=torch.int64, device=device)
    mask[1, :2] = 0  # an exporter drops a mask that is all ones
    position = (mask.cumsum(-1) - 1).clamp(min=0)[:, P:]
    call = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    free: dict[str, Any] = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in call}
    call["logits_to_keep"] = torch.arange(S - N, S, device=device)
    free["logits_to_keep"] = {0: Dim.AUTO}
    call = {name: value for name, value in call.items() if name in takes}
    free = {name: value for name, value in free.items() if name in takes}
    grows = {id(parts_of(layer).get(name)) for layer in past.layers for name in ATTENTION}
    named = parameter_named(takes)
    free[named] = [{0: Dim.AUTO, 2: Dim.AUTO} if id(t) in grows else {0: Dim.AUTO} for t in tree_leaves(past)]
    return {**call, named: past, "use_cache": True, "return_dict": True}, free, type(result)


@contextlib.contextmanager
def _sdpa_or_eager(model: PyObject) -> Iterator[None]:
    """Attention in a form that traces: flash and flex kernels have no ONNX form, sdpa or eager is the same function.

    A function that the user registered is another one, and stays.
    """
    before = model.config._attn_implementation or ""
    if not before.startswith(("flash_attention", "flex_attention", "paged|", "kernels-community/")):
        yield
        return
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _first_line(err: BaseException) -> str:
    while err.__cause__ is not None:
        err = err.__cause__
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {lines[0]}" if lines else type(err).__name__
