"""moeopt: find the mixture-of-experts blocks of any PyTorch model, rewrite them into grouped-expert ops, prove it.

The names below are imported when they are first used. pytest loads ``moeopt.pytest_plugin`` in every run wherever
moeopt is installed, and a run that never uses it shall not wait for torch.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from moeopt.value_types import PyObject

if TYPE_CHECKING:
    from moeopt.api import Optimized, explain, load, optimize, verify
    from moeopt.distributed import distribute
    from moeopt.errors import (
        BundleError,
        CaptureError,
        CheckpointError,
        Declined,
        MoeoptError,
        NotSaveableError,
        RankLostError,
        UsageError,
    )
    from moeopt.inspection import Inspection, inspect
    from moeopt.ir.specs import ExpertsSpec, RouterSpec
    from moeopt.limits import LoadLimits
    from moeopt.onnx_in.whole_file import from_onnx
    from moeopt.options import Options, QuantPlan
    from moeopt.planning import ClusterPlan, plan
    from moeopt.profiling import LoadProfile, profile

__version__ = "0.1.0"

_HOMES = {
    "moeopt.api": "Optimized explain load optimize verify",
    "moeopt.distributed": "distribute",
    "moeopt.errors": "BundleError CaptureError CheckpointError Declined MoeoptError NotSaveableError "
    "RankLostError UsageError",
    "moeopt.inspection": "Inspection inspect",
    "moeopt.ir.specs": "ExpertsSpec RouterSpec",
    "moeopt.limits": "LoadLimits",
    "moeopt.onnx_in.whole_file": "from_onnx",
    "moeopt.options": "Options QuantPlan",
    "moeopt.planning": "ClusterPlan plan",
    "moeopt.profiling": "LoadProfile profile",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "BundleError",
    "CaptureError",
    "CheckpointError",
    "ClusterPlan",
    "Declined",
    "ExpertsSpec",
    "Inspection",
    "LoadLimits",
    "LoadProfile",
    "MoeoptError",
    "NotSaveableError",
    "Optimized",
    "Options",
    "QuantPlan",
    "RankLostError",
    "RouterSpec",
    "UsageError",
    "__version__",
    "distribute",
    "explain",
    "from_onnx",
    "inspect",
    "load",
    "optimize",
    "plan",
    "profile",
    "verify",
]


def __getattr__(name: str) -> PyObject:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"moeopt.{name}") is not None:
        value = importlib.import_module(f"moeopt.{name}")  # a submodule: moeopt.errors, moeopt.ops
    else:
        raise AttributeError(f"module 'moeopt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
