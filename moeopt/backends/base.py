"""The contract of a backend: one runtime that optimised models run on.

A backend is a class with a name, found through :mod:`moeopt.backends.registry`. Callers use its public methods, which
check what they are given and what comes back; a subclass writes the ``_impl`` methods, which work. Nobody outside
``moeopt/backends`` asks which backend it has.

    optimize    plan -> build -> (the blocks are verified as the runtime computes them) -> compare -> Made
    a bundle    save -> open, verify, providers
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from moeopt.backends.made import Made as Made
from moeopt.backends.made import Opened as Opened
from moeopt.backends.made import bytes_of
from moeopt.bundle.destination import check_destination
from moeopt.bundle.manifest import Manifest, read_manifest
from moeopt.bundle.weights_file import is_becoming_one
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import BundleError, NotSaveableError, UsageError
from moeopt.limits import DEFAULT, LoadLimits
from moeopt.lower.plain_call import open_dataclasses
from moeopt.lower.unexpected_errors import unexpected_errors_as
from moeopt.onnx_in.read import is_onnx
from moeopt.options import Options
from moeopt.quantization.measure_loss import whole_loss
from moeopt.quantization.quantized_model import quantized_original
from moeopt.value_types import JsonValue, PyObject
from moeopt.verification.certificate import Certificate
from moeopt.verification.model import EndToEnd, OriginalRuns, end_to_end

REPORT_IT = "keep the live model of backend='torch', or report this with the model's code"

LOG = logging.getLogger("moeopt")

Otherwise = Callable[[OriginalRuns, Any], EndToEnd | None]
"""A second look at outputs that differ: the original's runs, the engine's outputs -> another verdict, or None."""


class Backend(ABC):
    """One runtime. Subclasses set :attr:`name` and write the ``_impl`` methods."""

    name: ClassVar[str] = ""
    """What ``backend=`` and a bundle's manifest call it."""
    streamed_takes: ClassVar[tuple[int, int]] = (1, 2)
    """What a streamed model takes: its weights so many times on disk, and memory of so many layers."""

    def plan(self, options: Options) -> PyObject:
        """What ``options`` ask of this runtime; the plan is handed on to the other methods as it is.

        Raises:
            UsageError: an option that the runtime does not have, a device or package that is not here.
        """
        return self._plan_impl(options)

    def runs_on_gpu(self, plan: PyObject) -> bool:
        """Whether the engine of ``plan`` runs on a GPU of this machine, where the original is then compared."""
        del plan
        return False

    def keeps_cache(self, made: Made) -> bool:
        """Whether what was made takes and returns a language model's key/value cache in a bundle too."""
        del made
        return False

    def optimize(self, source: nn.Module, call: ArgsKwargs, options: Options, plan: PyObject) -> Made:
        """Find, rewrite, verify and build.

        Args:
            source: the model; it keeps working, unchanged, unless ``options.inplace``.
            call: ``(args, kwargs)`` that it runs on.
            plan: of :meth:`plan`.

        Raises:
            CaptureError, NotSaveableError, NotEquivalentError, EngineBuildError, UsageError: as ``moeopt.optimize``.
        """
        made = self._optimize_impl(source, call, options, plan)
        if made.report.backend != self.name:
            raise AssertionError(f"the backend {self.name!r} returned a report of {made.report.backend!r}")
        return made

    def optimize_file(
        self, model: PyObject, inputs: PyObject, options: Options, plan: PyObject
    ) -> tuple[Made, ArgsKwargs]:
        """Find, rewrite, verify and replace the blocks of an ONNX file; the rest of its graph stays as it is.

        Args:
            model: a path, an ``onnx.ModelProto`` or an ``onnx_ir.Model``.
            inputs: of the graph, in the forms of ``moeopt.optimize``; None: some are made up.

        Returns:
            what was made, and the call that it was made with.

        Raises:
            UsageError: this backend takes no such files; the file is damaged, hostile or does not run.
            NotEquivalentError: as ``moeopt.optimize``.
        """
        raise UsageError(
            f"an ONNX file is optimised for ONNX Runtime: leave out backend={self.name!r}, or give the PyTorch model"
        )

    def verify_file(self, original: PyObject, inputs: PyObject, engine: PyObject, before: Certificate) -> Certificate:
        """Compare an engine with the ONNX file that it was made of, within the budget of its certificate ``before``.

        Raises:
            UsageError: engines of this backend are not made of files; another file.
        """
        raise UsageError(f"an engine of backend {self.name!r} is not made of an ONNX file: give original= the model")

    # bundles

    def save(self, made: Made, call: ArgsKwargs, directory: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write what :meth:`optimize` made as a bundle; returns its directory. Replacing a bundle is logged.

        Raises:
            NotSaveableError: the message names what has no form in a bundle.
            UsageError: the directory cannot be written to, holds something else, or holds a verified bundle that an
                unverified one would replace without ``overwrite``.
        """
        size = 0 if is_becoming_one() else bytes_of(made.model)
        old = check_destination(directory, made.certificate.passed is True, overwrite, size)
        what = "the model" if made.built is None else "the engine"
        with open_dataclasses(call), unexpected_errors_as(f"saving {what}", REPORT_IT, NotSaveableError):
            saved = self._save_impl(made, call, directory)
        if old:
            LOG.warning("%s: replaced the bundle that was there (%s)", saved, old)
        return saved

    def open(
        self,
        directory: str | os.PathLike[str],
        device: PyObject = None,
        session_options: JsonValue = None,
        limits: LoadLimits = DEFAULT,
        mapped: bool = False,
        resident: int | None = None,
    ) -> PyObject:
        """The engine of a bundle of this backend, checked, on ``device`` or where it was saved.

        ``mapped``, ``resident``: as ``moeopt.load``; bytes.

        Raises:
            BundleError: it is damaged, hostile, from a newer moeopt, or another backend's.
            UsageError, EngineNotExecutableError, NotEquivalentError: as ``moeopt.load``.
        """
        if mapped or resident is not None:
            return self._open_mapped_impl(directory, device, session_options, limits, resident)
        return self._open_impl(directory, device, session_options, limits)

    def verify(
        self,
        directory: str | os.PathLike[str],
        provider: str | None = None,
        original: PyObject = None,
        call: PyObject = None,
        limits: LoadLimits = DEFAULT,
    ) -> Certificate:
        """Check a bundle again: against its golden runs, or against ``original`` on ``call``.

        Args:
            original: a module; or an ONNX model, of which ``call`` is the inputs, None for such as are made up.

        Raises:
            BundleError: it is damaged, hostile, or another backend's.
            UsageError: an absent provider; an original without a call.
        """
        manifest = read_manifest(directory)
        if manifest.backend != self.name:
            raise BundleError(f"{manifest.directory}: it is a bundle for {manifest.backend}: use moeopt.verify")
        if not is_onnx(original) and (original is None) != (call is None):
            raise UsageError("verify(bundle, original=...) needs inputs= to run both on")
        try:
            saved = Certificate.from_json(manifest.read_text("certificate.json"))
        except BundleError as err:
            raise BundleError(f"{manifest.directory}: {err}") from None
        opened = self._open_to_verify_impl(manifest, provider, limits)
        notes = list(opened.notes)
        if is_onnx(original):
            found = self.verify_file(original, call, opened.engine, saved)
            found.executed, found.device, found.notes = opened.executed, opened.device, notes
            return found
        if original is not None and call is not None and not saved.lossy:
            args, kwargs = self.comparable(opened.engine, call)
            noise = self.noisy(original, [block["name"] for block in manifest.data["blocks"]])
            ties = self.tie_comparison(original, opened.engine, (args, kwargs), noise)
            end = end_to_end(original, opened.engine, args, kwargs, noise_blocks=noise, otherwise=ties)
            return Certificate([], end, executed=opened.executed, device=opened.device, dtype=saved.dtype, notes=notes)
        loss = saved.loss
        if original is not None and call is not None:  # golden runs say what it computes, the original what that lost
            loss = whole_loss(original, opened.engine, self.comparable(opened.engine, call), loss.get("limit", {}))
        end = self._golden(manifest, opened, notes, limits)
        return Certificate(
            saved.blocks, end, saved.level, opened.executed, opened.device, saved.dtype, notes=notes, loss=loss,
            quantized=saved.quantized, products=saved.products, activations=saved.activations, method=saved.method,
        )  # fmt: skip

    def _golden(self, manifest: Manifest, opened: Opened, notes: list[str], limits: LoadLimits) -> EndToEnd:
        """The verdict of the golden runs; ``notes`` gets a sentence on them."""
        check = self._replay_impl(manifest, opened.engine, limits)
        runs = "1 golden run" if check.runs == 1 else f"{check.runs} golden runs"
        edges = f"; {check.edges} rows, which rounding alone moves further, are left out" if check.edges else ""
        notes.append(f"{runs}, worst distance per token {check.required:.1e}, allowed {check.budget:.1e}{edges}")
        return EndToEnd(
            check.passed, check.reason, outputs=check.runs, distance=float(check.required), budget=float(check.budget)
        )

    def provider_names(self) -> tuple[str, ...]:
        """What a bundle of this backend may be verified on, here or elsewhere."""
        return ("cpu",)

    def providers(self, directory: str | os.PathLike[str]) -> dict[str, str]:
        """Each of :meth:`provider_names`, and why it is not on this machine ("" where it is)."""
        del directory
        return dict.fromkeys(self.provider_names(), "")

    # comparing again

    def runner(self, model: PyObject) -> tuple[Any, bool]:
        """What computes for ``model`` on this machine, and whether it is ``model`` itself and not a replay."""
        return model, True

    def runs_on(self, engine: PyObject) -> str | None:
        """The provider of a loaded engine, as :meth:`verify` takes it; None for one that does not run here."""
        provider: str = engine.device.type
        return provider

    def comparable(self, engine: PyObject, call: ArgsKwargs) -> ArgsKwargs:
        """``call`` in the form in which the original and ``engine`` can be compared."""
        del engine
        return call

    def judge(self, original: nn.Module, made: Made, call: ArgsKwargs) -> nn.Module:
        """What the numbers of ``made`` are compared with: ``original``, its experts quantised as those of ``made``."""
        del call
        model = made.model
        return quantized_original(original, model) if isinstance(model, nn.Module) else original

    def noisy(self, original: nn.Module, blocks: Sequence[str]) -> list[str]:
        """The modules of ``original`` whose rounding explains a difference: those that were rewritten."""
        known = {name for name, _ in original.named_modules()}
        return [name if name in known else "" for name in blocks]

    def tie_comparison(
        self, original: nn.Module, engine: PyObject, call: ArgsKwargs, noise: Sequence[str], built: PyObject = None
    ) -> Otherwise | None:
        """What ``end_to_end`` asks where ``engine`` differs: whether it broke ties otherwise. None: nobody can tell.

        Args:
            built: the record of an engine that was not loaded from a bundle.
        """
        del original, engine, call, noise, built
        return None

    def facts(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """What ``moeopt info`` says of a bundle beside what every bundle has; ``data`` is its manifest."""
        return {"device": str(data.get("device", "unknown"))}

    # what a subclass writes; one that has no bundle form leaves the last four

    @abstractmethod
    def _plan_impl(self, options: Options) -> PyObject: ...

    @abstractmethod
    def _optimize_impl(self, source: nn.Module, call: ArgsKwargs, options: Options, plan: PyObject) -> Made: ...

    def _save_impl(self, made: Made, call: ArgsKwargs, directory: str | os.PathLike[str]) -> Path:
        raise NotSaveableError(
            f"backend {self.name!r} has no bundle form: use the optimised model in this process, or optimise with "
            "backend='torch' or 'onnxruntime' to save it"
        )

    def _open_impl(
        self, directory: str | os.PathLike[str], device: PyObject, session_options: JsonValue, limits: LoadLimits
    ) -> PyObject:
        raise BundleError(f"{directory}: backend {self.name!r} opens no bundles")

    def _open_mapped_impl(
        self, directory: str | os.PathLike[str], device: PyObject, session_options: JsonValue, limits: LoadLimits,
        resident: int | None,
    ) -> PyObject:  # fmt: skip
        raise UsageError(
            f"mapped= and resident= are for engines on the CPU, and {directory} is a bundle of backend {self.name!r}: "
            "leave them out"
        )

    def _open_to_verify_impl(self, manifest: Manifest, provider: str | None, limits: LoadLimits) -> Opened:
        raise BundleError(f"{manifest.directory}: backend {self.name!r} opens no bundles")

    def _replay_impl(self, manifest: Manifest, engine: PyObject, limits: LoadLimits) -> PyObject:
        """The golden runs of a bundle on ``engine``, as a :class:`moeopt.bundle.golden.GoldenCheck`."""
        raise BundleError(f"{manifest.directory}: backend {self.name!r} opens no bundles")
