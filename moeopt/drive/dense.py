"""Dense FFNs of a model: read for the report, or split into groups, one home module after the other.

A home is the innermost module whose forward holds both products: a Llama MLP, a BERT layer. All FFNs of
one home are split together, or none is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from moeopt.compare.prototype import Prototype
from moeopt.drive.block import Rewrite, Runtime, rewrite_block
from moeopt.drive.discover import Place
from moeopt.drive.mixture import Call
from moeopt.drive.obstacles import check_skipped
from moeopt.drive.witness import prototypes, witness
from moeopt.errors import CaptureError, Declined, UsageError
from moeopt.ir.tape import Tape, record
from moeopt.options import Options
from moeopt.passes.recognize_dense import DenseFFN, find_dense, recognize_dense
from moeopt.passes.recognize_experts import Recognition
from moeopt.passes.recognize_router import RouterReading
from moeopt.passes.split_dense import split
from moeopt.rewrite.program import install

EVERYONE = "every token goes to every group, with weight 1"


@dataclass
class Split:
    """What became of one dense FFN: its rewritten module's path and rewrite, or the reason it was left."""

    path: str
    rewrite: Rewrite | None = None
    reason: str = ""
    where: str = ""
    seconds: float = 0.0


@dataclass
class DenseSplit:
    """The :class:`moeopt.drive.mixture.Reader` that splits the FFNs with these weights into ``groups``."""

    weights: list[frozenset[int]]
    groups: int

    def first(self, module: nn.Module, proto: Prototype, seed: int) -> tuple[Call, Tape, list[Recognition]]:
        call = witness(proto, 24, seed)
        tape = record(module, *call)
        found = self.again(tape, [])
        for recognition in found:
            inner = {index for n in recognition.interior for index in tape.stack(n.meta["call"])[1:]}
            for index in sorted(inner):
                check_skipped(tape.calls[index].path, tape.calls[index].module)
        return call, tape, found

    def again(self, tape: Tape, known: list[Recognition]) -> list[Recognition]:
        del known
        return [split(ffn, self.groups) for ffn in read_dense(tape, self.weights)]

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
    chains = find_dense(tape, weights)
    if not chains:
        raise Declined("its weights are not plain matrices in Parameters or buffers, or a run on other tokens skips it")
    return [recognize_dense(tape, chain) for chain in chains]


def too_many(places: list[Place], groups: int) -> None:
    """Raise a ``UsageError`` where no FFN has as many neurons as ``groups``."""
    most = max((p.chains[0].out.matrices[0].k for p in places), default=groups)
    if groups > most:
        raise UsageError(
            f"experts={groups}: the widest dense FFN of the model has {most} neurons; give a number that divides it"
        )


def function_of(module: nn.Module, call: Call, place: Place, seed: int) -> str:
    """The function of a dense FFN in words; "" where a few made-up tokens do not show it."""
    for proto in prototypes(*call):
        try:
            tape = record(module, *witness(proto, 10, seed))
            return str(read_dense(tape, [frozenset(place.weights)])[0].spec)
        except (Declined, CaptureError, UsageError):
            continue
    return ""


def split_all(
    model: nn.Module,
    places: list[Place],
    calls: dict[str, Call],
    options: Options,
    runtime: Runtime | None,
    others: dict[str, Rewrite],
    say: Callable[[str], None],
) -> list[Split]:
    """Split every FFN of ``places`` (dense ones), installing what was verified; one answer for each place.

    Args:
        calls: a real call of each home.
        others: modules that were rewritten already, by path.
    """
    homes: dict[str, list[Place]] = {}
    for place in places:
        homes.setdefault(place.call.path, []).append(place)
    done: dict[str, Split] = {}
    for path in sorted(homes, key=lambda p: -len(p.split("."))):  # inner modules first
        name = path or type(model).__name__
        say(f"splitting the dense FFN of {name} into {options.experts}")
        done[path] = _split_home(model, path, homes[path], calls, options, runtime, others)
        if (rewrite := done[path].rewrite) is not None:
            others[path] = rewrite
    return [done[p.call.path] for p in places]


def _split_home(
    model: nn.Module,
    path: str,
    places: list[Place],
    calls: dict[str, Call],
    options: Options,
    runtime: Runtime | None,
    others: dict[str, Rewrite],
) -> Split:
    if options.fuel is not None and len(others) >= options.fuel:
        return Split(path, None, f"MOEOPT_FUEL={options.fuel}: no more blocks are rewritten")
    holder = next((o for o in others if _runs_inside(path, o, others[o])), None)
    if holder is not None:
        return Split(path, None, f"it is computed in the code of {holder or 'the model'}, which was rewritten already")
    module = model.get_submodule(path)
    reader = DenseSplit([frozenset(p.weights) for p in places], options.experts or 1)
    try:
        rewrite = rewrite_block(path or type(model).__name__, module, calls[path], options, runtime, reader)
        install(module, rewrite.program)
    except Declined as err:
        return Split(path, None, err.reason, err.where or "")
    return Split(path, rewrite, seconds=rewrite.seconds)


def _runs_inside(path: str, outer: str, rewrite: Rewrite) -> bool:
    """True where the module at ``path`` is part of the rewritten ``outer`` and no longer called as a module."""
    if path != outer and outer and not path.startswith(outer + "."):
        return False
    inner = path.removeprefix(outer + ".") if outer else path
    kept = rewrite.program.plan.kept_modules
    return path == outer or not any(inner == k or inner.startswith(k + ".") for k in kept)
