"""The bundle: a directory that holds an optimised model, what it was checked for, and the means to check again."""

from moeopt.engine.fingerprint import fingerprint
from moeopt.engine.golden import GoldenCheck
from moeopt.engine.manifest import Manifest, is_bundle, read_backend, read_manifest, write_bundle
from moeopt.engine.onnx_bundle import load_onnx_bundle, replay_golden, save_onnx_bundle, was_replayed
from moeopt.engine.onnx_engine import OnnxEngine
from moeopt.engine.onnx_target import AbsentEngine
from moeopt.engine.torch_bundle import LoadedEngine, load_torch_bundle, save_torch_bundle, verify_torch_bundle
from moeopt.engine.trt_bundle import load_trt_bundle, save_trt_bundle

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
