"""The process that builds one engine: reads a JSON job, writes the plan, and says in a JSON file how it went.

    python worker.py job.json

It is a file of its own that imports nothing of moeopt: the builder may crash, hang or take all memory, and PyTorch
would cost it seconds. Every message of the builder goes to the log at once, so the last one is there after a crash.
"""

import ctypes
import importlib
import json
import os
import sys
import time
from typing import Any

from moeopt.value_types import PyObject, TrtObject

NO_RANDOM_ADDRESSES = 0x0040000
"""``ADDR_NO_RANDOMIZE`` of personality(2)."""
LETTERS = {"INTERNAL_ERROR": "E", "ERROR": "E", "WARNING": "W", "INFO": "I", "VERBOSE": "V"}


def main(path: str) -> None:
    with open(path) as file:
        job = json.load(file)
    sys.path[:] = job["sys_path"]
    trt = importlib.import_module(job["product"])
    with open(job["log"], "w", buffering=1) as log:
        done = build(trt, job, log)
    with open(job["result"], "w") as file:
        json.dump(done, file)


def build(trt: TrtObject, job: dict[str, Any], log: PyObject) -> dict[str, Any]:
    """Parse and build; the keys of what it returns are those of ``build.Built``, or ``errors`` alone."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: PyObject, message: str) -> None:
            log.write(f"{LETTERS.get(severity.name, 'I')}: {message}\n")

    started = time.perf_counter()
    logger = Logger()
    builder = trt.Builder(logger)
    config = builder.create_builder_config()
    if hasattr(config, "set_compute_capability"):  # TensorRT itself builds for the GPU that is there
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{job['sm']}"), 0):
            return {"errors": [{"text": f"the builder does not take sm_{job['sm']}"}]}
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["model"]):
        return {"errors": [format_parser_error(parser.get_error(n)) for n in range(parser.num_errors)]}
    inputs = [network.get_input(n) for n in range(network.num_inputs)]
    shaped = [x.name for x in inputs if x.is_shape_tensor]
    if shaped:
        return {"errors": [{"text": f"the input {shaped[0]} sets sizes by its values, which has no profile"}]}
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            profile.set_shape(name, least, best, most)
        if config.add_optimization_profile(profile) < 0:
            return {"errors": [{"text": f"the builder does not take the profile {shapes}"}]}
    set_flags(trt, config, job)
    if job["timing_cache"]:  # TensorRT for RTX times nothing while it builds, and keeps none
        config.set_timing_cache(config.create_timing_cache(read(job["timing_cache"])), False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"errors": []}  # what it was is in the log
    with open(job["plan"], "wb") as file:
        file.write(memoryview(plan))
    if job["timing_cache"]:
        with open(job["timing_cache"], "wb") as file:
            file.write(memoryview(config.get_timing_cache().serialize()))
    return {
        "version": str(trt.__version__),
        "inputs": [end(x) for x in inputs],
        "outputs": [end(network.get_output(n)) for n in range(network.num_outputs)],
        "flags": [name for name in dir(trt.BuilderFlag) if name.isupper() and flag(trt, config, name)],
        "seconds": time.perf_counter() - started,
    }


def set_flags(trt: TrtObject, config: PyObject, job: dict[str, Any]) -> None:
    """TF32 rounds float32 matmuls to 10 bits of mantissa and is on by default; here it is on when asked for."""
    (config.set_flag if job["tf32"] else config.clear_flag)(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def flag(trt: TrtObject, config: PyObject, name: str) -> bool:
    return bool(config.get_flag(getattr(trt.BuilderFlag, name)))


def end(tensor: PyObject) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}


def format_parser_error(error: PyObject) -> dict[str, Any]:
    """A parser's error: what it says, and the node that it says it of."""
    return {
        "text": error.desc(),
        "code": error.code().name,
        "node": error.node_name(),
        "op": error.node_operator(),
    }


def read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def fix_addresses() -> None:
    """Start this process again where its memory always lies at the same addresses, if the system allows it.

    The builder numbers the sizes of a graph in the order of pointers: with random addresses, two plans of a language
    model with a cache differ in a few of those numbers.
    """
    if sys.platform != "linux" or "--fixed" in sys.argv:
        return
    system = ctypes.CDLL(None)
    if system.personality(system.personality(0xFFFFFFFF) | NO_RANDOM_ADDRESSES) != -1:
        os.execv(sys.executable, [sys.executable, *sys.argv, "--fixed"])


if __name__ == "__main__":
    fix_addresses()
    del sys.path[0]  # the files beside this one are no modules of the builder's
    main(sys.argv[1])
