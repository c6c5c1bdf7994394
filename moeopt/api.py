"""What people call: ``optimize``, ``explain``, ``load``, ``verify`` and the ``Optimized`` they get."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeopt.backends.onnxrt.build import Built, build_onnx, onnx_plan
from moeopt.backends.onnxrt.bundle import load_onnx_bundle, replay_golden, save_onnx_bundle
from moeopt.backends.onnxrt.check_routers import Routed, check_blocks
from moeopt.backends.onnxrt.engine import GraphEngine, OnnxEngine
from moeopt.backends.onnxrt.expert_ids import count_ids
from moeopt.backends.onnxrt.offline_engine import AbsentEngine
from moeopt.backends.onnxrt.open_engine import onnx_to_verify, open_onnx, trt_to_verify
from moeopt.backends.onnxrt.plan import Plan
from moeopt.backends.onnxrt.session import GRAPH, PORTABLE
from moeopt.backends.onnxrt.ties import Ties, tie_note
from moeopt.backends.tensorrt.build_engine import TrtBuilt, build_trt
from moeopt.backends.tensorrt.bundle import load_trt_bundle, save_trt_bundle
from moeopt.backends.tensorrt.engine_plan import EnginePlan, most_tokens, trt_plan
from moeopt.backends.tensorrt.target import local_target
from moeopt.backends.torch.bundle import load_torch_bundle, save_torch_bundle, verify_torch_bundle
from moeopt.bundle.fingerprint import fingerprint
from moeopt.bundle.holds import notes_on_sizes
from moeopt.bundle.manifest import Manifest, read_backend, read_manifest
from moeopt.capture.shared_copy import shared_copy
from moeopt.capture.tape import clone_inputs
from moeopt.causal_lm.chunked_cases import causal_calls
from moeopt.errors import BundleError, CaptureError, NotEquivalentError, NotSaveableError, UsageError
from moeopt.find.example_inputs import Call, as_call, in_order, made_up
from moeopt.limits import DEFAULT, LoadLimits
from moeopt.lower.export import export_program
from moeopt.lower.other_sizes import sizes_to_try
from moeopt.lower.plain import open_dataclasses
from moeopt.lower.surprise import surprises, told
from moeopt.options import Options
from moeopt.patches import fewer_collections
from moeopt.pipeline import run as pipeline
from moeopt.pipeline.block import OwnForward, pass_manager
from moeopt.pipeline.check_gradients import check_gradients
from moeopt.pipeline.diagram import picture
from moeopt.pipeline.enclosing import with_router
from moeopt.report import BlockReport, Report
from moeopt.rewrite.install import install, rewritten_forward, uninstall, watch_source
from moeopt.verification.block import BlockCheck
from moeopt.verification.certificate import Certificate
from moeopt.verification.language import find_ids
from moeopt.verification.model import EndToEnd, OriginalRuns, end_to_end, run_plain
from moeopt.verification.pins import RoutingLog
from moeopt.verification.ties import exactly_tied
from moeopt.verification.unusual import unusual_calls

BACKENDS = ("torch", "onnxruntime", "tensorrt")
_REPORT = "keep the live model of backend='torch', or report this with the model's code"


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
        if self._built is not None:
            save: Any = save_trt_bundle if isinstance(self._built, TrtBuilt) else save_onnx_bundle
            with open_dataclasses(self._call), surprises("saving the engine", _REPORT, NotSaveableError):
                return save(self.model, self._built, directory, self.report, self.certificate, self._call, self._source)
        with open_dataclasses(self._call), surprises("saving the model", _REPORT, NotSaveableError):
            return self._save_program(directory)

    def _save_program(self, directory: str | os.PathLike[str]) -> Path:
        args, kwargs = self._call
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
    pass_manager(chosen, None)  # raises where a pass is named that is none
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r} is not available; use one of {', '.join(map(repr, BACKENDS))}")
    plan: Plan | EnginePlan | None = None
    if backend != "torch":
        plan = onnx_plan(chosen) if backend == "onnxruntime" else trt_plan(chosen)
        if chosen.device is None and _runs_on_gpu(plan):  # the original is compared where the engine runs
            chosen = dataclasses.replace(chosen, device=torch.device("cuda"))
    given = _as_model(model)
    source = _without_rewrites(given, chosen.inplace)
    call = made_up(source, chosen.seed) if example_inputs is None else in_order(source, as_call(example_inputs))
    if chosen.device is not None or chosen.dtype is not None:
        source = source if chosen.inplace else copy.deepcopy(source)
        source = source.to(device=chosen.device, dtype=chosen.dtype)
        call = _moved(call, chosen)
    twin = shared_copy(source)
    if plan is not None:
        with open_dataclasses(call):
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
    if twin is not given:
        watch_source(given, twin, values=source is not given and (chosen.device, chosen.dtype) != (None, None))
    report = _report(source, outcome.blocks, backend, outcome, certificate, chosen)
    return Optimized(twin, report, certificate, call)


def _report(
    source: nn.Module, blocks: list[BlockReport], backend: str, outcome: pipeline.Outcome, certificate: Certificate,
    options: Options,
) -> Report:  # fmt: skip
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
    return Report(
        tuple(blocks), type(source).__name__, backend, outcome.seconds, tuple(notes), graph, certificate,
        tuple(outcome.passes), options.print_passes,
    )  # fmt: skip


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
    alone = _check_routers(source, twin, runner, form, outcome, plan, options)
    end = _compare_engine(source, twin, runner, form, call, outcome, options)
    moved = sum(case.ties for check in outcome.checks for case in check.cases if case.name.endswith(runner.runtime))
    ties = tie_note(twin, call, runner.runtime, None if end is None else moved, 0 if end is None else end.ties)
    on_routing = [*alone, ties] if ties else alone
    first = next(source.parameters(), None)
    certificate = Certificate(
        blocks=outcome.checks,
        end_to_end=end,
        level=options.verify,
        executed=runner is engine,
        device=device,
        dtype=str(first.dtype).removeprefix("torch.") if first is not None else "",
        notes=[*plan.notes, *notes_on_sizes(form.signature), *on_routing],
    )
    blocks = [
        dataclasses.replace(b, lowering=_lowering(b, built)) if b.status == "rewritten" else b for b in outcome.blocks
    ]
    backend = "tensorrt" if isinstance(plan, EnginePlan) else "onnxruntime"
    report = _report(source, blocks, backend, outcome, certificate, options)
    report = dataclasses.replace(report, notes=(*report.notes, *notes, *notes_on_sizes(form.signature), *on_routing))
    return Optimized(engine, report, certificate, call, fingerprint(source), built)


def _check_routers(
    source: nn.Module, twin: nn.Module, engine: GraphEngine, built: Built, outcome: pipeline.Outcome,
    plan: Plan | EnginePlan, options: Options,
) -> list[str]:  # fmt: skip
    """Each kind of block on ONNX Runtime with its router, in strict mode; notes for the report and the certificate."""
    if options.verify != "strict" or not isinstance(engine, OnnxEngine) or not isinstance(plan, Plan):
        return []
    options.say("running the blocks' routers on the runtime")
    blocks = []
    for path, rewrite in outcome.rewrites.items():
        around = with_router(path, outcome.calls)
        if around is not None and (around[0] or engine.causal_lm is None):
            experts = max(len(found.experts) for found in rewrite.found)
            blocks.append(Routed(around[0], outcome.calls[around[0]], around[1], experts, rewrite.check))
    return check_blocks(lambda p: OwnForward(source.get_submodule(p)), twin, blocks, built, plan, options.seed)


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
    left_out: list[str] = []
    if options.verify == "strict" and not narrow:
        ids = find_ids(args, kwargs)
        if engine.causal_lm is None:
            others, left_out = sizes_to_try(engine.signature, call)
            runs += [("another size", one, engine) for one in others if engine.holds(one)]
            left_out += [
                f"{_shapes(one)}: no profile of the engine holds them" for one in others if not engine.holds(one)
            ]
        elif ids is not None:
            runs += [(what, ((), one), form) for what, one, form in causal_calls(engine.causal_lm, kwargs, ids)]
    unusual = unusual_calls((args, kwargs)) if options.verify == "strict" else []
    runs += [(what, one, engine) for what, one in unusual if engine.holds(one)]
    ties = _ties(twin, engine, built, noise, options.seed)
    declined = any(b.kind == "moe" and b.status == "declined" for b in outcome.blocks)
    also_tied: list[str] = []
    verdicts = []
    for what, one, form in runs:
        try:
            run_plain(source, *one)
        except Exception as err:
            if not what:
                raise
            left_out.append(f"{_shapes(one)}: the model itself does not take them ({told(err)})")
            continue
        steps = 0 if what else 8
        whole = ties is not None and form in (engine, engine.causal_lm)
        otherwise = functools.partial(ties.compare, one) if whole and ties is not None else None
        verdict = end_to_end(
            source, form, *one, noise_blocks=noise, seed=options.seed, greedy_steps=steps, otherwise=otherwise
        )
        if not verdict.passed and what in dict(unusual) and declined:
            log = RoutingLog()
            with log:
                run_plain(source, *one)
            if exactly_tied(log.events):
                also_tied.append(what)
                continue
        verdicts.append((what, one, verdict))
    first_of = ""
    for what, one, verdict in verdicts:
        if not verdict.passed:
            with contextlib.suppress(Exception):
                first_of = _ids(twin, engine, built, one)[2]
            way_out = "use backend='torch', or report this with the model's code"
            if source.training:
                way_out = "the model is in training mode, and may be random there: call model.eval() and optimise again"
            raise NotEquivalentError(
                f"the {engine.runtime} engine of {type(source).__name__} is not equivalent and was not kept: "
                f"{verdict.reason} (inputs of sizes {_shapes(one)}"
                f"{', ' + what if what.startswith('through') or what in dict(unusual) else ''}"
                f"{f'; the first other choice of experts: {first_of}' if first_of else ''}); {way_out}"
            )
    first = verdicts[0][2]
    try:
        first.ids, first.ids_differ, first_of = _ids(twin, engine, built, verdicts[0][1])
    except Exception as err:  # ONNX Runtime's own: the count must not fail an engine that is right
        first_of = ""
        first.notes.append(f"expert ids were not compared: {type(err).__name__}: {err}")
    if first_of and not first.ties:
        first.notes.append(f"the result stays within its budget although some experts differ; the first is {first_of}")
    equal = sum(what == "another size" for what, *_ in verdicts)
    if equal:
        first.notes.append(f"equal in {equal} other sizes too")
    also = [what for what, *_ in verdicts[1:] if what != "another size"]
    if also:
        first.notes.append(f"equal with {', '.join(also)} too")
    first.notes += [f"not compared in the sizes {line}" for line in left_out]
    if narrow and options.verify == "strict":
        first.notes.append(
            "compared end to end in no other size: 16-bit routers tie often; blocks were, each by itself"
        )
    for what in also_tied:
        first.notes.append(f"with {what} nothing can be told: a block that was declined chooses between equal scores")
    first.notes += [note for _, _, verdict in verdicts[1:] for note in verdict.notes if "not judged" in note]
    return first


def _shapes(call: Call) -> str:
    leaves = torch.utils._pytree.tree_leaves(call)
    return ", ".join(str(tuple(leaf.shape)) for leaf in leaves if isinstance(leaf, torch.Tensor))


def _ties(twin: nn.Module, engine: GraphEngine, built: Built, noise: list[str], seed: int) -> Ties | None:
    """What compares once more where ``engine`` broke ties otherwise; only ONNX Runtime tells its expert ids."""
    if not isinstance(engine, OnnxEngine):
        return None
    graph, form = (GRAPH, built) if built.portable is None else (PORTABLE, built.portable)
    return Ties(twin, engine, graph, form.sites, noise, seed)


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
    outcome.passes = [
        r.reverted(f"the whole model was not equivalent: {why}") if r.fired else r for r in outcome.passes
    ]
    outcome.checks, outcome.rewrites = [], {}
    return f"{', '.join(reverted)} was rewritten and reverted, for the whole model was not equivalent: {why}"


def explain(model: Any, example_inputs: Any = None, *, options: Options | None = None, **fields: Any) -> Report:
    """A dry run of :func:`optimize`: what would be rewritten, what not, and why. Nothing is kept."""
    chosen = dataclasses.replace(Options.from_fields(options, fields), inplace=False)
    return optimize(model, example_inputs, options=chosen).report


def load(
    directory: str | os.PathLike[str],
    device: Any = None,
    *,
    session_options: Any = None,
    limits: LoadLimits | None = None,
) -> Any:
    """An engine from a bundle; call it as the model was called.

    Args:
        directory: what :meth:`Optimized.save` wrote.
        device: where it shall run, like ``"cuda"``, or a provider's name for an ONNX Runtime bundle; None means
            where it was saved.
        session_options: an ``onnxruntime.SessionOptions`` (threads, arenas, profiling) for an ONNX Runtime bundle.
        limits: the time and memory that a bundle may take; None means ``LoadLimits()``, whose defaults grow with the
            bundle's files.

    An ONNX Runtime bundle that was built for a provider which this machine lacks (``target=``) loads, and raises
    ``EngineNotExecutableError`` when it is called; ``device="cpu"`` runs its portable form. A TensorRT bundle does so
    where there is no such GPU, or another version of TensorRT; "nv_tensorrt_rtx" or "tensorrt" as ``device`` run its
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
    limits = limits or DEFAULT
    backend = read_backend(directory)
    if backend != "torch":
        loads: Any = load_trt_bundle if backend == "tensorrt" else load_onnx_bundle
        return loads(directory, device, session_options=session_options, limits=limits)
    if session_options is not None:
        raise UsageError(f"session_options are ONNX Runtime's, and {directory} is a bundle for PyTorch: leave them out")
    return load_torch_bundle(directory, device, limits)


def verify(
    subject: Optimized | str | os.PathLike[str],
    *,
    original: nn.Module | None = None,
    inputs: Any = None,
    provider: str | None = None,
    limits: LoadLimits | None = None,
) -> Certificate:
    """Check again that an optimised model or a bundle computes what it should.

    Args:
        subject: what :func:`optimize` returned, or a bundle's directory.
        original: the model to compare with; a bundle without one is compared with its golden outputs.
        inputs: other inputs to compare on, in the forms of ``optimize``.
        provider: what to run a bundle on, "cpu", "cuda", ...; None means where it was saved, or, for an ONNX
            Runtime bundle, "cpu". One that was built for another provider and not executed runs there where that
            provider is, and else is replayed on CPU: the certificate's ``executed`` is then False.
        limits: the time and memory that a bundle may take, as in :func:`load`.

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
        otherwise = None
        if isinstance(runner, OnnxEngine) and isinstance(subject._built, Built):
            built = subject._built
            otherwise = _told_from_ties(original, call, lambda twin: _ties(twin, runner, built, noise, 0))
        end = end_to_end(original, runner, *call, noise_blocks=noise, otherwise=otherwise)
        device = subject.certificate.device
        return Certificate(end_to_end=end, executed=not absent, dtype=subject.certificate.dtype, device=device)
    return _verify_bundle(Path(subject), original, inputs, provider, limits or DEFAULT)


def _verify_bundle(
    path: Path, original: nn.Module | None, inputs: Any, provider: str | None, limits: LoadLimits
) -> Certificate:
    manifest = read_manifest(path)
    try:
        saved = Certificate.from_json(manifest.read_text("certificate.json"))
    except BundleError as err:
        raise BundleError(f"{path}: {err}") from None
    if original is not None and inputs is None:
        raise UsageError("verify(bundle, original=...) needs inputs= to run both on")
    engine: Any
    executed = True
    if manifest.backend != "torch":
        ask = trt_to_verify if manifest.backend == "tensorrt" else onnx_to_verify
        engine, executed, device = ask(path, provider, limits)
        notes = list(engine.notes)
    else:
        engine = load_torch_bundle(path, None if provider is None else _provider_device(provider), limits)
        device, notes = str(engine.device), []
    if original is not None:
        args, kwargs = as_call(inputs)
        if getattr(engine, "causal_lm", None) is not None:
            kwargs = {**kwargs, "use_cache": False}  # the cache is compared by what comes of it
        noise, otherwise = _noisy(original, manifest), None
        if isinstance(engine, OnnxEngine):
            otherwise = _told_from_ties(original, (args, kwargs), lambda twin: Ties.of_bundle(twin, engine, noise))
        end = end_to_end(original, engine, args, kwargs, noise_blocks=noise, otherwise=otherwise)
        return Certificate(end_to_end=end, executed=executed, device=device, dtype=saved.dtype, notes=notes)
    if manifest.backend != "torch":
        check = replay_golden(engine, limits)
    else:
        check = verify_torch_bundle(path, str(engine.device), limits)
    end = EndToEnd(
        check.passed, check.reason, outputs=check.runs, distance=float(check.required), budget=float(check.budget)
    )
    notes.append(f"{check.runs} golden runs, worst distance per token {check.required:.1e}, allowed {check.budget:.1e}")
    blocks: list[BlockCheck] = saved.blocks
    return Certificate(blocks, end, saved.level, executed, device, saved.dtype, notes=notes)


def _told_from_ties(
    original: nn.Module, call: Call, ties_of: Callable[[nn.Module], Ties | None]
) -> Callable[[OriginalRuns, Any], EndToEnd | None]:
    """What ``end_to_end`` asks where it fails: the blocks of ``original`` are rewritten only then."""

    def otherwise(runs: OriginalRuns, got: Any) -> EndToEnd | None:
        twin = shared_copy(original)
        pipeline.run(twin, call, Options(verify="off"))
        ties = ties_of(twin)
        return None if ties is None else ties.compare(call, runs, got)

    return otherwise


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
