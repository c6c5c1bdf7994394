"""What people call: ``optimize``, ``explain``, ``load``, ``verify`` and the ``Optimized`` they get."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeopt import pipeline
from moeopt.backends.onnxrt.plan import Plan
from moeopt.backends.onnxrt.session import GRAPH, PORTABLE
from moeopt.backends.tensorrt.target import local_target
from moeopt.compare.block import BlockCheck
from moeopt.compare.certificate import Certificate
from moeopt.compare.language import find_ids
from moeopt.compare.model import EndToEnd, end_to_end, run_plain
from moeopt.drive.collector import fewer_collections
from moeopt.drive.gradients import check_gradients
from moeopt.drive.inputs import Call, as_call, made_up
from moeopt.drive.picture import picture
from moeopt.drive.share import shared_copy
from moeopt.engine import (
    AbsentEngine,
    Manifest,
    fingerprint,
    load_onnx_bundle,
    load_torch_bundle,
    load_trt_bundle,
    read_backend,
    read_manifest,
    replay_golden,
    save_onnx_bundle,
    save_torch_bundle,
    save_trt_bundle,
    verify_torch_bundle,
)
from moeopt.engine.onnx_build import Built, build_onnx, onnx_plan
from moeopt.engine.onnx_engine import GraphEngine, OnnxEngine
from moeopt.engine.onnx_golden import other_sizes
from moeopt.engine.onnx_pieces import causal_calls
from moeopt.engine.onnx_routing import count_ids
from moeopt.engine.onnx_verify import onnx_to_verify, open_onnx, trt_to_verify
from moeopt.engine.program import export_program
from moeopt.engine.trt_build import TrtBuilt, build_trt
from moeopt.engine.trt_plan import EnginePlan, most_tokens, trt_plan
from moeopt.errors import CaptureError, NotEquivalentError, UsageError
from moeopt.ir.tape import clone_inputs
from moeopt.ops.native.library import missing
from moeopt.options import Options
from moeopt.report import BlockReport, Report
from moeopt.rewrite.program import install, rewritten_forward, uninstall

BACKENDS = ("torch", "onnxruntime", "tensorrt")


class Optimized:
    """A model and what was done to it. Call it as the model was called.

    Attributes:
        model: the optimised model. For backend "torch" it is of the user's own class, with the same
            ``state_dict`` keys, and shares its weights with the model that was given. For the others it is the
            engine, which holds its own weights.
        report: what was found, rewritten and declined, and why.
        certificate: how equal it is.

    Any other attribute is the model's own.
    """

    def __init__(
        self,
        model: Any,
        report: Report,
        certificate: Certificate,
        call: Call,
        source: dict[str, str] | None = None,
        built: Built | TrtBuilt | None = None,
    ) -> None:
        self.model, self.report, self.certificate = model, report, certificate
        self._call, self._source, self._built = call, source, built

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "model" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.model, name)

    def __repr__(self) -> str:
        done, all_ = len(self.report.rewritten), len(self.report.blocks)
        return f"<moeopt.Optimized {type(self.model).__name__}: {done} of {all_} blocks rewritten>"

    def __copy__(self) -> Optimized:
        return Optimized(self.model, self.report, self.certificate, self._call, self._source, self._built)

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimized:
        model = self.model if self._built is not None else copy.deepcopy(self.model, memo)  # an engine has no state
        return Optimized(model, self.report, self.certificate, self._call, self._source, self._built)

    def __getstate__(self) -> dict[str, Any]:
        if self._built is not None:
            raise UsageError(
                "an optimised model with an engine cannot be pickled: save it with .save(directory), and pickle what "
                "moeopt.load(directory) returns, or the directory's name"
            )
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write an engine bundle that runs and re-verifies itself without this model's code.

        Raises:
            NotSaveableError: the model cannot be exported; the message names the op in the way.
        """
        args, kwargs = self._call
        if self._built is not None:
            save: Any = save_trt_bundle if isinstance(self._built, TrtBuilt) else save_onnx_bundle
            return save(self.model, self._built, directory, self.report, self.certificate, self._call, self._source)
        program = export_program(self.model, args, kwargs)
        copied = clone_inputs(self._call)  # a forward may write into its arguments
        with torch.no_grad():
            golden = self.model(*copied[0], **copied[1])
        return save_torch_bundle(
            program,
            directory,
            report=self.report,
            certificate=self.certificate,
            golden_inputs=[(args, kwargs)],
            golden_outputs=[golden],
            source=fingerprint(self.model),
        )


def _as_model(model: Any) -> nn.Module:
    if isinstance(model, Optimized):
        raise UsageError("this model is optimised already; pass the original, or its .model after a change")
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model is a {type(model).__name__}; give an nn.Module, an fx.GraphModule or an ExportedProgram"
        )
    scripted = next((n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:  # no hook can be set on it, and a copy of it has weights of its own
        raise UsageError(
            f"{scripted or 'model'} is a TorchScript module, which can be neither watched nor copied with shared "
            "weights; give the Python modules, or optimise the submodule with the experts"
        )
    return model


def _without_rewrites(model: nn.Module, inplace: bool) -> nn.Module:
    """``model`` if it was not optimised before; else itself or a copy on the same weights, with its original code."""
    if not any(rewritten_forward(m) is not None for m in model.modules()):
        return model
    twin = model if inplace else shared_copy(model)
    for module in twin.modules():
        uninstall(module)
    return twin


def optimize(
    model: Any,
    example_inputs: Any = None,
    *,
    backend: str = "torch",
    options: Options | None = None,
    **fields: Any,
) -> Optimized:
    """Find every MoE block of ``model``, rewrite it into grouped-expert ops, and verify it.

    Args:
        model: an ``nn.Module``, ``fx.GraphModule`` or ``ExportedProgram``. It keeps working, unchanged.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments;
            None where they can be inferred (a Hugging Face model, a block with one argument).
        backend: "torch", "onnxruntime" or "tensorrt". The last builds for ``target``, like "sm_89", on any machine.
        options: a frozen :class:`moeopt.Options`; any of its fields may be a keyword here instead.

    Returns:
        :class:`Optimized`. A block that was not rewritten is in its report with the reason.

    Raises:
        UsageError: an unknown backend or option, a model or inputs of the wrong kind.
        CaptureError: the model does not run on the inputs.
        NotSaveableError: the model has no form as an engine of that backend; the message names what is in the way.
        EngineBuildError: TensorRT's builder refused the graph, crashed, hung or took too much memory.
    """
    chosen = Options.from_fields(options, fields)
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r} is not available; use one of {', '.join(map(repr, BACKENDS))}")
    plan: Plan | EnginePlan | None = None
    if backend != "torch":
        plan = onnx_plan(chosen) if backend == "onnxruntime" else trt_plan(chosen)
        if chosen.device is None and _runs_on_gpu(plan):  # the original is compared where the engine runs
            chosen = dataclasses.replace(chosen, device=torch.device("cuda"))
    source = _without_rewrites(_as_model(model), chosen.inplace)
    call = made_up(source, chosen.seed) if example_inputs is None else as_call(example_inputs)
    if chosen.device is not None or chosen.dtype is not None:
        source = source if chosen.inplace else copy.deepcopy(source)
        source = source.to(device=chosen.device, dtype=chosen.dtype)
        call = _moved(call, chosen)
    twin = shared_copy(source)
    if plan is not None:
        return _engine(source, twin, call, chosen, plan)
    outcome = pipeline.run(twin, call, chosen)
    if chosen.verify != "off":
        check_gradients(twin, outcome.rewrites, outcome.calls)
    certificate = _certify(source, twin, call, outcome, chosen)
    if certificate.passed is False:
        why = _revert(twin, outcome, certificate)
        certificate = _certify(source, twin, call, outcome, chosen)
        certificate.notes.append(why)
    elif chosen.inplace:
        for path, rewrite in outcome.rewrites.items():
            install(source.get_submodule(path), rewrite.program)
        twin = source
    report = _report(source, outcome.blocks, backend, outcome, certificate)
    return Optimized(twin, report, certificate, call)


def _report(
    source: nn.Module, blocks: list[BlockReport], backend: str, outcome: pipeline.Outcome, certificate: Certificate
) -> Report:
    """The report, with a picture of the first MoE block that was rewritten and stayed so."""
    kept = {b.name for b in blocks if b.status == "rewritten" and b.kind == "moe"}
    graph, notes = None, []
    for path, rewrite in outcome.rewrites.items():
        name = path or type(source).__name__
        if name in kept:
            try:
                graph = picture(name, rewrite, source.get_submodule(path))
            except Exception as err:  # a picture must not fail a model that was rewritten
                notes.append(f"{name} could not be drawn ({type(err).__name__}: {err})")
            break
    first = next(source.parameters(), None)
    if kept and backend == "torch" and first is not None and first.device.type == "cpu" and (why := missing()):
        notes.append(f"the experts run on torch's products, not on the faster native kernel: {why}")
    return Report(tuple(blocks), type(source).__name__, backend, outcome.seconds, tuple(notes), graph, certificate)


def _runs_on_gpu(plan: Plan | EnginePlan) -> bool:
    return plan.target == local_target() if isinstance(plan, EnginePlan) else plan.provider != "cpu"


def _engine(source: nn.Module, twin: nn.Module, call: Call, options: Options, plan: Plan | EnginePlan) -> Optimized:
    """An engine of ``twin``, each block verified as its lowering computes it, then the whole.

    Where the engine cannot run here, both verdicts are those of its portable form.
    """
    if isinstance(plan, EnginePlan):
        plan.most = most_tokens(call, options)
    outcome = pipeline.run(twin, call, options, plan)
    if isinstance(plan, EnginePlan) and plan.refusals:
        refused = next((b.name for b in outcome.blocks if b.kind == "moe" and b.status == "declined"), None)
        if refused is not None:
            raise UsageError(f"{refused}: {plan.refusals[0]}")
    engine: GraphEngine | AbsentEngine
    built: Built | TrtBuilt
    notes: list[str] = []
    with fewer_collections():
        if isinstance(plan, EnginePlan):
            built = build_trt(twin, *call, plan, options)
            engine, notes = built.opened(), [built.summary()]
        else:
            built = build_onnx(twin, *call, plan, options.say)
            engine = open_onnx(built, plan, options.session_options)
    runner: GraphEngine = engine.replay() if isinstance(engine, AbsentEngine) else engine
    device = engine.built_for if isinstance(engine, AbsentEngine) else engine.described
    form = built.graph if isinstance(built, TrtBuilt) else built
    end = _compare_engine(source, twin, runner, form, call, outcome, options)
    first = next(source.parameters(), None)
    certificate = Certificate(
        blocks=outcome.checks,
        end_to_end=end,
        level=options.verify,
        executed=runner is engine,
        device=device,
        dtype=str(first.dtype).removeprefix("torch.") if first is not None else "",
        notes=list(plan.notes),
    )
    blocks = [
        dataclasses.replace(b, lowering=_lowering(b, built)) if b.status == "rewritten" else b for b in outcome.blocks
    ]
    backend = "tensorrt" if isinstance(plan, EnginePlan) else "onnxruntime"
    report = _report(source, blocks, backend, outcome, certificate)
    report = dataclasses.replace(report, notes=(*report.notes, *notes))
    return Optimized(engine, report, certificate, call, fingerprint(source), built)


def _compare_engine(
    source: nn.Module, twin: nn.Module, engine: GraphEngine, built: Built, call: Call, outcome: pipeline.Outcome,
    options: Options,
) -> EndToEnd | None:  # fmt: skip
    """The verdict on the given call, expert ids counted; in strict mode the call in other sizes must agree too.

    Those other sizes are judged in float32 and wider only: a 16-bit router ties often, and each runtime breaks ties
    its own way. The blocks were verified in other sizes whatever the dtype is.
    """
    if options.verify == "off":
        return None
    options.say("comparing the engine end to end")
    args, kwargs = call
    if engine.causal_lm is not None:
        kwargs = {**kwargs, "use_cache": False}  # the cache is compared by what comes of it
    noise = [*_weighted(source), *outcome.rewrites]  # the runtime computes every op anew, so each may round
    narrow = any(p.dtype in (torch.float16, torch.bfloat16) for p in source.parameters())
    runs: list[tuple[str, Call, Callable[..., Any]]] = [("", (args, kwargs), engine)]
    if options.verify == "strict" and not narrow:
        ids = find_ids(args, kwargs)
        if engine.causal_lm is None:
            runs += [("another size", one, engine) for one in other_sizes(engine.signature, call) if engine.holds(one)]
        elif ids is not None:
            runs += [(what, ((), one), form) for what, one, form in causal_calls(engine.causal_lm, kwargs, ids)]
    verdicts = []
    for what, one, form in runs:
        try:
            run_plain(source, *one)
        except Exception:
            if not what:
                raise
            continue  # a size that the model itself cannot take
        steps = 0 if what else 8
        verdict = end_to_end(source, form, *one, noise_blocks=noise, seed=options.seed, greedy_steps=steps)
        verdicts.append((what, one, verdict))
    first_of = ""
    for what, one, verdict in verdicts:
        if not verdict.passed:
            sizes = [tuple(t.shape) for t in torch.utils._pytree.tree_leaves(one) if isinstance(t, torch.Tensor)]
            with contextlib.suppress(Exception):
                first_of = _ids(twin, engine, built, one)[2]
            way_out = "use backend='torch', or report this with the model's code"
            if source.training:
                way_out = "the model is in training mode, and may be random there: call model.eval() and optimise again"
            raise NotEquivalentError(
                f"the {engine.runtime} engine of {type(source).__name__} is not equivalent and was not kept: "
                f"{verdict.reason} (inputs of sizes {', '.join(map(str, sizes))}"
                f"{', ' + what if what.startswith('through') else ''}"
                f"{f'; the first other choice of experts: {first_of}' if first_of else ''}); {way_out}"
            )
    first = verdicts[0][2]
    try:
        first.ids, first.ids_differ, first_of = _ids(twin, engine, built, verdicts[0][1])
    except Exception as err:  # ONNX Runtime's own: the count must not fail an engine that is right
        first_of = ""
        first.notes.append(f"expert ids were not compared: {type(err).__name__}: {err}")
    if first_of:
        first.notes.append(f"the result stays within its budget although some experts differ; the first is {first_of}")
    also = [what for what, *_ in verdicts[1:]]
    if also and engine.causal_lm is None:
        first.notes.append(f"equal in {len(also)} other sizes too")
    elif also:
        first.notes.append(f"equal with {', '.join(also)} too")
    return first


def _ids(twin: nn.Module, engine: GraphEngine, built: Built, call: Call) -> tuple[int, int, str]:
    """Expert ids inside an engine that ONNX Runtime runs: compared, different, and where."""
    if not isinstance(engine, OnnxEngine):
        return 0, 0, ""
    graph, form = (GRAPH, built) if built.portable is None else (PORTABLE, built.portable)
    return count_ids(twin, engine, graph, form.sites, call)


def _lowering(block: BlockReport, built: Built | TrtBuilt) -> str:
    """What runs a block in the engine; a module that is called twice has a site for each call."""
    reasons = built.reasons if isinstance(built, Built) else built.graph.reasons
    sites = {name: name.split("#")[0] for name in reasons}
    own = block.name if block.name in sites.values() else "experts"  # the root module's sites have no path
    if isinstance(built, TrtBuilt):
        return built.lowering_of(own) or block.lowering
    found = {reasons[name] for name, path in sites.items() if path == own}
    return "onnxruntime " + "; ".join(sorted(found)) if found else block.lowering


def _moved(call: Call, options: Options) -> Call:
    def move(t: torch.Tensor) -> torch.Tensor:
        return t.to(device=options.device, dtype=options.dtype if t.is_floating_point() else None)

    moved: Call = torch.utils._pytree.tree_map_only(torch.Tensor, move, call)
    return moved


def _certify(source: nn.Module, twin: nn.Module, call: Call, outcome: Any, options: Options) -> Certificate:
    end: EndToEnd | None = None
    if options.verify != "off" and outcome.rewrites:
        (options.progress or (lambda line: None))("comparing the whole model end to end")
        end = end_to_end(source, twin, *call, noise_blocks=list(outcome.rewrites), seed=options.seed)
    first = next(source.parameters(), None)
    return Certificate(
        blocks=outcome.checks,
        end_to_end=end,
        level=options.verify,
        device=str(first.device) if first is not None else "cpu",
        dtype=str(first.dtype).removeprefix("torch.") if first is not None else "",
    )


def _revert(twin: nn.Module, outcome: pipeline.Outcome, certificate: Certificate) -> str:
    """A model that fails end to end goes back to its own code, block by block, with the reason; a note on it."""
    why = certificate.end_to_end.reason if certificate.end_to_end else "a block failed"
    for path in outcome.rewrites:
        uninstall(twin.get_submodule(path))
    reverted = [b.name for b in outcome.blocks if b.status == "rewritten"]
    outcome.blocks = [
        b
        if b.status == "declined"
        else dataclasses.replace(b, status="declined", reason=f"reverted: the whole model was not equivalent: {why}")
        for b in outcome.blocks
    ]
    outcome.checks, outcome.rewrites = [], {}
    return f"{', '.join(reverted)} was rewritten and reverted, for the whole model was not equivalent: {why}"


def explain(model: Any, example_inputs: Any = None, *, options: Options | None = None, **fields: Any) -> Report:
    """A dry run of :func:`optimize`: what would be rewritten, what not, and why. Nothing is kept."""
    chosen = dataclasses.replace(Options.from_fields(options, fields), inplace=False)
    return optimize(model, example_inputs, options=chosen).report


def load(directory: str | os.PathLike[str], device: Any = None, *, session_options: Any = None) -> Any:
    """An engine from a bundle; call it as the model was called.

    Args:
        directory: what :meth:`Optimized.save` wrote.
        device: where it shall run, like ``"cuda"``, or a provider's name for an ONNX Runtime bundle; None means
            where it was saved.
        session_options: an ``onnxruntime.SessionOptions`` (threads, arenas, profiling) for an ONNX Runtime bundle.

    An ONNX Runtime bundle that was built for a provider which this machine lacks (``target=``) loads, and raises
    ``EngineNotExecutableError`` when it is called; ``device="cpu"`` runs its portable form. A TensorRT bundle does so
    where there is no such GPU, or another version of TensorRT; "nv_tensorrt_rtx" or "tensorrt" as ``device`` run its
    ONNX form through that provider of ONNX Runtime.

    An ONNX Runtime bundle tests itself when a process first loads it: each kind of block on a question with a
    known answer, then the golden inputs. A block that answers wrongly here is lowered otherwise, with an
    ``EngineFallbackWarning``.

    Raises:
        BundleError: it is damaged, hostile or from a newer moeopt; the message names the file and the reason.
        UsageError: this machine lacks the device or provider.
        EngineNotExecutableError: this machine's runtime cannot run it rightly.
        NotEquivalentError: its golden inputs come back otherwise than they were verified to.
    """
    backend = read_backend(directory)
    if backend != "torch":
        loads: Any = load_trt_bundle if backend == "tensorrt" else load_onnx_bundle
        return loads(directory, device, session_options=session_options)
    if session_options is not None:
        raise UsageError(f"session_options are ONNX Runtime's, and {directory} is a bundle for PyTorch: leave them out")
    return load_torch_bundle(directory, device)


def verify(
    subject: Optimized | str | os.PathLike[str],
    *,
    original: nn.Module | None = None,
    inputs: Any = None,
    provider: str | None = None,
) -> Certificate:
    """Check again that an optimised model or a bundle computes what it should.

    Args:
        subject: what :func:`optimize` returned, or a bundle's directory.
        original: the model to compare with; a bundle without one is compared with its golden outputs.
        inputs: other inputs to compare on, in the forms of ``optimize``.
        provider: what to run a bundle on, "cpu", "cuda", ...; None means where it was saved, or, for an ONNX
            Runtime bundle, "cpu". One that was built for another provider and not executed runs there where that
            provider is, and else is replayed on CPU: the certificate's ``executed`` is then False.

    Raises:
        UsageError: an Optimized without ``original``; an absent provider.
        BundleError: the bundle is damaged.
    """
    if isinstance(subject, Optimized):
        if original is None:
            raise UsageError("verify(optimized) needs original=, the model to compare with")
        call = subject._call if inputs is None else as_call(inputs)
        names = [b.name for b in subject.report.rewritten]
        known = {n for n, _ in original.named_modules()}
        noise = [n if n in known else "" for n in names]
        absent = isinstance(subject.model, AbsentEngine)
        runner = subject.model.replay() if absent else subject.model
        if isinstance(runner, GraphEngine):
            noise += _weighted(original)
            if runner.causal_lm is not None:
                call = call[0], {**call[1], "use_cache": False}
        end = end_to_end(original, runner, *call, noise_blocks=noise)
        device = subject.certificate.device
        return Certificate(end_to_end=end, executed=not absent, dtype=subject.certificate.dtype, device=device)
    return _verify_bundle(Path(subject), original, inputs, provider)


def _verify_bundle(path: Path, original: nn.Module | None, inputs: Any, provider: str | None) -> Certificate:
    manifest = read_manifest(path)
    saved = Certificate.from_json((path / "certificate.json").read_text())
    if original is not None and inputs is None:
        raise UsageError("verify(bundle, original=...) needs inputs= to run both on")
    engine: Any
    executed = True
    if manifest.backend != "torch":
        ask = trt_to_verify if manifest.backend == "tensorrt" else onnx_to_verify
        engine, executed, device = ask(path, provider)
        notes = list(engine.notes)
    else:
        engine = load_torch_bundle(path, None if provider is None else _provider_device(provider))
        device, notes = str(engine.device), []
    if original is not None:
        args, kwargs = as_call(inputs)
        if getattr(engine, "causal_lm", None) is not None:
            kwargs = {**kwargs, "use_cache": False}  # the cache is compared by what comes of it
        end = end_to_end(original, engine, args, kwargs, noise_blocks=_noisy(original, manifest))
        return Certificate(end_to_end=end, executed=executed, device=device, dtype=saved.dtype, notes=notes)
    if manifest.backend != "torch":
        check = replay_golden(engine)
    else:
        check = verify_torch_bundle(path, str(engine.device))
    end = EndToEnd(
        check.passed, check.reason, outputs=check.runs, distance=float(check.required), budget=float(check.budget)
    )
    notes.append(f"{check.runs} golden runs, worst distance per token {check.required:.1e}, allowed {check.budget:.1e}")
    blocks: list[BlockCheck] = saved.blocks
    return Certificate(blocks, end, saved.level, executed, device, saved.dtype, notes=notes)


def _weighted(model: nn.Module) -> list[str]:
    """The modules that hold weights themselves."""
    return [n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]


def _noisy(original: nn.Module, manifest: Manifest) -> list[str]:
    """Whose rounding explains a difference: the rewritten blocks; for an engine, every module that has weights."""
    if manifest.backend != "torch":
        return _weighted(original)
    known = {n for n, _ in original.named_modules()}
    return [b["name"] if b["name"] in known else "" for b in manifest.data["blocks"]]


def _provider_device(provider: str) -> str:
    name = provider.lower().removesuffix("executionprovider")
    usable: dict[str, Callable[[], bool]] = {"cpu": lambda: True, "cuda": torch.cuda.is_available}
    if name not in usable or not usable[name]():
        there = ", ".join(n for n, ok in usable.items() if ok())
        raise UsageError(f"provider {provider!r} is not on this machine; it has: {there}")
    return name


__all__ = ["CaptureError", "Optimized", "explain", "load", "optimize", "verify"]
