"""End to end: the file as it was given against the new one, both in ONNX Runtime.

The budget is the file's own rounding: it runs again with each region's result multiplied by 1 + d * n, n normal and d
the distance of that very result from the float64 oracle (one eps at least), and its outputs move by so much.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from moeopt.backends.onnxrt.build import BuiltGraph
from moeopt.backends.onnxrt.engine import GraphEngine, OnnxEngine
from moeopt.backends.onnxrt.expert_ids import ids_of_engine
from moeopt.backends.onnxrt.onnx_file.original import InnerValues, ShakenOriginal, session_on
from moeopt.errors import MoeoptError, NotEquivalentError
from moeopt.onnx_in.feeds import GraphFeeds
from moeopt.onnx_in.read import OnnxFile
from moeopt.onnx_in.unroll import unrolled
from moeopt.value_types import PyObject
from moeopt.verification.distance import finiteness, token_distance
from moeopt.verification.judge import EPS_ALLOWANCE
from moeopt.verification.model import DRAWS, EndToEnd, compare_outputs


def compare_files(
    file: OnnxFile, engine: OnnxEngine, calls: Sequence[GraphFeeds], exits: Mapping[str, float], seed: int
) -> EndToEnd:
    """The verdict on all ``calls``; that on the first is returned, with a note on the others.

    Args:
        exits: for each region's exit, how far the original's own result is from the float64 oracle.

    Raises:
        NotEquivalentError: on one of them the outputs move by more than the file's own rounding explains.
    """
    shaken = ShakenOriginal(file, exits)
    inner = InnerValues(file, list(exits))
    first: EndToEnd | None = None
    equal = 0
    for feeds in calls:
        try:
            shapes = {name: value.shape for name, value in inner.run(feeds).items()}
            want = shaken.run(feeds, None, shapes)
        except MoeoptError:
            if first is None:
                raise
            continue  # the file itself does not take this size
        sizes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in feeds.items())
        noisy = [tuple(shaken.run(feeds, seed + draw, shapes)) for draw in range(DRAWS)]
        try:
            got = _tuple(engine(**feeds))
        except MoeoptError as err:
            raise NotEquivalentError(
                f"{file.name}: the new graph refuses a call that the file takes, and was not kept: {err} (with "
                f"{sizes}); use the file as it is, or give inputs of several rows in each of their sizes"
            ) from None
        verdict = compare_outputs(tuple(want), got, noisy)
        if not verdict.passed:
            raise NotEquivalentError(
                f"{file.name}: the new graph is not equivalent and was not kept: {verdict.reason} (with {sizes}); use "
                "the file as it is, or report this with the file"
            )
        equal += first is not None
        first = first or verdict
    assert first is not None, "the first call was run before"
    if equal:
        first.notes.append(f"equal in {equal} other size{'s' if equal > 1 else ''} too")
    return first


def against_file(file: OnnxFile, engine: GraphEngine, calls: Sequence[GraphFeeds], budget: float) -> EndToEnd:
    """The verdict on an engine that was made of ``file`` before: its outputs within ``budget`` of the file's own.

    Args:
        budget: the relative L2 distance per token that the engine was verified with.
    """
    session = session_on(file.proto, file.directory, file.name)
    result = EndToEnd(True, outputs=len(file.proto.graph.output), budget=budget)
    for feeds in calls:
        for name, want, got in zip(session.outputs, session.run(feeds), _tuple(engine(**feeds)), strict=True):
            result.reason = result.reason or _differs(name, want, got, budget, result)
    result.passed = not result.reason
    return result


def written_out(file: OnnxFile, calls: Sequence[GraphFeeds], stay: Collection[str] | None) -> OnnxFile:
    """The file with its loops over experts written out, held against the file as it is; the same object if none is.

    Args:
        stay: values whose branches stay that may be taken always only as long as the experts' results are finite;
            None: all of those.
    """
    made = unrolled(file, stay is not None, stay or ())
    if made is file:
        return file
    try:
        old, new = (session_on(one.proto, one.directory, one.name) for one in (file, made))
    except MoeoptError:
        return file
    result = EndToEnd(True)
    for feeds in calls:
        for name, want, got in zip(old.outputs, old.run(feeds), new.run(feeds), strict=True):
            allowed = EPS_ALLOWANCE * eps_of(want) if want.is_floating_point() else 0.0
            if _differs(name, want, got, allowed, result):
                return file
    return made


def _differs(name: str, want: Tensor, got: Tensor, budget: float, result: EndToEnd) -> str:
    if (want.shape, want.dtype) != (got.shape, got.dtype):
        return f"output {name!r} is {got.dtype} {tuple(got.shape)} instead of {want.dtype} {tuple(want.shape)}"
    if not want.is_floating_point():
        count = int((want != got).sum())
        return f"output {name!r} differs in {count} elements" if count else ""
    pattern = finiteness(want, got)
    if pattern.leaked:
        return f"output {name!r} is not finite at token {pattern.leaked[0]}, where the file's is"
    far = token_distance(got, want)[pattern.both]
    result.tokens += len(far)
    result.distance = max(result.distance, float(far.max()) if len(far) else 0.0)
    return (
        f"output {name!r} moves by {result.distance:.3g}, and {budget:.3g} is allowed"
        if result.distance > budget
        else ""
    )


def _tuple(value: PyObject) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def eps_of(value: Tensor) -> float:
    """One rounding error of a value's dtype."""
    return float(torch.finfo(value.dtype).eps)


def count_ids(
    engine: OnnxEngine, built: BuiltGraph, own: Mapping[str, Tensor], feeds: GraphFeeds
) -> tuple[int, int, str]:
    """How many expert ids the new file chooses on ``feeds``, how many are not the given file's, and the first."""
    total, differ, first = 0, 0, ""
    records = [record for record in built.sites if record["name"] in own]
    for name, ids_TK in ids_of_engine(engine, engine.graph, records, ((), feeds)).items():
        own_TK = own[name]
        if own_TK.shape != ids_TK.shape:
            continue
        one, two = own_TK.sort(-1).values, ids_TK.sort(-1).values
        rows = (one != two).any(-1).nonzero().flatten().tolist()
        total, differ = total + own_TK.numel(), differ + int((one != two).sum())
        if rows and not first:
            first = f"{name}, token {rows[0]}: {ids_TK[rows[0]].tolist()} instead of {own_TK[rows[0]].tolist()}"
    return total, differ, first
