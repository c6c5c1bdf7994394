"""The forms in which dense FFNs are read: as groups of neurons, or whole, which is timed against the original."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moeopt.capture.call_roles import CallSpec
from moeopt.capture.probe_inputs import call_specs, probe_call
from moeopt.capture.tape import Tape, record
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import Declined
from moeopt.ir.weight_refs import ExpertRef, tensor_at
from moeopt.options import Options
from moeopt.passes.split_dense_ffn import Groups, neighbours
from moeopt.patches import quiet
from moeopt.pipeline.autotune import TOKENS, Timing, in_turn
from moeopt.pipeline.block import rewrite_block
from moeopt.pipeline.coactivation_groups import activity, coactive
from moeopt.recognise.dense_ffn import DenseFFN, find_dense, recognize_dense
from moeopt.recognise.recognition import Recognition
from moeopt.recognise.router import RouterReading
from moeopt.rewrite.install import RewrittenForward
from moeopt.rewrite.legality import check_skipped
from moeopt.rewrite.live_weights import LiveExpertWeights
from moeopt.sizes import in_megabytes
from moeopt.verification.state import RestoreState

EVERYONE = "every token goes to every group, with weight 1"
Measured = dict[Any, tuple[str, list[Timing]]]
"""Times of modules by what decides them, and the name of the module that they were taken on."""


@dataclass
class DenseReader:
    """The :class:`moeopt.pipeline.coverage.Reader` of the FFNs with these weights, each in the form ``form``."""

    weights: list[frozenset[int]]
    form: Callable[[DenseFFN], Recognition]
    kind: str

    def first(self, module: nn.Module, call_spec: CallSpec, seed: int) -> tuple[ArgsKwargs, Tape, list[Recognition]]:
        call = probe_call(call_spec, 24, seed)
        tape = record(module, *call, made=True)
        found = self.again(tape, [])
        for recognition in found:
            inner = {index for n in recognition.interior for index in tape.stack(n.meta["call"])[1:]}
            for index in sorted(inner):
                check_skipped(tape.calls[index].path, tape.calls[index].module)
        return call, tape, found

    def again(self, tape: Tape, known: list[Recognition]) -> list[Recognition]:
        del known
        return [self.form(ffn) for ffn in read_dense(tape, self.weights)]

    def routers(
        self, tapes: list[Tape], founds: list[list[Recognition]], known: list[Recognition]
    ) -> list[RouterReading]:
        del tapes, founds
        return [RouterReading(EVERYONE) for _ in known]


def read_dense(tape: Tape, weights: list[frozenset[int]]) -> list[DenseFFN]:
    """The FFNs of ``tape`` with these weights, all of them.

    Raises:
        Declined: one of them cannot be read.
    """
    candidates = find_dense(tape, weights)
    if not candidates:
        raise Declined("its weights are not plain matrices in Parameters or buffers, or a run on other tokens skips it")
    return [recognize_dense(tape, candidate) for candidate in candidates]


def groups_of(
    path: str, module: nn.Module, call: ArgsKwargs, weights: list[frozenset[int]], options: Options
) -> Callable[[DenseFFN], Groups]:
    """The groups of each FFN of the module at ``path``."""
    count = options.experts or 1
    if options.groups == "coactivation":
        clustered = by_activity(module, call, weights, count)
        return lambda ffn: clustered[ffn.weights]
    given = options.groups if isinstance(options.groups, Mapping) else {}
    lists = next((lists for pattern, lists in given.items() if fnmatch.fnmatch(path, pattern)), None)
    return lambda ffn: lists or neighbours(ffn.inner, count)


def by_activity(
    module: nn.Module, call: ArgsKwargs, weights: list[frozenset[int]], count: int
) -> dict[ExpertRef, list[tuple[int, ...]]]:
    """Groups of each FFN's neurons by how they answer the tokens of ``call``, a real one of ``module``."""
    tape = record(module, *call)
    seen: dict[ExpertRef, list[torch.Tensor]] = {}
    for ffn in read_dense(tape, weights):
        neighbours(ffn.inner, count)  # declines where there are too few neurons
        bank = LiveExpertWeights(module, [ffn.weights], (ffn.spec.w_in_layout, ffn.spec.w_out_layout))
        with torch.no_grad():
            seen.setdefault(ffn.weights, []).append(activity(ffn, bank, tape.value(ffn.x)))
    return {ref: coactive(torch.cat(parts), count) for ref, parts in seen.items()}


def in_words(module: nn.Module, recognitions: list[Recognition]) -> str:
    """How an FFN was split: what is not plain from the number of groups."""
    experts = [e for f in recognitions for e in f.experts]
    sizes = sorted({len(e.neurons) if e.neurons else e.w_out.k for e in experts})
    words = ["split, every group active"]
    if len(sizes) > 1:
        words.append(f"groups of {sizes[0]} to {sizes[-1]} neurons")
    picked = sum(
        len(e.neurons) * (sum(w.k for w in e.w_in) + e.w_out.m) * tensor_at(module, e.w_out.path).element_size()
        for e in experts
        if e.neurons
    )
    if picked:
        words.append(f"{in_megabytes(picked)} of weights picked at each call")
    return "; ".join(words)


def measured(
    model: nn.Module,
    path: str,
    call: ArgsKwargs,
    options: Options,
    reader: DenseReader,
    known: Measured,
) -> tuple[str, list[Timing]]:
    """Times of the module at ``path`` and of its fused form, and where taken: modules alike are measured once."""
    name, module = path or type(model).__name__, model.get_submodule(path)
    kind = (type(module), *((tuple(p.shape), p.dtype, p.stride()) for p in module.parameters()))
    if kind not in known:
        unchecked = dataclasses.replace(options, verify="off", fuel=None, dump=None)
        program = rewrite_block(name, module, call, unchecked, None, reader).program
        fused, timings = RewrittenForward(module, program), []
        others = [p for p in model.parameters() if not any(p is own for own in module.parameters())]
        flush = sum(p.numel() * p.element_size() for p in others)
        with RestoreState(module), buffers_kept(module), quiet():  # a refused size is timed elsewhere, not warned of
            for tokens, one in sized_calls(call, options.tokens or TOKENS):
                before = fused.fallbacks
                try:
                    timing = in_turn(module, fused, one, tokens, flush)
                except Exception:  # a number of tokens that the module cannot take
                    continue
                if fused.fallbacks == before:
                    timings.append(timing)
        if not timings:
            raise Declined(f"its fused form runs with none of {options.tokens or TOKENS} tokens, so it is not measured")
        known[kind] = name, timings
    return known[kind]


@contextlib.contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """A module may count its calls in a buffer: those of a measurement do not count."""
    saved = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def sized_calls(call: ArgsKwargs, counts: tuple[int, ...]) -> list[tuple[int, ArgsKwargs]]:
    """``call`` with each number of tokens, on its own rows."""
    call_spec = next(call_specs(*call))
    lead = (1,) * (len(call_spec.grid) - 1)
    return [(count, call_spec.with_tokens((*lead, count))) for count in counts]
