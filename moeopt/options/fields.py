"""The dataclass ``Options``: what one ``moeopt.optimize`` may be told."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from moeopt.errors import UsageError
from moeopt.options.checks import (
    as_device,
    as_dtype,
    as_dump,
    as_groups,
    as_names,
    as_passes,
    as_printed,
    as_tokens,
    check_dense,
    check_numbers,
    check_passes,
)
from moeopt.options.environment import check_variables, from_variable, names_in, passes_to_print
from moeopt.options.loss_limits import as_limit, check_quantize
from moeopt.options.quant_plan import as_quantize
from moeopt.value_types import PyObject

Verify = Literal["strict", "fast", "off"]
DenseMode = Literal["leave", "fuse", "split"]
_CHOICES: dict[str, tuple[str, ...]] = {"verify": ("strict", "fast", "off"), "dense": ("leave", "fuse", "split")}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The choices of one ``moeopt.optimize``; raises ``UsageError`` for a value it cannot take.

    Args:
        device: where the optimised model runs; None means where the model is. A string becomes a ``torch.device``.
        dtype: the dtype that the model's floating-point parameters are cast to first; None leaves them. A string
            becomes a ``torch.dtype``.
        verify: ``strict`` runs every case, ``fast`` fewer, ``off`` none (the certificate says so).
        tune: measure the lowerings on this machine instead of estimating their cost.
        tokens: the token counts that an engine will see in one call, to choose its lowerings for; None means a
            decode, small batches and a prompt.
        dense: what happens to a dense FFN: ``leave`` it; ``fuse`` it into the op where that is measured to be quicker
            for ``tokens``; or ``split`` its neurons into ``experts`` groups.
        experts: how many groups ``dense="split"`` makes.
        groups: which neurons ``dense="split"`` puts together. None: neighbours, no copy. ``"coactivation"``: those that
            are active on the same tokens of the example inputs. A mapping of module name pattern -> ``experts`` lists
            of neuron numbers, for the FFNs of the modules that match; the others get neighbours. Groups that are not
            of neighbours are picked from the weights at each call, which takes time and, while it runs, memory.
        target: the device an engine is built for when it is not this machine's, as the backend names it.
        profile: the sizes that a TensorRT engine is built for: a mapping of an input's name to its least, best and
            largest shape, or several such mappings; None means from 1 to four times the example's.
        portable: an ONNX Runtime engine of operators that ONNX itself defines, for other runtimes that read ONNX files
            (OpenVINO, a browser); those of ONNX Runtime's own, which may be quicker, are left out.
        tf32: let a TensorRT engine round the inputs of float32 matmuls to TF32.
        timing_cache: a file in which TensorRT keeps what it measured, for the next build.
        build_seconds: after which a TensorRT builder is stopped.
        build_gigabytes: of memory after which it is stopped; None means what is free on this machine.
        session_options: an ``onnxruntime.SessionOptions`` for the engine's session: threads, arenas, profiling. It
            cannot be copied, so entries that the engine needs are added to this very object where they are not set.
        mapped: keep an ONNX Runtime engine's weights in the pages of its file: no kernel gets a copy of them in a
            layout of its own, which may cost speed. Quantised experts in 8-bit integers then stay codes in memory too.
            Engines of PyTorch always do.
        inplace: rewrite the model that was given instead of a copy that shares its weights.
        hints: name pattern -> ``ExpertsSpec``, or a callable that is given the module of an expert and returns one, for
            blocks whose experts recognition does not know; they are verified like others.
        progress: called with one line of text as each long step begins; None shows a bar on a terminal and in a
            notebook, and nothing in CI; True and False show it always and never. The logger ``moeopt`` gets the lines.
        seed: of every random input that moeopt makes.
        fuel: keep at most so many applications of passes over all blocks; None means no limit. A block takes one to be
            rewritten at all, and one for each further pass that changes it.
        dump: a folder that gets a text file of each block's graph, reading and program; None means none.
        passes: the passes that run, in order: values with ``name``, ``level`` and ``apply``; None means
            ``moeopt.passes.PIPELINE``.
        skip_passes: names of passes that do not run (``moeopt passes`` lists them); one name or several.
        only_passes: names of the only passes that run; () means all that are on. Naming a pass that is off turns it on.
        print_passes: print a line on stderr for each pass that ran on a block, and a list of them in the report; or,
            given the name of a pass or several, for these only.
        quantize: round the experts' weights to a format: ``"int8"`` (a scale a channel), ``"int4"`` (blocks of 32),
            ``"fp8"``, ``"mxfp4"``, or a :class:`moeopt.QuantPlan`; None leaves them. This changes the function: the
            certificate says what was lost, beside that the optimised model computes the quantised one. ``"checkpoint"``
            rounds nothing: experts get the codes of the quantised checkpoint that the model was loaded from.
        limit: the most that may be lost, by figure, like ``{"kl_mean": 0.01, "top1": 0.97}``. A missed limit is told:
            ``certificate.passed`` is False.
        data: the calls on which the loss is measured: one call's inputs, or an iterable of such; None means the
            example inputs.
        calibration: the calls whose rows ``QuantPlan(method=)`` weighs by, in the forms of ``data``; none of them is
            needed to measure a loss, and one that is also in ``data`` makes the loss look smaller than it is.
    """

    device: PyObject = None
    dtype: PyObject = None
    verify: Verify = field(
        default_factory=lambda: cast(Verify, from_variable("MOEOPT_VERIFY", "strict", str, "a level"))
    )
    tune: bool = False
    tokens: tuple[int, ...] | None = None
    dense: DenseMode = "leave"
    experts: int | None = None
    groups: PyObject = field(default=None, hash=False)
    target: str | None = None
    profile: PyObject = field(default=None, hash=False)
    portable: bool = False
    tf32: bool = False
    timing_cache: str | None = None
    build_seconds: float = 3600.0
    build_gigabytes: float | None = None
    session_options: PyObject = field(default=None, hash=False)
    mapped: bool = False
    inplace: bool = False
    hints: Mapping[str, Any] = field(default_factory=dict, hash=False)
    progress: Callable[[str], None] | bool | None = None
    seed: int = field(default_factory=lambda: from_variable("MOEOPT_SEED", 0, int, "an integer"))
    fuel: int | None = field(default_factory=lambda: from_variable("MOEOPT_FUEL", None, int, "an integer"))
    dump: str | os.PathLike[str] | None = field(
        default_factory=lambda: from_variable("MOEOPT_DUMP", None, str, "a directory")
    )
    passes: tuple[Any, ...] | None = field(default=None, hash=False)
    skip_passes: tuple[str, ...] = field(
        default_factory=lambda: from_variable(
            "MOEOPT_SKIP_PASSES", tuple[str, ...](), names_in, "names of passes with commas between"
        )
    )
    only_passes: tuple[str, ...] = ()
    print_passes: bool | tuple[str, ...] = field(default_factory=passes_to_print)
    quantize: PyObject = None
    limit: Mapping[str, float] | None = field(default=None, hash=False)
    data: PyObject = field(default=None, hash=False, compare=False, repr=False)
    calibration: PyObject = field(default=None, hash=False, compare=False, repr=False)

    def __new__(cls, **given: PyObject) -> Options:
        """Remember which fields were given, so that ``from_fields`` can tell one that is given twice."""
        self = object.__new__(cls)
        object.__setattr__(self, "_given", frozenset(given))
        return self

    def __post_init__(self) -> None:
        check_variables()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{name}={getattr(self, name)!r}: it must be one of {', '.join(choices)}")
        if self.passes is not None:
            object.__setattr__(self, "passes", as_passes(self.passes))
        for name in ("skip_passes", "only_passes"):
            object.__setattr__(self, name, as_names(name, getattr(self, name)))
        object.__setattr__(self, "print_passes", as_printed(self.print_passes))
        check_passes(self)
        check_numbers(self)
        object.__setattr__(self, "tokens", as_tokens(self.tokens))
        check_dense(self)
        object.__setattr__(self, "quantize", as_quantize(self.quantize))
        object.__setattr__(self, "limit", as_limit(self.limit))
        check_quantize(self)
        object.__setattr__(self, "groups", as_groups(self.groups, self.dense, self.experts))
        if not isinstance(self.hints, Mapping):
            raise UsageError(f"hints={self.hints!r}: it must map name patterns to an ExpertsSpec or a callable")
        if self.progress is not None and not isinstance(self.progress, bool) and not callable(self.progress):
            raise UsageError(
                f"progress={self.progress!r}: it must be a callable that takes one line of text, or True or False"
            )
        object.__setattr__(self, "dump", as_dump(self.dump))
        object.__setattr__(self, "hints", dict(self.hints))
        object.__setattr__(self, "device", as_device(self.device))
        object.__setattr__(self, "dtype", as_dtype(self.dtype))

    @classmethod
    def from_fields(cls, options: Options | None, fields: Mapping[str, Any]) -> Options:
        """``options`` with ``fields`` on top; ``UsageError`` for an unknown field or one given twice."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
                meant = f"did you mean {' or '.join(close)}?" if close else f"the fields are {', '.join(known)}"
                raise UsageError(f"there is no option {name!r}: {meant}")
        if options is None:
            return cls(**fields)
        if not isinstance(options, Options):
            raise UsageError(f"options={options!r}: it must be a moeopt.Options")
        twice = sorted(options.given & set(fields))
        if twice:
            raise UsageError(f"{twice[0]} is given twice, in options and as a keyword: give it once")
        return cls(**{name: getattr(options, name) for name in options.given} | dict(fields))

    @property
    def given(self) -> frozenset[str]:
        """The fields that were given by name when this value was made.

        ``dataclasses.replace`` and a copy that gives every field count as giving those that are not the default.
        """
        names: frozenset[str] = getattr(self, "_given", frozenset())
        if len(names) < len(dataclasses.fields(self)):
            return names
        default = Options()
        return frozenset(n for n in names if getattr(self, n) != getattr(default, n))

    def say(self, line: str) -> None:
        """Pass one line to ``progress``, if there is one."""
        if callable(self.progress):
            self.progress(line)
