"""The bundle: a directory that holds an optimised model, what it was checked for, and the means to check again."""

from moeopt.backends.onnxrt.bundle import load_onnx_bundle, replay_golden, save_onnx_bundle, was_replayed
from moeopt.backends.onnxrt.engine import OnnxEngine
from moeopt.backends.onnxrt.offline_engine import AbsentEngine
from moeopt.backends.tensorrt.bundle import load_trt_bundle, save_trt_bundle
from moeopt.backends.torch.bundle import LoadedEngine, load_torch_bundle, save_torch_bundle, verify_torch_bundle
from moeopt.bundle.fingerprint import fingerprint
from moeopt.bundle.golden import GoldenCheck
from moeopt.bundle.manifest import Manifest, is_bundle, read_backend, read_manifest, write_bundle

__all__ = [
    "AbsentEngine",
    "GoldenCheck",
    "LoadedEngine",
    "Manifest",
    "OnnxEngine",
    "fingerprint",
    "is_bundle",
    "load_onnx_bundle",
    "load_torch_bundle",
    "load_trt_bundle",
    "read_backend",
    "read_manifest",
    "replay_golden",
    "save_onnx_bundle",
    "save_torch_bundle",
    "save_trt_bundle",
    "verify_torch_bundle",
    "was_replayed",
    "write_bundle",
]
