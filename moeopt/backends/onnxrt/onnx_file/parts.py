"""Regions of an ONNX file as modules: each candidate is cut out, interpreted and compared with ONNX Runtime.

A region that cannot be had as a module is declined with the reason and, where one is in the way, the name of the node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moeopt.backends.onnxrt.onnx_file.close_choices import nearer_of, with_other_choices
from moeopt.backends.onnxrt.onnx_file.original import InnerValues
from moeopt.errors import Declined, MoeoptError
from moeopt.onnx_in.coded_nodes import ON_ACTIVATIONS, CodedConstants
from moeopt.onnx_in.cuts import GraphRegion, is_tensor
from moeopt.onnx_in.feeds import GraphFeeds, sizes_unknown
from moeopt.onnx_in.frozen_routing import WAY_OUT, frozen_routing
from moeopt.onnx_in.interpreter import InterpretedGraph, unread
from moeopt.onnx_in.read import OnnxFile
from moeopt.onnx_in.region_module import (
    feature_axis,
    is_combined,
    one_number_each,
    region_ends,
    region_module,
    with_node_names,
)
from moeopt.onnx_in.regions import CandidateRegion, counted_by_data, read_apart
from moeopt.verification.distance import finiteness, token_distance
from moeopt.verification.judge import EPS_ALLOWANCE, FACTOR
from moeopt.verification.model import CEILING, DRAWS
from moeopt.verification.oracle import record_selections, run_oracle
from moeopt.verification.selections import OracleError

Values = Mapping[str, Tensor]

_MOST_TRIED = 4
"""Of a candidate's exits that hold one row for each token."""


@dataclass
class FilePart:
    """A region as a module that computes what ONNX Runtime computes there.

    Attributes:
        candidate: where it comes from; ``region``: its nodes and ends.
        module: takes the values called ``entries`` in order.
        runs: the values at its entries and its exit, on each example call.
        distance: how far the file's own result is from the float64 oracle, its worst token on the examples.
    """

    candidate: CandidateRegion
    region: GraphRegion
    module: InterpretedGraph
    entries: tuple[str, ...]
    runs: list[Values]
    distance: float

    @property
    def name(self) -> str:
        return self.candidate.name


@dataclass
class FileParts:
    """The parts of a file; and, by name, why each other candidate region is not a part."""

    parts: list[FilePart] = field(default_factory=list)
    declined: dict[str, tuple[CandidateRegion, str]] = field(default_factory=dict)


def widest_run(parts: Sequence[FilePart]) -> int:
    """Which of the example calls gives the parts the fewest sizes of 1: code may take one row for another case."""

    def ones(number: int) -> int:
        return sum(list(p.runs[number][name].shape).count(1) for p in parts for name in p.entries)

    return min(range(len(parts[0].runs)), key=ones)


def file_parts(
    file: OnnxFile, candidates: Sequence[CandidateRegion], calls: Sequence[GraphFeeds], say: Callable[[str], None]
) -> FileParts:
    """Each candidate as a part, or why not."""
    found = FileParts()
    wanted = {v.name for c in candidates for r in c.regions for v in (*r.entries, r.exit) if is_tensor(v)}
    runs: list[Values] = []
    if wanted:
        say("running the file on the example inputs")
        inner = InnerValues(file, sorted(wanted))
        runs = [inner.run(feeds) for feeds in calls]
    codes = CodedConstants(file.opset, file.model.graph)
    unknown = sizes_unknown(file, calls)
    for candidate in candidates:
        say(f"reading {candidate.name} as a module")
        try:
            if frozen := frozen_routing(candidate, candidates):
                raise Declined(frozen)
            part = _part(codes, candidate, runs)
            if unknown:
                raise Declined(unknown)
            if not _is_another_chain_of(part, found.parts):
                found.parts.append(part)
        except Declined as err:
            found.declined[candidate.name] = candidate, err.reason
    return found


def _is_another_chain_of(part: FilePart, parts: Sequence[FilePart]) -> bool:
    """Whether it is the region of one of ``parts``: experts of three products or more hold several chains each."""
    same_end = [p for p in parts if p.region.exit is part.region.exit]
    products = {id(product.node) for product in part.candidate.chains.products}
    return any(products <= {id(node) for node in p.region.nodes} for p in same_end)


def _part(codes: CodedConstants, candidate: CandidateRegion, runs: Sequence[Values]) -> FilePart:
    """The candidate up to its nearest exit that is one row for each row of its root, as wide as the experts' result."""
    for product in candidate.chains.products:
        if product.node.op_type in ON_ACTIVATIONS:
            raise Declined(unread(product.node))
    entries = [v for region in candidate.regions[:1] for v in region.entries]
    if (several := next((v for v in entries if not is_tensor(v)), None)) is not None:
        raise Declined(
            f"its nodes read {several.name!r}, a sequence of tensors, from outside, and moeopt reads single tensors "
            "there: export the model with Split or Concat in place of sequences"
        )
    choice = counted_by_data(candidate)
    if choice is not None:
        raise Declined(
            f"the node {choice.name!r} (TopK) chooses as many experts as a value of the graph says that no constant "
            "and no size makes, and the op has one number for all calls: export the model with a constant in its place"
        )
    if candidate.unrouted:
        raise Declined(
            f"nothing chooses or weighs among its {candidate.chains.experts} experts ({_first(candidate)} and its "
            "like) by what a token holds, so that each token gets all of them alike, or the weights of the sample "
            f"that the model was traced with are constants in the file, which is broken then: {WAY_OUT}"
        )
    if not candidate.regions:
        raise Declined(
            read_apart(candidate)
            or f"the results of its {candidate.chains.experts} experts do not come together in one value near them: "
            f"{_first(candidate)} and its like feed several places"
        )
    last: Declined | None = None
    combined = [region for region in candidate.regions if is_combined(candidate, region, runs)]
    if one_number_each(candidate):
        combined.sort(key=lambda region: runs[0][region.exit.name].numel())
    for region in combined[:_MOST_TRIED]:
        try:
            return _checked(codes, candidate, region, runs)
        except Declined as err:
            last = last or err
    raise last or Declined(
        f"the results of its experts ({_first(candidate)} and its like) are not summed into one row for each token"
    )


def _first(candidate: CandidateRegion) -> str:
    node = candidate.chains.products[0].node
    return f"the node {node.name!r} ({node.op_type})"


def _checked(
    codes: CodedConstants, candidate: CandidateRegion, region: GraphRegion, runs: Sequence[Values]
) -> FilePart:
    ends = region_ends(candidate, region, runs)
    module = region_module(region, ends, codes.opset, candidate.name, to_lower=True, codes=codes).eval()
    distance = 0.0
    try:
        for run in runs:
            entries = [run[name] for name in ends.tensors]
            found = explained_distance(module, entries, [run[region.exit.name]], feature_axis(candidate))
            distance = max(distance, found)
    except Declined as err:
        raise Declined(with_node_names(err.reason, module)) from None
    return FilePart(candidate, region, module, ends.tensors, list(runs), distance)


def explained_distance(module: nn.Module, values: Sequence[Tensor], theirs: Sequence[Tensor], axis: int = -1) -> float:
    """How far ONNX Runtime's results are from those of the float64 oracle, which runs the same interpreted graph.

    A choice between scores that rounding does not tell apart may be made either way.

    Args:
        axis: where a token's features are in the results.

    Raises:
        Declined: the interpreter stops, or ONNX Runtime is further from its oracle than rounding explains.
    """
    oracle: list[Tensor] | None
    without = ""
    try:
        found, choices = record_selections(module, tuple(values), {})
        ours = list(found) if isinstance(found, tuple) else [found]
        try:
            exact = run_oracle(module, tuple(values), {}, choices)
            oracle = list(exact) if isinstance(exact, tuple) else [exact]
        except OracleError as err:  # scores so close that float64 chooses otherwise, or an op that has no such form
            oracle, without = None, str(err)
    except MoeoptError as err:
        raise err if isinstance(err, Declined) else Declined(f"moeopt cannot run its nodes: {err}") from None
    except Exception as err:  # torch's own, of many classes
        raise Declined(
            f"moeopt cannot run its nodes ({type(err).__name__}: {str(err).splitlines()[0][:200]}); please report this "
            "with the file"
        ) from None
    try:
        return _distance(module, values, ours, theirs, oracle, oracle, without)
    except _NotExplainedError as err:
        nearest = oracle or []
        for other in with_other_choices(module, values, choices) if oracle is not None else ():
            nearest = [nearer_of(*three, axis) for three in zip(theirs, nearest, other, strict=True)]
        if nearest is oracle or oracle is None:
            raise Declined(err.reason) from None
        return _distance(module, values, ours, theirs, oracle, nearest, without)


class _NotExplainedError(Declined):
    """Rounding does not explain how far ONNX Runtime's result is from the oracle."""


def _distance(
    module: nn.Module, values: Sequence[Tensor], ours: Sequence[Tensor], theirs: Sequence[Tensor],
    oracle: Sequence[Tensor] | None, nearest: Sequence[Tensor] | None, without: str,
) -> float:  # fmt: skip
    """How far ``theirs`` are from ``nearest`` at the worst token, which ``ours`` and ``oracle`` must explain.

    ``without``: why there is no oracle.
    """
    far = 0.0
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine.shape != other.shape or mine.dtype != other.dtype:
            raise Declined(
                f"moeopt reads its nodes as giving {mine.dtype} {tuple(mine.shape)}, and ONNX Runtime gives "
                f"{other.dtype} {tuple(other.shape)}; please report this with the file"
            )
        if not other.is_floating_point():
            if not torch.equal(mine, other):
                raise Declined("moeopt reads its nodes as giving other whole numbers than ONNX Runtime gives")
        elif oracle is None or nearest is None:
            far = max(far, _without_oracle(module, values, number, mine, other, without))
        else:
            far = max(far, _from_oracle(oracle[number], nearest[number], mine, other))
    return far


def _from_oracle(oracle: Tensor, nearest: Tensor, ours: Tensor, theirs: Tensor) -> float:
    if not theirs.numel():
        return 0.0
    eps = torch.finfo(theirs.dtype).eps
    both = finiteness(theirs, ours).both
    pairs = ((theirs, nearest), (ours, oracle))
    far = [_worst(token_distance(y, exact, eps=eps)[both]) for y, exact in pairs]
    if far[0] > FACTOR * far[1] + EPS_ALLOWANCE * eps:
        raise _NotExplainedError(
            f"ONNX Runtime's result is {far[0]:.2g} from what moeopt reads its nodes as, and rounding explains "
            f"{FACTOR * far[1] + EPS_ALLOWANCE * eps:.2g}; please report this with the file"
        )
    return far[0]


def _worst(distances: Tensor) -> float:
    return float(distances.nan_to_num(0).max()) if distances.numel() else 0.0


def _without_oracle(
    module: nn.Module, values: Sequence[Tensor], number: int, ours: Tensor, theirs: Tensor, without: str
) -> float:
    """How far one rounding error of the inputs moves the interpreter's result, which must explain ONNX Runtime's.

    Raises:
        Declined: it does not, or moves a token by so much that anything would be explained.
    """
    eps, moved = torch.finfo(theirs.dtype).eps, 0.0
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)
        shaken = [
            (v * (1 + eps * torch.randn(v.shape, generator=generator))).to(v.dtype) if v.is_floating_point() else v
            for v in values
        ]
        again = module(*shaken)
        moved = max(moved, _worst(token_distance(again[number] if isinstance(again, tuple) else again, ours)))
    far = _worst(token_distance(theirs, ours))
    if moved * FACTOR > CEILING or far > FACTOR * moved + EPS_ALLOWANCE * eps:
        raise Declined(
            f"ONNX Runtime's result is {far:.2g} from moeopt's, which one rounding error of the inputs moves by "
            f"{moved:.2g}, and float64 cannot tell which is right: {without}"
        )
    return max(moved, eps)
