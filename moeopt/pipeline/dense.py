"""Dense FFNs of a model: read for the report, split into groups, or fused where it pays; one home module at a time.

A home is the innermost module whose forward holds both products: a Llama MLP, a BERT layer. All FFNs of
one home are rewritten together, or none is.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from moeopt.capture.probe_inputs import call_specs, probe_call
from moeopt.capture.tape import record
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import Declined, UsageError
from moeopt.find.block_candidates import BlockCandidate
from moeopt.options import Options
from moeopt.passes.base import PassRecord
from moeopt.passes.fuse_dense_ffn import FuseDenseFFN, fuse
from moeopt.passes.manager import PassManager
from moeopt.passes.split_dense_ffn import SplitDenseFFN, split
from moeopt.pipeline.autotune import pays
from moeopt.pipeline.block import Rewrite, Runtime, rewrite_block
from moeopt.pipeline.dense_forms import DenseReader, Measured, groups_of, in_words, measured, read_dense
from moeopt.rewrite.install import install

ENGINE = (
    "left as it is: an engine has weights of its own and packs them itself; on ONNX Runtime's CPU provider one product "
    "for gate and up took 0.97 to 1.04 times as long as two (benchmarks/dense.py)"
)


@dataclass
class DenseResult:
    """What became of one dense FFN: its rewritten module's path and rewrite, or the reason it was left.

    ``lowering`` is how it runs now, in words; ``records`` what the passes did to it.
    """

    path: str
    rewrite: Rewrite | None = None
    reason: str = ""
    where: str = ""
    seconds: float = 0.0
    lowering: str = ""
    records: Sequence[PassRecord] = ()


def check_groups(places: list[BlockCandidate], options: Options) -> None:
    """Raise a ``UsageError`` where ``options`` asks for groups that no FFN has, before anything is rewritten."""
    groups, inner = options.experts or 1, {p.call.path: p.candidates[0].out.matrices[0].k for p in places}
    most = max(inner.values(), default=groups)
    if groups > most:
        raise UsageError(f"experts={groups}: the widest dense FFN of the model has {most} neurons; give at most that")
    for pattern, lists in options.groups.items() if isinstance(options.groups, Mapping) else ():
        meant = {path: size for path, size in inner.items() if fnmatch.fnmatch(path, pattern)}
        if not meant:
            raise UsageError(
                f"groups[{pattern!r}] matches no dense FFN; they are in {', '.join(sorted(map(repr, inner))) or 'none'}"
            )
        for path, size in meant.items():
            if {n for group in lists for n in group} != set(range(size)):
                raise UsageError(
                    f"groups[{pattern!r}]: {path or 'the model'} has neurons 0 to {size - 1}; each must be in one group"
                )


def function_of(module: nn.Module, call: ArgsKwargs, place: BlockCandidate, seed: int) -> str:
    """The function of a dense FFN in words; "" where a few made-up tokens do not show it."""
    for call_spec in call_specs(*call):
        try:
            tape = record(module, *probe_call(call_spec, 10, seed), made=True)
            return str(read_dense(tape, [frozenset(place.weights)])[0].spec)
        except Exception:  # the report's words must not fail a model that is left as it is
            continue
    return ""


def rewrite_all(
    model: nn.Module,
    places: list[BlockCandidate],
    calls: dict[str, ArgsKwargs],
    options: Options,
    runtime: Runtime | None,
    others: dict[str, Rewrite],
    say: Callable[[str], None],
    manager: PassManager,
) -> list[DenseResult]:
    """Split or fuse every FFN of ``places`` (dense ones), installing what was verified; one answer for each place.

    Args:
        calls: a real call of each home.
        others: modules that were rewritten already, by path.
        manager: what runs the passes.
    """
    one = FuseDenseFFN if options.dense == "fuse" else SplitDenseFFN
    homes: dict[str, list[BlockCandidate]] = {}
    for place in places:
        homes.setdefault(place.call.path, []).append(place)
    done: dict[str, DenseResult] = {}
    known: Measured = {}
    for path in sorted(homes, key=lambda p: -len(p.split("."))):  # inner modules first
        name = path or type(model).__name__
        say(f"dense FFN of {name}: {options.dense}")
        done[path] = _left(path, options, runtime, others, manager, one.name)
        if not done[path].reason:
            done[path] = _rewrite_home(model, path, homes[path], calls[path], options, runtime, known, manager)
        if (rewrite := done[path].rewrite) is not None:
            others[path] = rewrite
            manager.stands(rewrite.passes)
            done[path].records = rewrite.passes.records
        else:
            done[path].records = [PassRecord(one.name, one.level, name, 0, done[path].reason)]
    return [done[p.call.path] for p in places]


def _left(
    path: str, options: Options, runtime: Runtime | None, others: dict[str, Rewrite], manager: PassManager, name: str
) -> DenseResult:
    """The reason, if there is one, for which the home at ``path`` is not looked at by the pass ``name``."""
    if reason := manager.leaves_out(name):
        return DenseResult(path, None, f"{reason}; without {name} no other pass applies")
    if manager.exhausted:
        return DenseResult(path, None, f"MOEOPT_FUEL={manager.fuel}: no more blocks are rewritten")
    holder = next((o for o in others if _runs_inside(path, o, others[o])), None)
    if holder is not None:
        return DenseResult(
            path, None, f"it is computed in the code of {holder or 'the model'}, which was rewritten already"
        )
    return DenseResult(path, None, ENGINE if options.dense == "fuse" and runtime is not None else "")


def _rewrite_home(
    model: nn.Module,
    path: str,
    places: list[BlockCandidate],
    call: ArgsKwargs,
    options: Options,
    runtime: Runtime | None,
    known: Measured,
    manager: PassManager,
) -> DenseResult:
    name, module = path or type(model).__name__, model.get_submodule(path)
    weights = [frozenset(p.weights) for p in places]
    try:
        if options.dense == "fuse":
            reader = DenseReader(weights, fuse, FuseDenseFFN.kind)
            where, timings = measured(model, path, call, options, reader, known)
            figures = "; ".join(map(str, timings))
            if not pays(timings):
                there = f" (measured on {where})" if where != name else ""
                raise Declined(f"left as it is: fused {figures}{there}")
        else:
            groups = groups_of(path, module, call, weights, options)
            reader = DenseReader(weights, lambda ffn: split(ffn, groups(ffn)), SplitDenseFFN.kind)
        rewrite = rewrite_block(name, module, call, options, runtime, reader, manager)
        install(module, rewrite.program)
    except Declined as err:
        return DenseResult(path, None, err.reason, err.where or "")
    how = f"fused: {figures}" if options.dense == "fuse" else in_words(module, rewrite.found)
    return DenseResult(path, rewrite, seconds=rewrite.seconds, lowering=f"moeopt::experts ({how})")


def _runs_inside(path: str, outer: str, rewrite: Rewrite) -> bool:
    """True where the module at ``path`` is part of the rewritten ``outer`` and no longer called as a module."""
    if path != outer and outer and not path.startswith(outer + "."):
        return False
    inner = path.removeprefix(outer + ".") if outer else path
    kept = rewrite.program.block.kept_modules
    return path == outer or not any(inner == k or inner.startswith(k + ".") for k in kept)
