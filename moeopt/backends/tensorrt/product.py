"""Which of the two TensorRT packages is here: TensorRT for RTX, or TensorRT; they share one Python API.

TensorRT for RTX (``tensorrt_rtx``) builds engines for a named compute capability and needs no GPU to build.
TensorRT (``tensorrt``) builds for the GPU of the machine that it runs on.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from dataclasses import dataclass

from moeopt.errors import UsageError
from moeopt.value_types import TrtObject

RTX, REGULAR = "tensorrt_rtx", "tensorrt"
LABELS = {RTX: "TensorRT for RTX", REGULAR: "TensorRT"}
_INSTALL = {
    RTX: "pip install 'moeopt[tensorrt]'",
    REGULAR: "pip install tensorrt-cu13 --extra-index-url https://pypi.nvidia.com "
    "(what PyPI alone has under that name is a source stub whose libraries are not there)",
}


@dataclass(frozen=True)
class Product:
    """An importable TensorRT package.

    Attributes:
        name: "tensorrt_rtx" or "tensorrt", as it is imported.
        version: as the package states it, like "1.7.1.116".
        module: the imported package.
        cuda: the CUDA version that its libraries are for, 13 for "tensorrt-rtx-cu13"; None where it is not told.
    """

    name: str
    version: str
    module: TrtObject
    cuda: int | None = None

    @property
    def label(self) -> str:
        return LABELS[self.name]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def product(name: str) -> Product:
    """The package of that name.

    Raises:
        UsageError: it is not installed or does not start; the message has the command that installs it.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as err:
        missing = isinstance(err, ModuleNotFoundError) and err.name == name
        what = "which is not installed" if missing else f"which does not start ({str(err)[:200]})"
        raise UsageError(f"backend 'tensorrt' needs {LABELS[name]}, {what}: {_INSTALL[name]}") from None
    return Product(name, str(module.__version__), module, _cuda_of(name))


def _cuda_of(name: str) -> int | None:
    """From the name of the installed distribution, "tensorrt-rtx-cu13"."""
    for distribution in importlib.metadata.distributions():
        found = re.fullmatch(rf"{name}_cu(\d+)", (distribution.name or "").replace("-", "_").lower())
        if found:
            return int(found.group(1))
    return None


def exporter_packages() -> None:
    """``UsageError`` unless the packages that write the ONNX graph, and run it on the CPU, are installed."""
    try:
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as err:
        raise UsageError(f"backend 'tensorrt' needs {err.name}: pip install 'moeopt[tensorrt]'") from None
