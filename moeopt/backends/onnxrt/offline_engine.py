"""An engine for a provider that this machine lacks: it can be saved and replayed, and calling it says where it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from moeopt.backends.onnxrt.engine import OnnxEngine
from moeopt.backends.onnxrt.fallback_graph import FALLBACK, fallback_among
from moeopt.backends.onnxrt.providers import PROVIDERS, available, runtime
from moeopt.backends.registry import open_bundle
from moeopt.bundle.engine import BundledEngine, no_attribute
from moeopt.bundle.io_names import KEY
from moeopt.bundle.manifest import Manifest
from moeopt.bundle.temp_folder import TemporaryFolder
from moeopt.errors import EngineNotExecutableError
from moeopt.value_types import PyObject


def built_for(provider: str) -> str:
    """The ``device`` of a certificate whose verdict is that of a replay."""
    return f"onnxruntime {provider} (built, not executed; replayed on cpu)"


class OfflineEngine(BundledEngine):
    """Stands for a graph that was built and checked for ``provider``, and not run.

    Attributes:
        provider: what it was built for.
        device: where its results would be.

    Raises:
        EngineNotExecutableError: whenever it is called.
    """

    def __init__(
        self,
        directory: Path,
        signature: Mapping[str, Any],
        provider: str,
        keep: TemporaryFolder | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        super().__init__(directory, signature, keep, manifest)
        self.provider = provider
        self.device = torch.device("cpu" if provider == "cpu" else "cuda")

    @property
    def built_for(self) -> str:
        """The ``device`` of a certificate whose verdict is that of :meth:`replay`."""
        return built_for(self.provider)

    def replay(self) -> OnnxEngine:
        """The engine's CPU fallback graph, on CPU."""
        names = () if self.manifest is None else self.manifest.data["files"]
        graph = fallback_among(names) or FALLBACK
        return OnnxEngine(self.directory, self.signature, keep=self._keep, graph=graph)

    @property
    def way_there(self) -> str:
        """How to get it to a machine that runs it."""
        if self.manifest is None:
            return "save it with .save(directory), and there call moeopt.load(directory)"
        return f"copy {self.manifest.directory} there and call moeopt.load"

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> NoReturn:
        lacks = "" if PROVIDERS[self.provider] in runtime().get_available_providers() else " and needs onnxruntime-gpu"
        raise EngineNotExecutableError(
            f"the engine was built for {self.provider}{lacks}, and this machine has: {', '.join(available())}. To run "
            f"it, {self.way_there}; moeopt.verify of the directory replays its CPU fallback graph here, and "
            "moeopt.load(directory, device='cpu') runs that form"
        )

    def __getattr__(self, name: str) -> PyObject:
        if name == "generate" and KEY in self.__dict__.get("signature", {}):
            return self.__call__
        raise no_attribute(name)

    def _reopening(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open_bundle, ()

    def __repr__(self) -> str:
        return f"<moeopt engine {self.where} for {self.provider}, not on this machine>"
