"""A TensorRT engine that is called as the model was called: on its GPU it runs, elsewhere it says what it needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree

from moeopt.backends.onnxrt.engine import GraphEngine, OnnxEngine
from moeopt.backends.onnxrt.fallback_graph import fallback_among
from moeopt.backends.onnxrt.offline_engine import OfflineEngine
from moeopt.backends.onnxrt.session import GRAPH
from moeopt.backends.registry import open_bundle
from moeopt.backends.tensorrt.product import product
from moeopt.backends.tensorrt.profiles import fits
from moeopt.backends.tensorrt.runtime import EngineRunner, Needs, lacking, this_machine
from moeopt.bundle.manifest import Manifest
from moeopt.bundle.temp_folder import TemporaryFolder
from moeopt.errors import EngineNotExecutableError
from moeopt.value_types import PyObject

PLAN = "engine.plan"
DEVICE = "cuda"


def provider_of(needs: Needs) -> str:
    """ "tensorrt_rtx sm_89"."""
    return f"{needs.product} sm_{needs.sm}"


def built_not_executed(needs: Needs) -> str:
    """The ``device`` of a certificate whose verdict is that of a replay of the ONNX form."""
    return f"{provider_of(needs)} (built, not executed; replayed on cpu)"


def inside(profiles: PyObject, signature: Mapping[str, Any], call: tuple[Any, Any]) -> bool:
    """Whether some profile holds the sizes of a call of the graph."""
    leaves = pytree.tree_leaves((tuple(call[0]), dict(call[1])))
    shapes = {e["onnx"]: v.shape for e, v in zip(signature["inputs"], leaves, strict=True) if "onnx" in e}
    return not profiles or any(not fits(profile, shapes) for profile in profiles)


def onnx_form(files: Collection[str]) -> str:
    """The graph among these files that ONNX Runtime's CPU runs: the CPU fallback graph, where there is one."""
    return fallback_among(files) or GRAPH


class TensorRTEngine(GraphEngine):
    """A plan on this machine's GPU; ``session`` is the :class:`~moeopt.backends.tensorrt.runtime.EngineRunner`.

    Raises:
        EngineNotExecutableError: TensorRT refuses the plan.
    """

    def __init__(
        self,
        directory: Path,
        signature: Mapping[str, Any],
        needs: Needs,
        profiles: PyObject,
        keep: TemporaryFolder | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        def open_session() -> EngineRunner:
            return EngineRunner(Path(directory) / PLAN, product(needs.product), provider_of(needs), profiles)

        super().__init__(directory, signature, open_session, DEVICE, keep, manifest)
        self.needs = needs

    runtime = "TensorRT"

    @property
    def described(self) -> str:
        return self.provider

    def holds(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
        return inside(self.session.profiles, self.signature, call)

    def _reopening(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open_bundle, ()


class OfflineTensorRTEngine(OfflineEngine):
    """Stands for a plan that this machine cannot run, and was not run.

    Raises:
        EngineNotExecutableError: whenever it is called.
    """

    def __init__(
        self,
        directory: Path,
        signature: Mapping[str, Any],
        needs: Needs,
        keep: TemporaryFolder | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        super().__init__(directory, signature, provider_of(needs), keep, manifest)
        self.needs, self.device = needs, torch.device(DEVICE)

    @property
    def built_for(self) -> str:
        return built_not_executed(self.needs)

    def replay(self) -> OnnxEngine:
        """Its ONNX form on CPU."""
        saved = None if self.manifest is None else self.manifest.data["files"]
        graph = onnx_form([path.name for path in self.directory.iterdir()] if saved is None else saved)
        return OnnxEngine(self.directory, self.signature, keep=self._keep, graph=graph)

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> NoReturn:
        raise EngineNotExecutableError(
            f"the engine was built for {self.provider} and does not run here: {lacking(self.needs, here(self.needs))}. "
            f"To run it on such a machine, {self.way_there}; moeopt.verify of the directory replays its ONNX form "
            "here, and moeopt.load(directory, device='cpu') runs that form"
        )

    def _reopening(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open_bundle, ()


def open_built(
    directory: Path, signature: Mapping[str, Any], needs: Needs, profiles: PyObject, keep: TemporaryFolder
) -> TensorRTEngine | OfflineTensorRTEngine:
    """What ``build_trt`` wrote, as an engine of this machine, or of one that can run it."""
    if lacking(needs, here(needs)):
        return OfflineTensorRTEngine(directory, signature, needs, keep)
    return TensorRTEngine(directory, signature, needs, profiles, keep)


def here(needs: Needs) -> PyObject:
    """What this machine has of it."""
    return this_machine(needs.product)
