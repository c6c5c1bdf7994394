"""The plan of a TensorRT engine as the backend uses it: sessions to verify with, refusals, the CPU fallback graph."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.utils import _pytree as pytree

from moeopt.backends.onnxrt.plan import session_of
from moeopt.backends.onnxrt.session import Session
from moeopt.backends.tensorrt.capability import refuses_dtypes
from moeopt.backends.tensorrt.plan import TOKENS, TensorRTPlan
from moeopt.backends.tensorrt.product import exporter_packages, product
from moeopt.backends.tensorrt.profiles import MULTIPLE
from moeopt.backends.tensorrt.sums import sums_for
from moeopt.backends.tensorrt.target import Target, check_buildable, wanted_target
from moeopt.capture.tree import ArgsKwargs
from moeopt.errors import Declined, UsageError
from moeopt.lower.onnx.experts_node import ExpertsNode
from moeopt.lower.onnx.lowerings.base import Lowering
from moeopt.lower.onnx.lowerings.types import types_of
from moeopt.lower.onnx.plan import BlockPlan, LoweringChoice
from moeopt.lower.onnx.upcast import upcast_node
from moeopt.options import Options
from moeopt.verification.language import find_ids


class EnginePlan(TensorRTPlan):
    """A plan that remembers why it refused blocks: an engine cannot keep such a block's own Python.

    Attributes:
        refusals: the reasons, in order.
    """

    def __init__(self, target: Target, tokens: tuple[int, ...] | None) -> None:
        super().__init__(target, tokens, open_session=session_of)
        self.refusals: list[str] = []

    def choice(self, site: ExpertsNode) -> LoweringChoice:
        try:
            return super().choice(site)
        except Declined as err:
            self.refusals.append(err.reason)
            raise

    def check(self, site: ExpertsNode) -> None:
        types = types_of(site)
        every = {types.x, types.act, types.weights, types.term, types.accum, types.out, types.compute}
        products = set() if sums_for(self.target) else {types.compute}  # products are written as sums there
        if why := refuses_dtypes(self.target, products, every):
            self.refusals.append(why)
            raise Declined(f"no TensorRT form carries its experts: {why}")


def trt_plan(options: Options) -> EnginePlan:
    """The plan for ``options.target``, else for the GPU of this machine.

    Raises:
        UsageError: no target, one that is unknown or cannot be built here, a package that is not installed, an
            option that this backend does not have.
    """
    target = wanted_target(options.target)
    exporter_packages()
    check_buildable(target)
    product(target.product)
    if options.tune:
        raise UsageError(
            "tune=True measures ONNX Runtime's lowerings; backend 'tensorrt' computes its choice: leave it"
        )
    if options.session_options is not None:
        raise UsageError("session_options are ONNX Runtime's, and the backend is 'tensorrt': leave them out")
    if options.portable:
        raise UsageError("portable=True is for backend 'onnxruntime': a plan runs in TensorRT only; leave it out")
    if options.device is not None and options.device.type != "cuda":
        raise UsageError(f"device={str(options.device)!r}: an engine of TensorRT runs on CUDA; leave device out")
    return EnginePlan(target, options.tokens)


def max_tokens_of(call: ArgsKwargs, options: Options) -> int:
    """The most tokens that a block may see in the sizes that the engine is built for: rows of ids, or of features."""
    leaves = [t for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor) and t.dim()]
    ids = find_ids(*call)
    first = ids if ids is not None else next((t for t in leaves if t.is_floating_point()), None)
    if first is None:
        return max(options.tokens or TOKENS)
    width = 1 if ids is not None else first.shape[-1]
    every = options.profile or ()
    given = [
        math.prod(shapes[2]) // width
        for one in ([every] if isinstance(every, Mapping) else every)
        for shapes in one.values()
        if len(shapes) == 3 and len(shapes[2]) == first.dim()
    ]
    if given:
        return int(max(given))
    sizes = sorted(first.shape if ids is not None else first.shape[:-1])
    largest = [MULTIPLE * size for size in sizes] or [1]
    largest[-1] = max(largest[-1], *(options.tokens or (0,)))
    return math.prod(largest)


class CPUFallbackPlan(BlockPlan):
    """The choices of ``plan``, written so that ONNX Runtime's CPU runs them."""

    def __init__(self, plan: TensorRTPlan) -> None:
        super().__init__("cpu", plan.tokens)
        self._plan = plan
        self._own: dict[int, tuple[ExpertsNode, ExpertsNode]] = {}

    def legalize(self, site: ExpertsNode) -> ExpertsNode:
        wide = upcast_node(site)
        self._own.setdefault(id(wide), (wide, site))
        return wide

    def rank(self, site: ExpertsNode) -> list[LoweringChoice]:
        own = self._own[id(site)][1]
        lowering = self._plan.cpu_lowering(own)
        return [LoweringChoice(lowering.name, lowering, self._plan.choice(own).reason)]

    def open_session(self, site: ExpertsNode, lowering: Lowering) -> Session:
        return session_of(site, lowering)
