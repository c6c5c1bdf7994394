"""A stand-in for the ``tensorrt_rtx`` package in the builder's process; a file beside it, "mode", says what it does."""

import ctypes
import os
import time
from pathlib import Path
from types import SimpleNamespace

MODE = (Path(__file__).with_name("mode").read_text() if Path(__file__).with_name("mode").exists() else "build").strip()
__version__ = "9.9"
NAMES = ["a.experts/up", "b.experts/up"]
VERBOSE, ERROR = SimpleNamespace(name="VERBOSE"), SimpleNamespace(name="ERROR")


assert "SECRET" not in os.environ, "the builder inherits what it needs and no more"


class ILogger:
    pass


class BuilderFlag:
    TF32 = "TF32"


class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 0


class ProfilingVerbosity:
    DETAILED = 2


class ComputeCapability:
    SM89 = 89


class Config:
    def __init__(self):
        self.flags = {"TF32"}

    def set_compute_capability(self, capability, index):
        return MODE != "no capability"

    def create_timing_cache(self, blob):
        return SimpleNamespace(serialize=lambda: blob + b"+")

    def set_timing_cache(self, cache, ignore):
        self.cache = cache

    def get_timing_cache(self):
        return self.cache

    def add_optimization_profile(self, profile):
        return -1 if MODE == "no profile" else 0

    def set_flag(self, flag):
        self.flags.add(flag)

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def get_flag(self, flag):
        return flag in self.flags


if __name__ == "tensorrt":  # it builds for the GPU that is there, and is not told for which
    del Config.set_compute_capability


class Network:
    num_inputs = num_outputs = 1

    def get_input(self, number):
        return SimpleNamespace(
            name="x", dtype=SimpleNamespace(name="FLOAT"), shape=(-1, 4), is_shape_tensor=MODE == "shape input"
        )

    get_output = get_input


class Profile:
    def set_shape(self, name, *three):
        assert name == "x" and len(three) == 3


class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        pass

    def parse_from_file(self, path):
        return MODE != "refuse"

    def get_error(self, number):
        return SimpleNamespace(
            desc=lambda: "NonZero plugin creator was not found",
            code=lambda: SimpleNamespace(name="UNSUPPORTED_NODE"),
            node_name=lambda: "b.experts/NonZero_3",
            node_operator=lambda: "NonZero",
        )


class Builder:
    def __init__(self, logger):
        self.logger = logger

    def create_builder_config(self):
        return Config()

    def create_network(self, flags):
        assert flags == 1
        return Network()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        say = self.logger.log
        say(VERBOSE, f"region {{{'...'.join(NAMES)}}}")
        if MODE != "silent":
            say(VERBOSE, "Computing costs for b.experts/up")
        if MODE in ("crash", "silent"):
            ctypes.string_at(0)
        if MODE == "hang":
            time.sleep(60)
        if MODE == "swell":
            held = bytearray(400_000_000)
            held[::4096] = b"x" * len(held[::4096])
            time.sleep(60)
        if MODE == "exit":
            os._exit(7)
        if MODE == "none":
            say(ERROR, "Cannot compile operation 'b.experts/up' for Ada")
            return None
        say(VERBOSE, "Layers:\nName: b.experts/up, LayerType: gemm, Metadata: [ONNX Layer: b.experts/up]\n")
        say(SimpleNamespace(name="INFO"), "Total Activation Memory: 512 bytes")
        return b"plan of " + MODE.encode()
