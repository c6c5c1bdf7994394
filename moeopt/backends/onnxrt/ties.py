"""A comparison end to end in which the engine broke ties its own way: the rest is compared with its choices.

Rows of zeros, a gate of zeros: all scores of a token are equal, and the engine may take other experts than PyTorch
does. That is told and counted. The model with its blocks rewritten then runs once more with the engine's expert ids,
and what the engine gives must be what that run gives, within the same budget. It is done only where each choice that
differs is a tie; a single one that is not, and the engine is not the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeopt.backends.onnxrt.build import BuiltGraph
from moeopt.backends.onnxrt.engine import GraphEngine, OnnxEngine
from moeopt.backends.onnxrt.expert_ids import Records, ids_of_engine
from moeopt.backends.onnxrt.fallback_graph import FALLBACKS
from moeopt.capture.tree import ArgsKwargs
from moeopt.rewrite.install import rewritten_forward
from moeopt.value_types import PyObject
from moeopt.verification.model import DRAWS, EndToEnd, OriginalRuns, compare_outputs
from moeopt.verification.noise import Noise
from moeopt.verification.pins import RoutingLog
from moeopt.verification.ties import choices_of, differing, tied_tokens


class Ties:
    """Compares an engine once more where it broke ties otherwise, and counts.

    Args:
        twin: the model with its blocks rewritten, on the weights that the engine was made of.
        graph, records: the file of ``engine`` in its directory, and its sites.
        noise: names of the submodules whose rounding moves the router's scores.
    """

    def __init__(
        self, twin: nn.Module, engine: GraphEngine, graph: str, records: Records, noise: Sequence[str], seed: int = 0
    ) -> None:
        self.twin, self.engine, self.graph, self.records = twin, engine, graph, records
        self.seed = seed
        done = [path for path, module in twin.named_modules() if rewritten_forward(module) is not None]
        inside = tuple(f"{path}." if path else "" for path in done)  # a hook there would bring the original code back
        self.noise = [name for name in noise if name in done or not name.startswith(inside)]

    @classmethod
    def of_bundle(cls, twin: nn.Module, engine: OnnxEngine, noise: Sequence[str]) -> Ties | None:
        """Those of a loaded engine; None where its manifest has no records of its blocks."""
        data = {} if engine.manifest is None else engine.manifest.data
        form = data.get("portable") if engine.graph in FALLBACKS else data
        records = form.get("sites") if isinstance(form, dict) else None
        return cls(twin, engine, engine.graph, records, noise) if records else None

    def compare(self, call: ArgsKwargs, runs: OriginalRuns, got: PyObject) -> EndToEnd | None:
        """The verdict with the engine's expert ids; None where ties do not explain what differs."""
        args, kwargs = call
        ids = ids_of_engine(self.engine, self.graph, self.records, call)
        want, choices = choices_of(self.twin, args, kwargs, ids)
        noisy = []
        for draw in range(DRAWS):
            with Noise(self.twin, self.noise, self.seed + draw):
                noisy.append(choices_of(self.twin, args, kwargs, ids)[1])
        eps = coarsest(self.twin, want)
        broken, named = 0, False
        for choice in choices:
            other = ids.get(choice.name)
            if other is None or other.shape != choice.ids.shape:
                continue
            moved = differing(choice, other).cpu()
            tied = tied_tokens(choice, eps, [n for run in noisy for n in run if n.name == choice.name])[0]
            if bool((moved & ~tied).any()):
                return None
            broken += int(moved.sum())
            named |= not torch.equal(choice.ids.cpu().sort(-1).values, other.cpu().sort(-1).values)
        if not named:
            return None
        result = compare_outputs(want, got, runs.noisy, runs.want)
        if result.passed and broken:
            result.ties = broken
            result.notes.append(
                f"{broken} choices of experts are ties that the engine broke otherwise; the rest was compared with its "
                "choices"
            )
        return result


def tie_note(
    twin: nn.Module, call: ArgsKwargs, runtime: str, moved: int | None, own: int = 0, origin: str = "PyTorch"
) -> str:
    """What a user must know of ties, and how many the example inputs have; "" for a model that chooses no experts.

    Args:
        moved: tied rows that the engine sent to other experts when its blocks were verified; None where nothing was
            run. own: those of the example inputs.
        origin: what the model was given as: "PyTorch", "the file".
    """
    try:
        with RoutingLog() as log:
            choices = [choice for choice in choices_of(twin, *call)[1] if choice.events]
    except Exception as err:  # an operator that no mode can look at
        return f"tied rows may go to other experts on {runtime}; they were not counted: {type(err).__name__}: {err}"
    if not choices and log.events:  # no block that was rewritten makes them
        return (
            f"a block that is left as it is chooses by the largest of some scores: tied rows, whose scores are exactly "
            f"equal, may be treated otherwise on {runtime} than in {origin}; they were not counted"
        )
    if not choices:
        return ""
    exact = sum(int(tied_tokens(choice, 0.0)[1].sum()) for choice in choices)
    total = sum(len(choice.ids) for choice in choices)
    seen = "" if moved is None else f" ({moved} of the rows that blocks were verified with did)"
    went = f", of which {own} went to other experts" if own else ""
    return (
        f"tied rows, whose router scores are exactly equal (rows of zeros, a gate of zeros), may go to other experts "
        f"on {runtime} than in {origin}{seen}, and have other results then; of the {total} choices of experts that the "
        f"example inputs make, {exact} are such ties{went}"
    )


def coarsest(model: nn.Module, outputs: PyObject) -> float:
    """The largest eps of the dtypes of a model's parameters and outputs."""
    tensors = [*model.parameters(), *(t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor))]
    return max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=0.0)


def ties_of(twin: nn.Module, engine: GraphEngine, form: BuiltGraph, noise: list[str], seed: int) -> Ties | None:
    """What compares once more where ``engine`` broke ties otherwise; only ONNX Runtime tells its expert ids."""
    if not isinstance(engine, OnnxEngine):
        return None
    return Ties(twin, engine, engine.graph, form_of(engine, form).sites, noise, seed)


def form_of(engine: OnnxEngine, form: BuiltGraph) -> BuiltGraph:
    """The record of the graph that ``engine`` runs."""
    return form.cpu_fallback if engine.graph in FALLBACKS and form.cpu_fallback is not None else form
