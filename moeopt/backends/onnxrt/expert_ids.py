"""Which experts a whole engine chooses, beside the model that it was made of: layer by layer, token by token.

The graph is loaded once more, with the expert ids of every lowered block for outputs and nothing after them; its
weights stay in the file, unpacked. Where ids differ, the two runs' own rounding put scores in another order, or
something is wrong: the end-to-end distance judges that, and the first such token helps to find the reason.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moeopt.backends.onnxrt.engine import GraphEngine
from moeopt.backends.onnxrt.shaken import session_beside
from moeopt.ir.specs import ExpertsSpec
from moeopt.ops.expert_weights import ExpertWeights
from moeopt.ops.override import override_experts_impl
from moeopt.rewrite.site_names import site_names
from moeopt.value_types import OnnxValue
from moeopt.verification.model import run_plain

CallArguments = tuple[Sequence[Any], Mapping[str, Any]]
Records = Sequence[Mapping[str, Any]]


def count_ids(
    model: nn.Module, engine: GraphEngine, graph: str, records: Records, call: CallArguments
) -> tuple[int, int, str]:
    """How many expert ids the engine chose on ``call``, how many are not the model's, and the first such token.

    Args:
        model: with its blocks rewritten, as it was when the engine was built.
        engine: runs the file ``graph`` in ``engine.directory``.
        records: of :mod:`moeopt.backends.onnxrt.site_records`, for the sites of that graph.
    """
    chosen = ids_of_model(model, call)
    total, differ, first = 0, 0, ""
    for name, ids_TK in ids_of_engine(engine, graph, [r for r in records if r["name"] in chosen], call).items():
        own_TK = chosen[name]
        if own_TK.shape != ids_TK.shape:
            continue
        total += own_TK.numel()
        one, two = own_TK.sort(-1).values, ids_TK.sort(-1).values
        rows = (one != two).any(-1).nonzero().flatten().tolist()
        differ += int((one != two).sum())
        if rows and not first:
            t = rows[0]
            first = f"{name}, token {t}: experts {ids_TK[t].tolist()} instead of {own_TK[t].tolist()}"
    return total, differ, first


def ids_of_model(model: nn.Module, call: CallArguments) -> dict[str, Tensor]:
    """The ids (T, K) of each site, by its name."""
    name_of = site_names(model)
    chosen: dict[str, Tensor] = {}

    def note(x: Tensor, ids: Tensor, weights: Tensor, bank: ExpertWeights, spec: ExpertsSpec) -> None:
        del x, weights, spec
        if (name := name_of(bank)) is not None:
            chosen[name] = ids.detach().long().cpu().clone()

    with override_experts_impl(note):
        run_plain(model, call[0], dict(call[1]))
    return chosen


def ids_of_engine(engine: GraphEngine, graph: str, records: Records, call: CallArguments) -> dict[str, Tensor]:
    """The ids (T, K) that the engine chooses on ``call``, by the names of ``records``, in their order."""
    import onnx

    if not records:
        return {}
    feeds = _feeds(engine, call)
    names = [str(record["ids"]) for record in records]
    results = dict(feeds)
    if not all(name in feeds for name in names):  # else the caller routes
        proto = onnx.load(os.fspath(engine.directory / graph), load_external_data=False)
        del proto.graph.output[:]
        ends = dict.fromkeys(n for n in names if n not in {i.name for i in proto.graph.input})
        proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT64, None) for n in ends)
        session = session_beside(engine, proto, graph)
        given = {name: feeds[name] for name in session.inputs}
        results = dict(zip(session.outputs, session.run(given), strict=True)) | feeds
    return {str(record["name"]): results[name].cpu() for record, name in zip(records, names, strict=True)}


def _feeds(engine: GraphEngine, call: CallArguments) -> dict[str, Tensor]:
    """What the engine hands to its session on ``call``."""
    seen: list[dict[str, Tensor]] = []
    run = engine.session.run

    def noting(feeds: dict[str, Tensor]) -> OnnxValue:
        seen.append(dict(feeds))
        return run(feeds)

    engine.session.run = noting
    try:
        run_plain(engine, call[0], dict(call[1]))
    finally:
        del engine.session.run
    return seen[0]
