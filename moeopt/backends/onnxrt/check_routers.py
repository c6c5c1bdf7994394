"""Each kind of rewritten block, its router included, alone in a session of the engine's runtime.

A block goes through the very steps that the whole model goes through: ``torch.export``, the exporter and its
optimiser, the lowering, the runtime. So what any of them does to a router, a gate or a norm shows in the block, where
rows can be steered; in the whole model they cannot. Blocks that run the same program on weights of the same sizes are
exported once. A model that is one block is its own engine, and no second one is built.
"""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moeopt.backends.onnxrt.build import BuiltGraph, trace, write_graph
from moeopt.backends.onnxrt.engine import OnnxEngine
from moeopt.backends.onnxrt.fallback_graph import FALLBACK
from moeopt.backends.onnxrt.plan import OrtPlan
from moeopt.backends.onnxrt.session import GRAPH
from moeopt.capture.call_roles import CallSpec
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import NotEquivalentError
from moeopt.ir.row_function import RowFunction
from moeopt.rewrite.install import rewritten_forward
from moeopt.value_types import FxTarget, PyObject
from moeopt.verification.model import run_plain
from moeopt.verification.results import BlockCheck
from moeopt.verification.row_calls import Unpinned
from moeopt.verification.unpinned import check_unpinned

Records = Sequence[Mapping[str, Any]]
ROUTED = ".routed"
FEW = 1
"""Elements of a tensor that counts as a constant: its values may decide what an exporter makes of the graph."""


def block_kind(module: nn.Module) -> str:
    """What the graph of a module with rewritten blocks depends on beside the values of its weights."""
    return str([_rewritten(child) or _inside(child) for child in module.modules()])


class RoutedBlock:
    """A graph in a session that tells which experts it chooses: called as the block is called.

    Args:
        directory, graph: where the graph was written. records: of its sites.
    """

    def __init__(
        self, directory: Path, graph: str, signature: Mapping[str, Any], records: Records, plan: OrtPlan
    ) -> None:
        import onnx

        proto = onnx.load(os.fspath(directory / graph), load_external_data=False)
        given = {value.name for value in proto.graph.input}
        self._ids = {str(r["name"]): str(r["ids"]) for r in records if r["ids"] not in given}
        there = {value.name for value in proto.graph.output}
        more = [name for name in dict.fromkeys(self._ids.values()) if name not in there]
        proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT64, None) for n in more)
        path = directory / f"{graph}{ROUTED}"  # beside its weights
        try:
            path.write_bytes(proto.SerializeToString())
            self._engine = OnnxEngine(directory, signature, plan.provider, graph=path.name)
        finally:
            path.unlink(missing_ok=True)
        self._results: list[Tensor] = []
        run = self._engine.session.run

        def noting(feeds: Mapping[str, Tensor]) -> list[Tensor]:
            self._results = run(feeds)
            return self._results

        self._engine.session.run = noting

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> tuple[Any, dict[str, Tensor]]:
        """The block's outputs, and the expert ids (T, K) of each site."""
        outputs = run_plain(self._engine.run_graph, args, kwargs)
        by_name = dict(zip(self._engine.session.outputs, self._results, strict=True))
        return outputs, {site: by_name[name] for site, name in self._ids.items()}


def alone(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], plan: OrtPlan
) -> tuple[RoutedBlock, BuiltGraph]:
    """A rewritten block of a model as an engine of its own, made as ``build_onnx`` makes one.

    Raises:
        NotSaveableError: it has no graph of its own.
    """
    graph, sites, signature = trace(module, args, kwargs, plan, lambda line: None)
    built = write_graph(graph, sites, signature, plan, lambda line: None, time.perf_counter())
    return RoutedBlock(built.directory, GRAPH, signature, built.sites, plan), built


def itself(built: BuiltGraph, plan: OrtPlan) -> RoutedBlock:
    """The same of an engine whose model is one block."""
    graph, form = (GRAPH, built) if built.cpu_fallback is None else (FALLBACK, built.cpu_fallback)
    return RoutedBlock(built.directory, graph, form.signature, form.sites, plan)


@dataclass
class Routed:
    """A module with its router inside: a real call and what its arguments are, how many experts, its check so far."""

    path: str
    call: ArgsKwargs
    call_spec: CallSpec
    experts: int
    check: BlockCheck


def check_blocks(
    original_of: Callable[[str], Callable[..., Any]], twin: nn.Module, blocks: Sequence[Routed], built: BuiltGraph,
    plan: OrtPlan, seed: int,
) -> list[str]:  # fmt: skip
    """Run each kind of block on the engine's runtime, unpinned; its cases join its check. Notes for the certificate.

    Args:
        original_of: the original's own forward, by the path of its module.
        twin: the model with its blocks rewritten, as ``built`` was made of it.

    Raises:
        NotEquivalentError: a block is not the original's function there; the message has the block and the rows.
    """
    seen: set[str] = set()
    notes: list[str] = []
    for block in blocks:
        module, name = twin.get_submodule(block.path), block.path or type(twin).__name__
        kind = block_kind(module)
        if kind in seen:
            continue
        seen.add(kind)
        try:
            run, _keep = (itself(built, plan), built) if not block.path else alone(module, *block.call, plan)
        except Exception as err:  # the whole was exported, and is compared; this block has no graph of its own
            notes.append(f"{name} was not run alone on {plan.runtime}: {type(err).__name__}: {str(err)[:200]}")
            continue
        unpinned = Unpinned(name, original_of(block.path), module, run, block.call_spec, block.experts)
        found = check_unpinned(unpinned, seed)
        for case in found:
            case.name = f"{case.name}, on {plan.runtime}"
        block.check.cases += found
        failed = next((case for case in found if case.status == "failed"), None)
        if failed is not None:
            raise NotEquivalentError(
                f"the {plan.runtime} engine of {type(twin).__name__} is not equivalent and was not kept: in {name}, "
                f"run whole and with its router not pinned, {failed.reason}; use backend='torch', or report this with "
                "the model's code"
            )
    return notes


def _rewritten(module: nn.Module) -> PyObject:
    forward = rewritten_forward(module)
    if forward is None:
        return None
    program, steps = forward.program, []
    for node in program.block.graph.nodes:
        told: FxTarget = node.target
        if node.op == "get_attr":
            told = _describe_tensor(operator.attrgetter(str(node.target))(module))
        steps.append((node.op, str(told), str(node.args), str(node.kwargs)))
    steps += [("constant", str(_describe_tensor(constant)), "", "") for constant in program.block.constants]
    banks = [(bank.num_experts, *map(_describe_tensor, _first_of(bank, spec)), spec) for bank, spec in forward.banks]
    return steps, banks, program.routers, program.guard.shapes


def _first_of(bank: PyObject, spec: PyObject) -> list[Tensor]:
    """The weights of expert 0."""
    return list(bank.slots(0)) if isinstance(spec, RowFunction) else [bank.w_out(0), *bank.w_in(0)]


def _inside(module: nn.Module) -> PyObject:
    plain = [(n, v) for n, v in module.__dict__.items() if type(v) in (int, float, bool, str, tuple)]
    held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return type(module), plain, [(name, _describe_tensor(tensor)) for name, tensor in held]


def _describe_tensor(tensor: Tensor) -> PyObject:
    """The form of a tensor, and the values of one that is as small as a constant."""
    few = tensor.tolist() if tensor.numel() <= FEW else None
    return tuple(tensor.shape), tensor.dtype, few
