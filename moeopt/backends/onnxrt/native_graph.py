"""``model.native.onnx``: the graph of plain ONNX Runtime with moeopt's own operator in the place of blocks that gain.

Its nodes read the constants that are there already, in the plain graph's file of weights: the second graph holds none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeopt.backends.onnxrt.lowerings.native import Native
from moeopt.backends.onnxrt.selftest import splice
from moeopt.backends.onnxrt.session import GRAPH, NATIVE
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.base import Lowering
from moeopt.lower.onnx.plan import BlockPlan


def write_native(
    directory: Path, sites: Sequence[ExpertsNode], records: Sequence[Mapping[str, Any]], plan: BlockPlan
) -> dict[str, Any]:
    """Write the native graph beside the plain one, if ``plan`` has native blocks.

    Args:
        directory: where the plain graph and its weights lie.
        sites, records: of the plain graph.

    Returns:
        what a manifest says of the graph: the names of the blocks that the operator computes, and the count of nodes;
        {} where nothing was written.
    """
    import onnx_ir as ir

    legalize = {site.name: plan.legalize(site) for site in sites}
    chosen = {name: plan.choice(site).lowering for name, site in legalize.items()}
    native = [r for r in records if isinstance(chosen[r["name"]], Native)]
    if not native:
        return {}
    model = ir.load(directory / GRAPH)
    constants = model.graph.initializers
    for record in native:
        name = record["name"]
        splice(model, record, legalize[name], _reading(chosen[name], name, constants))
    ir.save(model, directory / NATIVE)
    return {"blocks": [r["name"] for r in native], "nodes": len(model.graph)}


def _reading(lowering: Lowering | None, block: str, constants: Mapping[str, Any]) -> Lowering:
    assert isinstance(lowering, Native)
    return Native(lowering.base, lambda name: constants[f"{block}/{name}"])
