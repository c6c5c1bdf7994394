"""What people call: ``optimize``, ``explain``, ``load``, ``verify`` and the ``Optimized`` they get."""

from __future__ import annotations

import dataclasses
import os

from moeopt.backends import registry
from moeopt.bundle.destination import check_destination
from moeopt.calls.directory import explain_directory, optimize_directory
from moeopt.calls.module import check_no_arguments, optimize_module
from moeopt.calls.onnx_file import optimize_file
from moeopt.calls.verify_again import check_original, verify_optimized
from moeopt.errors import CaptureError, UsageError
from moeopt.find.example_inputs import as_call, without_cache
from moeopt.limits import LoadLimits, as_bytes, checked_limits
from moeopt.onnx_in.read import is_onnx
from moeopt.optimized import Optimized
from moeopt.options import Options, check_variables
from moeopt.report import Report
from moeopt.value_types import JsonValue, PyObject
from moeopt.verification.certificate import Certificate


def optimize(
    model: PyObject,
    example_inputs: PyObject = None,
    *,
    backend: str | None = None,
    options: Options | None = None,
    out: str | os.PathLike[str] | None = None,
    task: str | None = None,
    trust_remote_code: bool = False,
    **fields: PyObject,
) -> Optimized:
    """Find every MoE block of ``model``, rewrite it into grouped-expert ops, and verify it.

    Args:
        model: an ``nn.Module``, ``fx.GraphModule`` or ``ExportedProgram``. It keeps working, unchanged. Or an ONNX
            model: the path of a ``.onnx`` file, an ``onnx.ModelProto`` or an ``onnx_ir.Model``; its blocks are
            replaced in its own graph, and what is returned is called with the graph's inputs, by name or in order.
            Or the path of a Hugging Face directory with safetensors files, which is streamed: no more than two of its
            layers are in memory at a time.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments;
            None where they can be inferred (a Hugging Face model, a block with one argument, an ONNX model).
        backend: "torch", "onnxruntime" or "tensorrt", or one that an installed package brings. TensorRT's builds for
            ``target``, like "sm_89", on any machine. None means "torch", and "onnxruntime" for an ONNX model.
        options: a frozen :class:`moeopt.Options`; any of its fields may be a keyword here instead.
        out: a directory that gets the bundle, as :meth:`Optimized.save` writes it. A directory is streamed into it, and
            a run that was killed goes on where it stopped when it is started again.
        task: what the model of a directory is for, in transformers' words ("text-generation"); None means what its
            config says.
        trust_remote_code: run the Python code that a directory brings.

    Returns:
        :class:`Optimized`. A block that was not rewritten is in its report with the reason.

    Raises:
        UsageError: an unknown backend or option, a model or inputs of the wrong kind.
        CaptureError: the model does not run on the inputs.
        NotSaveableError: the model has no form as an engine of that backend; the message names what is in the way.
        EngineBuildError: TensorRT's builder refused the graph, crashed, hung or took too much memory.
        CheckpointError: files of a directory are missing, damaged, or of another model.
    """
    check_no_arguments(model, fields)
    chosen = Options.from_fields(options, fields)
    if isinstance(model, (str, os.PathLike)) and not is_onnx(model):
        return optimize_directory(model, example_inputs, backend or "torch", chosen, out, task, trust_remote_code)
    if task is not None or trust_remote_code:
        raise UsageError(
            f"task= and trust_remote_code= say how a directory is opened, and model is a {type(model).__name__}: leave "
            "them out"
        )
    if out is not None:
        check_destination(out, chosen.verify != "off")
    if is_onnx(model):
        made = optimize_file(model, example_inputs, backend or "onnxruntime", chosen)
    else:
        made = optimize_module(model, example_inputs, backend or "torch", chosen)
    if out is not None:
        made.save(out)
    return made


def explain(
    model: PyObject,
    example_inputs: PyObject = None,
    *,
    options: Options | None = None,
    task: str | None = None,
    trust_remote_code: bool = False,
    **fields: PyObject,
) -> Report:
    """A dry run of :func:`optimize`: what would be rewritten, what not, and why. Nothing is kept.

    Of a directory, one layer of each kind is read; the report says for which layers it stands. ``task`` and
    ``trust_remote_code`` are as in :func:`optimize`.
    """
    chosen = dataclasses.replace(Options.from_fields(options, fields), inplace=False)
    if not isinstance(model, (str, os.PathLike)) or is_onnx(model):
        return optimize(model, example_inputs, options=chosen, task=task, trust_remote_code=trust_remote_code).report
    return explain_directory(model, example_inputs, chosen, task, trust_remote_code)


def load(
    directory: str | os.PathLike[str],
    device: PyObject = None,
    *,
    session_options: JsonValue = None,
    limits: LoadLimits | None = None,
    mapped: bool = False,
    resident: str | float | None = None,
) -> PyObject:
    """An engine from a bundle; call it as the model was called.

    Args:
        directory: what :meth:`Optimized.save` wrote.
        device: where it shall run, like ``"cuda"``, or a provider's name for an ONNX Runtime bundle; None means
            where it was saved.
        session_options: an ``onnxruntime.SessionOptions`` (threads, arenas, profiling) for an ONNX Runtime bundle.
        limits: the time and memory that a bundle may take; None means ``LoadLimits()``, whose defaults grow with the
            bundle's files.
        mapped: on a CPU, weights stay pages of the bundle's file, which the kernel reads when they are used and drops
            when memory is wanted; never a second copy of them. An engine of PyTorch does so in any case.
        resident: how much of the experts' weights may be in memory, like ``"8GB"`` or a number of bytes, for a bundle
            of PyTorch on a CPU: those that tokens choose most stay, others are read when the router chose them, before
            the experts run. For an ONNX Runtime bundle, how much of all weights stays in memory between calls: those
            that calls used most. ``engine.residency`` tells the hit rate, the bytes read and the seconds that it took.

    An ONNX Runtime bundle that was built for a provider which this machine lacks (``target=``) loads, and raises
    ``EngineNotExecutableError`` when it is called; ``device="cpu"`` runs its CPU fallback graph. A TensorRT bundle does
    so where there is no such GPU, or another version of TensorRT; "nv_tensorrt_rtx" or "tensorrt" as ``device`` run its
    ONNX form through that provider of ONNX Runtime.

    An ONNX Runtime bundle tests itself when a process first loads it: each kind of block on a question with a
    known answer, then the golden inputs. A block that answers wrongly here is lowered otherwise, with an
    ``EngineFallbackWarning``.

    Raises:
        BundleError: it is damaged, hostile or from a newer moeopt; the message names the file and the reason. A
            ``LimitError`` where it takes more than ``limits``.
        UsageError: this machine lacks the device or provider.
        EngineNotExecutableError: this machine's runtime cannot run it rightly.
        NotEquivalentError: its golden inputs come back otherwise than they were verified to.
    """
    check_variables()
    if not isinstance(directory, (str, os.PathLike)):
        kind = type(directory).__name__
        saved = ": it is called as it is, and .save(directory) writes a bundle" * isinstance(directory, Optimized)
        raise UsageError(f"moeopt.load takes the directory of a bundle, a string or a path, and no {kind}{saved}")
    limits = checked_limits(limits)
    most = None if resident is None else as_bytes("resident", resident)
    return registry.open_bundle(directory, device, session_options, limits, mapped, most)


def verify(
    subject: Optimized | str | os.PathLike[str],
    *,
    original: PyObject = None,
    inputs: PyObject = None,
    provider: str | None = None,
    limits: LoadLimits | None = None,
) -> Certificate:
    """Check again that an optimised model or a bundle computes what it should.

    Args:
        subject: what :func:`optimize` returned, or a bundle's directory.
        original: the model to compare with, or the ONNX model that it was made of; a bundle without one is compared
            with its golden outputs.
        inputs: other inputs to compare on, in the forms of ``optimize``.
        provider: what to run a bundle on, "cpu", "cuda", ...; None means where it was saved, or, for an ONNX
            Runtime bundle, "cpu". One that was built for another provider and not executed runs there where that
            provider is, and else is replayed on CPU: the certificate's ``executed`` is then False.
        limits: the time and memory that a bundle may take, as in :func:`load`.

    Raises:
        UsageError: an Optimized without ``original``; an absent provider.
        BundleError: the bundle is damaged.
    """
    check_variables()
    limits = checked_limits(limits)
    if is_onnx(original):
        if not isinstance(subject, Optimized):
            return registry.of_bundle(subject).verify(subject, provider, original, inputs, limits)
        backend = registry.get(subject.report.backend)
        return backend.verify_file(original, inputs, backend.runner(subject.model)[0], subject.certificate)
    check_original(original)
    if not isinstance(subject, Optimized):
        call = None if original is None or inputs is None else without_cache(original, as_call(inputs))
        return registry.of_bundle(subject).verify(subject, provider, original, call, limits)
    return verify_optimized(subject, original, inputs)


__all__ = ["CaptureError", "Optimized", "explain", "load", "optimize", "verify"]
