"""moeopt: find the mixture-of-experts blocks of any PyTorch model, rewrite them into grouped-expert ops, prove it."""

from moeopt.api import Optimized, explain, load, optimize, verify
from moeopt.errors import (
    BundleError,
    CaptureError,
    CheckpointError,
    Declined,
    MoeoptError,
    NotSaveableError,
    UsageError,
)
from moeopt.inspection import Inspection, inspect
from moeopt.ir.specs import ExpertsSpec, RouterSpec
from moeopt.options import Options

__version__ = "0.1.0"

__all__ = [
    "BundleError",
    "CaptureError",
    "CheckpointError",
    "Declined",
    "ExpertsSpec",
    "Inspection",
    "MoeoptError",
    "NotSaveableError",
    "Optimized",
    "Options",
    "RouterSpec",
    "UsageError",
    "__version__",
    "explain",
    "inspect",
    "load",
    "optimize",
    "verify",
]
