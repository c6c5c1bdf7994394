"""A serialised engine on CUDA: torch tensors go in and come out by address, on the current stream.

One class serves TensorRT and TensorRT for RTX. What an engine needs of a machine, and what a machine has, are plain
numbers, so that the checks can be made anywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moeopt.backends.tensorrt.product import LABELS, Product
from moeopt.backends.tensorrt.profiles import fits
from moeopt.errors import EngineNotExecutableError, UsageError
from moeopt.value_types import PyObject, TrtObject

_PACKAGES = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}


@dataclass(frozen=True)
class Needs:
    """What a plan runs on.

    Attributes:
        product, version: the package that built it; no other version reads the plan.
        sm: the compute capability, 89 for 8.9.
        cuda: the major CUDA version that the driver must know; None where it is not known.
    """

    product: str
    version: str
    sm: int
    cuda: int | None = None


@dataclass(frozen=True)
class Machine:
    """What is here. ``sm`` is None without a GPU, ``version`` without the package, ``cuda`` without a driver."""

    sm: int | None = None
    version: str | None = None
    cuda: int | None = None


def this_machine(name: str) -> Machine:
    """What this machine has to run plans of the package ``name``; nothing is raised."""
    from moeopt.backends.tensorrt.product import product

    try:
        version: str | None = product(name).version
    except UsageError:
        version = None
    if not torch.cuda.is_available():
        return Machine(None, version)
    major, minor = torch.cuda.get_device_capability()
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()  # builds of PyTorch without CUDA lack it
    return Machine(10 * major + minor, version, driver // 1000 or None)


def lacking(needs: Needs, here: Machine) -> str:
    """Why a plan does not run on a machine, with the way out; "" where it does."""
    label = LABELS[needs.product]
    if here.sm is None:
        return f"it needs a GPU of compute capability {needs.sm // 10}.{needs.sm % 10}, and this machine has none"
    if here.sm != needs.sm:
        return (
            f"it was built for sm_{needs.sm}, and this machine's GPU is sm_{here.sm}: optimise the model again with "
            f"target='sm_{here.sm}'"
        )
    cuda = f"-cu{needs.cuda}" if needs.cuda else ""
    install = f"pip install {_PACKAGES[needs.product]}{cuda}=={needs.version}"
    if here.version is None:
        return f"it needs {label} {needs.version}, which is not installed: {install}"
    if here.version != needs.version:
        return (
            f"it was built by {label} {needs.version}, and {here.version} is installed, which does not read it: "
            f"{install}, or optimise the model again"
        )
    if needs.cuda is not None and here.cuda is not None and here.cuda < needs.cuda:
        return f"it needs a driver for CUDA {needs.cuda}, and this one is for CUDA {here.cuda}: update the GPU's driver"
    return ""


def stream_of(device: torch.device) -> int:
    """The handle of PyTorch's current stream."""
    return int(torch.cuda.current_stream(device).cuda_stream)


class EngineRunner:
    """One engine, deserialised; :meth:`run` takes named tensors and gives the outputs in the plan's order.

    Args:
        plan: the file that the builder wrote.
        product: the package, of the version that built it.
        profiles: those it was built with, for :meth:`run` to choose from.
        device: the GPU.

    Attributes:
        inputs, outputs: names, in the plan's order.
        provider: "tensorrt_rtx sm_89" or the like, for reports.

    Raises:
        EngineNotExecutableError: the package refuses the plan; the message has its words.
    """

    def __init__(
        self,
        plan: Path,
        product: Product,
        provider: str,
        profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]] = (),
        device: torch.device | None = None,
    ) -> None:
        trt = product.module
        self.product, self.provider, self.profiles = product, provider, list(profiles)
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        self._words: list[str] = []
        self._logger = _logger(trt, self._words)
        self._runtime = trt.Runtime(self._logger)
        self.engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        self._context: TrtObject = None if self.engine is None else self.engine.create_execution_context()
        if self._context is None:
            raise EngineNotExecutableError(f"{plan}: {product} does not load it: {self._last_complaint()}")
        names = [self.engine.get_tensor_name(n) for n in range(self.engine.num_io_tensors)]
        of = {name: self.engine.get_tensor_mode(name) for name in names}
        self.inputs = [n for n in names if of[n] == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if of[n] == trt.TensorIOMode.OUTPUT]
        self._on_host = {n for n in names if self.engine.get_tensor_location(n) == trt.TensorLocation.HOST}
        self._dtypes = {n: _torch_dtype(trt, self.engine.get_tensor_dtype(n)) for n in names}
        self._profile = 0
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The outputs on the device, ready for work on the current stream; inputs are copied there where they are not.

        Raises:
            UsageError: sizes outside every profile; a dtype that the engine does not take.
        """
        number = self._choose({n: tuple(inputs[n].shape) for n in self.inputs})
        with self._lock:  # a context has one set of addresses
            stream = stream_of(self.device)
            if number != self._profile:
                self._must(self._context.set_optimization_profile_async(number, stream), f"profile {number}")
                self._profile = number
            held = [self._bind_input(name, inputs[name]) for name in self.inputs]
            if missing := self._context.infer_shapes():
                raise EngineNotExecutableError(f"{self.product} does not know the sizes of {', '.join(missing)}")
            results = [self._bind_output(name) for name in self.outputs]
            self._must(self._context.execute_async_v3(stream), "running it")
            del held
        return [result for result, _ in results]

    def _choose(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        reasons = [fits(profile, shapes) for profile in self.profiles]
        if not reasons or "" in reasons:
            return reasons.index("") if reasons else 0
        raise UsageError(f"{reasons[0]}: optimise the model again with profile= for these sizes")

    def _bind_input(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if value.dtype != self._dtypes[name]:
            raise UsageError(f"{name} is {value.dtype}, and the engine takes {self._dtypes[name]}")
        there = torch.device("cpu") if name in self._on_host else self.device
        tensor = value.detach().to(there).contiguous().resolve_conj().resolve_neg()
        buffer = tensor if tensor.numel() else torch.empty(1, dtype=tensor.dtype, device=there)  # no null address
        self._must(
            self._context.set_input_shape(name, tuple(tensor.shape)), f"the shape {tuple(tensor.shape)} of {name}"
        )
        self._must(self._context.set_tensor_address(name, buffer.data_ptr()), name)
        return buffer

    def _bind_output(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The result, and what its address is taken from: TensorRT refuses the null address of an empty tensor."""
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise EngineNotExecutableError(f"the sizes {shape} of {name} depend on values: run the engine's ONNX form")
        there = torch.device("cpu") if name in self._on_host else self.device
        result = torch.empty(shape, dtype=self._dtypes[name], device=there)
        buffer = result if result.numel() else torch.empty(1, dtype=result.dtype, device=there)
        self._must(self._context.set_tensor_address(name, buffer.data_ptr()), name)
        return result, buffer

    def _must(self, done: PyObject, what: str) -> None:
        if done is False:
            raise EngineNotExecutableError(f"{self.product} refuses {what}: {self._last_complaint()}")

    def _last_complaint(self) -> str:
        return self._words[-1][:300] if self._words else "it gives no reason"


def _logger(trt: TrtObject, words: list[str]) -> PyObject:
    """A logger that keeps what the package complains of."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: PyObject, message: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                words.append(message)
                del words[:-20]

    return Logger()


def _torch_dtype(trt: TrtObject, dtype: PyObject) -> torch.dtype:
    names = {
        **{"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
        **{"INT64": torch.int64, "INT32": torch.int32, "INT8": torch.int8, "UINT8": torch.uint8},
    }
    if dtype.name not in names:
        raise EngineNotExecutableError(f"an engine with an end of the dtype {dtype.name} has no tensors in PyTorch")
    return names[dtype.name]
