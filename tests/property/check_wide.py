"""The check of one wide program on one backend: ``check_wide(Program(...), "onnxruntime")`` runs a failure again."""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import moeopt
from tests.helpers import run
from tests.property import configs, unlike
from tests.property.build import build
from tests.property.law import Reference, complaints, moved_ties, reference
from tests.property.spec import Program

CEILING = 1.0
"""A verdict with a budget as large as the numbers themselves would allow anything."""


def check_wide(p: Program, backend: str, *, saved: bool = False, verify: str = "fast") -> str:
    """The law on one program: raises AssertionError with every complaint, or returns what was done.

    Returns ``refused: why`` where optimize raises a MoeoptError, ``not runnable`` where the original takes no
    call, else ``declined`` or ``rewritten``. ``saved``: the bundle, and on ``onnxruntime`` its plain graph, obey too.
    """
    original, model, oracle = build(p), build(p), build(p).double()
    calls = {name: call for name, call in unlike.calls(p, original).items() if takes(original, call)}
    if "example" not in calls:
        return "not runnable"
    references = {name: reference(p, original, oracle, call) for name, call in calls.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opt = moeopt.optimize(model, calls["example"], backend=backend, verify=verify)
        except moeopt.MoeoptError as refusal:
            assert backend != "torch" or isinstance(refusal, moeopt.UsageError), f"torch refused: {refusal}"
            assert len(str(refusal)) > 20, f"the refusal says nothing: {refusal!r}"
            return f"refused: {type(refusal).__name__}: {' '.join(str(refusal).split())[:200]}"
    blocks = [b for b in opt.report.blocks if b.kind == "moe"]
    found = [f"block {b.name} is declined without a reason" for b in blocks if b.status == "declined" and not b.reason]
    if opt.certificate.end_to_end is not None and not opt.certificate.end_to_end.budget < CEILING:
        found.append(f"the end-to-end budget is {opt.certificate.end_to_end.budget:.1e}, which allows anything")
    notes = said(opt)
    # a rewritten module runs the original's own router on the same rows, so its ties must go the same way
    aside = backend != "torch" or p.around.layers > 1
    found += judge(opt, calls, references, notes, "", aside)
    if p.config and backend == "torch":
        found += follows(p, opt)
    if saved:
        found += judge_bundle(p, opt, calls, references, notes, backend, aside)
    assert not found, "\n".join([repr(p), *found])
    return "rewritten" if any(b.status == "rewritten" for b in blocks) else "declined"


def takes(original: nn.Module, call: tuple[torch.Tensor, ...]) -> bool:
    """Whether the program itself runs on a call: hidden states of a size, or a mask, that its code does not expect."""
    try:
        run(original, (call, {}))
    except (RuntimeError, IndexError, ValueError):
        return False
    return True


def said(opt: Any) -> str:
    """All notes of the report and the certificate."""
    return "\n".join([*opt.report.notes, *opt.certificate.notes])


def judge(opt: Any, calls: dict, references: dict[str, Reference], notes: str, where: str, aside: bool) -> list[str]:
    """The complaints about all calls of one engine; ``aside``: tied tokens may have other experts, which is said."""
    found = []
    for name, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = run(opt, (call, {}))
        except moeopt.MoeoptError as refusal:  # another way to call, or a size that the engine is not for
            if name in ("example", "other") or len(str(refusal)) <= 20:
                found.append(f"{where}{name}: the call is refused: {refusal}")
            continue
        wrong = complaints(got, references[name], set_aside=aside)
        found += [f"{where}{name}: {line}" for line in wrong]
        moved = moved_ties(got, references[name])
        if moved and " tie" not in notes:
            found.append(f"{where}{name}: {moved} tied tokens go to other experts, and no note speaks of ties")
    return found


def follows(p: Program, opt: Any) -> list[str]:
    """After a change of the configuration the twin gives the changed model's numbers, with a warning or without."""
    found = []
    for name, value in configs.changes(p):
        before = configs.read(configs.make_config(p), name)
        changed, call = build(p), unlike.calls(p, build(p))["other"]
        configs.change(changed, name, value)
        configs.change(opt.model, name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", moeopt.errors.StaleModelWarning)
            try:
                got = run(opt, (call, {}))
            except moeopt.MoeoptError as refusal:
                found.append(f"config.{name} = {value!r}: the call is refused: {refusal}")
                continue
            finally:
                configs.change(opt.model, name, before)
        wrong = complaints(got, reference(p, changed, oracle_of(changed), call), set_aside=False)
        found += [f"config.{name} = {value!r}: {line}" for line in wrong]
    return found


def oracle_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def judge_bundle(
    p: Program,
    opt: Any,
    calls: dict,
    references: dict[str, Reference],
    notes: str,
    backend: str,
    aside: bool,
) -> list[str]:
    """Saved and loaded, the numbers are as right; so are those of the graph in plain ONNX Runtime, or it refuses."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opt.save(Path(folder) / "bundle")
        except moeopt.NotSaveableError as refusal:
            return [] if len(str(refusal)) > 20 else [f"the refusal to save says nothing: {refusal!r}"]
        try:
            loaded = moeopt.load(Path(folder) / "bundle")
        except moeopt.MoeoptError as refusal:
            return [f"load refuses what save wrote: {refusal}"]
        found = judge(loaded, calls, references, notes, "loaded, ", aside)
        if backend == "onnxruntime" and p.dtype != "bfloat16":  # numpy has no bfloat16
            found += judge(Plain(Path(folder) / "bundle" / "model.onnx"), calls, references, notes, "plain, ", aside)
    return found


class Plain:
    """A bundle's graph as the README offers it: in an onnxruntime session of the reader's own."""

    def __init__(self, path: Path):
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def __call__(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        entries = self.session.get_inputs()
        if len(entries) != len(args):
            raise moeopt.UsageError(f"the graph has {len(entries)} inputs, and the call {len(args)} arguments")
        try:
            feed = {entry.name: t.contiguous().numpy() for entry, t in zip(entries, args, strict=True)}
            return tuple(torch.from_numpy(value) for value in self.session.run(None, feed))
        except Exception as refusal:  # a graph that refuses a size tells its user
            raise moeopt.UsageError(f"onnxruntime refuses the call: {refusal}") from refusal
