"""An ``InferenceSession`` that takes and gives torch tensors without copies, on the provider that was asked for."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from moeopt.backends.onnxrt.bound import BoundTensors, placed
from moeopt.backends.onnxrt.cuda_graph import CUDA_GRAPH, GraphRuns, asks_for_graphs
from moeopt.backends.onnxrt.idle_optimizers import idle_optimizers
from moeopt.backends.onnxrt.providers import PROVIDERS, available, runtime
from moeopt.backends.onnxrt.stream import SessionStream
from moeopt.errors import EngineNotExecutableError, LimitError, UsageError
from moeopt.limits import TimeLimit
from moeopt.value_types import JsonValue, OrtObject, PyObject

_OPTIONS = {"cuda": {"use_tf32": "0"}}
"""ONNX Runtime rounds float32 matmuls to 10 bits of mantissa on CUDA unless told not to; PyTorch does not."""


_ON_CPU = frozenset(
    (
        "Shape Size Gather Concat Unsqueeze Squeeze Slice Range Reshape Identity Constant ConstantOfShape Expand Cast "
        "Add Sub Mul Div Mod Neg Abs Min Max ReduceProd Floor Ceil Round Sqrt Equal Greater GreaterOrEqual Less "
        "LessOrEqual Where And Or Not"
    ).split()
)
"""What ONNX Runtime places on the CPU by choice: sizes and positions. CUDA has each of these for floats."""


EXTERNAL_DATA = "model.onnx.data"


GRAPH = "model.onnx"


NATIVE = "model.native.onnx"
"""The same graph with moeopt's own operator for its experts, over the weights of ``GRAPH``."""


VERIFIED = "verified.onnx"
"""Beside an engine's graph, and in no bundle: the graph with float activations, over the same weights."""


VERIFIED_NATIVE = "verified.native.onnx"
"""The same beside ``NATIVE``."""


_NO_COPIES = "session.disable_prepacking"
"""The entry with which kernels read weights where they are, and make no copy in a layout of their own."""


FLOAT_ROWS = "session.qdq_matmulnbits_accuracy_level"
"""The entry without which rows become int8 where ONNX Runtime makes a MatMulNBits of DequantizeLinear and MatMul."""


ISA_ENTRY = "moeopt.isa"
"""The entry of a session's configuration that names the operator's instruction set, by its bit."""


def data_of(graph: str) -> str:
    """The name of the file with a graph's weights."""
    return f"{GRAPH if graph == NATIVE else graph}.data"


Prepare = Callable[[Any], None]
"""Changes an ``onnxruntime.SessionOptions``."""


def no_change(options: PyObject) -> None:
    """Leaves a session's options as they are."""


def mapped_options(given: JsonValue = None) -> OrtObject:
    """``given``, or the default options, for a session whose weights stay pages of the graph's data file.

    Raises:
        UsageError: ``given`` says the opposite.
    """
    options = given
    if options is None:
        options = runtime().SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
    said = _entry(options, _NO_COPIES)
    if said not in (None, "1"):
        raise UsageError(f"mapped=True keeps weights in their file, and session_options set {_NO_COPIES}={said}")
    if said is None:
        options.add_session_config_entry(_NO_COPIES, "1")
    return options


def _entry(options: OrtObject, name: str) -> str | None:
    """An entry of a session's configuration; None where it was not set."""
    try:
        said: str = options.get_session_config_entry(name)
    except Exception:  # ONNX Runtime's own
        return None
    return said


class Session:
    """One graph, loaded; :meth:`run` takes named tensors.

    Args:
        model: the path of a ``.onnx`` file, or its bytes.
        provider: as :func:`provider_named` spells it. With one other than ``cpu``, a node that only the CPU could
            run is an error, not a silent fallback; arithmetic on sizes may stay there. (The runtime's own
            ``session.disable_cpu_ep_fallback`` would refuse that too, and so nearly every graph with free sizes.)
        session_options: an ``onnxruntime.SessionOptions`` of the user's own, which get ``FLOAT_ROWS`` where they lack
            it; None means the default. With the entry ``moeopt.cuda_graph`` = "1", runs are replayed from CUDA graphs.
        threads: intra-op threads; None means as many as torch uses here.
        prepare: changes the options before a session is made of them.

    Attributes:
        provider: what really runs it, as the session says.
        session: the ``onnxruntime.InferenceSession``.
        after_run: called when a run is over.

    Raises:
        UsageError: the provider is not on this machine.
        EngineNotExecutableError: it is, and does not start, or leaves nodes to the CPU.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        provider: str = "cpu",
        session_options: JsonValue = None,
        threads: int | None = None,
        prepare: Prepare = no_change,
    ) -> None:
        ort = runtime()
        there = available()
        if provider not in there:
            raise UsageError(f"provider {provider!r} is not on this machine; it has: {', '.join(there)}")
        options = session_options
        if options is None:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = threads or torch.get_num_threads()
        prepare(options)
        if _entry(options, FLOAT_ROWS) is None:
            options.add_session_config_entry(FLOAT_ROWS, "1")
        if provider != "cpu":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        source = model if isinstance(model, bytes) else os.fspath(model)
        captures = asks_for_graphs(options, provider)
        self._stream: SessionStream | None = None
        given = {}
        if provider != "cpu":
            self._stream = SessionStream(torch.device("cuda", torch.cuda.current_device()))
            given = _OPTIONS.get(provider, {}) | self._stream.options | ({"enable_cuda_graph": "1"} if captures else {})
        try:
            left_out = idle_optimizers(source, provider)
            more = {"disabled_optimizers": left_out} if left_out else {}
            self.session = ort.InferenceSession(source, options, providers=[(PROVIDERS[provider], given)], **more)
        except Exception as err:  # ONNX Runtime's own, of many classes
            if not captures:
                raise
            raise EngineNotExecutableError(
                f"ONNX Runtime opens no session with {CUDA_GRAPH}: {err}. Leave it out"
            ) from None
        real = self.session.get_providers()[0]
        self.provider = next((short for short, name in PROVIDERS.items() if name == real), real)
        if provider != "cpu":
            check_placement(self.session, provider)
        self.device = torch.device("cpu") if self._stream is None else self._stream.device
        self.inputs = [spec.name for spec in self.session.get_inputs()]
        self.outputs = [spec.name for spec in self.session.get_outputs()]
        self._is_bool = [spec.type == "tensor(bool)" for spec in self.session.get_outputs()]
        self.after_run: Callable[[], None] | None = None
        self._time: TimeLimit | None = None
        self._threads = threading.local()
        self._graphs: GraphRuns | None = None
        if captures and self._stream is not None:
            self._graphs = GraphRuns(self.session, self._stream, self.outputs, self._is_bool, ort.RunOptions)

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """End a run that is not done ``seconds`` after this was entered: ``LimitError``. For one thread only."""
        self._time = TimeLimit(seconds)
        try:
            yield
        finally:
            self._time = None

    def run(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The outputs in the graph's order, on memory that ONNX Runtime made for them. Inputs are read in place.

        On a GPU the run comes after what the caller's stream has queued, and before what it queues next.

        Raises:
            UsageError: ONNX Runtime stops in the graph; the message names the node.
        """
        tensors = {name: placed(inputs[name], self.device) for name in self.inputs}

        def start(binding: OrtObject, options: OrtObject = None) -> None:
            self._start(binding, options, tensors)

        if self._graphs is not None:
            return self._graphs.run(tensors, self.device, start)
        bound = self._bound_here()
        held = [bound.bind_input(name, tensor) for name, tensor in tensors.items()]
        bound.free_outputs(self.outputs, self.device)
        with contextlib.nullcontext() if self._stream is None else self._stream.ordered():
            start(bound.binding)
        del held
        if self.after_run is not None:
            self.after_run()
        return bound.outputs(self._is_bool)

    def _bound_here(self) -> BoundTensors:
        """This thread's binding: a run of another thread may be under way."""
        found: BoundTensors | None = getattr(self._threads, "bound", None)
        if found is None:
            found = self._threads.bound = BoundTensors(self.session)
        return found

    def _start(self, binding: OrtObject, options: OrtObject, inputs: Mapping[str, torch.Tensor]) -> None:
        try:
            if self._time is None:
                self.session.run_with_iobinding(binding, options)
            else:
                self._run_within(binding, options or runtime().RunOptions(), self._time)
        except LimitError:
            raise
        except Exception as err:  # ONNX Runtime's own, of many classes
            given = ", ".join(f"{name} {tuple(inputs[name].shape)}" for name in self.inputs[:8])
            raise UsageError(
                f"ONNX Runtime stops {_where(err)}, with {given}: sizes or values that the graph does not take. "
                "Compare with the example inputs, or run the original model on this call"
                + ("" if self._graphs is None else f"; or leave out {CUDA_GRAPH}: not every graph can be captured")
            ) from err

    def _run_within(self, binding: OrtObject, options: OrtObject, time: TimeLimit) -> None:
        options.log_severity_level = 4
        done = threading.Event()
        end = functools.partial(setattr, options, "terminate", True)
        threading.Thread(target=time.watch, args=(done, end), daemon=True).start()
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception:  # ONNX Runtime's own, of many classes
            if options.terminate:
                raise LimitError(
                    f"its runs take longer than {time.seconds:.3g} s: if you trust the bundle, give it longer: "
                    "moeopt.load(directory, limits=moeopt.LoadLimits(seconds=...)), or `moeopt verify --seconds`"
                ) from None
            raise
        finally:
            done.set()


def _where(err: Exception) -> str:
    """The node that a run stopped at, and what its kernel said."""
    text = str(err)
    node = re.search(r"running (\w+) node\. Name:'([^']*)'", text)
    said = text.partition("Status Message:")[2] or text
    said = re.sub(r"^.*?\.(?:h|cc|cpp):\d+ \S+(?: \S+\([^)]*\)| .*?\) )?", "", said.strip()).strip()
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = lines[0][:300] if lines else type(err).__name__
    return f"at the node {node[2]!r} ({node[1]}): {told}" if node else f"({told})"


def check_placement(session: OrtObject, provider: str) -> None:
    """``EngineNotExecutableError`` unless ``provider`` runs all of a session but arithmetic on sizes."""
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise EngineNotExecutableError(
            f"{PROVIDERS[provider]} does not start on this machine, and ONNX Runtime took "
            f"{session.get_providers()[0]} instead: install the CUDA and cuDNN versions that this onnxruntime-gpu needs"
        )
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise EngineNotExecutableError(
            f"onnxruntime {runtime().__version__} does not tell which provider runs a node: upgrade onnxruntime-gpu"
        )
    left = [
        f"{node.name} ({node.domain or 'ai.onnx'}.{node.op_type})"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == PROVIDERS["cpu"]
        for node in part.get_nodes()
        if node.domain not in ("", "ai.onnx") or node.op_type not in _ON_CPU
    ]
    if left:
        raise EngineNotExecutableError(
            f"{PROVIDERS[provider]} has no kernel for {left[0]}"
            + (f" and {len(left) - 1} more nodes" if left[1:] else "")
            + ", and the CPU would run it: use device='cpu', or another version of onnxruntime-gpu"
        )
