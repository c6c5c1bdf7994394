"""A model as a graph in a session that is called as the model was called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from moeopt.backends.onnxrt.accuracy import version_notes
from moeopt.backends.onnxrt.custom_op import native_library, register
from moeopt.backends.onnxrt.session import GRAPH, NATIVE, VERIFIED, VERIFIED_NATIVE, Session, data_of, no_change
from moeopt.backends.onnxrt.without_elements import CallsWithoutElements
from moeopt.backends.registry import open_bundle
from moeopt.bundle import values
from moeopt.bundle.binding import Binding
from moeopt.bundle.engine import BundledEngine, no_attribute
from moeopt.bundle.io_names import KEY
from moeopt.bundle.manifest import Manifest
from moeopt.bundle.resident import Residency
from moeopt.bundle.resident_file import ResidentFile
from moeopt.bundle.temp_folder import TemporaryFolder
from moeopt.bundle.tree import build, check_tree
from moeopt.causal_lm.flat_signature import checker, state_results
from moeopt.causal_lm.runner import CausalLM
from moeopt.errors import BundleError, UsageError
from moeopt.value_types import JsonValue, PyObject


class GraphEngine(BundledEngine):
    """A graph with a session that runs it. Call it as the model was called; it returns what the model returned.

    Attributes:
        session: takes and gives named tensors: its ``inputs``, ``outputs``, ``provider``, ``device`` and ``run``.
        provider: what really runs it.
        device: where its results are.
        causal_lm: what calls and generates as a causal language model does, or None for any other model.
        states: the numbers of the graph's results that are recurrent states.
    """

    def __init__(
        self,
        directory: Path,
        signature: Mapping[str, Any],
        open_session: Callable[[], Any],
        device: str,
        keep: TemporaryFolder | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        super().__init__(directory, signature, keep, manifest)
        try:
            self._binding = Binding(signature, lambda name: torch.device(device))
            self._outputs = [
                o["tensor"] if "tensor" in o else _Constant(values.decode(o["constant"], _no_node, torch.device))
                for o in signature["outputs"]
            ]
            fits = check_tree(signature["out_tree"]) == len(self._outputs)
        except (KeyError, TypeError, AttributeError) as err:
            raise BundleError(f"the signature lacks or mistypes a part ({type(err).__name__}: {err})") from None
        self.session = open_session()
        count = len(self.session.outputs)
        if not fits or any(not isinstance(o, _Constant) and o not in range(count) for o in self._outputs):
            raise BundleError("the structure of the result does not fit the graph")
        pairs = zip(signature["inputs"], self._binding.inputs, strict=True)
        self._feeds = {raw["onnx"]: entry["name"] for raw, entry in pairs if "onnx" in raw}
        if set(self.session.inputs) - set(self._feeds):
            raise BundleError(f"the graph takes {self.session.inputs}, and the signature gives {list(self._feeds)}")
        caller = signature.get(KEY)
        self.causal_lm = None if caller is None else CausalLM(self.session, caller, checker(caller))
        self.states = frozenset(() if caller is None else state_results(signature))

    runtime = "ONNX Runtime"

    @property
    def described(self) -> str:
        """The ``device`` of a certificate."""
        return f"onnxruntime {self.provider}"

    def within(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        """While open, a run that is not done after ``seconds`` is a ``LimitError``, where the runtime can be ended."""
        return contextlib.nullcontext()

    def holds(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
        """Whether the engine was built for the sizes of a call."""
        return True

    @property
    def provider(self) -> str:
        return str(self.session.provider)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.session.device
        return device

    def __call__(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        call = self.run_graph if self.causal_lm is None else self.causal_lm
        return call(*args, **kwargs)

    def __getattr__(self, name: str) -> PyObject:
        """``generate``, ``config`` and the rest of a causal language model."""
        caller = self.__dict__.get("causal_lm")
        if caller is None or name.startswith("_"):
            raise no_attribute(name)
        return getattr(caller, name)

    def __setattr__(self, name: str, value: PyObject) -> None:
        if name == "generation_config" and self.__dict__.get("causal_lm") is not None:
            self.causal_lm.generation_config = value  # type: ignore[union-attr]
        else:
            super().__setattr__(name, value)

    def run_graph(self, *args: PyObject, **kwargs: PyObject) -> PyObject:
        """Call the graph itself: for a causal language model, its tensors by name instead of the model's arguments."""
        if self.device.type != "cpu":
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(self.device), (tuple(args), dict(kwargs)))
        bound = self._binding.bind(tuple(args), dict(kwargs))
        feeds = {name: bound[leaf] for name, leaf in self._feeds.items()}
        self._before_run(feeds)
        results = self.session.run(feeds)
        return build(
            self.signature["out_tree"],
            iter([o.value if isinstance(o, _Constant) else results[o] for o in self._outputs]),
        )

    def _before_run(self, feeds: Mapping[str, torch.Tensor]) -> None:
        """Raise where the runtime would not survive a call."""

    def run_flat(self, leaves: Sequence[Any]) -> PyObject:
        """Call it with the leaves of ``(args, kwargs)``, as golden runs store them."""
        if len(leaves) != len(self._binding.inputs):
            raise UsageError(f"the bundle takes {len(self._binding.inputs)} values, not {len(leaves)}")
        args, kwargs = build(self._binding.tree, iter(leaves))
        return self.run_graph(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<moeopt engine {self.where} on {self.provider}>"


class OnnxEngine(GraphEngine):
    """An engine of ONNX Runtime; ``session.session`` is its own ``InferenceSession``, ``graph`` the file it runs."""

    def __init__(
        self,
        directory: Path,
        signature: Mapping[str, Any],
        provider: str = "cpu",
        session_options: JsonValue = None,
        keep: TemporaryFolder | None = None,
        manifest: Manifest | None = None,
        notes: Sequence[str] = (),
        graph: str = GRAPH,
    ) -> None:
        device = "cpu" if provider == "cpu" else "cuda"

        def open_session() -> Session:
            prepare = register if graph in (NATIVE, VERIFIED_NATIVE) else no_change
            return Session(Path(directory) / graph, provider, session_options, prepare=prepare)

        super().__init__(directory, signature, open_session, device, keep, manifest)
        self.notes, self.graph = [*notes, *version_notes(provider)], graph
        self._resident: ResidentFile | None = None
        self._without_elements = CallsWithoutElements(Path(directory) / graph)

    def keep_resident(self, budget: int) -> None:
        """Hold at most ``budget`` bytes of weights in memory between calls, as ``moeopt.load(resident=)`` says."""
        file = self.directory / data_of(self.graph)
        if self.provider != "cpu" or not file.is_file():
            where = "holds them itself" if self.provider == "cpu" else f"runs on {self.provider}"
            raise UsageError(
                f"resident= keeps weights in the pages of a file of their own, and {self.graph} {where}: leave it out"
            )
        self._resident = ResidentFile(budget, file)
        self.session.after_run = self._resident.after

    @property
    def residency(self) -> Residency | None:
        """What keeping weights on disk did so far; None where ``resident`` was not given."""
        return None if self._resident is None else self._resident.residency

    @property
    def described(self) -> str:
        library = native_library() if self.graph == NATIVE else None
        return super().described + ("" if library is None else f" with moeopt's native experts ({library.isa})")

    def verified_form(self) -> OnnxEngine:
        """The engine as it was verified, before its products of codes rounded their activations."""
        return OnnxEngine(self.directory, self.signature, graph=VERIFIED_NATIVE if self.graph == NATIVE else VERIFIED)

    def within(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        allowed: contextlib.AbstractContextManager[None] = self.session.within(seconds)
        return allowed

    def _before_run(self, feeds: Mapping[str, torch.Tensor]) -> None:
        if self.provider == "cpu":
            self._without_elements.check(feeds)

    def _reopening(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open_bundle, (self.provider,)


class _Constant:
    def __init__(self, value: PyObject) -> None:
        self.value = value


def _no_node(name: str) -> PyObject:
    raise BundleError(f"{name!r} is read where only a constant can be")
